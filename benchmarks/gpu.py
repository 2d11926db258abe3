"""Everything that a GPU host can tell, in one go and in a set time: engines, batches, models, raw rounds.

``python -m benchmarks.gpu``: GLMs of 1.5 and 9 billion random weights, at batch 1 and 8, by every engine for
GPUs. It needs torch, onnx, transformers, numpy and pydantic, no network and no installation; an engine whose
own packages are missing is a row that says so. ``--tiny --device cpu`` runs the same code anywhere.
"""

from __future__ import annotations

import argparse
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarks.checkout import declare_engines
from benchmarks.gpu_contest import (
    ENVIRONMENT,
    Course,
    Files,
    OutOfTime,
    Row,
    export,
    run_waves,
    usable_threads,
)
from benchmarks.gpu_models import SHAPES, CheckpointJob, draw_workload
from open_autoglm import engines
from open_autoglm.analysis import profile_model
from open_autoglm.files import write_atomic
from open_autoglm.hardware import find_gpus, read_cpu, read_memory
from open_autoglm.measure.isolation import Failure, run_isolated
from open_autoglm.schemas import (
    Analysis,
    Candidate,
    Checkpoint,
    Device,
    ExportedModel,
    Hardware,
    Model,
    OptimizeSpec,
    Workload,
)

RESULTS = Path(__file__).parent / "results"
BUDGET_S = 540.0
"""A little under ten minutes, so that the table is written within them."""

HEATS = 8
START = {"gpu": ("glm-1.5b", "glm-9b"), "cpu": ("tiny",)}
WANTED: dict[Device, tuple[str, ...]] = {
    "gpu": (
        "torch-cuda-bf16",
        "torch-cuda-bf16-compile",
        "torch-cuda-fp8-compile",
        "onnxruntime-cuda-fp16",
        "onnxruntime-cuda-w4-b32",
        "onnxruntime-tensorrt-fp16",
        "tensorrt-fp16",
        "tensorrt-rtx-fp16",
    ),
    "cpu": ("torch-fp32", "torch-bf16", "onnxruntime-fp32", "onnxruntime-w8-b32", "onnxruntime-cuda-fp16"),
}
"""In the order they are tried: what surely runs, first."""


class Result(Model):
    """Stored as JSON."""

    device: str
    driver: str
    host: str
    python: str
    torch: str
    seconds: float
    heats: int
    rows: tuple[Row, ...]


class _Budget:
    """Callable: seconds that are left."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._end = seconds, time.monotonic() + seconds

    def __call__(self) -> float:
        left = self._end - time.monotonic()
        if left <= 0:
            raise OutOfTime(f"its share of the time, {self._seconds:.0f} s, was used up")
        return left

    def share(self, parts: int) -> _Budget:
        """One of so many equal parts of what is left: who comes first cannot take it all."""
        return _Budget(max(self._end - time.monotonic(), 0) / parts)


class Plan(NamedTuple):
    """What is asked for."""

    device: Device
    models: tuple[str, ...]
    batches: tuple[int, ...]
    heats: int
    wanted: tuple[str, ...]


# ── one model ────────────────────────────────────────────────────────────────────────────────────


Keep = Callable[[Sequence[Row]], None]


def run_plan(plan: Plan, folder: Path, budget: _Budget, keep: Keep) -> list[Row]:
    """A row for every model, batch and candidate, whatever becomes of it.

    ``keep`` gets all rows so far whenever there are more: the host may end the benchmark at any time.
    """
    rows: list[Row] = []
    for index, name in enumerate(plan.models):
        for row in _run_model(plan, name, folder / name, budget.share(len(plan.models) - index)):
            rows.append(row)
            keep(rows)
        shutil.rmtree(folder / name, ignore_errors=True)  # a large model's files would not fit beside others
    return rows


def _run_model(plan: Plan, name: str, folder: Path, budget: _Budget) -> Iterator[Row]:
    checkpoint = _checkpoint(plan.device, name, folder, budget)
    if isinstance(checkpoint, Failure):
        planned = product(plan.batches, plan.wanted)
        yield from (_stopped(name, batch_size, wanted, checkpoint) for batch_size, wanted in planned)
        return
    hardware = unmeasured_hardware()
    course = Course(
        checkpoint=checkpoint,
        folder=folder,
        threads=usable_threads(),
        gpu_bytes=max((gpu.memory_bytes for gpu in hardware.gpus), default=0),
        heats=plan.heats,
    )
    files: list[tuple[Candidate, ExportedModel]] = []
    refused: list[tuple[Candidate, Failure]] = []
    exporting = budget.share(2)  # the rest is for those that need no export, if need be
    for candidate in _candidates(plan, checkpoint, hardware):
        exported = _refusal(candidate, plan.device) or _export(course, candidate, exporting)
        if isinstance(exported, Failure):
            refused.append((candidate, exported))
        else:
            files.append((candidate, exported))
    for index, batch_size in enumerate(plan.batches):
        yield from (_stopped(name, batch_size, c.id, failure, c.engine) for c, failure in refused)
        workload = draw_workload(name, batch_size, plan.heats, folder / f"prompts-{batch_size}.npz")
        yield from _run_batch(course, files, workload, budget.share(len(plan.batches) - index))


def _checkpoint(device: Device, name: str, folder: Path, budget: _Budget) -> Checkpoint | Failure:
    """Written in a child: this process would keep a part of the GPU's memory for as long as it lives."""
    job = CheckpointJob(name=name, folder=folder, device="cuda" if device == "gpu" else "cpu")
    job_name = "benchmarks.gpu_models:checkpoint_job"
    log = folder.parent / f"{name}-checkpoint.log"
    try:
        return run_isolated(job_name, job, Checkpoint, log=log, timeout_s=budget(), environment=ENVIRONMENT)
    except OutOfTime as out:
        return Failure("timed_out", str(out))


