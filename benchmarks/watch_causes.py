"""How often the right cause is named, where it is known: ``python -m benchmarks.watch_causes``.

An endpoint is simulated call by call: requests arrive at random, wait for a slot, are read in pieces and
written in batches whose calls take longer the more rows and the longer texts they have. Nothing of it knows
how the cause is found. Each repeat is a window in good times with its probe, then one in which something has
changed; only breaches count (a p95 over 1.3 times the healthy one), since nobody asks about others. From
window to window everything differs by several percent besides, and so do two probes.
"""

from __future__ import annotations

import json
import math
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np

from open_autoglm.monitoring.cause import name_cause
from open_autoglm.monitoring.golden import golden_times
from open_autoglm.schemas import (
    Cause,
    CauseKind,
    Conditions,
    EndpointProbe,
    Histogram,
    HostProbe,
    LatencyWindow,
    RequestShape,
)

RESULT = Path(__file__).parent / "results" / "watch_causes.json"
WINDOW_S, PROBE_S = 600.0, 30.0
BREACH = 1.3
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


# ── what may happen ──────────────────────────────────────────────────────────────────────────────

Change = Callable[[World, float], World]
"""From good times, and how bad it gets (0 to 1), to what came after them."""


def _between(low: float, high: float, severity: float) -> float:
    return low + (high - low) * severity


def _more(world: World, severity: float, *, low: float, high: float, what: str) -> World:
    return replace(world, **{what: getattr(world, what) * _between(low, high, severity)})


def _foreign(world: World, severity: float) -> World:
    """A process that is always ready to run: the engine's slowest thread shares its core with it."""
    cores = _between(0.6, 1.5, severity)
    return replace(world.slower(_between(1.5, 2.0, severity)), conditions=Conditions(foreign_cores=cores))


def _steal(world: World, severity: float) -> World:
    cores = _between(0.35, 1.2, severity)
    conditions = Conditions(foreign_cores=cores, steal_cores=cores)
    return replace(world.slower(_between(1.45, 2.2, severity)), conditions=conditions)


def _clock(world: World, severity: float) -> World:
    share = _between(0.7, 0.5, severity)
    return replace(world.slower(0.95 / share), clock_mhz=world.clock_mhz * share)


def _quota(world: World, severity: float) -> World:
    share = _between(0.4, 0.8, severity)
    return replace(world.slower(_between(1.4, 2.5, severity)), throttled_share=share)


def _swapping(world: World, severity: float) -> World:
    share = _between(0.35, 0.7, severity)
    conditions = Conditions(foreign_cores=0.05, swapped_pages=50_000)
    return replace(
        world.slower(_between(1.4, 2.5, severity)),
        memory_pressure_share=share,
        conditions=conditions,
    )


def _kernel(world: World, severity: float) -> World:
    return replace(world.slower(_between(1.4, 2.2, severity)), kernel="6.2")


def _engine(world: World, severity: float) -> World:
    return world.slower(_between(1.4, 2.2, severity))


def _writing(world: World, severity: float) -> World:
    return replace(world, write_factor=_between(1.45, 2.2, severity))


def _reading(world: World, severity: float) -> World:
    return replace(world, read_factor=_between(4, 6, severity))


def _no_peace(world: World, severity: float) -> World:
    """So slow that it is never alone."""
    return world.slower(_between(2.6, 3.2, severity))


def _engine_and_crowd(world: World, severity: float) -> World:
    return _more(_engine(world, severity), severity, low=1.1, high=1.2, what="arrivals_per_s")


def _prompts_and_crowd(world: World, severity: float) -> World:
    longer = _more(world, severity, low=5, high=8, what="prompt_tokens")
    return _more(longer, severity, low=1.1, high=1.2, what="arrivals_per_s")


def _crowd_and_foreign(world: World, severity: float) -> World:
    """A neighbour that takes a little, while twice as many requests come."""
    crowded = _more(world, severity, low=1.9, high=2.2, what="arrivals_per_s")
    return replace(crowded.slower(1.05), conditions=Conditions(foreign_cores=0.2))


def _gone(world: World, severity: float) -> World:
    return replace(_engine(world, severity), slow_until_s=WINDOW_S - 5)


class Scenario(NamedTuple):
    cause: CauseKind
    change: Change


