"""What the serving host did for half a minute, and what it and its libraries are now.

It runs in the endpoint's own process: there the cgroup, the affinity and the libraries are the endpoint's,
and its own process tree is known. ``root`` points at another machine's /proc and /sys.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, TypeVar

from open_autoglm.hardware import cgroups, usable_cores
from open_autoglm.measure.environment import host_environment
from open_autoglm.measure.gpu_conditions import GpuMeter
from open_autoglm.measure.interference import ConditionsMeter, fastest_core_khz, kernel_text
from open_autoglm.packages import version_of
from open_autoglm.schemas import HostProbe

LOOK_S = 1.0
"""How often to look at what has no counter: clocks, and why they are slow."""


class _Used(NamedTuple):
    name: str
    cpu_s: float


class HostMeter:
    """Measures from its creation on, with every process foreign but ``pid``'s tree: this one's by default.

    Reading goes through all processes and takes tens of milliseconds: in a server, call it in a thread.
    """

    def __init__(self, pid: int | None = None, root: Path = Path("/")) -> None:
        self._pid = os.getpid() if pid is None else pid
        self._root = root
        self._gpus = GpuMeter.open()
        self._clock_khz = 0
        self._begin = datetime.now(UTC)
        self._processes = _cpu_of_processes()
        self._thermal = _thermal_events(root)
        self._periods = _periods(root)
        self._stalled = {name: _stalled_s(root, name) for name in ("cpu", "memory")}
        self._own_s = self._tree_cpu_s()
        self._conditions = ConditionsMeter(root, self._tree_cpu_s)
        self._start_s = time.perf_counter()
        self.look()

    def look(self) -> None:
        """At the clocks as they are now."""
        self._clock_khz = max(self._clock_khz, fastest_core_khz(self._root) or 0)
        self._gpus.look()

    def read(self) -> HostProbe:
        """All since the creation."""
        self.look()
        conditions = self._conditions.read()
        seconds = time.perf_counter() - self._start_s
        own = self._tree()
        busiest = self._busiest(own)
        return HostProbe(
            begin=self._begin,
            seconds=seconds,
            cores=usable_cores(self._root),
            own_cores=max(self._tree_cpu_s() - self._own_s, 0.0) / seconds,
            conditions=conditions,
            busiest=busiest.name,
            busiest_cores=busiest.cpu_s / seconds,
            clock_mhz=self._clock_khz / 1000 or None,
            thermal_events=_more(_thermal_events(self._root), self._thermal),
            throttled_share=_throttled_share(_periods(self._root), self._periods),
            cpu_pressure_share=self._pressure("cpu", seconds),
            memory_pressure_share=self._pressure("memory", seconds),
            gpus=self._gpus.read(own),
        )

    # ── processes ────────────────────────────────────────────────────────────────────────────────

    def _tree(self) -> set[int]:
        import psutil

        try:
            return {self._pid, *(child.pid for child in psutil.Process(self._pid).children(recursive=True))}
        except psutil.NoSuchProcess:
            return {self._pid}

    def _tree_cpu_s(self) -> float:
        """CPU time of the tree, of those in it that have ended too."""
        import psutil

        found = 0.0
        for pid in self._tree():
            try:
                times = psutil.Process(pid).cpu_times()
            except psutil.NoSuchProcess:
                continue  # by now its parent's
            found += times.user + times.system + times.children_user + times.children_system
        return found

    def _busiest(self, own: set[int]) -> _Used:
        """Of the others that run now, the one that used most. A container shows its own processes only."""
        nobody = _Used("", 0.0)
        used = [
            _Used(f"{now.name} ({pid})", now.cpu_s - self._processes.get((pid, born), nobody).cpu_s)
            for (pid, born), now in _cpu_of_processes().items()
            if pid not in own
        ]
        busiest = max(used, key=lambda one: one.cpu_s, default=nobody)
        return busiest if busiest.cpu_s > 0 else nobody

    def _pressure(self, name: str, seconds: float) -> float | None:
        stalled_s = _more(_stalled_s(self._root, name), self._stalled[name])
        return None if stalled_s is None else stalled_s / seconds


def _cpu_of_processes() -> dict[tuple[int, float], _Used]:
    """By number and birth, since numbers are used again."""
    import psutil

    fields = ("pid", "name", "create_time", "cpu_times")
    return {
        (info["pid"], info["create_time"]): _Used(info["name"] or "?", times.user + times.system)
        for info in (process.info for process in psutil.process_iter(fields))
        if (times := info["cpu_times"]) is not None
    }


# ── counters of the kernel ───────────────────────────────────────────────────────────────────────


def _stalled_s(root: Path, name: str) -> float | None:
    """Pressure stall information: seconds in which some task waited (kernel.org, accounting/psi)."""
    match = re.search(r"^some .*total=(\d+)$", kernel_text(root / "proc/pressure" / name), re.MULTILINE)
    return int(match[1]) / 1e6 if match else None


def _thermal_events(root: Path) -> int | None:
    """Of all cores and packages together, on the CPUs whose drivers count them: Intel's."""
    paths = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/*_throttle_count")
    counts = [int(text) for text in map(kernel_text, paths) if text.strip().isdigit()]
    return sum(counts) if counts else None


def _periods(root: Path) -> dict[Path, tuple[int, int]]:
    """Of each cgroup with a quota: scheduling periods, and those in which it was used up."""
    found = {}
    for group in cgroups(root):
        counts = dict(re.findall(r"^(\w+) (\d+)$", kernel_text(group / "cpu.stat"), re.MULTILINE))
        if "nr_periods" in counts:
            found[group] = int(counts["nr_periods"]), int(counts["nr_throttled"])
    return found


def _throttled_share(
    now: Mapping[Path, tuple[int, int]], then: Mapping[Path, tuple[int, int]]
) -> float | None:
    """Of the group that was held back most: the limits of all of them hold."""
    shares = []
    for group in now.keys() & then.keys():
        periods, throttled = (late - early for late, early in zip(now[group], then[group], strict=True))
        shares.append(throttled / periods if periods > 0 else 0.0)
    return max(shares, default=None)


_Number = TypeVar("_Number", int, float)


def _more(now: _Number | None, then: _Number | None) -> _Number | None:
    return None if now is None or then is None else now - then


# ── what it is made of ───────────────────────────────────────────────────────────────────────────


def settings_now(packages: Iterable[str], loaded: Mapping[str, str]) -> dict[str, str]:
    """Of the host, and the versions of ``packages``: as ``loaded`` by the engine, else as installed."""
    driver = GpuMeter.open().driver()
    versions = {name: loaded.get(name) or version_of(name) or "absent" for name in packages}
    return versions | host_environment() | ({"gpu_driver": driver} if driver else {})
