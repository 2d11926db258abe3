"""How much memory an export takes: at most 1.3 times the checkpoint's bytes, above what its libraries take?

``python -m benchmarks.export_memory``: a GLM of 1.5 billion random weights in bf16, a shard per layer, is
written under AUTOGLM_HOME (3 GB, and up to 15 GB while a route works) and exported by each route in a process
of its own. The same route's export of a model of two tiny layers says what the libraries take; only what goes
beyond is held against the checkpoint. No GPU is needed: nothing that is written here is run.

Peak memory is VmHWM, so mapped pages of files count although the kernel may drop them at any time; how many
they are is told apart. The seconds are indicative.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import Field
from rich.console import Console
from rich.table import Table

from benchmarks.export_memory_child import Taken
from benchmarks.gpu import unmeasured_hardware
from benchmarks.gpu_models import SHAPES, write_checkpoint
from benchmarks.laboratory import save
from open_autoglm import engines
from open_autoglm.analysis import profile_model
from open_autoglm.engines.contract import ExportContext
from open_autoglm.export.store import ExportJob
from open_autoglm.measure.isolation import Failure, run_isolated
from open_autoglm.measure.lease import preparing
from open_autoglm.schemas import Analysis, Candidate, Checkpoint, Device, Model, OptimizeSpec
from open_autoglm.settings import Settings

RESULT = Path(__file__).parent / "results" / "export-memory.json"
ALLOWED = 1.3
"""Peak memory above the libraries' / bytes of the checkpoint."""

LIMIT_S = 900.0
MODEL, TINY = "glm-1.5b", "tiny"


class Route(NamedTuple):
    """One kind of export, by a candidate that is exported so."""

    name: str
    engine: str
    device: Device
    candidate: str
    """The first candidate whose id begins so: the rest of it can depend on the host."""
    holds: str = ""
    """What it has in memory at once, besides one matrix and what it becomes; told where that is too much."""


_BUILDER = "the builder loads the checkpoint as a torch model, which maps it whole"

ROUTES = (
    Route("standard graph, fp16", "onnxruntime-tensorrt", "gpu", "onnxruntime-tensorrt-fp16"),
    Route("standard graph, int8", "onnxruntime-tensorrt", "gpu", "onnxruntime-tensorrt-w8"),
    Route("OpenVINO, int8", "openvino", "cpu", "openvino-w8", "the whole graph, until it is written"),
    Route("GGUF, Q8_0", "llamacpp", "cpu", "llamacpp-q8-0"),
    Route("ONNX Runtime, fp32", "onnxruntime", "cpu", "onnxruntime-fp32", _BUILDER),
    Route("ONNX Runtime, 8-bit weights", "onnxruntime", "cpu", "onnxruntime-w8-b32", _BUILDER),
    Route("ONNX Runtime, fp16 for CUDA", "onnxruntime-cuda", "gpu", "onnxruntime-cuda-fp16", _BUILDER),
    Route(
        "ONNX Runtime, int8 calibrated",
        "onnxruntime",
        "cpu",
        "onnxruntime-w8a8",
        "ONNX Runtime runs the fp32 graph for the scales",
    ),
    Route(
        "TensorRT-RTX plan, fp16",
        "tensorrt-rtx",
        "gpu",
        "tensorrt-rtx-fp16",
        "the plan is built in memory, with the weights once for each of two profiles",
    ),
)


class Row(Model):
    """One route; without ``taken`` it has a reason."""

    route: str
    candidate: str = ""
    checkpoint_bytes: int = Field(ge=1)
    libraries: Taken | None = Field(None, description="the same for a model of next to no weights")
    taken: Taken | None = None
    export_bytes: int = 0
    reason: str = ""
    holds: str = Field("", description="what the route keeps in memory besides a matrix at a time")

    @property
    def share(self) -> float | None:
        """Peak memory above the libraries' / bytes of the checkpoint."""
        if self.taken is None or self.libraries is None:
            return None
        return (self.taken.peak_rss_bytes - self.libraries.peak_rss_bytes) / self.checkpoint_bytes

    @property
    def own_share(self) -> float | None:
        """The same without pages of mapped files, which the kernel may drop."""
        if self.taken is None or self.libraries is None:
            return None
        return (_own_bytes(self.taken) - _own_bytes(self.libraries)) / self.checkpoint_bytes


def _own_bytes(taken: Taken) -> int:
    return taken.peak_rss_bytes - taken.mapped_file_bytes


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.export_memory", description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=tuple(SHAPES), default=MODEL)
    parser.add_argument(
        "--routes", nargs="+", help="only those whose candidate's id begins with one of these"
    )
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="no export goes on for longer")
    parser.add_argument("--json", type=Path, default=RESULT)
    asked = parser.parse_args(arguments)
    chosen = [r for r in ROUTES if asked.routes is None or r.candidate.startswith(tuple(asked.routes))]
    home = Settings().home
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="export-memory-", dir=home) as folder:
        rows = []
        for row in measure(asked.model, chosen, Path(folder), asked.limit_s):
            rows.append(row)
            content = {
                "model": asked.model,
                "allowed": ALLOWED,
                "rows": [r.model_dump(mode="json") for r in rows],
            }
            save(asked.json, content)
            sys.stderr.write(f"{row.route}: {_verdict(row)}\n")
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 130).print(table(rows))


