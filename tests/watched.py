"""Windows of a service whose figures are known, with the noise of a steady host."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

from open_autoglm.monitoring.baseline import Baseline, learn, observe
from open_autoglm.monitoring.judge import JudgeState, Policy, judge
from open_autoglm.schemas.watch import Histogram, Judgement, LatencyWindow, Slo

BEGIN = datetime(2026, 1, 5, tzinfo=UTC)
WINDOW = timedelta(minutes=15)
POLICY = Policy(slo=Slo(ttft_p95_ms=500, e2e_p95_ms=5000))
BOUNDS_MS = (10.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 5000.0, 20000.0)
TOKENS = (10.0, 50.0, 100.0, 200.0, 500.0, 1000.0)


def histogram(mean: float, count: int, bounds: tuple[float, ...] = BOUNDS_MS, bad: int = 0) -> Histogram:
    """``count`` equal values, of which ``bad`` are ten times as much."""
    low, high = (int(np.searchsorted(bounds, value)) for value in (mean, 10 * mean))
    counts = [0] * (len(bounds) + 1)
    counts[low] += count - bad
    counts[high] += bad
    return Histogram(bounds=bounds, counts=tuple(counts), sum=mean * (count - bad) + 10 * mean * bad)


def window(
    number: int = 0,
    *,
    slower: float = 1.0,
    noise: float = 0.01,
    requests: int = 400,
    prompt_tokens: float = 120.0,
    output_tokens: float = 48.0,
    queue_ms: float = 5.0,
    bad: int = 0,
    **changes: Any,
) -> LatencyWindow:
    """The ``number``-th: 20 ms and 0.9 ms per prompt token, then 9 ms per token, more by 10 % at 1 request/s.
    ``bad`` answers are over every promise."""
    random = np.random.default_rng(number)
    pace = slower * float(np.exp(random.normal(0, noise))) * (1 + 0.1 * requests / 900)
    first, token = (20 + 0.9 * prompt_tokens) * pace, 9 * pace
    content: dict[str, Any] = {
        "service": "demo",
        "version": "1",
        "bundle_digest": "0123456789ab",
        "begin": BEGIN + number * WINDOW,
        "end": BEGIN + (number + 1) * WINDOW,
        "source": "endpoint",
        "requests": requests,
        "refused": 0,
        "failed": 0,
        "restarts": 0,
        "times_ms": {
            "queue": histogram(queue_ms, requests),
            "ttft": histogram(first + queue_ms, requests, bad=bad),
            "tpot": histogram(token, requests),
            "e2e": histogram(first + queue_ms + token * output_tokens, requests),
        },
        "prompt_tokens": histogram(prompt_tokens, requests, TOKENS),
        "output_tokens": histogram(output_tokens, requests, TOKENS),
        "cached_tokens": 0,
        "memory_bytes": 0,
    }
    return LatencyWindow(**{**content, **changes})


def traffic(number: int, **changes: Any) -> LatencyWindow:
    """With the load of its hour, and lengths that vary."""
    random = np.random.default_rng((1, number))
    usual = {
        "requests": int(400 - 250 * np.cos(2 * np.pi * number / 96)),
        "prompt_tokens": float(random.uniform(100, 140)),
        "output_tokens": float(random.uniform(40, 56)),
    }
    return window(number, **{**usual, **changes})


def baseline(count: int = 384, *, first: int = 0, noise: float = 0.01) -> Baseline:
    seen = [observe(traffic(number, noise=noise)) for number in range(first, first + count)]
    learned = learn("demo", "1", "0123456789ab", [one for one in seen if one is not None])
    assert learned is not None
    return learned


def judged(
    windows: Iterable[LatencyWindow],
    known: Baseline | None = None,
    state: JudgeState | None = None,
    policy: Policy = POLICY,
) -> tuple[list[Judgement], JudgeState]:
    """One after the other, each a second after its end."""
    state, found = state or JudgeState(), []
    for one in windows:
        judgement, state = judge(one, state, known, policy, one.end + timedelta(seconds=1))
        found.append(judgement)
    return found, state
