"""Time a candidate. Loading runs in parallel with other preparation; timing holds the device alone."""

from __future__ import annotations

from prefect import task

from open_autoglm.measure.workload import make_workload
from open_autoglm.quality.reference import make_evaluation_set
from open_autoglm.schemas import Checkpoint, Hardware, OptimizeSpec, Trial
from open_autoglm.settings import Settings
from open_autoglm.study import StudyRef
from open_autoglm.trials import Bench, measure_trial
from tasks.progress import unit_done


@task
def prepare_bench(study: StudyRef, spec: OptimizeSpec, checkpoint: Checkpoint, hardware: Hardware) -> Bench:
    """Draw the prompts all candidates are timed on and the texts they are judged on."""
    return Bench(
        study=study,
        spec=spec,
        checkpoint=checkpoint,
        hardware=hardware,
        workload=make_workload(checkpoint, spec, study.root / "workload.npy"),
        evaluation_set=make_evaluation_set(checkpoint, spec, study.root / "evaluation.npy"),
    )


@task(task_run_name="benchmark-{trial.id}")
def benchmark(trial: Trial, bench: Bench) -> Trial:
    """TTFT, TPOT, tokens per second, load time and peak memory, in a fresh child process."""
    timed = measure_trial(bench, trial, Settings())
    unit_done(bench.study)
    return timed
