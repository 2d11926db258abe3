"""Does the watch wake anybody for nothing, and does it wake them in time? ``python -m benchmarks.watch``.

Where the truth is known: simulated traffic of 30 healthy days, and of engines that become 20 or 10 % slower
at a moment chosen at random, on hosts that drift by so much for so long. The judge, its baselines and their
learning are those of production. Rates come with their 95 % Clopper-Pearson intervals.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np

from benchmarks.trust import share
from benchmarks.watch_traffic import BEGIN, DAY, SLO_S, WINDOW_S, Host, World, windows
from open_autoglm.files import write_atomic
from open_autoglm.monitoring.baseline import Baseline
from open_autoglm.monitoring.judge import JudgeState, Policy, judge
from open_autoglm.monitoring.lesson import Lesson, attend, next_baseline
from open_autoglm.schemas import Model
from open_autoglm.schemas.watch import Judgement, LatencyWindow, Slo

RESULTS = Path(__file__).parent / "results"
HEALTHY_DAYS = 30
LEARNED = 7 * DAY
SOON, TODAY = 2, DAY
"""Full windows within which 20 %, and 10 %, must have been found."""

HOSTS = (
    Host(drift=0.01, lasts_h=2),
    Host(drift=0.02, lasts_h=2),
    Host(drift=0.03, lasts_h=2),
    Host(drift=0.04, lasts_h=2),
    Host(drift=0.05, lasts_h=2),
    Host(drift=0.05, lasts_h=8),
    Host(drift=0.10, lasts_h=8),
)
POLICY = Policy(
    slo=Slo(ttft_p95_ms=SLO_S[0] * 1000, tpot_p95_ms=SLO_S[1] * 1000, e2e_p95_ms=SLO_S[2] * 1000),
    window_s=WINDOW_S,
)


class Watch:
    """One service from its first window on, judged and learned from as production does it."""

    def __init__(
        self, state: JudgeState | None = None, lesson: Lesson | None = None, baseline: Baseline | None = None
    ) -> None:
        self.state = state or JudgeState()
        self.lesson = lesson or Lesson()
        self.baseline = baseline

    def copy(self) -> Watch:
        return Watch(self.state, self.lesson, self.baseline)

    def see(self, window: LatencyWindow) -> Judgement:
        now = window.end + timedelta(seconds=1)
        judgement, self.state = judge(window, self.state, self.baseline, POLICY, now)
        before, self.lesson = self.lesson, attend(self.lesson, judgement, self.baseline, DAY)
        self.baseline = next_baseline(before, self.lesson, window.service, DAY) or self.baseline
        return judgement

    def breaches(self, given: Iterable[LatencyWindow]) -> Iterator[Judgement]:
        """Those judgements that begin a breach."""
        for window in given:
            was = self.state.breach
            judgement = self.see(window)
            if judgement.state == "breached" and was is None:
                yield judgement


class Healthy(Model):
    """30 days without a fault."""

    seed: int
    breaches: tuple[str, ...]


class Shift(Model):
    """One shift of the engine."""

    seed: int
    slower: float
    after: int | None = None
    """Full windows until it was found."""


class Cell(Model):
    """All repeats on one kind of host."""

    drift: float
    lasts_h: float
    healthy: tuple[Healthy, ...]
    shifts: tuple[Shift, ...]

    def found(self, slower: float, within: int) -> tuple[int, int]:
        """How many of how many."""
        tried = [shift for shift in self.shifts if shift.slower == slower]
        return sum(s.after is not None and s.after <= within for s in tried), len(tried)


def run_healthy(host: Host, seed: int, days: int = HEALTHY_DAYS) -> Healthy:
    found = Watch().breaches(windows(World(host=host), days * DAY, seed))
    return Healthy(seed=seed, breaches=tuple(f"{j.at.isoformat()}: {j.reasons[0]}" for j in found))


def run_shifts(host: Host, seed: int, slower: tuple[float, ...] = (0.2, 0.1)) -> tuple[Shift, ...]:
    """A week of learning, up to a day of health, then the shift, within a window."""
    world = World(host=host)
    watch = Watch()
    for window in windows(world, LEARNED, seed):
        watch.see(window)
    at = LEARNED + float(np.random.default_rng((seed, 3)).uniform(4, DAY))
    return tuple(_shift(world, watch.copy(), seed, at, share) for share in slower)


def _shift(world: World, watch: Watch, seed: int, at: float, slower: float) -> Shift:
    """Found by the first breach that begins after it; one that began before and goes on is no finding."""
    count = int(at) + 1 + TODAY - LEARNED
    given = windows(world.changed(at=at, engine=1 + slower), count, seed, first=LEARNED)
    for breach in watch.breaches(given):
        full = _number(breach) - int(np.ceil(at)) + 1
        if full >= 0 and breach.window is not None:
            return Shift(seed=seed, slower=slower, after=full)
    return Shift(seed=seed, slower=slower)


def _number(judgement: Judgement) -> int:
    assert judgement.window is not None
    return round((judgement.window.begin - BEGIN).total_seconds() / WINDOW_S)
