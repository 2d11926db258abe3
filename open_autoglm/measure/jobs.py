"""What runs in the children. A child opens one session and then does with it what it is asked, in turn:
look at its memory, score its output, run a timed round.

The parent holds the device lease, so a child never waits for anyone while its time runs.
"""

from __future__ import annotations

import time
from pathlib import Path

from pydantic import Field

from open_autoglm import engines
from open_autoglm.engines.contract import PEAK_DEVICE_BYTES, Session, SessionOptions, draft_tokens_of
from open_autoglm.measure.device_memory import DeviceMemory
from open_autoglm.measure.memory import FootprintWatch
from open_autoglm.measure.scenarios import lead_in, run_round
from open_autoglm.measure.workload import Request, Requests, load_rounds, short, warmup_request
from open_autoglm.quality.metrics import score
from open_autoglm.quality.reference import EvaluationSet, compute_reference
from open_autoglm.schemas import (
    Candidate,
    ExportedModel,
    Footprint,
    Model,
    QualityReport,
    Round,
    Workload,
)

PREFIX = __name__


class OpenJob(Model):
    """How to open one candidate."""

    candidate: Candidate
    exported: ExportedModel
    options: SessionOptions
    workload: Workload


class Opened(Model):
    """Answer of :func:`open_session`."""

    load_ms: float


class Nothing(Model):
    """The payload of a job that needs none."""


class FirstRequest(Model):
    """Answer of :func:`first_request`."""

    footprint: Footprint
    first_request_ms: float = Field(description="compilation and first touch included")
    facts: dict[str, str]


class RoundJob(Model):
    """Payload of :func:`timed_round`."""

    index: int
    warming: bool = Field(False, description="`index` counts warm-up turns, not the workload's rounds")
    output_tokens: int | None = Field(None, description="ends each request early")


class ScoreJob(Model):
    """Payload of :func:`score_session`."""

    evaluation_set: EvaluationSet
    reference: Path
    min_quality: float
    max_token_flips: float
    windows: int | None = Field(None, description="of each text, at most; None for all")


class ReferenceJob(Model):
    """Payload of :func:`make_reference`."""

    evaluation_set: EvaluationSet
    output: Path


class ReferenceDone(Model):
    """Answer of :func:`make_reference`."""

    path: Path
    seconds: float


class _Served:
    """The one session of this process."""

    def __init__(self, job: OpenJob) -> None:
        self.watch = FootprintWatch(gpu=DeviceMemory.open() if job.candidate.device == "gpu" else None)
        self.options = job.options
        self.workload = job.workload
        self.draft_tokens = draft_tokens_of(job.candidate)
        self.requests: list[Requests] = load_rounds(job.workload)
        self.longest = sorted(range(len(self.requests)), key=self._length, reverse=True)
        engine = engines.get(job.candidate.engine)
        started = time.perf_counter()
        with self.watch.sampling():
            self.session: Session = engine.open(job.candidate, job.exported, job.options)
        self.load_ms = (time.perf_counter() - started) * 1e3

        self._last: Request | None = None

    def run(self, requests: Requests, index: int) -> Round:
        """One timed round."""
        turn = run_round(self.session, requests, index, draft_tokens=self.draft_tokens)
        self._last = requests[-1]
        return turn

    def lead_in(self) -> None:
        """Go on, untimed, where the last request ended; the cache has room for doing so once."""
        assert self._last is not None, "first_request comes before the rounds that count"
        lead_in(self.session, self._last.tokens, self.options.max_tokens - sum(self._last.lengths))

    def _length(self, index: int) -> int:
        """Tokens of a round's first request, prompt and output."""
        return sum(self.requests[index][0].lengths)


_served: _Served | None = None


def _the_session() -> _Served:
    assert _served is not None, "open_session comes first"
    return _served


def open_session(job: OpenJob) -> Opened:
    """Load the candidate; the session stays open for the jobs that follow."""
    global _served
    _served = _Served(job)
    return Opened(load_ms=_served.load_ms)


def first_request(_: Nothing) -> FirstRequest:
    """Answer one request of the workload's full length, and say how much memory that took."""
    served = _the_session()
    longest = served.longest[0]
    started = time.perf_counter()
    with served.watch.sampling():
        served.run(served.requests[longest][:1], longest)
    elapsed_ms = (time.perf_counter() - started) * 1e3
    facts = served.session.facts()
    device = facts.get(PEAK_DEVICE_BYTES)
    footprint = served.watch.footprint(int(device) if device is not None else None)
    return FirstRequest(footprint=footprint, first_request_ms=elapsed_ms, facts=facts)


def timed_round(job: RoundJob) -> Round:
    """Run the workload's round ``job.index``; it begins again when all its rounds are used."""
    served = _the_session()
    if not job.warming and job.output_tokens is None:
        served.lead_in()
    return served.run(_requests_of(served, job), job.index)


def _requests_of(served: _Served, job: RoundJob) -> Requests:
    if job.warming:
        return (warmup_request(served.requests, job.index),)
    turn = job.index % len(served.requests)
    if job.output_tokens is None:
        return served.requests[turn]
    # The longest first, so that a mix of lengths does not make the short rounds unequal.
    return short(served.requests[served.longest[turn]], job.output_tokens)


def score_session(job: ScoreJob) -> QualityReport:
    """Judge the session's output on both paths against the stored reference."""
    served = _the_session()
    return score(
        served.session,
        job.evaluation_set,
        job.reference,
        batch_size=served.options.batch_size,
        limit=job.min_quality,
        max_flips=job.max_token_flips,
        windows=job.windows,
        draft_tokens=served.draft_tokens,
    )


def make_reference(job: ReferenceJob) -> ReferenceDone:
    """Let the fp32 candidate predict the evaluation set, once for all others."""
    started = time.monotonic()
    served = _the_session()
    compute_reference(served.session, job.evaluation_set, job.output)
    return ReferenceDone(path=job.output, seconds=time.monotonic() - started)
