"""From a study's winner to a challenger that answers: studies on the device's queue, approval, canary."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from typing import cast
from uuid import UUID

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.exceptions import NotPausedError
from prefect.flow_runs import pause_flow_run, resume_flow_run
from prefect.input import RunInput
from prefect.runtime import flow_run

from open_autoglm.errors import StudyError
from open_autoglm.ladder import outcome_of
from open_autoglm.monitoring.renewal import renew_engine
from open_autoglm.progress import announce
from open_autoglm.schemas import OptimizeSpec, Outcome, Reoptimization, Rung, Study
from open_autoglm.settings import Settings
from open_autoglm.study import load_study
from tasks.register import PATIENCE_S, may_help, tracker

_APPROVAL_S = 24 * 3600
_PREFECT_WAITS_S = 3600
"""Longer than we do: a run whose pause Prefect itself has given up can only fail."""
_NOBODY = "nobody answered within a day"


class Approval(RunInput):
    """The form that a person is shown."""

    approve: bool = False
    remark: str = ""


@task(retries=3, retry_delay_seconds=[*PATIENCE_S], retry_condition_fn=may_help)
def run_study(rung: Rung, spec: OptimizeSpec) -> Study:
    """One rung of the ladder, as a run of the deployment `optimize`: it waits its turn for the device.

    A retry, after Prefect's server was away, waits for the same run. Raises StudyError if it ended badly. If
    this flow run is run again after that, another run takes the study up where it stopped.
    """
    output = Settings().studies / f"reoptimize-{flow_run.get_id()}-{rung}"
    asked = spec.model_copy(update={"output": str(output)})
    announce(f"rung {rung}: a study in {Settings().shown(output)}")
    run = _study_run(rung, asked, 1)
    for attempt in range(2, flow_run.get_run_count() + 1):
        if _ended_well(run):
            break
        run = _study_run(rung, asked, attempt)
    if not _ended_well(run):
        how = run.state.name if run.state else "unknown"
        raise StudyError(f"the study of rung {rung} ended as {how}: see its flow run {run.name}")
    return load_study(output)


def _study_run(rung: Rung, spec: OptimizeSpec, attempt: int) -> FlowRun:
    """When it has ended. The same for whoever asks in the same attempt of this flow run."""
    again = f"-{attempt}" if attempt > 1 else ""
    run = run_deployment(
        "optimize/optimize",
        parameters={"spec": spec.model_dump(mode="json")},
        idempotency_key=f"{flow_run.get_id()}-{rung}{again}",
        tags=["reoptimize", rung],
    )
    return cast(FlowRun, run)


def _ended_well(run: FlowRun) -> bool:
    return run.state is not None and run.state.is_completed()


@task(retries=3, retry_delay_seconds=[*PATIENCE_S], retry_condition_fn=may_help)
def decide(studies: list[Study]) -> Outcome:
    """What the climb comes to, beside whoever is champion by now."""
    last = studies[-1]
    registered = last.registration and last.registration.model_name
    champion = tracker().aliases(registered).champion if registered else None
    if champion is None and last.incumbent is not None:
        champion = last.incumbent.version
    return outcome_of(studies, champion)


def approved(outcome: Outcome) -> Outcome:
    """The same if a person says yes, on a form in the Prefect UI; else one that is declined.

    Call inside a flow run, which waits for a day; no answer is a no.
    """
    note = f"**{outcome.told}**\n\nResume the run to answer."
    form = Approval.with_initial_data(description=note)
    with _no_answer_is_a_no():
        answer = pause_flow_run(wait_for_input=form, timeout=_APPROVAL_S + _PREFECT_WAITS_S, poll_interval=2)
    if answer.approve:
        return outcome
    by_itself = answer.remark == _NOBODY
    return _declined(outcome, _NOBODY if by_itself else f"a person declined: {answer.remark or 'no remark'}")


@contextmanager
def _no_answer_is_a_no() -> Iterator[None]:
    """The form is sent in by us if nobody has by then."""
    timer = threading.Timer(_APPROVAL_S, copy_context().run, (_say_no, UUID(flow_run.get_id())))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _say_no(run: UUID) -> None:
    with suppress(NotPausedError):  # somebody has answered just now
        resume_flow_run(run, run_input={"approve": False, "remark": _NOBODY})


def _declined(outcome: Outcome, why: str) -> Outcome:
    told = f"Version {outcome.challenger} is registered and not tried: {why}."
    return outcome.model_copy(update={"kind": "declined", "told": told, "challenger": None})


@task(retries=3, retry_delay_seconds=[*PATIENCE_S], retry_condition_fn=may_help)
def trial_under_way(request: Reoptimization) -> Outcome | None:
    """What a study would come to while somebody is being tried: nothing, for its winner could not be."""
    name = request.spec.register_as
    now = tracker().aliases(name) if name else None
    if name is None or now is None or now.challenger is None:
        return None
    told = f"Nothing is studied: {_tried(name, now.challenger)}."
    return Outcome(kind="declined", told=told, model_name=name, champion=now.champion)


def _tried(name: str, challenger: str) -> str:
    return (
        f"version {challenger} is being tried; its trial ends by the endpoint's verdict, or by `open-autoglm "
        f"rollback {name}`"
    )


@task(retries=3, retry_delay_seconds=[*PATIENCE_S], retry_condition_fn=may_help)
def challenge(outcome: Outcome, request: Reoptimization) -> Outcome:
    """Give the winner its share: the endpoint tries it, and its judge promotes it or takes it away.

    Who is being tried stays, and the outcome is then one that is declined. Raises UserError if another one
    has become champion since the outcome. Idempotent.
    """
    if outcome.challenger is None or outcome.champion is None:
        raise ValueError(f"an outcome that is {outcome.kind} has nobody to try")
    now = tracker().aliases(outcome.model_name)
    if (now.challenger, now.canary) == (outcome.challenger, request.canary):
        return outcome
    if now.challenger not in (None, outcome.challenger):
        return _declined(outcome, _tried(outcome.model_name, now.challenger))
    tracker().canary(
        outcome.model_name,
        outcome.challenger,
        request.canary,
        by="reoptimize",
        reason=request.reason,
        expected={"champion": outcome.champion, "challenger": now.challenger},
    )
    return outcome


@task(retries=3, retry_delay_seconds=[*PATIENCE_S], retry_condition_fn=may_help)
def renew(outcome: Outcome) -> Outcome:
    """Start the engine of the champion anew where it is served here; the outcome, with what came of that."""
    champion = outcome.champion and tracker().version(outcome.model_name, outcome.champion)
    if not champion:
        return outcome
    came_of_it = renew_engine(Settings().home, champion.digest)
    announce(came_of_it)
    return outcome.model_copy(update={"told": f"{outcome.told} {came_of_it}"})


def publish_outcome(outcome: Outcome, request: Reoptimization) -> None:
    """As an artifact of the run. Call inside a flow run."""
    title = f"{outcome.kind.replace('_', ' ')}: {outcome.model_name}"
    lines = [
        f"## {title}",
        outcome.told,
        f"Asked because: {request.reason}" if request.reason else "",
        *(f"- study `{study}`" for study in outcome.studies),
    ]
    create_markdown_artifact("\n\n".join(filter(None, lines)), key="outcome", description=title)
