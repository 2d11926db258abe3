"""What else the host did: arithmetic on written /proc and /sys, and one reading of the real ones."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from types import SimpleNamespace

import pytest

from open_autoglm.measure import interference
from open_autoglm.measure.environment import NOT_TOLD, host_environment
from open_autoglm.measure.interference import ConditionsMeter, CpuMeter

CLOCK = "sys/devices/system/cpu/cpu{}/cpufreq/scaling_cur_freq"


class Host:
    """A /proc and /sys of our own, and the two clocks that go with them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.seconds, self.own_seconds = 100.0, 40.0
        self.stat()
        self.write("proc/vmstat", "nr_free_pages 7\npswpin 10\npswpout 20\n")

    def write(self, name: str, text: str) -> None:
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(text)

    def stat(self, user: int = 0, iowait: int = 0, steal: int = 0) -> None:
        """Ticks of 10 ms since the start; the last two fields are guests, counted in user already."""
        self.write("proc/stat", f"cpu  {1000 + user} 5 300 9000 {iowait} 0 2 {50 + steal} 77 8\ncpu0 1 2\n")

    def clocks(self, *khz: int) -> None:
        for core, value in enumerate(khz):
            self.write(CLOCK.format(core), f"{value}\n")


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """One second of wall time will have passed, unless the test says otherwise."""
    made = Host(tmp_path)
    clocks = SimpleNamespace(perf_counter=lambda: made.seconds, process_time=lambda: made.own_seconds)
    monkeypatch.setattr(interference, "time", clocks)
    monkeypatch.setattr(interference, "_TICK_S", 0.01)
    monkeypatch.setattr(ConditionsMeter, "fastest_khz", 0)
    return made


def test_busy_time_that_is_not_ours_is_foreign(host: Host) -> None:
    """In two seconds 300 ticks were busy, 90 of them ours: 1.05 cores, less one tick for our one core."""
    meter = CpuMeter(host.root)
    host.seconds += 2
    host.own_seconds += 0.9
    host.stat(user=300, iowait=500)
    assert meter.foreign_cores() == pytest.approx(1.05 - 0.005)


def test_ticks_that_cannot_be_told_from_ours_are_not_called_foreign(host: Host) -> None:
    """A 50 ms round on two cores may read two ticks too much; a third was someone else's."""
    meter = ConditionsMeter(host.root)
    host.seconds += 0.05
    host.own_seconds += 0.1
    host.stat(user=12)
    assert not meter.read().disturbances
    host.stat(user=13)
    assert meter.read().foreign_cores == pytest.approx(0.01 / 0.05)


def test_less_busy_time_than_ours_is_no_foreign_time(host: Host) -> None:
    """Ticks can also miss what we did: that is nought, not a negative number."""
    meter = CpuMeter(host.root)
    host.seconds += 1
    host.own_seconds += 0.5
    assert meter.read() == (0, 0)


def test_steal_is_foreign_too_and_named_first(host: Host) -> None:
    """The hypervisor took 21 ticks of a second; one of them may be rounding."""
    meter = ConditionsMeter(host.root)
    host.seconds += 1
    host.own_seconds += 1
    host.stat(user=100, steal=21)
    conditions = meter.read()
    assert conditions.steal_cores == pytest.approx(0.20)
    assert conditions.foreign_cores == pytest.approx(0.20)
    assert conditions.disturbances == ("the hypervisor took 0.20 cores",)


def test_pages_swapped_meanwhile_are_counted(host: Host) -> None:
    """In and out, since the meter was made."""
    meter = ConditionsMeter(host.root)
    host.write("proc/vmstat", "pswpin 13\npswpout 24\n")
    conditions = meter.read()
    assert conditions.swapped_pages == 7
    assert conditions.disturbances == ("7 pages were swapped",)


def test_the_clock_is_held_against_the_fastest_seen(host: Host) -> None:
    """The fastest core counts, since idle ones slow down without harm."""
    host.clocks(800_000, 3_000_000)
    assert ConditionsMeter(host.root).read().clock_share == 1
    host.clocks(3_000_000, 4_000_000)
    assert ConditionsMeter(host.root).read().clock_share == 1
    host.clocks(3_000_000, 1_000_000)
    conditions = ConditionsMeter(host.root).read()
    assert conditions.clock_share == 0.75
    assert conditions.disturbances == ("the clock fell to 75%",)


def test_what_the_kernel_does_not_tell_is_not_made_up(host: Host) -> None:
    """Without a clock or swap counters there is no share and nothing swapped."""
    (host.root / "proc/vmstat").unlink()
    conditions = ConditionsMeter(host.root).read()
    assert conditions.clock_share is None
    assert conditions.swapped_pages == 0


def test_this_host_can_be_read() -> None:
    """The real files have the shape that is expected, and the figures are possible ones."""
    conditions = ConditionsMeter().read()
    assert 0 <= conditions.steal_cores <= conditions.foreign_cores
    assert conditions.swapped_pages >= 0
    assert conditions.clock_share is None or 0 < conditions.clock_share <= 1


# ── the host's settings ──────────────────────────────────────────────────────────────────────────


def test_the_environment_of_this_host() -> None:
    """Every entry has a text; the kernel and the cores are those that Python knows, too."""
    told = host_environment()
    assert all(told.values())
    assert told["kernel"] == platform.release()
    assert told["affinity"].count(",") + 1 == len(os.sched_getaffinity(0))


def test_settings_are_read_where_the_kernel_keeps_them(host: Host) -> None:
    """Governors that differ are all named; of the huge page modes the one in brackets is in force."""
    host.write("proc/cpuinfo", "model name\t: Some CPU\n")
    for core, governor in enumerate(("powersave", "performance", "powersave")):
        host.write(f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_governor", governor + "\n")
    host.write("sys/devices/system/cpu/online", "0-2\n")
    host.write("sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n")
    host.write("proc/meminfo", "MemTotal: 8 kB\nSwapTotal:       2048 kB\n")
    host.write("proc/self/cgroup", "4:memory:/x\n0::/box\n")
    host.write("sys/fs/cgroup/box/cpu.max", "200000 100000\n")
    told = host_environment(host.root)
    assert told["cpu"] == "Some CPU"
    assert told["governor"] == "performance and powersave"
    assert told["cores_online"] == "0-2"
    assert told["transparent_hugepages"] == "madvise"
    assert told["swap_total"] == "2048 kB"
    assert told["cpu_quota"] == "200000 100000"


def test_settings_that_nobody_tells_say_so(tmp_path: Path) -> None:
    """A container that hides /sys leaves gaps, and the gaps are on record."""
    told = host_environment(tmp_path)
    for name in ("governor", "cores_online", "cpu_quota", "transparent_hugepages", "swap_total", "kernel"):
        assert told[name] == NOT_TOLD
