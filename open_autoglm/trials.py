"""One candidate's way to the race: exported, looked at in a process of its own, judged. Whatever fails, the
trial says so."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, Self

from open_autoglm import engines
from open_autoglm.engines.contract import RAN_ELSEWHERE, SessionOptions, draft_tokens_of, threads_of
from open_autoglm.export.store import export_candidate
from open_autoglm.files import file_lock
from open_autoglm.hardware import read_memory
from open_autoglm.measure import jobs
from open_autoglm.measure.isolation import Answer, Child, Failure
from open_autoglm.measure.lease import device_lease
from open_autoglm.measure.scenarios import LEAD_IN_TOKENS
from open_autoglm.memo import Memo, key_of
from open_autoglm.progress import announce
from open_autoglm.quality.reference import EvaluationSet, golden_prompts
from open_autoglm.schemas import (
    Analysis,
    Candidate,
    Checkpoint,
    ExportedModel,
    GoldenPrompt,
    Hardware,
    Model,
    OptimizeSpec,
    QualityReport,
    Round,
    Screening,
    Trial,
    Workload,
)
from open_autoglm.settings import Settings
from open_autoglm.study import StudyRef, save_trial
from open_autoglm.units import quantity

_MEMORY_SHARE = 0.9
"""A child may take this share of the memory that is free when it starts."""

SLICE_WINDOWS = 1
"""Windows of each text that the screening reads; enough to see that an engine is hopeless."""

SHORT_OUTPUT_TOKENS, SHORT_ROUNDS = 16, 3
DRAFTED_OUTPUT_TOKENS = 64
"""Drafts are right more often the longer a text is, so the first few tokens would say too little."""
"""The screening's rounds have the workload's prompts: compiled engines would compile again for others."""


class Bench(Model):
    """What every trial of a study has in common."""

    study: StudyRef
    spec: OptimizeSpec
    checkpoint: Checkpoint
    hardware: Hardware
    workload: Workload
    evaluation_set: EvaluationSet

    def options(self) -> SessionOptions:
        """One cache size for timing and scoring, so that both run the same kernels."""
        request = self.workload.prompt_tokens + self.workload.output_tokens
        timed = min(request + LEAD_IN_TOKENS, self.checkpoint.context_tokens)
        longest = max(timed, self.evaluation_set.layout.window_tokens)
        return SessionOptions(
            batch_size=self.workload.batch_size, max_tokens=longest, threads=self.hardware.cores
        )


class Screened(Model):
    """What a first look found out; kept for the next study that asks the same."""

    screening: Screening
    quality: QualityReport


class Stopped(Exception):
    """Leaves a conversation with a child; the failure is the trial's."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.failure = failure


# ── children ─────────────────────────────────────────────────────────────────────────────────────


class Conversation:
    """A child that holds one candidate's session, opened where others may prepare too.

    Raises Stopped, here and in every question, where the child gives no answer. Close it, or leave its block.
    """

    def __init__(self, bench: Bench, trial: Trial, log: Path, settings: Settings) -> None:
        candidate = trial.candidate
        self._device = candidate.device
        self._timeout_s = settings.trial_timeout_s
        options = bench.options()
        threads = threads_of(candidate, options)
        job = jobs.OpenJob(
            candidate=candidate, exported=exported_of(trial), options=options, workload=bench.workload
        )
        with device_lease(candidate.device, alone=False):  # a process that starts disturbs others, too
            self._child = Child(
                log,
                environment=child_environment(settings, threads),
                memory_limit_bytes=_memory_limit(candidate),
                cpus=cores_for(threads),
            )
            self.load_ms = self.ask("open_session", job, jobs.Opened).load_ms

    def ask(self, name: str, payload: Model, answer_type: type[Answer]) -> Answer:
        answer = self._child.ask(f"{jobs.PREFIX}:{name}", payload, answer_type, self._timeout_s)
        if isinstance(answer, Failure):
            raise Stopped(answer)
        return answer

    def first_request(self) -> jobs.FirstRequest:
        """Answer one request: what compiles or reads for the first time does it here, not in a round.

        Raises Stopped also where another device or provider ran it than the candidate names.
        """
        with device_lease(self._device, alone=False):
            first = self.ask("first_request", jobs.Nothing(), jobs.FirstRequest)
        if elsewhere := first.facts.get(RAN_ELSEWHERE):
            self.close()
            raise Stopped(Failure("failed", f"ran elsewhere: {elsewhere}"))
        return first

    def close(self) -> None:
        self._child.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def cores_for(threads: int) -> tuple[int, ...]:
    """As many cores as threads, so that fewer threads do not wander; () for all there are."""
    usable = sorted(os.sched_getaffinity(0))
    return tuple(usable[:threads]) if threads < len(usable) else ()


