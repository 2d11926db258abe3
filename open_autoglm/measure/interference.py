"""How much CPU others took while we were timing. An engine read 5.3 and 14.0 tokens/s half an hour apart
on the same shared machine; without this number there is no telling such a pair from a regression."""

from __future__ import annotations

import os
import time
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
# Fields of /proc/stat's first line, proc(5): user nice system idle iowait irq softirq steal.
_BUSY_FIELDS = (0, 1, 2, 5, 6, 7)


class CpuMeter:
    """Measures from its creation on. Steal counts as foreign: the hypervisor gave our core away."""

    def __init__(self) -> None:
        self._wall, self._busy, self._own = _read()

    def foreign_cores(self) -> float:
        """Mean number of cores that other processes kept busy, from 0 to the number of cores."""
        wall, busy, own = _read()
        foreign = (busy - self._busy) - (own - self._own)
        return max(0.0, foreign / max(wall - self._wall, 1e-9))


def _read() -> tuple[float, float, float]:
    """Seconds of (wall, all busy CPU of the host, CPU of this process and its children)."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    times = os.times()
    own = times.user + times.system + times.children_user + times.children_system
    return time.perf_counter(), sum(fields[i] for i in _BUSY_FIELDS) / _TICKS_PER_S, own