def _export(course: Course, candidate: Candidate, budget: _Budget) -> ExportedModel | Failure:
    try:
        return export(course, candidate, budget)
    except OutOfTime as out:
        return Failure("timed_out", str(out))


def _run_batch(course: Course, files: Files, workload: Workload, budget: _Budget) -> Iterator[Row]:
    done: set[str] = set()
    try:
        for row in run_waves(course, files, workload, budget):
            done.add(row.candidate)
            yield row
    except OutOfTime as out:
        late = Failure("timed_out", str(out))
        for candidate, _ in files:
            if candidate.id not in done:
                yield _stopped(
                    course.checkpoint.name, workload.batch_size, candidate.id, late, candidate.engine
                )


def _candidates(plan: Plan, checkpoint: Checkpoint, hardware: Hardware) -> list[Candidate]:
    """Those of `wanted` that an engine proposes; one that nobody knows is left out."""
    # The host's peaks are not measured: no bound is asked for.
    analysis = Analysis(profile=profile_model(checkpoint), hardware=hardware, roofline=())
    spec = OptimizeSpec(model_path=str(checkpoint.path))
    proposed = {c.id: c for n in engines.names() for c in engines.get(n).propose(analysis, spec, plan.device)}
    return [proposed[name] for name in plan.wanted if name in proposed]


def _refusal(candidate: Candidate, device: Device) -> Failure | None:
    """Why it cannot be tried here, by its engine's own word."""
    probe = engines.get(candidate.engine).probe(device)
    if not probe.ready:
        mend = f"; mend it with: {probe.install}" if probe.install else ""
        return Failure("vetoed", f"{probe.stage}: {probe.reason}{mend}")
    return Failure("vetoed", candidate.vetoed_because) if candidate.vetoed_because else None


def _stopped(model: str, batch_size: int, candidate: str, failure: Failure, engine: str = "") -> Row:
    row = Row(model=model, batch_size=batch_size, candidate=candidate, engine=engine, stage="planned")
    return row.stopped(failure.status, failure.reason)


def unmeasured_hardware() -> Hardware:
    """The host as it is, its peaks unmeasured."""
    model, isa = read_cpu()
    total, available = read_memory()
    gpus, reason = find_gpus()
    return Hardware(
        cpu_model=model,
        cores=usable_threads(),
        isa=isa,
        memory_bytes=total,
        available_memory_bytes=available,
        read_bandwidth_bytes_per_s=0,
        matmul_fp32_flops_per_s=0,
        matmul_bf16_flops_per_s=None,
        matmul_int8_ops_per_s=None,
        gpus=gpus,
        gpu_reason=reason,
        os=platform.platform(),
        python=platform.python_version(),
        fingerprint="not measured",
    )


