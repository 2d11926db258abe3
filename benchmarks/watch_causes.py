"""How often the right cause is named, where it is known.

Each repeat is a window of a simulated endpoint in good times with its probe, then one in which something has
changed; only breaches count (a p95 over 1.3 times the healthy one, or refusals), since nobody asks about
others. From window to window everything differs by several percent besides, and so do two probes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

from benchmarks.trust import share
from benchmarks.watch_endpoint import WINDOW_S, World, probe_of, simulate, window_of
from open_autoglm.monitoring.cause import name_cause
from open_autoglm.schemas import Cause, CauseKind, Conditions, Model

BREACH = 1.3

# ── what may happen ──────────────────────────────────────────────────────────────────────────────

Change = Callable[[World, float], World]
"""From good times, and how bad it gets (0 to 1), to what came after them."""


def _between(low: float, high: float, severity: float) -> float:
    return low + (high - low) * severity


def _more(world: World, severity: float, *, low: float, high: float, what: str) -> World:
    return replace(world, **{what: getattr(world, what) * _between(low, high, severity)})


def _foreign(world: World, severity: float) -> World:
    """A process that is always ready to run: the engine's slowest thread shares its core with it."""
    cores = _between(0.6, 1.5, severity)
    return replace(world.slower(_between(1.5, 2.0, severity)), conditions=Conditions(foreign_cores=cores))


def _steal(world: World, severity: float) -> World:
    cores = _between(0.35, 1.2, severity)
    conditions = Conditions(foreign_cores=cores, steal_cores=cores)
    return replace(world.slower(_between(1.45, 2.2, severity)), conditions=conditions)


def _clock(world: World, severity: float) -> World:
    share = _between(0.7, 0.5, severity)
    return replace(world.slower(0.95 / share), clock_mhz=world.clock_mhz * share)


def _quota(world: World, severity: float) -> World:
    share = _between(0.4, 0.8, severity)
    return replace(world.slower(_between(1.4, 2.5, severity)), throttled_share=share)


def _swapping(world: World, severity: float) -> World:
    share = _between(0.35, 0.7, severity)
    conditions = Conditions(foreign_cores=0.05, swapped_pages=50_000)
    return replace(
        world.slower(_between(1.4, 2.5, severity)),
        memory_pressure_share=share,
        conditions=conditions,
    )


def _kernel(world: World, severity: float) -> World:
    return replace(world.slower(_between(1.4, 2.2, severity)), kernel="6.2")


def _engine(world: World, severity: float) -> World:
    return world.slower(_between(1.4, 2.2, severity))


def _writing(world: World, severity: float) -> World:
    return replace(world, write_factor=_between(1.45, 2.2, severity))


def _reading(world: World, severity: float) -> World:
    return replace(world, read_factor=_between(4, 6, severity))


def _no_peace(world: World, severity: float) -> World:
    """So slow that it is never alone."""
    return world.slower(_between(2.6, 3.2, severity))


def _engine_and_crowd(world: World, severity: float) -> World:
    return _more(_engine(world, severity), severity, low=1.1, high=1.2, what="arrivals_per_s")


def _prompts_and_crowd(world: World, severity: float) -> World:
    longer = _more(world, severity, low=5, high=8, what="prompt_tokens")
    return _more(longer, severity, low=1.1, high=1.2, what="arrivals_per_s")


def _crowd_and_foreign(world: World, severity: float) -> World:
    """A neighbour that takes a little, while twice as many requests come."""
    crowded = _more(world, severity, low=1.9, high=2.2, what="arrivals_per_s")
    return replace(crowded.slower(1.05), conditions=Conditions(foreign_cores=0.2))


def _gone(world: World, severity: float) -> World:
    return replace(_engine(world, severity), slow_until_s=WINDOW_S - 5)


class Scenario(NamedTuple):
    cause: CauseKind
    change: Change


