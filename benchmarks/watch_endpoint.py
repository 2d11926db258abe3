"""One simulated endpoint, call by call, and what a window and a probe show of it.

Requests arrive at random, wait for a slot, are read in pieces and written in batches whose calls take longer
the more rows and the longer texts they have. Nothing of it knows how a cause is found.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import numpy as np

from open_autoglm.monitoring.golden import golden_times
from open_autoglm.schemas import (
    Conditions,
    EndpointProbe,
    Histogram,
    HostProbe,
    LatencyWindow,
    RequestShape,
)

WINDOW_S, PROBE_S = 600.0, 30.0
_BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
_BOUNDS_MS = tuple(10 * 1.15**power for power in range(70))
_BOUNDS_TOKENS = tuple(float(2**power) for power in range(16))

SLOTS, QUEUE, CHUNK_TOKENS = 4, 24, 128
_GOLDEN = RequestShape(batch_size=1, prompt_tokens=128, output_tokens=16)


_QUIET = Conditions(foreign_cores=0.0)


@dataclass(frozen=True)
class World:
    """How things are; the defaults are good times. The endpoint can answer about 1.8 requests a second."""

    arrivals_per_s: float
    burst: int = 1
    """Requests that come at one moment."""
    prompt_tokens: float = 200.0
    cached_share: float = 0.3
    output_tokens: float = 40.0
    read_factor: float = 1.0
    write_factor: float = 1.0
    slow_until_s: float = math.inf
    """From then on the engine is as fast as ever."""
    conditions: Conditions = _QUIET
    clock_mhz: float = 3000.0
    throttled_share: float = 0.0
    memory_pressure_share: float = 0.0
    kernel: str = "6.1"

    def slower(self, factor: float) -> World:
        return replace(self, read_factor=factor, write_factor=factor)


# ── one endpoint ─────────────────────────────────────────────────────────────────────────────────


@dataclass
class _Request:
    arrival_s: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    begin_s: float = 0.0
    first_s: float = 0.0
    read: int = 0
    written: int = 0


class Traffic(NamedTuple):
    """What came of a world in the time of a window and a probe after it."""

    answered: list[_Request]
    ends_s: list[float]
    refused: int
    gaps_s: list[float]
    """In the time of the probe, how long nobody was answered."""


def simulate(world: World, random: np.random.Generator) -> Traffic:
    """Call after call of the engine, as its scheduler makes them."""
    coming = deque(_arrivals(world, random))
    waiting: deque[_Request] = deque()
    reading: list[_Request] = []
    writing: list[_Request] = []
    found = Traffic([], [], 0, [])
    refused, now_s, wrote_last = 0, 0.0, False
    while coming or waiting or reading or writing:
        if not (waiting or reading or writing):
            _note_gap(found.gaps_s, now_s, coming[0].arrival_s)
            now_s = coming[0].arrival_s
        while coming and coming[0].arrival_s <= now_s:
            if len(waiting) < QUEUE:
                waiting.append(coming.popleft())
            else:
                refused += coming.popleft().arrival_s < WINDOW_S
        while waiting and len(reading) + len(writing) < SLOTS:
            reading.append(waiting.popleft())
            reading[-1].begin_s, reading[-1].read = now_s, reading[-1].cached_tokens
        slow = now_s < world.slow_until_s
        if reading and (wrote_last or not writing):
            now_s += 1e-3 * _read(reading, writing) * (world.read_factor if slow else 1)
            _finish_reading(reading, writing, now_s)
        else:
            now_s += 1e-3 * _write(writing) * (world.write_factor if slow else 1)
        wrote_last = not wrote_last
        for request in [one for one in writing if one.written >= one.output_tokens]:
            writing.remove(request)
            found.answered.append(request)
            found.ends_s.append(now_s)
    _note_gap(found.gaps_s, now_s, WINDOW_S + PROBE_S)
    return found._replace(refused=refused)


def _arrivals(world: World, random: np.random.Generator) -> list[_Request]:
    end_s = WINDOW_S + PROBE_S
    moments = random.poisson(world.arrivals_per_s * end_s / world.burst)
    times_s = np.repeat(np.sort(random.uniform(0, end_s, moments)), world.burst)
    spread = np.exp(random.normal(-0.18, 0.6, (2, len(times_s))))  # of mean 1
    prompts = np.maximum(1, world.prompt_tokens * spread[0]).astype(int)
    outputs = np.maximum(2, world.output_tokens * spread[1]).astype(int)
    return [
        _Request(float(time_s), int(prompt), int(world.cached_share * prompt), int(output))
        for time_s, prompt, output in zip(times_s, prompts, outputs, strict=True)
    ]


def _note_gap(gaps_s: list[float], begin_s: float, end_s: float) -> None:
    gap_s = min(end_s, WINDOW_S + PROBE_S) - max(begin_s, WINDOW_S)
    if gap_s > 0:
        gaps_s.append(gap_s)


def _read(reading: Sequence[_Request], writing: Sequence[_Request]) -> float:
    """The next piece of a prompt; ms."""
    request = min(reading, key=lambda one: one.prompt_tokens - one.read)
    piece = request.prompt_tokens - request.read
    piece = min(piece, CHUNK_TOKENS) if writing or len(reading) > 1 else piece
    request.read += piece
    return 4 + 0.5 * piece + 2e-4 * piece * request.read


def _finish_reading(reading: list[_Request], writing: list[_Request], now_s: float) -> None:
    for request in [one for one in reading if one.read >= one.prompt_tokens]:
        reading.remove(request)
        request.first_s, request.written = now_s, 1
        writing.append(request)


def _write(writing: Sequence[_Request]) -> float:
    """A token of each; ms."""
    texts = 0
    for request in writing:
        request.written += 1
        texts += request.read + request.written
    return 20 + 6 * len(writing) + 2e-3 * texts


# ── what is seen of it ───────────────────────────────────────────────────────────────────────────


def window_of(traffic: Traffic) -> LatencyWindow:
    """Of the answers that ended before the probe."""
    done = [
        (request, end_s)
        for request, end_s in zip(traffic.answered, traffic.ends_s, strict=True)
        if end_s < WINDOW_S
    ]
    requests = [request for request, _ in done]
    queue_ms = [1e3 * (one.begin_s - one.arrival_s) for one in requests]
    ttft_ms = [1e3 * (one.first_s - one.arrival_s) for one in requests]
    e2e_ms = [1e3 * (end_s - one.arrival_s) for one, end_s in done]
    tpot_ms = [
        (e2e - ttft) / (one.written - 1) for one, e2e, ttft in zip(requests, e2e_ms, ttft_ms, strict=True)
    ]
    times = {"queue": queue_ms, "ttft": ttft_ms, "tpot": tpot_ms, "e2e": e2e_ms}
    return LatencyWindow(
        service="simulated",
        version="1",
        bundle_digest="0" * 12,
        begin=_BEGIN,
        end=_BEGIN + timedelta(seconds=WINDOW_S),
        source="endpoint",
        requests=sum(request.arrival_s < WINDOW_S for request in traffic.answered),
        refused=traffic.refused,
        failed=0,
        restarts=0,
        times_ms={name: histogram(values, _BOUNDS_MS) for name, values in times.items()},
        prompt_tokens=histogram([one.prompt_tokens for one in requests], _BOUNDS_TOKENS),
        output_tokens=histogram([one.output_tokens for one in requests], _BOUNDS_TOKENS),
        cached_tokens=sum(one.cached_tokens for one in requests),
        memory_bytes=0,
    )


def histogram(values: Sequence[float], bounds: tuple[float, ...]) -> Histogram:
    counts = np.bincount(np.searchsorted(bounds, values), minlength=len(bounds) + 1)
    return Histogram(bounds=bounds, counts=tuple(counts.tolist()), sum=float(sum(values)))


def probe_of(world: World, traffic: Traffic, random: np.random.Generator) -> EndpointProbe:
    """Golden requests in the gaps, and the host with a little of everything."""
    slow = world.slow_until_s > WINDOW_S
    bias = math.exp(random.normal(0, 0.04))
    read_ms = bias * (4 + 0.5 * _GOLDEN.prompt_tokens) * (world.read_factor if slow else 1)
    write_ms = bias * 26 * (world.write_factor if slow else 1)
    read, written = _golden_counts(traffic.gaps_s, 1e-3 * read_ms, 1e-3 * write_ms)
    noise = np.exp(random.normal(0, 0.03, (2, 25)))
    seen = world.conditions
    foreign = seen.foreign_cores + random.uniform(0, 0.04)
    return EndpointProbe(
        source="probe",
        bundle_digest="0" * 12,
        golden=golden_times(
            _GOLDEN,
            [
                (
                    read_ms * float(noise[0, number]),
                    write_ms * float(noise[1, number]) if number < written else None,
                )
                for number in range(read)
            ],
            busy_share=1 - min(sum(traffic.gaps_s) / PROBE_S, 1),
        ),
        host=HostProbe(
            begin=_BEGIN + timedelta(seconds=WINDOW_S),
            seconds=PROBE_S,
            cores=4,
            own_cores=2.0,
            conditions=seen.model_copy(update={"foreign_cores": foreign}),
            clock_mhz=world.clock_mhz * math.exp(random.normal(0, 0.01)),
            throttled_share=world.throttled_share,
            memory_pressure_share=world.memory_pressure_share + random.uniform(0, 0.005),
        ),
        settings={"kernel": world.kernel},
    )


def _golden_counts(gaps_s: Sequence[float], read_s: float, write_s: float) -> tuple[int, int]:
    """How many golden requests were read, and how many wrote two tokens more, before somebody came."""
    one_s = read_s + (_GOLDEN.output_tokens - 1) * write_s
    read = written = 0
    for gap_s in gaps_s:
        rest_s = gap_s % one_s
        read += int(gap_s / one_s) + (rest_s > read_s)
        written += int(gap_s / one_s) + (rest_s > read_s + 2 * write_s)
    return min(max(read - 1, 0), 25), min(max(written - 1, 0), 25)  # the first is not counted
