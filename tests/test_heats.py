"""Heats with real children: interleaved, paired, kept; and what becomes of who cannot go on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import psutil
import pytest
from benches import real_candidate, screened_trial, tiny_bench

from open_autoglm import heats
from open_autoglm.heats import Contest, run_stage
from open_autoglm.measure.lease import device_lease
from open_autoglm.measure.racing import HeatReport, Rules, balanced_orders
from open_autoglm.measure.scenarios import figure_of
from open_autoglm.schemas import Candidate, Gpu, Measurements, Race, Trial
from open_autoglm.settings import Settings
from open_autoglm.study import StudyRef
from open_autoglm.trials import Bench
from open_autoglm.units import Duration

HEATS = 6
TORCH, ONNX = "torch-fp32", "onnxruntime-fp32"
TWIN = f"{ONNX}~twin"


def rules(heats: int = HEATS, **changes: Any) -> Rules:
    """Exactly so many heats, nobody dropped."""
    counts = {"least_heats": heats, "most_heats": heats, "budget_s": 600, "target_width": 1e-9}
    return Rules(**{"figure": figure_of("e2e_ms"), "metric": "e2e_ms", **counts, **changes})


@pytest.fixture(scope="module")
def bench(tiny_glm: Path, shared_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return tiny_bench(tiny_glm, shared_settings, tmp_path_factory.mktemp("heats") / "study", seed=2)


@pytest.fixture(scope="module")
def contest(bench: Bench, shared_settings: Settings) -> Contest:
    """Two real engines, and the second of them twice."""
    trials = [screened_trial(bench, shared_settings, real_candidate(name)) for name in (TORCH, ONNX)]
    return Contest(trials, rules(), twin_of=ONNX)


@pytest.fixture(scope="module")
def final(bench: Bench, contest: Contest, shared_settings: Settings) -> tuple[list[Trial], Race]:
    return run_stage(bench, "final", contest, shared_settings)


def figures(trial: Trial) -> Measurements:
    assert trial.measurements is not None
    return trial.measurements


def open_children() -> int:
    """How many children of this process are at work or wait for it."""
    ours = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    return sum("open_autoglm.measure.child" in child.cmdline() for child in ours)


# ── a final ──────────────────────────────────────────────────────────────────────────────────────


def test_every_second_heat_runs_in_reverse(final: tuple[list[Trial], Race]) -> None:
    """ABBA: whatever drifts hits the first and the last alike."""
    _, race = final
    assert race.stage == "final"
    assert len(race.heats) == HEATS
    assert race.heats == tuple(balanced_orders((TORCH, ONNX, TWIN))[:HEATS])
    assert race.heats[1::2] == tuple(heat[::-1] for heat in race.heats[::2])


def test_every_finalist_ran_the_same_rounds(final: tuple[list[Trial], Race]) -> None:
    """As many that count as there were heats, of the same requests in the same order."""
    trials, race = final
    for trial in trials:
        counted = figures(trial).counted
        assert [turn.index for turn in counted] == list(range(len(race.heats)))
        assert figures(trial).output_tokens_ratio == 1
        assert trial.metrics["e2e_ms"].samples == HEATS
        assert trial.metrics["e2e_ms"].values == tuple(turn.e2e_ms[0] for turn in counted)


def test_a_finalist_has_its_figures_and_says_so(final: tuple[list[Trial], Race], bench: Bench) -> None:
    """Time from the rounds, memory from the screening, and the samples in a file of their own."""
    for trial in final[0]:
        assert (trial.status, trial.reason, trial.finalist) == ("ok", "timed in the final", True)
        assert trial.screening is not None
        assert trial.metrics["peak_rss_bytes"].median == trial.screening.footprint.peak_rss_bytes
        assert trial.metrics["load_ms"].samples == 1
        assert figures(trial).warmups
        assert figures(trial).environment
        stored = Measurements.model_validate_json(bench.study.samples_path(trial.id).read_bytes())
        assert stored == trial.measurements


def test_the_twin_gives_the_noise_floor_and_is_no_candidate(final: tuple[list[Trial], Race]) -> None:
    """The same engine in two processes is compared with itself, round by round."""
    trials, race = final
    assert [trial.id for trial in trials] == [TORCH, ONNX]
    assert race.noise is not None
    assert (race.noise.comparison.candidate, race.noise.comparison.against) == (TWIN, ONNX)
    assert race.noise.comparison.pairs == HEATS
    assert race.noise.floor >= abs(race.noise.comparison.change)
    assert {comparison.pairs for comparison in race.comparisons} == {HEATS}


@pytest.mark.usefixtures("final")
def test_no_child_outlives_the_stage(bench: Bench) -> None:
    """Each had a log of its own, and none is left."""
    for name in (TORCH, ONNX, TWIN):
        assert bench.study.log_path(f"{name}-final").is_file()
    assert open_children() == 0


# ── what is kept ─────────────────────────────────────────────────────────────────────────────────


class WasRun(Exception):
    """Raised in place of the heats."""


@pytest.fixture
def no_heats(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> NoReturn:
        raise WasRun

    monkeypatch.setattr(heats, "_run", refuse)


def elsewhere(bench: Bench, tmp_path: Path, **asked: Any) -> Bench:
    """The same bench in the directory of another study, with other wishes."""
    study = StudyRef(**{**bench.study.model_dump(), "root": tmp_path / "another"})
    spec = bench.spec.model_copy(update=asked)
    return bench.model_copy(update={"study": study, "spec": spec})


@pytest.mark.usefixtures("no_heats")
def test_the_same_final_is_not_run_twice(
    final: tuple[list[Trial], Race], bench: Bench, contest: Contest, shared_settings: Settings, tmp_path: Path
) -> None:
    """Another study takes race, figures and samples as they were, and its trials say so."""
    there = elsewhere(bench, tmp_path)
    again, race = run_stage(there, "final", contest, shared_settings)
    assert race == final[1]
    for now, then in zip(again, final[0], strict=True):
        assert now.reused[-1] == "final"
        assert now.measurements == then.measurements
        assert there.study.samples_path(now.id).is_file()


@pytest.mark.usefixtures("no_heats", "final")
@pytest.mark.parametrize(
    "asked", [{"rounds": 50}, {"target_width": 0.01}, {"max_latency": Duration("1ms")}], ids=str
)
def test_other_rules_are_another_final(
    asked: dict[str, Any], bench: Bench, contest: Contest, shared_settings: Settings, tmp_path: Path
) -> None:
    """More rounds, narrower intervals, a limit that changes who leads."""
    with pytest.raises(WasRun):
        run_stage(elsewhere(bench, tmp_path, **asked), "final", contest, shared_settings)


@pytest.mark.usefixtures("no_heats", "final")
@pytest.mark.parametrize("changed", ["fewer", "other twin", "stage", "files", "leaders"])
def test_another_contest_is_another_final(
    changed: str, bench: Bench, contest: Contest, shared_settings: Settings, tmp_path: Path
) -> None:
    """Who runs beside whom is part of every figure."""
    stage = "race" if changed == "stage" else "final"
    if changed == "fewer":
        contest = contest._replace(trials=contest.trials[1:])
    if changed == "other twin":
        contest = contest._replace(twin_of=TORCH)
    if changed == "leaders":
        contest = contest._replace(rules=rules(leaders=frozenset({TORCH})))
    if changed == "files":
        first, *others = contest.trials
        assert first.exported is not None
        exported = first.exported.model_copy(update={"digest": "of other files"})
        contest = contest._replace(trials=[first.model_copy(update={"exported": exported}), *others])
    with pytest.raises(WasRun):
        run_stage(elsewhere(bench, tmp_path), stage, contest, shared_settings)


# ── who cannot go on ─────────────────────────────────────────────────────────────────────────────


def test_who_dies_in_the_middle_falls_alone(
    bench: Bench, shared_settings: Settings, fake_engine: Callable[..., Candidate]
) -> None:
    """Its trial says what happened and where; the others run to the end and are compared."""
    many = 20
    dying = fake_engine("fake-dying", open="works", dies_at=many - 2)  # after at most 12 to warm up
    steady = fake_engine("fake-steady", open="works")
    runners = [screened_trial(bench, shared_settings, c) for c in (dying, steady)]
    runners.append(screened_trial(bench, shared_settings, real_candidate(ONNX)))
    trials, race = run_stage(bench, "final", Contest(runners, rules(many)), shared_settings)
    fallen, *others = trials
    assert (fallen.status, fallen.reason) == ("crashed", "final: ended with SIGSEGV")
    assert (fallen.measurements, fallen.finalist) == (None, False)
    assert fallen.log_path == "logs/fake-dying-final.log"
    assert (bench.study.root / fallen.log_path).is_file()
    heat = race.fallen["fake-dying"].heat
    assert heat is not None
    assert 0 < heat < many - 1
    assert all("fake-dying" not in names for names in race.heats[heat + 1 :])
    assert len(race.heats) == many
    for trial in others:
        assert trial.status == "ok"
        assert len(figures(trial).counted) == many
    compared = {name for c in race.comparisons for name in (c.candidate, c.against)}
    assert compared == {trial.id for trial in others}


def test_a_device_without_memory_ends_one_trial_only(
    bench: Bench, shared_settings: Settings, fake_engine: Callable[..., Candidate]
) -> None:
    """Its reason says so, the device is free for the next, and the other runs to the end on the same one."""
    full = fake_engine("fake-full", open="works", out_of_memory_at=18)
    steady = fake_engine("fake-modest", open="works")
    runners = [
        screened_trial(bench, shared_settings, candidate.model_copy(update={"device": "gpu"}))
        for candidate in (full, steady)
    ]
    (fallen, other), _ = run_stage(bench, "final", Contest(runners, rules(20)), shared_settings)
    assert fallen.status == "out_of_memory"
    assert fallen.reason.startswith("final: ran out of memory (RuntimeError: CUDA out of memory. Tried")
    assert (other.status, len(figures(other).counted)) == ("ok", 20)
    with device_lease("gpu", alone=True):
        assert open_children() == 0


def test_who_runs_elsewhere_than_it_says_cannot_win(
    bench: Bench, shared_settings: Settings, fake_engine: Callable[..., Candidate]
) -> None:
    """A candidate of one provider whose nodes another ran has no figures, and its process is gone."""
    told = "of 40 nodes TensorrtExecutionProvider left to others: CPUExecutionProvider 2 (Attention 2)"
    quick = fake_engine("fake-elsewhere", open="works", elsewhere=told)
    slow = fake_engine("fake-here", open="works", delay_ms=4)
    runners = [screened_trial(bench, shared_settings, candidate) for candidate in (quick, slow)]
    (fallen, other), race = run_stage(bench, "race", Contest(runners, rules(3, keep=1)), shared_settings)
    assert (fallen.status, fallen.reason) == ("failed", f"race: ran elsewhere: {told}")
    assert (fallen.measurements, fallen.metrics) == (None, {})
    assert race.fallen["fake-elsewhere"].heat == 0
    assert other.status == "ok"
    assert open_children() == 0


def test_a_stage_in_which_someone_failed_is_run_again(
    bench: Bench, contest: Contest, shared_settings: Settings, tmp_path: Path
) -> None:
    """What a busy host did to a candidate once is not held against it tomorrow."""
    there = elsewhere(bench, tmp_path, rounds=4)
    runners = Contest(contest.trials[1:], rules(4))
    hurried = shared_settings.model_copy(update={"trial_timeout_s": 0.01})
    (failed,), _ = run_stage(there, "final", runners, hurried)
    assert failed.status == "timed_out"
    (again,), _ = run_stage(there, "final", runners, shared_settings)
    assert (again.status, again.reused) == ("ok", contest.trials[1].reused)


def test_who_cannot_be_opened_falls_in_the_first_heat(
    bench: Bench, shared_settings: Settings, fake_engine: Callable[..., Candidate]
) -> None:
    """It was fine in its screening; now it is not, and nobody else minds."""
    broken, works = fake_engine("fake-broken", open="raises"), fake_engine("fake-works", open="works")
    runners = [screened_trial(bench, shared_settings, c) for c in (broken, works)]
    (fallen, other), race = run_stage(bench, "race", Contest(runners, rules(3)), shared_settings)
    assert (fallen.status, fallen.reason) == ("failed", "race: RuntimeError: no kernel for this device")
    assert race.fallen["fake-broken"].heat == 0
    assert (other.status, other.finalist) == ("ok", False)
    assert len(figures(other).counted) == 3


def test_who_is_hopeless_is_stopped_with_the_proof(
    bench: Bench, shared_settings: Settings, fake_engine: Callable[..., Candidate]
) -> None:
    """A race drops it after a few heats; it keeps its figures, its status and the reason."""
    quick, slow = fake_engine("fake-quick", open="works"), fake_engine("fake-slow", open="works", delay_ms=4)
    runners = [screened_trial(bench, shared_settings, c) for c in (slow, quick)]
    told: list[HeatReport] = []
    contest = Contest(runners, rules(8, keep=1, on_heat=told.append))
    (fallen, leader), race = run_stage(bench, "race", contest, shared_settings)
    assert fallen.status == "stopped"
    assert fallen.fall == race.fallen["fake-slow"] == told[-1].fallen["fake-slow"]
    assert "slower than fake-quick" in fallen.reason
    assert fallen.metrics["e2e_ms"].median > leader.metrics["e2e_ms"].median
    assert (leader.status, told[-1].leader) == ("ok", leader.id)


def on_device(trial: Trial, device_bytes: int) -> Trial:
    """The trial as if its screening had found it on a GPU, holding so much there."""
    assert trial.screening is not None
    footprint = trial.screening.footprint.model_copy(update={"device_bytes": device_bytes})
    screening = trial.screening.model_copy(update={"footprint": footprint})
    return trial.model_copy(update={"screening": screening})


# ── little memory ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("little", ["host", "device"])
def test_where_memory_holds_only_one_they_take_turns(
    little: str,
    bench: Bench,
    shared_settings: Settings,
    fake_engine: Callable[..., Candidate],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who ran longest ago is closed for the next and opened again for its own round; nothing is lost."""
    if little == "host":
        monkeypatch.setattr(heats, "RESIDENT_SHARE", 0)
    else:
        gpu = Gpu(name="a small one", memory_bytes=2**30, driver="1")
        bench = bench.model_copy(
            update={"hardware": bench.hardware.model_copy(update={"gpus": (gpu,), "fingerprint": "small"})}
        )
    alive: list[int] = []

    def count(_: HeatReport) -> None:
        alive.append(open_children())

    names = ("fake-one", "fake-two")
    runners = [screened_trial(bench, shared_settings, fake_engine(name, open="works")) for name in names]
    if little == "device":
        runners = [on_device(trial, 2**29) for trial in runners]
    contest = Contest(runners, rules(4, on_heat=count))
    trials, race = run_stage(bench, "final", contest, shared_settings)
    assert len(race.heats) == 4
    assert alive == [1] * 4
    peaks = [trial.metrics["peak_device_bytes"].median for trial in trials if little == "device"]
    assert peaks == [2**29] * len(peaks)
    opened = {trial.id: trial.metrics["load_ms"].samples for trial in trials}
    # Loaded once each before the first heat; who ends a heat also begins the next, so is still open then.
    assert opened == {"fake-one": 4, "fake-two": 3}
    for trial in trials:
        assert (trial.status, len(figures(trial).counted)) == ("ok", 4)
