"""The engine contract: what a runtime must offer to be searched, measured, judged and served.

A third-party package adds an engine by one entry point in the group ``open_autoglm.engines``
whose value is a class with the methods of :class:`Engine`. The built-in engines use the same door.

An engine module imports its runtime inside methods only, so that listing engines costs nothing.
``probe``, ``propose`` and ``export`` run in the parent or in an export child; ``open`` runs in a
fresh child process that dies with its parent. Whatever ``open`` or the session raises becomes the
trial's ``reason``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from open_autoglm.schemas import (
    Analysis,
    Candidate,
    Checkpoint,
    Device,
    Dimension,
    ExportedModel,
    Hardware,
    Knob,
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
    threads: int = Field(ge=1, description="as many as the host gives; a candidate may ask for fewer")


@runtime_checkable
class Session(Protocol):
    """A loaded model with one KV cache. All rows of a batch have the same length, but see `Slotted`."""

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


@runtime_checkable
class Verifier(Session, Protocol):
    """A session that can also read several tokens in one call and forget some again, so that drafts can be
    verified (:mod:`open_autoglm.generation`). An engine whose sessions are such offers `draft_dimensions`."""

    def extend(self, tokens: Tokens) -> Logits:
        """Append ``int64[1, n]`` to the cache of one prompt; logits of each, ``float32[1, n, vocab]``.

        Raises ValueError when the cache is full.
        """
        ...

    def rewind(self, tokens: int) -> None:
        """Forget the last ``tokens`` tokens. Raises ValueError if it has not read so many."""
        ...


@runtime_checkable
class Slotted(Session, Protocol):
    """A session whose ``batch_size`` rows are slots, each with a sequence of its own length that grows, ends
    and makes room by itself: what a server needs that lets requests join and leave at any token.

    `prefill` and the rest of :class:`Session` use the slots from 0 on and empty all.
    """

    def append(self, slot: int, tokens: Tokens, *, every: bool = False) -> Logits:
        """Append ``int64[n]``, a prompt or a piece of one, to a slot; logits of the last one,
        ``float32[1, vocab]``, or with ``every`` of each, ``float32[n, vocab]``.

        Raises ValueError when the slot is full.
        """
        ...

    def advance(self, slots: Sequence[int], tokens: Tokens) -> Logits:
        """Append one token to each of these slots, ``int64[len(slots)]``, and to no other; their
        ``float32[len(slots), vocab]``. Raises ValueError when one of them is full.
        """
        ...

    def truncate(self, slot: int, length: int) -> None:
        """Keep the first ``length`` tokens of a slot; 0 empties it. Raises ValueError if it holds fewer."""
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

    def dimensions(
        self, candidate: Candidate, analysis: Analysis, spec: OptimizeSpec
    ) -> tuple[Dimension, ...]:
        """The knobs of ``candidate`` that the search may turn, each with the values worth trying here, the
        candidate's own among them; () if there is nothing to turn.

        Every knob named is in ``candidate.knobs``, and every combination of values is a candidate.
        """
        ...

    def variant(self, candidate: Candidate, knobs: Mapping[str, Knob]) -> Candidate:
        """``candidate`` with these knobs turned: neither vetoed nor the reference, baseline or incumbent.

        The id follows from the configuration alone: the same one has the same id, however it was reached.
        Raises KeyError for a knob that the candidate does not have.
        """
        ...

    def recipe(self, candidate: Candidate) -> dict[str, Any] | None:
        """What determines the exported files besides the checkpoint; None if it loads the checkpoint itself.

        Include the versions of the libraries that write the files: the recipe is the cache key. Leave out
        the knobs that only the session heeds, so that candidates that differ in those share their files.
        """
        ...

    def export(self, candidate: Candidate, checkpoint: Checkpoint, context: ExportContext) -> str:
        """Write the candidate's files into ``context.output``; return the name of the route taken."""
        ...

    def open(self, candidate: Candidate, exported: ExportedModel, options: SessionOptions) -> Session:
        """Load the model. Called in a fresh child process."""
        ...


