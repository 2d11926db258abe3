"""Simulated production traffic, request by request, as windows that the judge reads.

Arrivals are Poisson with a rate that follows the hour, the weekday and chance; prompts and answers have
log-normal lengths; a few slots serve them first come, first served, and the busier they are the slower each
is. Every request has noise of its own, and the host a factor that lasts (an AR(1) process in its logarithm,
constant within a window) with bursts of a noisy neighbour on top. Windows are simulated side by side, each
with two minutes of traffic before it that are not counted, so a queue is not carried from one to the next
for longer than that. Histograms have the endpoint's own buckets.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from open_autoglm.schemas.watch import Histogram, LatencyWindow, Slo, Stage
from open_autoglm.serving.metrics import Board

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

WINDOW_S = 900.0
DAY = 96
"""Windows of a day."""

BEGIN = datetime(2026, 1, 5, tzinfo=UTC)  # a Monday
_WARM_UP_S = 120.0
_DEADLINE_S = 30.0
_PACE_MS, _PACE_ERROR = 2.0, 0.005
"""Of the fixed piece of work, and of its mean over a window."""
_MILLISECONDS = 1000.0


@dataclass(frozen=True)
class Host:
    """What is not the engine's fault."""

    drift: float = 0.03
    """Standard deviation of the host's factor, in its logarithm."""
    lasts_h: float = 2.0
    """Time in which the drift's correlation falls to 1/e."""
    bursts_per_day: float = 2.0
    """Single windows in which a neighbour takes a share of the host; 20 to 60 % slower."""
    told: float | None = None
    """Correlation of the host's factor with what the endpoint's fixed piece of work shows of it; None: the
    endpoint times none."""

    @property
    def memory(self) -> float:
        return math.exp(-WINDOW_S / 3600 / self.lasts_h)


@dataclass(frozen=True)
class Service:
    """A small model on a CPU: times in ms of an idle endpoint."""

    slots: int = 3
    first_ms: float = 20.0
    prompt_token_ms: float = 0.9
    token_ms: float = 9.0
    crowd: float = 0.1
    """How much slower everything is for each other request in a slot, as a share."""
    request_noise: float = 0.1


@dataclass(frozen=True)
class Demand:
    """Who asks, and how much."""

    per_s: float = 0.7
    by_hour: float = 0.6
    """The rate at its height is this share above its mean."""
    at_weekends: float = 0.75
    by_chance: float = 0.08
    prompt_tokens: float = 120.0
    """Median."""
    output_tokens: float = 48.0


@dataclass(frozen=True)
class Change:
    """What becomes different, from ``at`` on, in windows since the begin; may lie within one."""

    at: float = math.inf
    engine: float = 1.0
    host: float = 1.0
    demand: float = 1.0
    prompts: float = 1.0


@dataclass(frozen=True)
class World:
    """All of it."""

    host: Host = field(default_factory=Host)
    service: Service = field(default_factory=Service)
    demand: Demand = field(default_factory=Demand)
    change: Change = field(default_factory=Change)

    def changed(self, **what: float) -> World:
        return replace(self, change=Change(**what))


def windows(world: World, count: int, seed: int, *, first: int = 0) -> Iterator[LatencyWindow]:
    """``count`` windows from ``BEGIN`` on, or after the ``first``; the same seed has the same host."""
    random = np.random.default_rng((seed, first))
    host = _host_factor(world.host, first + count, seed)
    paces = _paces_ms(world, host, seed)
    host = host[first:]
    index = np.arange(first, first + count)
    rates = _rates(world.demand, index, np.random.default_rng((seed, 1, first)))
    requests = _simulate(world, index, rates, host, random)
    return _as_windows(requests, index, None if paces is None else paces[first:])


def _paces_ms(world: World, factor: Floats, seed: int) -> Floats | None:
    """What the endpoint times: as much of the host's factor as it tells, and as much of its own."""
    host, change = world.host, world.change
    if host.told is None:
        return None
    random = np.random.default_rng((seed, 4))
    own = _drift(host, len(factor), random) * math.sqrt(1 - host.told**2)
    error = random.normal(0, _PACE_ERROR, len(factor))
    changed = np.clip(np.arange(1, len(factor) + 1) - change.at, 0, 1)  # share of the window
    steps = 1 + changed * (change.host - 1)
    return np.asarray(_PACE_MS * np.exp(host.told * np.log(factor) + own + error) * steps)


