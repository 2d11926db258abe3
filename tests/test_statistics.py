"""Medians with intervals that hold what they promise, and percentiles that know when they may decide."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from open_autoglm.measure.statistics import (
    P95_SAMPLES,
    chance_of_so_few,
    least_samples,
    median_interval,
    percentile_holds,
    summarise,
)

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


@pytest.mark.parametrize(
    ("percentile", "samples"),
    [(0.90, [44, 64, 81]), (0.95, [90, 130, 165]), (0.99, [459, 662, 838])],
)
def test_a_percentile_needs_as_many_samples_as_loadgen_says(percentile: float, samples: list[int]) -> None:
    """At 99 % confidence, with no, one and two violations among them."""
    assert [least_samples(percentile, violations) for violations in range(3)] == samples


def test_percentiles_are_indicative_until_they_may_decide() -> None:
    """Each has its own number of samples; p95 decides from 90 on."""
    assert least_samples(0.95) == P95_SAMPLES
    assert summarise([1.0] * 43, "ms").indicative == ("p90", "p95", "p99")
    assert summarise([1.0] * 44, "ms").indicative == ("p95", "p99")
    assert summarise([1.0] * 90, "ms").indicative == ("p99",)
    assert summarise([1.0] * 459, "requests/s").indicative == ()


@pytest.mark.parametrize(
    ("within", "over", "holds"),
    [
        (90, 0, True),
        (129, 1, True),
        (89, 0, None),  # one sample short
        (128, 1, None),  # one violation asks for 130
        (1, 1, None),  # it may have been bad luck
        (0, 3, False),  # three times in a row it was not
        (84, 6, False),  # their own p95 is over the limit, though not far
        (50, 50, False),
    ],
)
def test_a_limit_on_p95_holds_by_proof_only(within: int, over: int, holds: bool | None) -> None:
    """Proven, not held, or not yet known: too few samples are no pass and no failure."""
    assert percentile_holds([50.0] * within + [51.0] * over, 50.0, 0.95) is holds


def test_a_limit_that_is_broken_passes_at_most_once_in_a_hundred() -> None:
    """Requests that break a p95 limit 6 % of the time: of 2,000 samples of 90, under 1 % pass."""
    samples = np.random.default_rng(3).random((2000, 90))
    passed = [percentile_holds(sample.tolist(), 0.94, 0.95) is True for sample in samples]
    assert np.mean(passed) < 0.01


def test_too_few_successes_are_told_from_bad_luck() -> None:
    """By the binomial distribution: all of them are always within it, none of ten of 0.9 hardly ever."""
    assert chance_of_so_few(10, 10, 0.9) == pytest.approx(1)
    assert chance_of_so_few(0, 10, 0.9) == pytest.approx(0.1**10)
    assert chance_of_so_few(9, 10, 1.0) == 0
    assert chance_of_so_few(8, 10, 0.9) == pytest.approx(1 - 10 * 0.9**9 * 0.1 - 0.9**10)


def test_a_figure_without_samples_is_refused() -> None:
    """There is no median of nothing."""
    with pytest.raises(ValueError, match="at least one"):
        summarise([], "ms")
