"""The host as it is: cores and memory this process may use, instruction sets, GPUs, measured peaks.

Facts are read anew each time; the peaks take seconds to measure, so they are kept per fingerprint.
``root`` arguments exist so that the readers can be pointed at another machine's /proc and /sys.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from open_autoglm.errors import AutoGLMError
from open_autoglm.files import digest_of, write_atomic
from open_autoglm.hardware_bench import BUFFER_LIMIT, Peaks
from open_autoglm.measure.lease import device_lease
from open_autoglm.schemas import Gpu, Hardware

ISA_OF_INTEREST = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_bf16", "amx_int8", "amx_fp16",
    "asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2", "sme",
)  # fmt: skip
"""Flags that decide which matmul kernels exist, as /proc/cpuinfo spells them (x86, then Arm)."""

_DISTURBED = 0.25
"""A measurement made while others had more of the CPUs than this is used once and not kept."""

_BENCH_TIMEOUT_S = 120
_NO_DRIVER = "no NVIDIA driver found (nvidia-smi is not on PATH)"
_NO_DRIVER_FOR_A_CARD = "there is an NVIDIA card but no driver for it (nvidia-smi is not on PATH)"
_NVIDIA, _DISPLAY = "0x10de", "0x03"
"""The vendor's PCI id, and how the class of a display controller begins, that of a 3D controller too."""


