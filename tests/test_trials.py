"""One candidate's way through a study: what is kept is not done again, and what fails says why."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from studies import SHAPES, demo_analysis, demo_checkpoint, demo_hardware, demo_quality, measured_trial

from open_autoglm import trials
from open_autoglm.engines.contract import Logits, Tokens
from open_autoglm.measure.isolation import Failure
from open_autoglm.measure.jobs import (
    LEAST_ROUNDS,
    IncorrectOutput,
    MeasureJob,
    ReferenceDone,
    ReferenceJob,
    Round,
    ScoreJob,
    run_round,
    timed_rounds,
)
from open_autoglm.quality.reference import EvaluationSet, plan_layout
from open_autoglm.schemas import Candidate, Measurements, OptimizeSpec, Trial, Workload
from open_autoglm.settings import Settings
from open_autoglm.study import load_trial, open_study, save_trial
from open_autoglm.trials import (
    Bench,
    begin_trial,
    export_trial,
    measure_trial,
    prepare_reference,
    reference_candidate,
    score_trial,
)

DONE = measured_trial(SHAPES[0])
TIMED = DONE.model_copy(update={"quality": None})


@pytest.fixture
def bench(settings: Settings, tmp_path: Path) -> Bench:
    """What the trials of a study share; the prompts are real, the evaluation texts are never opened."""
    spec = OptimizeSpec(model_path="here", prompt_tokens=4, output_tokens=3, rounds=3)
    prompts = tmp_path / "workload.npy"
    np.save(prompts, np.ones((5, 1, 4), dtype=np.int64))
    shape = {"batch_size": 1, "prompt_tokens": 4, "output_tokens": 3, "rounds": 3, "seed": 0}
    layout = plan_layout(context_tokens=128, spec=spec)
    return Bench(
        study=open_study(spec, demo_checkpoint(), demo_hardware(), settings, tmp_path / "study"),
        spec=spec,
        checkpoint=demo_checkpoint(),
        hardware=demo_hardware(),
        workload=Workload(path=prompts, sha256="", corpus="", **shape),
        evaluation_set=EvaluationSet(
            path=tmp_path / "none", sha256="texts", texts=("a", "b"), layout=layout, vocab_size=8, seed=0
        ),
    )


class Children:
    """Stands in for `run_isolated`: answers in turn, and remembers what it was asked."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, Any, dict[str, Any]]] = []

    def __call__(self, job: str, payload: Any, _answer_type: Any, **how: Any) -> Any:
        self.asked.append((job.rpartition(":")[2], payload, how))
        return self.answers.pop(0)


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Children]:
    def stand_in(*answers: Any) -> Children:
        made = Children(*answers)
        monkeypatch.setattr(trials, "run_isolated", made)
        return made

    return stand_in


def kept(bench: Bench, trial_id: str) -> Trial | None:
    return load_trial(bench.study, trial_id, max_age_hours=1)


# ── resuming ─────────────────────────────────────────────────────────────────────────────────────


def test_a_new_candidate_begins_a_new_trial(bench: Bench, settings: Settings) -> None:
    """Nothing is known of it and nothing is stored yet."""
    trial = begin_trial(bench.study, DONE.candidate, settings)
    assert (trial.id, trial.status, trial.reason) == (DONE.id, "ok", "not run yet")
    assert kept(bench, DONE.id) is None


def test_a_vetoed_candidate_is_kept_with_its_reason(bench: Bench, settings: Settings) -> None:
    """It goes through export, benchmark and evaluation untouched."""
    candidate = DONE.candidate.vetoed("no such device here")
    trial = begin_trial(bench.study, candidate, settings)
    assert (trial.status, trial.reason) == ("vetoed", "no such device here")
    assert export_trial(bench.study, bench.checkpoint, trial, settings) == trial
    assert measure_trial(bench, trial, settings) == trial
    assert score_trial(bench, trial, Path("reference"), settings) == trial
    assert kept(bench, DONE.id) == trial.model_copy(update={"reused": True})


def test_a_finished_trial_is_not_run_again(
    bench: Bench, settings: Settings, children: Callable[..., Children]
) -> None:
    """It comes back with its samples, and no child is started for it."""
    asked = children().asked
    save_trial(bench.study, DONE)
    trial = begin_trial(bench.study, DONE.candidate, settings)
    assert trial.reused
    assert trial.measurements == DONE.measurements
    assert score_trial(bench, measure_trial(bench, trial, settings), Path("r"), settings) == trial
    assert asked == []


def test_a_trial_that_was_timed_is_only_judged(
    bench: Bench, settings: Settings, children: Callable[..., Children]
) -> None:
    """A study that was killed between the two goes on between the two."""
    save_trial(bench.study, TIMED)
    started = children(demo_quality(SHAPES[0]))
    trial = measure_trial(bench, begin_trial(bench.study, DONE.candidate, settings), settings)
    judged = score_trial(bench, trial, Path("reference"), settings)
    assert [name for name, *_ in started.asked] == ["score_candidate"]
    assert judged.quality == demo_quality(SHAPES[0])
    assert judged.metrics == TIMED.metrics


