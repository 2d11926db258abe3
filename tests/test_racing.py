"""Heats, falls and ends, on hosts whose truth is known and whose clock only rounds pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest

from benchmarks.simulated import NOISE_KINDS, NoiseKind, SimulatedHost, e2e_ms
from benchmarks.trust import run_cell
from open_autoglm.measure.isolation import Failure
from open_autoglm.measure.racing import (
    BUDGET_HEATS,
    REPEATS_PER_HEAT,
    HeatReport,
    Outcome,
    Rules,
    Stage,
    balanced_orders,
    run_race,
)
from open_autoglm.schemas import Conditions, Round

FINAL = Rules(figure=e2e_ms, metric="e2e_ms", least_heats=10, most_heats=200, budget_s=120)
RACE = replace(FINAL, least_heats=5, most_heats=40, keep=1)


@dataclass
class Recorder:
    """Passes rounds on and remembers who was asked for which; may disturb them or fail."""

    host: SimulatedHost
    disturbed: Callable[[str, int], bool] = lambda _name, _index: False
    fails: Mapping[str, int] = field(default_factory=dict)
    calls: list[tuple[str, int]] = field(default_factory=list)

    def __call__(self, contestant: str, index: int) -> Round | Failure:
        self.calls.append((contestant, index))
        if self.fails.get(contestant) == index:
            return Failure("crashed", "ended with SIGSEGV")
        taken = self.host(contestant, index)
        cores = 1.0 if self.disturbed(contestant, index) else 0.0
        return taken.model_copy(update={"conditions": Conditions(foreign_cores=cores)})


def race(
    stage: Stage, rules: Rules, noise: NoiseKind = "gaussian", seed: int = 0, **true_ms: float
) -> Outcome:
    """A race or final of contestants named in the call; ``x_twin`` is the twin of ``x``."""
    true_ms = {name.replace("_twin", "~twin"): ms for name, ms in true_ms.items()}
    host = SimulatedHost(true_ms, noise, seed)
    return run_race(stage, tuple(true_ms), host, replace(rules, clock=host.clock))


@pytest.mark.parametrize("count", range(1, 8))
def test_orders_are_balanced(count: int) -> None:
    """Each contestant at each place, and right behind each other one, equally often; mirrored in pairs."""
    names = "abcdefg"[:count]
    orders = balanced_orders(names)
    places = Counter((place, name) for order in orders for place, name in enumerate(order))
    followers = Counter(pair for order in orders for pair in pairwise(order))
    assert len(places) == count * count
    assert len(set(places.values())) == 1
    assert len(followers) == count * (count - 1)
    assert len(set(followers.values())) <= 1
    assert all(mirrored == order[::-1] for order, mirrored in zip(orders[::2], orders[1::2], strict=False))


def recorded(rules: Rules, **wishes: object) -> tuple[Recorder, Outcome]:
    """A final of two equal contestants with the recorder between."""
    host = SimulatedHost({"a": 800, "b": 800})
    recorder = Recorder(host, **wishes)  # type: ignore[arg-type]
    return recorder, run_race("final", ("a", "b"), recorder, replace(rules, clock=host.clock))


def test_every_other_heat_runs_in_reverse() -> None:
    """ABBA: everybody runs as often early as late, on the same round of the workload."""
    recorder, outcome = recorded(replace(FINAL, most_heats=4))
    assert recorder.calls == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2), ("b", 3), ("a", 3)]
    assert outcome.race.heats == (("a", "b"), ("b", "a"), ("a", "b"), ("b", "a"))


def test_a_disturbed_round_is_run_again_at_once_and_kept() -> None:
    """The marked round stays in the record, and the figures are made of the one after it."""
    disturbances = iter([False, False, True, False, False, False])
    recorder, outcome = recorded(replace(FINAL, most_heats=3), disturbed=lambda *_: next(disturbances, False))
    assert recorder.calls[:5] == [("a", 0), ("b", 0), ("b", 1), ("b", 1), ("a", 1)]
    assert [r.repeated for r in outcome.rounds["b"]] == [False, True, False, False]
    assert [r.index for r in outcome.counted("b")] == [0, 1, 2]
    assert outcome.race.comparisons[0].pairs == 3


def test_a_host_that_is_never_quiet_comes_to_an_end() -> None:
    """After as many repeats as heats, disturbed rounds count: twice the rounds, and still marked."""
    _, outcome = recorded(replace(FINAL, most_heats=10), disturbed=lambda *_: True)
    assert len(outcome.race.heats) == 10
    for name, rounds in outcome.rounds.items():
        assert len(rounds) == 20
        assert len(outcome.counted(name)) == 10
        assert all(r.conditions.disturbances for r in outcome.counted(name))


def test_one_heat_repeats_a_round_only_so_often() -> None:
    """A burst that outlasts the repeats does not hold up everybody else."""
    recorder, _ = recorded(
        replace(FINAL, most_heats=8), disturbed=lambda name, heat: (name, heat) == ("a", 6)
    )
    assert recorder.calls.count(("a", 6)) == 1 + REPEATS_PER_HEAT


def test_a_failure_drops_out_alone() -> None:
    """Its rounds are kept, its reason is told, and it takes part in no comparison."""
    _, outcome = recorded(FINAL, fails={"b": 4})
    assert outcome.failures == {"b": Failure("crashed", "ended with SIGSEGV")}
    assert outcome.race.fallen["b"].reason == "ended with SIGSEGV"
    assert outcome.race.fallen["b"].heat == 4
    assert len(outcome.rounds["b"]) == 4
    assert outcome.race.comparisons == ()
    assert outcome.standing == ("a",)
    assert outcome.race.stopped_because == "after 10 heats there is nobody to compare with"


def test_a_final_of_failures_ends() -> None:
    """With nobody left there is nothing to run."""
    _, outcome = recorded(FINAL, fails={"a": 0, "b": 0})
    assert set(outcome.failures) == {"a", "b"}
    assert outcome.standing == ()
    assert "every contestant failed" in outcome.race.stopped_because


def test_a_contestant_named_twice_is_refused() -> None:
    """Its rounds could not be told apart."""
    with pytest.raises(ValueError, match="once"):
        run_race("final", ("a", "a"), SimulatedHost({"a": 800}), FINAL)


def test_the_hopeless_fall_early_and_are_told_why() -> None:
    """Twice as slow: out after a few heats, by proof, with who beat it and by how much."""
    outcome = race("race", RACE, fast=800, slow=1600)
    fall = outcome.race.fallen["slow"]
    assert fall.stage == "race"
    assert fall.heat is not None
    assert fall.heat <= 4
    assert "slower than fast" in fall.reason
    assert "99 % sure" in fall.reason
    assert outcome.standing == ("fast",)
    assert "no more than 1" in outcome.race.stopped_because


def test_the_protected_never_fall() -> None:
    """Baseline, incumbent and twin stay to the end, however slow; only the others are counted."""
    rules = replace(RACE, protected=frozenset({"baseline"}))
    outcome = race("race", rules, baseline=4000, fast=800, slow=1600, fast_twin=800)
    assert set(outcome.race.fallen) == {"slow"}
    assert set(outcome.standing) == {"baseline", "fast", "fast~twin"}


def test_equals_fall_by_rank_and_the_reason_says_so() -> None:
    """Half the budget halves the field, the end leaves as many as go on; neither claims proof."""
    names = dict.fromkeys("abcdefgh", 800.0)
    host = SimulatedHost(names)
    outcome = run_race("race", tuple(names), host, replace(RACE, keep=2, budget_s=60, clock=host.clock))
    by_rank = [fall for fall in outcome.race.fallen.values() if "by rank, not by proof" in fall.reason]
    assert len(by_rank) >= 5
    assert any("half the budget" in fall.reason for fall in by_rank)
    assert any("when the race ended" in fall.reason for fall in by_rank)
    assert len(outcome.standing) == 2
    assert len({len(heat) for heat in outcome.race.heats}) >= 2  # the second half ran with fewer


def test_a_race_with_nobody_to_drop_runs_nothing() -> None:
    """Two contestants for two places need no heats."""
    outcome = race("race", replace(RACE, keep=2), a=800, b=900)
    assert outcome.race.heats == ()
    assert outcome.standing == ("a", "b")


def test_a_final_drops_nobody() -> None:
    """However slow: the report shows everybody's full rounds."""
    outcome = race("final", FINAL, fast=800, slow=3200)
    assert outcome.race.fallen == {}
    assert {len(rounds) for rounds in outcome.rounds.values()} == {len(outcome.race.heats)}


