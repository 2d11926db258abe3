"""A progress bar in the Prefect UI: one artifact per study, advanced by each finished unit of work."""

from __future__ import annotations

import threading
from typing import cast
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact

from open_autoglm.study import StudyRef


class _Bar:
    """Units done of units in all, shown as a per cent."""

    def __init__(self, study: StudyRef, units: int) -> None:
        self._lock = threading.Lock()
        self._units = units
        self._done = 0
        described = f"Study {study.id}: exports, benchmarks and evaluations finished"
        created = create_progress_artifact(progress=0.0, key="study-progress", description=described)
        self._id = cast(UUID, created)

    def advance(self) -> None:
        with self._lock:
            self._done += 1
            update_progress_artifact(self._id, progress=min(100.0, 100.0 * self._done / self._units))


_bars: dict[str, _Bar] = {}


def start_progress(study: StudyRef, candidates: int) -> None:
    """Begin the bar: three units per candidate, the reference, race, final and conclusion.

    What the search adds, and who is called up later, is not known yet: the bar then waits at its end. Call
    inside a flow run.
    """
    _bars[study.id] = _Bar(study, units=3 * candidates + 4)


def unit_done(study: StudyRef) -> None:
    """Advance the study's bar, if it has one (a task may be called on its own)."""
    if study.id in _bars:
        _bars[study.id].advance()