SCENARIOS: Mapping[str, Scenario] = {
    "more requests": Scenario("load", partial(_more, low=1.7, high=2.1, what="arrivals_per_s")),
    "more than it can do": Scenario("load", partial(_more, low=2.6, high=4, what="arrivals_per_s")),
    "requests in bursts": Scenario("load", lambda world, severity: replace(world, burst=8)),
    "foreign process": Scenario("environment", _foreign),
    "steal": Scenario("environment", _steal),
    "slow clock": Scenario("environment", _clock),
    "CPU quota": Scenario("environment", _quota),
    "swapping": Scenario("environment", _swapping),
    "another kernel": Scenario("environment", _kernel),
    "longer prompts": Scenario("mix", partial(_more, low=5, high=8, what="prompt_tokens")),
    "longer answers": Scenario("mix", partial(_more, low=1.7, high=2.4, what="output_tokens")),
    "slower engine": Scenario("engine", _engine),
    "slower writing": Scenario("engine", _writing),
    "slower reading": Scenario("engine", _reading),
    "slower, never alone": Scenario("engine", _no_peace),
    "slower engine, some more requests": Scenario("engine", _engine_and_crowd),
    "longer prompts, some more requests": Scenario("mix", _prompts_and_crowd),
    "more requests, some foreign work": Scenario("load", _crowd_and_foreign),
    "slow, and over before the probe": Scenario("unknown", _gone),
}


def disturbed(world: World, random: np.random.Generator, noise: float) -> World:
    """The same, as another window finds it."""
    engine = math.exp(random.normal(0, 0.05 * noise))
    return replace(
        world,
        arrivals_per_s=world.arrivals_per_s * math.exp(random.normal(0, 0.07 * noise)),
        prompt_tokens=world.prompt_tokens * math.exp(random.normal(0, 0.05 * noise)),
        output_tokens=world.output_tokens * math.exp(random.normal(0, 0.05 * noise)),
        read_factor=world.read_factor * engine,
        write_factor=world.write_factor * engine,
    )


def run_once(scenario: Scenario, seed: int, noise: float = 1.0) -> Cause | None:
    """What is named; None if the change broke no promise, so that nobody asked."""
    random = np.random.default_rng(seed)
    world = World(arrivals_per_s=float(random.uniform(0.4, 1.0)))
    healthy = disturbed(world, random, noise)
    calm = simulate(healthy, random)
    before, baseline = window_of(calm), probe_of(world, calm, random)
    changed = scenario.change(world, float(random.uniform()))
    busy = simulate(disturbed(changed, random, noise), random)
    now = window_of(busy)
    limit_ms, found_ms = before.times_ms["e2e"].quantile(0.95), now.times_ms["e2e"].quantile(0.95)
    if limit_ms is None or found_ms is None or (found_ms <= BREACH * limit_ms and not now.refused):
        return None
    return name_cause(before, now, probe_of(changed, busy, random), baseline)


@dataclass(frozen=True)
class Row:
    """All repeats of one scenario."""

    scenario: str
    cause: CauseKind
    named: Mapping[str, int]

    @property
    def breaches(self) -> int:
        return sum(self.named.values())

    @property
    def right(self) -> int:
        return self.named.get(self.cause, 0)


def run_row(name: str, repeats: int, seed: int, noise: float = 1.0) -> Row:
    scenario = SCENARIOS[name]
    first = (seed * len(SCENARIOS) + list(SCENARIOS).index(name)) * 1_000_003
    found = (run_once(scenario, first + repeat, noise) for repeat in range(repeats))
    return Row(name, scenario.cause, Counter(cause.kind for cause in found if cause is not None))


def table(rows: Sequence[Row]) -> str:
    lines = ["| what happened | its cause | breaches | named right | named else |", "|---|---|---|---|---|"]
    for row in rows:
        wrong = ", ".join(f"{kind} {count}" for kind, count in row.named.items() if kind != row.cause)
        share = row.right / row.breaches if row.breaches else 0.0
        lines.append(f"| {row.scenario} | {row.cause} | {row.breaches} | {share:.0%} | {wrong or '–'} |")
    right, breaches = sum(row.right for row in rows), sum(row.breaches for row in rows)
    return "\n".join([*lines, f"| all | | {breaches} | {right / breaches:.1%} | |"])


@click.command(help=__doc__)
@click.option("--repeats", default=50, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--noise", default=1.0, show_default=True, help="times 5 to 7 %, from window to window")
@click.option("--workers", default=1, show_default=True)
def main(repeats: int, seed: int, noise: float, workers: int) -> None:
    with ProcessPoolExecutor(workers) as pool:
        rows = list(pool.map(partial(run_row, repeats=repeats, seed=seed, noise=noise), SCENARIOS))
    click.echo(table(rows))
    content = [{"scenario": row.scenario, "cause": row.cause, "named": dict(row.named)} for row in rows]
    about = {"repeats": repeats, "seed": seed, "noise": noise}
    RESULT.write_text(json.dumps({**about, "rows": content}, indent=1) + "\n")


if __name__ == "__main__":
    main()