def test_a_final_ends_when_its_intervals_are_narrow() -> None:
    """Not before its least heats, in balance, and with the promised width."""
    outcome = race("final", FINAL, a=800, b=810)
    low, high = outcome.race.comparisons[0].interval
    assert high - low <= 0.05 * (1 + outcome.race.comparisons[0].change)
    assert len(outcome.race.heats) >= 10
    assert len(outcome.race.heats) % 2 == 0
    assert "every interval is narrower than 5.0%" in outcome.race.stopped_because


def test_a_large_difference_needs_no_narrow_interval() -> None:
    """Nobody asks whether it is 4.0 or 4.1 times slower: the least heats are enough."""
    outcome = race("final", replace(FINAL, target_width=0.02), fast=800, slow=3200)
    assert len(outcome.race.heats) == 10


def test_a_spent_budget_ends_a_final_and_says_what_is_missing() -> None:
    """It does so after five heats at the earliest, with the width reached and the heats it would take."""
    outcome = race("final", replace(FINAL, budget_s=1, target_width=0.001), a=800, b=800)
    assert len(outcome.race.heats) == BUDGET_HEATS
    assert "budget of 1 s was spent after 5 heats" in outcome.race.stopped_because
    assert "0.1% was asked for" in outcome.race.stopped_because
    assert outcome.race.seconds > 1


