"""What Prometheus reads. Names and labels are vLLM's where it has them, so that dashboards for it show us too
(docs.vllm.ai, "Production metrics"); what only we have is called ``autoglm_…``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest

_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_TOKEN_SECONDS = (0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.4, 1.0, 2.5)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)


def _with(bounds: Iterable[float], limits: Iterable[float]) -> tuple[float, ...]:
    """Buckets with the limits of the SLO among their bounds: a quantile is exact only there."""
    return tuple(sorted({*bounds, *limits}))


class Metrics:
    """The series of one served model."""

    def __init__(
        self,
        model_name: str,
        digest: str,
        *,
        version: str = "",
        role: str = "champion",
        slo_s: Iterable[float] = (),
    ) -> None:
        self.registry = CollectorRegistry()
        self._clock: Callable[[], float] = time.monotonic
        self._labels = {"model_name": model_name}
        self._slo_s = tuple(slo_s)
        self._make_times()
        self._make_counts()
        self._make_state()
        info = ("model_version", "bundle_digest", "role")
        Gauge(
            "autoglm_model_info", "The bundle that answers", (*self._labels, *info), registry=self.registry
        ).labels(**self._labels, model_version=version, bundle_digest=digest, role=role).set(1)

    def _make_times(self) -> None:
        def histogram(name: str, told: str, bounds: Iterable[float]) -> Histogram:
            buckets = _with(bounds, self._slo_s)
            made = Histogram(name, told, tuple(self._labels), registry=self.registry, buckets=buckets)
            return made.labels(**self._labels)

        per_token = "Mean time of an answer's tokens after the first"
        self._ttft = histogram("vllm:time_to_first_token_seconds", "From request to first token", _SECONDS)
        self._itl = histogram("vllm:inter_token_latency_seconds", "Between two tokens", _TOKEN_SECONDS)
        self._tpot = histogram("vllm:request_time_per_output_token_seconds", per_token, _TOKEN_SECONDS)
        self._e2e = histogram("vllm:e2e_request_latency_seconds", "From request to last token", _SECONDS)

    def _make_counts(self) -> None:
        names, registry = tuple(self._labels), self.registry

        def sizes(name: str, told: str) -> Histogram:
            return Histogram(name, told, names, registry=registry, buckets=_TOKENS).labels(**self._labels)

        def counter(name: str, told: str, *more: str) -> Counter:
            return Counter(name, told, (*names, *more), registry=registry)

        self._prompt = sizes("vllm:request_prompt_tokens", "Tokens of a prompt")
        self._output = sizes("vllm:request_generation_tokens", "Tokens of an answer")
        self._prompts = counter("vllm:prompt_tokens", "Tokens of all prompts").labels(**self._labels)
        self._generated = counter("vllm:generation_tokens", "Tokens of all answers").labels(**self._labels)
        cached = counter("vllm:prefix_cache_hits", "Prompt tokens that were in the cache")
        self._cached = cached.labels(**self._labels)
        self._finished = counter("vllm:request_success", "Answers by how they ended", "finished_reason")
        self._refused = counter("autoglm_requests_refused", "Requests that were not let in", "reason")
        self._failed = counter("autoglm_requests_failed", "Answers lost by a crash").labels(**self._labels)
        nan = counter("autoglm_requests_not_finite", "Answers given up because logits were NaN or infinite")
        self._not_finite = nan.labels(**self._labels)

    def _make_state(self) -> None:
        def gauge(name: str, told: str) -> Gauge:
            return Gauge(name, told, tuple(self._labels), registry=self.registry).labels(**self._labels)

        self.running = gauge("vllm:num_requests_running", "Requests in a slot")
        self.waiting = gauge("vllm:num_requests_waiting", "Requests that wait for a slot")
        self.cache_use = gauge("vllm:kv_cache_usage_perc", "Share of the cache that holds tokens, 0 to 1")
        self.engine_bytes = gauge("autoglm_engine_memory_bytes", "Resident memory of the engine's process")
        self.restarts = gauge("autoglm_engine_restarts", "Times the engine was started again")

    def refused(self, reason: str) -> None:
        self._refused.labels(**self._labels, reason=reason).inc()

    def request(self, prompt_tokens: int) -> RequestTimes:
        self._prompts.inc(prompt_tokens)
        self._prompt.observe(prompt_tokens)
        return RequestTimes(self, self._clock)

    def exposition(self) -> bytes:
        return generate_latest(self.registry)


class RequestTimes:
    """The times of one request, from now on."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._clock = clock
        self._begin = self._last = clock()
        self._first: float | None = None
        self._tokens = 0

    def token(self, cached_tokens: int) -> None:
        now = self._clock()
        if self._first is None:
            self._first = now
            self._metrics._ttft.observe(now - self._begin)
            self._metrics._cached.inc(cached_tokens)
        else:
            self._metrics._itl.observe(now - self._last)
        self._last = now
        self._tokens += 1
        self._metrics._generated.inc()

    def finished(self, reason: str) -> None:
        """The answer is whole, or nobody wants it any more (``abort``)."""
        metrics, now = self._metrics, self._clock()
        metrics._finished.labels(**metrics._labels, finished_reason=reason).inc()
        metrics._output.observe(self._tokens)
        if reason != "abort":
            metrics._e2e.observe(now - self._begin)
            if self._first is not None and self._tokens > 1:
                metrics._tpot.observe((self._last - self._first) / (self._tokens - 1))

    def failed(self) -> None:
        """The answer was lost with the engine."""
        self._metrics._failed.inc()

    def not_finite(self) -> None:
        """The model had no answer."""
        self._metrics._not_finite.inc()
