"""One look at a served model, from its window to what is remembered of it.

The command line and the flow both call `look`; where windows come from is theirs to say.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime, timedelta
from typing import Protocol

from open_autoglm.monitoring.baseline import Anchor, Baseline, beside_trial
from open_autoglm.monitoring.config import WatchSpec
from open_autoglm.monitoring.early import hardly_begun, judge_early, next_look, told_of_end, under_way
from open_autoglm.monitoring.judge import judge
from open_autoglm.monitoring.lesson import attend, next_baseline
from open_autoglm.monitoring.watch_store import Memory, Remembered, WatchStore
from open_autoglm.quality.gates import check_window
from open_autoglm.schemas.watch import Judgement, LatencyWindow


class NoWindow(Protocol):
    """Nothing is known of that time, and why."""

    @property
    def reason(self) -> str: ...


Fetch = Callable[[datetime], LatencyWindow | NoWindow]
"""What happened since a moment."""
Anchors = Callable[[LatencyWindow], Anchor | None]
"""What the study measured of the bundle that a window is of, if that says something of its endpoint."""


def _no_anchor(_: LatencyWindow) -> None:
    return None


def look(
    spec: WatchSpec, fetch: Fetch, store: WatchStore, now: datetime, anchor: Anchors = _no_anchor
) -> Judgement:
    """Fetch a window, check it, judge it, learn from it if it was healthy, and write all of that down.

    Less than a window after the last one, only what has happened since is fetched, and a breach begins if it
    is certain already (`judge_early`). ``anchor`` is asked when a baseline was learned, which then says how
    it compares. One look at a time: a second one waits, and then finds the window judged. What cannot be
    written is not acted on either, since the next look would not know of it. What is to be done stays due
    until `WatchStore.answered`, so that the next look takes it up if whoever was to do it has ended.
    """
    with ExitStack() as held:
        try:
            held.enter_context(store.lock())
        except OSError as error:
            return _no_data(spec, f"nothing can be remembered, so nothing is judged: {error}", now=now)
        judgement = _looked(spec, fetch, store, now, anchor)
        return _told_too(judgement, store.append(judgement))


def _looked(spec: WatchSpec, fetch: Fetch, store: WatchStore, now: datetime, anchor: Anchors) -> Judgement:
    found, policy = store.memory(), spec.policy
    since = under_way(found.memory.state, policy, now)
    if since is not None and (reason := hardly_begun(since, policy, now)) is not None:
        return _no_data(spec, reason, now=now)
    window = fetch(since or now - timedelta(seconds=policy.window_s))
    when = () if since is None else (told_of_end(since, policy),)
    if not isinstance(window, LatencyWindow):
        return _no_data(spec, window.reason, *when, now=now)
    if not (gate := check_window(window)).passed:
        return _no_data(spec, *gate.failures, *when, now=now, window=window)
    if since is None:
        return _judged(spec, window, store, now, anchor, found)
    return _judged_early(spec, window, store, now, found)


def _judged(
    spec: WatchSpec,
    window: LatencyWindow,
    store: WatchStore,
    now: datetime,
    anchor: Anchors,
    found: Remembered,
) -> Judgement:
    baseline, day = store.baseline(window), spec.judge.baseline_windows
    judgement, state = judge(window, found.memory.state, baseline, spec.policy, now)
    again = next_look(window, state, spec.policy) if judgement.state == "ok" else None
    judgement = judgement.model_copy(update={"again": again})
    lesson = attend(found.memory.lesson, judgement, baseline, day)
    learned = next_baseline(found.memory.lesson, lesson, window.service, day)
    if learned is not None and baseline is not None and learned.windows < baseline.windows:
        learned = None  # the memory was lost, but what is registered knows more
    if learned is not None and (measured := anchor(window)) is not None:
        learned = beside_trial(learned, measured)
    same = state.bundle_digest == found.memory.state.bundle_digest
    judgement = _taken_up(judgement, found.memory.due if same else None)
    judgement, kept = _kept(store, judgement, Memory(state=state, lesson=lesson, due=judgement.due), learned)
    return _told_too(judgement, found.problem, kept, None if kept else _learned_words(learned))


def _judged_early(
    spec: WatchSpec, window: LatencyWindow, store: WatchStore, now: datetime, found: Remembered
) -> Judgement:
    judgement, state = judge_early(window, found.memory.state, spec.policy, now)
    if judgement.state == "no_data":
        return judgement
    judgement = _taken_up(judgement, found.memory.due)
    memory = found.memory.model_copy(update={"state": state, "due": judgement.due})
    return _told_too(*_kept(store, judgement, memory, None))


def _kept(
    store: WatchStore, judgement: Judgement, memory: Memory, learned: Baseline | None
) -> tuple[Judgement, str | None]:
    """The judgement, which is not to be acted on if this look cannot be remembered, and then why."""
    problem = store.keep(memory, learned)
    if problem is not None:
        judgement = judgement.model_copy(update={"act": False, "due": None})
    return judgement, problem


def _learned_words(learned: Baseline | None) -> str | None:
    if learned is None:
        return None
    told = f"a baseline of {learned.windows} windows was learned"
    ratios = [f"{name} {ratio:.2f} times" for name, ratio in learned.slower_than_trial.items()]
    return f"{told}; when idle, it is {' and '.join(ratios)} what the study measured" if ratios else told


def _taken_up(judgement: Judgement, due: datetime | None) -> Judgement:
    """With what is to be done about it, also if that was found at an earlier look: by ``due``."""
    found = judgement.at if judgement.act else due
    if judgement.state == "ok" or found is None:
        return judgement
    taken = judgement.model_copy(update={"act": judgement.state == "breached", "due": found})
    if not taken.act or judgement.act:
        return taken
    return _told_too(taken, f"what was to be done about it at {found.isoformat()} has not been done")


def _no_data(spec: WatchSpec, *reasons: str, now: datetime, window: LatencyWindow | None = None) -> Judgement:
    return Judgement(service=spec.service, at=now, state="no_data", reasons=reasons, window=window)


def _told_too(judgement: Judgement, *problems: str | None) -> Judgement:
    more = tuple(problem for problem in problems if problem is not None)
    return judgement.model_copy(update={"reasons": (*judgement.reasons, *more)}) if more else judgement
