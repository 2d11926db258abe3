"""Does the watch wake anybody for nothing, and does it wake them in time? ``python -m benchmarks.watch``.

Where the truth is known: simulated traffic of 30 healthy days, and of engines that become 20 or 10 % slower
at a moment chosen at random, on hosts that drift by so much for so long. The judge, its baselines and their
learning are those of production. Rates come with their 95 % Clopper-Pearson intervals.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import click
import numpy as np
from pydantic import Field

from benchmarks.trust import share
from benchmarks.watch_traffic import BEGIN, DAY, SLO, WINDOW_S, Host, World, windows
from open_autoglm.files import write_atomic
from open_autoglm.monitoring.baseline import Baseline
from open_autoglm.monitoring.judge import JudgeState, Policy, judge
from open_autoglm.monitoring.lesson import Lesson, attend, next_baseline
from open_autoglm.schemas import Model
from open_autoglm.schemas.watch import Judgement, LatencyWindow

RESULTS = Path(__file__).parent / "results"
HEALTHY_DAYS = 30
LEARNED = 7 * DAY
SOON, TODAY = 2, DAY
"""Full windows within which 20 %, and 10 %, must have been found."""

USUAL = Host(drift=0.03, lasts_h=2)
"""The one that faults of all kinds are tried on."""

HOSTS = (
    USUAL,
    Host(drift=0.05, lasts_h=8),
    Host(drift=0.02, lasts_h=2),
    Host(drift=0.05, lasts_h=2),
    Host(drift=0.04, lasts_h=2),
)

FAULTS: Mapping[str, Mapping[str, float]] = {
    "load": {"demand": 3.0},
    "environment": {"host": 1.3},
    "mix": {"prompts": 2.5},
    "engine": {"engine": 1.3},
}
"""What becomes so many times as much: arrivals, the host's slowness, prompts' lengths, the engine's time."""

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


class Healthy(Model):
    """30 days without a fault."""

    seed: int
    breaches: tuple[str, ...]


class Fault(Model):
    """Something that becomes different at one moment, and what came of it."""

    seed: int
    kind: str
    size: float
    after: int | None = Field(None, description="full windows until a breach began; None: not within a day")
    said: str = Field("", description="the breach's first reason")


class Cell(Model):
    """All repeats on one kind of host."""

    drift: float
    lasts_h: float
    healthy: tuple[Healthy, ...]
    faults: tuple[Fault, ...]

    def found(self, kind: str, size: float, within: int) -> tuple[int, int]:
        """How many of how many."""
        tried = [fault for fault in self.faults if (fault.kind, fault.size) == (kind, size)]
        return sum(f.after is not None and f.after <= within for f in tried), len(tried)


def run_healthy(host: Host, seed: int, days: int = HEALTHY_DAYS) -> Healthy:
    found = Watch().breaches(windows(World(host=host), days * DAY, seed))
    return Healthy(seed=seed, breaches=tuple(f"{j.at.isoformat()}: {j.reasons[0]}" for j in found))


def run_faults(host: Host, seed: int, changes: Iterable[tuple[str, Mapping[str, float]]]) -> Iterator[Fault]:
    """A week of learning, up to a day of health, then the fault, at any moment within a window."""
    watch = Watch()
    for window in windows(World(host=host), LEARNED, seed):
        watch.see(window)
    at = LEARNED + float(np.random.default_rng((seed, 3)).uniform(4, DAY))
    for kind, change in changes:
        yield _run_fault(watch.copy(), host, seed, at, kind, change)


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


SHIFTS = (("engine", {"engine": 1.2}), ("engine", {"engine": 1.1}))


def run_cell(host: Host, healthy: int, faulty: int) -> Cell:
    """So many healthy months, and so many hosts that each fault befalls."""
    changes = [*SHIFTS, *(FAULTS.items() if host == USUAL else ())]
    return Cell(
        drift=host.drift,
        lasts_h=host.lasts_h,
        healthy=tuple(run_healthy(host, seed) for seed in range(healthy)),
        faults=tuple(f for seed in range(faulty) for f in run_faults(host, 1000 + seed, changes)),
    )


