"""What runs in a peer's child: prepare its files, open it, answer once, run timed rounds.

A round is one prompt. Every prompt is new to its process, because some runtimes keep what they have read:
where one comes a second time (a disturbed round is run again), it begins a token later.
"""

from __future__ import annotations

import time
from collections import Counter
from itertools import pairwise
from statistics import fmean

import numpy as np
from pydantic import Field

from benchmarks.runtimes import PREPARATIONS, RUNTIMES, Source
from open_autoglm.engines.contract import Tokens
from open_autoglm.measure.interference import ConditionsMeter
from open_autoglm.measure.jobs import Nothing, RoundJob
from open_autoglm.measure.memory import FootprintWatch
from open_autoglm.measure.scenarios import LEAD_IN_TOKENS, IncorrectOutput
from open_autoglm.measure.workload import load_rounds
from open_autoglm.schemas import Footprint, Model, Round, Workload

PREFIX = __name__

UNTIMED = 8
"""Prompts at the end of the pool that warm-up and lead-in take turns with."""


class PeerJob(Model):
    """Payload of :func:`prepare` and :func:`open_peer`."""

    runtime: str
    source: Source
    workload: Workload


class FirstAnswer(Model):
    """Answer of :func:`first_answer`."""

    footprint: Footprint
    first_request_ms: float = Field(description="compilation and first touch included")
    tokens: tuple[int, ...] = Field(description="the greedy continuation of a prompt that is everybody's")
    facts: dict[str, str]


class _Peer:
    """The one runtime of this process."""

    def __init__(self, job: PeerJob) -> None:
        self.watch = FootprintWatch()
        self.prompts = [requests[0].tokens[0] for requests in load_rounds(job.workload)]
        self.output_tokens = job.workload.output_tokens
        self._asked: Counter[int] = Counter()
        self._untimed = 0
        with self.watch.sampling():
            self.runtime = RUNTIMES[job.runtime](job.source)

    def prompt(self, place: int) -> Tokens:
        """The prompt at ``place``, turned by one token for each time it was asked for before."""
        turns = self._asked[place]
        self._asked[place] += 1
        return np.roll(self.prompts[place], -turns)

    def untimed_prompt(self) -> Tokens:
        self._untimed += 1
        return self.prompt(len(self.prompts) - 1 - self._untimed % UNTIMED)

    def timed_prompt(self, index: int) -> Tokens:
        return self.prompt(index % (len(self.prompts) - UNTIMED))


_opened: _Peer | None = None


def _the_peer() -> _Peer:
    assert _opened is not None, "open_peer comes first"
    return _opened


def prepare(job: PeerJob) -> Nothing:
    """Write what the runtime loads into ``job.source.prepared``."""
    PREPARATIONS[job.runtime](job.source)
    return Nothing()


def open_peer(job: PeerJob) -> Nothing:
    """Load it; it stays for the jobs that follow."""
    global _opened
    _opened = _Peer(job)
    return Nothing()


def first_answer(_: Nothing) -> FirstAnswer:
    """Answer one request of full length, the same for all, and say how much memory that took."""
    peer = _the_peer()
    started = time.perf_counter()
    with peer.watch.sampling():
        tokens = peer.runtime.generate(peer.prompt(len(peer.prompts) - 1), peer.output_tokens, lambda: None)
    elapsed_ms = (time.perf_counter() - started) * 1e3
    return FirstAnswer(
        footprint=peer.watch.footprint(),
        first_request_ms=elapsed_ms,
        tokens=tuple(tokens),
        facts=peer.runtime.facts(),
    )


def timed_round(job: RoundJob) -> Round:
    """One request, after an untimed one of few tokens that wakes threads and caches after the others' turn.

    Our own stages go on decoding where the last request ended, which these interfaces cannot.
    """
    peer = _the_peer()
    peer.runtime.generate(peer.untimed_prompt(), LEAD_IN_TOKENS, lambda: None)
    prompt = peer.untimed_prompt() if job.warming else peer.timed_prompt(job.index)
    return time_request(peer, prompt, job.index)


def time_request(peer: _Peer, prompt: Tokens, index: int) -> Round:
    """Raises IncorrectOutput if there are not as many tokens as asked for."""
    known: list[float] = []
    meter = ConditionsMeter()
    begin = time.perf_counter()
    tokens = peer.runtime.generate(prompt, peer.output_tokens, lambda: known.append(time.perf_counter()))
    conditions = meter.read()
    if not len(tokens) == len(known) == peer.output_tokens:
        raise IncorrectOutput(f"gave {len(tokens)} tokens in {len(known)} steps, not {peer.output_tokens}")
    token_ms = tuple((after - before) * 1e3 for before, after in pairwise(known))
    e2e_ms = (known[-1] - begin) * 1e3
    return Round(
        index=index,
        ttft_ms=((known[0] - begin) * 1e3,),
        tpot_ms=(fmean(token_ms),),
        e2e_ms=(e2e_ms,),
        token_ms=(token_ms,),
        output_tokens=(len(tokens),),
        duration_ms=e2e_ms,
        conditions=conditions,
    )
