"""What Prometheus reads: where the time of an answer went, and how many answers kept the promise."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from endpoints import Endpoint, endpoint, metric

from open_autoglm.schemas import Slo
from open_autoglm.serving.metrics import Board, Metrics, RequestTimes

NAME = "tiny"
PROMPT = "The capital of France is"


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def board() -> Board:
    return Board(NAME, Slo(ttft_p95_ms=123, tpot_p95_ms=12.5, e2e_p95_ms=0.7))


@pytest.fixture
def metrics(board: Board, clock: Clock) -> Metrics:
    found = board.of("7", "d" * 64, "challenger")
    found._clock = clock
    return found


def answered(metrics: Metrics, clock: Clock, *steps_s: float, slot_s: float = 0.0) -> RequestTimes:
    """An answer whose tokens came after so many seconds each."""
    times = metrics.request(5)
    times.slot(clock.now + slot_s)
    for step_s in steps_s:
        clock.now += step_s
        times.token(0, clock.now)
    times.finished("length")
    return times


# ── where the time went ──────────────────────────────────────────────────────────────────────────


def test_the_phases_of_an_answer_are_its_whole_time(board: Board, metrics: Metrics, clock: Clock) -> None:
    """It waited 2 s, was read for 0.5 s, and wrote two more tokens in 1 s each."""
    answered(metrics, clock, 2.5, 1, 1, slot_s=2)
    text = board.exposition().decode()
    phases = {name: metric(text, f"vllm:request_{name}_time_seconds_sum") for name in PHASES}
    assert phases == {"queue": 2, "prefill": 0.5, "decode": 2}
    assert metric(text, "vllm:time_to_first_token_seconds_sum") == 2.5
    assert metric(text, "vllm:e2e_request_latency_seconds_sum") == 4.5
    assert metric(text, "vllm:request_time_per_output_token_seconds_sum") == 1


PHASES = ("queue", "prefill", "decode")


def test_an_answer_that_was_given_up_has_no_decode_time(board: Board, metrics: Metrics, clock: Clock) -> None:
    """But it has waited and was read, as everybody else."""
    times = metrics.request(5)
    times.slot(clock.now)
    clock.now += 1
    times.token(0, clock.now)
    times.finished("abort")
    text = board.exposition().decode()
    counts = [metric(text, f"vllm:request_{name}_time_seconds_count") for name in PHASES]
    assert counts == [1, 1, 0]


def test_the_phases_have_vllms_bounds(board: Board) -> None:
    """So that its dashboards' quantiles are read from the same buckets."""
    bounds = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
    for histogram in (board.queue, board.prefill, board.decode):
        assert set(bounds) <= set(histogram._kwargs["buckets"])


@pytest.fixture(scope="module")
def served(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """One answer at a time, and a promise."""
    home = tmp_path_factory.mktemp("metrics")
    options = ("--name", NAME, "--slots", "1", "--max-tokens", "500")
    with endpoint(tiny_bundle, home, *options, "--slo-ttft", "17ms", "--slo-e2e", "1us") as server:
        yield server


def test_who_waits_for_the_only_slot_is_seen_to_wait(served: Endpoint) -> None:
    """Of sixteen answers at once each waits for all before it: 0 + 1 + … + 15 times as long as one takes, if
    all take as long. They do not on a busy host, but nobody waits for longer than the whole takes."""
    body = {"model": NAME, "prompt": [PROMPT] * 16, "ignore_eos": True, "temperature": 0, "max_tokens": 480}
    with httpx.Client(base_url=served.url, timeout=60) as http:
        http.get("/healthz")
        begin = time.monotonic()
        assert http.post("/v1/completions", json=body).status_code == 200
        whole_s = time.monotonic() - begin
        text = http.get("/metrics").text
    queue_s, prefill_s, decode_s = (metric(text, f"vllm:request_{name}_time_seconds_sum") for name in PHASES)
    assert metric(text, "vllm:request_queue_time_seconds_count") == 16
    waited_s = sum(range(16)) * whole_s / 16
    assert 0.2 * waited_s < queue_s < 15 * whole_s
    assert queue_s + prefill_s == pytest.approx(metric(text, "vllm:time_to_first_token_seconds_sum"))
    e2e_s = metric(text, "vllm:e2e_request_latency_seconds_sum")
    assert queue_s + prefill_s + decode_s == pytest.approx(e2e_s, rel=0.01)


# ── the promise ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("series", "limit", "left"),
    [
        ("vllm:time_to_first_token_seconds", "0.123", {"autoglm_left_before_first_token_seconds"}),
        ("vllm:request_time_per_output_token_seconds", "0.0125", set()),
        ("vllm:e2e_request_latency_seconds", "0.0007", {"autoglm_left_before_last_token_seconds"}),
    ],
)
def test_how_many_kept_a_promise_is_counted_exactly(
    board: Board, metrics: Metrics, clock: Clock, series: str, limit: str, left: set[str]
) -> None:
    """Its limit is a bound of what it is about, also for those who left, and of nothing else."""
    answered(metrics, clock, 0.0006)
    answered(metrics, clock, 0.2, 0.02)
    text = board.exposition().decode()
    within = metric(text, f"{series}_bucket", le=limit)
    assert (within, metric(text, f"{series}_count")) == ((0, 1) if "per_output" in series else (1, 2))
    bounded = {line.partition("_bucket{")[0] for line in text.splitlines() if f'le="{limit}"' in line}
    assert bounded - {series} == left


def test_the_promise_is_an_option_of_the_server(served: Endpoint) -> None:
    text = httpx.get(f"{served.url}/metrics").text
    assert metric(text, "vllm:time_to_first_token_seconds_bucket", le="0.017") >= 0
    assert metric(text, "vllm:e2e_request_latency_seconds_bucket", le="1e-06") == 0


@pytest.mark.parametrize(("text", "said"), [("300", "'300' has no unit"), ("0ms", "greater than zero")])
def test_a_promise_without_its_unit_is_refused(tmp_path: Path, text: str, said: str) -> None:
    """With the option it was given to, before anything is loaded."""
    with pytest.raises(AssertionError, match=f"--slo-tpot: .*{said}"):
        Endpoint(tmp_path, tmp_path, "--slo-tpot", text)
