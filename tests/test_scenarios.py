"""Timed rounds: what each figure means, to the digit, on a clock that only the engine moves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from open_autoglm.checkpoint import load_checkpoint
from open_autoglm.engines.contract import Logits, Tokens
from open_autoglm.measure.scenarios import (
    IncorrectOutput,
    figure_of,
    good_requests,
    metrics_of,
    output_tokens_ratio,
    run_round,
    warm_up,
)
from open_autoglm.measure.workload import Request, make_workload
from open_autoglm.schemas import Conditions, OptimizeSpec, Round, Scenario, Workload

VOCAB = 10
STILL = Conditions(foreign_cores=0)


class Clock:
    """Seconds that pass only when someone says so."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


class ScriptedSession:
    """Always prefers the token after the one it read last; takes 1 ms per prompt token, 10 ms to decode."""

    def __init__(self, clock: Clock, broken: str = "") -> None:
        self._clock, self._broken = clock, broken
        self.read: list[list[int]] = []

    def prefill(self, tokens: Tokens) -> Logits:
        self.read.append([])
        return self._answer(tokens[:, -1], seconds=tokens.shape[1] / 1e3, phase="prefill")

    def decode(self, tokens: Tokens) -> Logits:
        return self._answer(tokens, seconds=0.010, phase="decode")

    def _answer(self, last: Tokens, seconds: float, phase: str) -> Logits:
        self._clock.now += seconds
        self.read[-1].append(int(last[0]))
        logits = np.zeros((len(last), VOCAB), dtype=np.float32)
        logits[np.arange(len(last)), (last + 1) % VOCAB] = 1
        if phase == self._broken:
            logits[0, 0] = np.nan
        return logits

    def full_logits(self, tokens: Tokens) -> Logits:
        raise NotImplementedError

    def facts(self) -> dict[str, str]:
        return {}

    def close(self) -> None: ...


class VerifyingSession(ScriptedSession):
    """It takes 1 ms more for each token beyond the first."""

    def extend(self, tokens: Tokens) -> Logits:
        self._clock.now += (9 + tokens.shape[1]) / 1e3
        return np.eye(VOCAB, dtype=np.float32)[(tokens + 1) % VOCAB]

    def rewind(self, tokens: int) -> None: ...


class Meter:
    """Reads what it is told, without a host."""

    def read(self) -> Conditions:
        return Conditions(foreign_cores=0.25)


def request(prompt: int, output: int, arrival_ms: float = 0.0, batch: int = 1) -> Request:
    return Request(np.full((batch, prompt), 4, dtype=np.int64), output, arrival_ms)


def timed(requests: Sequence[Request], *, index: int = 0, broken: str = "") -> tuple[Round, Clock]:
    clock = Clock()
    session = ScriptedSession(clock, broken)
    return run_round(session, requests, index, Meter, clock, clock.sleep), clock


def make_round(took_ms: float = 100.0, **changes: object) -> Round:
    fields = {
        "index": 0,
        "ttft_ms": (took_ms,),
        "tpot_ms": (10.0,),
        "e2e_ms": (took_ms,),
        "token_ms": ((10.0, 10.0),),
        "output_tokens": (3,),
        "duration_ms": took_ms,
        "conditions": STILL,
    }
    return Round.model_validate(fields | changes)


def make_workload_of(scenario: Scenario, batch_size: int = 1, **changes: object) -> Workload:
    fields = {
        "path": Path("workload.npz"),
        "sha256": "",
        "scenario": scenario,
        "batch_size": batch_size,
        "prompt_tokens": 100,
        "output_tokens": 3,
        "rounds": 2,
        "seed": 0,
        "corpus": "",
    }
    return Workload.model_validate(fields | changes)


# ── one round ────────────────────────────────────────────────────────────────────────────────────


