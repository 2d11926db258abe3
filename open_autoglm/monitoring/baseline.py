"""What a version's windows look like while it is healthy: its time in the engine, by what it was asked.

A window of long prompts, or of many callers, is slower without anything being wrong. So the mean time in the
engine is a linear function of the mean lengths and of the load, which for a mean is exact where a request's
time is linear in its length, whatever the mix within the window. The load is what was *asked for* (tokens per
second), and not the requests in their slots: those grow with the very slowness that is looked for.

What remains is noise, as log ratios: a part of the host that lasts from window to window (an AR(1) process),
and a part of the requests that came by chance, smaller the more they were. The fit is by iteratively
reweighted least squares of the relative errors with Huber's weights (Huber 1964), so that a few windows
beside a noisy neighbour do not move it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import AwareDatetime, Field

from open_autoglm.schemas.base import FORMAT_VERSION, Model
from open_autoglm.schemas.watch import LatencyWindow

if TYPE_CHECKING:
    from numpy.typing import NDArray

Watched = Literal["ttft", "tpot"]
"""Whose time in the engine is compared: a prompt's, without the wait for a slot, and a further token's."""

WATCHED: tuple[Watched, ...] = ("ttft", "tpot")

LEAST_WINDOWS = 24
SLACK = math.log(1.1) / 2
"""Of the cumulative sums: half of a change by 10 %, the least that is worth another study."""

MARGIN = 0.15
"""How far outside of what a baseline has seen it is still believed, as a share."""

_LEAST_NOISE = 0.005
_LONGEST_MEMORY = 0.985
_RIDGE = 1e-5
_HUBER = 2.0
_NEAR = 2.0
_KEPT_BY_NEAR = 0.9205
"""The variance of a standard normal value that is cut off at ±2: single bursts are no part of a forecast."""

_FAR = 3.5


class Observation(Model):
    """What a baseline learns of a window."""

    end: AwareDatetime
    seconds: float = Field(gt=0)
    requests: int
    read_tokens: float = Field(description="mean of a prompt, without what was in the cache")
    output_tokens: float = Field(description="mean of an answer")
    context_tokens: float = Field(description="mean that a further token looks back on")
    output_per_s: float = Field(description="tokens asked for, the measure of the load")
    engine_ms: Mapping[Watched, float] = Field(description="means; without those that cannot be told")
    answers: Mapping[Watched, int] = Field(description="that the means are of")

    def features(self, watched: Watched) -> tuple[float, ...]:
        """What its time may depend on; the first is constant."""
        length = self.read_tokens if watched == "ttft" else self.context_tokens
        return (1.0, length, self.output_per_s)


def observe(window: LatencyWindow) -> Observation | None:
    """None if nothing was asked, or a figure of it is not finite."""
    prompt, output = window.prompt_tokens.mean, window.output_tokens.mean
    if prompt is None or output is None or window.seconds <= 0:
        return None
    read = max(0.0, prompt - window.cached_tokens / window.prompt_tokens.count)
    times = _engine_ms(window)
    numbers = (read, output, *times.values())
    if not times or not all(map(math.isfinite, numbers)) or min(times.values()) <= 0:
        return None
    return Observation(
        end=window.end,
        seconds=window.seconds,
        requests=window.requests,
        read_tokens=read,
        output_tokens=output,
        context_tokens=prompt + output / 2,
        output_per_s=window.requests / window.seconds * output,
        engine_ms=times,
        answers={name: window.times_ms[name].count for name in times},
    )


def _engine_ms(window: LatencyWindow) -> dict[Watched, float]:
    """Means. The first token's is not known where the wait for a slot is not."""
    means = {name: histogram.mean for name, histogram in window.times_ms.items()}
    ttft, queue, tpot = means.get("ttft"), means.get("queue"), means.get("tpot")
    found: dict[Watched, float] = {}
    if ttft is not None and queue is not None:
        found["ttft"] = ttft - queue
    if tpot is not None:
        found["tpot"] = tpot
    return found


class Noise(Model):
    """Of the log ratio of a window's mean to what was expected, while all is well."""

    between: float = Field(ge=0, description="standard deviation of what the host adds for a while")
    within: float = Field(ge=0, description="of a single request; of a mean, by the root of their number")
    memory: float = Field(
        ge=0, lt=1, description="least correlation of the host's part with the window before"
    )
    long_run: float = Field(ge=0, description="standard deviation of a sum of n windows is this times √n")
    excursion: float = Field(
        ge=0,
        description="highest cumulative sum of what was above the slack, or below it, while it was learned",
    )