def probe_hardware(cache_dir: Path, *, remeasure: bool = False) -> Hardware:
    """Describe this host. The first call on an idle host measures its peaks in 6 to 8 s and keeps them
    in ``cache_dir``; ``remeasure`` measures again.

    Raises AutoGLMError if the measurement fails, which means that torch does not work here.
    """
    model, isa = read_cpu()
    cores = usable_cores()
    total, available = read_memory()
    gpus, gpu_reason = find_gpus()
    fingerprint = digest_of(
        [model, cores, isa, total, [gpu.model_dump() for gpu in gpus], platform.release(), version("torch")]
    )[:16]
    kept = cache_dir / f"hardware-{fingerprint}.json"
    peaks = _peaks(kept, cores, available // 8, remeasure)
    return Hardware(
        cpu_model=model,
        cores=cores,
        isa=isa,
        memory_bytes=total,
        available_memory_bytes=available,
        gpus=gpus,
        gpu_reason=gpu_reason,
        os=platform.platform(),
        python=platform.python_version(),
        fingerprint=fingerprint,
        **peaks.model_dump(exclude={"foreign_share"}),
    )


# ── CPU ──────────────────────────────────────────────────────────────────────────────────────────


def read_cpu(root: Path = Path("/")) -> tuple[str, tuple[str, ...]]:
    """The CPU's name and its flags of interest, from the first processor in /proc/cpuinfo."""
    fields: dict[str, str] = {}
    for line in _read(root / "proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return fields.get("model name") or _arm_name(fields), tuple(f for f in ISA_OF_INTEREST if f in flags)


def _arm_name(fields: dict[str, str]) -> str:
    """Arm kernels give numbers instead of a name; the numbers tell two CPUs apart just as well."""
    numbers = [fields[name] for name in ("CPU implementer", "CPU part") if name in fields]
    return " ".join([platform.machine(), *numbers])


def usable_cores(root: Path = Path("/")) -> int:
    """Cores in this process's affinity mask, lowered to a cgroup's quota; at least one."""
    cores = len(os.sched_getaffinity(0))
    for group in cgroups(root):
        quota, _, period = _read(group / "cpu.max").partition(" ")
        if quota.isdigit():
            cores = min(cores, int(quota) // int(period))
    return max(cores, 1)


# ── memory ───────────────────────────────────────────────────────────────────────────────────────


def read_memory(root: Path = Path("/")) -> tuple[int, int]:
    """Total and available bytes, for the host or the tightest cgroup, whichever is smaller.

    Page cache that the kernel can drop counts as available.
    """
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB$", _read(root / "proc/meminfo"), re.MULTILINE))
    total, available = int(fields["MemTotal"]) * 1024, int(fields["MemAvailable"]) * 1024
    for group in cgroups(root):
        limit = _read(group / "memory.max").strip()
        if limit.isdigit():
            droppable = re.search(r"^inactive_file (\d+)$", _read(group / "memory.stat"), re.MULTILINE)
            used = int(_read(group / "memory.current") or 0) - int(droppable[1] if droppable else 0)
            total = min(total, int(limit))
            available = min(available, max(int(limit) - used, 0))
    return total, available


def cgroups(root: Path) -> Iterator[Path]:
    """This process's cgroup (version 2) and all above it: the limits of every one hold."""
    mount = root / "sys/fs/cgroup"
    match = re.search(r"^0::/(.*)$", _read(root / "proc/self/cgroup"), re.MULTILINE)
    parts = Path(match[1]).parts if match else ()
    for depth in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:depth])


def _read(path: Path) -> str:
    """The text of a kernel file, or nothing if this kernel has no such file."""
    try:
        return path.read_text()
    except OSError:
        return ""


# ── GPU ──────────────────────────────────────────────────────────────────────────────────────────


class Gpus(NamedTuple):
    """What was found, and why nothing was found (empty if something was)."""

    gpus: tuple[Gpu, ...]
    reason: str


def find_gpus() -> Gpus:
    """NVIDIA GPUs as ``nvidia-smi`` lists them; it comes with every driver."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return Gpus((), _NO_DRIVER_FOR_A_CARD if has_nvidia_card() else _NO_DRIVER)
    columns = "--query-gpu=name,memory.total,driver_version,compute_cap"
    try:
        result = _run([command, columns, "--format=csv,noheader,nounits"], timeout_s=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Gpus((), f"nvidia-smi did not answer ({type(error).__name__})")
    if result.returncode != 0:
        said = (result.stdout + result.stderr).strip().splitlines() or [f"exit code {result.returncode}"]
        return Gpus((), f"nvidia-smi failed: {said[0]}")
    gpus = tuple(_parse_gpu(line) for line in result.stdout.splitlines() if line.strip())
    return Gpus(gpus, "" if gpus else "nvidia-smi lists no GPU")


def has_nvidia_card(root: Path = Path("/")) -> bool:
    """Whether an NVIDIA GPU is on the PCI bus, driver or not. A container sees its host's."""
    devices = (root / "sys/bus/pci/devices").glob("*")
    return any(
        _read(device / "vendor").strip() == _NVIDIA and _read(device / "class").startswith(_DISPLAY)
        for device in devices
    )


def _parse_gpu(line: str) -> Gpu:
    """One line of nvidia-smi's CSV: ``NVIDIA H100 80GB HBM3, 81559, 580.65.06, 9.0`` (memory in MiB).

    Memory is 0 for a GPU that shares the host's, whose own is ``[N/A]``, and so may its capability be.
    """
    name, memory, driver, capability = (part.strip() for part in line.rsplit(",", 3))
    mib = int(memory) if memory.isdigit() else 0
    told = capability if re.fullmatch(r"\d+\.\d+", capability) else None
    return Gpu(name=name, memory_bytes=mib * 2**20, driver=driver, compute_capability=told)


# ── measured peaks ───────────────────────────────────────────────────────────────────────────────


def _peaks(kept: Path, cores: int, spare_bytes: int, remeasure: bool) -> Peaks:
    if not remeasure and (peaks := _read_peaks(kept)) is not None:
        return peaks
    with device_lease("cpu", alone=True):  # this is a timed run like any other
        if not remeasure and (peaks := _read_peaks(kept)) is not None:
            return peaks  # measured by someone else while this one waited
        peaks = measure_peaks(cores, min(spare_bytes, BUFFER_LIMIT))
        if peaks.foreign_share <= _DISTURBED:
            write_atomic(kept, peaks.model_dump_json(indent=2) + "\n")
    return peaks


def _read_peaks(kept: Path) -> Peaks | None:
    """None if nothing was measured yet, or by a version that measured otherwise."""
    try:
        return Peaks.model_validate_json(kept.read_bytes())
    except (OSError, ValidationError):
        return None


def measure_peaks(cores: int, buffer_limit: int, *options: str) -> Peaks:
    """Run ``open_autoglm.hardware_bench`` in a fresh process, with buffers of ``buffer_limit`` bytes at
    most and more of its command-line ``options``.

    Raises AutoGLMError with the process's last words if it fails.
    """
    command = [sys.executable, "-m", "open_autoglm.hardware_bench", f"--threads={cores}"]
    command += [f"--buffer-limit={buffer_limit}", *options]
    try:
        result = _run(command, _BENCH_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise AutoGLMError(
            f"the hardware measurement did not end within {_BENCH_TIMEOUT_S} s: try again on an idle machine"
        ) from error
    if result.returncode != 0:
        said = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        raise AutoGLMError(f"the hardware measurement failed ({said[-1]}): check that torch works here")
    return Peaks.model_validate_json(result.stdout.splitlines()[-1])


def _run(command: list[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
