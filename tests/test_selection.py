"""From evidence to an answer: who wins, against whom, and how near the others came."""

from __future__ import annotations

from typing import Any

import pytest
from demo_trials import demo_races, with_incumbent
from finalists import noise_of, screened_only, spec, trial
from hypothesis import given
from hypothesis import strategies as st
from studies import (
    BASELINE,
    CHAMPION,
    FINALISTS,
    RIVAL,
    crashed_trial,
    demo_trials,
    vetoed_trials,
)

from open_autoglm.objectives import final_of
from open_autoglm.schemas import Fall, Miss
from open_autoglm.selection import choose, pareto_front
from open_autoglm.units import ByteSize, Duration

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


def test_who_came_further_in_the_race_ranks_before_who_left_early() -> None:
    """Behind the finalists and before the failed, the latest to leave first."""
    late, early = (
        screened_only(name).model_copy(update={"fall": Fall(stage="race", heat=heat, reason="slower")})
        for name, heat in (("late", 7), ("early", 3))
    )
    order = [crashed_trial(), screened_only("first"), early, late, trial("good")]
    ranked = [t.id for t in choose(order, spec()).trials]
    assert ranked == ["good", "late", "early", "first", crashed_trial().id]


def test_a_trial_that_was_timed_but_not_judged_cannot_win() -> None:
    """Correct before fast: without a quality report speed counts for nothing."""
    unjudged = trial("unjudged", tpot_ms=1).model_copy(update={"quality": None})
    choice = choose([unjudged, trial("good")], spec())
    assert choice.champion == "good"
    assert not choice.trials[-1].feasible


def test_who_is_not_told_apart_is_told() -> None:
    """The verdict and the loser's reason both say that the champion is not shown to be better."""
    choice = choose([trial("a"), trial("b", own_noise=0.02, tpot_ms=10.01)], spec())
    assert choice.champion == "a"
    assert any(reason == "not told apart from it: b" for reason in choice.verdict.reasons)
    assert "not told apart from a" in choice.trials[1].reason


def test_what_noise_can_do_is_no_difference() -> None:
    """5 % more in every round, but two processes of one candidate differ by as much."""
    field = [trial("a", ttft_ms=100, tpot_ms=10), trial("b", ttft_ms=105, tpot_ms=10.5)]
    for floor, tied in ((0.04, False), (0.06, True)):
        choice = choose(field, spec(), noise_of(floor))
        assert choice.comparisons[0].interval[0] > 0
        assert ("not told apart from it: b" in choice.verdict.reasons) == tied
        assert ("not told apart from a" in choice.trials[1].reason) == tied


def test_clear_winners_are_not_called_ties() -> None:
    """Twice the time is told as twice the time, with its interval and its pairs."""
    choice = choose([trial("a", ttft_ms=70, tpot_ms=10), trial("b", ttft_ms=140, tpot_ms=20)], spec())
    assert not any("not told apart" in reason for reason in choice.verdict.reasons)
    assert "E2E 100.0% more (95 % interval +100.0% to +100.0%, 10 paired rounds)" in choice.trials[1].reason


def test_the_champion_is_compared_with_the_hand_tuned_baseline() -> None:
    """The number a reader wants first: what the search was good for."""
    hand = trial("hand", baseline=True, rss=2**31)
    choice = choose([trial("a", ttft_ms=50, tpot_ms=20), hand], spec(objective="ttft"))
    told = next(reason for reason in choice.verdict.reasons if "hand-tuned" in reason)
    assert "paired: TTFT 2.00× faster; decode 2.00× slower; memory 2.00× less" in told


def test_no_claim_is_made_against_the_baseline_without_evidence() -> None:
    """A quicker median is no difference if the pairs do not show one."""
    hand = trial("hand", baseline=True, own_noise=0.05)
    choice = choose([trial("a", ttft_ms=99), hand], spec(objective="ttft"))
    told = next(reason for reason in choice.verdict.reasons if "hand-tuned" in reason)
    assert "TTFT no clear difference" in told


