"""The engine without an endpoint: the bundle's session in the loop of :mod:`open_autoglm.generation`, in a
child of its own that stays. Times are taken where a client's are: the request is made, the tokens are known.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from pydantic import Field

from benchmarks.serve_load import Answer, Load
from open_autoglm.bundle import open_bundle, open_session
from open_autoglm.engines.contract import Session, SessionOptions, draft_tokens_of
from open_autoglm.generation import greedy
from open_autoglm.measure.jobs import Nothing
from open_autoglm.schemas import Model

PREFIX = __name__


class BareJob(Model):
    """Payload of :func:`open_bare`."""

    bundle: Path
    max_tokens: int
    threads: int


class AskJob(Model):
    """Payload of :func:`ask`."""

    prompts: tuple[tuple[int, ...], ...] = Field(description="token ids, answered one after the other")
    output_tokens: int


_opened: tuple[Session, int] | None = None
"""The one session of this process, and how many tokens it drafts."""


def open_bare(job: BareJob) -> Nothing:
    """Load the bundle; it stays for the jobs that follow."""
    global _opened
    manifest, _ = open_bundle(job.bundle, verify=False)
    options = SessionOptions(batch_size=1, max_tokens=job.max_tokens, threads=job.threads)
    _opened = open_session(job.bundle, manifest, options), draft_tokens_of(manifest.candidate)
    return Nothing()


def ask(job: AskJob) -> Load:
    """Answer each prompt to its length, whatever ends a text."""
    begin = time.perf_counter()
    answers = tuple(_answer(prompt, job.output_tokens, begin) for prompt in job.prompts)
    return Load(answers=answers, wall_ms=(time.perf_counter() - begin) * 1e3, client_cpu_ms=0)


def _answer(prompt: tuple[int, ...], output_tokens: int, begin: float) -> Answer:
    assert _opened is not None, "open_bare comes first"
    session, draft_tokens = _opened
    asked, first, count = time.perf_counter(), 0.0, 0
    for step in greedy(session, np.array([prompt], dtype=np.int64), output_tokens, draft_tokens):
        count += step.tokens.size
        first = first or time.perf_counter()
    return Answer(
        status=200,
        begin_ms=(asked - begin) * 1e3,
        ttft_ms=(first - asked) * 1e3,
        e2e_ms=(time.perf_counter() - asked) * 1e3,
        prompt_tokens=len(prompt),
        output_tokens=count,
    )
