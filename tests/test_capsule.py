"""The capsule: what is kept to run one trial again, the running, and the judgement."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from benches import real_candidate, screened_trial, tiny_bench
from studies import demo_analysis, demo_hardware

from open_autoglm import engines
from open_autoglm.capsule import with_capsule
from open_autoglm.cli import main
from open_autoglm.conclusion import Standings, conclude
from open_autoglm.errors import StudyError
from open_autoglm.hardware_bench import Peaks
from open_autoglm.heats import Contest, run_stage
from open_autoglm.measure.racing import Rules
from open_autoglm.measure.scenarios import figure_of
from open_autoglm.progress import LOGGER
from open_autoglm.reproduction import PEAK_CHANGE, Reproduction, reproduce
from open_autoglm.schemas import Study
from open_autoglm.settings import Settings
from open_autoglm.study import load_study, save_study
from open_autoglm.trials import Bench

TIMED, UNTIMED, COMPANION = "onnxruntime-fp32", "torch-fp32", "onnxruntime-fp32-t1"
HEATS = 5


@pytest.fixture(scope="module")
def bench(tiny_glm: Path, shared_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return tiny_bench(tiny_glm, shared_settings, tmp_path_factory.mktemp("capsule") / "study", seed=3)


@pytest.fixture(scope="module")
def finished(bench: Bench, shared_settings: Settings) -> Study:
    """A real final of one candidate and its twin, concluded and stored; the other trial was never timed."""
    timed, untimed = (
        screened_trial(bench, shared_settings, real_candidate(name)) for name in (TIMED, UNTIMED)
    )
    rules = Rules(
        figure=figure_of("e2e_ms"), metric="e2e_ms", least_heats=HEATS, most_heats=HEATS, budget_s=60
    )
    run, race = run_stage(bench, "final", Contest([timed], rules, twin_of=TIMED), shared_settings)
    # Without its quality nothing is feasible, and the gate need not be asked.
    unjudged = tuple(trial.model_copy(update={"quality": None}) for trial in (*run, untimed))
    study = conclude(bench, demo_analysis(), Standings(trials=unjudged, races=(race,)))
    save_study(study)
    return load_study(bench.study.root)


@pytest.fixture(autouse=True)
def known_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peaks of the host are not measured anew: they are as in the study."""
    hardware = demo_hardware().model_dump(include=set(Peaks.model_fields))
    monkeypatch.setattr("open_autoglm.hardware.measure_peaks", lambda *_: Peaks(**hardware, foreign_share=0))


class Again(NamedTuple):
    """A study that a test may change before it is reproduced."""

    root: Path
    settings: Settings

    def change(self, edit: Callable[[dict[str, Any]], object]) -> Study:
        """``edit`` what is stored in ``study.json``; the study as it reads then."""
        path = self.root / "study.json"
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content))
        return load_study(self.root)


@pytest.fixture
def again(finished: Study, shared_settings: Settings, tmp_path: Path) -> Again:
    """A copy, whose requests still lie where they were drawn."""
    return Again(Path(shutil.copytree(finished.output_dir, tmp_path / "study")), shared_settings)