class Expectation(Model):
    """The usual time of one stage, in ms: the sum of the features, each times its coefficient."""

    coefficients: tuple[float, ...]
    lowest: tuple[float, ...] = Field(description="of each feature, in the windows it was learned from")
    highest: tuple[float, ...]
    spread: tuple[tuple[float, ...], ...] = Field(description="inverse of the normal equations' matrix")
    noise: Noise
    windows: int

    def expected_ms(self, features: Sequence[float]) -> float:
        return sum(c * x for c, x in zip(self.coefficients, features, strict=True))

    def covers(self, features: Sequence[float]) -> bool:
        """Whether lengths and load are such as it has seen, and it expects a time at all."""
        known = all(
            low * (1 - MARGIN) <= x <= high * (1 + MARGIN)
            for x, low, high in zip(features, self.lowest, self.highest, strict=True)
        )
        return known and self.expected_ms(features) > 0

    def uncertainty(self, features: Sequence[float]) -> float:
        """Standard error of the logarithm of what it expects of these features."""
        x = np.asarray(features) / self.expected_ms(features)
        return float(np.sqrt(max(0.0, x @ np.asarray(self.spread) @ x))) * self.noise.long_run


class Anchor(Model):
    """What the study measured of the champion, one request at a time, before it was promoted."""

    prompt_tokens: int = Field(gt=0)
    output_tokens: int = Field(gt=0)
    median_ms: Mapping[Watched, float]


class Baseline(Model):
    """What one version does while it is healthy. Never changed: a longer lesson makes another one."""

    format_version: int = FORMAT_VERSION
    service: str
    version: str
    bundle_digest: str
    begin: AwareDatetime
    end: AwareDatetime
    stages: Mapping[Watched, Expectation]
    slower_than_trial: Mapping[Watched, float] = Field(
        default={},
        description="an idle endpoint's time for the study's request, as a multiple of the study's",
    )


def learn(
    service: str,
    version: str,
    bundle_digest: str,
    observations: Sequence[Observation],
    anchor: Anchor | None = None,
) -> Baseline | None:
    """From a version's healthy windows, in their order; None while they are fewer than `LEAST_WINDOWS`."""
    stages: dict[Watched, Expectation] = {}
    for watched in WATCHED:
        known = [found for found in observations if watched in found.engine_ms]
        if len(known) >= LEAST_WINDOWS:
            stages[watched] = _fit(known, watched)
    if not stages:
        return None
    return Baseline(
        service=service,
        version=version,
        bundle_digest=bundle_digest,
        begin=observations[0].end,
        end=observations[-1].end,
        stages=stages,
        slower_than_trial=_beside(anchor, stages) if anchor else {},
    )


def _beside(anchor: Anchor, stages: Mapping[Watched, Expectation]) -> dict[Watched, float]:
    """A baseline that was learned in bad times expects more than the study measured."""
    context = anchor.prompt_tokens + anchor.output_tokens / 2
    lengths: dict[Watched, float] = {"ttft": anchor.prompt_tokens, "tpot": context}
    return {
        name: stages[name].expected_ms((1.0, lengths[name], 0.0)) / median_ms
        for name, median_ms in anchor.median_ms.items()
        if name in stages
    }


# ── the fit ──────────────────────────────────────────────────────────────────────────────────────


def _fit(observations: Sequence[Observation], watched: Watched) -> Expectation:
    features = np.array([found.features(watched) for found in observations])
    times = np.array([found.engine_ms[watched] for found in observations])
    answers = np.array([found.answers[watched] for found in observations], dtype=float)
    scale = np.maximum(np.abs(features).mean(axis=0), 1e-12)
    scaled, spread = _regress(features / scale, times)
    coefficients = scaled / scale
    errors = np.log(times / np.maximum(features @ coefficients, 1e-9 * times))
    middle = float(np.median(errors))
    coefficients = coefficients * math.exp(middle)
    return Expectation(
        coefficients=tuple(coefficients.tolist()),
        lowest=tuple(features.min(axis=0).tolist()),
        highest=tuple(features.max(axis=0).tolist()),
        spread=tuple(map(tuple, (spread / np.outer(scale, scale)).tolist())),
        noise=_noise(errors - middle, answers, _follows(observations)),
        windows=len(observations),
    )


