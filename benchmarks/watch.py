"""Does the watch wake anybody for nothing, in time, and with the right cause? ``python -m benchmarks.watch``.

Where the truth is known: simulated traffic of 30 healthy days, and of engines that become 20 or 10 % slower
at a moment chosen at random, on hosts that drift by so much for so long. The judge, its baselines and their
learning are those of production. Then breaches of known causes, and which one is named. Rates come with their
95 % Clopper-Pearson intervals.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import get_args

import click
import numpy as np

from benchmarks.watch_causes import SCENARIOS, run_row
from benchmarks.watch_results import (
    FAULTS,
    FIRST_SEED,
    TODAY,
    TOLD,
    USUAL,
    Cell,
    Fault,
    Healthy,
    Purpose,
    Results,
    report,
)
from benchmarks.watch_traffic import BEGIN, DAY, SLO, WINDOW_S, Host, World, windows
from open_autoglm.files import write_atomic
from open_autoglm.monitoring.baseline import Baseline
from open_autoglm.monitoring.judge import JudgeState, Policy, judge
from open_autoglm.monitoring.lesson import Lesson, attend, next_baseline
from open_autoglm.schemas.watch import Judgement, LatencyWindow

RESULTS = Path(__file__).parent / "results"
HEALTHY_DAYS = 30
LEARNED = 7 * DAY
_FAULTY = 1000
"""From the first healthy seed to the first that a fault befalls."""

HOSTS = (
    USUAL,
    TOLD,
    Host(drift=0.05, lasts_h=8),
    Host(drift=0.05, lasts_h=8, told=0.6),
    Host(drift=0.03, lasts_h=2, told=0.0),
)

SHIFTS = (("engine", {"engine": 1.2}), ("engine", {"engine": 1.1}))

POLICY = Policy(
    slo=SLO,
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


def run_healthy(host: Host, seed: int, days: int = HEALTHY_DAYS) -> Healthy:
    found = Watch().breaches(windows(World(host=host), days * DAY, seed))
    return Healthy(seed=seed, breaches=tuple(f"{j.at.isoformat()}: {j.reasons[0]}" for j in found))


def run_faults(host: Host, seed: int, changes: Iterable[tuple[str, Mapping[str, float]]]) -> list[Fault]:
    """A week of learning, up to a day of health, then the fault, at any moment within a window."""
    watch = Watch()
    for window in windows(World(host=host), LEARNED, seed):
        watch.see(window)
    at = LEARNED + float(np.random.default_rng((seed, 3)).uniform(4, DAY))
    return [_run_fault(watch.copy(), host, seed, at, kind, change) for kind, change in changes]


def fault_windows(host: Host, seed: int, at: float, change: Mapping[str, float]) -> Iterator[LatencyWindow]:
    """From the end of the lesson to a day after the fault; those that end before ``at`` are healthy."""
    count = math.ceil(at) + TODAY - LEARNED
    return windows(World(host=host).changed(at=at, **change), count, seed, first=LEARNED)


def _run_fault(
    watch: Watch, host: Host, seed: int, at: float, kind: str, change: Mapping[str, float]
) -> Fault:
    """A breach that began before, and goes on, is no finding."""
    fault = Fault(seed=seed, kind=kind, size=next(iter(change.values())))
    for breach in watch.breaches(fault_windows(host, seed, at, change)):
        full = _number(breach) - math.ceil(at) + 1
        if full >= 0:
            return fault.model_copy(update={"after": full, "said": breach.reasons[0]})
    return fault


def _number(judgement: Judgement) -> int:
    """Of its window, from the first one on."""
    assert judgement.window is not None
    return round((judgement.window.begin - BEGIN).total_seconds() / WINDOW_S)


def run_cell(
    host: Host, healthy: int, faulty: int, days: int, first_seed: int, pool: ProcessPoolExecutor
) -> Cell:
    """So many healthy months, and so many hosts that each fault befalls."""
    changes = [*SHIFTS, *(FAULTS.items() if host in (USUAL, TOLD) else ())]
    months = pool.map(partial(run_healthy, host, days=days), range(first_seed, first_seed + healthy))
    fallen = range(first_seed + _FAULTY, first_seed + _FAULTY + faulty)
    faults = pool.map(partial(run_faults, host, changes=changes), fallen)
    return Cell(
        drift=host.drift,
        lasts_h=host.lasts_h,
        told=host.told,
        healthy=tuple(months),
        faults=tuple(fault for found in faults for fault in found),
    )


@click.command()
@click.option("--seeds", type=click.Choice(get_args(Purpose)), default="evaluation", show_default=True)
@click.option("--healthy", default=20, show_default=True, help="Healthy months per kind of host")
@click.option("--days", default=HEALTHY_DAYS, show_default=True, help="Of a healthy month")
@click.option("--faulty", default=30, show_default=True, help="Hosts per kind that each fault befalls")
@click.option("--repeats", default=50, show_default=True, help="Of each scenario whose cause is known")
@click.option("--workers", default=os.cpu_count() or 1, show_default="a process per core")
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(
    seeds: Purpose, healthy: int, days: int, faulty: int, repeats: int, workers: int, output: Path
) -> None:
    """Print the tables as Markdown, and keep them with the raw results as ``watch.md`` and ``watch.json``."""
    first = FIRST_SEED[seeds]
    with ProcessPoolExecutor(workers) as pool:
        causes = tuple(pool.map(partial(run_row, repeats=repeats, seed=first), SCENARIOS))
        results = Results(seeds=seeds, causes=causes)
        for host in HOSTS:
            cell = run_cell(host, healthy, faulty, days, first, pool)
            results = results.model_copy(update={"cells": (*results.cells, cell)})
            if host not in (USUAL, TOLD):  # a run that is stopped has published what it has
                publish(results, output)
    click.echo(report(results))


def publish(results: Results, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    write_atomic(output / "watch.json", results.model_dump_json(indent=1) + "\n")
    write_atomic(output / "watch.md", report(results))


if __name__ == "__main__":
    main()
