"""The requests every candidate is timed on: real text of stated lengths, drawn once per study.

Each round, and each row of a batch, reads another prompt. A runtime that keeps the KV cache of a prompt
it has seen (OpenVINO GenAI does) would otherwise be timed on a look-up instead of a prefill.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from open_autoglm.engines.contract import Tokens
from open_autoglm.errors import UserError
from open_autoglm.files import sha256_file, write_atomic
from open_autoglm.quality.texts import TEXTS, encode, load_tokenizer
from open_autoglm.schemas import Checkpoint, OptimizeSpec, Workload

POOL_ROUNDS = 64
"""Different rounds in a workload where the texts are long enough: a longer run meets its prompts again."""

POOL_BYTES = 32 * 2**20
"""Prompts are kept below this if possible: every child loads them, and they count in its peak RSS."""

SERVER_REQUESTS = 12
"""Arrivals in one round of the server scenario: enough for a queue to build up, few enough to repeat."""


@dataclass(frozen=True, eq=False)
class Request:
    """What one call of the model is asked."""

    tokens: Tokens
    """``int64[batch, prompt]``, contiguous."""
    output_tokens: int
    """New tokens per row; every engine generates exactly so many, whatever it says."""
    arrival_ms: float = 0.0
    """Counted from the start of the round."""

    @property
    def lengths(self) -> tuple[int, int]:
        """(prompt tokens, output tokens)."""
        return self.tokens.shape[1], self.output_tokens


Requests = tuple[Request, ...]
"""One round's requests, in the order of their arrival."""


# ── drawing ──────────────────────────────────────────────────────────────────────────────────────


def make_workload(checkpoint: Checkpoint, spec: OptimizeSpec, path: Path) -> Workload:
    """Draw ``POOL_ROUNDS`` or more rounds of requests and save them as ``path``, atomically.

    The same checkpoint and spec give the same bytes. Where the texts are too short for that many
    different prompts, or the prompts too large for ``POOL_BYTES``, there are fewer rounds, but at least
    ``spec.rounds``. Raises UserError if the texts are too short even for those, or if the spec asks for
    a server without a rate or with a batch.
    """
    serving = spec.scenario == "server"
    if serving:
        _require_servable(spec)
    tokenizer = load_tokenizer(checkpoint)
    drawn = _draw(spec, [encode(tokenizer, kind, "eval") for kind in TEXTS])
    buffer = io.BytesIO()
    np.savez(buffer, **drawn._asdict())  # dates every entry 1980, so the bytes do not depend on the day
    write_atomic(path, buffer.getvalue())
    rounds, requests = drawn.arrivals_ms.shape
    longest_prompt, longest_output = map(int, _kinds(spec)[0].max(axis=0))
    return Workload(
        path=path,
        sha256=sha256_file(path),
        scenario=spec.scenario,
        batch_size=spec.batch_size,
        prompt_tokens=longest_prompt,
        output_tokens=longest_output,
        rounds=rounds,
        requests=requests,
        request_rate_per_s=spec.request_rate_per_s if serving else None,
        length_mix=spec.length_mix,
        slo_ttft_ms=spec.max_latency.ms if serving and spec.max_latency else None,
        slo_tpot_ms=spec.max_tpot.ms if serving and spec.max_tpot else None,
        seed=spec.seed,
        corpus=" and ".join(f"{kind}.eval" for kind in TEXTS),
    )


class _Drawn(NamedTuple):
    """The arrays of the file, as :class:`Workload` describes them."""

    prompts: Tokens
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    arrivals_ms: NDArray[np.float64]


def _draw(spec: OptimizeSpec, texts: Sequence[Tokens]) -> _Drawn:
    """Prompts, lengths and arrivals, each from a generator of its own: another rate changes no prompt."""
    requests = SERVER_REQUESTS if spec.scenario == "server" else 1
    rows = requests * spec.batch_size
    kinds, shares = _kinds(spec)
    longest = int(kinds[:, 0].max())
    rounds = _pool_size(texts, rows, longest, least=spec.rounds)
    prompts = draw_prompts(texts, rounds * rows, longest, spec.seed).reshape(rounds, rows, longest)
    chosen = np.random.default_rng((spec.seed, 1)).choice(len(kinds), size=(rounds, requests), p=shares)
    prompt_tokens, output_tokens = kinds[chosen, 0], kinds[chosen, 1]
    return _Drawn(
        prompts=_padded(prompts, prompt_tokens),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        arrivals_ms=_arrivals_ms(spec, rounds, requests),
    )


def _require_servable(spec: OptimizeSpec) -> None:
    if spec.request_rate_per_s is None:
        raise UserError(
            "the server scenario needs to know how many requests arrive per second: add --request-rate-per-s"
        )
    if spec.batch_size != 1:
        raise UserError(
            f"in the server scenario requests arrive one by one, but the batch size is {spec.batch_size}: "
            "ask for a batch size of 1, or for the offline scenario"
        )


