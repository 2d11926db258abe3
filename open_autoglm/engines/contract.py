"""The engine contract: what a runtime must offer to be searched, measured, judged and served.

A third-party package adds an engine by one entry point in the group ``open_autoglm.engines``
whose value is a class with the methods of :class:`Engine`. The built-in engines use the same door.

An engine module imports its runtime inside methods only, so that listing engines costs nothing.
``probe``, ``propose`` and ``export`` run in the parent or in an export child; ``open`` runs in a
fresh child process that dies with its parent. Whatever ``open`` or the session raises becomes the
trial's ``reason``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from open_autoglm.schemas import (
    Analysis,
    Candidate,
    Checkpoint,
    Device,
    ExportedModel,
    Model,
    OptimizeSpec,
    Probe,
)

Tokens = NDArray[np.int64]
Logits = NDArray[np.float32]


class SessionOptions(Model):
    """What a session must have room for, and the threads it may use."""

    batch_size: int = Field(ge=1)
    max_tokens: int = Field(ge=2, description="prompt and output together: the size of the KV cache")
    threads: int = Field(ge=1)


@runtime_checkable
class Session(Protocol):
    """A loaded model with one KV cache. All rows of a batch have the same length."""

    def prefill(self, tokens: Tokens) -> Logits:
        """Empty the cache, read ``int64[batch, prompt]``; the last position's ``float32[batch, vocab]``."""
        ...

    def decode(self, tokens: Tokens) -> Logits:
        """Append one token per row, ``int64[batch]``, to the cache; return ``float32[batch, vocab]``.

        Raises ValueError when the cache is full.
        """
        ...

    def full_logits(self, tokens: Tokens) -> Logits:
        """Logits of every position, ``float32[batch, sequence, vocab]``, by the kernels `prefill` uses."""
        ...

    def facts(self) -> dict[str, str]:
        """What really runs: threads, provider or device, kernel choices; kept with the trial."""
        ...

    def close(self) -> None:
        """Free the runtime's memory. The session is not used again."""
        ...


class ExportContext(Model):
    """Where an engine may write, and what it may know, while it exports."""

    output: Path = Field(description="an empty directory; it becomes the export when `export` returns")
    ledger: Path = Field(description="which export routes work for which model type and versions")


class Engine(Protocol):
    """A pluggable runtime."""

    name: str
    """Unique, as written after ``--engines``."""

    summary: str
    """One line for ``open-autoglm engines``."""

    def probe(self, device: Device) -> Probe:
        """Say whether this engine can run on ``device`` here; cheap, imports no heavy library."""
        ...

    def propose(self, analysis: Analysis, spec: OptimizeSpec, device: Device) -> list[Candidate]:
        """Candidates worth trying for this model and request, each with its reason."""
        ...

    def recipe(self, candidate: Candidate) -> dict[str, Any] | None:
        """What determines the exported files besides the checkpoint; None if it loads the checkpoint itself.

        Include the versions of the libraries that write the files: the recipe is the cache key.
        """
        ...

    def export(self, candidate: Candidate, checkpoint: Checkpoint, context: ExportContext) -> str:
        """Write the candidate's files into ``context.output``; return the name of the route taken."""
        ...

    def open(self, candidate: Candidate, exported: ExportedModel, options: SessionOptions) -> Session:
        """Load the model. Called in a fresh child process."""
        ...
