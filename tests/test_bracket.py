"""Who goes on: what the screening is allowed to decide, who races, and who is in the final."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import pytest
from demo_trials import demo_round
from hypothesis import given
from hypothesis import strategies as st
from studies import SHAPES, crashed_trial, measured_trial, vetoed_trials

from open_autoglm.bracket import (
    FINALISTS,
    HOPELESS,
    MOST_ENTRANTS,
    MOST_HEATS,
    MOST_WAVES,
    RACE_HEATS,
    after_evaluation,
    after_screening,
    best_go_on,
    called_up,
    final_contest,
    race_contest,
    recall,
)
from open_autoglm.conclusion import Standings
from open_autoglm.measure.racing import TWIN_SUFFIX
from open_autoglm.schemas import OptimizeSpec, Trial
from open_autoglm.units import ByteSize, Duration


def spec(**asked: Any) -> OptimizeSpec:
    return OptimizeSpec(model_path="here", **asked)


def trial(
    name: str,
    *,
    e2e_ms: float = 1000,
    rss_mb: float = 500,
    kept: float = 1,
    clear: bool = True,
    baseline: bool = False,
    incumbent: bool = False,
) -> Trial:
    """A screened trial: what short rounds say of its speed, its memory, and its quality on a slice."""
    # The tokens take as long as the prompt: 1000 ms are 500 ms of TTFT and 63 tokens in 500 ms.
    shape = SHAPES[0]._replace(
        id=name, ttft_ms=e2e_ms / 2, tokens_per_s=63_000 / (e2e_ms / 2), rss_mb=rss_mb, kept=(kept, 1)
    )
    made = measured_trial(shape)
    assert made.quality is not None
    prefill = made.quality.prefill.model_copy(update={"clear_of_limit": clear})
    marks = {"reference": False, "baseline": baseline, "incumbent": incumbent}
    return made.model_copy(
        update={
            "metrics": {},
            "measurements": None,
            "finalist": False,
            "reason": "screened",
            "candidate": made.candidate.model_copy(update=marks),
            "quality": made.quality.model_copy(update={"prefill": prefill}),
        }
    )


def raced(of: Trial, e2e_ms: float) -> Trial:
    """The trial with the rounds of a race."""
    timed = measured_trial(SHAPES[0]).measurements
    assert timed is not None
    rounds = tuple(demo_round(index, e2e_ms / 2, e2e_ms / 126) for index in range(5))
    return of.model_copy(update={"measurements": timed.model_copy(update={"rounds": rounds})})


def fallen(trials: Sequence[Trial]) -> dict[str, str]:
    """Who is out of the race, and why."""
    return {t.id: t.reason for t in trials if t.status == "stopped"}


# ── after the screening ──────────────────────────────────────────────────────────────────────────


def test_who_clearly_loses_too_much_quality_falls() -> None:
    """On the slice alone, if the slice leaves no doubt; the miss is kept with its evidence."""
    judged = after_screening([trial("lossy", kept=0.9), trial("fine")], spec(min_quality=0.99))
    assert set(fallen(judged)) == {"lossy"}
    lossy = judged[0]
    assert lossy.reason == "screening: misses min_quality: 0.900 < 0.990 (prefill path, 768 tokens)"
    assert lossy.fall is not None
    assert (lossy.fall.stage, lossy.fall.heat) == ("screening", None)
    assert [miss.limit for miss in lossy.misses] == ["min_quality"]


def test_a_doubt_about_quality_stops_nobody() -> None:
    """The full evaluation is for that."""
    assert fallen(after_screening([trial("near", kept=0.985, clear=False)], spec(min_quality=0.99))) == {}


def flipping(of: Trial, share: float, *, clear: bool = True) -> Trial:
    """The trial with another likeliest token than the reference at such a share of decoded positions."""
    assert of.quality is not None
    changes = {"top1_agreement": 1 - share, "clear_of_flips": clear}
    decode = of.quality.decode.model_copy(update=changes)
    return of.model_copy(update={"quality": of.quality.model_copy(update={"decode": decode})})


def test_a_kernel_that_flips_tokens_falls_although_it_shares_its_parents_files() -> None:
    """A knob that only the session heeds is judged by what its own kernels answered, however fast it is."""
    parent = trial("parent")
    quick = flipping(trial("parent-noflash", e2e_ms=600), 0.25)
    quick = quick.model_copy(update={"exported": parent.exported})
    judged = after_screening([quick, parent], spec(max_token_flips=0.1))
    assert set(fallen(judged)) == {"parent-noflash"}
    assert judged[0].reason.startswith("screening: misses max_token_flips: 0.250 > 0.100 (decode path")
    assert [miss.limit for miss in judged[0].misses] == ["max_token_flips"]


def test_a_doubt_about_flips_is_for_the_evaluation() -> None:
    """The slice stops nobody it is not sure of; what all windows say counts as it is."""
    near, asked = flipping(trial("near"), 0.12, clear=False), spec(max_token_flips=0.1)
    assert fallen(after_screening([near], asked)) == {}
    (out,) = after_evaluation([near], asked)
    assert out.reason.startswith("evaluation: misses max_token_flips: 0.120 > 0.100")
    assert final_contest([near], asked) is None


def test_who_needs_too_much_memory_falls() -> None:
    """Memory is measured once, in the screening, so it is decided there."""
    judged = after_screening([trial("large", rss_mb=900), trial("small")], spec(max_memory=ByteSize("800MB")))
    assert set(fallen(judged)) == {"large"}
    assert judged[0].misses[0].measured == 900e6
    assert "max_memory: " in judged[0].reason


def test_only_the_hopelessly_slow_fall_by_short_rounds() -> None:
    """Up to a factor of two the race decides; beyond it nobody comes back."""
    near, far = trial("near", e2e_ms=1000 * HOPELESS * 0.99), trial("far", e2e_ms=1000 * HOPELESS * 1.01)
    judged = after_screening([far, near, trial("best")], spec())
    assert fallen(judged) == {"far": "screening: 2.02 times worse than best in short rounds"}
    assert [t.id for t in judged] == ["far", "near", "best"]


@pytest.mark.parametrize(
    ("objective", "falls"), [("latency", set()), ("memory", {"large"}), ("ttft", set()), ("tpot", set())]
)
def test_hopeless_is_meant_by_the_objective(objective: Any, falls: set[str]) -> None:
    """Three times the memory is hopeless only for who wants little of it."""
    judged = after_screening([trial("large", rss_mb=1500), trial("small")], spec(objective=objective))
    assert set(fallen(judged)) == falls


def test_only_so_many_enter_the_race() -> None:
    """The best by short rounds go on; the others say which place they had."""
    field = [trial(f"t{n}", e2e_ms=1000 + n) for n in range(MOST_ENTRANTS + 2)]
    judged = after_screening(field, spec())
    assert set(fallen(judged)) == {f"t{MOST_ENTRANTS}", f"t{MOST_ENTRANTS + 1}"}
    assert judged[-2].reason == "screening: place 7 in short rounds, for 6 places"


def test_the_baseline_falls_for_nothing() -> None:
    """Every claim is made against it, so it is timed however slow, large or lossy it is."""
    hand = trial("hand", e2e_ms=9000, rss_mb=9000, kept=0.5, baseline=True)
    assert fallen(after_screening([hand, trial("a")], spec(max_memory=ByteSize("800MB")))) == {}


def test_who_failed_or_was_vetoed_stays_as_it_is() -> None:
    """There is nothing to judge."""
    others = [crashed_trial(), *vetoed_trials()]
    assert after_screening(others, spec()) == others


# ── after the evaluation ─────────────────────────────────────────────────────────────────────────


def test_who_loses_too_much_quality_in_full_falls_before_the_final() -> None:
    """By all that was scored, clear of the limit or not; the baseline and, recalled, the incumbent are timed
    all the same."""
    field = [
        trial("near", kept=0.985, clear=False),
        trial("fine"),
        trial("hand", kept=0.9, baseline=True),
        trial("served", kept=0.9, incumbent=True),
        crashed_trial(),
    ]
    judged = after_evaluation(field, spec(min_quality=0.99))
    assert fallen(judged) == {
        "near": "evaluation: misses min_quality: 0.985 < 0.990 (prefill path, 768 tokens)",
        "served": "evaluation: misses min_quality: 0.900 < 0.990 (prefill path, 768 tokens)",
    }
    assert set(fallen(recall(judged))) == {"near"}
    assert judged[0].fall is not None
    assert judged[0].fall.stage == "evaluation"
    assert [miss.limit for miss in judged[0].misses] == ["min_quality"]
    assert [judged[i] for i in (1, 2, 4)] == [field[i] for i in (1, 2, 4)]


# ── places that become free ──────────────────────────────────────────────────────────────────────


def evaluated(
    field: Sequence[Trial], lossy: Container[str], asked: OptimizeSpec
) -> tuple[list[Trial], list[list[str]]]:
    """The field after every wave of an evaluation that finds ``lossy`` to lose too much; and who was in each
    wave, as far as it was scored."""
    wave = after_screening(field, asked)
    standings, waves = Standings(trials=tuple(wave)), []
    while wave:
        waves.append([t.id for t in wave if t.status == "ok"])
        scored = [less(t, 0.9) if t.id in lossy and t.status == "ok" else t for t in wave]
        standings, wave = standings.refilled(scored, asked)
    return list(standings.trials), waves


def less(of: Trial, kept: float) -> Trial:
    """The trial as a full evaluation judged it."""
    judged = trial("judged", kept=kept).quality
    return of.model_copy(update={"quality": judged})


def entrants(trials: Sequence[Trial], asked: OptimizeSpec) -> Sequence[str]:
    contest = race_contest(trials, asked)
    assert contest is not None
    return contest.contestants


def test_who_falls_in_the_evaluation_gives_its_place_to_the_next() -> None:
    """Four of six fall, so the seventh to tenth are evaluated; of those one falls, so the eleventh is."""
    field, asked = [trial(f"t{n}", e2e_ms=1000 + n) for n in range(14)], spec()
    trials, waves = evaluated(field, {"t0", "t2", "t3", "t5", "t8"}, asked)
    assert waves == [["t0", "t1", "t2", "t3", "t4", "t5"], ["t6", "t7", "t8", "t9"], ["t10"]]
    assert entrants(trials, asked) == ["t1", "t4", "t6", "t7", "t9", "t10"]
    assert [t.id for t in trials] == [t.id for t in field]
    assert {t.id: t.fall.stage for t in trials if t.fall} == {
        **dict.fromkeys(("t0", "t2", "t3", "t5", "t8"), "evaluation"),
        **dict.fromkeys(("t11", "t12", "t13"), "screening"),
    }
    assert trials[11].reason == "screening: place 12 in short rounds, for 6 places"
    assert (trials[7].status, trials[7].reason, trials[7].fall) == ("ok", "screened", None)


def test_a_crash_in_the_evaluation_frees_a_place_too() -> None:
    """Whatever takes an entrant out, the next one comes in."""
    field = after_screening([trial(f"t{n}", e2e_ms=1000 + n) for n in range(MOST_ENTRANTS + 2)], spec())
    field[3] = crashed_trial()
    assert [t.id for t in called_up(field, spec(), waves=1)] == [f"t{MOST_ENTRANTS}"]


def test_who_misses_a_limit_is_never_called_up() -> None:
    """Nor who is hopeless beside somebody who is still in."""
    field = [
        *(trial(f"t{n}", e2e_ms=1000 + n) for n in range(3)),
        trial("lossy", kept=0.9),
        trial("large", rss_mb=900),
        trial("far", e2e_ms=1001 * HOPELESS * 1.01),
    ]
    trials, waves = evaluated(field, {"t0"}, spec(max_memory=ByteSize("800MB")))
    assert waves == [["t0", "t1", "t2"]]
    assert fallen(trials).keys() == {"t0", "lossy", "large", "far"}


def test_hopeless_only_beside_one_that_fell_is_not_hopeless() -> None:
    """What is compared with has to be fit to win itself."""
    field = [trial("quick", e2e_ms=400), trial("sound", e2e_ms=900), trial("slow", e2e_ms=1900)]
    trials, waves = evaluated(field, {"quick"}, spec())
    assert waves == [["quick"], ["sound"]]
    assert fallen(trials)["slow"] == "screening: 4.75 times worse than quick in short rounds"
    assert final_contest(trials, spec()) is not None


@given(st.sets(st.integers(0, 29)), st.integers(1, 30))
def test_the_places_go_to_the_first_that_are_sound(lossy: set[int], many: int) -> None:
    """Whoever they are, in as few waves as it takes; the number of waves is limited once anybody is sound."""
    field, asked = [trial(f"t{n}", e2e_ms=1000 + n) for n in range(many)], spec()
    trials, waves = evaluated(field, {f"t{n}" for n in lossy}, asked)
    sound = [f"t{n}" for n in range(many) if n not in lossy]
    racing = [t.id for t in trials if t.status == "ok"]
    tried = [name for wave in waves for name in wave]
    assert tried == [f"t{n}" for n in range(len(tried))]
    assert racing == sound[: len(racing)]
    assert bool(racing) == bool(sound)
    assert len(racing) == min(MOST_ENTRANTS, len(sound)) or len(waves) >= MOST_WAVES
    assert len(waves) <= MOST_WAVES or not any(name in sound for wave in waves[:-1] for name in wave)
    assert evaluated(field, {f"t{n}" for n in lossy}, asked) == (trials, waves)


# ── without a race ───────────────────────────────────────────────────────────────────────────────


def test_without_a_race_the_best_go_on_by_what_the_screening_saw() -> None:
    """As for the objective memory; whoever is left out has a reason, and the incumbent stays."""
    field = [trial(f"t{n}", rss_mb=100 + n) for n in range(4)]
    field.append(trial("served", rss_mb=900, incumbent=True))
    judged = best_go_on(field, spec(objective="memory"))
    assert fallen(judged) == {"t3": "race: place 4 of 5, and 3 go on"}


# ── the incumbent ────────────────────────────────────────────────────────────────────────────────


def test_an_incumbent_among_the_candidates_falls_and_is_recalled() -> None:
    """Whatever beats it has to do so in the final, so it is as good as new there."""
    incumbent = trial("served", e2e_ms=9000, rss_mb=9000, incumbent=True)
    judged = after_screening([incumbent, trial("a")], spec(max_memory=ByteSize("800MB")))
    assert set(fallen(judged)) == {"served"}
    back, other = recall(judged)
    assert (back.status, back.fall, back.misses) == ("ok", None, ())
    assert back.reason == "the registered champion, for comparison"
    assert other == judged[1]


def test_only_the_incumbent_is_recalled_and_only_if_it_can_run() -> None:
    """Who crashed has no figures to compare, and the others fell for good."""
    crashed = crashed_trial()
    marked = crashed.model_copy(
        update={"candidate": crashed.candidate.model_copy(update={"incumbent": True})}
    )
    (slow, _) = after_screening([trial("slow", e2e_ms=9000), trial("a")], spec())
    assert recall([marked, slow]) == [marked, slow]


def test_the_bundle_of_an_older_champion_neither_falls_nor_races() -> None:
    """It is none of the engines' candidates: it waits for the final."""
    bundle = trial("registered-v3", e2e_ms=9000, incumbent=True)
    field = [bundle, *(trial(f"t{n}") for n in range(4))]
    judged = after_screening(field, spec())
    assert fallen(judged) == {}
    contest = race_contest(judged, spec())
    assert contest is not None
    assert "registered-v3" not in contest.contestants


