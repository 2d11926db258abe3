"""A look while a window is under way, as an alert mostly begins one: what is certain of its verdict by then.

What was answered since the last window is no window of its own: two halves of one bad quarter of an hour
would confirm each other, and whoever looks because it is bad finds it bad. So windows stay where they are,
and only what is certain is told before their end. If so many answers broke a promise that the whole window
will have broken it, though all that are to come are in time, then a breach begins now that would begin at its
end, and no other (curtailed tests: Eisenberg and Ghosh, *Ann. Stat.* 8, 1980). Shifts are of the means of
whole windows, and wait for them.

Pure, as the judge is. Nothing but a breach that begins is remembered: at its end, the window is judged whole.
"""

from __future__ import annotations

import math
from datetime import datetime, timedelta

from open_autoglm.monitoring.judge import (
    CLOCKS_DIFFER_S,
    OVERLAP,
    JudgeState,
    Look,
    Policy,
    decide,
    no_data,
    promise_figures,
    silent,
)
from open_autoglm.monitoring.promises import Kept, check_promises
from open_autoglm.monitoring.windows import clock
from open_autoglm.schemas.watch import Judgement, LatencyWindow

_SOONEST = 0.25
"""Share of a window after which a look may find a severe breach: with 600 requests a window, if a third of
the answers are bad."""
_SURPLUS = 1.2
"""Of the requests that are waited for, since they come by chance."""
_SIGMAS = 3.0
"""By which the number of requests to come may be above what is expected."""


def under_way(state: JudgeState, policy: Policy, now: datetime) -> datetime | None:
    """Since when there is a window that is not over; None if a whole one can be judged."""
    until = state.judged_until
    if until is None:
        return None
    passed_s = (now - until).total_seconds()
    return until if -CLOCKS_DIFFER_S <= passed_s < (1 - OVERLAP) * policy.window_s else None


def hardly_begun(since: datetime, policy: Policy, now: datetime) -> str | None:
    """That there is nothing to look at, in words."""
    if (now - since).total_seconds() >= OVERLAP * policy.window_s:
        return None
    return f"a window was judged just now, until {clock(since)}; {told_of_end(since, policy)}"


def told_of_end(since: datetime, policy: Policy) -> str:
    """When there is a verdict, in words."""
    return f"the window from {clock(since)} on is judged when it ends, at {clock(_end(since, policy))}"


def judge_early(
    window: LatencyWindow, state: JudgeState, policy: Policy, now: datetime
) -> tuple[Judgement, JudgeState]:
    """What ``window``, from the last one's end until now, says already, and the state to hand back.

    Until a breach is certain that is no data, with how it stands and when it is judged. Imports SciPy if a
    promise is broken so far.
    """
    since = state.judged_until
    if since is None:
        raise ValueError("no window is under way before the first one was judged")
    end = told_of_end(since, policy)
    if (window.version, window.bundle_digest) != (state.version, state.bundle_digest):
        who = window.version or window.bundle_digest
        told = f"another version, {who}, is served since {clock(window.begin)}"
        return no_data(window, told, end, now=now), state
    if (reason := silent(window, policy)) is not None:
        return _not_yet(window, (reason, end), state, policy, now), state
    kept = check_promises(window, policy.slo, _to_come(window, state, policy))
    broken = {
        promise.name: f"{promise.told}; too many however the window ends"
        for promise in kept
        if promise.chance < policy.promise_error
    }
    alarms = {
        name: f"{told}, in {running} windows running"
        for name, told in broken.items()
        if (running := state.broken.get(name, 0) + 1) >= policy.shift.confirm
    }
    if not alarms:
        so_far = (_told_so_far(promise, broken) for promise in kept)
        return _not_yet(window, (*so_far, end), state, policy, now), state
    figures = {"requests": float(window.requests), **promise_figures(window, kept)}
    look = Look(state.tracks, state.broken, alarms, frozenset(alarms), (), figures)
    return decide(window, look, state, policy, now)


def next_look(window: LatencyWindow, state: JudgeState, policy: Policy) -> datetime | None:
    """When the window after ``window`` may be known to confirm it, if that is all that is missing and can be
    before its end; ``state`` is the one after ``window``."""
    missing = any(running + 1 >= policy.shift.confirm for running in state.broken.values())
    if state.breach is not None or not missing or not state.asked_per_s:
        return None
    enough_s = _SURPLUS * policy.min_requests / state.asked_per_s
    wait_s = max(_SOONEST * policy.window_s, enough_s)
    return window.end + timedelta(seconds=wait_s) if wait_s < (1 - OVERLAP) * policy.window_s else None


def _to_come(window: LatencyWindow, state: JudgeState, policy: Policy) -> int:
    """Requests in the rest of the window: as many as a rate can bring that is no higher than the one so far
    or that of the window before."""
    asked = window.requests + window.refused
    per_s = max(asked / window.seconds, state.asked_per_s)
    expected = per_s * max(0.0, policy.window_s - window.seconds)
    return math.ceil(expected + _SIGMAS * math.sqrt(expected))


def _not_yet(
    window: LatencyWindow, reasons: tuple[str, ...], state: JudgeState, policy: Policy, now: datetime
) -> Judgement:
    """Looked at again when it ends, if the window is not one of a breach that is known."""
    judgement = no_data(window, *reasons, now=now)
    if state.breach is not None or state.judged_until is None:
        return judgement
    return judgement.model_copy(update={"again": _end(state.judged_until, policy)})


def _told_so_far(promise: Kept, broken: dict[str, str]) -> str:
    return f"{broken[promise.name]}, in a first window" if promise.name in broken else promise.told


def _end(since: datetime, policy: Policy) -> datetime:
    return since + timedelta(seconds=policy.window_s)
