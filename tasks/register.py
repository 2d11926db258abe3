"""Record the study in MLflow, register its champion, and show the result in Prefect."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefect import Task, task
from prefect.client.schemas.objects import State, TaskRun

from open_autoglm import search
from open_autoglm.conclusion import Standings, conclude, deliver
from open_autoglm.errors import UserError
from open_autoglm.incumbent import find_incumbent
from open_autoglm.measure.isolation import Failure
from open_autoglm.measure.lease import preparing
from open_autoglm.progress import announce
from open_autoglm.schemas import Analysis, OptimizeSpec, Study, Trial
from open_autoglm.settings import Settings
from open_autoglm.study import StudyRef
from open_autoglm.tracking import Tracker, UnderWay, Unreachable, registered_name
from open_autoglm.trials import Bench, golden_of, screen_trial
from tasks.artifacts import publish
from tasks.progress import unit_done

PATIENCE_S = (1.0, 5.0, 60.0)
"""Before each retry: a registry that is started again, and a move of aliases whose writer was killed, need no
longer."""


def may_help(_: Task[..., Any], __: TaskRun, state: State[Any]) -> bool:
    """Whether the same again may go well: a request that is wrong, or a full disk, stays so."""
    return not isinstance(state.data, UserError) or isinstance(state.data, Unreachable | UnderWay)


def tracker() -> Tracker:
    """MLflow where the settings say it is."""
    settings = Settings()
    return Tracker(settings.mlflow_uri, settings.mlflow_artifacts)


@task(retries=2, retry_delay_seconds=[1, 5])
def begin_record(study: StudyRef, spec: OptimizeSpec, checkpoint_name: str) -> str:
    """The study's MLflow run, found again if the study is resumed."""
    with preparing():
        return tracker().start_study(spec, study.id, registered_name(spec, checkpoint_name))


@task
def admit_incumbent(
    bench: Bench, analysis: Analysis, generations: list[list[Trial]], reference: Path | Failure
) -> Standings:
    """The registered champion takes part: it is marked among the trials, or screened as one more."""
    settings = Settings()
    screened = [trial for generation in generations for trial in generation]
    with preparing():
        incumbent, trials = find_incumbent(bench, tracker(), screened, settings)
    seen = [
        t if t.screening or t.status != "ok" else screen_trial(bench, t, reference, settings) for t in trials
    ]
    lessons = search.lessons(generations, analysis, bench.spec)
    return Standings(trials=tuple(seen), incumbent=incumbent, search=lessons)


@task(retries=3, retry_delay_seconds=[*PATIENCE_S], retry_condition_fn=may_help)
def register(bench: Bench, analysis: Analysis, standings: Standings, mlflow_run_id: str) -> Study:
    """Choose, gate, bundle, register, report. Idempotent, so a retry does no harm."""
    with preparing():
        study = conclude(bench, analysis, standings)
        champion = study.trial(study.champion) if study.champion else None
        golden = golden_of(bench, champion, Settings()) if champion else ()
        study = deliver(study, golden, tracker(), mlflow_run_id)
        publish(study)
    unit_done(bench.study)
    announce(f"verdict: {study.verdict.kind} {study.champion or ''}".rstrip())
    return study


@contextmanager
def recorded(mlflow_run_id: str) -> Iterator[str]:
    """Close the study's MLflow runs if the flow cannot go on; otherwise `register` closes them."""
    try:
        yield mlflow_run_id
    except BaseException as error:
        try:
            tracker().mark_failed(mlflow_run_id, f"{type(error).__name__}: {error}")
        except UserError as away:
            announce(f"the study's run in MLflow is left open: {away}")
        raise
