"""What Prometheus reads. Names and labels are vLLM's where it has them, so that dashboards for it show us too
(docs.vllm.ai, "Production metrics"); what only we have is called ``autoglm_…``.

Every series says which version answered and in which role, so that a challenger can be told from the
champion; dashboards that know the model's name only add them up.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, Summary
from prometheus_client.exposition import generate_latest

from open_autoglm.hardware import read_memory
from open_autoglm.schemas import Slo
from open_autoglm.serving.messages import Token

Role = Literal["champion", "challenger"]

_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_TOKEN_SECONDS = (0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.4, 1.0, 2.5)
_PHASE_SECONDS = (
    *(0.005, 0.01, 0.02, 0.05, 0.1, 0.2),  # small models; from here on vLLM's own
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)
_LABELS = ("model_name", "model_version", "bundle_digest", "role")
_DIGEST_CHARACTERS = 12


class Figure(NamedTuple):
    """One series at one moment."""

    name: str
    labels: Mapping[str, str]
    value: float


def _with(bounds: Iterable[float], limit_ms: float | None) -> tuple[float, ...]:
    """Buckets with the limit of the SLO among their bounds: how many were slower is exact only there."""
    return tuple(sorted({*bounds, *(() if limit_ms is None else (limit_ms / 1e3,))}))


class Board:
    """All series of one endpoint."""

    def __init__(self, model_name: str, slo: Slo | None = None) -> None:
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self._make_times(slo or Slo())
        self._make_phases()
        self._make_counts()
        self._make_state()
        # When the counters were zero: without it, one that is soon as high as before a restart hides it.
        ProcessCollector(registry=self.registry)
        self._memory_limit = Gauge(
            "autoglm_memory_limit_bytes",
            "Of the host, or of the tightest cgroup",
            ("model_name",),
            registry=self.registry,
        )
        self._memory_limit.labels(model_name).set(read_memory()[0])

    def of(self, version: str, digest: str, role: Role) -> Metrics:
        """The series of one version in one role; its gauges are shown from now on."""
        return Metrics(self, self._model_name, version, digest[:_DIGEST_CHARACTERS], role)

    def exposition(self) -> bytes:
        return generate_latest(self.registry)

    def _times(self, name: str, told: str, bounds: Sequence[float]) -> Histogram:
        return Histogram(name, told, _LABELS, registry=self.registry, buckets=bounds)

    def figures(self) -> Iterator[Figure]:
        """All series of versions, as they are now."""
        for family in self.registry.collect():
            for sample in family.samples:
                if "role" in sample.labels:
                    yield Figure(sample.name, sample.labels, sample.value)

    def _make_times(self, slo: Slo) -> None:
        ttft, tpot = _with(_SECONDS, slo.ttft_p95_ms), _with(_TOKEN_SECONDS, slo.tpot_p95_ms)
        e2e = _with(_SECONDS, slo.e2e_p95_ms)
        per_token = "Mean time of an answer's tokens after the first"
        self.ttft = self._times("vllm:time_to_first_token_seconds", "From request to first token", ttft)
        self.itl = self._times("vllm:inter_token_latency_seconds", "Between two tokens", _TOKEN_SECONDS)
        self.tpot = self._times("vllm:request_time_per_output_token_seconds", per_token, tpot)
        self.e2e = self._times("vllm:e2e_request_latency_seconds", "From request to last token", e2e)
        # Times that were never: who leaves is not among the above, and the slower we are the more leave.
        left = "From request until the client left, before the {} token"
        self.left_ttft = self._times("autoglm_left_before_first_token_seconds", left.format("first"), ttft)
        self.left_e2e = self._times("autoglm_left_before_last_token_seconds", left.format("last"), e2e)

    def _make_phases(self) -> None:
        """What an answer's time was spent on, one after the other."""

        def phase(name: str, told: str) -> Histogram:
            return self._times(f"vllm:request_{name}_time_seconds", told, _PHASE_SECONDS)

        self.queue = phase("queue", "From request to its slot")
        self.prefill = phase("prefill", "From its slot to the first token")
        self.decode = phase("decode", "From the first token to the last")

    def _make_counts(self) -> None:
        def sizes(name: str, told: str) -> Histogram:
            return Histogram(name, told, _LABELS, registry=self.registry, buckets=_TOKENS)

        def counter(name: str, told: str, *more: str) -> Counter:
            return Counter(name, told, (*_LABELS, *more), registry=self.registry)

        self.prompt = sizes("vllm:request_prompt_tokens", "Tokens of a prompt")
        self.output = sizes("vllm:request_generation_tokens", "Tokens of an answer")
        self.prompts = counter("vllm:prompt_tokens", "Tokens of all prompts")
        self.generated = counter("vllm:generation_tokens", "Tokens of all answers")
        self.cached = counter("vllm:prefix_cache_hits", "Prompt tokens that were in the cache")
        self.finished = counter("vllm:request_success", "Answers by how they ended", "finished_reason")
        self.refused = counter("autoglm_requests_refused", "Requests that were not let in", "reason")
        self.failed = counter("autoglm_requests_failed", "Answers lost by a crash")
        self.not_finite = counter(
            "autoglm_requests_not_finite", "Answers given up because logits were NaN or infinite"
        )

        self.host_pace = Summary(
            "autoglm_host_pace_seconds",
            "A fixed piece of work on the host, while nobody is answered",
            _LABELS,
            registry=self.registry,
        )

    def _make_state(self) -> None:
        def gauge(name: str, told: str) -> Gauge:
            return Gauge(name, told, _LABELS, registry=self.registry)

        self.gauges = (
            gauge("vllm:num_requests_running", "Requests in a slot"),
            gauge("vllm:num_requests_waiting", "Requests that wait for a slot"),
            gauge("vllm:kv_cache_usage_perc", "Share of the cache that holds tokens, 0 to 1"),
            gauge("autoglm_engine_memory_bytes", "Resident memory of the engine's process"),
            gauge("autoglm_engine_restarts", "Times the engine was started again"),
            gauge("autoglm_engine_slowed_share", "By what share it was made slower, to rehearse"),
            gauge("autoglm_model_info", "A bundle that answers"),
        )
        """In the order of `State`."""


