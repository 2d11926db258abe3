"""A third-party engine, as pip would install it: put this folder on PYTHONPATH and it is discovered.

What it does wrong is written in a candidate's knobs: ``export`` and ``open`` each name an act below, and
``dies_at`` is the number of the request that its process does not survive, ``out_of_memory_at`` of the one
that its device has no memory for. ``delay_ms`` is how long it takes for a token, ``elsewhere`` what it says
that another provider ran.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np

from open_autoglm.engines.contract import (
    RAN_ELSEWHERE,
    ExportContext,
    Logits,
    Session,
    SessionOptions,
    Tokens,
    because_of,
)
from open_autoglm.export.tensorrt_api import DeviceOutOfMemoryError
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


def candidate(name: str = "fake-crash", **knobs: Knob) -> Candidate:
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
        if candidate.knobs["export"] == "lacks-device-memory":
            raise DeviceOutOfMemoryError("TensorRT 10.16 cannot build the graph: OutOfMemory (34 GB)")
        if candidate.knobs["export"] == "segfaults":
            ctypes.string_at(0)
        if candidate.knobs["export"] == "ends":
            os._exit(0)
        (context.output / "deep").mkdir()
        (context.output / "deep" / "graph.txt").write_text(f"{checkpoint.name} as {candidate.id}")
        return "by hand"

    def open(self, candidate: Candidate, exported: ExportedModel, options: SessionOptions) -> Session:
        match candidate.knobs["open"]:
            case "works":
                return FakeSession(**{name: candidate.knobs.get(name, 0) for name in FakeSession.KNOBS})
            case "gives-nan":
                return FakeSession(fill=np.nan)
            case "raises":
                raise RuntimeError("no kernel for this device\nand more")
            case "takes-all-memory":
                raise AssertionError(f"{len(bytearray(2**62))} bytes were there")
            case "hangs":
                time.sleep(3600)
        ctypes.string_at(0)
        raise AssertionError("reading address 0 went well")


class FakeSession:
    """Says the same of every token, after a millisecond or more."""

    KNOBS = ("dies_at", "out_of_memory_at", "delay_ms", "elsewhere")

    def __init__(
        self,
        fill: float = 0.0,
        dies_at: Knob = 0,
        out_of_memory_at: Knob = 0,
        delay_ms: Knob = 0,
        elsewhere: Knob = "",
    ) -> None:
        self._fill = fill
        self._delay_s = (1 + float(delay_ms)) / 1e3
        self._dies_at, self._out_of_memory_at = dies_at, out_of_memory_at
        self._elsewhere = elsewhere
        self._requests = 0

    def prefill(self, tokens: Tokens) -> Logits:
        self._requests += 1
        if self._requests == self._dies_at:
            ctypes.string_at(0)
        if self._requests == self._out_of_memory_at:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.decode(tokens)

    def decode(self, tokens: Tokens) -> Logits:
        time.sleep(self._delay_s)
        return np.full((len(tokens), 8), self._fill, dtype=np.float32)

    def full_logits(self, tokens: Tokens) -> NoReturn:
        raise AssertionError("it has nothing to be judged by")

    def facts(self) -> dict[str, str]:
        return {RAN_ELSEWHERE: str(self._elsewhere)} if self._elsewhere else {}

    def close(self) -> None:
        pass
