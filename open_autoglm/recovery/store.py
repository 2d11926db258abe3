"""The content-addressed store of recovered checkpoints: what was learned once from the same inputs is kept.

The key holds the digests of both checkpoints, the budget, the seed and the software. The learning runs in a
child, in slices: after each its state is on disk, a line is told, and a timed round may have the device.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from open_autoglm.files import file_lock, mismatch, write_atomic
from open_autoglm.measure.isolation import Answer, Child, Failure
from open_autoglm.measure.lease import preparing
from open_autoglm.memo import key_of
from open_autoglm.progress import announce
from open_autoglm.pruning import store as pruned_store
from open_autoglm.pruning.store import pruned_checkpoint
from open_autoglm.quality.metrics import mean_interval
from open_autoglm.recovery.state import Look, Progress
from open_autoglm.recovery.training import (
    Begun,
    Finished,
    FinishJob,
    RecoveryJob,
    SliceJob,
)
from open_autoglm.schemas import Checkpoint, HeadPruning, Model, Recovery
from open_autoglm.settings import Settings

SLICE_S = 20.0
"""The most work that is lost when a recovery is killed, and the most that a timed round waits for it."""

_JOBS = "open_autoglm.recovery.training"


class Recovered(Model):
    """A recovery's result, and its record in the store."""

    checkpoint: Checkpoint
    """The recovered one; the pruned one itself if recovery did not help."""
    recovery: Recovery
    whole_digest: str
    pruned_digest: str
    pruning: HeadPruning
    progress: Progress


class Transformed(Model):
    """What a candidate's transform leaves of the checkpoint."""

    checkpoint: Checkpoint
    recovery: Recovery | None = None


def transformed(
    checkpoint: Checkpoint, pruning: HeadPruning, settings: Settings, log: Path
) -> Transformed | Failure:
    """``checkpoint`` less the heads that ``pruning`` removes, recovered if it asks for that."""
    pruned = pruned_checkpoint(checkpoint, pruning.unrecovered, settings, log)
    if isinstance(pruned, Failure):
        return pruned
    if not pruning.recover_steps:
        return Transformed(checkpoint=pruned)
    recovered = recover(checkpoint, pruned, pruning, settings, log)
    if isinstance(recovered, Failure):
        return recovered
    return Transformed(checkpoint=recovered.checkpoint, recovery=recovered.recovery)


def recover(
    whole: Checkpoint, pruned: Checkpoint, pruning: HeadPruning, settings: Settings, log: Path
) -> Recovered | Failure:
    """``pruned``, distilled from ``whole`` within the budget of ``pruning``: from the store, gone on with
    where it was interrupted, or made now."""
    place = _Place(whole, pruned, pruning, settings)
    with file_lock(place.lock):
        with preparing():
            stored, problem = place.stored()
        if stored is not None:
            return stored
        again = f"again, because {problem}; " if problem else ""
        announce(f"{place.directory.name}: {again}recovering, {pruning.recover_steps} steps at most")
        place.clear()
        with Child(log) as child:
            found = _Learning(place, child, settings.trial_timeout_s).run()
        if isinstance(found, Recovered):
            announce(f"{place.directory.name}: {found.recovery.reason}")
            write_atomic(place.record, found.model_dump_json(indent=1))
            place.state.unlink(missing_ok=True)
        return found


def discard(checkpoint: Checkpoint, pruning: HeadPruning, settings: Settings) -> None:
    """Remove what `transformed` put into the store, if it is there."""
    plain = pruning.unrecovered
    pruned = pruned_store.stored(checkpoint, plain, settings)
    if pruned is not None and pruning.recover_steps:
        place = _Place(checkpoint, pruned, pruning, settings)
        with file_lock(place.lock):
            place.record.unlink(missing_ok=True)
            place.state.unlink(missing_ok=True)
            shutil.rmtree(place.directory, ignore_errors=True)
    pruned_store.discard(checkpoint, plain, settings)


class _Place:
    """Where one recovery lies."""

    def __init__(
        self, whole: Checkpoint, pruned: Checkpoint, pruning: HeadPruning, settings: Settings
    ) -> None:
        self.whole, self.pruned, self.pruning = whole, pruned, pruning
        budget = [pruning.recover_steps, pruning.recover_s, pruning.seed]
        self.key = key_of("recovered", whole.digest, pruned.digest, budget)
        self.directory = settings.checkpoints / f"{whole.name}-{pruning.suffix}-{self.key[:12]}"
        self.record = self._beside("json")
        self.state = self._beside("state")
        self.lock = self._beside("lock")

    def _beside(self, suffix: str) -> Path:
        """Not in it: the directory holds what a user's would."""
        return self.directory.with_name(f"{self.directory.name}.{suffix}")

    def clear(self) -> None:
        """Remove what a run that was killed was writing: a checkpoint is a folder, a state is a file."""
        for leftover in self.directory.parent.glob(f".{self.directory.name}.*"):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()

    def stored(self) -> tuple[Recovered | None, str]:
        """The sound result that lies there, or None and what is wrong with it."""
        if not self.record.exists():
            return None, ""
        try:
            found = Recovered.model_validate_json(self.record.read_bytes())
        except ValueError:
            return None, "its record could not be read"
        problem = mismatch(found.checkpoint.path, found.checkpoint.files, "the recovered checkpoint")
        return (None, problem) if problem else (found, "")


