"""What the NVIDIA GPUs of this host do besides our work, by NVML (nvidia-ml-py)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from open_autoglm.schemas import GpuConditions

_SLOWED_BY = {
    "SwPowerCap": "power limit",
    "HwSlowdown": "hardware slowdown",
    "SwThermalSlowdown": "heat",
    "HwThermalSlowdown": "heat, in hardware",
    "HwPowerBrakeSlowdown": "power brake",
}
"""NVML's ``nvmlClocksThrottleReason…``: those that hold a working GPU's clock down."""


class GpuMeter:
    """Measures from its creation on; `look` now and then."""

    def __init__(self, library: Any, handles: Collection[Any]) -> None:
        self._library, self._handles = library, tuple(handles)
        self._clocks_mhz = [0] * len(self._handles)
        self._slowed_by: list[set[str]] = [set() for _ in self._handles]
        self._pids: list[set[int]] = [set() for _ in self._handles]

    @classmethod
    def open(cls) -> GpuMeter:
        """Of no GPUs without nvidia-ml-py or a driver."""
        try:
            import pynvml
        except ImportError:
            return cls(None, ())
        try:
            pynvml.nvmlInit()
            count = pynvml.nvmlDeviceGetCount()
            return cls(pynvml, [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(count)])
        except pynvml.NVMLError:
            return cls(None, ())

    def driver(self) -> str | None:
        """Its version; None without a GPU."""
        return _text(self._library.nvmlSystemGetDriverVersion()) if self._handles else None

    def look(self) -> None:
        """Once more. What the driver does not tell of a GPU is left out."""
        for number, handle in enumerate(self._handles):
            try:
                self._look_at(number, handle)
            except self._library.NVMLError:
                continue

    def _look_at(self, number: int, handle: Any) -> None:
        nvml = self._library
        clock_mhz = int(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM))
        self._clocks_mhz[number] = max(self._clocks_mhz[number], clock_mhz)
        reasons = int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
        for name, words in _SLOWED_BY.items():
            if reasons & int(getattr(nvml, f"nvmlClocksThrottleReason{name}")):
                self._slowed_by[number].add(words)
        self._pids[number] |= {process.pid for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle)}

    def read(self, own: Collection[int]) -> tuple[GpuConditions, ...]:
        """All that was seen; ``own`` are the processes that are not foreign.

        In a container NVML tells the host's process numbers. Then none of ours is among them, and who is
        foreign cannot be told.
        """
        return tuple(
            GpuConditions(
                name=_text(self._library.nvmlDeviceGetName(handle)),
                clock_mhz=clock_mhz,
                slowed_by=tuple(sorted(slowed_by)),
                foreign_processes=tuple(f"process {pid}" for pid in sorted(pids - set(own)))
                if pids & set(own)
                else (),
            )
            for handle, clock_mhz, slowed_by, pids in zip(
                self._handles, self._clocks_mhz, self._slowed_by, self._pids, strict=True
            )
        )


def _text(told: str | bytes) -> str:
    """Older versions of the binding return bytes."""
    return told.decode() if isinstance(told, bytes) else told
