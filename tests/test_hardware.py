"""The hardware room: what is read from the kernel, what is measured, what is kept."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from open_autoglm import hardware
from open_autoglm.errors import AutoGLMError
from open_autoglm.hardware_bench import Peaks
from open_autoglm.schemas import Gpu

GIB = 2**30

EPYC = """\
processor\t: 0
model name\t: AMD EPYC 9454
flags\t\t: fpu sse2 fma avx2 f16c avx512f avx512_vnni avx512_bf16 avx512vl

processor\t: 1
model name\t: another name
flags\t\t: fpu amx_int8
"""
GRAVITON = """\
processor\t: 0
Features\t: fp asimd asimdhp asimddp sve i8mm bf16
CPU implementer\t: 0x41
CPU part\t: 0xd40
"""
MEMINFO = "MemTotal:       16777216 kB\nMemFree:         1048576 kB\nMemAvailable:    8388608 kB\n"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[float]:
    """The bandwidths measured during the test: stand-ins, each higher than the last, that take no time."""
    made: list[float] = []
    monkeypatch.setenv("AUTOGLM_LEASE_DIR", str(tmp_path / "lease"))

    def measure(_cores: int, _buffer_limit: int) -> Peaks:
        made.append((1 + len(made)) * 1e9)
        return peaks(made[-1])

    monkeypatch.setattr(hardware, "measure_peaks", measure)
    return made


def peaks(bandwidth: float, foreign_share: float = 0.0) -> Peaks:
    return Peaks(
        read_bandwidth_bytes_per_s=bandwidth,
        matmul_fp32_flops_per_s=2e11,
        matmul_bf16_flops_per_s=None,
        matmul_int8_ops_per_s=None,
        foreign_share=foreign_share,
    )


@pytest.mark.parametrize(
    ("cpuinfo", "name", "isa"),
    [
        (EPYC, "AMD EPYC 9454", ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16")),
        (GRAVITON, "0x41 0xd40", ("asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve")),
    ],
)
def test_cpu_and_its_matmul_flags(tmp_path: Path, cpuinfo: str, name: str, isa: tuple[str, ...]) -> None:
    """x86 `flags` and Arm `Features` both yield a name that tells CPUs apart and the flags of interest."""
    model, found = hardware.read_cpu(write(tmp_path, {"proc/cpuinfo": cpuinfo}))
    assert model.endswith(name)
    assert found == isa


def test_cores_follow_the_tightest_quota(tmp_path: Path) -> None:
    """A quota on any cgroup above the process lowers its cores, and half a core still counts as one."""
    group = "sys/fs/cgroup/pods"
    root = write(tmp_path, {"proc/self/cgroup": "0::/pods/ours\n", f"{group}/ours/cpu.max": "max 100000\n"})
    affinity = len(os.sched_getaffinity(0))
    assert hardware.usable_cores(root) == affinity
    write(root, {f"{group}/cpu.max": "100000 100000\n"})
    assert hardware.usable_cores(root) == 1
    write(root, {f"{group}/cpu.max": "50000 100000\n"})
    assert hardware.usable_cores(root) == 1
    write(root, {f"{group}/cpu.max": f"{(affinity + 1) * 100000} 100000\n"})
    assert hardware.usable_cores(root) == affinity


def test_memory_of_an_unlimited_host(tmp_path: Path) -> None:
    """Without a cgroup limit, memory is what /proc/meminfo says."""
    root = write(tmp_path, {"proc/meminfo": MEMINFO, "sys/fs/cgroup/memory.max": "max\n"})
    assert hardware.read_memory(root) == (16 * GIB, 8 * GIB)


def test_memory_of_a_container(tmp_path: Path) -> None:
    """In a container the limit is the total, and page cache that can be dropped counts as available."""
    root = write(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": str(4 * GIB),
            "sys/fs/cgroup/memory.current": str(3 * GIB),
            "sys/fs/cgroup/memory.stat": f"anon {GIB}\ninactive_file {2 * GIB}\n",
        },
    )
    assert hardware.read_memory(root) == (4 * GIB, 3 * GIB)


def install_nvidia_smi(directory: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    command = directory / "nvidia-smi"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(directory), prepend=os.pathsep)


def pci_device(vendor: str, kind: str, slot: str = "0000:01:00.0") -> dict[str, str]:
    folder = f"sys/bus/pci/devices/{slot}"
    return {f"{folder}/vendor": f"{vendor}\n", f"{folder}/class": f"{kind}\n"}


@pytest.mark.parametrize(
    ("vendor", "kind", "found"),
    [
        ("0x10de", "0x030200", True),  # a 3D controller: a GPU without a screen
        ("0x10de", "0x030000", True),
        ("0x10de", "0x040300", False),  # a GPU's sound
        ("0x1002", "0x030000", False),  # another vendor's
    ],
)
def test_a_card_is_seen_without_its_driver(tmp_path: Path, vendor: str, kind: str, found: bool) -> None:
    """By the PCI bus, so that a missing driver can be told from a missing GPU."""
    assert not hardware.has_nvidia_card(tmp_path)
    write(tmp_path, pci_device("0x8086", "0x060000", "0000:00:00.0"))
    assert hardware.has_nvidia_card(write(tmp_path, pci_device(vendor, kind))) is found


def test_gpus_are_read_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line of nvidia-smi is a GPU; one without memory of its own has 0, and one may not tell its age."""
    install_nvidia_smi(
        tmp_path,
        monkeypatch,
        "echo 'NVIDIA H100 80GB HBM3, 81559, 580.65.06, 9.0'; echo 'NVIDIA GB10, [N/A], 580.95.05, 12.1'; "
        "echo 'NVIDIA X, 1024, 580.95.05, [N/A]'",
    )
    (h100, gb10, unknown), reason = hardware.find_gpus()
    assert h100 == Gpu(
        name="NVIDIA H100 80GB HBM3",
        memory_bytes=81559 * 2**20,
        driver="580.65.06",
        compute_capability="9.0",
    )
    assert (gb10.memory_bytes, gb10.compute_capability) == (0, "12.1")
    assert unknown.compute_capability is None
    assert reason == ""


