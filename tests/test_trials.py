"""One candidate's way to the race: exported, looked at, judged; what is kept is not done again, and what
fails says why."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benches import exported_trial, real_candidate, tiny_bench
from studies import demo_analysis, demo_hardware

from open_autoglm import trials
from open_autoglm.measure.isolation import Failure
from open_autoglm.measure.lease import device_lease
from open_autoglm.measure.scenarios import LEAD_IN_TOKENS
from open_autoglm.measure.workload import make_workload
from open_autoglm.schemas import Candidate, OptimizeSpec, Trial
from open_autoglm.settings import Settings
from open_autoglm.study import StudyRef
from open_autoglm.trials import (
    SHORT_ROUNDS,
    Bench,
    Stopped,
    begin_trial,
    child_environment,
    cores_for,
    evaluate_trial,
    export_trial,
    prepare_reference,
    reference_candidate,
    screen_trial,
    short_jobs,
)
from open_autoglm.units import Duration

NAMES = ("torch-fp32", "onnxruntime-fp32")


@pytest.fixture(scope="module")
def home(shared_settings: Settings) -> Settings:
    return shared_settings


@pytest.fixture(scope="module")
def bench(tiny_glm: Path, home: Settings, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return tiny_bench(tiny_glm, home, tmp_path_factory.mktemp("trials") / "study")


@pytest.fixture(scope="module")
def reference(bench: Bench, home: Settings) -> Path:
    made = prepare_reference(bench, demo_analysis(), home)
    assert isinstance(made, Path)
    return made


@pytest.fixture(scope="module")
def screened(bench: Bench, home: Settings, reference: Path) -> dict[str, Trial]:
    """A real first look at a real torch and a real ONNX Runtime."""
    begun = [exported_trial(bench, home, real_candidate(name)) for name in NAMES]
    return {trial.id: screen_trial(bench, trial, reference, home) for trial in begun}


def elsewhere(bench: Bench, tmp_path: Path, **changes: Any) -> Bench:
    """The same bench in the directory of another study."""
    study = StudyRef(**{**bench.study.model_dump(), "root": tmp_path / "another"})
    return bench.model_copy(update={"study": study, **changes})


def asking(bench: Bench, **asked: Any) -> Bench:
    """The bench with other wishes."""
    return bench.model_copy(update={"spec": bench.spec.model_copy(update=asked)})


@pytest.fixture
def no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever would start a child fails and says so."""

    def refuse(*_: object) -> None:
        raise Stopped(Failure("failed", "a child was started"))

    monkeypatch.setattr(trials, "Conversation", refuse)


def kept_results(home: Settings) -> set[str]:
    return {str(path) for path in (home.home / "results").rglob("*.json")}


# ── the beginning ────────────────────────────────────────────────────────────────────────────────


def test_a_vetoed_candidate_is_kept_with_its_reason(bench: Bench, home: Settings) -> None:
    """It goes through export, screening and evaluation untouched."""
    candidate = real_candidate("torch-bf16").vetoed("no such device here")
    trial = begin_trial(bench.study, candidate)
    assert (trial.status, trial.reason) == ("vetoed", "no such device here")
    assert bench.study.trial_path(trial.id).is_file()
    assert export_trial(bench.study, bench.checkpoint, trial, home) == trial
    assert screen_trial(bench, trial, Path("reference"), home) == trial
    assert evaluate_trial(bench, trial, Path("reference"), home) == trial


def test_an_export_that_was_kept_is_told_as_reused(bench: Bench, home: Settings) -> None:
    """Files are made once; what loads the checkpoint as it is makes none and reuses none."""
    candidate = real_candidate("onnxruntime-fp32")
    exported_trial(bench, home, candidate)
    assert exported_trial(bench, home, candidate).reused == ("export",)
    assert exported_trial(bench, home, real_candidate("torch-fp32")).reused == ()


# ── the screening ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", NAMES)
def test_a_first_look_finds_memory_quality_and_short_rounds(name: str, screened: dict[str, Trial]) -> None:
    """All that the race needs to know of a real engine, and what it ran with."""
    trial = screened[name]
    assert (trial.status, trial.reason) == ("ok", "screened")
    assert trial.screening is not None
    footprint = trial.screening.footprint
    assert footprint.peak_rss_bytes >= footprint.peak_pss_bytes > 2**20
    assert footprint.peak_rss_bytes > footprint.mapped_file_bytes > 0
    assert trial.screening.load_ms > 0
    assert trial.screening.first_request_ms > 0
    assert (trial.screening.prompt_tokens, trial.screening.output_tokens) == (32, 8)
    assert [turn.index for turn in trial.screening.rounds] == list(range(SHORT_ROUNDS))
    assert all(turn.output_tokens == (8,) for turn in trial.screening.rounds)
    assert trial.screening.estimated_e2e_ms > 0
    assert trial.screening.facts


