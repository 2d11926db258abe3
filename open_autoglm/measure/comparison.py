"""Paired comparison: two candidates ran the same rounds side by side, so what slowed both cancels.

The effect is the 20 % trimmed mean of the log ratios of the pairs with its Student t interval
(Tukey and McLaughlin 1963; Yuen 1974): a tenth of the rounds may be garbage and it hardly moves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from open_autoglm.schemas import Comparison, NoiseFloor, beyond

if TYPE_CHECKING:
    from numpy.typing import NDArray

LEAST_PAIRS = 3
"""Fewer pairs have no spread to speak of."""

TRIM = 0.2
POWER = 0.9
FAR = 4
"""A difference this many times beyond the target width needs no narrower interval."""

_RESAMPLES = 1999


def compare(
    candidate: str,
    against: str,
    metric: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    confidence: float = 0.95,
) -> Comparison:
    """How much more ``ours`` is than ``theirs``: one value per round each, the same rounds in the same order.

    Raises ValueError for fewer than `LEAST_PAIRS` pairs, unequal numbers, and values that are not
    positive and finite.
    """
    from scipy.stats import mstats

    ratios = _log(ours) - _log(theirs) if len(ours) == len(theirs) else None
    if ratios is None or len(ratios) < LEAST_PAIRS:
        raise ValueError(f"a comparison needs {LEAST_PAIRS} pairs; got {len(ours)} and {len(theirs)} rounds")
    limits = (TRIM, TRIM)
    low, high = mstats.trimmed_mean_ci(ratios, limits=limits, alpha=1 - confidence)
    return _comparison(candidate, against, metric, len(ratios), ((low + high) / 2, low, high), confidence)


def compare_percentile(
    candidate: str,
    against: str,
    metric: str,
    ours: Sequence[Sequence[float]],
    theirs: Sequence[Sequence[float]],
    *,
    percentile: float = 0.95,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """The same for a percentile over all requests; ``ours`` and ``theirs`` are ``[rounds][requests]``.

    The interval is a percentile bootstrap over whole rounds, pairs kept together, because requests of
    one round wait for one another. Raises ValueError as `compare` does.
    """
    from scipy.stats import bootstrap

    left, right = _log(ours), _log(theirs)
    if left.shape != right.shape or len(left) < LEAST_PAIRS:
        raise ValueError(f"a comparison needs {LEAST_PAIRS} pairs; got {left.shape} and {right.shape} values")

    def difference(rounds: NDArray[np.int64], axis: int = -1) -> NDArray[np.float64]:
        """Of the percentiles' logs, over the requests of ``rounds[..., n]``; SciPy always puts n last."""
        del axis
        return _pooled(left, rounds, percentile) - _pooled(right, rounds, percentile)

    rounds = np.arange(len(left))
    interval = bootstrap(
        (rounds,),
        difference,
        n_resamples=_RESAMPLES,
        batch=100,
        vectorized=True,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    estimate = (float(difference(rounds)), interval.low, interval.high)
    return _comparison(candidate, against, metric, len(left), estimate, confidence)


def beaten(
    candidate: str,
    against: str,
    metric: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    confidence: float = 0.99,
) -> Comparison | None:
    """The comparison, if ``candidate`` is slower than ``against`` with that one-sided confidence."""
    two_sided = 1 - 2 * (1 - confidence)
    comparison = compare(candidate, against, metric, ours, theirs, two_sided)
    return comparison if comparison.interval[0] > 0 else None


def relative_width(comparison: Comparison) -> float:
    """Full width of the interval of the ratio, as a share of the ratio."""
    low, high = comparison.interval
    return (high - low) / (1 + comparison.change)


def settled(comparison: Comparison, width: float) -> bool:
    """Whether more rounds are no use: narrow enough, or so far from zero that nobody asks how far."""
    nearer_end = min(abs(end) for end in comparison.interval)
    return relative_width(comparison) <= width or (comparison.clear and nearer_end > FAR * width)


def rounds_needed(comparison: Comparison, width: float) -> int:
    """Rounds in all that would make the interval as narrow as ``width``: it shrinks as 1/√n."""
    scale = (relative_width(comparison) / width) ** 2
    return max(comparison.pairs, math.ceil(comparison.pairs * scale))


def noise_floor(comparison: Comparison) -> NoiseFloor:
    """What an A/A comparison says of this host.

    The floor is the end of the interval farther from zero as a ratio, since which process is compared with
    which is chance: two of the same candidate may differ by that much, and no number of rounds in the same
    processes can average it out. `detectable` is an approximation: the normal distribution of the log ratio
    with the standard error that the interval implies.
    """
    from scipy.stats import norm

    low, high = map(math.log1p, comparison.interval)
    half = (high - low) / 2
    quantile = norm.ppf(0.5 + comparison.confidence / 2)
    return NoiseFloor(
        comparison=comparison,
        floor=math.expm1(max(abs(low), abs(high))),
        detectable=math.expm1(half * float((quantile + norm.ppf(POWER)) / quantile)),
    )


def promotes(comparison: Comparison, noise: NoiseFloor | None) -> bool:
    """Whether a challenger replaces the incumbent it is compared with, lower being better.

    Its interval lies wholly below zero and the gain is beyond the noise floor. With several challengers
    the caller asks for 1 - 0.05 / challengers confidence (Bonferroni).
    """
    return comparison.interval[1] < 0 and beyond(comparison.change, noise.floor if noise else 0.0)


def _log(values: Sequence[float] | Sequence[Sequence[float]]) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if not (np.isfinite(array) & (array > 0)).all():
        raise ValueError("a value that is not positive and finite cannot be compared by its ratio")
    return np.log(array)


def _pooled(values: NDArray[np.float64], rounds: NDArray[np.int64], percentile: float) -> NDArray[np.float64]:
    """Percentile over all requests of the chosen rounds; ``values[rounds, requests]``, ``rounds[..., n]``."""
    chosen = values[rounds].reshape(*rounds.shape[:-1], -1)
    return np.asarray(np.percentile(chosen, 100 * percentile, axis=-1))


def _comparison(
    candidate: str,
    against: str,
    metric: str,
    pairs: int,
    logs: tuple[float, float, float],
    confidence: float,
) -> Comparison:
    """From the log ratio and its interval to shares."""
    change, low, high = (math.expm1(log) for log in logs)
    return Comparison(
        candidate=candidate,
        against=against,
        metric=metric,
        pairs=pairs,
        change=change,
        interval=(low, high),
        confidence=confidence,
    )
