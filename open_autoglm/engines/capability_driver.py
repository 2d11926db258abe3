"""The CUDA driver, asked through its own C interface, so that it needs no CUDA package. In a child only:
a driver in disorder can hang or end the process that starts it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

from open_autoglm.engines.capability import Matrix, Reached
from open_autoglm.hardware import find_gpus, has_nvidia_card

LIBRARY = "libcuda.so.1"

_BRANCHES = {11: 450, 12: 525, 13: 580}
"""The first driver branch that runs programs of a CUDA major version (CUDA Toolkit Release Notes, "CUDA
Toolkit and Minimum Required Driver Version for CUDA Minor Version Compatibility")."""


def missing_driver() -> str | None:
    """None if the CUDA driver library can be loaded, else a clause that says so."""
    try:
        ctypes.CDLL(LIBRARY)
    except OSError:
        card = "this machine has an NVIDIA card but " if has_nvidia_card() else ""
        return f"{card}there is no NVIDIA driver here ({LIBRARY} cannot be loaded)"
    return None


def find_device(who: str, cuda_major: int | None) -> Reached:
    """Whether ``who``, built for a CUDA major version, has a driver that is new enough, and a GPU."""
    install = _driver_command(cuda_major)
    if (missing := missing_driver()) is not None:
        # Without a card, no command would help.
        return Reached(obstacle=missing, install=install if has_nvidia_card() else None)
    driver = ctypes.CDLL(LIBRARY)
    supported = ctypes.c_int()
    if code := driver.cuDriverGetVersion(ctypes.byref(supported)):  # as of the toolkit's stub
        return Reached(obstacle=f"the NVIDIA driver does not answer ({_name(driver, code)})")
    major, minor = supported.value // 1000, supported.value % 1000 // 10
    if cuda_major is not None and major < cuda_major:
        gpus = find_gpus().gpus
        version = f" {gpus[0].driver}" if gpus else ""
        obstacle = (
            f"the NVIDIA driver{version} is too old: it supports CUDA {major}.{minor}, and {who} needs "
            f"CUDA {cuda_major}"
        )
        return Reached(obstacle=obstacle, install=install)
    if code := driver.cuInit(0):
        return Reached(obstacle=f"the NVIDIA driver does not start ({_name(driver, code)})")
    count = ctypes.c_int()
    if (code := driver.cuDeviceGetCount(ctypes.byref(count))) or count.value == 0:
        return Reached(obstacle=f"the NVIDIA driver shows no GPU ({_name(driver, code or 100)})")
    return Reached(found=f"CUDA {major}.{minor} driver, {_device_name(driver)}")


def _driver_command(cuda_major: int | None) -> str:
    branch = _BRANCHES.get(cuda_major or max(_BRANCHES), max(_BRANCHES.values()))
    return f"apt-get install nvidia-driver-{branch}  # or newer, on the host; then docker run --gpus all"


def _name(driver: ctypes.CDLL, code: int) -> str:
    """``CUDA_ERROR_NO_DEVICE`` for 100."""
    name = ctypes.c_char_p()
    driver.cuGetErrorName(code, ctypes.byref(name))
    return name.value.decode() if name.value else f"error {code}"


def _device_name(driver: ctypes.CDLL) -> str:
    name, device = ctypes.create_string_buffer(256), ctypes.c_int()
    _check(driver, driver.cuDeviceGet(ctypes.byref(device), 0))
    _check(driver, driver.cuDeviceGetName(name, len(name), device))
    return name.value.decode()


# ── memory ───────────────────────────────────────────────────────────────────────────────────────


class DeviceMemory:
    """Buffers on the first GPU, in the context that CUDA's runtime uses as well. Raises RuntimeError with
    the driver's own name of an error."""

    def __init__(self) -> None:
        self._driver = ctypes.CDLL(LIBRARY)
        device, self._context = ctypes.c_int(), ctypes.c_void_p()
        _check(self._driver, self._driver.cuInit(0))
        _check(self._driver, self._driver.cuDeviceGet(ctypes.byref(device), 0))
        retained = self._driver.cuDevicePrimaryCtxRetain(ctypes.byref(self._context), device)
        _check(self._driver, retained)
        _check(self._driver, self._driver.cuCtxSetCurrent(self._context))

    @contextmanager
    def holding(self, matrix: Matrix) -> Iterator[int]:
        """The address of a copy of ``matrix`` on the GPU."""
        address, size = ctypes.c_uint64(), ctypes.c_size_t(matrix.nbytes)
        source = matrix.ctypes.data_as(ctypes.c_void_p)
        _check(self._driver, self._driver.cuMemAlloc_v2(ctypes.byref(address), size))
        try:
            _check(self._driver, self._driver.cuMemcpyHtoD_v2(address, source, size))
            yield address.value
        finally:
            self._driver.cuMemFree_v2(address)

    def read(self, address: int, into: Matrix) -> None:
        """Wait for all work of the GPU, then copy what is at ``address`` over ``into``."""
        target, size = into.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(into.nbytes)
        _check(self._driver, self._driver.cuCtxSynchronize())
        _check(self._driver, self._driver.cuMemcpyDtoH_v2(target, ctypes.c_uint64(address), size))


def _check(driver: ctypes.CDLL, code: int) -> None:
    if code:
        raise RuntimeError(_name(driver, code))
