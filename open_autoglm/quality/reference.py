"""What candidates are judged on (the evaluation set) and against (the reference's predictions).

One fp32 pass over each window serves both paths: the positions scored one token at a time are among
those scored in one batch. The reference keeps its 256 likeliest tokens per position, not all of a
vocabulary of 150 000, so a divergence computed from it is a lower bound (:func:`quality.metrics.coarse_kl`).
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from open_autoglm.engines.contract import Logits, Session, Tokens
from open_autoglm.errors import CheckpointError, UserError
from open_autoglm.files import sha256_file, write_atomic
from open_autoglm.generation import greedy
from open_autoglm.quality.texts import TEXTS, load_tokenizer, windows
from open_autoglm.schemas import Checkpoint, GoldenPrompt, Model, OptimizeSpec

SHORTEST_PROMPT_TOKENS = 128
LONGEST_PROMPT_TOKENS = 2048
SHORTEST_CONTEXT_TOKENS = 64
LEAST_WINDOWS = 2  # per text
DECODE_TOKENS = 192  # per window, at most: short, so that a clear case can be settled after few
GREEDY_TOKENS = 32
TOP_TOKENS = 256
ROWS_AT_A_TIME = 64  # positions whose whole vocabulary is worked on at once: bounds memory


class Layout(Model):
    """How many windows of each text there are, how long, and which part of them is decoded.

    The first ``prompt_tokens`` of a window are as many as the workload's prompts have, so that the
    kernels that are judged are the ones that are timed. The prefill path scores each of them; the decode
    path prefills them and is then fed the next ``decode_tokens`` true tokens, one per call. Greedy
    continuations start from the same prefix of each text's first window. A session needs room for
    ``window_tokens``. A path whose verdict is clear early leaves the remaining windows unread.
    """

    windows: int = Field(description="per text")
    window_tokens: int
    prompt_tokens: int
    decode_tokens: int = Field(description="per window")
    greedy_tokens: int

    @property
    def decode_positions(self) -> slice:
        """Positions, within a window, of the tokens fed one at a time."""
        return slice(self.prompt_tokens, self.prompt_tokens + self.decode_tokens)


class EvaluationSet(Model):
    """Token windows of real text, ``int64[texts, windows, window_tokens]`` in a ``.npy`` file."""

    path: Path
    sha256: str
    texts: tuple[str, ...]
    layout: Layout
    vocab_size: int
    seed: int

    def load(self) -> Tokens:
        """The windows. Raises ValueError if the file is not the one that was made."""
        if sha256_file(self.path) != self.sha256:
            raise ValueError(f"{self.path} has changed since the evaluation set was made: make it again")
        tokens: Tokens = np.load(self.path)
        return tokens[:, : self.layout.windows]

    def first(self, windows: int | None) -> Self:
        """The same set with only the first ``windows`` of each text; the file stays whole."""
        if windows is None or windows >= self.layout.windows:
            return self
        layout = self.layout.model_copy(update={"windows": windows})
        return self.model_copy(update={"layout": layout})


class Predictions(NamedTuple):
    """What the reference predicts at each position; the leading axes are the positions asked for."""

    log_prob: NDArray[np.float32]
    """Of the true next token, in nats: ``[...]``."""
    top1: NDArray[np.int32]
    """The likeliest token: ``[...]``."""
    top_ids: NDArray[np.int32]
    """The likeliest tokens, in no order: ``[..., 256]``."""
    top_log_probs: NDArray[np.float32]
    """Their log-probabilities in nats: ``[..., 256]``."""

    def at(self, index: Any) -> Predictions:
        """The positions that ``index`` selects from the leading axes."""
        return Predictions(*(array[index] for array in self))


@dataclass(frozen=True)
class Reference:
    """What the reference predicts and writes."""

    predictions: Predictions
    """``[texts, windows, window_tokens - 1]``"""
    greedy: Tokens
    """``int64[texts, greedy_tokens]``"""

    @classmethod
    def load(cls, path: Path, evaluation_set: EvaluationSet) -> Self:
        """Read what `compute_reference` saved. Raises ValueError if it is of another evaluation set."""
        with np.load(path) as saved:
            if str(saved["evaluation_set"]) != evaluation_set.sha256:
                raise ValueError(f"{path} belongs to another evaluation set: compute the reference again")
            return cls(
                predictions=Predictions(*(saved[name] for name in Predictions._fields)),
                greedy=saved["greedy"],
            )


def golden_prompts(
    evaluation_set: EvaluationSet, reference: Path, same_tokens: Sequence[int]
) -> tuple[GoldenPrompt, ...]:
    """The prompts that were continued greedily, with the reference's continuations; ``same_tokens`` are a
    report's ``greedy_same_tokens``. Raises ValueError if the files are not those of the evaluation."""
    prompts = evaluation_set.load()[:, 0, : evaluation_set.layout.prompt_tokens]
    answers = Reference.load(reference, evaluation_set).greedy
    return tuple(
        GoldenPrompt(prompt=tuple(prompt.tolist()), answer=tuple(answer.tolist()), same_tokens=same)
        for prompt, answer, same in zip(prompts, answers, same_tokens, strict=True)
    )


