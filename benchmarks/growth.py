"""How time and memory grow with the prompt, the batch and the model, beside what this host could do at best.

``python -m benchmarks.growth MODEL``: checkpoints of the model's shapes with 2, 8 and 30 layers and random
weights (speed does not know what they say). From one place in the middle (512 tokens, batch 1, all layers)
one of the three is varied at a time. Each point is a fresh process: one request for its memory, then timed
rounds. Beside it stands the bound of ``open_autoglm.roofline`` at that very place. Of each export the peak
memory of its process is kept. ``--large`` adds a GLM of 1.5 billion parameters (3 GB of disk in bf16, and
the exports).

No point goes on beyond the time limit, and none is begun that would, going by those before it: it is kept
with the reason "skipped: time". Results are saved after each point.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console

from benchmarks.growth_child import MeasuredExport
from benchmarks.growth_points import (
    MIDDLE_PROMPT_TOKENS,
    Bounds,
    Export,
    Figures,
    Place,
    Point,
    expected_s,
    growth_table,
    places,
)
from benchmarks.laboratory import Laboratory, open_laboratory, save
from benchmarks.plots import growth_plot
from benchmarks.random_model import RandomModelDone, RandomModelJob
from open_autoglm import engines
from open_autoglm.checkpoint import load_config
from open_autoglm.engines.contract import ExportContext
from open_autoglm.export.store import ExportJob
from open_autoglm.files import digest_of, write_atomic
from open_autoglm.measure.isolation import Answer, Failure, run_isolated
from open_autoglm.measure.jobs import RoundJob
from open_autoglm.measure.lease import device_lease, preparing
from open_autoglm.measure.statistics import summarise
from open_autoglm.roofline import bound
from open_autoglm.schemas import Candidate, ExportedModel, Model, Round, Trial
from open_autoglm.trials import Conversation, Stopped, begin_trial, export_trial, exported_of

RESULT = Path(__file__).parent / "results" / "growth.json"
EXPORTED = ("onnxruntime-w8a8", "onnxruntime-w8-b32")
SMALL_ONLY = "torch-bf16"
SMALL_TOKENS = 2048
"""Of a whole batch: beyond these torch takes longer than it has to tell."""

OUTPUT_TOKENS, ROUNDS = 16, 3
LIMIT_S = 420.0
NO_TIME_S = 0.01
LARGE = "1.5B"
LARGE_CONFIG = MappingProxyType(
    {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 59264,
    }
)  # fmt: skip
"""The shape of glm-edge-1.5b, with the tokenizer of the model named."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.growth", description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=_numbers, default=(128, 512, 2048, 8192))
    parser.add_argument("--batches", type=_numbers, default=(1, 4, 16))
    parser.add_argument("--layers", type=_numbers, default=(2, 8, 30))
    parser.add_argument("--large", action="store_true", help="also a GLM of 1.5 billion parameters")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="no point goes on for longer")
    parser.add_argument("--json", type=Path, default=RESULT)
    asked = parser.parse_args()
    context = load_config(asked.model).max_position_embeddings
    todo = places(asked.prompts, asked.batches, asked.layers, context - OUTPUT_TOKENS)
    if asked.large:
        todo.append(Place(model=LARGE, prompt_tokens=MIDDLE_PROMPT_TOKENS, batch_size=1, curves=()))
    with tempfile.TemporaryDirectory(prefix="autoglm-growth-") as folder:
        growth = Growth(asked.model, Path(folder), asked.limit_s, asked.json)
        for place in todo:
            growth.visit(place, candidates_at(place))
    report(growth, asked.json)


def candidates_at(place: Place) -> tuple[str, ...]:
    """Ids of those worth taking there."""
    small = place.model != LARGE and place.prompt_tokens * place.batch_size <= SMALL_TOKENS
    return (*EXPORTED, SMALL_ONLY) if small else EXPORTED


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def report(growth: Growth, path: Path) -> None:
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 150)
    console.print(growth_table(growth.points, growth.exports))
    for form in ("png", "svg"):
        write_atomic(path.with_suffix(f".{form}"), growth_plot(growth.points, form))


