"""Whether a stage has become slower than its baseline: two tests of the same log ratios.

A *jump*: two windows running lie above what the windows before them let expect. The host's noise lasts, so a
forecast from the window before is narrower than the baseline's own spread, and what a host adds slowly is no
jump (control charts of forecast errors: Alwan and Roberts, *J. Bus. Econ. Stat.* 6, 1988).

A *level*: the cumulative sum of what windows lie above half the change that is looked for (Page 1954) finds
less than a jump would show, given hours. Its limit comes from the baseline's long-run noise, by the mean time
between false alarms that is aimed at (Siegmund, *Sequential Analysis*, 1985, eq. 2.56, without the correction
for overshoot, which correlated noise has less of).

Both together are the combined chart of Lucas (*J. Qual. Technol.* 14, 1982). Time is numbered in windows.
"""

from __future__ import annotations

import math

import numpy as np
from pydantic import Field

from open_autoglm.monitoring.baseline import Expectation
from open_autoglm.monitoring.noise import SLACK, Noise
from open_autoglm.schemas.base import Model

_REFERENCES = 2
"""Windows before the suspects that a jump may be from: the nearest may already be slow in part."""

_LARGEST_STEP = 4 * SLACK
"""What one window may add to the sum: no single one decides."""

_BEYOND_LESSON = 2.0
_ALIKE = 4
_CERTAIN = 37.0
"""Standard deviations beyond which there are no numbers for a chance so small."""
_UNSEEN = 1.2
"""How much farther a host drifts in months than a lesson shows; from one window to the next it does not."""


class ShiftPolicy(Model):
    """What counts as slower, and how seldom that may be said wrongly."""

    floor: float = Field(0.05, ge=0, description="no window counts as slow that is less above, as a share")
    least_jump: float = Field(0.08, ge=0, description="the same, for a jump")
    jump_sigmas: float = Field(4.25, gt=0, description="of a forecast's error, in each window of a jump")
    quiet_windows: float = Field(96_000, gt=0, description="between two false alarms of a level, on average")
    level_lesson: int = Field(
        384, ge=1, description="windows that a baseline must be of before its level is believed to 10 %"
    )
    confirm: int = Field(2, ge=1, le=8, description="windows running that must agree")

    @property
    def least(self) -> float:
        return math.log1p(self.floor)


class Point(Model):
    """One window beside its baseline."""

    at: float = Field(description="its end, in windows since 1970")
    log_ratio: float
    uncertainty: float = Field(description="standard error of the baseline for such a window")
    answers: int
    beside_host: bool = Field(False, description="its host's share was left out")


class Track(Model):
    """What is remembered of a stage."""

    recent: tuple[Point, ...] = Field((), description="the last windows, oldest first")
    sum: float = Field(0.0, ge=0, description="cumulative, in log ratio")
    above: int = Field(0, ge=0, description="windows running that the sum is above its limit")


class Finding(Model):
    """Of one stage, at one window."""

    jump: bool
    level: bool
    sigmas: float = Field(description="of the least of the windows that must agree, against its forecast")
    sum: float
    limit: float
    slower: float = Field(
        description="than the baseline, as a share: the least of the windows that must agree"
    )


def follow(
    track: Track, point: Point, expectation: Expectation, policy: ShiftPolicy
) -> tuple[Track, Finding]:
    """The track with ``point`` added, which must be later than its last, and what that shows.

    Ratios with and without the host's share are not compared with each other: the track begins anew.
    """
    if track.recent and track.recent[-1].beside_host != point.beside_host:
        track = Track()
    recent = (*track.recent, point)[-(policy.confirm + _REFERENCES) :]
    limit = level_limit(expectation.noise, policy)
    sure = expectation.windows >= policy.level_lesson
    total = _added(track.sum, point) if sure else 0.0
    above = track.above + 1 if total >= limit else 0
    suspects = recent[-policy.confirm :]
    least = min(suspect.log_ratio for suspect in suspects)
    agreed = len(suspects) == policy.confirm and least >= policy.least
    sigmas = _jump_sigmas(recent, expectation, policy)
    finding = Finding(
        jump=agreed and least >= math.log1p(policy.least_jump) and sigmas >= policy.jump_sigmas,
        level=agreed and above >= policy.confirm,
        sigmas=sigmas,
        sum=total,
        limit=limit,
        slower=math.expm1(least),
    )
    return Track(recent=recent, sum=total, above=above), finding


def level_limit(noise: Noise, policy: ShiftPolicy) -> float:
    """Of the cumulative sum: noise alone reaches it once in ``quiet_windows``.

    Brownian motion with drift −k and variance ω² per window exceeds b by chance at a rate of about
    2k²/ω² exp(−2kb/ω²). A host that drifts for longer than the lesson shows is not such a process, so the
    limit is also well above what the lesson itself has reached.
    """
    variance = max(noise.long_run_at_most, 1e-6) ** 2
    seldom = math.log(max(math.e, 2 * SLACK**2 / variance * policy.quiet_windows))
    return max(variance / (2 * SLACK) * seldom, _BEYOND_LESSON * noise.excursion)


def _added(total: float, point: Point) -> float:
    """What the baseline is not sure of counts for the engine."""
    excess = point.log_ratio - point.uncertainty - SLACK
    return max(0.0, total + min(excess, _LARGEST_STEP))


def _jump_sigmas(recent: tuple[Point, ...], by: Expectation, policy: ShiftPolicy) -> float:
    """Of the suspect that stands out least, from whichever reference it stands out most; the baseline itself
    is one, too.

    As many standard deviations of a normal distribution as would be as seldom. How far a host strays from a
    baseline is known from as many values as are independent; how far from the window before, from nearly all.
    """
    suspects = recent[-policy.confirm :]
    references: tuple[Point | None, ...] = (None, *recent[: -policy.confirm])
    return max(
        min(
            _as_normal(
                _standardised(suspect, reference, by.noise),
                by.noise.independent if reference is None else by.windows / _ALIKE,
            )
            for suspect in suspects
        )
        for reference in references
    )


def _standardised(point: Point, reference: Point | None, noise: Noise) -> float:
    """The error of the forecast of ``point`` by an AR(1) process, in its standard deviations."""
    forecast, kept, chance = 0.0, 0.0, noise.within**2 / point.answers
    between = noise.between * _UNSEEN
    if reference is not None:
        between = noise.between
        kept = noise.memory ** max(1.0, point.at - reference.at)
        forecast = kept * reference.log_ratio
        chance += kept**2 * noise.within**2 / reference.answers
    variance = between**2 * (1 - kept**2) + chance + point.uncertainty**2
    return (point.log_ratio - forecast) / math.sqrt(variance)


def _as_normal(deviations: float, values: float) -> float:
    """Where the normal distribution is as seldom as Student's t, if the standard deviation is known from so
    many values."""
    from scipy.stats import norm, t

    return float(np.clip(norm.isf(t.sf(deviations, df=max(2.0, values))), -_CERTAIN, _CERTAIN))
