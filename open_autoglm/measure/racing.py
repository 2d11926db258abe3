"""Interleaved heats: everyone runs the same round side by side, and the hopeless leave early.

Every second heat mirrors the one before (ABBA), so a drift of the host hits all alike, and over the heats
each contestant runs right after each other one equally often (:func:`balanced_orders`). A race drops
whoever a paired test shows to be slower than the leader; a final drops nobody and runs until its
comparisons are narrow enough. Nothing is timed here: a runner does it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from open_autoglm.measure.comparison import (
    LEAST_PAIRS,
    beaten,
    compare,
    noise_floor,
    relative_width,
    rounds_needed,
    settled,
)
from open_autoglm.measure.isolation import Failure
from open_autoglm.schemas import Comparison, Fall, NoiseFloor, Race, Round

TWIN_SUFFIX = "~twin"
"""``x~twin`` is candidate ``x`` in a second process: the A/A comparison. It never leads."""

BUDGET_HEATS = 5
"""A spent budget ends the heats, though not before this many."""

REPEATS_PER_HEAT = 2
"""How often a disturbed round is run again at once, before it counts as it is."""

Stage = Literal["race", "final"]


class Runner(Protocol):
    """Runs one timed round; ``index`` counts the heats, and the workload begins again where it ends."""

    def __call__(self, contestant: str, index: int) -> Round | Failure: ...


@dataclass(frozen=True)
class HeatReport:
    """What one heat changed, for whoever watches."""

    stage: Stage
    heat: int
    left: tuple[str, ...]
    leader: str | None
    fallen: dict[str, Fall]
    seconds: float


@dataclass(frozen=True)
class Rules:
    """When contestants fall and when the heats end.

    ``figure`` makes one number of a round, lower is better. ``keep`` makes a race of it: it ends when
    no more than so many are left besides the ``protected``, who never fall; without it nobody is dropped.
    ``least_heats`` are run before intervals may end a final (a spent budget may from `BUDGET_HEATS` on).
    ``leaders`` may lead; none named means everybody in a final, and the unprotected in a race.
    ``fit`` says of a contestant's counted rounds whether they keep the limits: whoever breaks one ranks
    behind those who do not, so that it cannot lead them out of the race.
    ``repeats`` bounds a contestant's repeated rounds, as a share of the heats so far: a host that is
    never quiet must come to an end.
    """

    figure: Callable[[Round], float]
    metric: str
    least_heats: int
    most_heats: int
    budget_s: float
    target_width: float = 0.05
    keep: int | None = None
    protected: frozenset[str] = frozenset()
    leaders: frozenset[str] = frozenset()
    fit: Callable[[Sequence[Round]], bool] | None = None
    repeats: float = 1.0
    clock: Callable[[], float] = time.perf_counter
    on_heat: Callable[[HeatReport], None] | None = None


@dataclass(frozen=True)
class Outcome:
    """All rounds in the order each contestant ran them, what they showed, and who could not go on."""

    rounds: dict[str, tuple[Round, ...]]
    race: Race
    failures: dict[str, Failure]
    standing: tuple[str, ...]
    """Those left at the end, best first."""

    def counted(self, contestant: str) -> tuple[Round, ...]:
        """Its rounds without those that were repeated: the nth is of heat n, for every contestant."""
        return _counted(self.rounds[contestant])


def run_race(stage: Stage, contestants: Sequence[str], runner: Runner, rules: Rules) -> Outcome:
    """Run heats until the rules end them. Raises ValueError if a contestant is named twice."""
    if len(set(contestants)) < len(contestants):
        raise ValueError(f"each contestant may run once: {', '.join(contestants)}")
    heats = _Heats(stage, contestants, runner, rules)
    while not (ended := heats.ended_because()):
        heats.run_one()
    return heats.outcome(ended)


def _counted(rounds: Sequence[Round]) -> tuple[Round, ...]:
    return tuple(r for r in rounds if not r.repeated)


def balanced_orders(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Orders of ``names`` in which each stands at each place, and right behind each other one, equally often;
    every second is the mirror of the one before.

    What ran before may leave its mark on caches and clock, and in plain ABBA of more than two the same one
    always runs before. This is the design of Williams (*Australian Journal of Scientific Research* A 2,
    1949): as many orders as names, or twice as many for an odd number.
    """
    count = len(names)
    zigzag = [(place + 1) // 2 if place % 2 else -place // 2 for place in range(count)]
    rows = [tuple(names[(shift + step) % count] for step in zigzag) for shift in range(count)]
    if count % 2:
        return [order for row in rows for order in (row, row[::-1])]
    half = count // 2  # the mirror of a row of an even design is the row half a turn on
    return [order for first in range(half) for order in (rows[first], rows[first + half])] or [()]


class _Heats:
    """A race under way. ``figures`` has one number per heat for each active contestant: these pair up."""

    def __init__(self, stage: Stage, contestants: Sequence[str], runner: Runner, rules: Rules) -> None:
        self._stage, self._runner, self._rules = stage, runner, rules
        self._active = list(contestants)
        self._rounds: dict[str, list[Round]] = {name: [] for name in contestants}
        self._figures: dict[str, list[float]] = {name: [] for name in contestants}
        self._orders: list[tuple[str, ...]] = []
        self._repeats: Counter[str] = Counter()
        self._fallen: dict[str, Fall] = {}
        self._failures: dict[str, Failure] = {}
        self._halved = False
        self._started = rules.clock()

    # ── one heat ─────────────────────────────────────────────────────────────────────────────────

    def run_one(self) -> None:
        """One round of everybody, then the judgement, then the report."""
        before = set(self._fallen)
        orders = balanced_orders(self._active)
        order = orders[len(self._orders) % len(orders)]
        self._orders.append(order)
        for name in order:
            self._run_round(name)
        if self._rules.keep is not None and len(self._orders) >= LEAST_PAIRS:
            self._drop_beaten()
            self._drop_worse_half()
        if self._rules.on_heat:
            fallen = {name: fall for name, fall in self._fallen.items() if name not in before}
            report = HeatReport(
                self._stage, self._heat, tuple(self._active), self._leader(), fallen, self._seconds
            )
            self._rules.on_heat(report)

    def _run_round(self, name: str) -> None:
        """One counted round; a disturbed one is kept, marked, and run again at once."""
        for attempt in range(REPEATS_PER_HEAT + 1):
            result = self._runner(name, self._heat)
            if isinstance(result, Failure):
                self._failures[name] = result
                self._drop(name, result.reason)
                return
            if not (result.conditions.disturbances and self._may_repeat(name, attempt)):
                self._rounds[name].append(result)
                self._figures[name].append(self._rules.figure(result))
                return
            self._repeats[name] += 1
            self._rounds[name].append(result.model_copy(update={"repeated": True}))

    def _may_repeat(self, name: str, attempt: int) -> bool:
        allowed = self._rules.repeats * len(self._orders)
        return attempt < REPEATS_PER_HEAT and self._repeats[name] < allowed

    @property
    def _heat(self) -> int:
        return len(self._orders) - 1

    @property
    def _seconds(self) -> float:
        return self._rules.clock() - self._started

    # ── who falls ────────────────────────────────────────────────────────────────────────────────

    def _drop(self, name: str, reason: str) -> None:
        self._active.remove(name)
        self._fallen[name] = Fall(stage=self._stage, heat=self._heat, reason=reason)

    def _drop_beaten(self) -> None:
        """Whoever is slower than the leader with 99 % confidence. Each heat tests again, so an equal
        contestant falls a little more often than 1 in 100; it takes nothing from the leader."""
        leader = self._leader()
        for name in self._unprotected:
            if leader is None or name == leader:
                continue
            ours, theirs = self._figures[name], self._figures[leader]
            if proof := beaten(name, leader, self._rules.metric, ours, theirs):
                low, high = proof.interval
                self._drop(
                    name,
                    f"{proof.change:.1%} slower than {leader} after {proof.pairs} heats "
                    f"(99 % sure; {proof.confidence:.0%} interval {low:+.1%} to {high:+.1%})",
                )

    def _drop_worse_half(self) -> None:
        """Successive halving: once half the budget is spent, the rest of it is for the better half."""
        if self._halved or self._seconds < self._rules.budget_s / 2:
            return
        self._halved = True
        self._keep_best((len(self._unprotected) + 1) // 2, "when half the budget was spent")

    def _keep_best(self, most: int, when: str) -> None:
        ranked = self._ranked(self._unprotected)
        most = max(most, self._rules.keep or 0)
        for place, name in enumerate(ranked[most:], start=most + 1):
            self._drop(
                name,
                f"place {place} of {len(ranked)} {when}, and {most} go on: by rank, not by proof",
            )

    # ── who leads ────────────────────────────────────────────────────────────────────────────────

    @property
    def _unprotected(self) -> list[str]:
        """Those who may fall."""
        return [n for n in self._active if n not in self._rules.protected and not n.endswith(TWIN_SUFFIX)]

    def _leader(self) -> str | None:
        eligible = [n for n in self._active if not n.endswith(TWIN_SUFFIX)]
        if self._rules.keep is not None:
            eligible = self._unprotected
        if self._rules.leaders:
            eligible = [n for n in eligible if n in self._rules.leaders]
        return next(iter(self._ranked(eligible)), None)

    def _ranked(self, names: list[str]) -> list[str]:
        """Best first: the fit ones, then by the median. A slow heat is slow for all, so figures count
        relative to its mean."""
        if not (names and self._orders):
            return names
        logs = np.log([self._figures[name] for name in self._active])
        relative = np.median(logs - logs.mean(axis=0), axis=1)
        score = dict(zip(self._active, relative.tolist(), strict=True))
        fit = self._rules.fit or (lambda _rounds: True)
        return sorted(names, key=lambda name: (not fit(_counted(self._rounds[name])), score[name]))

    def _comparisons(self) -> tuple[Comparison, ...]:
        leader = self._leader()
        if leader is None or len(self._figures[leader]) < LEAST_PAIRS:
            return ()
        return tuple(self._compare(name, leader) for name in self._active if name != leader)

    def _compare(self, name: str, against: str) -> Comparison:
        return compare(name, against, self._rules.metric, self._figures[name], self._figures[against])

    def _noise(self) -> NoiseFloor | None:
        for name in self._active:
            original = name.removesuffix(TWIN_SUFFIX)
            if name != original and original in self._active and len(self._figures[name]) >= LEAST_PAIRS:
                return noise_floor(self._compare(name, original))
        return None

    # ── when it ends ─────────────────────────────────────────────────────────────────────────────

    def ended_because(self) -> str:
        """The sentence that ends the heats, or an empty one."""
        rules, heats = self._rules, len(self._orders)
        if not self._active:
            return "nobody is left: every contestant failed"
        if rules.keep is not None and len(self._unprotected) <= rules.keep:
            return f"after {heats} heats no more than {rules.keep} are left to choose from"
        if rules.keep is None and (settled_because := self._settled_because()):
            return settled_because
        if heats >= rules.most_heats:
            return f"all {rules.most_heats} heats were run{self._what_is_missing()}"
        if heats >= min(BUDGET_HEATS, rules.least_heats) and self._seconds >= rules.budget_s:
            missing = self._what_is_missing()
            return f"the budget of {rules.budget_s:g} s was spent after {heats} heats{missing}"
        return ""

    def _settled_because(self) -> str:
        """Asked after even heats only: then everybody has run as often early in a heat as late."""
        heats, width = len(self._orders), self._rules.target_width
        if heats < self._rules.least_heats or heats % 2:
            return ""
        comparisons = self._comparisons()
        if not all(settled(c, width) for c in comparisons):
            return ""
        if not comparisons:
            return f"after {heats} heats there is nobody to compare with"
        return f"after {heats} heats every interval is narrower than {width:.1%}, or far from zero"

    def _what_is_missing(self) -> str:
        """For a final that ends too early: how wide the widest interval is, and what would mend it."""
        width = self._rules.target_width
        unsettled = [c for c in self._comparisons() if not settled(c, width)]
        if self._rules.keep is not None or not unsettled:
            return ""
        widest = max(unsettled, key=relative_width)
        return (
            f"; the interval of {widest.candidate} is {relative_width(widest):.1%} wide where {width:.1%} "
            f"was asked for, which takes about {rounds_needed(widest, width)} heats"
        )

    def outcome(self, ended: str) -> Outcome:
        seconds = self._seconds
        if self._rules.keep is not None:
            self._keep_best(self._rules.keep, "when the race ended")
        race = Race(
            stage=self._stage,
            metric=self._rules.metric,
            heats=tuple(self._orders),
            fallen=self._fallen,
            comparisons=self._comparisons(),
            noise=self._noise(),
            stopped_because=ended,
            seconds=seconds,
        )
        rounds = {name: tuple(taken) for name, taken in self._rounds.items()}
        return Outcome(rounds, race, self._failures, tuple(self._ranked(self._active)))
