"""What an endpoint remembers of its own counters, for whoever watches it without Prometheus."""

from __future__ import annotations

import asyncio
import math
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from open_autoglm.schemas import History, HistorySeries
from open_autoglm.serving.metrics import Figure

_EVERY_S = 60.0
_MOST_SNAPSHOTS = 24 * 60
_MOST_VALUES = 2**20
"""Of all snapshots together, 8 MiB: a day of two versions. With more of them it goes back less far."""
_JUST_S = 5.0
"""Whoever asks for what has been until now, asks a little later."""
_ABSENT = math.nan
"""No counter has that value."""

_Name = tuple[str, tuple[tuple[str, str], ...]]


class _Snapshot(NamedTuple):
    time_s: float
    boot_s: float
    values: array[float]
    """In the order in which series were seen first; shorter than today's if some came later."""


class Recording(NamedTuple):
    """A part of what was kept."""

    started_s: float
    now_s: float
    names: Sequence[_Name]
    moments: Sequence[_Snapshot]

    def history(self) -> History:
        """In words that others understand. Of a day it takes a tenth of a second, in any thread."""
        return History(
            now_s=self.now_s,
            started_s=self.started_s,
            times_s=tuple(one.time_s for one in self.moments),
            boot_s=tuple(one.boot_s for one in self.moments),
            series=tuple(
                HistorySeries(
                    name=name,
                    labels=dict(labels),
                    values=tuple(_value(one.values, column) for one in self.moments),
                )
                for column, (name, labels) in enumerate(self.names)
            ),
        )


def _boot_s() -> float:
    """Since the machine was started, its sleep included; nobody sets this clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Recorder:
    """Looks once a minute and keeps a day of it, in a fixed amount of memory."""

    def __init__(
        self,
        look: Callable[[], Iterable[Figure]],
        *,
        clock: Callable[[], float] = time.time,
        boot_clock: Callable[[], float] = _boot_s,
    ) -> None:
        self._look = look
        self._clock = clock
        self._boot_clock = boot_clock
        self._started_s = clock()
        self._columns: dict[_Name, int] = {}
        self._kept: deque[_Snapshot] = deque(maxlen=_MOST_SNAPSHOTS)
        self._values = 0

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            self.keep()
            await asyncio.sleep(_EVERY_S)

    def keep(self) -> None:
        """Remember how things are now."""
        if len(self._kept) == _MOST_SNAPSHOTS:
            self._forget()
        self._kept.append(self._snapshot())
        self._values += len(self._kept[-1].values)
        while self._values > _MOST_VALUES:
            self._forget()

    def between(self, begin_s: float, end_s: float) -> Recording:
        """What was kept from ``begin_s`` to ``end_s``, since the epoch; if ``end_s`` is now, to now."""
        now = self._snapshot()
        moments = [one for one in self._kept if begin_s <= one.time_s <= end_s]
        if begin_s <= now.time_s <= end_s + _JUST_S:
            moments.append(now)
        return Recording(self._started_s, now.time_s, tuple(self._columns), moments)

    def _snapshot(self) -> _Snapshot:
        found = {self._column(figure): figure.value for figure in self._look()}
        values = array("d", (found.get(column, _ABSENT) for column in range(len(self._columns))))
        return _Snapshot(self._clock(), self._boot_clock(), values)

    def _column(self, figure: Figure) -> int:
        name = (figure.name, tuple(sorted(figure.labels.items())))
        return self._columns.setdefault(name, len(self._columns))

    def _forget(self) -> None:
        self._values -= len(self._kept.popleft().values)


def _value(values: array[float], column: int) -> float | None:
    if column >= len(values) or math.isnan(values[column]):
        return None
    return values[column]
