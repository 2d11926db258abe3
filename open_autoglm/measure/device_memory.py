"""How much of a GPU's memory is taken, read from the driver: the same for every runtime.

Memory that a runtime's allocator keeps counts, since nobody else can have it, and so do the CUDA context and
the code of its kernels.
"""

from __future__ import annotations

import os
from typing import Any, Self


class DeviceMemory:
    """The first GPU that this process may use, by NVML (nvidia-ml-py)."""

    def __init__(self, library: Any, handle: Any) -> None:
        self._library, self._handle = library, handle
        self._before = self._all_bytes()

    @classmethod
    def open(cls) -> Self | None:
        """None without nvidia-ml-py, a driver or a GPU."""
        try:
            import pynvml
        except ImportError:
            return None
        try:
            pynvml.nvmlInit()
            return cls(pynvml, _first_visible(pynvml))
        except pynvml.NVMLError:
            return None

    def used_bytes(self) -> int | None:
        """Of this process. Where NVML does not know it, as in a container, what all processes together took
        since this object was made: right where the device is not shared. None if it tells neither."""
        try:
            processes = self._library.nvmlDeviceGetComputeRunningProcesses(self._handle)
        except self._library.NVMLError:
            processes = []
        own = next((p.usedGpuMemory for p in processes if p.pid == os.getpid()), None)
        if own is not None:
            return int(own)
        now = self._all_bytes()
        return None if now is None or self._before is None else max(now - self._before, 0)

    def _all_bytes(self) -> int | None:
        try:
            return int(self._library.nvmlDeviceGetMemoryInfo(self._handle).used)
        except self._library.NVMLError:  # a GPU that shares the host's memory has none of its own
            return None


def _first_visible(library: Any) -> Any:
    """NVML counts all GPUs in the bus's order, CUDA those of CUDA_VISIBLE_DEVICES: indices or UUIDs."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0].strip()
    if first.startswith(("GPU-", "MIG-")):
        return library.nvmlDeviceGetHandleByUUID(first)
    return library.nvmlDeviceGetHandleByIndex(int(first) if first.isdecimal() else 0)