def child_environment(settings: Settings, threads: int) -> dict[str, str]:
    """Threads for OpenMP runtimes, caches inside `home`, and no reaching for the network."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "TORCHINDUCTOR_CACHE_DIR": str(settings.home / "cache" / "inductor"),
        "TRITON_CACHE_DIR": str(settings.home / "cache" / "triton"),
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # as the driver's tools count them
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }


def _memory_limit(candidate: Candidate) -> int | None:
    """CUDA reserves address space far beyond memory, so only CPU children are limited."""
    return int(read_memory()[1] * _MEMORY_SHARE) if candidate.device == "cpu" else None


# ── stages ───────────────────────────────────────────────────────────────────────────────────────


def begin_trial(study: StudyRef, candidate: Candidate) -> Trial:
    """A new trial; a vetoed candidate's is over before it began."""
    vetoed = candidate.vetoed_because
    trial = Trial(
        id=candidate.id,
        engine=candidate.engine,
        candidate=candidate,
        status="ok" if vetoed is None else "vetoed",
        reason=vetoed or "not run yet",
    )
    return trial if vetoed is None else save_trial(study, trial)


def export_trial(study: StudyRef, checkpoint: Checkpoint, trial: Trial, settings: Settings) -> Trial:
    """Make or reuse the files the candidate needs."""
    if trial.status != "ok":
        return trial
    log = study.log_path(f"{trial.id}-export")
    exported = export_candidate(trial.candidate, checkpoint, settings, log)
    if isinstance(exported, Failure):
        return fail_trial(study, trial, "export", exported, log)
    made = engines.get(trial.candidate.engine).recipe(trial.candidate) is not None
    if made and not exported.reused:
        announce(f"{trial.id}: exported in {exported.build_s:.0f} s ({exported.route})")
    reused = ("export",) if made and exported.reused else ()
    return trial.model_copy(update={"exported": exported, "reused": reused})


def screen_trial(bench: Bench, trial: Trial, reference: Path | Failure, settings: Settings) -> Trial:
    """A first look in a fresh process: memory, quality on a slice, a few short rounds."""
    if trial.status != "ok":
        return trial
    log = bench.study.log_path(f"{trial.id}-screening")
    if isinstance(reference, Failure):
        return fail_trial(bench.study, trial, "reference", reference, log)
    memo, key = Memo(settings, "screenings"), key_of("screening", *quality_inputs(bench, trial))
    known = memo.get(key, Screened)
    if known is None:
        try:
            found = _screen(bench, trial, reference, log, settings)
        except Stopped as stopped:
            return fail_trial(bench.study, trial, "screening", stopped.failure, log)
        memo.put(key, found)
    else:
        found, trial = known, reused(trial, "screening")
    told = f"about {quantity(found.screening.estimated_e2e_ms, 'ms')} a request"
    memory = quantity(found.screening.footprint.peak_rss_bytes, "bytes")
    announce(f"{trial.id}: {told}, {memory}, keeps {found.quality.ratio:.1%} of the quality on a slice")
    update = {"screening": found.screening, "quality": found.quality, "reason": "screened"}
    return save_trial(bench.study, trial.model_copy(update=update))


