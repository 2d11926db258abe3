"""Medians with intervals that hold what they promise, and percentiles that know when they may decide."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from open_autoglm.measure.statistics import P95_SAMPLES, median_interval, summarise

SAMPLES = st.lists(st.floats(min_value=1e-3, max_value=1e9), min_size=1, max_size=200)


@given(SAMPLES)
def test_figures_are_in_order_and_inside_the_samples(values: list[float]) -> None:
    """Whatever was measured: low <= median <= high, p50 <= p90 <= p95 <= p99, none beyond a sample."""
    metric = summarise(values, "ms")
    low, high = metric.interval
    assert min(values) <= low <= metric.median <= high <= max(values)
    assert metric.median == metric.p50 <= metric.p90 <= metric.p95 <= metric.p99 <= max(values)
    assert metric.samples == len(values)


@given(SAMPLES)
def test_raw_samples_are_kept_in_the_order_they_were_taken(values: list[float]) -> None:
    """A drift can only be seen in the order."""
    assert summarise(values, "ms").values == tuple(values)


@given(SAMPLES, st.randoms())
def test_the_order_of_the_samples_changes_no_figure(values: list[float], random: object) -> None:
    """The interval is one of order statistics: it sorts for itself."""
    shuffled = list(values)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert summarise(shuffled, "ms").interval == summarise(values, "ms").interval


@pytest.mark.parametrize("count", [6, 10, 31, 100])
def test_the_interval_covers_the_true_median(count: int) -> None:
    """In 4,000 simulated studies of a skewed latency, 95 % or more of the intervals hold the true median."""
    generator = np.random.default_rng(7)
    latencies = 10 + generator.lognormal(0, 1, size=(4000, count))  # true median: 10 + exp(0)
    intervals = np.array([median_interval(study) for study in latencies])
    covered = np.mean((intervals[:, 0] <= 11) & (intervals[:, 1] >= 11))
    assert covered >= 0.945  # 0.95 less one and a half standard errors


def test_the_interval_is_no_wider_than_it_must_be() -> None:
    """Of 100 samples it takes the 40th and the 61st, as tables of the sign test do."""
    assert median_interval(np.arange(1.0, 101.0)) == (40, 61)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_samples_give_their_whole_range(count: int) -> None:
    """With fewer than six no pair of order statistics reaches 95 %."""
    values = np.arange(float(count))
    assert median_interval(values) == (values[0], values[-1])


def test_p95_decides_from_90_samples_on() -> None:
    """0.95 to the 90th power is below 1 %, to the 89th it is not."""
    assert P95_SAMPLES == 90
    assert 0.95**90 <= 0.01 < 0.95**89
    assert summarise([1.0] * 89, "ms").p95_indicative
    assert not summarise([1.0] * 90, "ms").p95_indicative


def test_a_figure_without_samples_is_refused() -> None:
    """There is no median of nothing."""
    with pytest.raises(ValueError, match="at least one"):
        summarise([], "ms")