class State(NamedTuple):
    """One version as it is now."""

    running: int
    waiting: int
    cache_use: float
    engine_bytes: int
    restarts: int
    slower: float
    info: int = 1


class Metrics:
    """The series of one version in one role."""

    def __init__(self, board: Board, model_name: str, version: str, digest: str, role: Role) -> None:
        self.role = role
        self._board = board
        self._values = values = (model_name, version, digest, role)
        self._clock: Callable[[], float] = time.monotonic
        self.ttft = board.ttft.labels(*values)
        self.itl = board.itl.labels(*values)
        self.tpot = board.tpot.labels(*values)
        self.e2e = board.e2e.labels(*values)
        self.left_ttft = board.left_ttft.labels(*values)
        self.left_e2e = board.left_e2e.labels(*values)
        self.queue = board.queue.labels(*values)
        self.prefill = board.prefill.labels(*values)
        self.decode = board.decode.labels(*values)
        self.output = board.output.labels(*values)
        self.generated = board.generated.labels(*values)
        self.cached = board.cached.labels(*values)
        self._prompt = board.prompt.labels(*values)
        self._prompts = board.prompts.labels(*values)
        self._failed = board.failed.labels(*values)
        self._not_finite = board.not_finite.labels(*values)

    def show(self, state: State) -> None:
        """How it is now, until `hide`."""
        for gauge, value in zip(self._board.gauges, state, strict=True):
            gauge.labels(*self._values).set(value)

    def hide(self) -> None:
        """It answers no more in this role: its state is not shown, what it has counted still is."""
        for gauge in self._board.gauges:
            gauge.remove(*self._values)

    def refused(self, reason: str) -> None:
        self._board.refused.labels(*self._values, reason).inc()

    def request(self, prompt_tokens: int) -> RequestTimes:
        self._prompts.inc(prompt_tokens)
        self._prompt.observe(prompt_tokens)
        return RequestTimes(self, self._clock)

    def finished(self, reason: str) -> None:
        self._board.finished.labels(*self._values, reason).inc()

    def failed(self) -> None:
        """An answer was lost with the engine."""
        self._failed.inc()

    def host_pace(self, seconds: float) -> None:
        """The fixed piece of work took so long while this version had nothing to do."""
        self._board.host_pace.labels(*self._values).observe(seconds)

    def not_finite(self) -> None:
        """The model had no answer."""
        self._not_finite.inc()


class RequestTimes:
    """The times of one request, from now on."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._clock = clock
        self._begin = self._slot = self._last = clock()
        self._tokens = 0
        self.ttft_s: float | None = None

    def slot(self, slot_s: float) -> None:
        """It got its slot then, by the clock of this host's processes."""
        self._slot = slot_s
        self._metrics.queue.observe(slot_s - self._begin)

    @property
    def queue_s(self) -> float:
        """From request to its slot; 0 before it has one."""
        return self._slot - self._begin

    @contextlib.contextmanager
    def counted(self, token: Token) -> Iterator[None]:
        """Count it after the block, as of before: a client need not wait for that."""
        now = self._clock()
        try:
            yield
        finally:
            if token.slot_s is not None:
                self.slot(token.slot_s)
            if token.token is not None:
                self.token(token.cached_tokens, now)

    def token(self, cached_tokens: int, now: float) -> None:
        """It came at ``now``."""
        if self.ttft_s is None:
            self.ttft_s = now - self._begin
            self._metrics.ttft.observe(self.ttft_s)
            self._metrics.prefill.observe(now - self._slot)
            self._metrics.cached.inc(cached_tokens)
        else:
            self._metrics.itl.observe(now - self._last)
        self._last = now
        self._tokens += 1
        self._metrics.generated.inc()

    def finished(self, reason: str) -> float:
        """The answer is whole, or nobody wants it any more (``abort``); its seconds."""
        metrics, seconds = self._metrics, self._clock() - self._begin
        metrics.finished(reason)
        metrics.output.observe(self._tokens)
        if reason == "abort":
            metrics.left_e2e.observe(seconds)
            if self.ttft_s is None:
                metrics.left_ttft.observe(seconds)
        else:
            metrics.e2e.observe(seconds)
            if self.ttft_s is not None:
                decode_s = self._last - self._begin - self.ttft_s
                metrics.decode.observe(decode_s)
                if self._tokens > 1:
                    metrics.tpot.observe(decode_s / (self._tokens - 1))
        return seconds

    def failed(self) -> None:
        """The answer was lost with the engine."""
        self._metrics.failed()

    def not_finite(self) -> None:
        """The model had no answer."""
        self._metrics.not_finite()
