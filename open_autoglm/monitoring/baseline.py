"""What a version's windows look like while it is healthy: its time in the engine, by what it was asked.

A window of long prompts, or of many callers, is slower without anything being wrong. So the mean time in the
engine is a linear function of the mean lengths and of the load, which for a mean is exact where a request's
time is linear in its length, whatever the mix within the window. The load is what was *asked for* (tokens per
second), and not the requests in their slots: those grow with the very slowness that is looked for.

What remains is noise, as log ratios (:mod:`open_autoglm.monitoring.noise`). Where the endpoint times its
host's pace, and the engine's time follows that, a second fit leaves the host's part out
(:mod:`open_autoglm.monitoring.host_pace`). The fit is by iteratively reweighted least squares of the relative
errors with Huber's weights (Huber 1964), so that a few windows beside a noisy neighbour do not move it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from pydantic import AwareDatetime, Field

from open_autoglm.monitoring.host_pace import HostEffect, host_effect
from open_autoglm.monitoring.noise import LEAST_WINDOWS, Noise, noise_of, robust_sd
from open_autoglm.schemas.base import FORMAT_VERSION, Model
from open_autoglm.schemas.watch import LatencyWindow

if TYPE_CHECKING:
    from numpy.typing import NDArray

Watched = Literal["ttft", "tpot"]
"""Whose time in the engine is compared: a prompt's, without the wait for a slot, and a further token's."""

WATCHED: tuple[Watched, ...] = ("ttft", "tpot")

MARGIN = 0.15
"""How far outside of what a baseline has seen it is still believed, as a share."""

_MOSTLY = 0.8
"""Share of a lesson's windows that must have their host's pace."""

_RIDGE = 1e-5
_HUBER = 2.0


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
    pace_ms: float | None = Field(None, gt=0, description="of the host; None where nobody timed it")

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
        pace_ms=window.pace_ms,
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


class Paced(Model):
    """One stage beside its host."""

    host: HostEffect
    expectation: Expectation = Field(description="of the host at its usual pace")


class Expected(NamedTuple):
    """Of one stage, in one window."""

    ms: float
    uncertainty: float
    """Standard error of its logarithm."""
    by: Expectation
    host_share: float | None
    """What the host's pace makes of it, as a logarithm; None where that is not known."""


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
    paced: Mapping[Watched, Paced] = Field(
        default={}, description="the stages again, as far as they follow the host's pace"
    )
    slower_than_trial: Mapping[Watched, float] = Field(
        default={},
        description="an idle endpoint's time for the study's request, as a multiple of the study's",
    )

    @property
    def windows(self) -> int:
        """That it was learned from."""
        return max(stage.windows for stage in self.stages.values())

    def is_of(self, window: LatencyWindow) -> bool:
        """Whether it is of that version and bundle."""
        return (self.version, self.bundle_digest) == (window.version, window.bundle_digest)

    def expect(self, watched: Watched, seen: Observation) -> Expected | None:
        """None if it has not seen such lengths or such a load."""
        features, paced = seen.features(watched), self.paced.get(watched)
        if paced is None or seen.pace_ms is None:
            by, share, error = self.stages[watched], None, 0.0
        else:
            by, share = paced.expectation, paced.host.log_share(seen.pace_ms)
            error = paced.host.uncertainty(seen.pace_ms)
        if not by.covers(features):
            return None
        ms = by.expected_ms(features) * math.exp(share or 0.0)
        return Expected(ms, math.hypot(by.uncertainty(features), error), by, share)


def learn(
    service: str,
    version: str,
    bundle_digest: str,
    observations: Sequence[Observation],
) -> Baseline | None:
    """From a version's healthy windows, in their order; None while they are fewer than `LEAST_WINDOWS`."""
    stages: dict[Watched, Expectation] = {}
    paced: dict[Watched, Paced] = {}
    for watched in WATCHED:
        known = [found for found in observations if watched in found.engine_ms]
        if len(known) >= LEAST_WINDOWS:
            stages[watched] = _fit(known, watched)
            beside = _fit_beside_host(known, watched, stages[watched])
            paced |= {watched: beside} if beside else {}
    if not stages:
        return None
    return Baseline(
        service=service,
        version=version,
        bundle_digest=bundle_digest,
        begin=observations[0].end,
        end=observations[-1].end,
        stages=stages,
        paced=paced,
    )


def beside_trial(baseline: Baseline, anchor: Anchor) -> Baseline:
    """The same, with how it compares: one that was learned in bad times expects more than the study measured.

    Nothing is said of lengths that the endpoint's traffic does not have; an idle endpoint is always known.
    """
    context = anchor.prompt_tokens + anchor.output_tokens / 2
    lengths: dict[Watched, float] = {"ttft": anchor.prompt_tokens, "tpot": context}
    found = {}
    for name, median_ms in anchor.median_ms.items():
        stage = baseline.stages.get(name)
        if stage is not None and stage.covers((1.0, lengths[name], stage.lowest[-1])):
            found[name] = stage.expected_ms((1.0, lengths[name], 0.0)) / median_ms
    return baseline.model_copy(update={"slower_than_trial": found})


# ── the fit ──────────────────────────────────────────────────────────────────────────────────────


def _fit_beside_host(
    observations: Sequence[Observation], watched: Watched, alone: Expectation
) -> Paced | None:
    """None if too few windows have their host's pace, or what it explains is no gain."""
    known = [found for found in observations if found.pace_ms is not None]
    if len(known) < max(LEAST_WINDOWS, _MOSTLY * len(observations)):
        return None
    expected = np.array([alone.expected_ms(found.features(watched)) for found in known])
    times = np.array([found.engine_ms[watched] for found in known])
    paces = np.array([found.pace_ms for found in known], dtype=float)
    ends = np.array([found.end.timestamp() / found.seconds for found in known])
    host = host_effect(np.log(times / np.maximum(expected, 1e-9 * times)), paces, ends)
    if host is None:
        return None
    shares = np.array([host.log_share(pace_ms) for pace_ms in paces.tolist()])
    expectation = _fit(known, watched, shares)
    gains = expectation.noise.between < alone.noise.between
    return Paced(host=host, expectation=expectation) if gains else None


def _fit(
    observations: Sequence[Observation], watched: Watched, host_shares: NDArray[np.float64] | None = None
) -> Expectation:
    """Of times without the host's share, if that is given."""
    features = np.array([found.features(watched) for found in observations])
    times = np.array([found.engine_ms[watched] for found in observations])
    times = times if host_shares is None else times * np.exp(-host_shares)
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
        noise=noise_of(errors - middle, answers, _follows(observations)),
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
        far = np.abs(errors) / (_HUBER * robust_sd(errors))
        weights = 1 / np.maximum(1.0, far)
    return coefficients, inverse


def _follows(observations: Sequence[Observation]) -> NDArray[np.bool_]:
    """Of each but the first: whether it is of the window right after."""
    gaps = [
        (after.end - before.end).total_seconds() / after.seconds - 1
        for before, after in pairwise(observations)
    ]
    return np.array([abs(gap) < 0.5 for gap in gaps], dtype=bool)