def test_tokens_of_one_call_are_known_at_one_time() -> None:
    """With drafts: TPOT is the time after the first token over the tokens; what was guessed is kept."""
    clock = Clock()
    counting = np.arange(20)[None] % VOCAB  # each token follows the one before, so every draft is right
    session = VerifyingSession(clock)
    turn = run_round(session, [Request(counting, 8)], 0, Meter, clock, clock.sleep, draft_tokens=3)
    assert turn.output_tokens == (8,)
    # The first token by the prompt, then 1 + 2, 1 + 3 of 4 that were left.
    assert turn.drafted_tokens == (5,)
    assert turn.accepted_tokens == (5,)
    assert turn.token_ms == (pytest.approx((12, 0, 0, 13, 0, 0, 0)),)
    assert turn.tpot_ms == pytest.approx((25 / 7,))
    plain = run_round(ScriptedSession(clock), [Request(counting, 8)], 0, Meter, clock, clock.sleep)
    assert plain.drafted_tokens == plain.accepted_tokens == ()


def test_a_single_request_is_timed_token_by_token() -> None:
    """TTFT is the prefill, TPOT the mean of the tokens after the first, e2e both; each knows its round."""
    timed_round, _ = timed([request(prompt=100, output=5)], index=7)
    assert timed_round.ttft_ms == pytest.approx((100,))
    assert timed_round.tpot_ms == pytest.approx((10,))
    assert timed_round.token_ms == (pytest.approx((10, 10, 10, 10)),)
    assert timed_round.e2e_ms == pytest.approx((140,))
    assert timed_round.duration_ms == timed_round.e2e_ms[0]
    assert (timed_round.index, timed_round.output_tokens) == (7, (5,))
    assert timed_round.conditions.foreign_cores == 0.25


def test_each_token_is_the_answer_to_the_last() -> None:
    """Decoding is greedy: what the engine prefers is what it reads next."""
    clock = Clock()
    session = ScriptedSession(clock)
    run_round(
        session, [request(prompt=3, output=4), request(prompt=3, output=2)], 0, Meter, clock, clock.sleep
    )
    assert session.read == [[4, 5, 6, 7], [4, 5]]


def test_server_requests_queue_for_the_one_server() -> None:
    """Service takes 120 ms. The second request arrives 50 ms into the first's: it waits 70 ms, which its
    TTFT and e2e hold and its TPOT does not. The third finds the server idle, which slept until then."""
    timed_round, clock = timed([request(100, 3, arrival_ms) for arrival_ms in (0, 50, 400)])
    assert timed_round.ttft_ms == pytest.approx((100, 170, 100))
    assert timed_round.tpot_ms == pytest.approx((10, 10, 10))
    assert timed_round.e2e_ms == pytest.approx((120, 190, 120))
    assert timed_round.duration_ms == pytest.approx(520)
    assert clock.slept == [pytest.approx(0.160)]


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_logits_that_are_not_finite_are_no_answer(phase: str) -> None:
    """An engine that answers fast with NaN has no speed; the last token is generated, and never read."""
    position = {"prefill": 7, "decode": 9}[phase]
    with pytest.raises(
        IncorrectOutput, match=f"{phase} gave logits that are not finite at position {position} "
    ):
        timed([request(8, 3)], broken=phase)


# ── warm-up ──────────────────────────────────────────────────────────────────────────────────────


def warmed(e2e_ms: Sequence[float], **options: float) -> tuple[list[float], bool]:
    """The e2e of the rounds that the warm-up ran when they would take so long."""
    rounds, steady = warm_up(lambda turn: make_round(e2e_ms[turn]), **options)  # type: ignore[arg-type]
    return [r.e2e_ms[0] for r in rounds], steady


def test_warm_up_ends_when_three_rounds_agree() -> None:
    """A slow start is waited out: 130 is too far from the median of its three, 105 is not."""
    assert warmed([900, 300, 130, 105, 100, 96, 50]) == ([900, 300, 130, 105, 100, 96], True)
    assert warmed([100, 109, 91, 1]) == ([100, 109, 91], True)


def test_warm_up_gives_up_and_says_so() -> None:
    """Twelve rounds that swing by half find no steady state."""
    rounds, steady = warmed([100, 150] * 10)
    assert (len(rounds), steady) == (12, False)
    assert len(warmed([100, 150] * 10, most=5)[0]) == 5


def test_warm_up_judges_only_rounds_of_one_length() -> None:
    """The first rounds visit other lengths; how long they take says nothing about the others."""
    assert warmed([100, 100, 100, 40, 40, 40], kinds=3) == ([100, 100, 100, 40, 40, 40], True)
    assert warmed([100, 400, 401, 402], kinds=2) == ([100, 400, 401, 402], True)