# ── measuring ────────────────────────────────────────────────────────────────────────────────────


def measure(model: str, routes: Iterable[Route], folder: Path, limit_s: float) -> Iterator[Row]:
    """Each route's row as it is found; models and exports lie in ``folder``, the latter one at a time."""
    tiny = write_checkpoint(TINY, folder / f"{TINY}-libraries", "cpu")
    checkpoint = write_checkpoint(model, folder / model, "cpu")
    analysis = Analysis(profile=profile_model(checkpoint), hardware=unmeasured_hardware(), roofline=())
    for route in routes:
        row = Row(route=route.name, checkpoint_bytes=checkpoint.weight_bytes, holds=route.holds)
        yield _measured(row, _candidate(route, analysis), (tiny, checkpoint), folder, limit_s)


def _measured(
    row: Row,
    candidate: Candidate | Failure,
    models: tuple[Checkpoint, Checkpoint],
    folder: Path,
    limit_s: float,
) -> Row:
    """``row`` with what the exports of the two models took, or with why there is none."""
    if isinstance(candidate, Failure):
        return row.model_copy(update={"reason": candidate.reason})
    row = row.model_copy(update={"candidate": candidate.id})
    done = []
    for checkpoint in models:
        exported = _export(candidate, checkpoint, folder, limit_s)
        if isinstance(exported, Failure):
            return row.model_copy(update={"reason": f"{exported.status}: {exported.reason}"})
        done.append(exported)
    libraries, model = done
    found = {"libraries": libraries.taken, "taken": model.taken, "export_bytes": model.size_bytes}
    return row.model_copy(update=found)


class _Exported(NamedTuple):
    taken: Taken
    size_bytes: int


def _candidate(route: Route, analysis: Analysis) -> Candidate | Failure:
    """The route's candidate, or why it cannot be exported here; exports for a GPU need none."""
    engine = engines.get(route.engine)
    probe = engine.probe(route.device)
    if route.device == "cpu" and not probe.ready:
        return Failure("vetoed", probe.reason)
    proposed = engine.propose(analysis, OptimizeSpec(model_path="random"), route.device)
    return next(candidate for candidate in proposed if candidate.id.startswith(route.candidate))


def _export(
    candidate: Candidate, checkpoint: Checkpoint, folder: Path, limit_s: float
) -> _Exported | Failure:
    """In a child, not from the store; the files are gone afterwards."""
    output = folder / "export"
    output.mkdir()
    context = ExportContext(output=output, ledger=folder / "ledger.json")
    try:
        with preparing():
            taken = run_isolated(
                "benchmarks.export_memory_child:export_watched",
                ExportJob(candidate=candidate, checkpoint=checkpoint, context=context),
                Taken,
                log=folder / f"{candidate.id}.log",
                timeout_s=limit_s,
            )
        if isinstance(taken, Failure):
            return taken
        return _Exported(taken, sum(file.stat().st_size for file in output.rglob("*") if file.is_file()))
    finally:
        shutil.rmtree(output)


# ── the table ────────────────────────────────────────────────────────────────────────────────────


def table(rows: Sequence[Row]) -> Table:
    """Gigabytes, and shares of the checkpoint above what the libraries take."""
    size = rows[0].checkpoint_bytes
    found = Table(
        title=f"memory of exporting a checkpoint of {size / 1e9:.2f} GB; allowed {ALLOWED} × of it",
        title_justify="left",
    )
    headings = ("peak RSS GB", "libraries GB", "share", "without mapped files", "files GB", "seconds", "")
    for heading in ("route", *headings):
        found.add_column(heading, justify="right" if heading in headings[:-1] else "left")
    for row in rows:
        found.add_row(row.route, *_cells(row), _verdict(row))
    return found


def _cells(row: Row) -> list[str]:
    if row.taken is None or row.libraries is None:
        return ["–"] * 6
    return [
        f"{row.taken.peak_rss_bytes / 1e9:.2f}",
        f"{row.libraries.peak_rss_bytes / 1e9:.2f}",
        f"{row.share:.2f} ×",
        f"{row.own_share:.2f} ×",
        f"{row.export_bytes / 1e9:.2f}",
        f"{row.taken.seconds:.0f}",
    ]


def _verdict(row: Row) -> str:
    if row.share is None or row.own_share is None:
        return row.reason
    if row.share <= ALLOWED:
        return "kept"
    verdict = "kept but for mapped files" if row.own_share <= ALLOWED else "too much"
    return f"{verdict}: {row.holds}" if row.holds else verdict


if __name__ == "__main__":
    main()
