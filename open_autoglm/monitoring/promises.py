"""Whether a window keeps the promises of its SLO, beyond what chance would do.

A p95 within its bound is a share of at most 5 % above it. How many were above is exact at the bounds of the
histogram's buckets, so it is a binomial test of a count, and no quantile is interpolated.
"""

from __future__ import annotations

from collections.abc import Iterator

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


def _times(window: LatencyWindow, slo: Slo, to_come: int) -> Iterator[Kept]:
    bounds: tuple[tuple[Stage, float | None], ...] = (
        ("ttft", slo.ttft_p95_ms),
        ("tpot", slo.tpot_p95_ms),
        ("e2e", slo.e2e_p95_ms),
    )
    for stage, bound_ms in bounds:
        times = window.times_ms.get(stage)
        if bound_ms is None or times is None or not times.count:
            continue
        bad, counted_ms = _above(times, bound_ms)
        told = f"{stage}: {bad} of {times.count} answers were over {number(bound_ms)} ms; 5 % may be"
        if counted_ms != bound_ms:
            told += f" (counted from {number(counted_ms)} ms: no bucket ends at {number(bound_ms)} ms)"
        yield _kept(stage, bad, (times.count, to_come), ABOVE_P95, told)


def _above(times: Histogram, bound_ms: float) -> tuple[int, float]:
    """How many surely were greater, and from where they are counted: the next bound of a bucket."""
    exact = times.above(bound_ms)
    if exact is not None:
        return exact, bound_ms
    next_ms = next((bound for bound in times.bounds if bound > bound_ms), None)
    if next_ms is None:  # the last bucket begins below the bound and has no end
        return 0, bound_ms
    return times.above(next_ms) or 0, next_ms


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
