"""The content-addressed store of pruned checkpoints: derived once from the same inputs, checked before reuse.

The key holds the whole checkpoint's digest, the level and the software. Both jobs, measuring importance and
cutting, run in children; what a child does wrong is returned as a Failure.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from open_autoglm.checkpoint import load_checkpoint
from open_autoglm.files import directory_atomic, file_lock, mismatch, write_atomic
from open_autoglm.measure.isolation import Failure, run_isolated
from open_autoglm.measure.lease import preparing
from open_autoglm.memo import key_of
from open_autoglm.progress import announce
from open_autoglm.pruning.importance import Importance, ImportanceJob
from open_autoglm.pruning.surgery import choose_heads, remove_heads
from open_autoglm.schemas import Checkpoint, HeadPruning, Model
from open_autoglm.settings import Settings


class PruningJob(Model):
    """Payload of :func:`pruning_job`."""

    checkpoint: Checkpoint
    pruning: HeadPruning
    importance: Importance
    directory: Path


def pruned_checkpoint(
    checkpoint: Checkpoint, pruning: HeadPruning, settings: Settings, log: Path
) -> Checkpoint | Failure:
    """``checkpoint`` less the heads that ``pruning`` removes, not recovered: from the store or made now."""
    directory = _directory(checkpoint, pruning, settings)
    with file_lock(_lock(directory)), preparing():
        stored, problem = _stored(directory)
        if stored is not None:
            return stored
        announce(f"{directory.name}: {_why_made(pruning, problem)}")
        importance = _importance(checkpoint, pruning.seed, settings, log)
        if isinstance(importance, Failure):
            return importance
        for leftover in directory.parent.glob(f".{directory.name}.*"):  # of a run that was killed meanwhile
            shutil.rmtree(leftover)
        job = PruningJob(checkpoint=checkpoint, pruning=pruning, importance=importance, directory=directory)
        done = run_isolated(
            "open_autoglm.pruning.store:pruning_job",
            job,
            Checkpoint,
            log=log,
            timeout_s=settings.trial_timeout_s,
        )
        if isinstance(done, Checkpoint):
            write_atomic(_record(directory), done.model_dump_json(indent=1))
        return done


def stored(checkpoint: Checkpoint, pruning: HeadPruning, settings: Settings) -> Checkpoint | None:
    """The pruned checkpoint, if it lies sound in the store."""
    return _stored(_directory(checkpoint, pruning, settings))[0]


def discard(checkpoint: Checkpoint, pruning: HeadPruning, settings: Settings) -> None:
    """Remove the pruned checkpoint from the store, if it is there."""
    directory = _directory(checkpoint, pruning, settings)
    with file_lock(_lock(directory)):
        _record(directory).unlink(missing_ok=True)
        shutil.rmtree(directory, ignore_errors=True)


def pruning_job(job: PruningJob) -> Checkpoint:
    """Runs in the child: cut, and validate the result like any checkpoint."""
    pruning, directory = job.pruning, job.directory
    kept = choose_heads(job.importance.by(pruning.criterion), pruning)
    with directory_atomic(directory) as output:
        remove_heads(job.checkpoint, kept, pruning, output)
        written = load_checkpoint(str(output))
    return written.model_copy(update={"path": directory, "name": directory.name})


def _directory(checkpoint: Checkpoint, pruning: HeadPruning, settings: Settings) -> Path:
    key = key_of("pruned", checkpoint.digest, pruning.model_dump())
    return settings.checkpoints / f"{checkpoint.name}-{pruning.suffix}-{key[:12]}"


def _record(directory: Path) -> Path:
    """Beside the checkpoint, not in it: the directory holds what a user's would."""
    return directory.with_name(f"{directory.name}.json")


def _lock(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.lock")


def _stored(directory: Path) -> tuple[Checkpoint | None, str]:
    """The sound checkpoint in ``directory``, or None and what is wrong with the one that is there."""
    if not _record(directory).exists():
        return None, ""
    try:
        found = Checkpoint.model_validate_json(_record(directory).read_bytes())
    except ValueError:
        return None, "its record could not be read"
    problem = mismatch(directory, found.files, "the stored checkpoint")
    return (None, problem) if problem else (found, "")


def _why_made(pruning: HeadPruning, problem: str) -> str:
    again = f"made again, because {problem}; " if problem else ""
    return f"{again}keeping {pruning.heads} of {pruning.of_heads} heads in each layer"


def _importance(checkpoint: Checkpoint, seed: int, settings: Settings, log: Path) -> Importance | Failure:
    """Measured once per checkpoint and calibration windows: every level asks for it."""
    job = ImportanceJob(checkpoint=checkpoint, seed=seed)
    key = key_of("importance", checkpoint.digest, job.model_dump(exclude={"checkpoint"}))
    path = settings.home / "importance" / f"{key[:32]}.json"
    with file_lock(path.with_suffix(".lock")):
        if path.exists():
            try:
                return Importance.model_validate_json(path.read_bytes())
            except ValueError:
                announce(f"{path} could not be read: the importance of heads is measured again")
        announce(f"{checkpoint.name}: measuring the importance of heads on the calibration texts")
        reference = "open_autoglm.pruning.importance:measure_importance"
        found = run_isolated(reference, job, Importance, log=log, timeout_s=settings.trial_timeout_s)
        if isinstance(found, Importance):
            write_atomic(path, found.model_dump_json())
        return found