class Growth:
    """The points as they are taken, and saved as ``path``; models and exports are made when first needed, and
    kept in ``folder``. All of it ends after ``limit_s`` seconds, whatever is left."""

    def __init__(self, like: Path, folder: Path, limit_s: float, path: Path) -> None:
        self._like, self._folder, self._path = like, folder, path
        self._ends = time.monotonic() + limit_s
        self._laboratories: dict[str, Laboratory] = {}
        self._exported: dict[tuple[str, str], ExportedModel | Failure] = {}
        self.points: list[Point] = []
        self.exports: list[Export] = []
        self.hardware: dict[str, Any] = {}

    def visit(self, place: Place, names: Sequence[str]) -> list[Point]:
        """The candidates of these ids at one place; each is saved at once."""
        found = []
        for name in names:
            found.append(self._point(place, name))
            self._note(found[-1])
        return found

    def _note(self, point: Point) -> None:
        self.points.append(point)
        results = {
            "points": [taken.model_dump(mode="json") for taken in self.points],
            "exports": [export.model_dump(mode="json") for export in self.exports],
            "hardware": self.hardware,
        }
        save(self._path, results)
        took = f"TTFT {point.figures.ttft_ms.median:.0f} ms" if point.figures else point.reason
        sys.stderr.write(f"{point.place.name}, {point.candidate}: {took}\n")

    # ── a point ──────────────────────────────────────────────────────────────────────────────────

    def _point(self, place: Place, name: str) -> Point:
        point = Point(place=place, candidate=name)
        try:
            self._require_time(place, name)
            laboratory = self._laboratory(place)
            candidate = next(c for c in laboratory.candidates() if c.id == name)
            files = self._files(laboratory, place, candidate)
            trial = begin_trial(laboratory.bench.study, candidate).model_copy(update={"exported": files})
            began = time.monotonic()
            figures = _figures(laboratory, trial, self._ends)
        except Stopped as stopped:
            return point.model_copy(update={"reason": why(stopped.failure)})
        return point.model_copy(update={"figures": figures, "seconds": time.monotonic() - began})

    def _require_time(self, place: Place, name: str) -> None:
        """Raises Stopped if the point is not expected to be done in time."""
        left, needed = left_s(self._ends), expected_s(place, name, ROUNDS + 1, self.points, self.exports)
        if left == NO_TIME_S:
            raise Stopped(Failure("timed_out", "none left"))
        if left < needed:
            raise Stopped(Failure("timed_out", f"about {needed:.0f} s needed, {left:.0f} s left"))

    # ── models and exports ───────────────────────────────────────────────────────────────────────

    def _laboratory(self, place: Place) -> Laboratory:
        """The model at that workload, opened once. Raises Stopped."""
        if place.name not in self._laboratories:
            model = self._folder / f"model-{place.model}"
            if not model.exists():
                self._write_model(place.model, model)
            self._laboratories[place.name] = open_laboratory(
                str(model),
                self._folder / place.name,
                prompt_tokens=place.prompt_tokens,
                output_tokens=OUTPUT_TOKENS,
                batch_size=place.batch_size,
                rounds=ROUNDS,
            )
        laboratory = self._laboratories[place.name]
        self.hardware = laboratory.bench.hardware.model_dump(mode="json")
        return laboratory

    def _write_model(self, name: str, output: Path) -> None:
        changes = dict(LARGE_CONFIG) if name == LARGE else {"num_hidden_layers": int(name)}
        dtype = "bfloat16" if name == LARGE else "float32"
        job = RandomModelJob(like=self._like, output=output, changes=changes, dtype=dtype)
        with preparing():
            done = run_isolated(
                "benchmarks.random_model:write_random_model",
                job,
                RandomModelDone,
                log=self._folder / f"{output.name}.log",
                timeout_s=left_s(self._ends),
            )
        if isinstance(done, Failure):
            raise Stopped(done)

    def _files(self, laboratory: Laboratory, place: Place, candidate: Candidate) -> ExportedModel:
        """The candidate's export, made at the first place that needs it. Raises Stopped."""
        if engines.get(candidate.engine).recipe(candidate) is None:
            bench = laboratory.bench
            trial = begin_trial(bench.study, candidate)
            return exported_of(export_trial(bench.study, bench.checkpoint, trial, laboratory.settings))
        key = place.model, candidate.id
        if key not in self._exported:
            self._exported[key] = self._export(laboratory, place, candidate)
        files = self._exported[key]
        if isinstance(files, Failure):
            raise Stopped(files)
        return files

    def _export(self, laboratory: Laboratory, place: Place, candidate: Candidate) -> ExportedModel | Failure:
        """Not from the store, so that its memory can be read."""
        checkpoint = laboratory.bench.checkpoint
        output = self._folder / f"export-{place.model}-{candidate.id}"
        output.mkdir()
        context = ExportContext(output=output, ledger=laboratory.settings.ledger)
        with preparing():
            done = run_isolated(
                "benchmarks.growth_child:export_measured",
                ExportJob(candidate=candidate, checkpoint=checkpoint, context=context),
                MeasuredExport,
                log=output.with_suffix(".log"),
                timeout_s=left_s(self._ends),
            )
        export = Export(model=place.model, candidate=candidate.id, checkpoint_bytes=checkpoint.weight_bytes)
        if isinstance(done, Failure):
            self.exports.append(export.model_copy(update={"reason": why(done)}))
            return Failure(done.status, f"export: {done.reason}")
        measured = {"seconds": done.seconds, "peak_rss_bytes": done.peak_rss_bytes}
        self.exports.append(export.model_copy(update=measured))
        return ExportedModel(
            candidate_id=candidate.id,
            path=output,
            digest=digest_of([checkpoint.digest, candidate.id]),
            route=done.route,
            size_bytes=sum(file.stat().st_size for file in output.iterdir()),
            build_s=done.seconds,
            reused=False,
        )