def _kinds(spec: OptimizeSpec) -> tuple[NDArray[np.int64], list[float]]:
    """(prompt, output) lengths as ``int64[kinds, 2]``, and the share of each."""
    if spec.length_mix is None:
        return np.array([[spec.prompt_tokens, spec.output_tokens]], dtype=np.int64), [1.0]
    prompts, outputs, shares = zip(*spec.length_mix.shares, strict=True)
    return np.array([prompts, outputs], dtype=np.int64).T, list(shares)


def _pool_size(texts: Sequence[Tokens], rows: int, length: int, least: int) -> int:
    """How many rounds of ``rows`` prompts to draw."""
    different = len(texts) * min(len(text) for text in texts)
    affordable = POOL_BYTES // (length * np.dtype(np.int64).itemsize)
    return max(least, min(POOL_ROUNDS, min(different, affordable) // rows))


def draw_prompts(texts: Sequence[Tokens], count: int, length: int, seed: int) -> Tokens:
    """``count`` different prompts, ``int64[count, length]``, alternating between the texts of ``TEXTS``.

    Prompts of one text start evenly spaced, so they are disjoint as long as the text is long enough;
    beyond that they overlap but still start at different tokens. A text is read as a ring: a prompt
    that reaches its end goes on at its beginning. Raises UserError if there are more prompts than tokens.
    """
    generator = np.random.default_rng(seed)
    prompts = np.empty((count, length), dtype=np.int64)
    for first, (kind, text) in enumerate(zip(TEXTS, texts, strict=True)):
        wanted = len(range(first, count, len(TEXTS)))
        if wanted > len(text):
            raise UserError(
                f"{count} different prompts are needed, but the {kind} text has only {len(text)} tokens to "
                f"start one at: ask for fewer rounds or a smaller batch"
            )
        starts = generator.permutation(wanted) * len(text) // wanted + generator.integers(len(text))
        prompts[first :: len(TEXTS)] = text[(starts[:, None] + np.arange(length)) % len(text)]
    return prompts


def _padded(prompts: Tokens, prompt_tokens: NDArray[np.int64]) -> Tokens:
    """``prompts`` with zeros beyond each request's own length, which all its rows share."""
    rows_per_request = prompts.shape[1] // prompt_tokens.shape[1]
    ends = np.repeat(prompt_tokens, rows_per_request, axis=1)[..., None]
    return np.where(np.arange(prompts.shape[2]) < ends, prompts, 0)


def _arrivals_ms(spec: OptimizeSpec, rounds: int, requests: int) -> NDArray[np.float64]:
    """Poisson arrivals, ``float64[rounds, requests]``: a round starts with one, the gaps are exponential."""
    if spec.scenario != "server" or spec.request_rate_per_s is None:
        return np.zeros((rounds, requests))
    mean_ms = 1e3 / spec.request_rate_per_s
    gaps = np.random.default_rng((spec.seed, 2)).exponential(mean_ms, size=(rounds, requests))
    gaps[:, 0] = 0
    return gaps.cumsum(axis=1)


# ── reading ──────────────────────────────────────────────────────────────────────────────────────


def load_rounds(workload: Workload) -> list[Requests]:
    """The requests of each round. Raises ValueError if the file is not the one that was drawn."""
    if sha256_file(workload.path) != workload.sha256:
        raise ValueError(f"{workload.path} was changed after the workload was drawn")
    with np.load(workload.path) as saved:
        prompts, prompt_tokens = saved["prompts"], saved["prompt_tokens"]
        output_tokens, arrivals_ms = saved["output_tokens"], saved["arrivals_ms"]
    batch = workload.batch_size

    def request(turn: int, position: int) -> Request:
        rows = slice(position * batch, (position + 1) * batch)
        return Request(
            tokens=np.ascontiguousarray(prompts[turn, rows, : prompt_tokens[turn, position]]),
            output_tokens=int(output_tokens[turn, position]),
            arrival_ms=float(arrivals_ms[turn, position]),
        )

    return [
        tuple(request(turn, position) for position in range(prompt_tokens.shape[1]))
        for turn in range(len(prompts))
    ]


def distinct_lengths(rounds: Sequence[Requests]) -> list[tuple[int, int]]:
    """The (prompt, output) lengths that occur, the most frequent last; equals in the order of length."""
    found = Counter(request.lengths for request in chain.from_iterable(rounds))
    return sorted(found, key=lambda lengths: (found[lengths], lengths))


def warmup_request(rounds: Sequence[Requests], turn: int) -> Request:
    """What to warm up on in turn 0, 1, 2 …: one request of each length, then ever more of the most frequent.

    None waits for an arrival. They come from the end of the pool, so that the rounds that count,
    which begin at its start, read prompts the engine has not seen.
    """
    *rare, usual = distinct_lengths(rounds)
    lengths, place = (rare[turn], 0) if turn < len(rare) else (usual, turn - len(rare))
    alike = [r for r in chain.from_iterable(reversed(rounds)) if r.lengths == lengths]
    chosen = alike[place % len(alike)]
    return Request(chosen.tokens, chosen.output_tokens)


def short(requests: Requests, output_tokens: int) -> Requests:
    """The first request of a round, without an arrival, for at most ``output_tokens`` (at least 2) tokens."""
    first = requests[0]
    return (Request(first.tokens, min(first.output_tokens, output_tokens)),)
