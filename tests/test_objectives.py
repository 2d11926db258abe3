"""Two trials against each other: by which figure of which rounds, and in which words."""

from __future__ import annotations

import pytest
from demo_trials import demo_round
from finalists import screened_only, spec, trial

from open_autoglm.measure.statistics import P95_SAMPLES
from open_autoglm.objectives import GOALS, Goal, change_words, duel, goal_of
from open_autoglm.schemas import Round, Trial
from open_autoglm.selection import choose

# ── by which figure ──────────────────────────────────────────────────────────────────────────────


def test_an_offline_throughput_counts_prefill_too() -> None:
    """Tokens per second of whole batches, where `throughput` elsewhere is that of decoding."""
    assert goal_of(spec(objective="throughput")).metric == "tokens_per_s"
    assert goal_of(spec(objective="throughput", scenario="offline")).metric == "throughput_tokens_per_s"
    assert goal_of(spec(objective="latency", scenario="offline")) == GOALS["latency"]


@pytest.mark.parametrize(("rounds", "champion"), [(10, "spiky"), (P95_SAMPLES, "even")])
def test_a_p95_decides_if_enough_samples_stand_behind_it(rounds: int, champion: str) -> None:
    """With ten samples the median decides, and the slow tenth is not seen; with ninety it loses."""
    field = [
        trial("spiky", ttft_ms=90, slowest_ttft_ms=500, rounds=rounds),
        trial("even", ttft_ms=100, rounds=rounds),
    ]
    choice = choose(field, spec(objective="ttft_p95"))
    assert choice.champion == champion
    decided = "p95" if rounds == P95_SAMPLES else "median"
    assert f": {decided} " in choice.verdict.reasons[0]


def test_a_p95_is_compared_by_its_own_pairs() -> None:
    """With enough samples the change is that of the p95, not of the median."""
    spiky = trial("spiky", ttft_ms=100, slowest_ttft_ms=500, rounds=P95_SAMPLES)
    even = trial("even", ttft_ms=100, rounds=P95_SAMPLES)
    compared = duel(spiky, even, GOALS["ttft_p95"])
    assert compared is not None
    assert compared.change > 3
    few = duel(
        *(t.model_copy(update={"metrics": trial("a").metrics}) for t in (spiky, even)), GOALS["ttft_p95"]
    )
    assert few is not None
    assert abs(few.change) < 0.01


def test_memory_is_decided_by_memory_alone() -> None:
    """Rounds tell nothing about it, so nobody is compared in pairs."""
    choice = choose([trial("quick", tpot_ms=1), trial("small", rss=2**20)], spec(objective="memory"))
    assert (choice.champion, choice.comparisons) == ("small", ())
    assert "the champion's is 1.05 MB" in choice.trials[1].reason or "MiB" in choice.trials[1].reason


# ── duels ────────────────────────────────────────────────────────────────────────────────────────


def repeated(of: Trial, index: int) -> Trial:
    """The trial with one round disturbed and run again."""
    assert of.measurements is not None
    rounds: list[Round] = list(of.measurements.rounds)
    rounds.insert(index, demo_round(index, 9000, 900, foreign_cores=1, repeated=True))
    return of.model_copy(
        update={"measurements": of.measurements.model_copy(update={"rounds": tuple(rounds)})}
    )


def test_the_rounds_of_one_heat_are_a_pair() -> None:
    """What slowed both of a pair cancels; a round that was run again is no part of one."""
    ours, theirs = trial("a", tpot_ms=9, ttft_ms=90), repeated(trial("b"), 3)
    compared = duel(ours, theirs, GOALS["latency"])
    assert compared is not None
    assert (compared.candidate, compared.against, compared.metric) == ("a", "b", "e2e_ms")
    assert (compared.pairs, compared.confidence) == (10, 0.95)
    assert compared.change == pytest.approx(-0.1)
    assert compared.interval == pytest.approx((-0.1, -0.1))


def test_a_duel_is_worded_with_its_interval() -> None:
    """By how much, in which figure, how sure, and over how many pairs."""
    compared = duel(trial("a", tpot_ms=9, ttft_ms=90), trial("b"), GOALS["latency"], confidence=0.975)
    assert compared is not None
    assert change_words(compared) == "E2E 10.0% less (97.5 % interval -10.0% to -10.0%, 10 paired rounds)"


@pytest.mark.parametrize(
    ("ours", "theirs", "goal"),
    [
        (trial("a"), trial("b", rounds=9), GOALS["latency"]),
        (trial("a", rounds=2), trial("b", rounds=2), GOALS["latency"]),
        (trial("a"), screened_only("b"), GOALS["latency"]),
        (trial("a"), trial("b"), GOALS["memory"]),
    ],
    ids=["unequal", "few", "not-timed", "memory"],
)
def test_what_cannot_be_paired_is_not_compared(ours: Trial, theirs: Trial, goal: Goal) -> None:
    """Rather no comparison than a wrong one."""
    assert duel(ours, theirs, goal) is None
    assert duel(theirs, ours, goal) is None
