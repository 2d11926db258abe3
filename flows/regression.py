"""Does what is served still keep its promise? If not, why, and what is done about it: on one screen."""

from __future__ import annotations

from prefect import flow

from open_autoglm.monitoring.answer import is_curable
from open_autoglm.monitoring.config import find_watch
from open_autoglm.schemas import Judgement
from open_autoglm.settings import Settings
from tasks.monitor import (
    find_cause,
    judge_now,
    learn_good_times,
    look_again,
    record,
    settle,
    start_reoptimization,
)


@flow(name="regression", flow_run_name="regression-{config}")
def regression(config: str) -> Judgement:
    """Judge the last window of the service that ``config`` is about: its name, or a file like
    infra/watch/demo-glm.yaml.

    A breach is acted on when it is confirmed and nothing was done lately: its cause is found first. A slower
    engine or another traffic mix is a reason to optimise again; more callers or a busy host are told. What a
    run could not do, or was killed before, the next one does.

    Who comes amid a window, as an alert does, finds a breach if it is certain already. Where another look
    tells more before the schedule's next one, it is asked for.
    """
    watch = find_watch(config, Settings().home)
    judgement = judge_now(watch)
    if judgement.act:
        cause = find_cause(watch, judgement)
        judgement = judgement.model_copy(update={"cause": cause})
        problem = start_reoptimization(watch, judgement, cause) if is_curable(cause) else None
        judgement = settle(watch, judgement, problem)
    learn_good_times(watch, judgement)
    record(judgement, watch)
    look_again(config, judgement)
    return judgement