def test_the_demo_study_has_its_known_champion() -> None:
    """On figures as measured of the demo GLM: the 8-bit weights win, and the reasons say how sure that is."""
    final = final_of(demo_races(noise_of(0.02)))
    assert final is not None
    choice = choose(demo_trials(), spec(min_quality=0.99), final.noise)
    assert choice.champion == CHAMPION
    assert [t.id for t in choice.trials[: len(FINALISTS)]] == [CHAMPION, RIVAL, "onnxruntime-fp32", BASELINE]
    assert any(BASELINE in reason for reason in choice.verdict.reasons)
    assert any("noise floor of this host: 2.0%" in reason for reason in choice.verdict.reasons)


def test_every_other_finalist_is_compared_with_the_champion() -> None:
    """In pairs, whether it meets the limits or not; who left before the final is not."""
    others = [trial("slow", tpot_ms=20), trial("lossy", tpot_ms=1, kept=(0.1, 1)), screened_only("early")]
    choice = choose([trial("best"), *others], spec())
    assert {(c.candidate, c.against) for c in choice.comparisons} == {("slow", "best"), ("lossy", "best")}
    assert {c.candidate: c.change < 0 for c in choice.comparisons} == {"slow": False, "lossy": True}


# ── the incumbent ────────────────────────────────────────────────────────────────────────────────


def test_an_incumbent_that_nobody_beats_is_confirmed() -> None:
    """It was measured again beside its challengers, and it is the best of them."""
    choice = choose([trial("served", incumbent=True), trial("slow", tpot_ms=12)], spec())
    assert (choice.verdict.kind, choice.champion) == ("champion", "served")
    assert "it is the registered champion, measured again" in choice.verdict.reasons[0]


def test_a_challenger_that_is_clearly_better_is_promoted() -> None:
    """Its interval excludes zero and its gain exceeds the noise floor; both are told."""
    field = [trial("served", incumbent=True), trial("new", tpot_ms=9, ttft_ms=90)]
    choice = choose(field, spec(), noise_of(0.03))
    assert (choice.verdict.kind, choice.champion) == ("champion", "new")
    assert choice.verdict.reasons[0].startswith("against the registered champion served: E2E 10.0% less")


def test_the_more_challenge_the_surer_each_must_be() -> None:
    """Four tries at 95 % would promote by chance four times as often as one (Bonferroni)."""
    field = [trial("served", incumbent=True)] + [trial(f"new{n}", tpot_ms=9 + n / 10) for n in range(4)]
    assert "(98.75 % interval" in choose(field, spec()).verdict.reasons[0]


def test_a_gain_below_the_noise_of_the_host_keeps_the_incumbent() -> None:
    """Two processes of one candidate differ by more than that."""
    field = [trial("served", incumbent=True), trial("new", tpot_ms=9.7, ttft_ms=97)]
    choice = choose(field, spec(), noise_of(0.04))
    assert (choice.verdict.kind, choice.champion, choice.verdict.nearest) == ("tie", "served", "new")
    assert "so the champion stays" in choice.verdict.reasons[0]
    assert choice.trials[1].id == "served"
    assert choice.trials[1].reason == "stays champion"
    assert [c.against for c in choice.comparisons] == ["served"]


def test_a_gain_that_nobody_would_notice_keeps_the_incumbent() -> None:
    """Not told from zero, and certainly smaller than the width that was asked for."""
    field = [trial("served", incumbent=True, own_noise=0.005), trial("new", tpot_ms=9.95, ttft_ms=99.5)]
    choice = choose(field, spec(), noise_of(0.001))
    assert (choice.verdict.kind, choice.champion) == ("tie", "served")


def test_a_wide_interval_is_no_answer() -> None:
    """It may be better by a lot or not at all: the verdict says how many rounds would tell."""
    field = [trial("served", incumbent=True), trial("new", tpot_ms=9, ttft_ms=90, own_noise=0.4)]
    choice = choose(field, spec())
    assert (choice.verdict.kind, choice.champion) == ("insufficient_evidence", None)
    assert choice.verdict.nearest == "new"
    assert "rounds would tell (--rounds, --timing-budget-s)" in choice.verdict.reasons[0]