def trial_in(content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(trial for trial in content["trials"] if trial["id"] == TIMED)
    return found


def always_within(content: dict[str, Any]) -> None:
    """As if two processes of one candidate had differed by a factor of a million."""
    content["races"][0]["noise"]["floor"] = 1e6


def on_a_quiet_host(content: dict[str, Any]) -> None:
    """As if they had not differed at all."""
    content["races"][0]["noise"]["floor"] = 0.0


def slower_then(root: Path) -> None:
    """As if every round of the study had taken a hundred times as long."""
    scale_then(root, TIMED, 100)


def scale_then(root: Path, trial_id: str, factor: float) -> None:
    """As if every round that a trial had in the study had taken so many times as long."""
    path = root / "samples" / f"{trial_id}.json"
    content = json.loads(path.read_text())
    for turn in content["rounds"]:
        for name in ("ttft_ms", "tpot_ms", "e2e_ms"):
            turn[name] = [factor * ms for ms in turn[name]]
    for name in ("ttft_ms", "tpot_ms", "e2e_ms"):
        metric = content["metrics"][name]
        metric["median"] *= factor
        metric["interval"] = [factor * end for end in metric["interval"]]
    path.write_text(json.dumps(content))


# ── what is kept ─────────────────────────────────────────────────────────────────────────────────


def test_a_timed_trial_keeps_all_that_it_depends_on(finished: Study, bench: Bench) -> None:
    """Configuration, digests, seed, host with its peaks, versions, and the command that runs it again."""
    trial = finished.trial(TIMED)
    capsule = trial.capsule
    assert capsule is not None
    assert capsule.command == f"open-autoglm reproduce {bench.study.root} {TIMED}"
    assert (capsule.seed, capsule.candidate) == (bench.spec.seed, trial.candidate)
    assert capsule.checkpoint_digest == bench.checkpoint.digest
    assert trial.exported is not None
    assert capsule.export_digest == trial.exported.digest
    assert capsule.workload_sha256 == bench.workload.sha256
    assert capsule.fingerprint == bench.hardware.fingerprint
    assert {"cpu", "governor", "kernel", "affinity", "cpu_quota"} <= capsule.host.keys()
    assert capsule.host["read_bandwidth_gb_per_s"] == "29.0"
    assert {"torch", "onnxruntime", "open-autoglm"} <= capsule.versions.keys()


def test_who_was_not_timed_has_nothing_to_reproduce(finished: Study, bench: Bench) -> None:
    """Neither the screened nor the failed get a capsule."""
    untimed = finished.trial(UNTIMED)
    assert untimed.capsule is None
    assert with_capsule(bench, untimed) == untimed


def test_a_command_can_be_typed_wherever_the_study_lies(bench: Bench, finished: Study) -> None:
    """Blanks in a path are quoted."""
    study = bench.study.model_copy(update={"root": Path("/my studies/one")})
    trial = with_capsule(bench.model_copy(update={"study": study}), finished.trial(TIMED))
    assert trial.capsule is not None
    assert trial.capsule.command == f"open-autoglm reproduce '/my studies/one' {TIMED}"


# ── running it again ─────────────────────────────────────────────────────────────────────────────


def test_a_trial_is_run_again_and_compared(again: Again) -> None:
    """As many rounds of the same requests in a fresh process; then, now, and the paired change of each."""
    study = again.change(always_within)
    result = reproduce(study, TIMED, again.settings)
    assert (result.study_id, result.trial_id, result.outcome) == (study.id, TIMED, "reproduced")
    assert [figure.metric for figure in result.figures] == ["ttft_ms", "tpot_ms", "e2e_ms"]
    then = study.trial(TIMED).metrics
    for figure in result.figures:
        assert figure.within
        assert figure.then == then[figure.metric]
        assert figure.now.samples == HEATS
        assert figure.now.values != figure.then.values
        assert (figure.paired.candidate, figure.paired.against) == (f"{TIMED} now", f"{TIMED} then")
        assert figure.paired.pairs == HEATS
    assert result.explanation == "every figure is within what the study measured"


def test_a_reproduction_is_kept_beside_its_study(again: Again, finished: Study) -> None:
    """Each in a file of its own, and the study stays as it was."""
    study = again.change(always_within)
    before = (again.root / "study.json").read_bytes()
    result = reproduce(study, TIMED, again.settings)
    (path,) = (again.root / "reproductions").glob(f"{TIMED}-*.json")
    assert Reproduction.model_validate_json(path.read_bytes()) == result
    assert (again.root / "study.json").read_bytes() == before
    log = finished.output_dir / "reproductions" / "logs" / f"{TIMED}-final.log"
    assert log.is_file()


def test_a_figure_that_does_not_come_back_is_told_with_its_change(again: Again) -> None:
    """A hundred times quicker than then, though nothing that the kernel tells is different."""
    again.change(on_a_quiet_host)
    slower_then(again.root)
    result = reproduce(load_study(again.root), TIMED, again.settings)
    assert result.outcome == "not_reproduced"
    assert not any(figure.within for figure in result.figures)
    assert all(figure.paired.change < -0.5 for figure in result.figures)
    assert "not as measured (ttft_ms -" in result.explanation


def test_what_is_not_as_it_was_is_named(again: Again) -> None:
    """Libraries, the host's settings, and its speed, each with what it was and what it is."""

    def edit(content: dict[str, Any]) -> None:
        always_within(content)
        capsule = trial_in(content)["capsule"]
        capsule["versions"]["torch"] = "1.0"
        capsule["versions"]["forgotten"] = "2.0"
        capsule["host"]["governor"] = "powersave"
        capsule["host"]["matmul_fp32_gflop_per_s"] = str(190 * (1 + 2 * PEAK_CHANGE))
        capsule["host"]["read_bandwidth_gb_per_s"] = str(29 * (1 + PEAK_CHANGE / 2))

    told = reproduce(again.change(edit), TIMED, again.settings).differences
    assert any(line.startswith("torch was 1.0 and is ") for line in told)
    assert "forgotten was 2.0 and is absent" in told
    assert any(line.startswith("governor was powersave and is ") for line in told)
    assert any(line.startswith("the host's matmul fp32 gflop per s was 228 and is 190") for line in told)
    assert not any("bandwidth" in line for line in told)


def test_files_that_are_gone_are_made_again(again: Again) -> None:
    """From the checkpoint; if they come out otherwise, that is a difference worth a word."""

    def edit(content: dict[str, Any]) -> None:
        always_within(content)
        trial_in(content)["exported"].update(path="/nowhere", digest="of what is gone")

    result = reproduce(again.change(edit), TIMED, again.settings)
    assert result.outcome == "reproduced"
    assert "its files had to be made again, and are not byte for byte what they were" in result.differences


# ── the host or the trial ────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def paired(
    tiny_glm: Path, shared_settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Bench, Study]:
    """A final of two candidates."""
    bench = tiny_bench(tiny_glm, shared_settings, tmp_path_factory.mktemp("paired") / "study", seed=37)
    timed = real_candidate(TIMED)
    companion = engines.get(timed.engine).variant(timed, {"threads": 1})  # reads the same files
    both = [screened_trial(bench, shared_settings, candidate) for candidate in (timed, companion)]
    rules = Rules(
        figure=figure_of("e2e_ms"), metric="e2e_ms", least_heats=HEATS, most_heats=HEATS, budget_s=60
    )
    run, race = run_stage(bench, "final", Contest(both, rules, twin_of=TIMED), shared_settings)
    unjudged = tuple(trial.model_copy(update={"quality": None}) for trial in run)
    study = conclude(bench, demo_analysis(), Standings(trials=unjudged, races=(race,)))
    save_study(study)
    return bench, study


