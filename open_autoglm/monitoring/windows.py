"""What a served model did between two moments, from whoever counted it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import inf, isfinite
from typing import Literal, NamedTuple, Protocol

from open_autoglm.monitoring.tape import Tape, increase
from open_autoglm.schemas import Histogram, LatencyWindow, Stage

Role = Literal["champion", "challenger"]

INFO = "autoglm_model_info"
"""There as long as a bundle has its role."""
_STAGES: Mapping[Stage, str] = {
    "ttft": "vllm:time_to_first_token_seconds",
    "tpot": "vllm:request_time_per_output_token_seconds",
    "e2e": "vllm:e2e_request_latency_seconds",
    "queue": "vllm:request_queue_time_seconds",
}
_LEFT: Mapping[Stage, str] = {
    "ttft": "autoglm_left_before_first_token_seconds",
    "e2e": "autoglm_left_before_last_token_seconds",
}
_PROMPT, _OUTPUT = "vllm:request_prompt_tokens", "vllm:request_generation_tokens"
_CACHED = "vllm:prefix_cache_hits_total"
_REFUSED = "autoglm_requests_refused_total"
_FAILED = ("autoglm_requests_failed_total", "autoglm_requests_not_finite_total")
_RESTARTS, _MEMORY = "autoglm_engine_restarts", "autoglm_engine_memory_bytes"
_PACE, _LEAST_PACES = "autoglm_host_pace_seconds", 10
"""Fewer timings in a window say little of it."""

SERIES = (
    *(
        f"{name}_{part}"
        for name in (*_STAGES.values(), *_LEFT.values(), _PROMPT, _OUTPUT)
        for part in ("bucket", "sum")
    ),
    *(INFO, _CACHED, _REFUSED, *_FAILED, _RESTARTS, _MEMORY, f"{_PACE}_sum", f"{_PACE}_count"),
)
"""What a window is made of."""

_SILENT_S = 300.0
"""Older than that, Prometheus itself takes a series for gone."""


@dataclass(frozen=True)
class NoWindow:
    """Nothing is known of what happened, which is not the same as that nothing happened."""

    reason: str
    """A sentence."""


class Source(Protocol):
    """Whoever keeps the counters of endpoints."""

    @property
    def name(self) -> Literal["prometheus", "endpoint"]: ...

    def read(self, service: str, role: Role, begin: datetime, end: datetime) -> Sequence[Tape] | NoWindow:
        """What each endpoint of ``service`` has shown in the window, at least ``SERIES`` of that role."""
        ...


def window(
    source: Source, service: str, begin: datetime, end: datetime, role: Role = "champion"
) -> LatencyWindow | NoWindow:
    """What the bundle that has ``role`` at ``end`` did since ``begin``, or since it took the role.

    It is counted from the first read in the window to the last one, whose times it has. Counts of several
    endpoints are added up; if they disagree on who has the role, those of the one that most of them give it.
    """
    tapes = source.read(service, role, begin, end)
    if isinstance(tapes, NoWindow):
        return tapes
    newest_s = max((tape.times_s[-1] for tape in tapes if tape.times_s), default=None)
    if newest_s is None:
        return NoWindow(f"nothing was read of {service} between {clock(begin)} and {clock(end)}")
    silent_s = end.timestamp() - newest_s
    if silent_s > min(_SILENT_S, (end - begin).total_seconds() / 2):
        return NoWindow(
            f"the newest figures of {service} are of {clock(_moment(newest_s))}, {silent_s:.0f} s before the "
            "window's end: its endpoint is not read any more, or clocks differ"
        )
    held = _held([tape.with_birth(begin.timestamp()) for tape in tapes], service, role)
    if not held:
        return NoWindow(f"{service} has no {role}")
    bundle = max(held, key=lambda one: (len(held[one]), max(tape.times_s[0] for tape in held[one])))
    return _counted(source, service, role, bundle, held[bundle])


def clock(moment: datetime) -> str:
    """For people: the time of day, UTC."""
    return f"{moment.astimezone(UTC):%H:%M:%S} UTC"


def _moment(time_s: float) -> datetime:
    return datetime.fromtimestamp(time_s, UTC)


# ── whose window ─────────────────────────────────────────────────────────────────────────────────


class _Bundle(NamedTuple):
    version: str
    digest: str


def _held(tapes: Sequence[Tape], service: str, role: Role) -> dict[_Bundle, list[Tape]]:
    """Who has the role at the end of each tape, and the tape from the last read at which they had not."""
    held: dict[_Bundle, list[Tape]] = {}
    for tape in tapes:
        for info in tape.find(INFO, {"model_name": service, "role": role}):
            if info.values and info.values[-1] is not None:
                bundle = _Bundle(info.label("model_version"), info.label("bundle_digest"))
                absent = [read for read, value in enumerate(info.values) if value is None]
                held.setdefault(bundle, []).append(tape.since(absent[-1] if absent else 0))
    return held


def _counted(
    source: Source, service: str, role: Role, bundle: _Bundle, tapes: Sequence[Tape]
) -> LatencyWindow | NoWindow:
    if all(len(tape.times_s) < 2 for tape in tapes):
        return NoWindow(f"the {role} of {service} was read only once in the window")
    labels = {
        "model_name": service,
        "model_version": bundle.version,
        "bundle_digest": bundle.digest,
        "role": role,
    }
    try:
        return _of_counts(source, service, bundle, _Counts(tapes, labels))
    except _Unreadable as error:
        return NoWindow(str(error))


def _of_counts(source: Source, service: str, bundle: _Bundle, counts: _Counts) -> LatencyWindow | NoWindow:
    """Raises _Unreadable."""
    prompt, output = counts.histogram(_PROMPT), counts.histogram(_OUTPUT)
    if prompt is None or output is None:
        return NoWindow(f"the endpoint of {service} does not count {_PROMPT} and {_OUTPUT}")
    return LatencyWindow(
        service=service,
        version=bundle.version,
        bundle_digest=bundle.digest,
        begin=_moment(min(tape.times_s[0] for tape in counts.tapes)),
        end=_moment(max(tape.times_s[-1] for tape in counts.tapes)),
        source=source.name,
        requests=prompt.count,
        refused=counts.of(_REFUSED),
        failed=sum(counts.of(name) for name in _FAILED),
        restarts=counts.of(_RESTARTS) + counts.births,
        times_ms=counts.histograms_ms(_STAGES),
        left_ms=counts.histograms_ms(_LEFT),
        prompt_tokens=prompt,
        output_tokens=output,
        cached_tokens=counts.of(_CACHED),
        memory_bytes=round(counts.highest(_MEMORY)),
        pace_ms=counts.mean_ms(_PACE, least=_LEAST_PACES),
    )


# ── counts ───────────────────────────────────────────────────────────────────────────────────────


class _Unreadable(Exception):
    """Counters that no window can be made of; the sentence says which."""


@dataclass(frozen=True)
class _Counts:
    """Of one bundle in one role, all endpoints together. Raises _Unreadable if one is NaN or infinite."""

    tapes: Sequence[Tape]
    labels: Mapping[str, str]

    def of(self, name: str) -> int:
        return round(self._sum(name))

    @property
    def births(self) -> int:
        """How often a process, and its engine with it, was started again."""
        return sum(len(set(tape.lives)) - 1 for tape in self.tapes)

    def mean_ms(self, name: str, least: int) -> float | None:
        """Of seconds that were timed at least so often, and took any."""
        count, seconds = self.of(f"{name}_count"), self._sum(f"{name}_sum")
        return 1e3 * seconds / count if count >= least and seconds > 0 else None

    def highest(self, name: str) -> float:
        """The greatest value that any endpoint showed; 0 if none did."""
        found = [one for tape in self.tapes for one in tape.find(name, self.labels)]
        values = (value for one in found for value in one.values if value is not None)
        return max((_finite(name, value) for value in values), default=0.0)

    def histograms_ms(self, names: Mapping[Stage, str]) -> dict[Stage, Histogram]:
        """Of those that are counted. Raises _Unreadable."""
        found = {stage: self.histogram(name, unit=1e3) for stage, name in names.items()}
        return {stage: histogram for stage, histogram in found.items() if histogram is not None}

    def histogram(self, name: str, unit: float = 1.0) -> Histogram | None:
        """In ``unit``s of the series; None if it is not counted. Raises _Unreadable."""
        up_to: dict[float, float] = {}
        shapes: set[frozenset[float]] = set()
        for tape in self.tapes:
            buckets = {float(one.labels["le"]): one for one in tape.find(f"{name}_bucket", self.labels)}
            for bound, one in buckets.items():
                grown = _finite(f"{name}_bucket", increase(one.values, tape.lives))
                up_to[bound] = up_to.get(bound, 0.0) + grown
            for read in range(len(tape.times_s)):
                shapes.add(frozenset(bound for bound, one in buckets.items() if one.values[read] is not None))
        if not shapes - {frozenset()}:
            return None
        bounds = sorted(up_to)
        steps = [round(up_to[bound]) for bound in bounds]
        counts = [above - below for above, below in zip(steps, [0, *steps[:-1]], strict=True)]
        if len(shapes - {frozenset()}) > 1 or bounds[-1] != inf or min(counts) < 0:
            raise _Unreadable(f"the buckets of {name} are not the same in all of the window")
        return Histogram(
            bounds=tuple(round(unit * bound, 6) for bound in bounds[:-1]),
            counts=tuple(counts),
            sum=unit * self._sum(f"{name}_sum"),
        )

    def _sum(self, name: str) -> float:
        found = [(one.values, tape.lives) for tape in self.tapes for one in tape.find(name, self.labels)]
        return sum(_finite(name, increase(values, lives)) for values, lives in found)


def _finite(name: str, value: float) -> float:
    if not isfinite(value):
        raise _Unreadable(f"{name} is {value}, which counts nothing")
    return value
