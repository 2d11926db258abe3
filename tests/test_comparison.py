"""Paired comparisons: what cancels, what counts, and when a difference is big enough to act on."""

from __future__ import annotations

import math

import numpy as np
import pytest

from open_autoglm.measure import comparison as paired
from open_autoglm.schemas import Comparison

ROUNDS = 20
HOST = [800 + 15 * heat for heat in range(ROUNDS)]
"""A host that gets slower and slower: the same for both sides of a pair."""


def compare(ours: list[float], theirs: list[float], confidence: float = 0.95) -> Comparison:
    return paired.compare("ours", "theirs", "e2e_ms", ours, theirs, confidence)


def judged(change: float, low: float, high: float, pairs: int = 10) -> Comparison:
    return Comparison(
        candidate="ours",
        against="theirs",
        metric="e2e_ms",
        pairs=pairs,
        change=change,
        interval=(low, high),
        confidence=0.95,
    )


def noisy(share: float, seed: int, rounds: int = ROUNDS) -> list[float]:
    noise = np.random.default_rng(seed).normal(0, 0.02, rounds)
    return [float(share * 800 * math.exp(n)) for n in noise]


def test_a_drift_that_hits_both_cancels() -> None:
    """Ten per cent faster on a host that slows by a third: the change is ten per cent, exactly."""
    found = compare([0.9 * ms for ms in HOST], [float(ms) for ms in HOST])
    assert found.change == pytest.approx(-0.1)
    assert found.interval == pytest.approx((-0.1, -0.1))
    assert found.clear
    assert found.pairs == ROUNDS


def test_the_same_figures_are_no_change() -> None:
    """Rounds without any spread give a point, not an error."""
    found = compare([5.0] * 3, [5.0] * 3)
    assert (found.change, found.interval, found.clear) == (0, (0, 0), False)


def test_the_interval_holds_the_change_and_grows_with_confidence() -> None:
    """99 % confidence takes a wider interval around the same estimate than 95 %."""
    ours, theirs = noisy(0.95, 1), noisy(1, 2)
    usual, strict = compare(ours, theirs), compare(ours, theirs, 0.99)
    assert strict.interval[0] < usual.interval[0] < usual.change < usual.interval[1] < strict.interval[1]
    assert strict.change == pytest.approx(usual.change)


def test_a_few_garbage_rounds_change_little() -> None:
    """Two rounds in twenty that take ten times as long move the estimate by less than its interval."""
    ours, theirs = noisy(0.9, 3), noisy(1, 4)
    clean = compare(ours, theirs)
    spoiled = compare([ms * 10 if heat in (4, 11) else ms for heat, ms in enumerate(ours)], theirs)
    assert clean.interval[0] < spoiled.change < clean.interval[1]


def test_swapping_the_sides_inverts_the_ratio() -> None:
    """Half the time one way is twice the time the other way, intervals included."""
    ours, theirs = noisy(0.5, 5), noisy(1, 6)
    there, back = compare(ours, theirs), compare(theirs, ours)
    assert (1 + there.change) * (1 + back.change) == pytest.approx(1)
    assert (1 + there.interval[0]) * (1 + back.interval[1]) == pytest.approx(1)


def test_the_interval_holds_the_true_change_as_often_as_it_says() -> None:
    """Of 1,000 comparisons of a 5 % difference, 95 % hold it, within two standard errors."""
    truth = [compare(noisy(0.95, 2 * n, 10), noisy(1, 2 * n + 1, 10)).interval for n in range(1000)]
    assert np.mean([low <= -0.05 <= high for low, high in truth]) == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [([1.0, 2.0], [1.0, 2.0]), ([1.0, 2.0, 3.0], [1.0, 2.0]), ([1, 2, 0.0], [1, 2, 3]),
     ([1, 2, math.nan], [1, 2, 3]), ([1, 2, 3], [1, math.inf, 3]), ([1, 2, -3], [1, 2, 3])],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(ours: list[float], theirs: list[float]) -> None:
    """Too few pairs, unequal numbers, and values that have no ratio."""
    with pytest.raises(ValueError, match="compar"):
        compare(ours, theirs)


def test_percentiles_are_compared_over_all_requests() -> None:
    """A tail twice as long shows in the p95 of the requests and not in their median."""
    random = np.random.default_rng(1)
    theirs = random.normal(100, 2, (30, 20))
    ours = theirs * np.where(random.random((30, 20)) < 0.08, 2, 1)
    p95 = paired.compare_percentile("ours", "theirs", "ttft_p95", ours.tolist(), theirs.tolist())
    median = paired.compare_percentile(
        "ours", "theirs", "ttft", ours.tolist(), theirs.tolist(), percentile=0.5
    )
    assert p95.interval[0] > 0.5
    assert p95.interval[0] <= p95.change <= p95.interval[1]
    assert abs(median.change) < 0.01
    assert p95.pairs == 30


def test_the_bootstrap_is_the_same_for_the_same_seed() -> None:
    """A verdict must not change when it is computed again."""
    ours, theirs = [[ms] for ms in noisy(0.95, 1)], [[ms] for ms in noisy(1, 2)]
    first, again = (paired.compare_percentile("a", "b", "e2e_p95", ours, theirs) for _ in range(2))
    assert first == again