def test_a_slice_shows_that_an_exact_engine_is_exact(screened: dict[str, Trial]) -> None:
    """One window of each text is enough to see the reference's own perplexity come back."""
    for trial in screened.values():
        assert trial.quality is not None
        assert trial.quality.ratio == pytest.approx(1, abs=1e-4)
        assert trial.quality.finite


def test_a_screened_trial_is_kept_in_its_study(bench: Bench, screened: dict[str, Trial]) -> None:
    """As far as it got, for whoever looks into the directory while the study runs."""
    for name, trial in screened.items():
        assert Trial.model_validate_json(bench.study.trial_path(name).read_bytes()) == trial


def test_short_rounds_are_no_longer_than_the_workload(bench: Bench) -> None:
    """A long answer is cut, a short one stays; the prompts are the workload's own."""
    longer = bench.workload.model_copy(update={"output_tokens": 500})
    plain = real_candidate("onnxruntime-fp32")
    drafting = plain.model_copy(update={"knobs": {**plain.knobs, "draft_tokens": 7}})
    assert {job.output_tokens for job in short_jobs(longer, drafting)} == {64}
    assert {job.output_tokens for job in short_jobs(longer, plain)} == {16}
    assert {job.output_tokens for job in short_jobs(bench.workload, plain)} == {8}


# ── what is kept ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("no_child")
def test_another_study_takes_the_first_look_that_was_kept(
    bench: Bench, home: Settings, reference: Path, screened: dict[str, Trial], tmp_path: Path
) -> None:
    """No child is started, the figures are the same to the digit, and the trial says where they are from."""
    trial = exported_trial(bench, home, real_candidate("onnxruntime-fp32"))
    again = screen_trial(elsewhere(bench, tmp_path), trial, reference, home)
    assert again.reused == ("export", "screening")
    assert again.screening == screened[trial.id].screening
    assert again.quality == screened[trial.id].quality


@pytest.mark.usefixtures("no_child", "screened")
@pytest.mark.parametrize(
    "asked",
    [{"max_latency": Duration("1ms")}, {"objective": "memory"}, {"rounds": 50}, {"target_width": 0.01}],
    ids=str,
)
def test_a_wish_that_changes_no_figure_keeps_the_first_look(
    asked: dict[str, Any], bench: Bench, home: Settings, reference: Path, tmp_path: Path
) -> None:
    """Limits and objectives are about figures; they do not make them."""
    trial = exported_trial(bench, home, real_candidate("torch-fp32"))
    again = screen_trial(asking(elsewhere(bench, tmp_path), **asked), trial, reference, home)
    assert (again.status, again.reused) == ("ok", ("screening",))


@pytest.mark.usefixtures("no_child", "screened")
@pytest.mark.parametrize(
    "asked", [{"seed": 1}, {"prompt_tokens": 31}, {"output_tokens": 9}, {"batch_size": 2}], ids=str
)
def test_other_requests_are_looked_at_anew(
    asked: dict[str, Any], bench: Bench, home: Settings, reference: Path, tmp_path: Path
) -> None:
    """Whatever the engine is asked is part of what it answered."""
    spec = bench.spec.model_copy(update=asked)
    workload = make_workload(bench.checkpoint, spec, tmp_path / "workload.npz")
    changed = elsewhere(bench, tmp_path, spec=spec, workload=workload)
    trial = exported_trial(bench, home, real_candidate("torch-fp32"))
    again = screen_trial(changed, trial, reference, home)
    assert (again.status, again.reason) == ("failed", "screening: a child was started")


@pytest.mark.usefixtures("no_child", "screened")
@pytest.mark.parametrize("changed", ["host", "knob", "files", "quality"])
def test_another_host_or_configuration_is_looked_at_anew(
    changed: str, bench: Bench, home: Settings, reference: Path, tmp_path: Path
) -> None:
    """A change of any one of them changes the figures."""
    there = elsewhere(bench, tmp_path)
    trial = exported_trial(bench, home, real_candidate("torch-fp32"))
    assert trial.exported is not None
    if changed == "host":
        there = there.model_copy(update={"hardware": demo_hardware(fingerprint="another")})
    if changed == "quality":
        there = asking(there, min_quality=0.9)
    if changed == "knob":
        slower = trial.candidate.model_copy(update={"knobs": {**trial.candidate.knobs, "threads": 1}})
        trial = trial.model_copy(update={"candidate": slower})
    if changed == "files":
        other = trial.exported.model_copy(update={"digest": "of other files"})
        trial = trial.model_copy(update={"exported": other})
    assert screen_trial(there, trial, reference, home).status == "failed"