# ── the race ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("able", "races"), [(FINALISTS, False), (FINALISTS + 1, True)])
def test_a_race_is_held_if_there_are_more_than_the_final_takes(able: int, races: bool) -> None:
    """The baseline and those that are out do not count."""
    field = [trial(f"t{n}") for n in range(able)]
    field += [trial("hand", baseline=True), crashed_trial(), *vetoed_trials()]
    assert (race_contest(field, spec()) is not None) == races


def test_memory_is_not_raced_for() -> None:
    """Rounds tell nothing about it."""
    assert race_contest([trial(f"t{n}") for n in range(9)], spec(objective="memory")) is None


def test_a_race_ends_with_as_many_as_the_final_takes() -> None:
    """Within half the timing budget, by the objective's own figure, without a twin."""
    contest = race_contest([trial(f"t{n}") for n in range(5)], spec(objective="tpot", timing_budget_s=30))
    assert contest is not None
    assert contest.contestants == [f"t{n}" for n in range(5)]
    rules = contest.rules
    assert (rules.metric, rules.keep, rules.most_heats, rules.budget_s) == (
        "tpot_ms",
        FINALISTS,
        RACE_HEATS,
        15,
    )
    assert rules.figure(demo_round(0, 700, 12)) == 12


@pytest.mark.parametrize(
    ("limits", "fits"),
    [
        ({}, True),
        ({"max_latency": Duration("500ms"), "max_tpot": Duration("10ms")}, True),
        ({"max_latency": Duration("499ms")}, False),
        ({"max_tpot": Duration("9ms")}, False),
    ],
    ids=str,
)
def test_who_breaks_a_limit_on_time_leads_nobody_out(limits: dict[str, Any], fits: bool) -> None:
    """The median of its rounds counts: one slow round breaks no limit."""
    contest = race_contest([trial(f"t{n}") for n in range(5)], spec(**limits))
    assert contest is not None
    assert contest.rules.fit is not None
    rounds = [demo_round(0, 9000, 900), demo_round(1, 500, 10), demo_round(2, 500, 10)]
    assert contest.rules.fit(rounds) == fits