def test_an_expired_trial_is_measured_again(
    bench: Bench, settings: Settings, children: Callable[..., Children]
) -> None:
    """Yesterday's figures are not compared with today's."""
    save_trial(bench.study, DONE)
    two_days_ago = time.time() - 48 * 3600
    os.utime(bench.study.trial_path(DONE.id), (two_days_ago, two_days_ago))
    trial = begin_trial(bench.study, DONE.candidate, settings)
    assert not trial.reused
    assert trial.metrics == {}
    started = children(DONE.measurements)
    trial = trial.model_copy(update={"exported": DONE.exported})
    assert measure_trial(bench, trial, settings).metrics == DONE.metrics
    assert [name for name, *_ in started.asked] == ["measure"]


def test_a_candidate_that_is_proposed_otherwise_is_measured_again(bench: Bench, settings: Settings) -> None:
    """Another knob under the same name is another candidate."""
    save_trial(bench.study, DONE)
    changed = DONE.candidate.model_copy(update={"knobs": {"block_size": 64}})
    assert not begin_trial(bench.study, changed, settings).reused


# ── failing ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("knobs", "status", "reason"),
    [
        ({"export": "raises"}, "failed", "export: RuntimeError: no kernel for this model"),
        ({"export": "segfaults"}, "crashed", "export: ended with SIGSEGV"),
        ({"open": "segfaults"}, "crashed", "benchmark: ended with SIGSEGV"),
    ],
)
def test_what_a_real_child_does_wrong_becomes_the_trials_reason(
    knobs: dict[str, str],
    status: str,
    reason: str,
    bench: Bench,
    settings: Settings,
    fake_engine: Callable[..., Candidate],
) -> None:
    """The stage and what happened, with the log beside it; it is kept and not tried again."""
    candidate = fake_engine("fake-it", **knobs)
    trial = begin_trial(bench.study, candidate, settings)
    trial = export_trial(bench.study, bench.checkpoint, trial, settings)
    trial = measure_trial(bench, trial, settings)
    trial = score_trial(bench, trial, Path("reference"), settings)
    assert (trial.status, trial.reason) == (status, reason)
    assert trial.metrics == {}
    assert trial.log_path is not None
    assert (bench.study.root / trial.log_path).is_file()
    again = begin_trial(bench.study, candidate, settings)
    assert again == trial.model_copy(update={"reused": True})


def test_logits_that_are_not_finite_are_incorrect(
    bench: Bench, settings: Settings, children: Callable[..., Children]
) -> None:
    """Such a candidate has speed and no answer."""
    children(demo_quality(SHAPES[0]).model_copy(update={"finite": False}))
    trial = score_trial(bench, TIMED, Path("reference"), settings)
    assert (trial.status, trial.reason) == ("incorrect", "quality: gave logits that are not finite")


def test_without_a_reference_nothing_can_be_judged(bench: Bench, settings: Settings) -> None:
    """Every trial says what became of the reference."""
    failure = Failure("out_of_memory", "ran out of memory (bad_alloc)")
    trial = score_trial(bench, TIMED, failure, settings)
    assert (trial.status, trial.reason) == ("out_of_memory", "reference: ran out of memory (bad_alloc)")
    assert trial.quality is None


# ── the reference ────────────────────────────────────────────────────────────────────────────────


def test_the_reference_is_fp32_torch_whatever_takes_part() -> None:
    """It is the yardstick, not a contestant."""
    candidate = reference_candidate(demo_analysis(), OptimizeSpec(model_path="m", engines=("onnxruntime",)))
    assert (candidate.id, candidate.precision, candidate.reference) == ("torch-fp32", "fp32", True)


