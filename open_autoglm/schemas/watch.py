"""What a served model is watched by: the promise, a slice of what happened, the judgement and its cause."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Literal, Self

from pydantic import AwareDatetime, Field, model_validator

from open_autoglm.schemas.base import FORMAT_VERSION, Model
from open_autoglm.schemas.evidence import Conditions

Stage = Literal["ttft", "tpot", "e2e", "queue"]
"""Of an answer: request to first token, mean of a token after it, request to last token, wait for a slot."""

WatchState = Literal["ok", "breached", "no_data"]
CauseKind = Literal["load", "environment", "mix", "engine", "unknown"]


class Slo(Model):
    """The promise. What is None is not promised."""

    ttft_p95_ms: float | None = Field(None, gt=0)
    tpot_p95_ms: float | None = Field(None, gt=0)
    e2e_p95_ms: float | None = Field(None, gt=0)
    error_fraction: float = Field(0.01, ge=0, le=1, description="of all answers: lost, refused or not finite")


class Histogram(Model):
    """Values of a window by buckets, as Prometheus counts them, but not cumulated."""

    bounds: tuple[float, ...] = Field(description="upper ones, ascending, without infinity")
    counts: tuple[int, ...] = Field(description="of each bucket, the one above the last bound included")
    sum: float

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if len(self.counts) != len(self.bounds) + 1:
            raise ValueError(f"{len(self.bounds)} bounds need {len(self.bounds) + 1} counts")
        if list(self.bounds) != sorted(set(self.bounds)):
            raise ValueError("bounds must ascend")
        if min(self.counts) < 0:
            raise ValueError("a count is negative")
        return self

    @property
    def count(self) -> int:
        return sum(self.counts)

    @property
    def mean(self) -> float | None:
        """Exact, unlike the quantiles. None without values."""
        return self.sum / self.count if self.count else None

    def above(self, bound: float) -> int | None:
        """How many values were greater; exact, so None if ``bound`` is not one of ours."""
        if bound not in self.bounds:
            return None
        return sum(self.counts[self.bounds.index(bound) + 1 :])

    def quantile(self, share: float) -> float | None:
        """By linear interpolation in its bucket, as Prometheus' ``histogram_quantile`` does it.

        None without values; the last bound if it lies above it.
        """
        if not self.count:
            return None
        rank, lower = share * self.count, 0.0
        for bound, count, up_to in zip(self.bounds, self.counts, accumulate(self.counts), strict=False):
            if up_to >= rank and count:
                return lower + (bound - lower) * (rank - (up_to - count)) / count
            lower = bound
        return self.bounds[-1]


class LatencyWindow(Model):
    """What one version of a served model did between two moments."""

    service: str = Field(description="the model's public name")
    version: str = Field(description="in the registry; empty if it has none")
    bundle_digest: str = Field(description="its first 12 characters")
    begin: AwareDatetime
    end: AwareDatetime
    source: Literal["prometheus", "endpoint"]
    requests: int = Field(ge=0, description="that were let in")
    refused: int = Field(ge=0)
    failed: int = Field(ge=0, description="lost by a crash, or not finite")
    restarts: int = Field(ge=0, description="of the engine, in the window")
    times_ms: Mapping[Stage, Histogram]
    left_ms: Mapping[Stage, Histogram] = Field(
        default={}, description="how long those waited for it who left: before the first token, or the last"
    )
    prompt_tokens: Histogram
    output_tokens: Histogram
    cached_tokens: int = Field(ge=0, description="of the prompts: not computed, they were in the cache")
    memory_bytes: int = Field(ge=0, description="resident, of the engine's process; 0: unknown")
    pace_ms: float | None = Field(
        None, gt=0, description="mean time of a fixed piece of work on the host while nobody was answered"
    )

    @property
    def seconds(self) -> float:
        return (self.end - self.begin).total_seconds()

    @property
    def error_fraction(self) -> float | None:
        asked = self.requests + self.refused
        return (self.failed + self.refused) / asked if asked else None


class Cause(Model):
    """Why a breach happened, with what speaks for it."""

    kind: CauseKind
    told: str = Field(description="one sentence")
    evidence: Mapping[str, float | str] = Field(
        description="figures by name, units in the names; none if nothing could be looked at"
    )


class Judgement(Model):
    """What was found at one look."""

    service: str
    at: AwareDatetime
    state: WatchState
    act: bool = Field(False, description="breached, and nothing was done about it within the cool-down")
    due: AwareDatetime | None = Field(
        None, description="since when there is something to do, if whoever was to do it has not"
    )
    again: AwareDatetime | None = Field(
        None, description="when another look may tell more, if that is before the schedule's next"
    )
    reasons: tuple[str, ...] = Field(description="sentences; for `ok` what was looked at")
    window: LatencyWindow | None = None
    figures: Mapping[str, float] = Field(default={}, description="what was compared, units in the names")
    cause: Cause | None = None

    @model_validator(mode="after")
    def _acts_on_breaches(self) -> Self:
        if self.act and self.state != "breached":
            raise ValueError(f"{self.state!r} is nothing to act on")
        return self


# ── what is looked at before a cause is named ────────────────────────────────────────────────────


class GpuConditions(Model):
    """What a GPU did meanwhile, as its driver tells it."""

    name: str
    clock_mhz: int = Field(description="of its multiprocessors, the highest that was seen")
    slowed_by: tuple[str, ...] = Field((), description="why its clock was held down; idling is no reason")
    foreign_processes: tuple[str, ...] = Field(
        (), description="that compute on it and are not the endpoint's"
    )


class HostProbe(Model):
    """What the serving host did besides serving for half a minute, and what it is made of.

    What the kernel does not tell is None.
    """

    begin: AwareDatetime
    seconds: float = Field(gt=0)
    cores: int = Field(ge=1, description="that the endpoint may use")
    own_cores: float = Field(ge=0, description="kept busy by the endpoint and its engines")
    conditions: Conditions = Field(description="foreign is whoever is not the endpoint or its engines")
    busiest: str = Field("", description="the foreign process that took most, if it can be seen from here")
    busiest_cores: float = Field(0, ge=0)
    clock_mhz: float | None = Field(None, description="of the fastest core, the highest that was seen")
    thermal_events: int | None = Field(None, description="times a core or its package was slowed by heat")
    throttled_share: float | None = Field(
        None, ge=0, le=1, description="of the scheduling periods, those in which a cgroup's quota was used up"
    )
    cpu_pressure_share: float | None = Field(None, description="of the time, somebody waited for a core")
    memory_pressure_share: float | None = Field(None, description="of the time, somebody waited for memory")
    gpus: tuple[GpuConditions, ...] = ()


class GoldenTimes(Model):
    """What the bundle's own kind of request takes when nobody else is answered."""

    prompt_tokens: int = Field(ge=1)
    output_tokens: int = Field(ge=1)
    ttft_ms: tuple[float, ...]
    tpot_ms: tuple[float, ...] = Field(description="of the tokens after the first")
    e2e_ms: tuple[float, ...] = Field(description="of those that have both: to the last token, were it whole")
    waits: int = Field(0, ge=0, description="times it waited for clients to be answered")
    gave_way: int = Field(0, ge=0, description="requests begun and given up because a client came")
    busy_share: float = Field(0, ge=0, le=1, description="of the probe, time that clients kept it from")
    ended: str = Field("", description="why there are few times or none")


class EndpointProbe(Model):
    """An endpoint and its host at one moment; taken soon after a promotion, it is what later ones are held
    against. Where there is none, the study's own figures stand in: then there is no ``host``."""

    format_version: int = FORMAT_VERSION
    source: Literal["probe", "study"]
    bundle_digest: str = Field(description="its first 12 characters")
    golden: GoldenTimes | None = Field(description="None: there were no figures")
    host: HostProbe | None = None
    settings: Mapping[str, str] = Field(description="of host and libraries: what timing depends on besides")
    slowed_share: float = Field(0, ge=0, description="by which the engine was made slower, to rehearse")