def test_a_clear_gain_on_a_loud_host_is_no_answer_either() -> None:
    """Two processes of one candidate differ by more than the gain: more rounds would not help."""
    field = [trial("served", incumbent=True), trial("new", tpot_ms=9, ttft_ms=90)]
    choice = choose(field, spec(), noise_of(0.2))
    assert (choice.verdict.kind, choice.champion) == ("insufficient_evidence", None)
    assert "differ by up to 20.0%: a quieter host would tell" in choice.verdict.reasons[1]


def test_without_rounds_in_common_nothing_is_promoted() -> None:
    """A comparison that was not paired is none."""
    field = [trial("served", incumbent=True, rounds=9), trial("new", tpot_ms=5)]
    choice = choose(field, spec())
    assert (choice.verdict.kind, choice.champion) == ("insufficient_evidence", None)
    assert "have no rounds in common" in choice.verdict.reasons[0]


def test_an_incumbent_that_misses_a_limit_is_replaced_by_whoever_meets_it() -> None:
    """However fast it is: the limits are those of today."""
    field = [trial("served", tpot_ms=5, rss=2**31, incumbent=True), trial("new")]
    choice = choose(field, spec(max_memory=ByteSize("1GiB")))
    assert (choice.verdict.kind, choice.champion) == ("champion", "new")
    assert "served no longer will do: it misses max_memory" in choice.verdict.reasons[0]


@pytest.mark.parametrize(("rss", "verdict", "champion"), [(0.9, "champion", "new"), (0.99, "tie", "served")])
def test_memory_replaces_the_incumbent_beyond_its_own_spread(rss: float, verdict: str, champion: str) -> None:
    """Peak memory differs a little between runs of the same process."""
    field = [trial("served", incumbent=True), trial("new", rss=rss * 2**30)]
    choice = choose(field, spec(objective="memory"))
    assert (choice.verdict.kind, choice.champion) == (verdict, champion)
    assert "peak memory" in choice.verdict.reasons[0]


def test_the_demo_study_keeps_an_incumbent_that_is_as_good() -> None:
    """Two block sizes of the same weights: no improvement anyone would notice."""
    choice = choose(with_incumbent(demo_trials(), RIVAL), spec(min_quality=0.99))
    assert (choice.verdict.kind, choice.champion) == ("tie", RIVAL)


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


def test_if_only_the_screening_was_reached_the_nearest_is_found_there() -> None:
    """Memory and quality may rule out everybody before anything is timed."""
    miss = Miss(limit="max_memory", allowed=100, measured=150, unit="bytes", decided_by="peak RSS")
    near, far = (
        screened_only(name).model_copy(update={"misses": (miss.model_copy(update={"measured": measured}),)})
        for name, measured in (("near", 150), ("far", 300))
    )
    verdict = choose([far, near, crashed_trial()], spec()).verdict
    assert (verdict.kind, verdict.nearest) == ("nothing_feasible", "near")
    assert "50.0% beyond" in verdict.reasons[1]


def test_who_ran_to_the_end_is_nearer_than_who_left_early() -> None:
    """Of the latter only the first miss is known: it may miss more, and by more."""
    early = screened_only("early", kept=(0.89, 1))
    miss = Miss(limit="min_quality", allowed=0.9, measured=0.89, unit="", decided_by="prefill path")
    finalist = trial("finalist", ttft_ms=200)
    field = [early.model_copy(update={"misses": (miss,)}), finalist]
    assert choose(field, spec(max_latency=Duration("100ms"))).verdict.nearest == "finalist"


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


def test_who_left_early_counts_with_what_was_found_out() -> None:
    """A small one that was too slow for the race may still be what somebody with little memory wants."""
    trials = [
        trial("timed"),
        screened_only("small", rss=2**20, e2e_ms=9000),
        screened_only("worse", rss=2**30, e2e_ms=9000),
        crashed_trial(),
    ]
    assert set(pareto_front(trials)) == {"timed", "small"}


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
