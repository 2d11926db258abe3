"""From finished trials to a finished study: choose, gate, bundle, register, report."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from open_autoglm.bracket import after_evaluation, called_up
from open_autoglm.bundle import build_bundle
from open_autoglm.capsule import with_capsule
from open_autoglm.export.routes import library_versions
from open_autoglm.figures import comparisons_figure, latency_figure, pareto_figure, samples_figure
from open_autoglm.files import room_for, write_atomic
from open_autoglm.measure.racing import BUDGET_HEATS
from open_autoglm.objectives import final_of
from open_autoglm.quality.gates import check_results
from open_autoglm.report import write_report
from open_autoglm.schemas import (
    Analysis,
    GoldenPrompt,
    Incumbent,
    Model,
    OptimizeSpec,
    Race,
    Study,
    Trial,
    Verdict,
)
from open_autoglm.selection import choose
from open_autoglm.study import save_study, save_trial
from open_autoglm.tracking import Tracker
from open_autoglm.trials import Bench

FIGURES = {
    "pareto": pareto_figure,
    "comparisons": comparisons_figure,
    "latency": latency_figure,
    "samples": samples_figure,
}


class Standings(Model):
    """The study between the stages: every trial so far, the races, and who is to be beaten."""

    trials: tuple[Trial, ...]
    races: tuple[Race, ...] = ()
    incumbent: Incumbent | None = None
    search: tuple[str, ...] = ()
    waves: int = 0
    """Of the evaluation, so far."""

    def now(self, trials: Sequence[Trial]) -> Standings:
        """With ``trials``, some or all of them, as they are now."""
        changed = {trial.id: trial for trial in trials}
        return self.model_copy(update={"trials": tuple(changed.get(t.id, t) for t in self.trials)})

    def after(self, race: Race, run: Sequence[Trial]) -> Standings:
        """With the trials that ran in ``race`` as they are now."""
        return self.now(run).model_copy(update={"races": (*self.races, race)})

    def refilled(self, judged: Sequence[Trial], spec: OptimizeSpec) -> tuple[Standings, list[Trial]]:
        """After another wave of the evaluation: without those that it shows to lose too much, and with who is
        called up in their stead, also by itself as the next wave."""
        standings = self.now(after_evaluation(judged, spec))
        called = called_up(standings.trials, spec, self.waves + 1)
        return standings.now(called).model_copy(update={"waves": self.waves + 1}), called


def conclude(bench: Bench, analysis: Analysis, standings: Standings) -> Study:
    """Rank the trials, let the gate check the table, and name a champion if both agree on one."""
    study, spec = bench.study, bench.spec
    final = final_of(standings.races)
    choice = choose(standings.trials, spec, final.noise if final else None)
    gate = None
    verdict, champion = choice.verdict, choice.champion
    if champion is not None:
        gate = check_results(
            choice.trials,
            min_quality=spec.min_quality,
            max_token_flips=spec.max_token_flips,
            champion_id=champion,
            docs_dir=study.root / "data-docs",
            rounds=min(spec.rounds, BUDGET_HEATS),
        )
        if not gate.passed:
            failed = tuple(f"gate: {failure}" for failure in gate.failures)
            verdict, champion = Verdict(kind="gate_failed", reasons=failed, nearest=champion), None
    trials = tuple(save_trial(study, with_capsule(bench, trial)) for trial in choice.trials)
    return Study(
        id=study.id,
        created=study.created,
        finished=datetime.now(UTC),
        spec=spec,
        checkpoint=bench.checkpoint,
        analysis=analysis,
        workload=bench.workload,
        verdict=verdict,
        champion=champion,
        incumbent=standings.incumbent,
        races=standings.races,
        comparisons=choice.comparisons,
        search=standings.search,
        pareto=choice.pareto,
        trials=trials,
        gate=gate,
        not_measured=_not_measured(bench, trials),
        environment={**library_versions(), "python": platform.python_version()},
        output_dir=study.root,
    )


def _not_measured(bench: Bench, trials: Sequence[Trial]) -> tuple[str, ...]:
    told = [
        "Memory is of a process of its own that answered one request; it counts mapped files as far as they "
        "were touched.",
        "Load time was taken while other candidates were being prepared: read it as an upper bound.",
        "Energy was not measured.",
    ]
    if bench.spec.scenario != "server":
        told.append("Concurrent requests were not measured: --scenario server does.")
    told += [
        f"{trial.id} did not reach a steady state in its warm-up: its figures may still hold some of it."
        for trial in trials
        if trial.measurements is not None and not trial.measurements.steady
    ]
    if not bench.hardware.gpus:
        told.append(f"No GPU engine was measured: {bench.hardware.gpu_reason}.")
    return tuple(told)


def deliver(study: Study, golden: Sequence[GoldenPrompt], tracker: Tracker, parent_run_id: str) -> Study:
    """Bundle and register the champion, write report and figures, log everything, store the study.

    The bundle takes the champion's ``golden`` prompts along. In a tie nothing is registered: what was
    registered stays. Repeating it after a crash ends in the same state. Raises UserError if a disk becomes
    full: the champion's alias then names what it did, or the winner if that is whole.
    """
    with room_for(f"the study in {study.output_dir} was bundled and registered"):
        study = _registered(study, golden, tracker, parent_run_id)
        _log_all(study, tracker, parent_run_id)
        save_study(study)
    return study


def _registered(study: Study, golden: Sequence[GoldenPrompt], tracker: Tracker, parent_run_id: str) -> Study:
    """With its bundle, if there is a winner, and where it went."""
    if study.champion is None or study.verdict.kind != "champion":
        return study.model_copy(update={"registration": tracker.location(parent_run_id)})
    bundle = build_bundle(study, study.trial(study.champion), study.output_dir / "bundle", golden)
    study = study.model_copy(update={"bundle": bundle})
    registration = tracker.register_champion(study, bundle, parent_run_id)
    return study.model_copy(update={"registration": registration})


def _log_all(study: Study, tracker: Tracker, parent_run_id: str) -> None:
    root = study.output_dir
    for trial in study.trials:
        tracker.log_trial(parent_run_id, trial, files_of(root, trial))
    figures = [_write_figure(root, name, study) for name in FIGURES]
    report = write_report(study, root / "report.html")
    data_docs = [root / "data-docs"] if (root / "data-docs").is_dir() else []
    tracker.finish_study(parent_run_id, study, [report, *figures, *data_docs])


def files_of(root: Path, trial: Trial) -> list[Path]:
    """What of a trial is logged beside its record: raw samples, its log, the losses of a recovery."""
    named = (trial.samples_path, trial.log_path)
    files = [root / name for name in named if name is not None]
    if trial.exported is not None and trial.exported.recovery is not None:
        files.append(trial.exported.recovery.record)
    return [file for file in files if file.exists()]


def _write_figure(root: Path, name: str, study: Study) -> Path:
    path = root / "figures" / f"{name}.png"
    write_atomic(path, FIGURES[name](study))
    return path
