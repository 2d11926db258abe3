"""What the benchmark of the watch finds, and the tables that are made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from benchmarks.trust import share
from benchmarks.watch_causes import Row, table
from benchmarks.watch_traffic import DAY, Host
from open_autoglm.schemas import Model

SOON, TODAY = 2, DAY
"""Full windows within which 20 %, and 10 %, must have been found."""

Purpose = Literal["tuning", "evaluation"]
FIRST_SEED: Mapping[Purpose, int] = {"tuning": 0, "evaluation": 2_000_000}
"""Of each. Thresholds are chosen by what the tuning seeds show; rates to rely on are of the others."""

USUAL = Host(drift=0.03, lasts_h=2)
"""The one that faults of all kinds are tried on, without a known pace."""
TOLD = Host(drift=0.05, lasts_h=8, told=0.9)
"""And beside one whose pace is known."""

FAULTS: Mapping[str, Mapping[str, float]] = {
    "load": {"demand": 3.0},
    "environment": {"host": 1.3},
    "mix": {"prompts": 2.5},
    "engine": {"engine": 1.3},
}
"""What becomes so many times as much: arrivals, the host's slowness, prompts' lengths, the engine's time."""


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
    told: float | None
    healthy: tuple[Healthy, ...]
    faults: tuple[Fault, ...]

    @property
    def host(self) -> Host:
        return Host(drift=self.drift, lasts_h=self.lasts_h, told=self.told)

    def found(self, kind: str, size: float, within: int) -> tuple[int, int]:
        """How many of how many."""
        tried = [fault for fault in self.faults if (fault.kind, fault.size) == (kind, size)]
        return sum(f.after is not None and f.after <= within for f in tried), len(tried)


class Results(Model):
    """All that one run of the benchmark found."""

    seeds: Purpose
    cells: tuple[Cell, ...] = ()
    causes: tuple[Row, ...] = ()

    def of(self, host: Host) -> Cell:
        return next(cell for cell in self.cells if cell.host == host)


# ── tables ───────────────────────────────────────────────────────────────────────────────────────


def shift_table(cells: Sequence[Cell]) -> str:
    """Markdown: a row per kind of host."""
    lines = [
        "| host drifts by | for | known from its pace | months without a breach, % | breaches in all of them "
        "| +20 % found within 2 windows, % | +10 % found within a day, % |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for cell in sorted(
        cells, key=lambda cell: (cell.told is not None, cell.lasts_h, cell.drift, -(cell.told or 0))
    ):
        quiet = sum(not month.breaches for month in cell.healthy)
        false = sum(len(month.breaches) for month in cell.healthy)
        row = [*_host_words(cell), share(quiet, len(cell.healthy)), str(false)]
        row += [share(*cell.found("engine", 1.2, SOON)), share(*cell.found("engine", 1.1, TODAY))]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def _host_words(cell: Cell) -> tuple[str, str, str]:
    known = "not timed" if cell.told is None else f"r = {cell.told:g}"
    return f"±{cell.drift:.0%}", f"{cell.lasts_h:g} h", known


def fault_table(cell: Cell) -> str:
    """Markdown: a row per kind of fault, on one kind of host."""
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


def report(results: Results) -> str:
    usual, told = results.of(USUAL), results.of(TOLD)
    return f"""# The watch on simulated traffic

`make bench-watch`. All seeds are {_SEEDS_ARE[results.seeds]}.
Rates are in per cent with their exact (Clopper-Pearson) 95 % intervals. On each kind of host there are
{len(usual.healthy)} months of 30 healthy days, and {_tried(usual)} hosts that each fault befalls.

A window is 15 minutes. Traffic is Poisson with a day and a week in it (0.7 requests/s on average, 0.28 to
1.12 over the day), prompts and answers have log-normal lengths, three slots serve them. A request's time in
the engine has 10 % of noise of its own. The host's factor is an AR(1) process: its standard deviation and the
time in which its correlation falls to 1/e are the first two columns. Beside it a neighbour takes 20 to 60 %
for one window, twice a day. The third column says how well the host's factor is known from the fixed piece of
work that an endpoint times while nobody is answered: the correlation of their logarithms. Shifts begin at any
moment within a window, 7 to 8 days after a version's first window; windows are counted from the first that is
slow as a whole.

{shift_table(results.cells)}

What a host adds for hours is no different from a slower engine unless its pace tells: where it drifts by more
than 3 % for two hours and does not tell, 10 % for certain and none falsely cannot both be had, and the judge
leans to silence. How well a real host tells is not known from this: the baseline learns it of each.

## Faults of all kinds

On a host that drifts by ±{usual.drift:.0%} for {usual.lasts_h:g} h, its pace not timed:

{fault_table(usual)}

On one that drifts by ±{told.drift:.0%} for {told.lasts_h:g} h, its pace known (r = {told.told:g}):

{fault_table(told)}

Three times the load, and prompts 2.5 times as long, are no shift of the engine: they are a breach once the
promise is broken, which at night they may not do.

## Causes

An endpoint is simulated call by call: four slots at 20 to 55 % load, windows of ten minutes that differ by 5
to 7 % besides, and a probe of half a minute after each. Only breaches count: a p95 that rose by 30 %, or
refusals.

{table(results.causes)}
"""


_SEEDS_ARE: Mapping[Purpose, str] = {
    "evaluation": "2,000,000 or more: none of them was ever used to choose a threshold",
    "tuning": "below 2,000,000: thresholds were chosen on them, so these are **no rates to rely on**",
}


def _tried(cell: Cell) -> int:
    return cell.found("engine", 1.2, SOON)[1]
