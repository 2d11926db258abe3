"""What stands for an engine whose package is broken: listed and vetoed with the reason, like any other that
cannot run here, so that one bad plug-in ends neither a command nor a study."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

from open_autoglm.engines.contract import ExportContext, Session, SessionOptions
from open_autoglm.schemas import (
    Analysis,
    Candidate,
    Checkpoint,
    Device,
    ExportedModel,
    Knob,
    OptimizeSpec,
    Probe,
)


class UnloadableEngine:
    """An engine that can only say why it is not there."""

    summary = "declared by an installed package that cannot be loaded"

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        self._reason = reason

    def probe(self, device: Device) -> Probe:
        return Probe(engine=self.name, stage="missing", reason=self._reason)

    def propose(self, analysis: Analysis, spec: OptimizeSpec, device: Device) -> list[Candidate]:
        return [
            Candidate(
                id=self.name.lower(),
                engine=self.name,
                device=device,
                precision="fp32",
                weight_bits=32,
                proposed_because=self.summary,
            )
        ]

    def dimensions(self, candidate: Candidate, analysis: Analysis, spec: OptimizeSpec) -> tuple[()]:
        return ()

    def variant(self, candidate: Candidate, knobs: Mapping[str, Knob]) -> NoReturn:
        raise RuntimeError(self._reason)

    def recipe(self, candidate: Candidate) -> NoReturn:
        raise RuntimeError(self._reason)

    def export(self, candidate: Candidate, checkpoint: Checkpoint, context: ExportContext) -> NoReturn:
        raise RuntimeError(self._reason)

    def open(self, candidate: Candidate, exported: ExportedModel, options: SessionOptions) -> Session:
        raise RuntimeError(self._reason)
