"""Optimise again what is served, and try the winner beside the champion: the story on one screen."""

from __future__ import annotations

from prefect import flow

from open_autoglm.ladder import goes_on, rungs
from open_autoglm.schemas import Outcome, Reoptimization, Study
from tasks.deploy import approved, challenge, decide, publish_outcome, renew, run_study, trial_under_way


@flow(name="reoptimize", flow_run_name="reoptimize-{request.spec.called}")
def reoptimize(request: Reoptimization) -> Outcome:
    """Climb the ladder until a rung has an answer; its winner earns its place behind a canary, or goes back.

    Each rung is a study of its own under the same quality gate, and waits its turn for the device. The
    champion stays where it is: the endpoint's judge promotes the challenger, or takes it away. While it tries
    one, nothing is studied. Where nobody is faster than a champion whose engine has become slow, that engine
    is started anew.
    """
    if (outcome := trial_under_way(request)) is not None:
        publish_outcome(outcome, request)
        return outcome
    studies: list[Study] = []
    for rung, spec in rungs(request):
        studies.append(run_study(rung, spec))
        if not goes_on(studies[-1]):
            break
    outcome = decide(studies)
    if outcome.kind == "challenger" and request.require_approval:
        outcome = approved(outcome)
    if outcome.kind == "challenger":
        outcome = challenge(outcome, request)
    elif request.renew:
        outcome = renew(outcome)
    publish_outcome(outcome, request)
    return outcome