def _screen(bench: Bench, trial: Trial, reference: Path, log: Path, settings: Settings) -> Screened:
    with Conversation(bench, trial, log, settings) as talk:
        first = talk.first_request()
        with device_lease(trial.candidate.device, alone=True):
            quality = talk.ask("score_session", score_job(bench, reference, SLICE_WINDOWS), QualityReport)
            if not quality.finite:
                raise Stopped(Failure("incorrect", quality.not_finite))
            rounds = [
                talk.ask("timed_round", job, Round) for job in short_jobs(bench.workload, trial.candidate)
            ]
    return Screened(
        screening=Screening(
            footprint=first.footprint,
            load_ms=talk.load_ms,
            first_request_ms=first.first_request_ms,
            prompt_tokens=bench.workload.prompt_tokens,
            output_tokens=short_output_tokens(bench.workload, trial.candidate),
            rounds=tuple(rounds),
            estimated_e2e_ms=_estimate_e2e_ms(bench.workload, rounds),
            facts=first.facts,
        ),
        quality=quality,
    )


def short_jobs(workload: Workload, candidate: Candidate) -> list[jobs.RoundJob]:
    """Rounds with the workload's prompts and few new tokens; the session has answered a request before."""
    output = short_output_tokens(workload, candidate)
    return [jobs.RoundJob(index=index, output_tokens=output) for index in range(SHORT_ROUNDS)]


def short_output_tokens(workload: Workload, candidate: Candidate) -> int:
    """New tokens of a short round's request."""
    most = DRAFTED_OUTPUT_TOKENS if draft_tokens_of(candidate) else SHORT_OUTPUT_TOKENS
    return min(most, workload.output_tokens)


def _estimate_e2e_ms(workload: Workload, rounds: list[Round]) -> float:
    """As if all tokens took as long as the first few: good enough to tell the hopeless.

    The best round has least noise. With drafts rounds differ by their texts, and the best was the luckiest.
    """
    best = min(rounds, key=lambda r: r.e2e_ms[0])
    tpot_ms = fmean(r.tpot_ms[0] for r in rounds) if best.drafted_tokens else best.tpot_ms[0]
    return best.ttft_ms[0] + tpot_ms * (workload.output_tokens - 1)


def evaluate_trial(bench: Bench, trial: Trial, reference: Path | Failure, settings: Settings) -> Trial:
    """Judge in full what the slice left unclear, in a fresh process."""
    quality = trial.quality
    settled = quality is not None and all(
        path.clear_of_limit and path.clear_of_flips for path in (quality.prefill, quality.decode)
    )
    if trial.status != "ok" or quality is None or settled:
        return trial
    log = bench.study.log_path(f"{trial.id}-quality")
    assert not isinstance(reference, Failure), "without a reference nothing is screened"
    memo, key = Memo(settings, "quality"), key_of("quality", *_outputs(bench, trial, quality))
    with memo.lock(key):  # its twin may be at it
        report = memo.get(key, QualityReport)
        if report is None:
            try:
                report = judge_in_full(bench, trial, reference, log, settings)
            except Stopped as stopped:
                return fail_trial(bench.study, trial, "quality", stopped.failure, log)
            memo.put(key, report)
        else:
            trial = reused(trial, "quality")
    announce(f"{trial.id}: keeps {report.ratio:.2%} of the reference's quality ({report.worse_path})")
    return save_trial(bench.study, trial.model_copy(update={"quality": report}))


def judge_in_full(
    bench: Bench, trial: Trial, reference: Path, log: Path, settings: Settings
) -> QualityReport:
    """Judge an exported trial against the stored reference, in a process of its own. Raises Stopped."""
    # Two engines with a thread per core each would score several times slower side by side than in turn.
    with (
        Conversation(bench, trial, log, settings) as talk,
        device_lease(trial.candidate.device, alone=True),
    ):
        report = talk.ask("score_session", score_job(bench, reference), QualityReport)
    if not report.finite:
        raise Stopped(Failure("incorrect", report.not_finite))
    return report


def score_job(bench: Bench, reference: Path, windows: int | None = None) -> jobs.ScoreJob:
    """Judge so many windows of each text; None for as many as the verdict takes."""
    return jobs.ScoreJob(
        evaluation_set=bench.evaluation_set,
        reference=reference,
        min_quality=bench.spec.min_quality,
        max_token_flips=bench.spec.max_token_flips,
        windows=windows,
    )


