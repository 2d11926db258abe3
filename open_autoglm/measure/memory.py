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
from pathlib import Path

from open_autoglm.measure.interference import kernel_text
from open_autoglm.schemas import Footprint

_SELF = Path("/proc/self")


class FootprintWatch:
    """Samples the memory of this process in a thread, from :meth:`start` to :meth:`stop`.

    Reading PSS walks all page tables, which takes milliseconds per GiB and stalls page faults meanwhile:
    time nothing while a watch runs.
    """

    def __init__(self, interval_s: float = 0.05, root: Path = _SELF) -> None:
        self._interval_s, self._root = interval_s, root
        self._peak_pss = self._rss = self._files = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="footprint", daemon=True)

    def start(self) -> None:
        """Take a first sample and go on in the background."""
        self._sample()
        self._thread.start()

    def stop(self, device_bytes: int | None = None) -> Footprint:
        """Take a last sample and end; a second call reports anew but does not change the samples.

        Peak RSS is exact and since the start of the process. PSS is the highest of the samples, and the
        files' part is that of the sample with the highest RSS; a shorter peak is missed.
        ``device_bytes`` is what the session says it holds on a GPU.
        """
        if not self._done.is_set():
            self._done.set()
            self._thread.join()
            self._sample()
        return Footprint(
            peak_rss_bytes=read_peak_rss_bytes(self._root),
            peak_pss_bytes=self._peak_pss,
            mapped_file_bytes=self._files,
            device_bytes=device_bytes,
        )

    def _watch(self) -> None:
        while not self._done.wait(self._interval_s):
            self._sample()

    def _sample(self) -> None:
        status = _kib_fields(self._root / "status")
        if status["VmRSS"] >= self._rss:
            # The kernel counts pages of a file on a tmpfs as shared memory, though they back a file too.
            self._rss, self._files = status["VmRSS"], status["RssFile"] + status["RssShmem"]
        # A kernel without page monitoring has no PSS to give; then RSS is what it cannot exceed.
        pss = _kib_fields(self._root / "smaps_rollup").get("Pss", status["VmRSS"])
        self._peak_pss = max(self._peak_pss, pss)


def read_peak_rss_bytes(root: Path = _SELF) -> int:
    """VmHWM of this process: the most physical memory it ever held, mapped files included."""
    return _kib_fields(root / "status")["VmHWM"]


def _kib_fields(path: Path) -> dict[str, int]:
    """The ``Name:  123 kB`` lines of a file of /proc, in bytes."""
    fields = re.findall(r"^(\w+):\s+(\d+) kB$", kernel_text(path), re.MULTILINE)
    return {name: int(kib) * 1024 for name, kib in fields}
