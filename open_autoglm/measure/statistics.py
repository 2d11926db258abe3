"""From raw samples to a figure with its evidence.

The interval of the median is the distribution-free one from order statistics (Conover, *Practical
Nonparametric Statistics*, 3.2). Whether a percentile may decide is a binomial question, answered
as MLPerf LoadGen does (``early_stopping.cc``): with no violation among n samples, p95 is met with
99 % confidence when 0.95ⁿ ≤ 0.01, that is from n = 90.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from open_autoglm.schemas import Metric

P95_SAMPLES = 90
"""``least_samples(0.95)``: from so many samples on, a p95 may decide."""

_PERCENTILES: dict[Literal["p90", "p95", "p99"], float] = {"p90": 0.90, "p95": 0.95, "p99": 0.99}


def summarise(values: Sequence[float], unit: Literal["ms", "tokens/s", "requests/s", "bytes"]) -> Metric:
    """Median, 95 % interval and percentiles of ``values``, which are kept. Raises ValueError if empty."""
    if not values:
        raise ValueError("no samples: a figure needs at least one")
    array = np.asarray(values, dtype=np.float64)
    p50, p90, p95, p99 = (float(p) for p in np.percentile(array, [50, 90, 95, 99]))
    return Metric(
        unit=unit,
        median=p50,
        interval=median_interval(array),
        samples=len(array),
        p50=p50,
        p90=p90,
        p95=p95,
        p99=p99,
        indicative=tuple(name for name, p in _PERCENTILES.items() if len(array) < least_samples(p)),
        values=tuple(float(v) for v in array),
    )


def median_interval(array: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> tuple[float, float]:
    """Order statistics that enclose the median with at least 95 % confidence.

    With fewer than six samples no pair of them does; then the full range is the honest answer.
    """
    from scipy.stats import binom

    ordered = np.sort(array)
    count = len(ordered)
    lower = int(binom.ppf(0.025, count, 0.5))
    return float(ordered[max(lower - 1, 0)]), float(ordered[min(count - lower, count - 1)])


def median_ratio(values: Sequence[float], against: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """How many times as large the median of ``values`` is, for positive samples that are no pairs.

    The interval is of the ends of both medians' own, which holds the ratio at least where both hold theirs:
    with more than 90 % confidence, and usually far more. A single figure counts as certain.
    Raises ValueError if either is empty.
    """
    if not values or not against:
        raise ValueError("no samples: a ratio needs at least one of each")
    above, below = np.asarray(values, dtype=np.float64), np.asarray(against, dtype=np.float64)
    (low, high), (least, most) = median_interval(above), median_interval(below)
    return float(np.median(above) / np.median(below)), (low / most, high / least)


def least_samples(percentile: float, violations: int = 0, confidence: float = 0.99) -> int:
    """How many samples show that ``percentile`` (0.95, say) keeps a limit which ``violations`` of them broke.

    The least n at which so few violations would be rarer than ``1 - confidence`` if a share of
    ``1 - percentile`` of all requests broke the limit.
    """
    from scipy.special import bdtrin

    return int(np.ceil(bdtrin(violations, 1 - confidence, 1 - percentile)))


def chance_of_so_few(successes: int, count: int, promised: float) -> float:
    """How likely at most so many ``successes`` in ``count`` are if their true share is ``promised``.

    The one-sided exact binomial test (Conover, *Practical Nonparametric Statistics*, 3.1).
    Raises ValueError if ``count`` is 0 or ``promised`` no share.
    """
    from scipy.stats import binomtest

    return float(binomtest(successes, count, promised, alternative="less").pvalue)


def percentile_holds(
    values: Sequence[float], limit: float, percentile: float, confidence: float = 0.99
) -> bool | None:
    """Whether ``percentile`` of what ``values`` were drawn from is at most ``limit``; None if not yet known.

    True needs proof: enough samples for the violations among them. False is said when so many
    violations disprove it, or when there are enough samples to prove it and yet their own percentile
    is over the limit.
    """
    from scipy.stats import binom

    count, violations = len(values), sum(value > limit for value in values)
    if count >= least_samples(percentile, violations, confidence):
        return True
    disproved = bool(binom.sf(violations - 1, count, 1 - percentile) <= 1 - confidence)
    over = violations > count * (1 - percentile) and count >= least_samples(percentile, 0, confidence)
    return False if disproved or over else None