def _regress(
    features: NDArray[np.float64], times: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Coefficients ``[k]`` and the inverse ``[k, k]`` of the normal equations of relative errors.

    A slight ridge settles what the windows do not tell apart, such as lengths that never change.
    """
    ridge = np.diag([0.0] + [_RIDGE * len(times)] * (features.shape[1] - 1))
    expected = np.full_like(times, np.median(times))
    weights = np.ones_like(times)
    for _ in range(10):
        rows = features / expected[:, None]
        normal = rows.T @ (weights[:, None] * rows) + ridge / np.median(times) ** 2
        inverse = np.asarray(np.linalg.inv(normal), dtype=np.float64)
        coefficients = inverse @ (rows.T @ (weights * times / expected))
        expected = np.maximum(features @ coefficients, 0.1 * times)
        errors = times / expected - 1
        far = np.abs(errors) / (_HUBER * _robust_sd(errors))
        weights = 1 / np.maximum(1.0, far)
    return coefficients, inverse


def _robust_sd(errors: NDArray[np.float64]) -> float:
    """By the median absolute deviation, for a normal distribution."""
    return max(1.4826 * float(np.median(np.abs(errors - np.median(errors)))), 1e-9)


def _follows(observations: Sequence[Observation]) -> NDArray[np.bool_]:
    """Of each but the first: whether it is of the window right after."""
    gaps = [
        (after.end - before.end).total_seconds() / after.seconds - 1
        for before, after in pairwise(observations)
    ]
    return np.array([abs(gap) < 0.5 for gap in gaps], dtype=bool)


def _noise(errors: NDArray[np.float64], answers: NDArray[np.float64], follows: NDArray[np.bool_]) -> Noise:
    """The requests' part from the differences of windows that follow each other, in which a host that drifts
    over a day is not seen; the host's is the rest. Memory is taken as a standard error less than it seems: a
    host that forgets is harder to forecast."""
    count, sd = len(errors), _robust_sd(errors)
    near = np.clip(errors, -_NEAR * sd, _NEAR * sd)
    request = _requests_variance(errors, answers, follows)
    host = float(np.mean(near**2)) / _KEPT_BY_NEAR - request * float(np.mean(1 / answers))
    host = max(host, _LEAST_NOISE**2)
    pairs = (near[:-1] * near[1:])[follows] / _KEPT_BY_NEAR
    memory = float(np.clip(pairs.mean() / host, 0, _LONGEST_MEMORY)) if len(pairs) else 0.0
    far = np.clip(errors, -_FAR * sd, _FAR * sd)
    return Noise(
        between=math.sqrt(host),
        within=math.sqrt(request),
        memory=max(0.0, memory - math.sqrt((1 - memory**2) / count)),
        long_run=math.sqrt(_long_run_variance(far)),
        excursion=max(_largest_sum(far), _largest_sum(-far)),
    )


def _requests_variance(
    errors: NDArray[np.float64], answers: NDArray[np.float64], follows: NDArray[np.bool_]
) -> float:
    """Of a single request: how much more windows of few requests differ from the ones before them."""
    from scipy.optimize import nnls

    if follows.sum() < LEAST_WINDOWS // 2:
        return 0.0
    steps = np.diff(errors)[follows]
    sd = _robust_sd(steps)
    few = (1 / answers[1:] + 1 / answers[:-1])[follows]
    squares = np.clip(steps, -_NEAR * sd, _NEAR * sd) ** 2 / _KEPT_BY_NEAR
    (_, request), _ = nnls(np.column_stack([np.ones(len(few)), few]), squares)
    return float(request)


def _largest_sum(errors: NDArray[np.float64]) -> float:
    """How high a cumulative sum of what is above `SLACK` gets."""
    total = largest = 0.0
    for excess in (errors - SLACK).tolist():
        total = max(0.0, total + excess)
        largest = max(largest, total)
    return largest


def _long_run_variance(errors: NDArray[np.float64]) -> float:
    """Newey and West 1987, of what an AR(1) process does not explain (Andrews and Monahan 1992). Both the
    process's memory and the rest are taken as a standard error more than they seem: a short lesson must not
    make the judge sure."""
    count, lags = len(errors), math.isqrt(len(errors))
    memory = float(np.dot(errors[1:], errors[:-1]) / max(np.dot(errors, errors), 1e-12))
    rest = errors[1:] - memory * errors[:-1]
    products = [float(np.dot(rest[lag:], rest[: len(rest) - lag])) for lag in range(lags + 1)]
    weighted = [2 * (1 - lag / (lags + 1)) * products[lag] for lag in range(1, lags + 1)]
    variance = max(products[0] / 4, products[0] + sum(weighted)) / len(rest)
    bias, error = (1 + 3 * memory) / count, math.sqrt((1 - memory**2) / count)  # the bias: Kendall 1954
    memory = min(max(0.0, memory + bias + error), _LONGEST_MEMORY)
    return variance / (1 - memory) ** 2 * (1 + math.sqrt(4 * lags / (3 * count)))