# ── figures ──────────────────────────────────────────────────────────────────────────────────────


def test_figures_of_a_batch_count_every_row() -> None:
    """Four rows of five tokens in 140 ms: 400 tokens/s while decoding, 143 with the prefill."""
    timed_round, _ = timed([request(100, 5, batch=4)])
    metrics = metrics_of(make_workload_of("offline", batch_size=4), [timed_round])
    assert metrics["ttft_ms"].median == pytest.approx(100)
    assert metrics["tokens_per_s"].median == pytest.approx(400)
    assert metrics["throughput_tokens_per_s"].median == pytest.approx(4 * 5 / 0.140)
    assert "goodput_rps" not in metrics


def test_latencies_are_pooled_over_requests_and_rates_taken_per_round() -> None:
    """Two server rounds of three requests are six latencies and two rates."""
    rounds = [timed([request(100, 3, ms) for ms in arrivals])[0] for arrivals in ((0, 50, 400), (0, 0, 0))]
    metrics = metrics_of(make_workload_of("server", slo_ttft_ms=200), rounds)
    assert metrics["ttft_ms"].values == pytest.approx((100, 170, 100, 100, 220, 340))
    assert metrics["throughput_tokens_per_s"].values == pytest.approx((9 / 0.520, 9 / 0.360))
    assert metrics["goodput_rps"].values == pytest.approx((3 / 0.520, 1 / 0.360))
    assert metrics["goodput_rps"].unit == "requests/s"


def test_repeated_rounds_count_in_no_figure() -> None:
    """A disturbed round that was run again is kept, but its figures are not the engine's."""
    disturbed = make_round(500, repeated=True)
    metrics = metrics_of(make_workload_of("single_stream"), [disturbed, make_round(100)])
    assert metrics["e2e_ms"].values == (100,)
    with pytest.raises(ValueError, match="no samples"):
        metrics_of(make_workload_of("single_stream"), [disturbed])


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        ({"slo_ttft_ms": 50.0}, 2),
        ({"slo_tpot_ms": 9.0}, 2),
        ({"slo_ttft_ms": 50.0, "slo_tpot_ms": 9.0}, 1),
        ({}, 3),
    ],
)
def test_a_request_is_good_within_every_limit_there_is(limits: dict[str, float], good: int) -> None:
    """The limit itself is still within; a limit that was not asked for is met by all."""
    turn = make_round(ttft_ms=(10.0, 50.0, 51.0), tpot_ms=(10.0, 9.0, 8.0))
    assert good_requests(make_workload_of("server", **limits), turn) == good


def test_goodput_needs_a_promise() -> None:
    """Without a limit every request would be good, and the figure would be the arrival rate."""
    assert "goodput_rps" not in metrics_of(make_workload_of("server"), [make_round()])


def test_every_rate_is_compared_by_the_time_it_is_made_of() -> None:
    """One number per round, less is better, whatever the goal."""
    turn = make_round(
        ttft_ms=(1.0, 5.0, 3.0), tpot_ms=(7.0, 8.0, 9.0), e2e_ms=(30.0, 20.0, 10.0), duration_ms=60.0,
        output_tokens=(2, 2, 2),
    )  # fmt: skip
    figures = {name: figure_of(name)(turn) for name in metrics_of(make_workload_of("server"), [turn])}
    assert figures == {
        "ttft_ms": 3, "tpot_ms": 8, "e2e_ms": 20, "tokens_per_s": 8, "throughput_tokens_per_s": 10,
    }  # fmt: skip
    assert figure_of("goodput_rps")(turn) == 20


def test_generated_tokens_are_held_against_those_asked_for(tiny_glm: Path, tmp_path: Path) -> None:
    """A round beyond the pool is a round of the pool again; an engine that stops early is seen."""
    spec = OptimizeSpec(model_path="m", prompt_tokens=16, output_tokens=4)
    workload = make_workload(load_checkpoint(str(tiny_glm)), spec, tmp_path / "workload.npz")
    whole, early = make_round(index=workload.rounds + 1, output_tokens=(4,)), make_round(output_tokens=(2,))
    assert output_tokens_ratio(workload, [whole]) == 1
    assert output_tokens_ratio(workload, [whole, early]) == 0.75
