"""One candidate's way through a study: exported, timed, judged. Whatever fails, the trial says so."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from open_autoglm import engines
from open_autoglm.engines.contract import SessionOptions
from open_autoglm.export.routes import library_versions
from open_autoglm.export.store import export_candidate
from open_autoglm.files import digest_of, file_lock
from open_autoglm.measure.isolation import Answer, Failure, run_isolated
from open_autoglm.measure.jobs import MeasureJob, OpenJob, ReferenceDone, ReferenceJob, ScoreJob
from open_autoglm.progress import announce
from open_autoglm.quality.reference import EvaluationSet
from open_autoglm.schemas import (
    Analysis,
    Candidate,
    Checkpoint,
    ExportedModel,
    Hardware,
    Measurements,
    Model,
    OptimizeSpec,
    QualityReport,
    Trial,
    Workload,
)
from open_autoglm.settings import Settings
from open_autoglm.study import StudyRef, load_trial, save_trial
from open_autoglm.units import quantity

_MEMORY_SHARE = 0.9
"""A child may take this share of the memory that is free when it starts."""


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
        longest = max(request, self.evaluation_set.layout.window_tokens)
        return SessionOptions(
            batch_size=self.workload.batch_size, max_tokens=longest, threads=self.hardware.cores
        )


def child_environment(settings: Settings, threads: int) -> dict[str, str]:
    """Threads for OpenMP runtimes, caches inside `home`, and no reaching for the network."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "TORCHINDUCTOR_CACHE_DIR": str(settings.home / "cache" / "inductor"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }


def begin_trial(study: StudyRef, candidate: Candidate, settings: Settings) -> Trial:
    """The trial as far as it got before, or a new one."""
    if candidate.vetoed_because is not None:
        trial = Trial(
            id=candidate.id,
            engine=candidate.engine,
            candidate=candidate,
            status="vetoed",
            reason=candidate.vetoed_because,
        )
        return save_trial(study, trial)
    known = load_trial(study, candidate.id, settings.trial_reuse_hours)
    if known is not None and known.candidate == candidate:
        return known
    return Trial(
        id=candidate.id, engine=candidate.engine, candidate=candidate, status="ok", reason="not run yet"
    )


def export_trial(study: StudyRef, checkpoint: Checkpoint, trial: Trial, settings: Settings) -> Trial:
    """Make or reuse the files the candidate needs."""
    if trial.status != "ok":
        return trial
    log = study.log_path(f"{trial.id}-export")
    exported = export_candidate(trial.candidate, checkpoint, settings, log)
    if isinstance(exported, Failure):
        return _failed(study, trial, "export", exported, log)
    if exported.route != "checkpoint as it is":
        how = "reused" if exported.reused else f"exported in {exported.build_s:.0f} s"
        announce(f"{trial.id}: {how} ({exported.route})")
    return trial.model_copy(update={"exported": exported})


def measure_trial(bench: Bench, trial: Trial, settings: Settings) -> Trial:
    """Time the candidate in a child of its own."""
    if trial.status != "ok" or trial.metrics:
        return trial
    log = bench.study.log_path(f"{trial.id}-benchmark")
    job = MeasureJob(
        candidate=trial.candidate,
        exported=_exported(trial),
        options=bench.options(),
        workload=bench.workload,
        timing_budget_s=bench.spec.timing_budget_s,
    )
    measured = _run("measure", job, Measurements, bench, log, settings)
    if isinstance(measured, Failure):
        return _failed(bench.study, trial, "benchmark", measured, log)
    metrics = measured.metrics
    told = {name: quantity(metric.median, metric.unit) for name, metric in metrics.items()}
    announce(f"{trial.id}: TTFT {told['ttft_ms']}, {told['tokens_per_s']}, {told['peak_rss_bytes']}")
    update = {"measurements": measured, "metrics": metrics, "reason": "timed, quality not judged yet"}
    return save_trial(bench.study, trial.model_copy(update=update))


