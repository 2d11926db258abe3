"""A request that no client sent, to see what a served model says and how long it takes.

It goes to the engine directly: past the queue and its limits, into no metric of the service, and reads all of
its prompt although a client may have asked the same a moment ago. It ends after so many tokens and at no end
token, as in the study's rounds: times of answers of different lengths cannot be compared.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Sequence

from open_autoglm.schemas import Model
from open_autoglm.serving.messages import Generation, Sampling, Token
from open_autoglm.serving.service import Service

_numbers = itertools.count()


class GaveWay(Exception):
    """The replay was given up in favour of requests that somebody waits for."""

    def __init__(self, until_then: Replay | None) -> None:
        super().__init__("clients came")
        self.until_then = until_then
        """The tokens before the last, during which nobody had come yet; None if there were none."""


class Replay(Model):
    """A greedy answer and its times."""

    tokens: tuple[int, ...]
    likeliest: tuple[tuple[tuple[int, float], ...], ...]
    """Per token, ids and natural logarithms of probabilities, best first; as many as were asked for."""
    ttft_ms: float
    e2e_ms: float

    @property
    def tpot_ms(self) -> float | None:
        """Of the tokens after the first; None if there are none."""
        later = len(self.tokens) - 1
        return (self.e2e_ms - self.ttft_ms) / later if later else None


async def replay(
    service: Service,
    prompt: Sequence[int],
    output_tokens: int,
    *,
    likeliest: int | None = None,
    unless: Callable[[], bool] = lambda: False,
) -> Replay:
    """Let ``service`` continue ``prompt`` greedily, by exactly so many tokens.

    After each token ``unless`` is asked whether to give up. Raises EngineLost, NotFinite, GaveWay.
    """
    generation = Generation(
        id=f"replay-{next(_numbers)}",
        prompt=tuple(prompt),
        max_tokens=output_tokens,
        sampling=Sampling(logprobs=likeliest),
        fresh=True,
    )
    begin_s = time.perf_counter()
    found: list[tuple[Token, float]] = []
    async with contextlib.aclosing(service.engine.generate(generation)) as tokens:
        async for token in tokens:
            found.append((token, time.perf_counter() - begin_s))
            if token.finish is None and unless():
                raise GaveWay(_replay(found[:-1]) if len(found) > 1 else None)
    return _replay(found)


def _replay(found: Sequence[tuple[Token, float]]) -> Replay:
    """Of tokens and when they came, in seconds since the beginning."""
    return Replay(
        tokens=tuple(token.token for token, _ in found if token.token is not None),
        likeliest=tuple(token.likeliest for token, _ in found),
        ttft_ms=1e3 * found[0][1],
        e2e_ms=1e3 * found[-1][1],
    )
