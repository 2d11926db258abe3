"""From evidence to an answer: who meets the limits, who wins, how near the others came."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from studies import BASELINE, CHAMPION, SHAPES, crashed_trial, demo_trials, measured_trial, vetoed_trials

from open_autoglm.measure.statistics import P95_SAMPLES, summarise
from open_autoglm.schemas import Miss, OptimizeSpec, Trial
from open_autoglm.selection import choose, excess, misses, pareto_front
from open_autoglm.units import ByteSize, Duration


def spec(**limits: Any) -> OptimizeSpec:
    return OptimizeSpec(model_path="here", **{"min_quality": 0.9, **limits})


def trial(
    name: str,
    *,
    ttft_ms: float = 100,
    tpot_ms: float = 10,
    rss: float = 2**30,
    kept: tuple[float, float] = (1, 1),
    rounds: int = 10,
    slowest_ttft_ms: float | None = None,
    baseline: bool = False,
) -> Trial:
    """A timed and judged trial: rounds within 1 % of the medians; one prefill in ten may be slow."""
    measured = measured_trial(SHAPES[0]._replace(id=name, kept=kept))
    around = np.linspace(0.99, 1.01, rounds)
    ttft = around * ttft_ms
    if slowest_ttft_ms is not None:
        ttft[::10] = slowest_ttft_ms
    metrics = {
        "ttft_ms": summarise(list(ttft), "ms"),
        "tpot_ms": summarise(list(around * tpot_ms), "ms"),
        "e2e_ms": summarise(list(around * (ttft_ms + 63 * tpot_ms)), "ms"),
        "tokens_per_s": summarise(list(1000 / (around * tpot_ms)), "tokens/s"),
        "peak_rss_bytes": summarise([rss], "bytes"),
    }
    candidate = measured.candidate.model_copy(update={"reference": False, "baseline": baseline})
    return measured.model_copy(update={"metrics": metrics, "candidate": candidate})


def limits_missed(of: Trial, request: OptimizeSpec) -> list[str]:
    return [miss.limit for miss in misses(of, request)]


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


def test_how_far_a_limit_was_missed_is_a_share_of_the_limit() -> None:
    """So that milliseconds, bytes and quality can be compared."""

    def miss(limit: str, allowed: float, measured: float) -> Miss:
        return Miss(limit=limit, allowed=allowed, measured=measured, unit="", decided_by="")

    assert excess(miss("max_latency", 100, 150)) == pytest.approx(0.5)
    assert excess(miss("min_quality", 0.99, 0.495)) == pytest.approx(0.5)


# ── the champion ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("objective", "champion"), [("latency", "quick"), ("throughput", "fluent"), ("memory", "small")]
)
def test_each_objective_has_its_own_champion(objective: Any, champion: str) -> None:
    """Time to the last token, tokens per second, peak memory."""
    trials = [
        trial("quick", ttft_ms=50, tpot_ms=10, rss=2**30),
        trial("fluent", ttft_ms=900, tpot_ms=5, rss=2**30),
        trial("small", ttft_ms=900, tpot_ms=20, rss=2**20),
    ]
    choice = choose(trials, spec(objective=objective))
    assert choice.champion == champion
    assert choice.verdict.kind == "champion"
    assert choice.trials[0].id == champion


def test_the_fastest_does_not_win_if_it_misses_a_limit() -> None:
    """Limits come first, and the loser's reason is its miss."""
    choice = choose([trial("fast", tpot_ms=1, kept=(0.5, 1)), trial("good")], spec())
    assert choice.champion == "good"
    fast = choice.trials[1]
    assert not fast.feasible
    assert fast.reason.startswith("misses min_quality")


def test_failed_and_vetoed_trials_keep_their_reasons_and_come_last() -> None:
    """Feasible first, then those that missed, then those that failed, then those never tried."""
    order = [*vetoed_trials(), crashed_trial(), trial("bad", kept=(0.1, 1)), trial("good")]
    choice = choose(order, spec())
    assert [t.status for t in choice.trials] == ["ok", "ok", "crashed", "vetoed", "vetoed"]
    assert [t.id for t in choice.trials[:2]] == ["good", "bad"]
    kept = {t.id: t.reason for t in order[:3]}
    assert {t.id: t.reason for t in choice.trials[2:]} == kept


def test_a_trial_that_was_timed_but_not_judged_cannot_win() -> None:
    """Correct before fast: without a quality report speed counts for nothing."""
    unjudged = trial("unjudged", tpot_ms=1).model_copy(update={"quality": None})
    choice = choose([unjudged, trial("good")], spec())
    assert choice.champion == "good"
    assert not choice.trials[-1].feasible