# ── tables ───────────────────────────────────────────────────────────────────────────────────────


def shift_table(cells: Sequence[Cell]) -> str:
    """Markdown: a row per kind of host."""
    lines = [
        "| host drifts by | for | healthy months without a breach | breaches in all of them | "
        "+20 % found within 2 windows, % | +10 % found within a day, % |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for cell in cells:
        quiet = sum(not month.breaches for month in cell.healthy)
        false = sum(len(month.breaches) for month in cell.healthy)
        row = [f"±{cell.drift:.0%}", f"{cell.lasts_h:g} h", f"{quiet} of {len(cell.healthy)}", str(false)]
        row += [share(*cell.found("engine", 1.2, SOON)), share(*cell.found("engine", 1.1, TODAY))]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def fault_table(cell: Cell) -> str:
    """Markdown: a row per kind of fault, on the usual host."""
    lines = [
        "| fault | found within 2 windows, % | found within a day, % | median, windows |",
        "|---|---:|---:|---:|",
    ]
    for kind, change in FAULTS.items():
        (size,) = change.values()
        after = [f.after for f in cell.faults if (f.kind, f.size) == (kind, size) and f.after is not None]
        median = f"{np.median(after):g}" if after else "–"
        rates = [share(*cell.found(kind, size, within)) for within in (SOON, TODAY)]
        lines.append(f"| {kind} ×{size:g} | {rates[0]} | {rates[1]} | {median} |")
    return "\n".join(lines)


def report(cells: Sequence[Cell]) -> str:
    usual = next(cell for cell in cells if (cell.drift, cell.lasts_h) == (USUAL.drift, USUAL.lasts_h))
    return f"""# The watch on simulated traffic

A window is 15 minutes. Traffic is Poisson with a day and a week in it (0.7 requests/s on average, 0.28 to
1.12 over the day), prompts and answers have log-normal lengths, three slots serve them. A request's time in
the engine has 10 % of noise of its own. The host's factor is an AR(1) process: its standard deviation and the
time in which its correlation falls to 1/e are the first two columns. Beside it a neighbour takes 20 to 60 %
for one window, twice a day. Shifts begin at any moment within a window, 7 to 8 days after a version's first
window; windows are counted from the first that is slow as a whole. Rates have their 95 % Clopper-Pearson
intervals.

{shift_table(cells)}

What a host adds for hours is no different from a slower engine by these figures: where it drifts by more than
3 % for two hours, 10 % for certain and none falsely cannot both be had, and the judge leans to silence.

## Faults of all kinds, on a host that drifts by ±{usual.drift:.0%} for {usual.lasts_h:g} h

{fault_table(usual)}

Three times the load, and prompts 2.5 times as long, are no shift of the engine: they are a breach once the
promise is broken, which at night they may not do.
"""


@click.command()
@click.option("--healthy", default=20, show_default=True, help="Healthy months per kind of host")
@click.option("--faulty", default=40, show_default=True, help="Hosts per kind that each fault befalls")
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(healthy: int, faulty: int, output: Path) -> None:
    """Print the tables as Markdown, and keep them with the raw results as ``watch.md`` and ``watch.json``."""
    cells: list[Cell] = []
    for host in HOSTS:
        cells = sorted([*cells, run_cell(host, healthy, faulty)], key=lambda cell: (cell.lasts_h, cell.drift))
        content = json.dumps([cell.model_dump() for cell in cells], indent=1)
        write_atomic(output / "watch.json", content + "\n")
        write_atomic(output / "watch.md", report(cells))  # a run that is stopped has published what it has
    click.echo(report(cells))


if __name__ == "__main__":
    main()