@pytest.mark.parametrize(
    ("changed", "outcome"),
    [((TIMED, COMPANION), "host_changed"), ((TIMED,), "not_reproduced")],
    ids=["both", "one"],
)
def test_what_both_finalists_lost_is_the_hosts(
    paired: tuple[Bench, Study],
    shared_settings: Settings,
    tmp_path: Path,
    changed: tuple[str, ...],
    outcome: str,
) -> None:
    """A hundred times slower than then: if another finalist is so too, in the same heats, it is the host."""
    root = Path(shutil.copytree(paired[1].output_dir, tmp_path / "study"))
    for name in changed:
        scale_then(root, name, 0.01)
    content = json.loads((root / "study.json").read_text())
    content["races"][0]["noise"]["floor"] = 10.0
    (root / "study.json").write_text(json.dumps(content))
    result = reproduce(load_study(root), TIMED, shared_settings)
    assert result.outcome == outcome
    for figure in result.figures:
        assert not figure.within
        assert figure.companion is not None
        assert figure.companion.candidate == f"{COMPANION} now"
        assert figure.beside is not None
        assert figure.beside.pairs == HEATS
    blamed = f"{COMPANION} changed by " in result.explanation and "it is the host" in result.explanation
    assert blamed == (outcome == "host_changed")


