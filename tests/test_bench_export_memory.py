"""The benchmark of what exports take: its verdicts, its table, and a run of it on a model of two layers."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.export_memory import ALLOWED, ROUTES, Row, measure, table
from benchmarks.export_memory_child import Taken
from open_autoglm import engines

SIZE = 10**9
LIBRARIES = Taken(peak_rss_bytes=400 * 10**6, mapped_file_bytes=10**8, seconds=1.0)


def make_row(own: float, mapped: float, **fields: str) -> Row:
    """A route that took so many times the checkpoint above its libraries, in memory of its own and mapped."""
    rss = LIBRARIES.peak_rss_bytes + round((own + mapped) * SIZE)
    files = LIBRARIES.mapped_file_bytes + round(mapped * SIZE)
    taken = Taken(peak_rss_bytes=rss, mapped_file_bytes=files, seconds=7.0)
    return Row(route="a route", checkpoint_bytes=SIZE, libraries=LIBRARIES, taken=taken, **fields)


def drawn(*rows: Row) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table(rows))
    return console.export_text()


def test_only_what_goes_beyond_the_libraries_counts() -> None:
    row = make_row(own=0.5, mapped=0.25)
    assert row.share == pytest.approx(0.75)
    assert row.own_share == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("own", "mapped", "verdict"),
    [
        (ALLOWED, 0, "kept"),
        (0.4, 1.0, "kept but for mapped files: two copies"),
        (ALLOWED + 0.01, 0.0, "too much: two copies"),
    ],
)
def test_the_verdict_is_about_the_peak_and_tells_mapped_files_apart(
    own: float, mapped: float, verdict: str
) -> None:
    assert drawn(make_row(own, mapped, holds="two copies")).rstrip().splitlines()[-2].count(verdict) == 1


def test_a_route_that_failed_says_why() -> None:
    failed = Row(route="another", checkpoint_bytes=SIZE, reason="crashed: SIGSEGV")
    assert failed.share is None
    assert "crashed: SIGSEGV" in drawn(make_row(1, 0), failed)


def test_every_route_is_a_candidate_of_its_engine() -> None:
    assert {route.engine for route in ROUTES} <= set(engines.names())
    assert all(route.candidate.startswith(route.engine) for route in ROUTES)


def test_a_small_model_is_exported_and_leaves_no_export(tmp_path: Path) -> None:
    """The libraries are nearly all that such an export takes."""
    (row,) = measure("tiny", ROUTES[:1], tmp_path, limit_s=120)
    assert row.taken is not None, row.reason
    assert row.libraries is not None
    assert row.candidate == "onnxruntime-tensorrt-fp16"
    assert row.taken.peak_rss_bytes == pytest.approx(row.libraries.peak_rss_bytes, rel=0.2)
    assert 0 < row.taken.mapped_file_bytes < row.taken.peak_rss_bytes
    assert row.export_bytes > row.checkpoint_bytes / 4
    assert not (tmp_path / "export").exists()


def test_a_route_that_cannot_be_taken_says_so(tmp_path: Path) -> None:
    """What fails in its child is a row, and the routes behind it are still tried."""
    (row,) = measure("tiny", ROUTES[:1], tmp_path, limit_s=0.01)
    assert row.taken is None
    assert row.reason.startswith("timed_out: ")
    assert not (tmp_path / "export").exists()