SCENARIOS: Mapping[str, Scenario] = {
    "more requests": Scenario("load", partial(_more, low=1.7, high=2.1, what="arrivals_per_s")),
    "more than it can do": Scenario("load", partial(_more, low=2.6, high=4, what="arrivals_per_s")),
    "requests in bursts": Scenario("load", lambda world, severity: replace(world, burst=8)),
    "foreign process": Scenario("environment", _foreign),
    "steal": Scenario("environment", _steal),
    "slow clock": Scenario("environment", _clock),
    "CPU quota": Scenario("environment", _quota),
    "swapping": Scenario("environment", _swapping),
    "another kernel": Scenario("environment", _kernel),
    "longer prompts": Scenario("mix", partial(_more, low=5, high=8, what="prompt_tokens")),
    "longer answers": Scenario("mix", partial(_more, low=1.7, high=2.4, what="output_tokens")),
    "slower engine": Scenario("engine", _engine),
    "slower writing": Scenario("engine", _writing),
    "slower reading": Scenario("engine", _reading),
    "slower, never alone": Scenario("engine", _no_peace),
    "slower engine, some more requests": Scenario("engine", _engine_and_crowd),
    "longer prompts, some more requests": Scenario("mix", _prompts_and_crowd),
    "more requests, some foreign work": Scenario("load", _crowd_and_foreign),
    "slow, and over before the probe": Scenario("unknown", _gone),
}


def disturbed(world: World, random: np.random.Generator, noise: float) -> World:
    """The same, as another window finds it."""
    engine = math.exp(random.normal(0, 0.05 * noise))
    return replace(
        world,
        arrivals_per_s=world.arrivals_per_s * math.exp(random.normal(0, 0.07 * noise)),
        prompt_tokens=world.prompt_tokens * math.exp(random.normal(0, 0.05 * noise)),
        output_tokens=world.output_tokens * math.exp(random.normal(0, 0.05 * noise)),
        read_factor=world.read_factor * engine,
        write_factor=world.write_factor * engine,
    )


def run_once(scenario: Scenario, seed: int, noise: float = 1.0) -> Cause | None:
    """What is named; None if the change broke no promise, so that nobody asked."""
    random = np.random.default_rng(seed)
    world = World(arrivals_per_s=float(random.uniform(0.4, 1.0)))
    healthy = disturbed(world, random, noise)
    calm = simulate(healthy, random)
    before, baseline = window_of(calm), probe_of(world, calm, random)
    changed = scenario.change(world, float(random.uniform()))
    busy = simulate(disturbed(changed, random, noise), random)
    now = window_of(busy)
    limit_ms, found_ms = before.times_ms["e2e"].quantile(0.95), now.times_ms["e2e"].quantile(0.95)
    if limit_ms is None or found_ms is None or (found_ms <= BREACH * limit_ms and not now.refused):
        return None
    return name_cause(before, now, probe_of(changed, busy, random), baseline)


class Row(Model):
    """All repeats of one scenario."""

    scenario: str
    cause: CauseKind
    named: Mapping[str, int]

    @property
    def breaches(self) -> int:
        return sum(self.named.values())

    @property
    def right(self) -> int:
        return self.named.get(self.cause, 0)


def run_row(name: str, repeats: int, seed: int, noise: float = 1.0) -> Row:
    scenario = SCENARIOS[name]
    first = (seed * len(SCENARIOS) + list(SCENARIOS).index(name)) * 1_000_003
    found = (run_once(scenario, first + repeat, noise) for repeat in range(repeats))
    named = Counter(cause.kind for cause in found if cause is not None)
    return Row(scenario=name, cause=scenario.cause, named=named)


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| what happened | its cause | breaches | named right, % | named else |",
        "|---|---|---:|---:|---|",
    ]
    for row in rows:
        wrong = ", ".join(f"{kind} {count}" for kind, count in row.named.items() if kind != row.cause)
        rate = share(row.right, row.breaches) if row.breaches else "–"
        lines.append(f"| {row.scenario} | {row.cause} | {row.breaches} | {rate} | {wrong or '–'} |")
    right, breaches = totals(rows)
    return "\n".join([*lines, f"| all | | {breaches} | {share(right, breaches)} | |"])


def totals(rows: Sequence[Row]) -> tuple[int, int]:
    """How many were named right, of how many breaches."""
    return sum(row.right for row in rows), sum(row.breaches for row in rows)
