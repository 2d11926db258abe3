"""What NVML tells of a GPU's memory, and what is told where it cannot."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from open_autoglm.measure.device_memory import DeviceMemory, _first_visible
from open_autoglm.measure.memory import FootprintWatch


class NvmlError(Exception):
    pass


class Nvml:
    """A driver with one process of ours, or none that it knows by its number here."""

    NVMLError = NvmlError

    def __init__(self, own: int | None, used: list[int] | None) -> None:
        self.own, self.used = own, used

    def nvmlDeviceGetComputeRunningProcesses(self, _: Any) -> list[Any]:  # noqa: N802
        others = [SimpleNamespace(pid=1, usedGpuMemory=999)]
        return (
            others
            if self.own is None
            else [*others, SimpleNamespace(pid=os.getpid(), usedGpuMemory=self.own)]
        )

    def nvmlDeviceGetMemoryInfo(self, _: Any) -> Any:  # noqa: N802
        if self.used is None:
            raise NvmlError("not supported")
        return SimpleNamespace(used=self.used.pop(0))

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        return f"index {index}"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        return f"uuid {uuid}"


def test_the_process_is_told_by_its_number() -> None:
    """Whatever else the device holds."""
    assert DeviceMemory(Nvml(own=4096, used=[10_000]), "handle").used_bytes() == 4096


def test_in_a_container_it_is_what_was_taken_since() -> None:
    """NVML knows the host's process numbers, not the container's. Memory given back is no debt."""
    memory = DeviceMemory(Nvml(own=None, used=[1000, 5000, 400]), "handle")
    assert [memory.used_bytes(), memory.used_bytes()] == [4000, 0]


def test_a_gpu_that_shares_the_hosts_memory_tells_nothing() -> None:
    """None, not a number that means something else."""
    assert DeviceMemory(Nvml(own=None, used=None), "handle").used_bytes() is None


@pytest.mark.parametrize(
    ("visible", "chosen"),
    [(None, "index 0"), ("", "index 0"), ("3,1", "index 3"), ("GPU-8a1f,GPU-2", "uuid GPU-8a1f")],
)
def test_the_device_is_the_one_that_cuda_would_take(
    visible: str | None, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of CUDA_VISIBLE_DEVICES."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert _first_visible(Nvml(None, None)) == chosen


def test_the_real_library_without_a_driver_is_no_error() -> None:
    """nvidia-ml-py can be installed anywhere."""
    pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        assert DeviceMemory.open() is None
    else:
        pytest.skip("there is a driver here")


def test_the_drivers_peak_counts_before_the_engines_word() -> None:
    """The highest sample; the engine's own figure only where there is none."""
    nvml = Nvml(own=None, used=[1000, 1500, 9000, *[3000] * 100])
    watch = FootprintWatch(interval_s=0.001, gpu=DeviceMemory(nvml, "handle"))
    with watch.sampling():
        while len(nvml.used or []) > 90:
            pass
    assert watch.footprint(device_bytes=12).device_bytes == 8000
    silent = FootprintWatch(gpu=DeviceMemory(Nvml(own=None, used=None), "handle"))
    with silent.sampling():
        pass
    assert silent.footprint(device_bytes=12).device_bytes == 12
    assert FootprintWatch().footprint().device_bytes is None