def _drift(host: Host, count: int, random: np.random.Generator) -> Floats:
    from scipy.signal import lfilter

    shocks = random.normal(0, host.drift * math.sqrt(1 - host.memory**2), count)
    shocks[0] = random.normal(0, host.drift)
    return np.asarray(lfilter([1.0], [1.0, -host.memory], shocks))


def _host_factor(host: Host, count: int, seed: int) -> Floats:
    random = np.random.default_rng((seed, 2))
    drift = _drift(host, count, random)
    burst = random.random(count) < host.bursts_per_day / DAY
    burst &= ~np.roll(burst, 1)  # a neighbour that stays is no burst
    return np.asarray(np.exp(drift) * np.where(burst, random.uniform(1.2, 1.6, count), 1.0))


def _rates(demand: Demand, index: NDArray[np.int64], random: np.random.Generator) -> Floats:
    """Requests per second in each window: lowest at 3, highest at 15 o'clock."""
    hours = 2 * math.pi * (index % DAY) / DAY
    weekend = np.where((index // DAY) % 7 >= 5, demand.at_weekends, 1.0)
    chance = np.exp(random.normal(0, demand.by_chance, len(index)))
    return np.asarray(
        demand.per_s * weekend * chance * (1 - demand.by_hour * np.cos(hours - 2 * math.pi * 3 / 24))
    )


@dataclass(frozen=True)
class _Requests:
    """Arrays ``[windows, requests]``; times in seconds. What is not ``counted`` is padding or warm-up."""

    counted: NDArray[np.bool_]
    refused: NDArray[np.bool_]
    prompt: Floats
    output: Floats
    wait: Floats
    first: Floats
    token: Floats


def _simulate(
    world: World, index: NDArray[np.int64], rates: Floats, host: Floats, random: np.random.Generator
) -> _Requests:
    demand, service, change = world.demand, world.service, world.change
    rates = rates * np.where(index + 1 > change.at, change.demand, 1.0)
    span = WINDOW_S + _WARM_UP_S
    most = int(rates.max() * span + 6 * math.sqrt(rates.max() * span)) + 1
    shape = (len(index), most)
    arrival = np.cumsum(random.exponential(1, shape) / rates[:, None], axis=1) - _WARM_UP_S
    later = (arrival / WINDOW_S + index[:, None]) >= change.at
    prompt = _lengths(random, shape, demand.prompt_tokens, 0.6) * np.where(later, change.prompts, 1.0)
    prompt, output = np.ceil(prompt), np.ceil(_lengths(random, shape, demand.output_tokens, 0.5)) + 1
    pace = host[:, None] * np.exp(random.normal(0, service.request_noise, shape))
    pace *= np.where(later, change.engine * change.host, 1.0)
    wait, first, token, refused = _queue(service, arrival, prompt, output, pace)
    inside = (arrival >= 0) & (arrival < WINDOW_S)
    return _Requests(inside & ~refused, inside & refused, prompt, output, wait, first, token)


def _lengths(random: np.random.Generator, shape: tuple[int, int], median: float, spread: float) -> Floats:
    return np.minimum(median * np.exp(random.normal(0, spread, shape)), 12 * median)


def _queue(
    service: Service, arrival: Floats, prompt: Floats, output: Floats, pace: Floats
) -> tuple[Floats, Floats, Floats, NDArray[np.bool_]]:
    """Wait, time of the first token in the engine, time per further token, and who was refused.

    Kiefer and Wolfowitz's recursion, over all windows at once: a request takes the slot that is free first.
    """
    rows = np.arange(len(arrival))
    free = np.full((len(arrival), service.slots), -np.inf)
    wait, first, token = np.empty_like(arrival), np.empty_like(arrival), np.empty_like(arrival)
    alone = (service.first_ms + service.prompt_token_ms * prompt) * pace / _MILLISECONDS
    each = service.token_ms * pace / _MILLISECONDS
    for n in range(arrival.shape[1]):
        slot = free.argmin(axis=1)
        begin = np.maximum(arrival[:, n], free[rows, slot])
        crowd = 1 + service.crowd * (free > begin[:, None]).sum(axis=1)
        wait[:, n] = begin - arrival[:, n]
        first[:, n], token[:, n] = alone[:, n] * crowd, each[:, n] * crowd
        end = begin + first[:, n] + token[:, n] * (output[:, n] - 1)
        free[rows, slot] = np.where(wait[:, n] > _DEADLINE_S, free[rows, slot], end)
    return wait, first, token, wait > _DEADLINE_S


# ── as the endpoint counts it ────────────────────────────────────────────────────────────────────

SLO = Slo(ttft_p95_ms=900, tpot_p95_ms=25, e2e_p95_ms=3000)
"""Its limits are bounds of the buckets, as an endpoint's are that knows its SLO."""


@cache
def bounds() -> Mapping[str, tuple[float, ...]]:
    """The upper bounds of each histogram of an endpoint, by its name."""
    board = Board("simulated", SLO)
    board.of("1", "0" * 12, "champion")
    found: dict[str, list[float]] = {}
    for family in board.registry.collect():
        for sample in family.samples:
            if sample.name.endswith("_bucket") and not math.isinf(float(sample.labels["le"])):
                found.setdefault(family.name, []).append(float(sample.labels["le"]))
    return {name: tuple(values) for name, values in found.items()}


def _as_windows(
    requests: _Requests, index: NDArray[np.int64], paces_ms: Floats | None
) -> Iterator[LatencyWindow]:
    times = _times(requests)
    prompts = _histograms(requests.prompt, requests.counted, bounds()["vllm:request_prompt_tokens"])
    outputs = _histograms(requests.output, requests.counted, bounds()["vllm:request_generation_tokens"])
    for row, number in enumerate(index):
        begin = BEGIN + timedelta(seconds=WINDOW_S * int(number))
        yield LatencyWindow(
            service="simulated",
            version="1",
            bundle_digest="0" * 12,
            begin=begin,
            end=begin + timedelta(seconds=WINDOW_S),
            source="endpoint",
            requests=int(requests.counted[row].sum()),
            refused=int(requests.refused[row].sum()),
            failed=0,
            restarts=0,
            times_ms={stage: histograms[row] for stage, histograms in times.items()},
            prompt_tokens=prompts[row],
            output_tokens=outputs[row],
            cached_tokens=0,
            memory_bytes=0,
            pace_ms=None if paces_ms is None else float(paces_ms[row]),
        )


def _times(requests: _Requests) -> dict[Stage, list[Histogram]]:
    """In ms, of the requests of each window."""
    seconds: dict[Stage, Floats] = {
        "queue": requests.wait,
        "ttft": requests.wait + requests.first,
        "tpot": requests.token,
        "e2e": requests.wait + requests.first + requests.token * (requests.output - 1),
    }
    names = {
        "queue": "vllm:time_to_first_token_seconds",  # the same kind of time
        "ttft": "vllm:time_to_first_token_seconds",
        "tpot": "vllm:request_time_per_output_token_seconds",
        "e2e": "vllm:e2e_request_latency_seconds",
    }
    return {
        stage: _histograms(
            values * _MILLISECONDS,
            requests.counted,
            tuple(bound * _MILLISECONDS for bound in bounds()[names[stage]]),
        )
        for stage, values in seconds.items()
    }


def _histograms(values: Floats, counted: NDArray[np.bool_], limits: tuple[float, ...]) -> list[Histogram]:
    """One for each row, of its counted values; a value at a bound is below it, as Prometheus has it."""
    rows, width = len(values), len(limits) + 1
    bucket = np.searchsorted(limits, values, side="left") + width * np.arange(rows)[:, None]
    counts = np.bincount(bucket[counted], minlength=rows * width).reshape(rows, width)
    sums = np.where(counted, values, 0.0).sum(axis=1)
    return [
        Histogram(bounds=limits, counts=tuple(row.tolist()), sum=float(total))
        for row, total in zip(counts, sums, strict=True)
    ]
