"""One look at a served model, from its window to what is remembered of it.

The command line and the flow both call `look`; where windows come from is theirs to say.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime
from typing import Protocol

from open_autoglm.monitoring.baseline import Anchor
from open_autoglm.monitoring.config import WatchSpec
from open_autoglm.monitoring.judge import judge
from open_autoglm.monitoring.lesson import attend, next_baseline
from open_autoglm.monitoring.watch_store import Memory, WatchStore
from open_autoglm.quality.gates import check_window
from open_autoglm.schemas.watch import Judgement, LatencyWindow


class NoWindow(Protocol):
    """Nothing is known of that time, and why."""

    @property
    def reason(self) -> str: ...


Fetch = Callable[[], LatencyWindow | NoWindow]


def look(
    spec: WatchSpec, fetch: Fetch, store: WatchStore, now: datetime, anchor: Anchor | None = None
) -> Judgement:
    """Fetch a window, check it, judge it, learn from it if it was healthy, and write all of that down.

    ``anchor`` is what the study measured of the champion; a new baseline says how it compares. One look at a
    time: a second one waits, and then finds the window judged. What cannot be written is not acted on either,
    since the next look would not know of it. What is to be done stays due until `WatchStore.answered`, so
    that the next look takes it up if whoever was to do it has ended.
    """
    with ExitStack() as held:
        try:
            held.enter_context(store.lock())
        except OSError as error:
            return _no_data(spec, f"nothing can be remembered, so nothing is judged: {error}", now=now)
        window = fetch()
        if not isinstance(window, LatencyWindow):
            judgement = _no_data(spec, window.reason, now=now)
        elif not (gate := check_window(window)).passed:
            judgement = _no_data(spec, *gate.failures, now=now, window=window)
        else:
            judgement = _judged(spec, window, store, now, anchor)
        return _told_too(judgement, store.append(judgement))


def _judged(
    spec: WatchSpec, window: LatencyWindow, store: WatchStore, now: datetime, anchor: Anchor | None
) -> Judgement:
    found = store.memory()
    baseline, day = store.baseline(window), spec.judge.baseline_windows
    judgement, state = judge(window, found.memory.state, baseline, spec.policy, now)
    lesson = attend(found.memory.lesson, judgement, baseline, day)
    learned = next_baseline(found.memory.lesson, lesson, window.service, day, anchor)
    same = state.bundle_digest == found.memory.state.bundle_digest
    judgement = _taken_up(judgement, found.memory.due if same else None)
    kept = store.keep(Memory(state=state, lesson=lesson, due=judgement.due), learned)
    if kept is not None:
        judgement = judgement.model_copy(update={"act": False, "due": None})
    return _told_too(judgement, found.problem, kept)


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
