"""Look at each candidate, race those worth it, and run the final. A timed round holds the device alone."""

from __future__ import annotations

from pathlib import Path

from prefect import task

from open_autoglm.bracket import (
    after_screening,
    best_go_on,
    final_contest,
    race_contest,
    recall,
)
from open_autoglm.conclusion import Standings
from open_autoglm.files import write_atomic
from open_autoglm.heats import run_stage
from open_autoglm.measure.isolation import Failure
from open_autoglm.measure.lease import preparing
from open_autoglm.measure.workload import make_workload
from open_autoglm.progress import announce
from open_autoglm.quality.reference import make_evaluation_set
from open_autoglm.schemas import Checkpoint, Hardware, OptimizeSpec, Trial
from open_autoglm.settings import Settings
from open_autoglm.study import StudyRef
from open_autoglm.trials import Bench, screen_trial
from tasks.progress import unit_done


@task
def prepare_bench(study: StudyRef, spec: OptimizeSpec, checkpoint: Checkpoint, hardware: Hardware) -> Bench:
    """Draw the prompts all candidates are timed on and the texts they are judged on."""
    with preparing():
        bench = Bench(
            study=study,
            spec=spec,
            checkpoint=checkpoint,
            hardware=hardware,
            workload=make_workload(checkpoint, spec, study.root / "workload.npz"),
            evaluation_set=make_evaluation_set(checkpoint, spec, study.root / "evaluation.npy"),
        )
    # What `open-autoglm reproduce` needs to run one trial again.
    write_atomic(study.root / "bench.json", bench.model_dump_json(indent=1))
    return bench


@task(task_run_name="screen-{trial.id}")
def screen(trial: Trial, bench: Bench, reference: Path | Failure) -> Trial:
    """Memory, quality on a slice and a few short rounds, in a fresh child process."""
    seen = screen_trial(bench, trial, reference, Settings())
    unit_done(bench.study)
    return seen


@task
def shortlist(bench: Bench, standings: Standings) -> Standings:
    """Without those that the screening shows to be hopeless."""
    return standings.model_copy(update={"trials": tuple(after_screening(standings.trials, bench.spec))})


@task
def refill(bench: Bench, standings: Standings, judged: list[Trial]) -> tuple[Standings, list[Trial]]:
    """Without those that lose too much by all that was scored, and with who takes their places."""
    standings, called = standings.refilled(judged, bench.spec)
    if called:
        announce(f"evaluation: {', '.join(trial.id for trial in called)} called up for those that fell")
    return standings, called


@task
def race(bench: Bench, standings: Standings) -> Standings:
    """Interleaved heats among those that keep the quality, until few enough are left for the final."""
    contest = race_contest(standings.trials, bench.spec)
    if contest is not None:
        announce(f"race: {', '.join(contest.contestants)}")
        run, held = run_stage(bench, "race", contest, Settings())
        standings = standings.after(held, run)
    unit_done(bench.study)
    trials = recall(best_go_on(standings.trials, bench.spec))
    return standings.model_copy(update={"trials": tuple(trials)})


@task
def final(bench: Bench, standings: Standings) -> Standings:
    """Interleaved rounds of the finalists, the baseline, the incumbent, and a twin of the best."""
    contest = final_contest(standings.trials, bench.spec)
    if contest is not None:
        announce(f"final: {', '.join(contest.contestants)}")
        run, held = run_stage(bench, "final", contest, Settings())
        announce(f"final: {held.stopped_because}")
        standings = standings.after(held, run)
    unit_done(bench.study)
    return standings
