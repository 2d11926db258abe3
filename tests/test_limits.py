"""Who keeps the limits of a spec, by which figure, and where the evidence does not say."""

from __future__ import annotations

from typing import Any

import pytest
from finalists import limits_missed, spec, trial

from open_autoglm.limits import excess, misses, unclear
from open_autoglm.measure.statistics import P95_SAMPLES
from open_autoglm.schemas import Miss, Place
from open_autoglm.selection import choose
from open_autoglm.units import ByteSize, Duration

# ── limits ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("limits", "missed"),
    [
        ({}, []),
        ({"max_latency": Duration("100ms")}, []),
        ({"max_latency": Duration("99ms")}, ["max_latency"]),
        ({"max_tpot": Duration("10ms")}, []),
        ({"max_tpot": Duration("9.9ms")}, ["max_tpot"]),
        ({"max_memory": ByteSize("1GiB")}, []),
        ({"max_memory": ByteSize("1GB")}, ["max_memory"]),
        ({"min_quality": 0.95}, []),
        ({"min_quality": 0.96}, ["min_quality"]),
        ({"max_latency": Duration("1us"), "max_memory": ByteSize("1B")}, ["max_latency", "max_memory"]),
    ],
)
def test_a_limit_is_met_up_to_its_very_value(limits: dict[str, Any], missed: list[str]) -> None:
    """Every limit is judged by itself, and equality meets it."""
    assert limits_missed(trial("a", kept=(0.97, 0.95)), spec(**limits)) == missed


def test_quality_is_judged_on_the_worse_path() -> None:
    """A perfect decode does not excuse a bad prefill, and the miss says which path it was."""
    (miss,) = misses(trial("a", kept=(0.62, 1.0)), spec())
    assert (miss.measured, miss.decided_by) == (0.62, "prefill path")
    (miss,) = misses(trial("a", kept=(1.0, 0.62)), spec())
    assert (miss.measured, miss.decided_by) == (0.62, "decode path")


def test_with_few_samples_the_median_decides_and_says_so() -> None:
    """Ten samples cannot tell a p95, so one slow round in ten does not fail the limit."""
    few = trial("a", slowest_ttft_ms=500)
    assert few.metrics["ttft_ms"].p95 > 150
    assert limits_missed(few, spec(max_latency=Duration("150ms"))) == []
    (miss,) = misses(few, spec(max_latency=Duration("50ms")))
    assert miss.decided_by == "median TTFT; 10 samples are too few for p95 to decide"


def test_with_enough_samples_p95_decides() -> None:
    """The same spread in 90 samples is evidence, and the limit is one on the p95."""
    many = trial("a", slowest_ttft_ms=500, rounds=P95_SAMPLES)
    (miss,) = misses(many, spec(max_latency=Duration("150ms")))
    assert miss.measured == many.metrics["ttft_ms"].p95 == 500
    assert miss.decided_by == "p95 TTFT of 90 samples"


def test_a_miss_reads_as_a_sentence() -> None:
    """What was measured, what was allowed, and by which figure."""
    (miss,) = misses(trial("a"), spec(max_latency=Duration("50ms")))
    assert miss.sentence().startswith("max_latency: 100 ")
    assert "median TTFT; 10 samples" in miss.sentence()


def test_flips_are_judged_on_the_worse_path_and_say_where_they_begin() -> None:
    """However much quality is kept and however fast it is: another likeliest token is another answer."""
    one = trial("a")
    assert one.quality is not None
    first = Place(text="fiction", window=0, position=131)
    decode = one.quality.decode.model_copy(update={"top1_agreement": 0.875, "first_flip": first})
    flipping = one.model_copy(update={"quality": one.quality.model_copy(update={"decode": decode})})
    (miss,) = misses(flipping, spec())
    told = "(decode path, 768 tokens, first at position 131 of window 0 of fiction)"
    assert miss.sentence() == f"max_token_flips: 0.125 > 0.100 {told}"
    assert misses(flipping, spec(max_token_flips=0.125)) == ()


def test_how_far_a_limit_was_missed_is_a_share_of_the_limit() -> None:
    """So that milliseconds, bytes and quality can be compared."""

    def miss(limit: str, allowed: float, measured: float) -> Miss:
        return Miss(limit=limit, allowed=allowed, measured=measured, unit="", decided_by="")

    assert excess(miss("max_latency", 100, 150)) == pytest.approx(0.5)
    assert excess(miss("min_quality", 0.99, 0.495)) == pytest.approx(0.5)


# ── evidence for a limit ─────────────────────────────────────────────────────────────────────────


def test_a_limit_inside_the_interval_is_met_by_nobody_for_sure() -> None:
    """The median meets it, the interval does not: the verdict asks for more rounds."""
    near = trial("near", ttft_ms=100)
    limit = Duration("100.5ms")
    assert near.metrics["ttft_ms"].interval[1] > 100.5
    assert limits_missed(near, spec(max_latency=limit)) == []
    assert "holds the limit 100.5ms" in (unclear(near, spec(max_latency=limit)) or "")
    choice = choose([near], spec(max_latency=limit))
    assert (choice.verdict.kind, choice.champion, choice.verdict.nearest) == (
        "insufficient_evidence",
        None,
        "near",
    )
    assert "near is best of those that meet every limit, but" in choice.verdict.reasons[0]


def test_who_meets_the_limit_beyond_doubt_wins_over_a_quicker_one_that_may_not() -> None:
    """A champion has to keep its promise tomorrow."""
    doubtful, sure = trial("doubtful", ttft_ms=100, tpot_ms=5), trial("sure", ttft_ms=80, tpot_ms=10)
    choice = choose([doubtful, sure], spec(max_latency=Duration("100.5ms")))
    assert (choice.verdict.kind, choice.champion) == ("champion", "sure")


def test_a_p95_that_may_decide_is_its_own_evidence() -> None:
    """The binomial count behind it is the confidence, so no interval of the median is asked."""
    many = trial("many", ttft_ms=100, rounds=P95_SAMPLES)
    limit = spec(max_latency=Duration("101ms"))
    assert limits_missed(many, limit) == []
    assert unclear(many, limit) is None


@pytest.mark.parametrize(("limit", "doubt"), [("10.05ms", True), ("10.2ms", False)])
def test_a_limit_on_tpot_is_one_on_its_median(limit: str, doubt: bool) -> None:
    """Met beyond doubt if the whole interval is below it."""
    asked = spec(max_tpot=Duration(limit))
    assert (unclear(trial("a"), asked) is not None) == doubt
