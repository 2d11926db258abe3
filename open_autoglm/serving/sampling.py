"""From logits to a token."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from open_autoglm.engines.contract import Logits
from open_autoglm.serving.messages import Sampling

_NUCLEI = (512, 8192)
"""Tokens sorted before the whole vocabulary is: nearly always as many as top-p asks for."""


class Choice(NamedTuple):
    token: int
    logprob: float | None
    likeliest: tuple[tuple[int, float], ...]


def choose(logits: Logits, sampling: Sampling, random: np.random.Generator | None) -> Choice:
    """The next token by ``float32[vocab]`` and, if asked for, logarithms of probabilities at temperature 1.

    One number is drawn from ``random`` for each token that is not simply the likeliest; None suffices for one
    that is.
    """
    if random is None or sampling.temperature == 0:
        token = int(logits.argmax())
    else:
        # The largest becomes 0 before it is divided: a tiny temperature would make it infinite.
        below = logits.astype(np.float64) - float(logits.max())
        token = _draw(below / sampling.temperature, sampling.top_p, random)
    if sampling.logprobs is None:
        return Choice(token, None, ())
    logs = _log_softmax(logits)
    best = _largest(logs, sampling.logprobs)
    return Choice(token, float(logs[token]), tuple((int(i), float(logs[i])) for i in best))


def _draw(scaled: NDArray[np.float64], top_p: float, random: np.random.Generator) -> int:
    """Nucleus sampling (Holtzman et al., "The curious case of neural text degeneration", 2020), by logits of
    which the largest is 0."""
    shares = np.exp(scaled)
    shares /= shares.sum()
    if top_p == 1:
        return _pick(np.arange(len(shares)), shares, random)
    for size in (*_NUCLEI, len(shares)):
        order = _largest(shares, min(size, len(shares)))
        below = np.cumsum(shares[order])
        if below[-1] >= top_p or size == len(shares):
            break
    kept = order[: int(np.searchsorted(below, top_p)) + 1]
    return _pick(kept, shares[kept], random)


def _largest(values: NDArray[np.float64], count: int) -> NDArray[np.intp]:
    """Indices of the ``count`` largest, the largest first."""
    found = np.argpartition(-values, max(0, count - 1))[:count]
    return found[np.argsort(-values[found], kind="stable")]


def _pick(tokens: NDArray[np.intp], shares: NDArray[np.float64], random: np.random.Generator) -> int:
    below = np.cumsum(shares)
    place = np.searchsorted(below, random.random() * below[-1], side="right")
    return int(tokens[min(int(place), len(tokens) - 1)])


def _log_softmax(logits: Logits) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - float(logits.max())
    logs: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return logs