def test_the_reference_is_computed_once_per_checkpoint_and_texts(
    bench: Bench, settings: Settings, children: Callable[..., Children]
) -> None:
    """Another study on the same model and texts finds it."""
    path = next(iter(_reference_paths(bench, settings, children)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    again = children()
    assert prepare_reference(bench, demo_analysis(), settings) == path
    assert again.asked == []
    other = bench.evaluation_set.model_copy(update={"sha256": "other texts"})
    started = children(ReferenceDone(path=path, seconds=1))
    prepare_reference(bench.model_copy(update={"evaluation_set": other}), demo_analysis(), settings)
    assert started.asked[0][1].output != path


def _reference_paths(bench: Bench, settings: Settings, children: Callable[..., Children]) -> list[Path]:
    """Where the job is told to write the reference."""
    started = children(Failure("crashed", "ended with SIGSEGV"))
    assert prepare_reference(bench, demo_analysis(), settings) == Failure("crashed", "ended with SIGSEGV")
    assert all(isinstance(job, ReferenceJob) for _, job, _ in started.asked)
    return [job.output for _, job, _ in started.asked]


# ── what the children are given ──────────────────────────────────────────────────────────────────


def test_timing_and_scoring_open_the_same_session(
    bench: Bench, settings: Settings, children: Callable[..., Children]
) -> None:
    """One cache size, one number of threads, one set of limits: so both run the same kernels."""
    started = children(DONE.measurements, demo_quality(SHAPES[0]))
    begun = begin_trial(bench.study, DONE.candidate, settings)
    trial = measure_trial(bench, begun.model_copy(update={"exported": DONE.exported}), settings)
    score_trial(bench, trial, Path("reference"), settings)
    (_, timing, how), (_, scoring, how_scored) = started.asked
    assert isinstance(timing, MeasureJob)
    assert isinstance(scoring, ScoreJob)
    assert timing.options == scoring.options
    assert timing.options.max_tokens == bench.evaluation_set.layout.window_tokens
    assert timing.options.threads == demo_hardware().cores
    assert how["environment"] == how_scored["environment"]
    assert how["environment"]["OMP_NUM_THREADS"] == str(demo_hardware().cores)
    assert how["timeout_s"] == settings.trial_timeout_s
    assert 0 < how["memory_limit_bytes"] < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# ── a timed round ────────────────────────────────────────────────────────────────────────────────


class Scripted:
    """A session that counts upwards, on a clock of its own: a prefill takes 100 ms and a decode 30 ms."""

    def __init__(self, nan_at: int | None = None) -> None:
        self.nan_at = nan_at
        self.now = 0.0
        self.fed: list[list[int]] = []

    def perf_counter(self) -> float:
        return self.now

    def prefill(self, tokens: Tokens) -> Logits:
        self.now += 0.1
        self.fed = []
        return self._logits(len(tokens), 1)

    def decode(self, tokens: Tokens) -> Logits:
        self.now += 0.03
        self.fed.append(tokens.tolist())
        return self._logits(len(tokens), len(self.fed) + 1)

    def _logits(self, rows: int, token: int) -> Logits:
        logits = np.zeros((rows, 9), dtype=np.float32)
        logits[:, token] = np.nan if token == self.nan_at else 1
        return logits

    def full_logits(self, tokens: Tokens) -> Logits:
        raise AssertionError("timing does not score")

    def facts(self) -> dict[str, str]:
        return {}

    def close(self) -> None:
        raise AssertionError("a round leaves the session open")


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    session = Scripted()
    monkeypatch.setattr("open_autoglm.measure.jobs.time", session)
    return session


PROMPT: Tokens = np.ones((2, 4), dtype=np.int64)


def test_a_round_feeds_each_row_its_own_likeliest_token(session: Scripted) -> None:
    """Greedy decoding: the first token comes from prefill, the others each from the one before."""
    run_round(session, PROMPT, output_tokens=4)
    assert session.fed == [[1, 1], [2, 2], [3, 3]]


def test_ttft_ends_with_the_first_token_and_tpot_begins_there(session: Scripted) -> None:
    """TTFT is the prefill, TPOT the mean of the tokens after the first, and together they are the request."""
    timed = run_round(session, PROMPT, output_tokens=4)
    assert timed.ttft_ms == pytest.approx(100)
    assert timed.token_ms == pytest.approx((30, 30, 30))
    assert timed.tpot_ms == pytest.approx(30)
    assert timed.e2e_ms == pytest.approx(190)


@pytest.mark.parametrize(("nan_at", "phase"), [(1, "prefill"), (4, "decode")])
def test_logits_that_are_not_finite_end_the_round(session: Scripted, nan_at: int, phase: str) -> None:
    """Speed without an answer is of no interest."""
    session.nan_at = nan_at
    with pytest.raises(IncorrectOutput, match=f"{phase} gave logits that are not finite"):
        run_round(session, PROMPT, 4)


def test_rounds_end_with_the_budget_but_not_before_the_fewest(session: Scripted) -> None:
    """A slow candidate is not timed for hours, and never on fewer rounds than an interval needs."""
    prompts = np.stack([PROMPT] * 20)
    assert len(timed_rounds(session, prompts, 2, budget_s=60)) == 20
    assert len(timed_rounds(session, prompts, 2, budget_s=1)) == 8  # 130 ms each
    assert len(timed_rounds(session, prompts, 2, budget_s=0)) == LEAST_ROUNDS
    assert len(timed_rounds(session, prompts[:3], 2, budget_s=0)) == 3


def test_measurements_survive_their_file() -> None:
    """What a child answers is what is stored and read again."""
    stored = DONE.measurements
    assert stored is not None
    assert Measurements.model_validate_json(stored.model_dump_json()) == stored
    assert Round(ttft_ms=1, token_ms=(2, 4), foreign_cpu_share=0).tpot_ms == 3
