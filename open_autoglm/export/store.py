"""The content-addressed store of exports: what was made once from the same inputs is not made again.

The key holds the checkpoint's digest, the engine, its recipe with the versions of the libraries that
write the files, and our own source that does. An entry whose files no longer match their digests is
rebuilt, and the trial says so.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from open_autoglm import engines
from open_autoglm.engines.contract import ExportContext
from open_autoglm.errors import UserError
from open_autoglm.files import (
    digest_files,
    digest_of,
    digest_sources,
    directory_atomic,
    file_lock,
    mismatch,
    write_atomic,
)
from open_autoglm.measure.isolation import Failure, run_isolated
from open_autoglm.measure.lease import preparing
from open_autoglm.recovery.store import transformed
from open_autoglm.schemas import Candidate, Checkpoint, ExportedModel, FileDigest, Model, ModelProfile
from open_autoglm.settings import Settings
from open_autoglm.units import quantity

RECORD = "export.json"


class ExportRecord(Model):
    """What lies beside the files of one export."""

    key: str
    route: str
    build_s: float
    files: tuple[FileDigest, ...]


class ExportJob(Model):
    """Payload of the export child."""

    candidate: Candidate
    checkpoint: Checkpoint
    context: ExportContext


class ExportDone(Model):
    """Answer of the export child."""

    route: str


class _ExportFailed(Exception):
    """Leaves the atomic directory, so that nothing half-written stays."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.failure = failure


def export_candidate(
    candidate: Candidate, checkpoint: Checkpoint, settings: Settings, log: Path
) -> ExportedModel | Failure:
    """The export of ``candidate``, from the store or made now in a child process.

    A candidate with a transform is exported from the checkpoint that its transform leaves.
    """
    if candidate.transform is None:
        return _exported(candidate, checkpoint, settings, log)
    left = transformed(checkpoint, candidate.transform, settings, log)
    if isinstance(left, Failure):
        return left
    exported = _exported(candidate, left.checkpoint, settings, log)
    if isinstance(exported, Failure):
        return exported
    return exported.model_copy(update={"recovery": left.recovery})


def _exported(
    candidate: Candidate, checkpoint: Checkpoint, settings: Settings, log: Path
) -> ExportedModel | Failure:
    recipe = engines.get(candidate.engine).recipe(candidate)
    if recipe is None:
        return _as_it_is(candidate, checkpoint)
    key = digest_of([checkpoint.digest, candidate.engine, recipe, _writers_digest()])
    directory = settings.exports / key[:32]
    with (
        file_lock(settings.exports / f"{key[:32]}.lock"),
        preparing(),
    ):  # even a digest disturbs a timed round
        problem = check_stored(directory)
        if problem is None:
            return _describe(candidate, directory, reused=True)
        try:
            _build(candidate, checkpoint, settings, directory, key, log)
        except _ExportFailed as stopped:
            return stopped.failure
        exported = _describe(candidate, directory, reused=False)
    if problem:
        exported = exported.model_copy(update={"details": {"rebuilt_because": problem}})
    return exported


def _as_it_is(candidate: Candidate, checkpoint: Checkpoint) -> ExportedModel:
    """For an engine that loads the checkpoint itself."""
    return ExportedModel(
        candidate_id=candidate.id,
        path=checkpoint.path,
        digest=checkpoint.digest,
        route="checkpoint as it is" if candidate.transform is None else "pruned checkpoint as it is",
        size_bytes=checkpoint.weight_bytes,
        build_s=0.0,
        reused=True,
        details={"trust_remote_code": checkpoint.trust_remote_code},
    )


def check_disk(candidates: Sequence[Candidate], profile: ModelProfile, directory: Path) -> None:
    """Raise UserError if the exports of ``candidates`` cannot fit on the disk of ``directory``.

    Counted are the quantised weights, the fp32 embedding, one fp32 copy while quantising, and one for each
    level of pruning.
    """
    able = [candidate for candidate in candidates if candidate.vetoed_because is None]
    exporting = [candidate for candidate in able if engines.get(candidate.engine).recipe(candidate)]
    pruned = {candidate.transform for candidate in able if candidate.transform is not None}
    if not exporting and not pruned:
        return
    embedding = 4 * profile.embedding_parameters
    needed = sum(profile.weight_bytes(c.weight_bits) + embedding for c in exporting)
    needed += profile.weight_bytes(32) * (len(pruned) + bool(exporting))
    nearest = next(folder for folder in (directory, *directory.parents) if folder.exists())
    free = shutil.disk_usage(nearest).free
    if free < needed:
        raise UserError(
            f"the exports need {quantity(needed, 'bytes')} and {nearest} has {quantity(free, 'bytes')} free: "
            "free some space, set AUTOGLM_HOME to another disk, or name fewer --engines"
        )


@cache
def _writers_digest() -> str:
    return digest_sources(Path(__file__).parent, (".",))


def check_stored(directory: Path) -> str | None:
    """None if a sound export lies in ``directory``, '' if there is none, else what is wrong with it."""
    if not (directory / RECORD).exists():
        return ""
    try:
        record = ExportRecord.model_validate_json((directory / RECORD).read_bytes())
    except ValueError:
        return f"{RECORD} of the stored export could not be read"
    return mismatch(directory, record.files, "the stored export")


def _build(
    candidate: Candidate, checkpoint: Checkpoint, settings: Settings, directory: Path, key: str, log: Path
) -> None:
    started = time.monotonic()
    for leftover in directory.parent.glob(f".{directory.name}.*"):  # of a run that was killed meanwhile
        shutil.rmtree(leftover)
    with directory_atomic(directory) as output:
        job = ExportJob(
            candidate=candidate,
            checkpoint=checkpoint,
            context=ExportContext(output=output, ledger=settings.ledger),
        )
        done = run_isolated(
            "open_autoglm.export.store:export_job",
            job,
            ExportDone,
            log=log,
            timeout_s=settings.trial_timeout_s,
        )
        if isinstance(done, Failure):
            raise _ExportFailed(done)
        record = ExportRecord(
            key=key,
            route=done.route,
            build_s=time.monotonic() - started,
            files=digest_files(output, [file for file in output.rglob("*") if file.is_file()]),
        )
        write_atomic(output / RECORD, record.model_dump_json(indent=2))


def export_job(job: ExportJob) -> ExportDone:
    """Runs in the child."""
    engine = engines.get(job.candidate.engine)
    return ExportDone(route=engine.export(job.candidate, job.checkpoint, job.context))


def _describe(candidate: Candidate, directory: Path, *, reused: bool) -> ExportedModel:
    record = ExportRecord.model_validate_json((directory / RECORD).read_bytes())
    return ExportedModel(
        candidate_id=candidate.id,
        path=directory,
        digest=digest_of([file.model_dump() for file in record.files]),
        route=record.route,
        size_bytes=sum(file.size_bytes for file in record.files),
        build_s=record.build_s,
        reused=reused,
    )
