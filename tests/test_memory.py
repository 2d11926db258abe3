"""Memory of a process: what a mapped file, a read file and a shared one do to each number."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
from pathlib import Path

import pytest

from open_autoglm.measure.memory import FootprintWatch, read_peak_rss_bytes

MIB = 2**20
SIZE = 64 * MIB
SLACK = 4 * MIB
"""What the interpreter itself may allocate or map meanwhile."""

CHILD = """
import json, mmap, sys
from open_autoglm.measure.memory import FootprintWatch

def footprint():
    watch = FootprintWatch(interval_s=0.001)
    with watch.sampling():
        pass
    return watch.footprint().model_dump()

before = footprint()
with open(sys.argv[1], "rb") as file:
    if sys.argv[2] == "map":
        held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    else:
        held = file.read()
touched = sum(held[at] for at in range(0, int(sys.argv[3]), mmap.PAGESIZE))
print(json.dumps([before, footprint()]))
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("memory") / "weights.bin"
    path.write_bytes(b"w" * SIZE)
    return path


def growth(weights: Path, how: str, touched: int = SIZE) -> dict[str, int]:
    """By how much each number of a real child grows when it maps or reads the file."""
    command = [sys.executable, "-c", CHILD, str(weights), how, str(touched)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    before, after = json.loads(answer)
    return {name: after[name] - value for name, value in before.items() if value is not None}


def test_a_mapped_file_counts_as_far_as_it_was_touched(weights: Path) -> None:
    """All of it, or none; what is mapped counts as a file, in RSS and in PSS."""
    grown = growth(weights, "map")
    for name in ("peak_rss_bytes", "peak_pss_bytes", "mapped_file_bytes"):
        assert SIZE - SLACK < grown[name] < SIZE + SLACK, name
    assert growth(weights, "map", touched=1)["mapped_file_bytes"] < SIZE / 2


def test_a_file_that_is_read_becomes_memory_of_our_own(weights: Path) -> None:
    """It counts in RSS and in PSS, but not as a file."""
    grown = growth(weights, "read")
    assert SIZE - SLACK < grown["peak_rss_bytes"] < SIZE + SLACK
    assert SIZE - SLACK < grown["peak_pss_bytes"] < SIZE + SLACK
    assert grown["mapped_file_bytes"] < SLACK


def test_a_file_that_two_processes_map_counts_half_in_pss(weights: Path) -> None:
    """RSS counts it whole in each of them."""
    with weights.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as ours:
        assert sum(ours[at] for at in range(0, SIZE, mmap.PAGESIZE))
        grown = growth(weights, "map")
    assert SIZE - SLACK < grown["peak_rss_bytes"] < SIZE + SLACK
    assert SIZE / 2 - SLACK < grown["peak_pss_bytes"] < SIZE / 2 + SLACK


def write(root: Path, high_water: int, rss: int, files: int, pss: int | None) -> None:
    shared = f"VmRSS:\t{rss} kB\nRssAnon:\t5 kB\nRssFile:\t{files} kB\nRssShmem:\t1 kB\n"
    (root / "status").write_text(f"Name:\tx\nVmHWM:\t{high_water} kB\n{shared}Threads:\t3\n")
    if pss is not None:
        (root / "smaps_rollup").write_text(f"00-ff ---p 00:00 0 [rollup]\nRss: {rss} kB\nPss:   {pss} kB\n")


def test_peaks_stay_when_memory_is_given_back(tmp_path: Path) -> None:
    """Each number is the highest, and the files' part belongs to the sample with the highest RSS."""
    watch = FootprintWatch(interval_s=60, root=tmp_path)
    write(tmp_path, high_water=900, rss=800, files=300, pss=700)
    with watch.sampling():
        write(tmp_path, high_water=950, rss=400, files=390, pss=200)
    footprint = watch.footprint(device_bytes=12)
    assert footprint.peak_rss_bytes == 950 * 1024
    assert footprint.peak_pss_bytes == 700 * 1024
    assert footprint.mapped_file_bytes == 301 * 1024
    assert footprint.device_bytes == 12
    write(tmp_path, high_water=999, rss=999, files=999, pss=999)
    assert watch.footprint().peak_pss_bytes == 700 * 1024, "nothing is read while nobody samples"
    with watch.sampling():
        pass
    assert watch.footprint().peak_pss_bytes == 999 * 1024


def test_without_page_monitoring_pss_is_taken_as_rss(tmp_path: Path) -> None:
    """PSS cannot be more than that."""
    write(tmp_path, high_water=900, rss=800, files=300, pss=None)
    watch = FootprintWatch(interval_s=60, root=tmp_path)
    with watch.sampling():
        pass
    assert watch.footprint().peak_pss_bytes == 800 * 1024


def test_peak_rss_of_this_process_holds_what_it_holds() -> None:
    """Memory that was touched just now is in it."""
    held = bytearray(b"x" * SIZE)
    assert read_peak_rss_bytes() > len(held)
