"""What the host did besides our work while we were timing. An engine read 5.3 and 14.0 tokens/s half an
hour apart on the same shared machine; without these numbers there is no telling such a pair from a
regression. ``root`` arguments exist so that the meters can be pointed at another machine's /proc and /sys."""

from __future__ import annotations

import os
import re
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, NamedTuple

from open_autoglm.schemas import Conditions

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
# Fields of /proc/stat's first line, proc(5): user nice system idle iowait irq softirq steal.
_BUSY_FIELDS = (0, 1, 2, 5, 6, 7)
_STEAL_FIELD = 7


class _Clocks(NamedTuple):
    """Seconds since some past moment."""

    wall: float
    busy: float
    steal: float
    own: float


def own_cpu_s() -> float:
    """CPU time of this process and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


class CpuMeter:
    """Measures from its creation on. Steal counts as foreign: the hypervisor gave our core away.

    The kernel counts busy time by looking which process runs at each tick (10 ms), but our own to the
    nanosecond. So each core we use may read up to one tick too much, and that much is never called
    foreign: what is reported was certainly there. The price is that short readings are blind: in 50 ms on
    two cores up to 0.4 foreign cores go unseen, in one second 0.02.
    """

    def __init__(self, root: Path = Path("/"), own_s: Callable[[], float] = own_cpu_s) -> None:
        """``own_s`` gives the seconds of CPU time that are not foreign."""
        self._root = root
        self._own_s = own_s
        self._start = _read_clocks(root, own_s)

    def foreign_cores(self) -> float:
        """Mean number of cores that other processes kept busy, from 0 to the number of cores."""
        return self.read()[0]

    def read(self) -> tuple[float, float]:
        """Mean number of cores (taken by others, steal included; given away by the hypervisor)."""
        wall, busy, steal, own = (now - then for now, then in zip(self._now(), self._start, strict=True))
        wall = max(wall, 1e-9)
        used_cores = max(1, round(own / wall))
        stolen = max(0.0, steal - _TICK_S)  # exact, but printed in whole ticks
        foreign = max(stolen, busy - own - used_cores * _TICK_S)
        return foreign / wall, stolen / wall

    def _now(self) -> _Clocks:
        return _read_clocks(self._root, self._own_s)


def _read_clocks(root: Path, own_s: Callable[[], float]) -> _Clocks:
    fields = (root / "proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    ticks = [int(field) for field in fields]
    return _Clocks(
        wall=time.perf_counter(),
        busy=sum(ticks[i] for i in _BUSY_FIELDS) * _TICK_S,
        steal=ticks[_STEAL_FIELD] * _TICK_S,
        own=own_s(),
    )


class ConditionsMeter:
    """Measures from its creation on what can spoil a timing: other processes, steal, swap, a slow clock."""

    fastest_khz: ClassVar[int] = 0
    """The highest core clock any meter of this process has read."""

    def __init__(self, root: Path = Path("/"), own_s: Callable[[], float] = own_cpu_s) -> None:
        """``own_s`` as for `CpuMeter`."""
        self._root = root
        self._swapped = _swapped_pages(root)
        self._cpu = CpuMeter(root, own_s)

    def read(self) -> Conditions:
        """What happened since the creation; the clock is that of this moment, when our cores still run.

        The fastest core stands for all, because idle ones slow down without harm.
        """
        foreign, steal = self._cpu.read()
        return Conditions(
            foreign_cores=foreign,
            steal_cores=steal,
            swapped_pages=_swapped_pages(self._root) - self._swapped,
            clock_share=self._clock_share(),
        )

    def _clock_share(self) -> float | None:
        khz = fastest_core_khz(self._root)
        if khz is None:
            return None
        ConditionsMeter.fastest_khz = max(ConditionsMeter.fastest_khz, khz)
        return khz / ConditionsMeter.fastest_khz


def fastest_core_khz(root: Path) -> int | None:
    """The highest clock of any core at this moment; None where the kernel does not tell."""
    paths = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq")
    found = [int(text) for text in map(kernel_text, paths) if text.strip().isdigit()]
    return max(found, default=0) or None


def _swapped_pages(root: Path) -> int:
    counts = re.findall(r"^pswp(?:in|out) (\d+)$", kernel_text(root / "proc/vmstat"), re.MULTILINE)
    return sum(map(int, counts))


def kernel_text(path: Path) -> str:
    """The text of a kernel file, or nothing if this kernel has no such file."""
    try:
        return path.read_text()
    except OSError:
        return ""
