"""The judgement on one window: the promise, the version's own baseline, and what was found before.

Pure: no clock, no disk, no network. The caller keeps the state and hands it back. A window that was judged
before, or that overlaps one, changes nothing, so a flow that runs twice does not find anything twice.

Nothing is breached by one window: a promise must be broken, or a stage slower, in as many windows running as
the policy says, and a breach ends only when as many running have come back below a lower bar.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import NamedTuple

from pydantic import AwareDatetime, Field

from open_autoglm.monitoring.baseline import WATCHED, Baseline, Expected, Observation, Watched, observe
from open_autoglm.monitoring.promises import Kept, check_promises, unjudged
from open_autoglm.monitoring.shift import Finding, Point, ShiftPolicy, Track, follow
from open_autoglm.schemas.base import FORMAT_VERSION, Model
from open_autoglm.schemas.watch import Judgement, LatencyWindow, Slo

CLOCKS_DIFFER_S = 5.0
"""Clocks of two hosts may differ so."""

_STALE_WINDOWS = 2

_PARTIAL, OVERLAP = 0.25, 0.1
"""Shares of a window that may be missing, since counters are read now and then, or were judged before, since
a schedule is not on the second."""


_HOST_WORTH_TELLING = 0.01

LEVEL = "_level_of_limit"
"""Behind a stage, the figure of its cumulative sum: 0 while it is no slower than ever."""


class Policy(Model):
    """What is promised, and what it takes to say that it is not kept."""

    slo: Slo
    window_s: float = Field(900, gt=0)
    min_requests: int = Field(50, ge=1, description="asked in a window; fewer say nothing")
    promise_error: float = Field(0.01, gt=0, lt=1, description="chance of a kept promise to look broken once")
    shift: ShiftPolicy = ShiftPolicy()
    cool_down_s: float = Field(21_600, ge=0, description="after acting on a breach, until the next act")


class Breach(Model):
    """One that has not ended."""

    since: AwareDatetime
    by: tuple[str, ...] = Field(description="promises, and stages as `shift ttft`")
    calm: int = Field(0, ge=0, description="windows running that are back below the lower bar")


class JudgeState(Model):
    """What is remembered from one window to the next."""

    format_version: int = FORMAT_VERSION
    version: str = ""
    bundle_digest: str = ""
    judged_until: AwareDatetime | None = None
    tracks: Mapping[Watched, Track] = {}
    broken: Mapping[str, int] = Field(default={}, description="windows running, by promise")
    asked_per_s: float = Field(0, ge=0, description="requests in the last window")
    breach: Breach | None = None
    cool_until: AwareDatetime | None = None


class Look(NamedTuple):
    """What a window shows, beside what was remembered."""

    tracks: Mapping[Watched, Track]
    broken: Mapping[str, int]
    alarms: Mapping[str, str]
    """Sentences, by what they are about: confirmed, and a breach."""
    restless: frozenset[str]
    """What is above the lower bar. What is not promised any more, or cannot be compared, is not among it:
    nothing could ever end a breach by that."""
    notes: tuple[str, ...]
    figures: Mapping[str, float]


def judge(
    window: LatencyWindow, state: JudgeState, baseline: Baseline | None, policy: Policy, now: datetime
) -> tuple[Judgement, JudgeState]:
    """The judgement on ``window`` and the state to hand back with the next.

    A baseline of another version is not compared with. The first window that is over its promise, and the
    first of each process with a baseline, import SciPy, about a second: call it in a thread.
    """
    if (reason := _unfit(window, policy, now)) is not None:
        return no_data(window, reason, now=now), state
    if (reason := _other_clock(state, now)) is not None:
        return no_data(window, reason, now=now), _begun_anew(state, policy, now)
    if (reason := _judged_before(window, state)) is not None:
        return no_data(window, reason, now=now), state
    if (window.version, window.bundle_digest) != (state.version, state.bundle_digest):
        state = JudgeState(
            version=window.version, bundle_digest=window.bundle_digest, cool_until=state.cool_until
        )
    asked_per_s = (window.requests + window.refused) / window.seconds
    state = state.model_copy(update={"judged_until": window.end, "asked_per_s": asked_per_s})
    if (reason := silent(window, policy)) is not None:
        return no_data(window, reason, now=now), state
    look = _look(window, state, baseline if baseline and baseline.is_of(window) else None, policy)
    return decide(window, look, state, policy, now)


# ── before anything is judged ────────────────────────────────────────────────────────────────────


def _unfit(window: LatencyWindow, policy: Policy, now: datetime) -> str | None:
    """Why the window is not looked at, in words."""
    if window.end <= window.begin:
        return "the window ends before it begins"
    if abs(window.seconds - policy.window_s) > _PARTIAL * policy.window_s:
        return f"the window is {window.seconds:.0f} s long; {policy.window_s:.0f} s are judged"
    early_s = (window.end - now).total_seconds()
    if early_s > CLOCKS_DIFFER_S:
        return f"the window ends {early_s:.0f} s from now: the clocks differ"
    if -early_s > _STALE_WINDOWS * policy.window_s:
        return f"the window ended {-early_s:.0f} s ago: it says nothing of now"
    return None


def _other_clock(state: JudgeState, now: datetime) -> str | None:
    """Whether this host's clock was set back since the last look, in words."""
    until = state.judged_until
    if until is None or (ahead_s := (until - now).total_seconds()) <= CLOCKS_DIFFER_S:
        return None
    return f"this host's clock was set back: it is {ahead_s:.0f} s before the last window's end; begun anew"


