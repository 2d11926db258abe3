"""The host's pace: the same short work, timed again and again while nobody is answered.

An engine on a host that is slower for everybody is no slower engine; whoever watches the endpoint can tell
them apart by this (:mod:`open_autoglm.monitoring.host_pace`). Clients come first: it begins only after a
moment in which nobody was answered, and does not count if somebody came meanwhile. It takes a millisecond of
one core every five seconds.
"""

from __future__ import annotations

import asyncio
import time

import numpy as np

from open_autoglm.serving.fleet import Fleet

_EVERY_S = 5.0
_SETTLED_S = 0.1
"""Engines' threads spin for a while when they have ended."""

_IN_CACHE, _IN_MEMORY = 1 << 14, 1 << 21
"""Numbers of four bytes: 64 KiB stay in a core's cache, 8 MiB mostly do not."""
_MULTIPLICATIONS, _COPIES = 300, 2


class HostPace:
    """Arithmetic as of prompts, and memory as of the tokens after them: about half a millisecond of each."""

    def __init__(self) -> None:
        self._factors = np.linspace(0.5, 1.5, _IN_CACHE, dtype=np.float32)
        self._products = np.empty_like(self._factors)
        self._source = np.ones(_IN_MEMORY, dtype=np.float32)
        self._copy = np.empty_like(self._source)

    def time_s(self) -> float:
        """Of the work, by the wall: what others take of the core is part of it."""
        begin = time.perf_counter()
        for _ in range(_MULTIPLICATIONS):
            np.multiply(self._factors, self._factors, out=self._products)
        for _ in range(_COPIES):
            np.copyto(self._copy, self._source)
        return time.perf_counter() - begin


async def keep_pace(fleet: Fleet, every_s: float = _EVERY_S) -> None:
    """Until it is cancelled."""
    work = HostPace()
    await asyncio.to_thread(work.time_s)  # the first one fetches its memory from the kernel
    while True:
        await asyncio.sleep(every_s)
        await _time_once(fleet, work)


async def _time_once(fleet: Fleet, work: HostPace) -> None:
    champion, begun = fleet.champion, fleet.begun
    if not fleet.is_quiet():
        return
    await asyncio.sleep(_SETTLED_S)
    if not fleet.is_quiet():
        return
    seconds = await asyncio.to_thread(work.time_s)
    if fleet.is_quiet() and fleet.begun == begun and fleet.champion is champion:
        champion.metrics.host_pace(seconds)
