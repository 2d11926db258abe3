"""A disk of a test's own that becomes full."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


def on_a_small_disk(size: str, root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run ``command`` where ``root`` is a disk of its own, in memory; skip if the kernel does not let us."""
    mount = f"mount -t tmpfs -o size={size} none {root} && exec "
    line = mount + '"$@"'
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*namespace, "true"]).returncode:
        pytest.skip("no disk can be mounted here without privileges")
    return subprocess.run([*namespace, "sh", "-c", line, "sh", *command], capture_output=True, text=True)