# ── what cannot be run again ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("trial_id", "problem"), [(UNTIMED, "was not timed"), ("nobody", "is not one of its trials")]
)
def test_only_timed_trials_can_be_reproduced(trial_id: str, problem: str, again: Again) -> None:
    """The sentence names those that can."""
    with pytest.raises(StudyError, match=rf"{trial_id} {problem} .*choose one of {TIMED}$"):
        reproduce(load_study(again.root), trial_id, again.settings)


def test_without_its_requests_a_trial_cannot_be_reproduced(again: Again) -> None:
    """Other prompts would be another measurement."""
    (again.root / "bench.json").unlink()
    with pytest.raises(StudyError, match=r"requests cannot be read .*run the study again"):
        reproduce(load_study(again.root), TIMED, again.settings)


def test_changed_requests_are_refused(again: Again, bench: Bench) -> None:
    """A file that is not the one that was drawn is named."""
    changed = again.root / "workload.npz"
    changed.write_bytes(changed.read_bytes() + b"!")
    workload = bench.workload.model_copy(update={"path": changed})
    moved = bench.model_copy(update={"workload": workload})
    (again.root / "bench.json").write_text(moved.model_dump_json())
    with pytest.raises(StudyError, match=r"workload\.npz has changed since the study: run the study again"):
        reproduce(load_study(again.root), TIMED, again.settings)


def test_a_trial_that_no_longer_runs_says_why(again: Again) -> None:
    """A user error with the reason, not a figure."""
    hurried = again.settings.model_copy(update={"trial_timeout_s": 0.01})
    with pytest.raises(StudyError, match=rf"{TIMED} could not be run again: gave no answer within 0.01 s"):
        reproduce(load_study(again.root), TIMED, hurried)


# ── the command ──────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def command(again: Again, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run ``open-autoglm reproduce STUDY …``; its exit code and what it printed."""
    monkeypatch.setenv("AUTOGLM_HOME", str(again.settings.home))
    progress = logging.getLogger(LOGGER)  # the command sets it up for a process of its own
    for name in ("handlers", "level", "propagate"):
        value = getattr(progress, name)
        monkeypatch.setattr(progress, name, list(value) if name == "handlers" else value)

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["open-autoglm", "reproduce", str(again.root), *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out + said.err

    return run


def test_a_trial_that_comes_back_ends_with_0(command: Any, again: Again) -> None:
    """With a table of then and now."""
    again.change(always_within)
    code, said = command(TIMED)
    assert code == 0
    assert "reproduced" in said
    for word in ("then", "now", "change, paired", "ttft_ms", "e2e_ms", "within"):
        assert word in said


def test_a_trial_that_does_not_come_back_ends_with_3(command: Any, again: Again) -> None:
    """The last line of stdout is the whole comparison, if it is asked for as JSON."""
    again.change(on_a_quiet_host)
    slower_then(again.root)
    code, said = command(TIMED, "--json")
    assert code == 3
    line = next(line for line in said.splitlines() if line.startswith("{"))
    assert Reproduction.model_validate_json(line).outcome == "not_reproduced"


def test_a_trial_that_cannot_be_run_ends_with_2(command: Any) -> None:
    """One sentence."""
    code, said = command(UNTIMED)
    assert code == 2
    assert said.startswith(f"error: {UNTIMED} was not timed")