def _begun_anew(state: JudgeState, policy: Policy, now: datetime) -> JudgeState:
    """From now on: by which clock the moments before were told, nobody knows. A breach goes on."""
    breach = state.breach and state.breach.model_copy(update={"since": min(state.breach.since, now)})
    cool_until = _cool_until(state, policy, now)
    changes = {"judged_until": now, "tracks": {}, "broken": {}, "breach": breach, "cool_until": cool_until}
    return state.model_copy(update=changes)


def _judged_before(window: LatencyWindow, state: JudgeState) -> str | None:
    """That most of the window is new, or why it is not looked at."""
    until = state.judged_until
    if until is None or (until - window.begin).total_seconds() <= OVERLAP * window.seconds:
        return None
    return f"the window overlaps one that was judged: until {until.isoformat()}"


def silent(window: LatencyWindow, policy: Policy) -> str | None:
    """Why the window says nothing of the service, in words."""
    asked = window.requests + window.refused
    if asked < policy.min_requests:
        return f"{asked} requests in the window; {policy.min_requests} are needed"
    lengths = {"prompt tokens": window.prompt_tokens, "output tokens": window.output_tokens}
    for name, histogram in (*window.times_ms.items(), *lengths.items()):
        if not math.isfinite(histogram.sum):
            return f"the sum of {name} is not finite"
    lost = (window.failed + window.refused) / asked > policy.slo.error_fraction
    return None if lost else unjudged(window, policy.slo)


def no_data(window: LatencyWindow, *reasons: str, now: datetime) -> Judgement:
    reasons = (*reasons, *_interruptions(window))
    return Judgement(service=window.service, at=now, state="no_data", reasons=reasons, window=window)


# ── one look ─────────────────────────────────────────────────────────────────────────────────────


def _look(window: LatencyWindow, state: JudgeState, baseline: Baseline | None, policy: Policy) -> Look:
    promises = _look_at_promises(window, state, policy)
    shifts = _look_at_shifts(window, state, baseline, policy)
    return Look(
        tracks=shifts.tracks,
        broken=promises.broken,
        alarms={**promises.alarms, **shifts.alarms},
        restless=promises.restless | shifts.restless,
        notes=(*promises.notes, *shifts.notes),
        figures={"requests": float(window.requests), **promises.figures, **shifts.figures},
    )


def _look_at_promises(window: LatencyWindow, state: JudgeState, policy: Policy) -> Look:
    kept = check_promises(window, policy.slo)
    broken = {
        promise.name: state.broken.get(promise.name, 0) + 1
        for promise in kept
        if promise.chance < policy.promise_error
    }
    alarms = {
        promise.name: f"{promise.told}, in {broken[promise.name]} windows running"
        for promise in kept
        if broken.get(promise.name, 0) >= policy.shift.confirm
    }
    notes = tuple(
        f"{p.told}, in a first window" if p.name in broken else p.told for p in kept if p.name not in alarms
    )
    restless = frozenset(promise.name for promise in kept if not promise.within)
    return Look(state.tracks, broken, alarms, restless, notes, promise_figures(window, kept))


def promise_figures(window: LatencyWindow, kept: tuple[Kept, ...]) -> dict[str, float]:
    figures = {f"{promise.name}_bad_share": promise.share for promise in kept}
    for stage, times in window.times_ms.items():
        if (p95 := times.quantile(0.95)) is not None:
            figures[f"{stage}_p95_ms"] = p95
    return figures


def _look_at_shifts(
    window: LatencyWindow, state: JudgeState, baseline: Baseline | None, policy: Policy
) -> Look:
    seen = observe(window)
    if baseline is None or seen is None:
        missing = "no baseline of this version yet" if baseline is None else "no times to compare"
        return Look(state.tracks, {}, {}, frozenset(), (f"{missing}: only the promises count",), {})
    tracks, notes, alarms, restless = dict(state.tracks), [], {}, set()
    figures: dict[str, float] = {}
    for watched in (name for name in WATCHED if name in baseline.stages and name in seen.engine_ms):
        name, expected = f"shift {watched}", baseline.expect(watched, seen)
        if expected is None:
            notes.append(f"{watched}: its baseline has not seen such lengths or such a load")
            continue
        point = _point(seen, watched, expected, policy)
        tracks[watched], found = follow(tracks.get(watched, Track()), point, expected.by, policy.shift)
        figures |= _shift_figures(watched, seen.engine_ms[watched], expected, found)
        told = f"{watched}: {seen.engine_ms[watched]:.4g} ms in the engine, {_expected_words(expected)}"
        if found.jump or found.level:
            alarms[name] = f"{told}; {_shift_words(found, policy.shift)}"
        else:
            notes.append(told)
        if point.log_ratio > policy.shift.least / 2:
            restless.add(name)
    return Look(tracks, {}, alarms, frozenset(restless), tuple(notes), figures)