def test_near_ties_are_told() -> None:
    """Overlapping intervals are not told apart: the verdict and the loser's reason both say so."""
    choice = choose([trial("a", tpot_ms=10), trial("b", tpot_ms=10.01)], spec())
    assert any("b is so close" in reason for reason in choice.verdict.reasons)
    assert "overlap" in choice.trials[1].reason


def test_clear_winners_are_not_called_ties() -> None:
    """Twice the time is told as twice the time."""
    choice = choose([trial("a", ttft_ms=70, tpot_ms=10), trial("b", ttft_ms=140, tpot_ms=20)], spec())
    assert not any("close" in reason for reason in choice.verdict.reasons)
    assert "2.00× more than the champion's" in choice.trials[1].reason


def test_the_champion_is_compared_with_the_hand_tuned_baseline() -> None:
    """The number a reader wants first: what the search was good for."""
    choice = choose([trial("a", ttft_ms=50, tpot_ms=5), trial("hand", baseline=True)], spec())
    told = next(reason for reason in choice.verdict.reasons if "hand-tuned" in reason)
    assert "TTFT 2.00× faster; decode 2.00× faster; memory no clear difference" in told


def test_the_demo_study_has_its_known_champion() -> None:
    """On figures as measured of the demo GLM: the 8-bit weights win, dynamic int8 and int4 lose too much."""
    choice = choose(demo_trials(), spec(min_quality=0.99))
    assert choice.champion == CHAMPION
    infeasible = {t.id for t in choice.trials if t.status == "ok" and not t.feasible}
    assert infeasible == {"onnxruntime-int8-dynamic", "onnxruntime-int4-b32"}
    assert any(BASELINE in reason for reason in choice.verdict.reasons)


# ── nothing feasible ─────────────────────────────────────────────────────────────────────────────


def test_if_nothing_is_feasible_the_nearest_is_named_with_its_distance() -> None:
    """Nearest is who misses its worst limit by the smallest share."""
    limits = spec(max_latency=Duration("80ms"), max_memory=ByteSize("1GiB"))
    far = trial("far", ttft_ms=81, rss=3 * 2**30)  # misses memory by 200 %
    near = trial("near", ttft_ms=100)  # misses latency by 25 %
    choice = choose([far, near], limits)
    assert (choice.champion, choice.verdict.kind, choice.verdict.nearest) == (
        None,
        "nothing_feasible",
        "near",
    )
    assert "25.0% beyond" in choice.verdict.reasons[1]


def test_if_nothing_could_be_measured_the_outcomes_are_counted() -> None:
    """Nobody is nearest then, and the reader is told what became of the candidates."""
    verdict = choose([crashed_trial(), *vetoed_trials()], spec()).verdict
    assert verdict.kind == "nothing_feasible"
    assert verdict.nearest is None
    assert "1 crashed, 2 vetoed" in verdict.reasons[0]


def test_a_study_without_candidates_has_an_answer_too() -> None:
    """Engines may propose nothing."""
    assert "none proposed" in choose([], spec()).verdict.reasons[0]


# ── the Pareto front ─────────────────────────────────────────────────────────────────────────────


def test_the_front_holds_who_is_beaten_by_nobody() -> None:
    """Slower, larger and worse at once is off; better in one thing is on, feasible or not."""
    trials = [
        trial("fast", tpot_ms=5),
        trial("small", rss=2**20),
        trial("exact-but-slow", tpot_ms=30, rss=2**31, kept=(1, 1)),
        trial("beaten", tpot_ms=40, rss=2**31, kept=(0.95, 1)),
        trial("lossy", tpot_ms=1, kept=(0.2, 1)),
    ]
    assert set(pareto_front(trials)) == {"fast", "small", "lossy"}


def test_equals_share_the_front() -> None:
    """Neither of two alike beats the other."""
    assert set(pareto_front([trial("a"), trial("b")])) == {"a", "b"}


FIGURES = st.tuples(*[st.integers(1, 4)] * 3)


@given(st.lists(FIGURES, min_size=1, max_size=8))
def test_nobody_on_the_front_is_beaten_and_everybody_off_it_is(figures: list[tuple[int, int, int]]) -> None:
    """The definition of a Pareto front, checked against every pair."""
    named = {f"t{index}": costs for index, costs in enumerate(figures)}
    trials = [
        trial(name, tpot_ms=time, rss=memory, kept=(1 / loss, 1))
        for name, (time, memory, loss) in named.items()
    ]
    front = pareto_front(trials)

    def beaten(name: str) -> bool:
        own = named[name]
        return any(o != own and all(a <= b for a, b in zip(o, own, strict=True)) for o in named.values())

    assert set(front) == {name for name in named if not beaten(name)}