class NonFiniteError(ArithmeticError):
    """A session returned NaN or infinity."""


def make_evaluation_set(checkpoint: Checkpoint, spec: OptimizeSpec, path: Path) -> EvaluationSet:
    """Draw the windows of both texts with ``spec.seed`` and save them as ``path``, atomically.

    Raises UserError if the context or the texts are too short.
    """
    layout = plan_layout(checkpoint.context_tokens, spec)
    tokenizer = load_tokenizer(checkpoint)
    shape = layout.windows, layout.window_tokens
    buffer = io.BytesIO()
    np.save(buffer, np.stack([windows(tokenizer, kind, "eval", *shape, spec.seed) for kind in TEXTS]))
    write_atomic(path, buffer.getvalue())
    return EvaluationSet(
        path=path,
        sha256=sha256_file(path),
        texts=TEXTS,
        layout=layout,
        vocab_size=checkpoint.vocab_size,
        seed=spec.seed,
    )


def plan_layout(context_tokens: int, spec: OptimizeSpec) -> Layout:
    """Spread at most ``spec.quality_tokens`` decoded tokens over two or more windows of each text.

    The default of 3072 gives 8 windows of 192 decoded tokens per text. Prompts shorter than 128 tokens are
    judged at 128, where a context means something. Raises UserError if the context is too short.
    """
    if context_tokens < SHORTEST_CONTEXT_TOKENS:
        raise UserError(
            f"the model's context of {context_tokens} tokens is too short to judge its quality: "
            f"at least {SHORTEST_CONTEXT_TOKENS} are needed"
        )
    prompt = min(max(SHORTEST_PROMPT_TOKENS, spec.prompt_tokens), LONGEST_PROMPT_TOKENS)
    # Leave room to decode; the last token of a window has no successor to be scored on.
    prompt = min(prompt, context_tokens - min(DECODE_TOKENS, (context_tokens - 1) // 2) - 1)
    decodable = min(DECODE_TOKENS, context_tokens - prompt - 1)
    per_text = max(LEAST_WINDOWS, math.ceil(spec.quality_tokens / (len(TEXTS) * decodable)))
    decoded = spec.quality_tokens // (len(TEXTS) * per_text)
    return Layout(
        windows=per_text,
        window_tokens=prompt + decoded + 1,
        prompt_tokens=prompt,
        decode_tokens=decoded,
        greedy_tokens=min(GREEDY_TOKENS, decoded),
    )


def compute_reference(session: Session, evaluation_set: EvaluationSet, out: Path) -> None:
    """Run the fp32 ``session`` over the evaluation set and save what :class:`Reference` loads, atomically.

    One window's logits are held at a time. Raises CheckpointError if they are not finite: then the
    fault is in the weights, and there is nothing to judge candidates against.
    """
    layout, tokens = evaluation_set.layout, evaluation_set.load()
    texts, per_text, length = tokens.shape
    described, greedy = [], []
    try:
        for window in tokens.reshape(-1, length):
            logits = all_logits(session, window[:-1], evaluation_set.vocab_size)
            described.append(describe(logits, window[1:]))
            del logits  # or two windows' worth of them would be held during the next pass
        for prompt in tokens[:, 0, : layout.prompt_tokens]:
            greedy.append(continue_greedily(session, prompt[None], layout.greedy_tokens)[0])
    except NonFiniteError as error:
        raise CheckpointError(
            f"the model's own fp32 logits are not finite ({error}): its weights hold NaN or infinity; "
            f"save or download the checkpoint again"
        ) from error
    predictions: dict[str, Any] = {
        name: np.stack(parts).reshape(texts, per_text, length - 1, *parts[0].shape[1:])
        for name, parts in zip(Predictions._fields, zip(*described, strict=True), strict=True)
    }
    buffer = io.BytesIO()
    np.savez(buffer, evaluation_set=np.array(evaluation_set.sha256), greedy=np.stack(greedy), **predictions)
    write_atomic(out, buffer.getvalue())


def all_logits(session: Session, window: Tokens, vocab_size: int) -> Logits:
    """Logits of every position of ``window[n]``, read in one call: ``float32[n, vocab]``."""
    batch = session.full_logits(window[None])
    require_shape(batch, (1, len(window), vocab_size))
    logits: Logits = batch[0]
    return logits


def describe(logits: Logits, targets: Tokens) -> Predictions:
    """Predictions of ``logits[n, vocab]`` about the true next tokens ``targets[n]``."""
    keep = min(TOP_TOKENS, logits.shape[-1])
    parts = []
    for rows in slices(len(targets), ROWS_AT_A_TIME):
        some = logits[rows]
        top_ids = np.argpartition(some, -keep, axis=-1)[:, -keep:].astype(np.int32)
        log_probs = log_probs_of(some, np.concatenate([targets[rows, None], top_ids], axis=1))
        top1 = some.argmax(axis=-1).astype(np.int32)
        parts.append(Predictions(log_probs[:, 0], top1, top_ids, log_probs[:, 1:]))
    return Predictions(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def log_probs_of(logits: Logits, ids: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
    """Log-softmax of ``logits[n, vocab]`` at ``ids[n, k]``, in nats: ``float32[n, k]``.

    Reference and candidate both pass through here, so equal logits give equal bits.
    Raises NonFiniteError.
    """
    require_finite(logits)
    peak = logits.max(axis=-1, keepdims=True)
    normaliser = np.log(np.exp(logits - peak).sum(axis=-1, keepdims=True, dtype=np.float64))
    chosen = np.take_along_axis(logits, ids, axis=-1) - peak.astype(np.float64)
    log_probs: NDArray[np.float32] = (chosen - normaliser).astype(np.float32)
    return log_probs


def require_finite(logits: Logits) -> None:
    """Raise NonFiniteError unless every number is finite."""
    bad = logits.size - int(np.count_nonzero(np.isfinite(logits)))
    if bad:
        raise NonFiniteError(f"{bad} of {logits.size} are NaN or infinite")


def require_shape(logits: Logits, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless a session returned what the contract promises."""
    if logits.shape != shape:
        raise ValueError(f"the engine returned logits of shape {logits.shape}, expected {shape}")


def continue_greedily(session: Session, prompts: Tokens, count: int, draft_tokens: int = 0) -> Tokens:
    """Extend ``prompts[rows, n]`` by the likeliest token ``count`` times: ``int64[rows, count]``."""
    chosen: list[Tokens] = []
    for step in greedy(session, prompts, count, draft_tokens):
        require_finite(step.logits)
        chosen.append(step.tokens)
    return np.concatenate(chosen, axis=1)


def slices(total: int, size: int) -> Sequence[slice]:
    """Consecutive slices of at most ``size`` that cover ``range(total)``."""
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]
