"""Find the fastest way to serve a model within its limits: the whole story on one screen."""

from __future__ import annotations

from typing import Any, cast

from prefect import flow, unmapped
from prefect.futures import PrefectFuture
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from open_autoglm.schemas import OptimizeSpec, Study, Trial
from open_autoglm.study import working_on
from tasks.analyze import analyse, propose, refine
from tasks.benchmark import final, prepare_bench, race, refill, screen, shortlist
from tasks.evaluate import compute_reference, evaluate
from tasks.export import export
from tasks.load import load, open_directory, probe
from tasks.progress import start_progress
from tasks.register import admit_incumbent, begin_record, recorded, register

# One candidate is screened while the next is loaded; more would hold more models in memory at once.
SIDE_BY_SIDE = cast("TaskRunner[PrefectFuture[Any]]", ThreadPoolTaskRunner(max_workers=2))


@flow(name="optimize", task_runner=SIDE_BY_SIDE, flow_run_name="optimize-{spec.called}")
def optimize(spec: OptimizeSpec) -> Study:
    """Load, analyse, plan; export and screen, and search around the best; evaluate until all places are
    taken, race, final, register.

    Preparation goes on side by side; a timed run holds the device alone. A candidate that fails is a trial
    with a reason. A study that was interrupted is resumed.
    """
    checkpoint = load(spec)
    hardware = probe()
    analysis = analyse(checkpoint, spec, hardware)
    candidates = propose(analysis, spec)

    study = open_directory(spec, checkpoint, hardware)
    with working_on(study), recorded(begin_record(study, spec, checkpoint.name)) as mlflow_run_id:
        start_progress(study, len(candidates))
        bench = prepare_bench(study, spec, checkpoint, hardware)
        reference = compute_reference.submit(bench, analysis)

        generations: list[list[Trial]] = []
        while candidates:
            exported = export.map(candidates, unmapped(study), unmapped(checkpoint))
            screened = screen.map(exported, unmapped(bench), unmapped(reference.result()))
            generations.append(screened.result())
            candidates = refine(generations, analysis, spec)

        standings = shortlist(bench, admit_incumbent(bench, analysis, generations, reference.result()))
        wave = list(standings.trials)
        while wave:
            judged = evaluate.map(wave, unmapped(bench), unmapped(reference), unmapped(mlflow_run_id))
            standings, wave = refill(bench, standings, judged.result())

        standings = final(bench, race(bench, standings))
        return register(bench, analysis, standings, mlflow_run_id)
