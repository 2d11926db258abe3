"""How much memory this process takes, read from the kernel and apart from any timing.

RSS counts every page in memory that this process maps: its own, and those of mapped files (weights,
libraries) as far as they were touched. PSS divides a page among the processes that map it. So weights that
are mapped count in both, although the kernel may drop them at any time and a second process on the same
files adds to RSS but hardly to PSS; weights that are read into a buffer count as our own; the page cache of
files that were merely read counts nowhere.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from open_autoglm.measure.device_memory import DeviceMemory
from open_autoglm.measure.interference import kernel_text
from open_autoglm.schemas import Footprint

_SELF = Path("/proc/self")


class FootprintWatch:
    """Samples the memory of this process in a thread, inside ``with watch.sampling():``, as often as entered.

    Reading PSS walks all page tables, which takes milliseconds per GiB and stalls page faults meanwhile:
    time nothing meanwhile, here or in another process, and do not sample while only waiting.
    """

    def __init__(self, interval_s: float = 0.05, root: Path = _SELF, gpu: DeviceMemory | None = None) -> None:
        self._interval_s, self._root, self._gpu = interval_s, root, gpu
        self._peak_pss = self._rss = self._files = 0
        self._peak_device: int | None = None

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Sample at the beginning, in the background, and at the end."""
        done = threading.Event()
        thread = threading.Thread(target=self._watch, args=(done,), name="footprint", daemon=True)
        self._sample()
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self._sample()

    def footprint(self, device_bytes: int | None = None) -> Footprint:
        """Peak RSS is exact and since the start of the process. PSS is the highest of the samples, and the
        files' part is that of the sample with the highest RSS; a shorter peak is missed.
        On a GPU the driver's highest sample counts, context and libraries included; ``device_bytes``, what
        the session says its runtime holds, only where the driver does not tell.
        """
        return Footprint(
            peak_rss_bytes=read_peak_rss_bytes(self._root),
            peak_pss_bytes=self._peak_pss,
            mapped_file_bytes=self._files,
            device_bytes=device_bytes if self._peak_device is None else self._peak_device,
        )

    def _watch(self, done: threading.Event) -> None:
        while not done.wait(self._interval_s):
            self._sample()

    def _sample(self) -> None:
        status = _kib_fields(self._root / "status")
        if status["VmRSS"] >= self._rss:
            # The kernel counts pages of a file on a tmpfs as shared memory, though they back a file too.
            self._rss, self._files = status["VmRSS"], status["RssFile"] + status["RssShmem"]
        # A kernel without page monitoring has no PSS to give; then RSS is what it cannot exceed.
        pss = _kib_fields(self._root / "smaps_rollup").get("Pss", status["VmRSS"])
        self._peak_pss = max(self._peak_pss, pss)
        used = self._gpu.used_bytes() if self._gpu is not None else None
        if used is not None:
            self._peak_device = max(self._peak_device or 0, used)


def read_peak_rss_bytes(root: Path = _SELF) -> int:
    """VmHWM of this process: the most physical memory it ever held, mapped files included."""
    return _kib_fields(root / "status")["VmHWM"]


def _kib_fields(path: Path) -> dict[str, int]:
    """The ``Name:  123 kB`` lines of a file of /proc, in bytes."""
    fields = re.findall(r"^(\w+):\s+(\d+) kB$", kernel_text(path), re.MULTILINE)
    return {name: int(kib) * 1024 for name, kib in fields}
