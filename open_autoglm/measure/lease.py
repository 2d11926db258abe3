"""The device lease: timing and scoring have the device to themselves; preparations share it.

On a CPU, loading or quantising one engine disturbs the timing of another as surely as a second
timed run would. So the lease is a readers-writer lock over two kernel file locks: preparations
hold it shared, a timed block holds it alone. The kernel frees both when their holder dies,
however it dies, so no run ever waits for a ghost. The lease spans processes of one user.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from open_autoglm.files import file_lock
from open_autoglm.schemas import Device


def lease_directory() -> Path:
    """Where this user's lease files lie: the same for every study of this user on this host."""
    root = os.environ.get("AUTOGLM_LEASE_DIR")
    return Path(root) if root else Path(tempfile.gettempdir()) / f"open-autoglm-{os.getuid()}"


@contextmanager
def preparing() -> Iterator[None]:
    """Hold the CPU together with other preparations: for work in this process that a timed round elsewhere
    would feel, such as starting a server or writing a report. Never nested: who waits for the device alone
    would wait for the outer hold, and the inner one for them."""
    with device_lease("cpu", alone=False):
        yield


@contextmanager
def device_lease(device: Device, *, alone: bool) -> Iterator[None]:
    """Hold ``device`` alone (for timing) or together with other preparations.

    Everyone passes a turnstile first, and who wants the device alone waits inside it, so a stream
    of preparations cannot starve a timed run.
    """
    directory = lease_directory()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if alone:
        with file_lock(directory / f"{device}.turnstile"), file_lock(directory / f"{device}.lease"):
            yield
        return
    with file_lock(directory / f"{device}.turnstile"):
        shared = file_lock(directory / f"{device}.lease", shared=True)
        shared.__enter__()
    try:
        yield
    finally:
        shared.__exit__(None, None, None)