def _point(seen: Observation, watched: Watched, expected: Expected, policy: Policy) -> Point:
    return Point(
        at=seen.end.timestamp() / policy.window_s,
        log_ratio=math.log(seen.engine_ms[watched] / expected.ms),
        uncertainty=expected.uncertainty,
        answers=seen.answers[watched],
        beside_host=expected.host_share is not None,
    )


def _expected_words(expected: Expected) -> str:
    told = f"{expected.ms:.4g} ms expected"
    if expected.host_share is None or abs(expected.host_share) < _HOST_WORTH_TELLING:
        return told
    return f"{told} of a host whose pace makes it {math.expm1(expected.host_share):+.0%}"


def _shift_figures(watched: Watched, ms: float, expected: Expected, found: Finding) -> dict[str, float]:
    host = {} if expected.host_share is None else {f"{watched}_host_share": math.expm1(expected.host_share)}
    return {
        f"{watched}_engine_ms": ms,
        f"{watched}_expected_ms": expected.ms,
        f"{watched}_jump_sigmas": found.sigmas,
        f"{watched}{LEVEL}": found.sum / found.limit,
        **host,
    }


def _shift_words(found: Finding, policy: ShiftPolicy) -> str:
    if found.jump:
        return (
            f"at least {found.slower:.0%} slower in {policy.confirm} windows running, "
            f"{found.sigmas:.1f} standard deviations above its forecast"
        )
    return f"slower for long: the cumulative sum is {found.sum / found.limit:.1f} times its limit"


# ── the verdict ──────────────────────────────────────────────────────────────────────────────────


def decide(
    window: LatencyWindow, look: Look, state: JudgeState, policy: Policy, now: datetime
) -> tuple[Judgement, JudgeState]:
    breach = _breach(look, state.breach, policy, now)
    cool_until = _cool_until(state, policy, now)
    cooling = cool_until is not None and now < cool_until
    act = breach is not None and bool(look.alarms) and not cooling
    ended = state.breach is not None and breach is None
    judgement = Judgement(
        service=window.service,
        at=now,
        state="ok" if breach is None else "breached",
        act=act,
        reasons=(
            *_reasons(look, breach, cool_until if cooling else None),
            *(_end_told(state.breach) if state.breach and ended else ()),
            *_interruptions(window),
        ),
        window=window,
        figures=look.figures,
    )
    return judgement, state.model_copy(
        update={
            "tracks": {} if ended else look.tracks,
            "broken": look.broken,
            "breach": breach,
            "cool_until": now + timedelta(seconds=policy.cool_down_s) if act else cool_until,
        }
    )


def _cool_until(state: JudgeState, policy: Policy, now: datetime) -> datetime | None:
    """No later than a whole cool-down from now: the clock, or the cool-down, may have been set since."""
    latest = now + timedelta(seconds=policy.cool_down_s)
    return state.cool_until and min(state.cool_until, latest)


def _breach(look: Look, before: Breach | None, policy: Policy, now: datetime) -> Breach | None:
    """The breach that goes on, or begins; None if there is none, or it has ended."""
    if before is None:
        return Breach(since=now, by=tuple(look.alarms)) if look.alarms else None
    by = tuple(dict.fromkeys((*before.by, *look.alarms)))
    calm = before.calm + 1 if look.restless.isdisjoint(by) else 0
    if calm >= policy.shift.confirm:
        return None
    return Breach(since=before.since, by=by, calm=calm)


def _reasons(look: Look, breach: Breach | None, cool_until: datetime | None) -> tuple[str, ...]:
    if breach is None:
        return look.notes
    reasons = [*look.alarms.values()]
    if not look.alarms:
        reasons.append(f"breached since {breach.since.isoformat()} by {', '.join(breach.by)}: not over yet")
        reasons += look.notes
    if cool_until is not None:
        reasons.append(
            f"nothing is done before {cool_until.isoformat()}: what was done about it has to show first"
        )
    return tuple(reasons)


def _end_told(breach: Breach) -> tuple[str, ...]:
    return (f"the breach since {breach.since.isoformat()} by {', '.join(breach.by)} is over",)


def _interruptions(window: LatencyWindow) -> tuple[str, ...]:
    """What no counter shows: who was being answered meanwhile by a server that ended is not counted."""
    if not window.restarts:
        return ()
    times = "once" if window.restarts == 1 else f"{window.restarts} times"
    return (f"the engine or its server was started again {times} in the window",)