# ── failing ──────────────────────────────────────────────────────────────────────────────────────


def test_a_build_without_device_memory_ends_one_trial_only(
    bench: Bench, home: Settings, fake_engine: Callable[..., Candidate]
) -> None:
    """Its reason says so, the device is free, and the next candidate for it is built."""
    full, modest = (
        exported_trial(
            bench, home, fake_engine(f"fake-{act}", export=act).model_copy(update={"device": "gpu"})
        )
        for act in ("lacks-device-memory", "works")
    )
    assert full.status == "out_of_memory"
    assert full.reason == (
        "export: ran out of memory (DeviceOutOfMemoryError: "
        "TensorRT 10.16 cannot build the graph: OutOfMemory (34 GB))"
    )
    assert modest.exported is not None
    with device_lease("gpu", alone=True):
        assert full.exported is None


@pytest.mark.parametrize(
    ("knobs", "status", "reason"),
    [
        ({"export": "raises"}, "failed", "export: RuntimeError: no kernel for this model"),
        ({"export": "segfaults"}, "crashed", "export: ended with SIGSEGV"),
        ({"open": "segfaults"}, "crashed", "screening: ended with SIGSEGV"),
        ({"open": "raises"}, "failed", "screening: RuntimeError: no kernel for this device"),
        ({"open": "takes-all-memory"}, "out_of_memory", "screening: ran out of memory (MemoryError: )"),
        (
            {"open": "gives-nan"},
            "incorrect",
            "screening: prefill gave logits that are not finite at position 31 of a request",
        ),
        ({"open": "hangs"}, "timed_out", "screening: gave no answer within 4 s and was killed"),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else "",
)
def test_what_a_real_child_does_wrong_becomes_the_trials_reason(
    knobs: dict[str, str],
    status: str,
    reason: str,
    bench: Bench,
    home: Settings,
    fake_engine: Callable[..., Candidate],
) -> None:
    """The stage and what happened, with the log beside it; a failure is not kept for other studies."""
    kept = kept_results(home)
    impatient = home.model_copy(update={"trial_timeout_s": 4 if knobs.get("open") == "hangs" else 60})
    trial = exported_trial(bench, impatient, fake_engine("fake-it", **knobs))
    trial = screen_trial(bench, trial, Path("reference"), impatient)
    assert (trial.status, trial.reason) == (status, reason)
    assert (trial.screening, trial.quality) == (None, None)
    assert trial.log_path is not None
    assert (bench.study.root / trial.log_path).is_file()
    assert evaluate_trial(bench, trial, Path("reference"), impatient) == trial
    assert Trial.model_validate_json(bench.study.trial_path(trial.id).read_bytes()) == trial
    assert kept_results(home) == kept


def test_a_candidate_that_failed_is_tried_again(
    bench: Bench, home: Settings, reference: Path, tmp_path: Path
) -> None:
    """What a busy host did to it once is not its fault for ever."""
    lighter = asking(elsewhere(bench, tmp_path), min_quality=0.6)
    trial = exported_trial(bench, home, real_candidate("onnxruntime-fp32"))
    hurried = home.model_copy(update={"trial_timeout_s": 0.01})
    assert screen_trial(lighter, trial, reference, hurried).status == "timed_out"
    again = screen_trial(lighter, trial, reference, home)
    assert (again.status, again.reused) == ("ok", ("export",))


def test_without_a_reference_nothing_is_looked_at(bench: Bench, home: Settings) -> None:
    """Every trial says what became of the reference."""
    trial = exported_trial(bench, home, real_candidate("torch-fp32"))
    failed = screen_trial(bench, trial, Failure("out_of_memory", "ran out of memory (bad_alloc)"), home)
    assert (failed.status, failed.reason) == ("out_of_memory", "reference: ran out of memory (bad_alloc)")
    assert failed.quality is None


# ── the full judgement ───────────────────────────────────────────────────────────────────────────


def sliced(trial: Trial, *, clear: bool) -> Trial:
    """As if the slice had settled it, or left it open."""
    assert trial.quality is not None
    paths = {
        name: getattr(trial.quality, name).model_copy(
            update={"clear_of_limit": clear, "clear_of_flips": clear}
        )
        for name in ("prefill", "decode")
    }
    return trial.model_copy(update={"quality": trial.quality.model_copy(update=paths)})


@pytest.mark.usefixtures("no_child")
def test_what_the_slice_settled_is_not_judged_again(
    bench: Bench, home: Settings, reference: Path, screened: dict[str, Trial]
) -> None:
    """The full evaluation is for those near the limit."""
    trial = sliced(screened["onnxruntime-fp32"], clear=True)
    assert evaluate_trial(bench, trial, reference, home) == trial


def test_what_the_slice_left_unclear_is_judged_in_full_once(
    bench: Bench, home: Settings, reference: Path, screened: dict[str, Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a child that reads all windows; the next study takes its report."""
    trial = sliced(screened["onnxruntime-fp32"], clear=False)
    judged = evaluate_trial(bench, trial, reference, home)
    assert judged.quality is not None
    assert trial.quality is not None
    assert "quality" not in judged.reused
    assert judged.quality.decode.clear_of_limit
    assert judged.quality.greedy_tokens == trial.quality.greedy_tokens
    monkeypatch.setattr(trials, "Conversation", None)  # a child would raise
    again = evaluate_trial(bench, trial, reference, home)
    assert again.quality == judged.quality
    assert again.reused[-1] == "quality"


def test_the_same_files_with_the_same_output_are_judged_once(
    bench: Bench, home: Settings, reference: Path, screened: dict[str, Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other threads, the same result on the slice: the report is shared; another output is judged anew."""
    trial = sliced(screened["onnxruntime-fp32"], clear=False)
    judged = evaluate_trial(bench, trial, reference, home)
    fewer = trial.candidate.model_copy(
        update={"id": "other-t1", "knobs": {**trial.candidate.knobs, "threads": 1}}
    )
    twin = trial.model_copy(update={"id": "other-t1", "candidate": fewer})
    monkeypatch.setattr(trials, "Conversation", None)  # a child would raise
    assert evaluate_trial(bench, twin, reference, home).quality == judged.quality
    assert twin.quality is not None
    differs = twin.quality.prefill.model_copy(update={"perplexity": twin.quality.prefill.perplexity * 1.001})
    other = twin.model_copy(update={"quality": twin.quality.model_copy(update={"prefill": differs})})
    with pytest.raises(TypeError):
        evaluate_trial(bench, other, reference, home)


# ── the reference ────────────────────────────────────────────────────────────────────────────────


def test_the_reference_is_fp32_torch_whatever_takes_part() -> None:
    """It is the yardstick, not a contestant."""
    candidate = reference_candidate(demo_analysis(), OptimizeSpec(model_path="m", engines=("onnxruntime",)))
    assert (candidate.id, candidate.precision, candidate.reference) == ("torch-fp32", "fp32", True)


def test_the_reference_is_computed_once_per_checkpoint_and_texts(
    bench: Bench, home: Settings, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another study on the same model and texts finds it; other texts have none yet."""

    def refuse(*_: object) -> None:
        raise Stopped(Failure("crashed", "a child was started"))

    monkeypatch.setattr(trials, "Conversation", refuse)
    assert prepare_reference(bench, demo_analysis(), home) == reference
    other = bench.evaluation_set.model_copy(update={"sha256": "other texts"})
    changed = bench.model_copy(update={"evaluation_set": other})
    assert prepare_reference(changed, demo_analysis(), home) == Failure("crashed", "a child was started")


def test_a_reference_that_cannot_be_computed_is_a_failure(bench: Bench, settings: Settings) -> None:
    """It is a value, and nothing half-made stays for the next study to find."""
    hurried = settings.model_copy(update={"trial_timeout_s": 0.01})
    failure = prepare_reference(bench, demo_analysis(), hurried)
    assert failure == Failure("timed_out", "gave no answer within 0.01 s and was killed")
    assert list((settings.home / "references").glob("*.npz")) == []


# ── what the children are given ──────────────────────────────────────────────────────────────────


def test_timing_and_scoring_open_the_same_session(bench: Bench) -> None:
    """One cache size that holds the longest of both, so both run the same kernels."""
    options = bench.options()
    assert options.max_tokens == bench.evaluation_set.layout.window_tokens > 32 + 8
    assert options.threads == demo_hardware().cores


def test_the_cache_has_room_for_the_lead_in_as_far_as_the_context_goes(bench: Bench) -> None:
    context = bench.checkpoint.context_tokens

    def room(prompt_tokens: int) -> int:
        workload = bench.workload.model_copy(update={"prompt_tokens": prompt_tokens, "output_tokens": 8})
        return bench.model_copy(update={"workload": workload}).options().max_tokens

    assert room(context - 100) == context - 100 + 8 + LEAD_IN_TOKENS
    assert room(context - 10) == room(context - 8) == context


def test_fewer_threads_get_fewer_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that they do not wander; all threads may use all cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 1, 5})
    assert cores_for(1) == (1,)
    assert cores_for(2) == (1, 3)
    assert cores_for(3) == cores_for(8) == ()


def test_a_child_neither_reaches_for_the_network_nor_takes_more_threads(settings: Settings) -> None:
    """Its environment says so to every library that reads one, and its caches lie inside home."""
    environment = child_environment(settings, threads=3)
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["TORCHINDUCTOR_CACHE_DIR"].startswith(str(settings.home))