def left_s(ends: float) -> float:
    """Seconds until ``ends`` on the monotonic clock, or next to nothing: what a child gets for an answer."""
    return max(NO_TIME_S, round(ends - time.monotonic(), 1))


def why(failure: Failure) -> str:
    """Every child may take all the time that is left, so one that was too slow was so for that."""
    told = "skipped: time" if failure.status == "timed_out" else failure.status
    return f"{told}: {failure.reason}"


class TimedConversation(Conversation):
    """One whose every answer has to come before ``ends``."""

    def __init__(self, laboratory: Laboratory, trial: Trial, log: Path, ends: float) -> None:
        self._ends = ends
        super().__init__(laboratory.bench, trial, log, laboratory.settings)

    def ask(self, name: str, payload: Model, answer_type: type[Answer]) -> Answer:
        self._timeout_s = left_s(self._ends)
        return super().ask(name, payload, answer_type)


def _figures(laboratory: Laboratory, trial: Trial, ends: float) -> Figures:
    """Of a fresh process: memory of one request, then the rounds. Raises Stopped."""
    log = laboratory.bench.study.log_path(f"{trial.id}-growth")
    with TimedConversation(laboratory, trial, log, ends) as talk:
        footprint = talk.first_request().footprint
        with device_lease("cpu", alone=True):
            taken = [talk.ask("timed_round", RoundJob(index=index), Round) for index in range(ROUNDS)]
    return Figures(
        ttft_ms=summarise([ms for r in taken for ms in r.ttft_ms], "ms"),
        tpot_ms=summarise([ms for r in taken for ms in r.tpot_ms], "ms"),
        footprint=footprint,
        bounds=_bounds(laboratory, trial.candidate),
        disturbed_rounds=sum(bool(r.conditions.disturbances) for r in taken),
    )


def _bounds(laboratory: Laboratory, candidate: Candidate) -> Bounds:
    """At the candidate's own bits per weight."""
    profile, hardware, spec = laboratory.analysis.profile, laboratory.bench.hardware, laboratory.bench.spec
    bits = candidate.precision, candidate.weight_bits
    return Bounds(
        ttft_ms=bound(profile, hardware, spec, "prefill", *bits).bound_ms,
        tpot_ms=bound(profile, hardware, spec, "decode", *bits).bound_ms,
    )


if __name__ == "__main__":
    main()