def score_trial(bench: Bench, trial: Trial, reference: Path | Failure, settings: Settings) -> Trial:
    """Judge the candidate's output against the reference, in a child of its own."""
    if trial.status != "ok" or trial.quality is not None:
        return trial
    log = bench.study.log_path(f"{trial.id}-quality")
    if isinstance(reference, Failure):
        return _failed(bench.study, trial, "reference", reference, log)
    job = ScoreJob(
        candidate=trial.candidate,
        exported=_exported(trial),
        options=bench.options(),
        evaluation_set=bench.evaluation_set,
        reference=reference,
        min_quality=bench.spec.min_quality,
    )
    report = _run("score_candidate", job, QualityReport, bench, log, settings)
    if isinstance(report, Failure):
        return _failed(bench.study, trial, "quality", report, log)
    if not report.finite:
        failure = Failure("incorrect", "gave logits that are not finite")
        return _failed(bench.study, trial, "quality", failure, log)
    announce(f"{trial.id}: keeps {report.ratio:.2%} of the reference's quality ({report.worse_path})")
    update = {"quality": report, "reason": "timed and judged"}
    return save_trial(bench.study, trial.model_copy(update=update))


def prepare_reference(bench: Bench, analysis: Analysis, settings: Settings) -> Path | Failure:
    """The reference's predictions: computed once per checkpoint and evaluation set, then reused."""
    candidate = reference_candidate(analysis, bench.spec)
    key = digest_of([bench.checkpoint.digest, bench.evaluation_set.sha256, library_versions()])
    path = settings.home / "references" / f"{key[:32]}.npz"
    with file_lock(path.with_suffix(".lock")):
        if path.exists():
            announce("reference: reused")
            return path
        announce("reference: computing fp32 predictions for the evaluation texts")
        exported = export_candidate(candidate, bench.checkpoint, settings, bench.study.log_path("reference"))
        if isinstance(exported, Failure):
            return exported
        job = ReferenceJob(
            candidate=candidate,
            exported=exported,
            options=bench.options(),
            evaluation_set=bench.evaluation_set,
            output=path,
        )
        log = bench.study.log_path("reference")
        done = _run("make_reference", job, ReferenceDone, bench, log, settings)
    return done if isinstance(done, Failure) else done.path


def reference_candidate(analysis: Analysis, spec: OptimizeSpec) -> Candidate:
    """The fp32 torch candidate on the CPU: the yardstick, whether or not it takes part in the race."""
    proposed = engines.get("torch").propose(analysis, spec, "cpu")
    return next(candidate for candidate in proposed if candidate.reference)


def _run(
    name: str, job: OpenJob, answer_type: type[Answer], bench: Bench, log: Path, settings: Settings
) -> Answer | Failure:
    """Run one of `measure.jobs` in a child, with the threads, caches and limits all trials get."""
    return run_isolated(
        f"open_autoglm.measure.jobs:{name}",
        job,
        answer_type,
        log=log,
        timeout_s=settings.trial_timeout_s,
        environment=child_environment(settings, bench.hardware.cores),
        memory_limit_bytes=_memory_limit(job.candidate),
    )


def _exported(trial: Trial) -> ExportedModel:
    assert trial.exported is not None, "a trial is exported before it is opened"
    return trial.exported


def _memory_limit(candidate: Candidate) -> int | None:
    """CUDA reserves address space far beyond memory, so only CPU children are limited."""
    return int(psutil.virtual_memory().available * _MEMORY_SHARE) if candidate.device == "cpu" else None


def _failed(study: StudyRef, trial: Trial, stage: str, failure: Failure, log: Path) -> Trial:
    reason = f"{stage}: {failure.reason}"
    announce(f"{trial.id}: {failure.status} — {reason}")
    update = {
        "status": failure.status,
        "reason": reason,
        "log_path": os.path.relpath(log, study.root) if log.exists() else None,
    }
    return save_trial(study, trial.model_copy(update=update))
