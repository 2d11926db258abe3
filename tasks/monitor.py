"""Looking at what is served: one judgement, its cause, what is done about it, and what people see of it."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import cast

from prefect import task
from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment

from open_autoglm.errors import UserError
from open_autoglm.monitoring.anchor import trial_anchor
from open_autoglm.monitoring.answer import LOOK_AGAIN_S, is_curable, is_final, once_key, reoptimization
from open_autoglm.monitoring.config import WatchSpec
from open_autoglm.monitoring.diagnosis import diagnose, remember_good_times
from open_autoglm.monitoring.picture import watch_figure
from open_autoglm.monitoring.registered import share_baseline
from open_autoglm.monitoring.sources import fetch
from open_autoglm.monitoring.watch import look
from open_autoglm.monitoring.watch_store import WatchStore
from open_autoglm.monitoring.windows import clock
from open_autoglm.progress import announce
from open_autoglm.schemas import Cause, Judgement, Reoptimization
from open_autoglm.serving.source import connect
from open_autoglm.settings import Settings

_SHOWN_WINDOWS = 96


def store_of(watch: WatchSpec) -> WatchStore:
    return WatchStore(Settings().home, watch.service)


@task
def judge_now(watch: WatchSpec) -> Judgement:
    """One look. Whatever is down or odd is a judgement of no data, with its reason."""
    home, now = Settings().home, datetime.now(UTC)
    store = store_of(watch)
    judgement = look(
        watch, lambda begin: fetch(watch, home, begin, now), store, now, partial(trial_anchor, home)
    )
    announce(f"{watch.service}: {judgement.state}: {'; '.join(judgement.reasons)}")
    return judgement


@task
def find_cause(watch: WatchSpec, judgement: Judgement) -> Cause:
    """A probe of endpoint and host, and what speaks for which cause."""
    cause = diagnose(watch, judgement, store_of(watch), Settings().home)
    announce(f"cause: {cause.kind}: {cause.told}")
    return cause


@task
def learn_good_times(watch: WatchSpec, judgement: Judgement) -> None:
    """What later causes are found by: a probe of this bundle while all is well, once."""
    if (problem := remember_good_times(watch, judgement, store_of(watch), Settings().home)) is not None:
        announce(f"no probe of good times yet: {problem}")


def start_reoptimization(watch: WatchSpec, judgement: Judgement, cause: Cause) -> str | None:
    """Begin the deployment `reoptimize`, once an hour for a model however many ask; why not, in words."""
    if judgement.window is None:
        raise ValueError("a breach without a window has no workload to optimise for")
    request = reoptimization(watch, judgement.window, cause, judgement.at)
    begun = begin_run(watch.service, request, judgement.due or judgement.at, return_state=True)
    if begun.is_completed():
        return None
    return f"`reoptimize` could not be started: {(begun.message or begun.name or '').splitlines()[0]}"


@task(retries=2, retry_delay_seconds=[1, 5])
def begin_run(service: str, request: Reoptimization, due: datetime) -> str:
    """The run's name; the same run for whoever asks in the hour of ``due``."""
    run = cast(
        FlowRun,
        run_deployment(
            "reoptimize/reoptimize",
            parameters={"request": request.model_dump(mode="json")},
            timeout=0,
            idempotency_key=once_key(service, due),
            tags=["watch", service],
        ),
    )
    announce(f"{service} is optimised again: {run.name}")
    return run.name


def look_again(config: str, judgement: Judgement) -> None:
    """Ask for another look as soon as it can tell more, once for that moment: the schedule's may be later."""
    if judgement.again is None:
        return
    asked = ask_for_look(config, judgement.service, judgement.again, return_state=True)
    if not asked.is_completed():
        why = (asked.message or asked.name or "").splitlines()[0]
        announce(f"no look before the schedule's next: `regression` could not be started: {why}")


@task
def ask_for_look(config: str, service: str, at: datetime) -> None:
    """The same run for whoever asks for that moment."""
    run_deployment(
        "regression/regression",
        parameters={"config": config},
        scheduled_time=at,
        timeout=0,
        idempotency_key=f"look-{service}-{at:%Y%m%dT%H%M%S}",
        tags=["watch", service],
        as_subflow=False,
    )
    announce(f"{service} is looked at again at {clock(at)}")


def settle(watch: WatchSpec, judgement: Judgement, problem: str | None) -> Judgement:
    """What was to be done is done, unless there was a ``problem`` or its cause could not be looked for: then
    it stays due, and the judgement says so."""
    if problem is None and judgement.cause is not None and not is_final(judgement.cause):
        problem = "its cause could not be looked for"
    cured = judgement.cause is not None and is_curable(judgement.cause)
    again = None if cured else judgement.at + timedelta(seconds=LOOK_AGAIN_S)
    told = f"{problem}; the next look tries again" if problem else store_of(watch).answered(again)
    if told is None:
        return judgement
    announce(told)
    return judgement.model_copy(update={"reasons": (*judgement.reasons, told)})


def record(judgement: Judgement, watch: WatchSpec) -> None:
    """Show the judgement in Prefect and MLflow, and keep its version's baseline there; an MLflow that is away
    is no reason not to judge."""
    _publish(judgement, watch)
    try:
        registry = connect(Settings())
        registry.log_judgement(judgement)
        if (done := share_baseline(watch, judgement, store_of(watch), registry)) is not None:
            announce(done)
    except UserError as error:
        announce(f"the judgement is not in MLflow: {error}")


def _publish(judgement: Judgement, watch: WatchSpec) -> None:
    reasons = "\n".join(f"- {reason}" for reason in judgement.reasons)
    cause = judgement.cause
    why = f"\n\n### Cause: {cause.kind}\n\n{cause.told}" if cause else ""
    create_markdown_artifact(
        f"## {watch.service}: {judgement.state.replace('_', ' ')}\n\n{reasons}{why}",
        key=_key("judgement", watch),
        description=f"{watch.service} at {judgement.at:%H:%M} UTC",
    )
    figures = {**judgement.figures, **(cause.evidence if cause else {})}
    create_table_artifact(
        [{"figure": name, "value": _shown(value)} for name, value in figures.items()],
        key=_key("figures", watch),
    )
    last = list(store_of(watch).history())[-_SHOWN_WINDOWS:]
    picture = base64.b64encode(watch_figure(last, watch.policy.slo)).decode()
    create_image_artifact(f"data:image/png;base64,{picture}", key=_key("windows", watch))


def _key(name: str, watch: WatchSpec) -> str:
    """Prefect's keys are lower case, digits and dashes."""
    plain = "".join(letter if letter.isalnum() else "-" for letter in watch.service.lower())
    return f"{name}-{plain}"


def _shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.5g}"