# ── the final ────────────────────────────────────────────────────────────────────────────────────


def test_the_final_holds_the_best_the_baseline_and_the_incumbent() -> None:
    """And a second process of the best of all, which gives the noise floor."""
    field = [trial(f"t{n}", e2e_ms=1500 - n) for n in range(6)]
    field += [trial("hand", e2e_ms=5000, baseline=True), trial("registered-v1", e2e_ms=4000, incumbent=True)]
    contest = final_contest([*field, crashed_trial()], spec(rounds=20, target_width=0.02))
    assert contest is not None
    assert contest.contestants == ["t5", "t4", "t3", "hand", "registered-v1", "t5" + TWIN_SUFFIX]
    rules = contest.rules
    assert (rules.least_heats, rules.most_heats, rules.keep) == (20, MOST_HEATS, None)
    assert (rules.budget_s, rules.target_width) == (120, 0.02)


def test_what_the_race_showed_ranks_before_what_short_rounds_guess() -> None:
    """Its rounds are of the full length."""
    guessed = trial("guessed", e2e_ms=100)
    field = [raced(trial("slower", e2e_ms=200), 900), raced(trial("quicker", e2e_ms=300), 800), guessed]
    contest = final_contest(field, spec())
    assert contest is not None
    assert contest.contestants[:3] == ["quicker", "slower", "guessed"]