# ── the table ────────────────────────────────────────────────────────────────────────────────────


def table(rows: Sequence[Row]) -> str:
    """Markdown: medians of the raw rounds, or how far a candidate came and why no further."""
    lines = [
        "| model | batch | candidate | TTFT ms | TPOT ms | tokens/s | on the GPU | first request s | n |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = [row.model, str(row.batch_size), row.candidate, *_figures(row)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _figures(row: Row) -> list[str]:
    if not row.rounds:
        return [f"{row.stage}: {row.reason}".replace("|", "/").replace("\n", " "), *[""] * 5]
    ttft, tpot = (median(getattr(r, name)[0] for r in row.rounds) for name in ("ttft_ms", "tpot_ms"))
    device_bytes = row.footprint.device_bytes if row.footprint else None
    return [
        f"{ttft:.2f}",
        f"{tpot:.2f}",
        f"{1e3 * row.batch_size / tpot:.0f}",
        "–" if device_bytes is None else f"{device_bytes / 2**30:.1f} GiB",
        f"{row.first_request_ms / 1e3:.1f}",
        f"{len(row.rounds)}" + (f" ({row.stage}: {row.reason})" if row.reason else ""),
    ]


# ── the command ──────────────────────────────────────────────────────────────────────────────────


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--tiny", action="store_true", help="a model of two layers: what runs, not how fast")
    parser.add_argument("--models", nargs="+", choices=tuple(SHAPES), help="instead of those of the device")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--heats", type=int, default=HEATS)
    parser.add_argument("--candidates", nargs="+", help="instead of those that are usual on the device")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S)
    parser.add_argument("--work", type=Path, help="where models and exports are written meanwhile")
    parser.add_argument("--json", type=Path, help="instead of benchmarks/results/gpu-<device name>.json")
    asked = parser.parse_args(arguments)
    plan = Plan(
        device=asked.device,
        models=("tiny",) if asked.tiny else tuple(asked.models or START[asked.device]),
        batches=tuple(asked.batches),
        heats=asked.heats,
        wanted=tuple(asked.candidates or WANTED[asked.device]),
    )
    path = asked.json or RESULTS / f"gpu-{_file_name(_device(plan.device)[0])}.json"
    with tempfile.TemporaryDirectory(prefix="autoglm-gpu-", dir=asked.work) as folder:
        declare_engines(Path(folder) / "engines")
        result = measure(plan, Path(folder), asked.budget_s, path)
    sys.stdout.write(
        f"{result.device}, driver {result.driver}, {result.seconds:.0f} s\n\n{table(result.rows)}"
    )
    sys.stdout.write(f"\nraw rounds: {path}\n")


def measure(plan: Plan, folder: Path, budget_s: float, path: Path) -> Result:
    """Run the plan in ``folder``; ``path`` has what is known at any time, and a line on stderr tells of each
    row. Exits with a sentence if there is no GPU where one is asked for."""
    from importlib.metadata import version

    device, driver = _device(plan.device)
    started = time.monotonic()

    def kept(rows: Sequence[Row]) -> Result:
        result = Result(
            device=device,
            driver=driver,
            host=platform.platform(),
            python=platform.python_version(),
            torch=version("torch"),
            seconds=time.monotonic() - started,
            heats=plan.heats,
            rows=tuple(rows),
        )
        write_atomic(path, result.model_dump_json(indent=1) + "\n")
        return result

    def keep(rows: Sequence[Row]) -> None:
        seconds = kept(rows).seconds
        sys.stderr.write(f"{seconds:.0f} s: {table(rows[-1:]).splitlines()[-1]}\n")
        sys.stderr.flush()

    return kept(run_plan(plan, folder, _Budget(budget_s), keep))


def _device(device: Device) -> tuple[str, str]:
    """Its name and its driver's version."""
    gpus, reason = find_gpus()
    if device == "gpu" and not gpus:
        sys.exit(f"error: {reason}; try --tiny --device cpu")
    return gpus[0].name if device == "gpu" else f"CPU {read_cpu()[0]}", gpus[0].driver if gpus else "none"


def _file_name(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


if __name__ == "__main__":
    main()
