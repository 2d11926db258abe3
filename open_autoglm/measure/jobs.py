"""What runs in the children: timing one candidate, scoring one candidate, computing the reference.

Definitions (batch of ``b`` prompts, ``n`` output tokens, greedy): TTFT is the time from handing over the
prompts to knowing each one's first token. TPOT is the time from there to the last token, divided by
``n - 1``: the first token is not part of it. ``tokens_per_s`` is ``b / TPOT``. ``e2e`` is the whole request.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
from pydantic import Field

from open_autoglm import engines
from open_autoglm.engines.contract import Logits, Session, SessionOptions, Tokens
from open_autoglm.measure.interference import CpuMeter
from open_autoglm.measure.lease import device_lease
from open_autoglm.measure.statistics import summarise
from open_autoglm.measure.workload import WARMUPS
from open_autoglm.quality.metrics import score
from open_autoglm.quality.reference import EvaluationSet, compute_reference
from open_autoglm.schemas import Candidate, ExportedModel, Measurements, Model, QualityReport, Workload

LEAST_ROUNDS = 5
"""A slow candidate is timed at least so often, whatever the budget."""


class IncorrectOutput(RuntimeError):
    """The engine answers with something that is no answer, so its speed is of no interest."""


class OpenJob(Model):
    """How to open one candidate."""

    candidate: Candidate
    exported: ExportedModel
    options: SessionOptions

    def open(self) -> Session:
        return engines.get(self.candidate.engine).open(self.candidate, self.exported, self.options)


class MeasureJob(OpenJob):
    """Payload of :func:`measure`."""

    workload: Workload
    timing_budget_s: float


class ScoreJob(OpenJob):
    """Payload of :func:`score_candidate`."""

    evaluation_set: EvaluationSet
    reference: Path
    min_quality: float


class ReferenceJob(OpenJob):
    """Payload of :func:`make_reference`."""

    evaluation_set: EvaluationSet
    output: Path


class ReferenceDone(Model):
    """Answer of :func:`make_reference`."""

    path: Path
    seconds: float


class Round(Model):
    """One timed request."""

    ttft_ms: float
    token_ms: tuple[float, ...] = Field(description="one entry per token after the first")
    foreign_cpu_share: float

    @property
    def tpot_ms(self) -> float:
        return sum(self.token_ms) / len(self.token_ms)

    @property
    def e2e_ms(self) -> float:
        return self.ttft_ms + sum(self.token_ms)


def measure(job: MeasureJob) -> Measurements:
    """Load, warm up, then time ``workload.rounds`` requests with the device held alone."""
    workload, device = job.workload, job.candidate.device
    prompts: Tokens = np.load(workload.path)
    with device_lease(device, alone=False):
        started = time.perf_counter()
        session = job.open()
        load_ms = (time.perf_counter() - started) * 1e3
        # Compilation and first-touch happen here, where others may prepare too.
        warmups = [run_round(session, prompts[0], workload.output_tokens)]
    with device_lease(device, alone=True):
        warmups += [run_round(session, prompt, workload.output_tokens) for prompt in prompts[1:WARMUPS]]
        rounds = timed_rounds(session, prompts[WARMUPS:], workload.output_tokens, job.timing_budget_s)
        peak_rss_bytes = read_peak_rss_bytes()
    facts = session.facts()
    session.close()
    return _evidence(job, rounds, warmups, load_ms, peak_rss_bytes, facts)


def timed_rounds(session: Session, prompts: Tokens, output_tokens: int, budget_s: float) -> list[Round]:
    """One round per prompt batch; ends early when the budget is spent, but not before LEAST_ROUNDS."""
    rounds: list[Round] = []
    end = time.perf_counter() + budget_s
    for prompt in prompts:
        if len(rounds) >= LEAST_ROUNDS and time.perf_counter() > end:
            break
        rounds.append(run_round(session, prompt, output_tokens))
    return rounds


def run_round(session: Session, prompts: Tokens, output_tokens: int) -> Round:
    """Time one request of ``int64[batch, prompt]``. Raises IncorrectOutput on NaN or infinite logits."""
    token_ms = []
    cpu = CpuMeter()
    mark = time.perf_counter()
    logits = session.prefill(prompts)
    tokens = logits.argmax(axis=-1)
    now = time.perf_counter()
    ttft_ms, mark = (now - mark) * 1e3, now
    first_logits = logits
    for _ in range(output_tokens - 1):
        logits = session.decode(tokens)
        tokens = logits.argmax(axis=-1)
        now = time.perf_counter()
        token_ms.append((now - mark) * 1e3)
        mark = now
    foreign = cpu.foreign_cores()
    _require_finite(first_logits, "prefill")
    _require_finite(logits, "decode")
    return Round(ttft_ms=ttft_ms, token_ms=tuple(token_ms), foreign_cpu_share=foreign)


def _require_finite(logits: Logits, phase: str) -> None:
    if not np.isfinite(logits).all():
        raise IncorrectOutput(f"{phase} gave logits that are not finite")


def _evidence(
    job: MeasureJob,
    rounds: list[Round],
    warmups: list[Round],
    load_ms: float,
    peak_rss_bytes: int,
    facts: dict[str, str],
) -> Measurements:
    workload = job.workload
    requested = workload.output_tokens
    return Measurements(
        metrics={
            "ttft_ms": summarise([r.ttft_ms for r in rounds], "ms"),
            "tpot_ms": summarise([r.tpot_ms for r in rounds], "ms"),
            "e2e_ms": summarise([r.e2e_ms for r in rounds], "ms"),
            "tokens_per_s": summarise([workload.batch_size * 1e3 / r.tpot_ms for r in rounds], "tokens/s"),
            "throughput_tokens_per_s": summarise(
                [workload.batch_size * requested * 1e3 / r.e2e_ms for r in rounds], "tokens/s"
            ),
            "load_ms": summarise([load_ms], "ms"),
            "peak_rss_bytes": summarise([peak_rss_bytes], "bytes"),
        },
        warmups={
            "ttft_ms": tuple(r.ttft_ms for r in warmups),
            "tpot_ms": tuple(r.tpot_ms for r in warmups),
        },
        token_ms=tuple(r.token_ms for r in rounds),
        foreign_cpu_share=tuple(r.foreign_cpu_share for r in rounds),
        output_tokens_ratio=min(len(r.token_ms) + 1 for r in rounds) / requested,
        environment={**facts, "pid": str(os.getpid())},
    )


def read_peak_rss_bytes() -> int:
    """VmHWM of this process: the most physical memory it ever held, mapped files included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM line")


def score_candidate(job: ScoreJob) -> QualityReport:
    """Judge one candidate on both paths against the stored reference."""
    with device_lease(job.candidate.device, alone=False):
        session = job.open()
    # Two engines with a thread per core each would run several times slower side by side than in turn.
    with device_lease(job.candidate.device, alone=True):
        report = score(
            session,
            job.evaluation_set,
            job.reference,
            batch_size=job.options.batch_size,
            limit=job.min_quality,
        )
        session.close()
    return report


def make_reference(job: ReferenceJob) -> ReferenceDone:
    """Let the fp32 candidate predict the evaluation set, once for all others."""
    started = time.monotonic()
    with device_lease(job.candidate.device, alone=False):
        session = job.open()
    with device_lease(job.candidate.device, alone=True):
        compute_reference(session, job.evaluation_set, job.output)
        session.close()
    return ReferenceDone(path=job.output, seconds=time.monotonic() - started)