def test_who_lost_too_much_quality_in_full_is_not_in_the_final() -> None:
    """Unless it is a yardstick; that one runs, but leads nobody."""
    field = [
        trial("lossy", e2e_ms=500, kept=0.9),
        trial("good"),
        trial("hand", kept=0.9, baseline=True),
    ]
    contest = final_contest(field, spec(min_quality=0.99))
    assert contest is not None
    assert contest.contestants == ["good", "hand", "good" + TWIN_SUFFIX]
    assert contest.rules.leaders == {"good"}


def test_a_final_of_nobody_who_may_win_is_not_held() -> None:
    """Two minutes of timing would decide nothing."""
    lossy = [trial("lossy", kept=0.9), trial("hand", kept=0.9, baseline=True)]
    assert final_contest(lossy, spec(min_quality=0.99)) is None
    assert final_contest([crashed_trial(), *vetoed_trials()], spec()) is None


def test_an_incumbent_that_is_a_candidate_runs_once() -> None:
    """Among the best or not, it is there, and not beside itself."""
    field = [trial("served", incumbent=True), trial("a", e2e_ms=900)]
    contest = final_contest(field, spec())
    assert contest is not None
    assert contest.contestants == ["a", "served", "a" + TWIN_SUFFIX]


def test_the_objective_memory_is_timed_too() -> None:
    """Its finalists are the smallest, and the figures beside them are theirs."""
    field = [trial(f"t{n}", rss_mb=500 - n) for n in range(5)]
    contest = final_contest(field, spec(objective="memory"))
    assert contest is not None
    assert contest.contestants[:3] == ["t4", "t3", "t2"]
    assert contest.rules.metric == "e2e_ms"
