"""Does the endpoint stand more than it can answer? ``python -m benchmarks.soak BUNDLE``.

Its capacity is measured by a closed loop that keeps the slots full and as many requests waiting. Then
requests arrive at a multiple of it, at random (Poisson), whatever became of those before. Wanted: an answer,
a 429 or a 503 to each, some of them refused, no restart of the engine, and memory at the end as after the
warm-up, within 1 %. Memory is read between parts of the load, with nothing under way: what both processes
allocated (RssAnon), since pages of libraries come and go with what else runs.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from pydantic import Field

from benchmarks import serve_load
from benchmarks.laboratory import save
from benchmarks.serve_load import Answer, Load, LoadJob
from benchmarks.serve_servers import Server, openai_body, ours, own_bytes
from open_autoglm.measure.isolation import Child, Failure
from open_autoglm.schemas import Model

RESULT = Path(__file__).parent / "results" / "soak.json"
ALLOWED = frozenset({200, 429, 503})
MOST_GROWTH = 0.01
_PARTS = 10
_TIMEOUT_S = 3600.0


class Soak(Model):
    """What became of everybody."""

    requests: int
    capacity_per_s: float
    offered_per_s: float
    statuses: dict[int, int]
    restarts: int
    memory_bytes: tuple[tuple[int, ...], ...] = Field(
        description="of the HTTP process and the engine's, after the warm-up and then after each part"
    )
    errors: tuple[str, ...] = Field(description="what answers said that should not have been given")

    @property
    def growth(self) -> float:
        """Of the memory, as a share: the mean of the last two readings over that of the first two."""
        whole = [sum(reading) for reading in self.memory_bytes]
        return float(np.mean(whole[-2:]) / np.mean(whole[:2]) - 1)

    @property
    def passed(self) -> bool:
        shed = self.statuses.keys() <= ALLOWED and self.statuses.keys() > {200}
        return shed and not self.restarts and self.growth <= MOST_GROWTH


class Broken(Exception):
    """The measurement itself failed."""


class Generator:
    """The load generator's process, and requests that differ. Raises Broken if it fails."""

    def __init__(
        self, server: Server, child: Child, seed: int, prompt_tokens: int, output_tokens: int
    ) -> None:
        self._server, self._child = server, child
        self._random = np.random.default_rng(seed)
        self._sizes = prompt_tokens, output_tokens

    def closed(self, requests: int, streams: int) -> Load:
        return self._run(LoadJob(port=self._server.port, bodies=self._bodies(requests), streams=streams))

    def open(self, requests: int, rate_per_s: float) -> Load:
        arrivals = np.cumsum(self._random.exponential(1 / rate_per_s, requests))
        job = LoadJob(
            port=self._server.port, bodies=self._bodies(requests), arrivals_s=tuple(arrivals.tolist())
        )
        return self._run(job)

    def _bodies(self, requests: int) -> tuple[str, ...]:
        """Low token ids, which every vocabulary has; lengths vary around the one asked for."""
        prompt_tokens, output_tokens = self._sizes
        lengths = self._random.integers(1, 2 * prompt_tokens, requests)
        prompts = [self._random.integers(10, 200, length).tolist() for length in lengths]
        return tuple(json.dumps(openai_body(prompt, output_tokens)) for prompt in prompts)

    def _run(self, job: LoadJob) -> Load:
        found = self._child.ask(f"{serve_load.PREFIX}:run", job, Load, _TIMEOUT_S)
        if isinstance(found, Failure):
            raise Broken(f"the load generator failed: {found.reason}")
        return found


def soak(
    bundle: Path,
    work: Path,
    *,
    requests: int,
    times_capacity: float = 2.0,
    slots: int = 4,
    queue: int = 16,
    prompt_tokens: int = 32,
    output_tokens: int = 16,
    seed: int = 0,
) -> Soak:
    """Serve ``bundle`` and ask ``requests`` of it. Raises NotStarted, Broken."""
    room = 2 * prompt_tokens + output_tokens
    limits = ("--queue", str(queue), "--deadline-s", "2")
    with Child(work / "load.log") as child:
        server = Server(ours(bundle, slots, room, *limits), work / "server.log")
        try:
            generator = Generator(server, child, seed, prompt_tokens, output_tokens)
            generator.closed(requests // _PARTS // 4, slots)
            capacity = _rate(generator.closed(requests // _PARTS // 4, 2 * slots))
            return _overload(server, generator, requests, capacity, times_capacity)
        finally:
            server.close()


def _overload(
    server: Server, generator: Generator, requests: int, capacity: float, times_capacity: float
) -> Soak:
    answers: list[Answer] = []
    rate = times_capacity * capacity
    generator.open(requests // _PARTS, rate)  # the queue's and the connections' own memory
    readings = [own_bytes(server.pid)]
    for part in range(_PARTS):
        answers += generator.open(requests // _PARTS, rate).answers
        readings.append(own_bytes(server.pid))
        sys.stderr.write(f"part {part + 1}: {' + '.join(f'{b / 1e6:.1f}' for b in readings[-1])} MB\n")
    statuses = Counter(answer.status for answer in answers)
    return Soak(
        requests=len(answers),
        capacity_per_s=capacity,
        offered_per_s=rate,
        statuses=dict(sorted(statuses.items())),
        restarts=_restarts(server),
        memory_bytes=tuple(readings),
        errors=tuple(sorted({a.error for a in answers if a.status not in ALLOWED}))[:10],
    )


def _rate(load: Load) -> float:
    """Of what was answered: refusals are quicker than any engine."""
    return sum(answer.status == 200 for answer in load.answers) / load.wall_ms * 1e3


def _restarts(server: Server) -> int:
    """Times the engine was started again, by the endpoint's own metric."""
    status, text = server.get("/metrics")
    match = re.search(rb"^autoglm_engine_restarts\{.*\} ([\d.]+)$", text, re.MULTILINE)
    if status != 200 or match is None:
        raise Broken(f"/metrics answers {status} and says nothing of restarts")
    return int(float(match[1]))


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.soak", description=__doc__.split("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--times-capacity", type=float, default=2.0)
    parser.add_argument("--json", type=Path, default=RESULT)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="autoglm-soak-") as folder:
        found = soak(asked.bundle, Path(folder), requests=asked.requests, times_capacity=asked.times_capacity)
    save(asked.json, {**found.model_dump(mode="json"), "growth": found.growth, "passed": found.passed})
    sys.stdout.write(
        f"{found.requests} requests at {found.offered_per_s:.0f}/s, capacity {found.capacity_per_s:.0f}/s: "
        f"{found.statuses}, {found.restarts} restarts, memory {found.growth:+.2%}\n"
    )
    sys.exit(0 if found.passed else 1)


if __name__ == "__main__":
    main()
