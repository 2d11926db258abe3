"""Judge a candidate's output against the fp32 reference, and keep its MLflow run up to date."""

from __future__ import annotations

from pathlib import Path

from prefect import task

from open_autoglm.measure.isolation import Failure
from open_autoglm.measure.lease import preparing
from open_autoglm.schemas import Analysis, Trial
from open_autoglm.settings import Settings
from open_autoglm.trials import Bench, evaluate_trial, prepare_reference
from tasks.progress import unit_done
from tasks.register import tracker


@task
def compute_reference(bench: Bench, analysis: Analysis) -> Path | Failure:
    """The fp32 predictions every candidate is compared with; computed once per checkpoint."""
    reference = prepare_reference(bench, analysis, Settings())
    unit_done(bench.study)
    return reference


@task(task_run_name="evaluate-{trial.id}")
def evaluate(trial: Trial, bench: Bench, reference: Path | Failure, mlflow_run_id: str) -> Trial:
    """Perplexity, KL, agreement and greedy divergence on both paths, where a slice left them unclear."""
    scored = evaluate_trial(bench, trial, reference, Settings())
    with preparing():
        child = tracker().log_trial(mlflow_run_id, scored)
    unit_done(bench.study)
    return scored.model_copy(update={"mlflow_run_id": child})
