"""The GPU benchmark's own code, run on the CPU: rows for everything, and no more packages than it says."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

import pytest

from benchmarks import checkout, gpu
from benchmarks.gpu import Plan, Result, run_plan, table
from benchmarks.gpu_contest import Course, OutOfTime, Row, _fits
from open_autoglm.schemas import Checkpoint

ROOT = Path(__file__).resolve().parent.parent
NOT_THERE = (
    "click", "fastapi", "great_expectations", "gguf", "hypothesis", "matplotlib", "mlflow", "pandas",
    "prefect", "psutil", "pydantic_settings", "pynvml", "rich", "scipy", "sqlalchemy",
)  # fmt: skip
"""What a host with only torch, onnx, transformers, numpy and pydantic may not have."""

BLOCKER = f"""
import sys

class Without:
    def __init__(self, finder):
        self._finder = finder

    def find_spec(self, name, *more):
        return None if name.partition(".")[0] in {NOT_THERE!r} else self._finder.find_spec(name, *more)

    def __getattr__(self, name):
        return getattr(self._finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""
"""``sitecustomize.py``: every finder, without those packages."""


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """An environment in which those packages cannot be imported, nor in any process started from it."""
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}


def run(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *code.split("\n")] if code.startswith("-m") else [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


# ── what it needs ────────────────────────────────────────────────────────────────────────────────


def test_the_blocker_blocks(bare: dict[str, str]) -> None:
    """Or the tests below would show nothing."""
    done = run("import scipy", bare)
    assert done.returncode == 1
    assert "No module named 'scipy'" in done.stderr


def test_measuring_and_all_engines_need_no_more_than_a_gpu_host_has(bare: dict[str, str]) -> None:
    """Imported where Prefect, MLflow, settings, gates and the terminal's colours are not installed."""
    modules = sorted(
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        for folder in ("open_autoglm/measure", "open_autoglm/engines", "open_autoglm/schemas")
        for path in (ROOT / folder).glob("*.py")
    )
    modules += ["benchmarks.gpu", "benchmarks.gpu_contest", "benchmarks.gpu_models", "open_autoglm.hardware"]
    done = run("; ".join(f"import {module.removesuffix('.__init__')}" for module in modules), bare)
    assert done.returncode == 0, done.stderr


def test_the_gpu_tests_are_collected_there(bare: dict[str, str]) -> None:
    """By marker or by name, and no other: what those need is not there. Plugins are not loaded, since pytest
    finds the packages that they come in by ways of its own."""
    bare["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    every = {"tests/test_gpu.py", "tests/test_tensorrt_gpu.py"}
    for asked, files in ((["-m", "gpu"], every), (["tests/test_gpu.py", "-m", "gpu"], {"tests/test_gpu.py"})):
        done = run("\n".join(["-m", "pytest", "--collect-only", "-q", *asked]), bare)
        assert done.returncode == 0, done.stdout
        tests = [line for line in done.stdout.splitlines() if "::" in line]
        assert tests
        assert {line.partition("::")[0] for line in tests} == files


def test_the_benchmark_runs_there_from_start_to_end(bare: dict[str, str], tmp_path: Path) -> None:
    """Two layers on the CPU: what runs has raw rounds, what cannot says how far it came and why."""
    path = tmp_path / "result.json"
    arguments = ["-m", "benchmarks.gpu", "--tiny", "--device", "cpu", "--batches", "2", "--heats", "2"]
    arguments += ["--candidates", "torch-fp32", "onnxruntime-cuda-fp16", "--json", str(path)]
    done = run("\n".join(arguments), bare)
    assert done.returncode == 0, done.stderr
    result = Result.model_validate_json(path.read_bytes())
    rows = {row.candidate: row for row in result.rows}
    timed, refused = rows["torch-fp32"], rows["onnxruntime-cuda-fp16"]
    assert (timed.stage, timed.reason, timed.batch_size) == ("timed", "", 2)
    assert [turn.index for turn in timed.rounds] == [0, 1]
    assert all(turn.output_tokens == (4,) for turn in timed.rounds)
    assert timed.footprint is not None
    assert timed.facts["device"] == "cpu"
    assert (refused.stage, refused.rounds) == ("vetoed", ())
    assert "on the CPU use onnxruntime" in refused.reason
    assert "| tiny | 2 | torch-fp32 |" in done.stdout
    assert result.device.startswith("CPU")


def test_engines_are_found_in_a_checkout_that_nobody_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the lines that pip would have written; where they are known, nothing is."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(checkout, "entry_points", lambda group: ())
    assert checkout.declare_engines(tmp_path)
    (found,) = distributions(path=[str(tmp_path)])
    points = {point.name: point for point in found.entry_points if point.group == checkout.GROUP}
    assert {"torch", "onnxruntime-cuda", "onnxruntime-tensorrt"} <= points.keys()
    assert points["onnxruntime-cuda"].load().name == "onnxruntime-cuda"
    assert os.environ["PYTHONPATH"].split(os.pathsep) == [str(tmp_path), str(ROOT)]
    monkeypatch.setattr(checkout, "entry_points", lambda group: points.values())
    assert not checkout.declare_engines(tmp_path / "again")
    assert not (tmp_path / "again").exists()


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────


def test_what_time_does_not_suffice_for_is_a_row(tmp_path: Path) -> None:
    """Of every model, batch and candidate."""
    plan = Plan("cpu", ("tiny", "glm-9b"), (1, 8), 2, ("torch-fp32", "torch-bf16"))
    kept: list[int] = []
    rows = run_plan(plan, tmp_path, gpu._Budget(0), lambda rows: kept.append(len(rows)))
    assert kept == [1, 2, 3, 4, 5, 6, 7, 8]
    assert {(row.model, row.batch_size, row.candidate) for row in rows} == set(
        itertools.product(plan.models, plan.batches, plan.wanted)
    )
    reason = "its share of the time, 0 s, was used up"
    assert {(row.stage, row.reason) for row in rows} == {("timed_out", reason)}
    assert table(rows).count(f"timed_out: {reason}") == 8


def test_time_is_shared() -> None:
    """The first of two gets half of what is left, and so does the first of two in it."""
    budget = gpu._Budget(80)
    half = budget.share(2)
    assert half() == pytest.approx(40, abs=1)
    assert half.share(2)() == pytest.approx(20, abs=1)
    with pytest.raises(OutOfTime, match="its share of the time, 0 s, was used up"):
        gpu._Budget(-1).share(1)()


def test_rows_are_kept_before_the_end_is_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A host that ends the benchmark leaves the rows so far in a file that can be read."""
    first, second = (
        Row(model="m", batch_size=1, candidate=name, engine="e", stage="vetoed", reason="why")
        for name in ("first", "second")
    )

    def ended(*_: object) -> Iterator[Row]:
        yield first
        yield second
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "_run_model", ended)
    path = tmp_path / "result.json"
    with pytest.raises(KeyboardInterrupt):
        gpu.measure(Plan("cpu", ("m",), (1,), 1, ()), tmp_path, 60, path)
    assert Result.model_validate_json(path.read_bytes()).rows == (first, second)
    assert "| m | 1 | second | vetoed: why |" in capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_written_is_a_reason(tmp_path: Path) -> None:
    """Of every candidate; the next model is tried."""
    (tmp_path / "tiny").write_text("in the way")
    rows = run_plan(
        Plan("cpu", ("tiny",), (1,), 1, ("torch-fp32",)), tmp_path, gpu._Budget(60), lambda _: None
    )
    assert [(row.stage, row.candidate) for row in rows] == [("failed", "torch-fp32")]
    assert "NotADirectoryError" in rows[0].reason


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One sentence with what to do instead, and no file."""
    monkeypatch.setattr(gpu, "find_gpus", lambda: ((), "no NVIDIA driver found"))
    with pytest.raises(SystemExit, match="no NVIDIA driver found; try --tiny --device cpu"):
        gpu.main(["--json", str(tmp_path / "result.json")])
    assert not (tmp_path / "result.json").exists()


def test_a_wave_ends_where_the_gpu_is_full() -> None:
    """The next is taken to be as large as the largest so far; a GPU that tells no size holds all."""

    class Open:
        able = True

        def __init__(self, device_bytes: int) -> None:
            self.device_bytes = device_bytes

    checkpoint = Checkpoint.model_construct()
    course = Course.model_construct(checkpoint=checkpoint, gpu_bytes=100)
    three = [Open(20), Open(30), Open(10)]
    assert not _fits(course, three)  # type: ignore[arg-type]
    assert _fits(course, three[:2])  # type: ignore[arg-type]
    assert _fits(course, [])
    assert _fits(course.model_copy(update={"gpu_bytes": 0}), three * 9)  # type: ignore[arg-type]


def test_the_table_has_figures_or_reasons() -> None:
    """A reason cannot break the table."""
    row = Row(model="m", batch_size=8, candidate="c", engine="e", stage="open", reason="a|b\nc")
    assert "| m | 8 | c | open: a/b c |" in table([row])
    assert json.loads(row.model_dump_json())["rounds"] == []