def test_the_bootstrap_draws_rounds_and_not_requests() -> None:
    """Requests that wait for one another are one piece of evidence: copies of them narrow nothing."""
    ours, theirs = noisy(0.95, 1), noisy(1, 2)
    once = paired.compare_percentile("a", "b", "e2e_p95", [[m] for m in ours], [[m] for m in theirs])
    copies = paired.compare_percentile(
        "a", "b", "e2e_p95", [[m] * 9 for m in ours], [[m] * 9 for m in theirs]
    )
    assert paired.relative_width(copies) > 0.8 * paired.relative_width(once) > 0


def test_percentiles_of_unequal_rounds_are_refused() -> None:
    """Both must have answered the same requests."""
    with pytest.raises(ValueError, match="pairs"):
        paired.compare_percentile("a", "b", "e2e_p95", [[1.0]] * 3, [[1.0]] * 4)


def test_only_the_slower_one_is_beaten() -> None:
    """A clear difference beats the slower; the faster and an equal are not beaten."""
    slow, fast = noisy(1.2, 1), noisy(1, 2)
    proof = paired.beaten("slow", "fast", "e2e_ms", slow, fast)
    assert proof is not None
    assert proof.interval[0] > 0
    assert proof.confidence == pytest.approx(0.98)  # 99 % on one side
    assert paired.beaten("fast", "slow", "e2e_ms", fast, slow) is None
    assert paired.beaten("fast", "fast", "e2e_ms", fast, fast) is None


def test_the_width_is_a_share_of_the_ratio() -> None:
    """From -55 % to -45 % around half the time is 20 % of that half."""
    assert paired.relative_width(judged(-0.5, -0.55, -0.45)) == pytest.approx(0.2)


def test_settled_is_narrow_or_far_from_zero() -> None:
    """A threefold difference is left as it is; a wide interval near zero is not."""
    assert paired.settled(judged(0.01, -0.01, 0.03), width=0.05)
    assert paired.settled(judged(2.0, 1.5, 2.5), width=0.05)
    assert not paired.settled(judged(0.1, 0.02, 0.18), width=0.05)
    assert not paired.settled(judged(0.1, -0.4, 0.9), width=0.05)


def test_rounds_needed_grow_with_the_square() -> None:
    """Half the width takes four times the rounds, and what is narrow enough takes none."""
    wide = judged(0, -0.05, 0.05, pairs=10)
    assert paired.rounds_needed(wide, 0.05) == 40
    assert paired.rounds_needed(wide, 0.2) == 10


def test_the_noise_floor_is_the_farther_end_of_the_interval() -> None:
    """Twins that agree leave the chance; twins that differ leave as much as they may differ."""
    assert paired.noise_floor(judged(0.002, -0.01, 0.014)).floor == pytest.approx(0.014)
    assert paired.noise_floor(judged(0.02, 0.01, 0.03)).floor == pytest.approx(0.03)
    assert paired.noise_floor(judged(-0.02, -0.03, -0.01)).floor == pytest.approx(1 / 0.97 - 1)


def test_the_detectable_change_is_found_nine_times_in_ten() -> None:
    """In 20,000 draws at the standard error of the interval, 90 % of intervals exclude zero."""
    error = 0.01
    noise = paired.noise_floor(judged(0, math.expm1(-1.96 * error), math.expm1(1.96 * error)))
    draws = np.random.default_rng(0).normal(math.log1p(noise.detectable), error, 20_000)
    assert np.mean(draws > 1.96 * error) == pytest.approx(0.9, abs=0.01)


def test_promotion_needs_a_gain_beyond_chance_and_noise() -> None:
    """The interval lies wholly below zero and the gain exceeds the floor, or the incumbent stays."""
    quiet, loud = (paired.noise_floor(judged(0, -floor, floor)) for floor in (0.01, 0.2))
    gain = judged(-0.1, -0.15, -0.05)
    assert paired.promotes(gain, quiet)
    assert paired.promotes(gain, None)
    assert not paired.promotes(gain, loud)
    assert not paired.promotes(judged(-0.1, -0.21, 0.01), quiet)
    assert not paired.promotes(judged(0.1, 0.05, 0.15), quiet)


def test_a_host_that_differs_from_itself_by_more_than_all_lets_the_quicker_win() -> None:
    """Twins of which one takes up to 2.4 times as long leave room for three times as fast, and for no twice,
    whichever of the twins that is; nobody can be 140 % quicker."""
    for twins in (judged(0.4, -0.2, 1.4), judged(-0.3, 1 / 2.4 - 1, 0.1)):
        busy = paired.noise_floor(twins)
        assert busy.floor == pytest.approx(1.4)
        assert paired.promotes(judged(1 / 3 - 1, -0.8, -0.3), busy)
        assert not paired.promotes(judged(-0.5, -0.6, -0.4), busy)
        assert judged(1 / 3 - 1, -0.8, -0.3).model_copy(update={"floor": busy.floor}).clear
        assert not judged(1.0, 0.5, 1.5).model_copy(update={"floor": busy.floor}).clear
