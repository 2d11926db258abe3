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


def summarise(values: Sequence[float], unit: Literal["ms", "tokens/s", "bytes"]) -> Metric:
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
        p95_indicative=len(array) < P95_SAMPLES,
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