def test_the_most_heats_end_a_final() -> None:
    """With time to spare and a width out of reach."""
    outcome = race("final", replace(FINAL, most_heats=12, target_width=1e-6), a=800, b=800)
    assert len(outcome.race.heats) == 12
    assert outcome.race.stopped_because.startswith("all 12 heats were run; ")


def test_the_twin_gives_the_noise_floor_and_never_leads() -> None:
    """The A/A comparison is of the twin against its original, even if the twin was faster."""
    outcome = race("final", FINAL, a=800, b=900, a_twin=700)
    noise = outcome.race.noise
    assert noise is not None
    assert (noise.comparison.candidate, noise.comparison.against) == ("a~twin", "a")
    assert noise.comparison.clear  # these twins do differ, and the floor says so
    assert noise.floor > 0.1
    assert {c.against for c in outcome.race.comparisons} == {"a"}


def test_only_those_named_may_lead() -> None:
    """A baseline outside the leaders is compared with the leader, not the other way round."""
    outcome = race("final", replace(FINAL, leaders=frozenset({"a", "b"})), a=900, b=1000, baseline=800)
    assert {c.against for c in outcome.race.comparisons} == {"a"}
    assert outcome.standing == ("baseline", "a", "b")


def test_a_slow_heat_is_slow_for_all() -> None:
    """Who is faster in two heats of three leads, though the medians of a drifting host say otherwise."""
    taken_ms = {"a": (100.0, 200.0, 300.0), "b": (99.0, 250.0, 299.0)}

    def runner(contestant: str, index: int) -> Round:
        host = SimulatedHost({contestant: 1.0})
        return host(contestant, index).model_copy(update={"e2e_ms": (taken_ms[contestant][index],)})

    assert run_race("final", ("a", "b"), runner, replace(FINAL, most_heats=3)).standing == ("b", "a")


def test_who_breaks_a_limit_leads_nobody_out_of_the_race() -> None:
    """The fastest in the race's figure breaks a limit: a slower one that keeps it leads and goes on."""

    def fit(rounds: Sequence[Round]) -> bool:
        return e2e_ms(rounds[0]) > 700  # any limit that `quick` breaks

    outcome = race("race", replace(RACE, fit=fit), quick=400, sound=800, slow=1600)
    assert outcome.standing == ("sound",)
    assert "slower than sound" in outcome.race.fallen["slow"].reason
    assert "by rank" in outcome.race.fallen["quick"].reason


def test_every_heat_is_reported() -> None:
    """Whoever watches sees each heat once, who is left, and each fall when it happens."""
    seen: list[HeatReport] = []
    outcome = race("race", replace(RACE, on_heat=seen.append), fast=800, slow=1600, slower=3200)
    assert [report.heat for report in seen] == list(range(len(outcome.race.heats)))
    assert {name for report in seen for name in report.fallen} == {"slow", "slower"}
    assert all(set(later.left) <= set(sooner.left) for sooner, later in pairwise(seen))
    assert seen[-1].leader == "fast"


# ── calibration: small repeats of `python -m benchmarks.trust`, with fixed seeds ───────────────────


@pytest.mark.parametrize("noise", NOISE_KINDS)
def test_equals_are_seldom_promoted(noise: NoiseKind) -> None:
    """A/A: the same engine as challenger and incumbent is promoted in no more than 5 % of finals."""
    cell = run_cell(noise, "A/A", repeats=60, seed=7)
    assert cell.promotions <= 3


@pytest.mark.parametrize("noise", NOISE_KINDS)
def test_a_tenth_is_found(noise: NoiseKind) -> None:
    """A challenger that takes 10 % less is promoted in 90 % of finals or more, within the budget."""
    cell = run_cell(noise, "10 %", repeats=40, seed=7)
    assert cell.promotions >= 36


def test_a_noisy_neighbour_crowns_nobody_at_random() -> None:
    """Three near-equal challengers: the same champion or a tie in 95 % of finals or more."""
    cell = run_cell("noisy_neighbour", "near-equal", repeats=40, seed=7)
    assert cell.agreeing >= 38
