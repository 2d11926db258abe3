"""One timed round of each scenario, and the figures that rounds add up to.

A batch of ``b`` prompts, ``n`` output tokens, greedy. TTFT: from a request's arrival to each row's first
token. TPOT: from there to the last token, divided by ``n - 1``; the first token is not part of it. E2e: from
arrival to the last token. Without a queue a request arrives when it is handed over; in the server scenario
it arrives by the clock and waits for those before it, so TTFT and e2e hold the queue and TPOT does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import fmean, median
from typing import NamedTuple, Protocol

import numpy as np

from open_autoglm.engines.contract import Logits, Session, Tokens
from open_autoglm.generation import greedy
from open_autoglm.measure.interference import ConditionsMeter
from open_autoglm.measure.statistics import summarise
from open_autoglm.measure.workload import Request, load_rounds
from open_autoglm.schemas import Conditions, Metric, Round, Workload

Figure = Callable[[Round], float]

LEAD_IN_TOKENS = 8
"""Decoded untimed before a round of a process that shares the device in turns."""


class IncorrectOutput(RuntimeError):
    """The engine answers with something that is no answer, so its speed is of no interest."""


class Meter(Protocol):
    """Watches the host from its creation on."""

    def read(self) -> Conditions: ...


# ── one round ────────────────────────────────────────────────────────────────────────────────────


class _Answer(NamedTuple):
    """Times in seconds: when the request was due, and when each of its tokens was known."""

    due: float
    known: list[float]
    drafted: int
    accepted: int
    first: Logits
    last: Logits


def run_round(
    session: Session,
    requests: Sequence[Request],
    index: int,
    meter_factory: Callable[[], Meter] = ConditionsMeter,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
    *,
    draft_tokens: int = 0,
) -> Round:
    """Time one round: its requests in the order of their arrival, one at a time, first come first served.

    ``index`` says which of the workload's rounds it is; ``draft_tokens`` are guessed per call, at most, and
    tokens that come by one call are known at one time. Raises IncorrectOutput on NaN or infinite logits.
    """
    meter = meter_factory()
    begin = clock()
    answers = [_answer(session, request, draft_tokens, begin, clock, sleep) for request in requests]
    conditions = meter.read()
    for request, answer in zip(requests, answers, strict=True):
        _require_finite(answer.first, "prefill", request.tokens.shape[1] - 1)
        _require_finite(answer.last, "decode", sum(request.lengths) - 2)
    token_ms = [tuple((after - before) * 1e3 for before, after in pairwise(a.known)) for a in answers]
    return Round(
        index=index,
        ttft_ms=tuple((a.known[0] - a.due) * 1e3 for a in answers),
        tpot_ms=tuple(fmean(times) for times in token_ms),
        e2e_ms=tuple((a.known[-1] - a.due) * 1e3 for a in answers),
        token_ms=tuple(token_ms),
        output_tokens=tuple(len(a.known) for a in answers),
        duration_ms=(answers[-1].known[-1] - begin) * 1e3,
        drafted_tokens=tuple(a.drafted for a in answers) if draft_tokens else (),
        accepted_tokens=tuple(a.accepted for a in answers) if draft_tokens else (),
        conditions=conditions,
    )


def _answer(
    session: Session,
    request: Request,
    draft_tokens: int,
    begin: float,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> _Answer:
    """Nothing happens between two readings of the clock but what a server must do for a token as well."""
    due = begin + request.arrival_ms / 1e3
    if (early := due - clock()) > 0:
        sleep(early)
    steps = greedy(session, request.tokens, request.output_tokens, draft_tokens)
    first = last = next(steps).logits
    known = [clock()]
    drafted = accepted = 0
    for tokens, last, guessed in steps:  # noqa: B007
        known += [clock()] * tokens.shape[1]
        drafted += guessed
        accepted += tokens.shape[1] - 1
    return _Answer(due, known, drafted, accepted, first, last)


def lead_in(session: Session, tokens: Tokens, room: int) -> None:
    """Decode a few tokens more of the request before, untimed, in a process that others ran in between.

    After such a pause the first prefill took 6 to 12 % longer on a two-core host, as if the threads had yet
    to find their cores again; nothing of a server that is at work. Eight decoded tokens undo it, one does
    not. They need no prompt, so an engine that compiles for each length has nothing new to compile.
    ``tokens`` are read from, ``int64[batch, n]``; ``room`` is what the cache still holds.
    """
    for position in range(min(LEAD_IN_TOKENS, room)):
        session.decode(np.ascontiguousarray(tokens[:, position % tokens.shape[1]]))


def _require_finite(logits: Logits, phase: str, position: int) -> None:
    if not np.isfinite(logits).all():
        raise IncorrectOutput(f"{phase} gave logits that are not finite at position {position} of a request")


def warm_up(
    run: Callable[[int], Round], kinds: int = 1, *, least: int = 3, most: int = 12, tolerance: float = 0.1
) -> tuple[list[Round], bool]:
    """Run rounds until they stop getting faster; give them all, and whether a steady state was found.

    ``run`` is called with 0, 1, 2 …. The first ``kinds`` must have different lengths, so that an engine
    that compiles for each length has done so; from the last of those on all must have the same length
    (:func:`~open_autoglm.measure.workload.warmup_request` lines them up so; it does no harm to count
    more kinds than there are). It is steady when the e2e
    of the latest ``least`` of these lie within ``tolerance`` of their median; after ``most`` it gives up.
    """
    visits = [run(turn) for turn in range(kinds - 1)]
    alike: list[Round] = []
    while len(alike) < most:
        alike.append(run(len(visits) + len(alike)))
        latest = [median(r.e2e_ms) for r in alike[-least:]]
        middle = median(latest)
        if len(alike) >= least and all(abs(e2e - middle) <= tolerance * middle for e2e in latest):
            return visits + alike, True
    return visits + alike, False


# ── figures ──────────────────────────────────────────────────────────────────────────────────────


def metrics_of(workload: Workload, rounds: Sequence[Round]) -> dict[str, Metric]:
    """The figures of a scenario from its counted rounds; latencies are pooled over the requests.

    ``throughput_tokens_per_s`` counts generated tokens over a whole round, prefill and queue included.
    ``goodput_rps`` is there if the scenario is server and there is a limit on TTFT or TPOT.
    Raises ValueError if no round counts.
    """
    counted = [r for r in rounds if not r.repeated]
    batch = workload.batch_size
    tpot_ms = [ms for r in counted for ms in r.tpot_ms]
    metrics = {
        "ttft_ms": summarise([ms for r in counted for ms in r.ttft_ms], "ms"),
        "tpot_ms": summarise(tpot_ms, "ms"),
        "e2e_ms": summarise([ms for r in counted for ms in r.e2e_ms], "ms"),
        "tokens_per_s": summarise([batch * 1e3 / ms for ms in tpot_ms], "tokens/s"),
        "throughput_tokens_per_s": summarise([batch * 1e3 / _ms_per_token(r) for r in counted], "tokens/s"),
    }
    if workload.scenario == "server" and (workload.slo_ttft_ms or workload.slo_tpot_ms):
        metrics["goodput_rps"] = summarise(
            [good_requests(workload, r) * 1e3 / r.duration_ms for r in counted], "requests/s"
        )
    return metrics


def good_requests(workload: Workload, turn: Round) -> int:
    """How many requests of one round met every limit the workload has."""
    ttft_limit, tpot_limit = workload.slo_ttft_ms or np.inf, workload.slo_tpot_ms or np.inf
    return sum(
        ttft <= ttft_limit and tpot <= tpot_limit
        for ttft, tpot in zip(turn.ttft_ms, turn.tpot_ms, strict=True)
    )


def _ms_per_token(turn: Round) -> float:
    return turn.duration_ms / sum(turn.output_tokens)


def _tpot(turn: Round) -> float:
    return median(turn.tpot_ms)


def _e2e(turn: Round) -> float:
    return median(turn.e2e_ms)


_FIGURES: dict[str, Figure] = {
    "ttft_ms": lambda turn: median(turn.ttft_ms),
    "tpot_ms": _tpot,
    "e2e_ms": _e2e,
    "tokens_per_s": _tpot,
    "throughput_tokens_per_s": _ms_per_token,
    # A count of good requests is coarse and can be zero, where a ratio means nothing.
    "goodput_rps": _e2e,
}


def figure_of(metric: str) -> Figure:
    """What to compare two candidates' rounds by when ``metric`` is the goal: one time, less is better.

    Rates become the time they are made of, so that a ratio of two rounds always means the same.
    Raises KeyError for a metric that rounds do not have.
    """
    return _FIGURES[metric]


def output_tokens_ratio(workload: Workload, rounds: Sequence[Round]) -> float:
    """Generated / requested tokens over ``rounds``; 1 unless an engine stopped early."""
    pool = load_rounds(workload)
    generated = sum(sum(r.output_tokens) for r in rounds)
    return generated / sum(request.output_tokens for r in rounds for request in pool[r.index % len(pool)])
