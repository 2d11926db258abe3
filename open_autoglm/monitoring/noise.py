"""What remains of a baseline's log ratios while all is well, and how much of it lasts.

A part of the host that lasts from window to window (an AR(1) process), and a part of the requests that came
by chance, smaller the more they were.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from open_autoglm.schemas.base import Model

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

LEAST_WINDOWS = 24
SLACK = math.log(1.1) / 2
"""Of the cumulative sums: half of a change by 10 %, the least that is worth another study."""

_LEAST_NOISE = 0.005
_LONGEST_MEMORY = 0.985
_NEAR = 2.0
_KEPT_BY_NEAR = 0.9205
"""The variance of a standard normal value that is cut off at ±2: single bursts are no part of a forecast."""

_FAR = 3.5
_LAGS = 8
_DOUBT = 0.2


class Noise(Model):
    """Of the log ratio of a window's mean to what was expected, while all is well."""

    between: float = Field(ge=0, description="standard deviation of what the host adds for a while")
    within: float = Field(ge=0, description="of a single request; of a mean, by the root of their number")
    memory: float = Field(
        ge=0, lt=1, description="least correlation of the host's part with the window before"
    )
    long_run: float = Field(ge=0, description="standard deviation of a sum of n windows is this times √n")
    independent: float = Field(
        gt=0, description="windows without a memory that would say as much of its level"
    )
    long_run_at_most: float = Field(ge=0, description="the same, as large as the lesson leaves it possible")
    excursion: float = Field(
        ge=0,
        description="highest cumulative sum of what was above the slack, or below it, while it was learned",
    )


def noise_of(errors: Floats, answers: Floats, follows: NDArray[np.bool_]) -> Noise:
    """The requests' part from the differences of windows that follow each other, in which a host that drifts
    over a day is not seen; the host's is the rest. Memory is taken as a standard error less than it seems: a
    host that forgets is harder to forecast."""
    count, sd = len(errors), robust_sd(errors)
    near = np.clip(errors, -_NEAR * sd, _NEAR * sd)
    request = _requests_variance(errors, answers, follows)
    host = float(np.mean(near**2)) / _KEPT_BY_NEAR - request * float(np.mean(1 / answers))
    host = max(host, _LEAST_NOISE**2)
    pairs = (near[:-1] * near[1:])[follows] / _KEPT_BY_NEAR
    memory = float(np.clip(pairs.mean() / host, 0, _LONGEST_MEMORY)) if len(pairs) else 0.0
    far = np.clip(errors, -_FAR * sd, _FAR * sd)
    long_run, independent = _long_run(far)
    return Noise(
        between=math.sqrt(host),
        within=math.sqrt(request),
        memory=max(0.0, memory - math.sqrt((1 - memory**2) / count)),
        long_run=long_run,
        independent=independent,
        long_run_at_most=long_run * _at_most(independent),
        excursion=max(_largest_sum(far), _largest_sum(-far)),
    )


def _requests_variance(errors: Floats, answers: Floats, follows: NDArray[np.bool_]) -> float:
    """Of a single request: how much more windows of few requests differ from the ones before them."""
    from scipy.optimize import nnls

    if follows.sum() < LEAST_WINDOWS // 2:
        return 0.0
    steps = np.diff(errors)[follows]
    sd = robust_sd(steps)
    few = (1 / answers[1:] + 1 / answers[:-1])[follows]
    squares = np.clip(steps, -_NEAR * sd, _NEAR * sd) ** 2 / _KEPT_BY_NEAR
    (_, request), _ = nnls(np.column_stack([np.ones(len(few)), few]), squares)
    return float(request)


def _largest_sum(errors: Floats) -> float:
    """How high a cumulative sum of what is above `SLACK` gets."""
    total = largest = 0.0
    for excess in (errors - SLACK).tolist():
        total = max(0.0, total + excess)
        largest = max(largest, total)
    return largest


def _long_run(errors: Floats) -> tuple[float, float]:
    """Its standard deviation, and how many independent windows it is known from: of an AR(1) process beneath
    what each window adds of its own, such as a burst.

    That is in the variance, and in no covariance with another window. So the memory is the ratio by which the
    covariances fall from lag to lag (the Yule-Walker equations of an ARMA(1, 1) process), and the process's
    own variance is where they come from.
    """
    count = len(errors)
    lags = np.arange(1, min(_LAGS, count // 8) + 1)
    variance = float(errors @ errors) / count
    at = np.array([float(errors[lag:] @ errors[: count - lag]) / count for lag in lags])
    memory, lasting = float(at[0]) / max(variance, 1e-12), variance
    if memory > 2 / math.sqrt(count):  # more than chance
        memory = min(max(memory, float(at[1:] @ at[:-1]) / float(at[:-1] @ at[:-1])), _LONGEST_MEMORY)
        falls = memory**lags
        lasting = min(float(at @ falls) / float(falls @ falls), variance)
    memory = min(max(0.0, memory + (1 + 3 * memory) / count), _LONGEST_MEMORY)  # the bias: Kendall 1954
    long_run = lasting * (1 + memory) / (1 - memory) + variance - lasting
    return math.sqrt(long_run), count * (1 - memory) / (1 + memory)


def _at_most(independent: float) -> float:
    """How many times as large a standard deviation may be as it seems from so many values: its upper bound. A
    host that drifts for hours shows little of itself in a week, and the judge must not be sure of it."""
    from scipy.stats import chi2

    return math.sqrt(independent / float(chi2.ppf(_DOUBT, independent)))


def robust_sd(errors: Floats) -> float:
    """By the median absolute deviation, for a normal distribution."""
    return max(1.4826 * float(np.median(np.abs(errors - np.median(errors)))), 1e-9)
