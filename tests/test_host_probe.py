"""What a host did for a while: arithmetic on written /proc and /sys, and a neighbour on the real one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from windows import golden

from open_autoglm.measure.environment import NOT_TOLD
from open_autoglm.measure.gpu_conditions import GpuMeter
from open_autoglm.monitoring.probe import HostMeter, settings_now
from open_autoglm.monitoring.signs import signs_of
from open_autoglm.schemas import EndpointProbe

CPU = "sys/devices/system/cpu/cpu0"


class Host:
    """A /proc and /sys of our own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/stat", "cpu  1000 0 0 9000 0 0 0 0 0 0\n")

    def write(self, name: str, text: str) -> None:
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(text)


@pytest.fixture
def made(tmp_path: Path) -> Host:
    return Host(tmp_path)


@contextmanager
def child(code: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


# ── counters ─────────────────────────────────────────────────────────────────────────────────────


def test_counters_are_read_as_differences(made: Host) -> None:
    """Pressure, heat and quota since the meter was made; the clock is the highest that was seen."""
    made.write("proc/pressure/memory", "some avg10=0.00 total=1000000\nfull avg10=0.00 total=7\n")
    made.write(f"{CPU}/cpufreq/scaling_cur_freq", "2000000\n")
    made.write(f"{CPU}/thermal_throttle/core_throttle_count", "5\n")
    made.write("proc/self/cgroup", "0::/pod/box\n")
    made.write("sys/fs/cgroup/pod/cpu.stat", "usage_usec 9\nnr_periods 100\nnr_throttled 10\n")
    made.write("sys/fs/cgroup/pod/box/cpu.stat", "nr_periods 50\nnr_throttled 0\n")
    meter = HostMeter(root=made.root)
    made.write(f"{CPU}/cpufreq/scaling_cur_freq", "3100000\n")
    meter.look()
    made.write(f"{CPU}/cpufreq/scaling_cur_freq", "1000000\n")
    made.write("proc/pressure/memory", "some avg10=0.00 total=1000500\nfull avg10=0.00 total=8\n")
    made.write(f"{CPU}/thermal_throttle/core_throttle_count", "7\n")
    made.write("sys/fs/cgroup/pod/cpu.stat", "usage_usec 9\nnr_periods 200\nnr_throttled 40\n")
    made.write("sys/fs/cgroup/pod/box/cpu.stat", "nr_periods 60\nnr_throttled 0\n")
    found = meter.read()
    assert found.clock_mhz == 3100
    assert found.thermal_events == 2
    assert found.throttled_share == pytest.approx(0.3), "of the group that was held back most"
    assert found.memory_pressure_share == pytest.approx(0.0005 / found.seconds)


def test_what_the_kernel_does_not_tell_is_none(made: Host) -> None:
    found = HostMeter(root=made.root).read()
    assert found.clock_mhz is None
    assert found.thermal_events is None
    assert found.throttled_share is None
    assert found.cpu_pressure_share is None
    assert found.memory_pressure_share is None


# ── processes ────────────────────────────────────────────────────────────────────────────────────


def test_a_neighbour_is_named() -> None:
    """A process that is always ready to run, seen from one that sleeps: a sign that can slow an engine."""
    with child("import time; time.sleep(60)") as quiet, child("while True: pass") as neighbour:
        meter = HostMeter(quiet.pid)
        before_s = psutil.Process(neighbour.pid).cpu_times().user
        time.sleep(1.5)
        used_s = psutil.Process(neighbour.pid).cpu_times().user - before_s
        found = meter.read()
    assert found.own_cores < 0.1
    assert found.conditions.foreign_cores > 0.3
    busier = found.busiest_cores * found.seconds >= used_s  # whatever else runs here just now
    assert busier or found.busiest.endswith(f"({neighbour.pid})")
    assert found.busiest_cores * found.seconds >= 0.9 * used_s - 0.05
    seen = EndpointProbe(source="probe", bundle_digest="0" * 12, golden=golden(), host=found, settings={})
    told = [sign.told for sign in signs_of(seen, None)]
    assert any(f"most of it {found.busiest}" in one for one in told)


def test_the_endpoints_own_tree_is_not_foreign() -> None:
    """Neither this process nor what it started, even if that ended meanwhile."""
    meter = HostMeter()
    with child("while True: pass") as engine:
        time.sleep(0.4)
        worked_s = psutil.Process(engine.pid).cpu_times().user
    found = meter.read()
    assert found.own_cores * found.seconds >= worked_s
    assert found.busiest != f"python ({engine.pid})"


def test_settings_are_of_the_host_and_what_is_loaded() -> None:
    """What the engine has loaded may be older than what is installed; what is not installed is a fact."""
    found = settings_now(["numpy", "onnxruntime", "no-such-package"], {"onnxruntime": "0.1"})
    assert found["onnxruntime"] == "0.1"
    assert found["no-such-package"] == "absent"
    assert found["numpy"][0].isdigit()
    assert found["kernel"] != NOT_TOLD


# ── GPUs ─────────────────────────────────────────────────────────────────────────────────────────


class NvmlError(Exception):
    pass


class Nvml:
    """A driver with one GPU that warms up."""

    NVMLError = NvmlError
    NVML_CLOCK_SM = 1
    nvmlClocksThrottleReasonSwPowerCap = 4  # noqa: N815
    nvmlClocksThrottleReasonHwSlowdown = 8  # noqa: N815
    nvmlClocksThrottleReasonSwThermalSlowdown = 32  # noqa: N815
    nvmlClocksThrottleReasonHwThermalSlowdown = 64  # noqa: N815
    nvmlClocksThrottleReasonHwPowerBrakeSlowdown = 128  # noqa: N815

    def __init__(self, pids: list[int]) -> None:
        self.pids = pids
        self.readings = [(1200, 1), (1980, 4), (1500, 32)]  # idle, at the power limit, too hot

    def nvmlDeviceGetClockInfo(self, _handle: Any, _kind: int) -> int:  # noqa: N802
        return self.readings[0][0]

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, _handle: Any) -> int:  # noqa: N802
        return self.readings.pop(0)[1]

    def nvmlDeviceGetComputeRunningProcesses(self, _handle: Any) -> list[Any]:  # noqa: N802
        return [SimpleNamespace(pid=pid) for pid in self.pids]

    def nvmlDeviceGetName(self, _handle: Any) -> bytes:  # noqa: N802
        return b"H100"

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "580.65.06"


@pytest.mark.parametrize(("ours", "foreign"), [(True, ("process 7",)), (False, ())])
def test_a_gpu_tells_clock_reasons_and_strangers(ours: bool, foreign: tuple[str, ...]) -> None:
    """Strangers are told only where the driver counts processes as we do."""
    meter = GpuMeter(Nvml([os.getpid(), 7] if ours else [7]), ["handle"])
    for _ in range(3):
        meter.look()
    (found,) = meter.read({os.getpid()})
    assert (found.name, found.clock_mhz) == ("H100", 1980)
    assert found.slowed_by == ("heat", "power limit")
    assert found.foreign_processes == foreign
    assert meter.driver() == "580.65.06"


def test_without_a_gpu_there_is_nothing_to_tell() -> None:
    meter = GpuMeter(None, ())
    meter.look()
    assert meter.read(set()) == ()
    assert meter.driver() is None
