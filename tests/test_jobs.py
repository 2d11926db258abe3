"""What a child does before a round counts: nothing it times, and nothing its cache has no room for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from benches import tiny_bench
from demo_trials import demo_trials

from open_autoglm.engines.contract import Logits, SessionOptions, Tokens
from open_autoglm.measure import jobs
from open_autoglm.measure.scenarios import LEAD_IN_TOKENS
from open_autoglm.settings import Settings
from open_autoglm.trials import Bench

PROMPT, OUTPUT = 32, 8


class CountingSession:
    """Counts what its cache holds, and refuses more than it has room for."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._held = 0
        self.calls: list[str] = []

    def prefill(self, tokens: Tokens) -> Logits:
        self._held = tokens.shape[1]
        self.calls.append("prefill")
        return np.zeros((1, 4), dtype=np.float32)

    def decode(self, tokens: Tokens) -> Logits:
        assert tokens.shape == (1,)
        self._held += 1
        if self._held > self._max_tokens:
            raise ValueError("the cache is full")
        self.calls.append("decode")
        return np.zeros((1, 4), dtype=np.float32)

    def full_logits(self, tokens: Tokens) -> Logits:
        raise NotImplementedError

    def facts(self) -> dict[str, str]:
        return {}

    def close(self) -> None: ...


class CountingEngine:
    """Keeps the session it opened."""

    def open(self, candidate: object, exported: object, options: SessionOptions) -> CountingSession:
        self.session = CountingSession(options.max_tokens)
        return self.session


@pytest.fixture(scope="module")
def bench(tiny_glm: Path, shared_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return tiny_bench(tiny_glm, shared_settings, tmp_path_factory.mktemp("jobs") / "study", seed=31)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[CountingEngine]:
    counting = CountingEngine()
    monkeypatch.setattr(jobs.engines, "get", lambda _: counting)
    yield counting
    monkeypatch.setattr(jobs, "_served", None)


def opened(bench: Bench, engine: CountingEngine, max_tokens: int) -> CountingSession:
    """A session that answered its first request."""
    trial = demo_trials()[0]
    assert trial.exported is not None
    options = SessionOptions(batch_size=1, max_tokens=max_tokens, threads=1)
    jobs.open_session(
        jobs.OpenJob(
            candidate=trial.candidate, exported=trial.exported, options=options, workload=bench.workload
        )
    )
    jobs.first_request(jobs.Nothing())
    engine.session.calls.clear()
    return engine.session


def test_a_round_that_counts_is_led_in_where_the_last_request_ended(
    bench: Bench, engine: CountingEngine
) -> None:
    session = opened(bench, engine, max_tokens=bench.options().max_tokens)
    turn = jobs.timed_round(jobs.RoundJob(index=3))
    answer = ["prefill", *["decode"] * (OUTPUT - 1)]
    assert session.calls == ["decode"] * LEAD_IN_TOKENS + answer
    assert turn.output_tokens == (OUTPUT,), "what led in is not counted"


@pytest.mark.parametrize("room", [0, 2])
def test_a_full_context_shortens_the_lead_in(bench: Bench, engine: CountingEngine, room: int) -> None:
    session = opened(bench, engine, max_tokens=PROMPT + OUTPUT + room)
    jobs.timed_round(jobs.RoundJob(index=0))
    assert session.calls.index("prefill") == room


def test_rounds_that_follow_each_other_need_no_lead_in(bench: Bench, engine: CountingEngine) -> None:
    session = opened(bench, engine, max_tokens=PROMPT + OUTPUT + LEAD_IN_TOKENS)
    jobs.timed_round(jobs.RoundJob(index=0, warming=True))
    jobs.timed_round(jobs.RoundJob(index=0, output_tokens=4))
    assert session.calls == ["prefill", *["decode"] * (OUTPUT - 1), "prefill", *["decode"] * 3]
