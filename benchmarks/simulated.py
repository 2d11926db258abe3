"""A simulated host: engines of known speed under known kinds of noise, on a clock of its own.

Because the truth is known, it can be counted how often the measuring gets it wrong. Every process
has a constant factor of its own (memory layout, page colouring), every round a random one, and the
host adds what its kind of noise says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

from open_autoglm.schemas import FOREIGN_CPU_LIMIT, Conditions, Round

NoiseKind = Literal["gaussian", "heavy_tailed", "drifting", "bimodal", "noisy_neighbour"]
NOISE_KINDS: tuple[NoiseKind, ...] = ("gaussian", "heavy_tailed", "drifting", "bimodal", "noisy_neighbour")

ROUND_SD = 0.03
PROCESS_SD = 0.005

Slowdown = Callable[[float], tuple[float, float]]
"""From the host's time in seconds to the factor of the next round and the foreign cores seen in it."""


class SimulatedHost:
    """A runner of `racing.run_race`: one round takes the engine's true time × noise, and no time at all."""

    def __init__(self, true_ms: Mapping[str, float], noise: NoiseKind = "gaussian", seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)
        bias = np.exp(self._random.normal(0, PROCESS_SD, len(true_ms)))
        self._process_ms = {name: ms * float(b) for (name, ms), b in zip(true_ms.items(), bias, strict=True)}
        self._slowdown = _KINDS[noise](self._random)
        self._now_s = 0.0

    def __call__(self, contestant: str, index: int) -> Round:
        """One request of 65 tokens, an eighth of the time for the first one."""
        factor, foreign_cores = self._slowdown(self._now_s)
        e2e_ms = self._process_ms[contestant] * factor * math.exp(self._random.normal(0, ROUND_SD))
        self._now_s += e2e_ms / 1000
        return Round(
            index=index,
            ttft_ms=(e2e_ms / 8,),
            tpot_ms=(e2e_ms * 7 / 8 / 64,),
            e2e_ms=(e2e_ms,),
            token_ms=((),),
            output_tokens=(65,),
            duration_ms=e2e_ms,
            conditions=Conditions(foreign_cores=foreign_cores),
        )

    def clock(self) -> float:
        """Seconds of virtual time, which only rounds pass."""
        return self._now_s


def e2e_ms(timed: Round) -> float:
    """The figure that the simulated heats compare."""
    return timed.e2e_ms[0]


def _gaussian(_random: np.random.Generator) -> Slowdown:
    """Nothing but the noise of every round."""
    return lambda _now_s: (1.0, 0.0)


def _heavy_tailed(random: np.random.Generator) -> Slowdown:
    """A log-normal spread of 5 % more, and one round in twenty takes 1.5 to 3 times as long."""

    def slowdown(_now_s: float) -> tuple[float, float]:
        outlier = random.uniform(1.5, 3) if random.random() < 0.05 else 1.0
        return outlier * math.exp(random.normal(0, 0.05)), 0.0

    return slowdown


def _drifting(random: np.random.Generator) -> Slowdown:
    """±20 % over one to four minutes: a package that heats up and cools down."""
    period_s, phase = random.uniform(60, 240), random.uniform(0, 2 * math.pi)
    return lambda now_s: (1 + 0.2 * math.sin(2 * math.pi * now_s / period_s + phase), 0.0)


def _bimodal(random: np.random.Generator) -> Slowdown:
    """Two clock states, 15 % apart; the host changes between them about every twentieth round."""
    slow = random.random() < 0.5

    def slowdown(_now_s: float) -> tuple[float, float]:
        nonlocal slow
        slow ^= random.random() < 0.05
        return (1.15 if slow else 1.0), 0.0

    return slowdown


def _noisy_neighbour(random: np.random.Generator) -> Slowdown:
    """Bursts of 2.5 rounds that slow the host 1.3 to 2 times; nine rounds in ten of them are noticed."""
    burst: float | None = None

    def slowdown(_now_s: float) -> tuple[float, float]:
        nonlocal burst
        if burst is None:
            burst = random.uniform(1.3, 2) if random.random() < 0.1 else None
        elif random.random() < 0.4:
            burst = None
        if burst is None:
            return 1.0, 0.0
        return burst, 5 * FOREIGN_CPU_LIMIT if random.random() < 0.9 else 0.0

    return slowdown


_KINDS: dict[NoiseKind, Callable[[np.random.Generator], Slowdown]] = {
    "gaussian": _gaussian,
    "heavy_tailed": _heavy_tailed,
    "drifting": _drifting,
    "bimodal": _bimodal,
    "noisy_neighbour": _noisy_neighbour,
}