RAN_ELSEWHERE = "ran_elsewhere"
"""A session's fact: which part of the model ran on another device or provider than the candidate names, in
words; absent if all of it ran there. A trial with it is failed: its figures are not of that candidate."""

PEAK_DEVICE_BYTES = "peak_device_bytes"
"""A session's fact: the most memory it held on a GPU, where its runtime tells."""


# ── what engines share ───────────────────────────────────────────────────────────────────────────

ALL_THREADS = "all"
"""Value of the knob ``threads``: as many as the host gives. A number is kept on any host."""


def threads_of(candidate: Candidate, options: SessionOptions) -> int:
    """The threads a session of ``candidate`` runs with: its knob ``threads``, or all there are."""
    asked = candidate.knobs.get("threads", ALL_THREADS)
    return options.threads if asked == ALL_THREADS else int(asked)


def thread_dimension(hardware: Hardware) -> Dimension:
    """All cores or half of them."""
    half = (hardware.cores // 2,) if hardware.cores > 1 else ()
    return Dimension(
        knob="threads",
        values=(ALL_THREADS, *half),
        because="decode waits for memory, and threads that share a core may wait for each other",
    )


CACHE_TOKENS = "cache_tokens"
"""Knob of engines whose files are built for one size of the KV cache: prompt and output together."""


def room_of(candidate: Candidate) -> int | None:
    """The longest cache that a session of ``candidate`` can be opened with; None if its files do not say."""
    built_for = candidate.knobs.get(CACHE_TOKENS)
    return None if built_for is None else int(built_for)


DRAFT_TOKENS = "draft_tokens"
"""Knob: tokens guessed and verified per decoding call, at most; 0 decodes one by one."""

NO_DRAFTS: Mapping[str, Knob] = MappingProxyType({DRAFT_TOKENS: 0})


def draft_tokens_of(candidate: Candidate) -> int:
    """How many tokens a generation by ``candidate`` drafts at most; 0 for an engine without the knob."""
    return int(candidate.knobs.get(DRAFT_TOKENS, 0))


def draft_dimensions(spec: OptimizeSpec) -> tuple[Dimension, ...]:
    """Drafts or none, where decoding counts and one prompt is answered at a time."""
    if spec.batch_size > 1 or spec.objective in ("ttft", "ttft_p95", "memory"):
        return ()
    because = "text that repeats itself is guessed right, and several tokens cost little more than one"
    return (Dimension(knob=DRAFT_TOKENS, values=(0, 7), because=because),)


def dimensions_around(candidate: Candidate, space: Sequence[Dimension]) -> tuple[Dimension, ...]:
    """``space`` seen from ``candidate``: its own value first, each value once, no knob without a choice."""
    seen = [
        dimension.model_copy(
            update={"values": tuple(dict.fromkeys((candidate.knobs[dimension.knob], *dimension.values)))}
        )
        for dimension in space
    ]
    return tuple(dimension for dimension in seen if len(dimension.values) > 1)


def knob_changes(before: Mapping[str, Knob], after: Mapping[str, Knob]) -> str:
    """``block_size 16 instead of 32, threads 1 instead of all``: what ``after`` turns; '' for nothing.

    ``after`` may leave out what stays. Raises KeyError for a knob that ``before`` does not have.
    """
    turned = [(knob, value, before[knob]) for knob, value in after.items() if value != before[knob]]
    return ", ".join(f"{knob} {value} instead of {former}" for knob, value, former in turned)


def because_of(candidate: Candidate, knobs: Mapping[str, Knob]) -> str:
    """Why the variant of ``candidate`` with these knobs is proposed."""
    changes = knob_changes(candidate.knobs, knobs)
    return f"{candidate.id} with {changes}" if changes else candidate.proposed_because