def prepare_reference(bench: Bench, analysis: Analysis, settings: Settings) -> Path | Failure:
    """The reference's predictions: computed once per checkpoint and evaluation set, then reused."""
    candidate = reference_candidate(analysis, bench.spec)
    path = reference_path(bench, settings)
    log = bench.study.log_path("reference")
    with file_lock(path.with_suffix(".lock")):
        if path.exists():
            announce("reference: reused")
            return path
        announce("reference: computing fp32 predictions for the evaluation texts")
        exported = export_candidate(candidate, bench.checkpoint, settings, log)
        if isinstance(exported, Failure):
            return exported
        trial = begin_trial(bench.study, candidate).model_copy(update={"exported": exported})
        job = jobs.ReferenceJob(evaluation_set=bench.evaluation_set, output=path)
        try:
            with Conversation(bench, trial, log, settings) as talk, device_lease("cpu", alone=True):
                return talk.ask("make_reference", job, jobs.ReferenceDone).path
        except Stopped as stopped:
            return stopped.failure


def reference_path(bench: Bench, settings: Settings) -> Path:
    """Where the reference's predictions are kept, or will be."""
    key = key_of("reference", bench.checkpoint.digest, bench.evaluation_set.sha256)
    return settings.home / "references" / f"{key[:32]}.npz"


def golden_of(bench: Bench, trial: Trial, settings: Settings) -> tuple[GoldenPrompt, ...]:
    """What a server of ``trial`` can be tried by; nothing if it was not judged."""
    if trial.quality is None:
        return ()
    path = reference_path(bench, settings)
    return golden_prompts(bench.evaluation_set, path, trial.quality.greedy_same_tokens)


def reference_candidate(analysis: Analysis, spec: OptimizeSpec) -> Candidate:
    """The fp32 torch candidate on the CPU: the yardstick, whether or not it takes part in the race."""
    proposed = engines.get("torch").propose(analysis, spec, "cpu")
    return next(candidate for candidate in proposed if candidate.reference)


# ── identity and failure ─────────────────────────────────────────────────────────────────────────


def inputs_of(bench: Bench, trial: Trial) -> list[Any]:
    """What the timing of a trial depends on, apart from the software."""
    candidate = trial.candidate
    workload = bench.workload.model_dump(mode="json", exclude={"path"})
    return [
        configuration(candidate),
        exported_of(trial).digest,
        bench.checkpoint.digest,
        bench.options().model_dump(),
        workload,
        bench.hardware.fingerprint,
    ]


def configuration(candidate: Candidate) -> Mapping[str, Any]:
    """What a candidate is, without what is said about it: two that agree in it are the same engine."""
    return candidate.model_dump(include={"engine", "device", "precision", "knobs", "transform"})


def quality_inputs(bench: Bench, trial: Trial) -> list[Any]:
    """What the judgement of a trial depends on, apart from the software."""
    spec = bench.spec
    return [*inputs_of(bench, trial), bench.evaluation_set.sha256, spec.min_quality, spec.max_token_flips]


def _outputs(bench: Bench, trial: Trial, slice_: QualityReport) -> list[Any]:
    """What a full judgement depends on. Candidates with the same files, such as those that differ in
    threads, and with the same perplexities on the slice to the last bit compute the same: one is judged."""
    exact = [
        (path.perplexity, path.kl_divergence, path.top1_agreement) for path in (slice_.prefill, slice_.decode)
    ]
    return [
        trial.engine,
        exported_of(trial).digest,
        bench.checkpoint.digest,
        bench.options().model_dump(),
        bench.evaluation_set.sha256,
        bench.spec.min_quality,
        bench.spec.max_token_flips,
        bench.hardware.fingerprint,
        exact,
    ]


def exported_of(trial: Trial) -> ExportedModel:
    assert trial.exported is not None, "a trial is exported before it is opened"
    return trial.exported


def reused(trial: Trial, stage: str) -> Trial:
    return trial.model_copy(update={"reused": (*trial.reused, stage)})


def fail_trial(study: StudyRef, trial: Trial, stage: str, failure: Failure, log: Path) -> Trial:
    """The trial with its status and reason, kept and told."""
    reason = f"{stage}: {failure.reason}"
    announce(f"{trial.id}: {failure.status} — {reason}")
    update = {
        "status": failure.status,
        "reason": reason,
        "log_path": os.path.relpath(log, study.root) if log.exists() else None,
    }
    return save_trial(study, trial.model_copy(update=update))