class _Learning:
    """The parent's side of one recovery: it asks the child for one slice after another."""

    def __init__(self, place: _Place, child: Child, timeout_s: float) -> None:
        self._place, self._child, self._timeout_s = place, child, timeout_s

    def run(self) -> Recovered | Failure:
        interrupted = self._place.state.exists()
        begun = self._ask("begin", self._job(), Begun)
        if isinstance(begun, Failure):
            return begun
        progress: Progress | Failure = begun.progress
        if interrupted:
            where = f"goes on after step {begun.progress.step}"
            lost = "begins again, because its state could not be read"
            announce(f"{self._place.directory.name}: {where if begun.progress.looks else lost}")
        while isinstance(progress, Progress) and not progress.ended:
            progress = self._ask("go_on", SliceJob(seconds=SLICE_S), Progress)
            if isinstance(progress, Progress):
                announce(f"{self._place.directory.name}: {progress_words(progress)}")
        if isinstance(progress, Failure):
            return progress
        return self._settle(progress, begun.parameters)

    def _job(self) -> RecoveryJob:
        pruning = self._place.pruning
        return RecoveryJob(
            key=self._place.key,
            whole=self._place.whole,
            pruned=self._place.pruned,
            steps=pruning.recover_steps,
            seconds=pruning.recover_s,
            seed=pruning.seed,
            state=self._place.state,
        )

    def _ask(self, job: str, payload: Model, answer_type: type[Answer]) -> Answer | Failure:
        """Hold the device, with other preparations, only while the child works."""
        with preparing():
            return self._child.ask(f"{_JOBS}:{job}", payload, answer_type, self._timeout_s)

    def _settle(self, progress: Progress, parameters: int) -> Recovered | Failure:
        """Keep what was learned if it is nearer to the whole model beyond noise, else what was pruned."""
        if progress.diverged or progress.best.step == 0:
            why = progress.ended if progress.diverged else "no step came nearer to the whole model"
            return self._recovered(progress, parameters, None, why)
        directory = self._place.directory
        finished = self._ask("finish", FinishJob(directory=directory), Finished)
        if isinstance(finished, Failure):
            return finished
        gain = _gain(progress.looks[0], finished.look)
        if gain[0] <= 0:
            shutil.rmtree(directory)
            why = f"the gain is not beyond noise ({_words(gain)} nats per token)"
            return self._recovered(progress, parameters, None, why)
        return self._recovered(progress, parameters, finished, "")

    def _recovered(
        self, progress: Progress, parameters: int, finished: Finished | None, why_not: str
    ) -> Recovered:
        place, before = self._place, progress.looks[0] if progress.looks else None
        after = before if finished is None else finished.look
        told = f"recovery did not help, so the pruned checkpoint is kept as it was: {why_not}"
        gain = None
        if finished is not None and before is not None:
            gain = _gain(before, finished.look)
            told = (
                f"recovered after {progress.best.step} steps: KL from the whole model {before.mean:.3g} → "
                f"{finished.look.mean:.3g} nats per token of held-out text (gain {_words(gain)})"
            )
        return Recovered(
            checkpoint=place.pruned if finished is None else finished.checkpoint,
            recovery=Recovery(
                helped=finished is not None,
                reason=f"{told}; {progress.step} of {place.pruning.recover_steps} steps in "
                f"{progress.seconds:.0f} s",
                steps=progress.step,
                kept_step=0 if finished is None else progress.best.step,
                seconds=progress.seconds,
                learning_parameters=parameters,
                tokens=progress.tokens,
                divergence_before=before.mean if before else None,
                divergence_after=after.mean if after else None,
                gain_interval=gain,
                record=place.record,
            ),
            whole_digest=place.whole.digest,
            pruned_digest=place.pruned.digest,
            pruning=place.pruning,
            progress=progress,
        )


def _gain(before: Look, after: Look) -> tuple[float, float]:
    """95 % interval of the mean of before - after, block by block, in nats per token."""
    return mean_interval((np.array(before.divergences) - np.array(after.divergences))[:, None])


def _words(interval: tuple[float, float]) -> str:
    return f"95 %: {interval[0]:.3g} to {interval[1]:.3g}"


def progress_words(progress: Progress) -> str:
    """``step 20 of 100, loss 0.513 nats per token, held out 0.622 → 0.547, 86 s``."""
    recent = progress.losses[-5:]
    loss = f"loss {sum(recent) / len(recent):.3g} nats per token, " if recent else ""
    held_out = ""
    if progress.looks:
        first, last = progress.looks[0].mean, progress.looks[-1].mean
        held_out = f"held out {first:.3g} → {last:.3g}, "
    return f"step {progress.step} of {progress.planned_steps}, {loss}{held_out}{progress.seconds:.0f} s"