def test_a_broken_driver_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If nvidia-smi fails, there is no GPU, and its own words say why."""
    install_nvidia_smi(tmp_path, monkeypatch, "echo 'NVIDIA-SMI has failed: no driver'; exit 9")
    assert hardware.find_gpus() == ((), "nvidia-smi failed: NVIDIA-SMI has failed: no driver")


def test_no_driver_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without nvidia-smi there is no GPU, and the sentence says so; a card without a driver is told apart."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for card, reason in (
        (False, "no NVIDIA driver found (nvidia-smi is not on PATH)"),
        (True, "there is an NVIDIA card but no driver for it (nvidia-smi is not on PATH)"),
    ):
        monkeypatch.setattr(hardware, "has_nvidia_card", lambda card=card: card)
        assert hardware.find_gpus() == ((), reason)


def test_this_host_is_measured_once(tmp_path: Path, measured: list[float]) -> None:
    """The first probe measures and keeps the peaks; later ones reuse them until asked not to."""
    first = hardware.probe_hardware(tmp_path)
    assert first.read_bandwidth_bytes_per_s == 1e9
    assert 1 <= first.cores <= len(os.sched_getaffinity(0))
    assert 0 < first.available_memory_bytes <= first.memory_bytes

    second = hardware.probe_hardware(tmp_path)
    assert second.fingerprint == first.fingerprint
    assert second.read_bandwidth_bytes_per_s == 1e9
    assert measured == [1e9]

    assert hardware.probe_hardware(tmp_path, remeasure=True).read_bandwidth_bytes_per_s == 2e9
    assert hardware.probe_hardware(tmp_path).read_bandwidth_bytes_per_s == 2e9


def test_a_damaged_measurement_is_made_anew(tmp_path: Path, measured: list[float]) -> None:
    """A kept file that cannot be right is measured again, not believed."""
    kept = tmp_path / f"hardware-{hardware.probe_hardware(tmp_path).fingerprint}.json"
    kept.write_text('{"read_bandwidth_bytes_per_s": 0}')
    assert hardware.probe_hardware(tmp_path).read_bandwidth_bytes_per_s == 2e9
    assert Peaks.model_validate_json(kept.read_text()) == peaks(2e9)
    assert len(measured) == 2


@pytest.mark.usefixtures("measured")
def test_a_disturbed_measurement_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks taken while others had the CPU serve once; the next probe measures again."""
    answers = iter([peaks(1e9, foreign_share=0.6), peaks(5e10, foreign_share=0.01)])
    monkeypatch.setattr(hardware, "measure_peaks", lambda *_: next(answers))
    found = [hardware.probe_hardware(tmp_path).read_bandwidth_bytes_per_s for _ in range(3)]
    assert found == [1e9, 5e10, 5e10]


def test_the_measurement_runs_in_a_process_of_its_own() -> None:
    """A reduced measurement of one core finds a rate for memory and for every kind of matmul."""
    rates = hardware.measure_peaks(1, 32 * 2**20, "--scale=8", "--seconds=0.01").model_dump()
    rates.pop("foreign_share")
    assert all(rate is not None and rate > 1e8 for rate in rates.values())


def test_a_failed_measurement_says_why() -> None:
    """If the measuring process fails, its last words are in the error."""
    with pytest.raises(AutoGLMError, match="unrecognized arguments: --nonsense"):
        hardware.measure_peaks(1, 2**20, "--nonsense")
