"""Whether a window keeps the promises of its SLO, beyond what chance would do.

A p95 within its bound is a share of at most 5 % above it. How many were above is exact at the bounds of the
histogram's buckets, so it is a binomial test of a count, and no quantile is interpolated. Clients who left
after the bound have waited longer than it for what never came, so they count too: of the answers alone, the
slowest endpoint would be left with the fastest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from pydantic import Field

from open_autoglm.schemas.base import Model
from open_autoglm.schemas.watch import Histogram, LatencyWindow, Slo, Stage
from open_autoglm.units import number

ABOVE_P95 = 0.05
ERRORS = "errors"


class Kept(Model):
    """How one promise fared in one window."""

    name: str
    bad: int = Field(description="answers that broke it; at least, if the bound is not a bucket's")
    of: int
    allowed: float = Field(description="share that may be bad")
    chance: float = Field(description="of so many, or more, in the whole window while the promise is kept")
    told: str

    @property
    def share(self) -> float:
        return self.bad / self.of

    @property
    def within(self) -> bool:
        """As it is, without regard to chance."""
        return self.share <= self.allowed


def check_promises(window: LatencyWindow, slo: Slo, to_come: int = 0) -> tuple[Kept, ...]:
    """Those that are made and that the window says something of. The chance is of the window with so many
    answers ``to_come``, all of which keep every promise."""
    return (*_times(window, slo, to_come), *_errors(window, slo, to_come))


def unjudged(window: LatencyWindow, slo: Slo) -> str | None:
    """Of which promise nothing can be said, and why, in words. Without any promise: that nobody answers."""
    asked, bounds = window.requests + window.refused, dict(_bounds(slo))
    if not bounds and window.requests and not any(times.count for times in window.times_ms.values()):
        return f"{asked} requests in the window, and none was answered"
    for stage, bound_ms in bounds.items():
        waits = _waits(window, stage, bound_ms)
        if not waits.of:
            return f"{asked} requests in the window, and no {stage} of any: its promise cannot be judged"
        if waits.unknown > ABOVE_P95 * waits.of:
            return (
                f"{stage}: {waits.unknown} of {waits.of} answers were over {number(waits.counted_ms)} ms, "
                f"where the last bucket ends, so it is not known how many were over "
                f"{number(bound_ms)} ms: serve it with --slo-{stage} {bound_ms:g}ms"
            )
    return None


def _bounds(slo: Slo) -> Iterator[tuple[Stage, float]]:
    """Of the promises that are made."""
    bounds: tuple[tuple[Stage, float | None], ...] = (
        ("ttft", slo.ttft_p95_ms),
        ("tpot", slo.tpot_p95_ms),
        ("e2e", slo.e2e_p95_ms),
    )
    yield from ((stage, bound_ms) for stage, bound_ms in bounds if bound_ms is not None)


class _Waits(NamedTuple):
    """For one stage of the answers in a window."""

    of: int
    bad: int
    """Surely over the bound; those who left among them."""
    left: int
    """Over the bound when they left."""
    unknown: int
    """Over the last bucket's end, which is below the bound."""
    counted_ms: float
    """From where they are counted: the next bound of a bucket; if there is none, the last."""


def _waits(window: LatencyWindow, stage: Stage, bound_ms: float) -> _Waits:
    times = window.times_ms.get(stage)
    left = _above(window.left_ms.get(stage), bound_ms)
    answers = _above(times, bound_ms)
    return _Waits(
        of=(times.count if times else 0) + left.bad,
        bad=answers.bad + left.bad,
        left=left.bad,
        unknown=answers.unknown + left.unknown,
        counted_ms=answers.counted_ms,
    )


def _times(window: LatencyWindow, slo: Slo, to_come: int) -> Iterator[Kept]:
    for stage, bound_ms in _bounds(slo):
        waits = _waits(window, stage, bound_ms)
        if not waits.of:
            continue
        told = f"{stage}: {waits.bad} of {waits.of} answers were over {number(bound_ms)} ms; 5 % may be"
        if waits.left:
            told += f" ({waits.left} clients had left by then, after as long)"
        if waits.counted_ms != bound_ms:
            told += f" (counted from {number(waits.counted_ms)} ms: no bucket ends at {number(bound_ms)} ms)"
        yield _kept(stage, waits.bad, (waits.of, to_come), ABOVE_P95, told)


class _Above(NamedTuple):
    bad: int
    unknown: int
    counted_ms: float


def _above(times: Histogram | None, bound_ms: float) -> _Above:
    """How many surely were greater; how many may have been, since the last bucket begins below the bound."""
    if times is None:
        return _Above(0, 0, bound_ms)
    next_ms = next((bound for bound in times.bounds if bound >= bound_ms), None)
    if next_ms is None:
        return _Above(0, times.counts[-1], times.bounds[-1])
    return _Above(times.above(next_ms) or 0, 0, next_ms)


def _errors(window: LatencyWindow, slo: Slo, to_come: int) -> Iterator[Kept]:
    asked, bad = window.requests + window.refused, window.failed + window.refused
    if asked:
        told = f"errors: {bad} of {asked} requests were lost or refused; {slo.error_fraction:.2%} may be"
        yield _kept(ERRORS, min(bad, asked), (asked, to_come), slo.error_fraction, told)


def _kept(name: str, bad: int, of: tuple[int, int], allowed: float, told: str) -> Kept:
    """``of`` those that were answered, and those to come."""
    return Kept(
        name=name, bad=bad, of=of[0], allowed=allowed, chance=_chance(bad, sum(of), allowed), told=told
    )


def _chance(bad: int, of: int, allowed: float) -> float:
    """One-sided and exact (Clopper and Pearson 1934)."""
    if bad <= allowed * of:
        return 1.0  # more likely than not, and SciPy stays out of a healthy window
    from scipy.stats import binom

    return float(binom.sf(bad - 1, of, allowed))
