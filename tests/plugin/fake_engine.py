"""A third-party engine, as pip would install it: put this folder on PYTHONPATH and it is discovered.

What it does wrong is written in a candidate's knobs: ``export`` and ``open`` each name an act below.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from typing import Any, NoReturn

from open_autoglm.engines.contract import ExportContext, Session, SessionOptions, because_of
from open_autoglm.schemas import (
    Analysis,
    Candidate,
    Checkpoint,
    Device,
    Dimension,
    ExportedModel,
    Knob,
    OptimizeSpec,
    Probe,
)


def candidate(name: str = "fake-crash", **knobs: str) -> Candidate:
    return Candidate(
        id=name,
        engine="fake",
        device="cpu",
        precision="fp32",
        weight_bits=32,
        knobs={"export": "works", "open": "segfaults", **knobs},
        proposed_because="a test wants to see what becomes of it",
    )


class FakeEngine:
    """Exports two small files; its only proposal ends the process when it is opened."""

    name = "fake"
    summary = "fails in every way a runtime can"

    def probe(self, device: Device) -> Probe:
        return Probe(engine=self.name, stage="ready", version="0", reason="always there")

    def propose(self, analysis: Analysis, spec: OptimizeSpec, device: Device) -> list[Candidate]:
        return [candidate()]

    def dimensions(
        self, candidate: Candidate, analysis: Analysis, spec: OptimizeSpec
    ) -> tuple[Dimension, ...]:
        return ()

    def variant(self, candidate: Candidate, knobs: Mapping[str, Knob]) -> Candidate:
        turned = {**candidate.knobs, **knobs}
        update = {
            "id": f"fake-{turned['export']}-{turned['open']}",
            "knobs": turned,
            "proposed_because": because_of(candidate, knobs),
        }
        return candidate.model_copy(update=update)

    def recipe(self, candidate: Candidate) -> dict[str, Any]:
        return {"export": candidate.knobs["export"]}

    def export(self, candidate: Candidate, checkpoint: Checkpoint, context: ExportContext) -> str:
        (context.output / "weights.bin").write_bytes(b"w" * 1000)
        if candidate.knobs["export"] == "raises":
            raise RuntimeError("no kernel for this model\nand more")
        if candidate.knobs["export"] == "segfaults":
            ctypes.string_at(0)
        if candidate.knobs["export"] == "ends":
            os._exit(0)
        (context.output / "deep").mkdir()
        (context.output / "deep" / "graph.txt").write_text(f"{checkpoint.name} as {candidate.id}")
        return "by hand"

    def open(self, candidate: Candidate, exported: ExportedModel, options: SessionOptions) -> Session:
        return self._segfault()

    def _segfault(self) -> NoReturn:
        ctypes.string_at(0)
        raise AssertionError("reading address 0 went well")
