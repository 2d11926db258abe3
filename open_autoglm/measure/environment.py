"""What timing depends on besides the candidate: kept with each trial, so that a later run that differs
can say what else differs. Where the kernel does not say, ``not told`` stands: that is a fact too."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

from open_autoglm.hardware import read_cpu, usable_cores
from open_autoglm.measure.interference import kernel_text

NOT_TOLD = "not told"


def host_environment(root: Path = Path("/")) -> dict[str, str]:
    """Settings of the host and the process, by name. ``root`` points at another machine's /proc and /sys."""
    cpu = root / "sys/devices/system/cpu"
    return {
        "cpu": read_cpu(root)[0],
        "governor": _governor(cpu),
        "cores_online": _first_line(cpu / "online"),
        "cores_usable": str(usable_cores(root)),
        "affinity": ",".join(str(core) for core in sorted(os.sched_getaffinity(0))),
        "cpu_quota": _cpu_quota(root),
        "transparent_hugepages": _chosen(root / "sys/kernel/mm/transparent_hugepage/enabled"),
        "swap_total": _field(root / "proc/meminfo", "SwapTotal"),
        "kernel": _first_line(root / "proc/sys/kernel/osrelease"),
        "python": platform.python_version(),
    }


def _governor(cpu: Path) -> str:
    """The frequency governor, or all of them if the cores differ."""
    found = {_first_line(path) for path in cpu.glob("cpu[0-9]*/cpufreq/scaling_governor")}
    return " and ".join(sorted(found)) or NOT_TOLD


def _cpu_quota(root: Path) -> str:
    """This process's own cgroup's limit on CPU time: ``200000 100000`` is 200 of every 100 ms, two cores."""
    group = re.search(r"^0::/(.*)$", kernel_text(root / "proc/self/cgroup"), re.MULTILINE)
    return _first_line(root / "sys/fs/cgroup" / (group[1] if group else "") / "cpu.max")


def _chosen(path: Path) -> str:
    """Of a file that lists the options and brackets the one in force: ``always [madvise] never``."""
    match = re.search(r"\[(\w+)\]", kernel_text(path))
    return match[1] if match else NOT_TOLD


def _field(path: Path, name: str) -> str:
    match = re.search(rf"^{name}:\s+(.+)$", kernel_text(path), re.MULTILINE)
    return match[1] if match else NOT_TOLD


def _first_line(path: Path) -> str:
    return kernel_text(path).strip().split("\n", 1)[0] or NOT_TOLD
