"""The distillation itself, in a child: a few steps at a time, each slice of them saved before it is told.

The pruned model learns to predict what the whole one does: the mean over tokens of KL(whole‖pruned) at
temperature 1 (Hinton et al., "Distilling the Knowledge in a Neural Network", 2015), by AdamW with a short
warm-up and a cosine's decay. All of it in fp32, in which the judges read: on a CPU without matrix units for
bf16 that is also the faster one.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from open_autoglm.checkpoint import load_checkpoint
from open_autoglm.engines.contract import Tokens
from open_autoglm.files import directory_atomic
from open_autoglm.pruning.importance import load_fp32
from open_autoglm.quality.metrics import blocks_of
from open_autoglm.recovery.adapters import Adapters, write_merged
from open_autoglm.recovery.state import Look, Progress, load, save
from open_autoglm.recovery.texts import lessons, window_in_turn
from open_autoglm.schemas import Checkpoint, Model

if TYPE_CHECKING:
    import torch

LEARNING_RATE = 3e-3
"""On the demo GLM without a group of its three, 17 single windows took a held-out KL of 2.93 nats to 0.87 at
this rate and to 1.23 at a third of it; norms, o_proj and down_proj themselves, at 3e-4, came to 1.18 with
eight times as many numbers to learn."""
WINDOWS_PER_STEP = 2
"""Their gradients are added, one window in memory at a time."""
WARM_UP_STEPS = 10
LOOKS = 10
"""How often the held-out windows are looked at, besides the start."""
LARGEST_GRADIENT = 1.0
"""Norm to which a step's gradient is clipped."""

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW remembers of a tensor."""


class RecoveryJob(Model):
    """Payload of :func:`begin`."""

    key: str
    whole: Checkpoint
    pruned: Checkpoint
    steps: int
    seconds: float
    seed: int
    state: Path


class Begun(Model):
    """Answer of :func:`begin`."""

    progress: Progress
    parameters: int = Field(description="that learn")


class SliceJob(Model):
    """Payload of :func:`go_on`."""

    seconds: float


class FinishJob(Model):
    """Payload of :func:`finish`."""

    directory: Path


class Finished(Model):
    """Answer of :func:`finish`: what was written, and a look at it, as it is stored."""

    checkpoint: Checkpoint
    look: Look


@dataclass
class _Came:
    """How far: what of `Progress` changes."""

    planned_steps: int
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    ended: str = ""
    diverged: bool = False


class Training:
    """One recovery in this process, from the beginning or from where its state says."""

    def __init__(self, job: RecoveryJob) -> None:
        import torch

        self._job = job
        self._teacher = load_fp32(job.whole.path).requires_grad_(False)
        self._student = load_fp32(job.pruned.path).requires_grad_(False)
        self._learning = Adapters(self._student, job.seed).tensors
        self._best = _copies(self._learning)
        self._optimiser = torch.optim.AdamW(self._learning.values(), lr=LEARNING_RATE, weight_decay=0.0)
        self._texts = lessons(job.whole)
        self._came = _Came(planned_steps=job.steps)
        if (found := load(job.state, job.key)) is not None:
            self._take_up(*found)

    @property
    def parameters(self) -> int:
        """How many learn."""
        return sum(tensor.numel() for tensor in self._learning.values())

    @property
    def progress(self) -> Progress:
        return Progress(key=self._job.key, **vars(self._came))

    def go_on(self, seconds: float) -> Progress:
        """Train for about ``seconds``, one step at least, or to the end; save the state and return it."""
        came, started, before_s = self._came, time.monotonic(), self._came.seconds
        while not came.ended and came.seconds - before_s < seconds:
            if not came.looks:
                self._look()
            else:
                self._step()
            came.seconds = before_s + time.monotonic() - started
            self._end_or_plan()
        self._save()
        return self.progress

    def finish(self, directory: Path) -> Finished:
        """Write the best weights as the checkpoint ``directory``, all or nothing, and look at them there."""
        student, prefix = self._job.pruned, self._student.base_model_prefix
        with directory_atomic(directory) as output:
            write_merged(student, self._best, prefix, output)
            written = load_checkpoint(str(output))
            self._student = load_fp32(output).requires_grad_(False)
            look = Look(step=self.progress.best.step, divergences=self._held_out())
        return Finished(
            checkpoint=written.model_copy(update={"path": directory, "name": directory.name}), look=look
        )

    # ── steps ────────────────────────────────────────────────────────────────────────────────────

    def _step(self) -> None:
        import torch
        from torch.nn.utils import clip_grad_norm_

        came, loss = self._came, 0.0
        self._optimiser.zero_grad()
        for index in range(WINDOWS_PER_STEP * came.step, WINDOWS_PER_STEP * (came.step + 1)):
            window = window_in_turn(index, len(self._texts.learned), self._job.seed)
            part = self._divergences(self._texts.learned[window]).mean() / WINDOWS_PER_STEP
            part.backward()  # type: ignore[no-untyped-call]
            loss += float(part.detach())
            came.tokens += self._texts.learned.shape[1]
        norm = clip_grad_norm_(self._learning.values(), LARGEST_GRADIENT)
        if not math.isfinite(loss) or not bool(torch.isfinite(norm)):
            self._diverge("its loss or a derivative of it")
            return
        for group in self._optimiser.param_groups:
            group["lr"] = learning_rate(came.step, came.planned_steps)
        self._optimiser.step()
        came.step += 1
        came.losses.append(loss)
        if came.step == came.planned_steps or came.step % max(1, came.planned_steps // LOOKS) == 0:
            self._look()

    def _look(self) -> None:
        """At the held-out windows; the best weights so far are remembered."""
        came, look = self._came, Look(step=self._came.step, divergences=self._held_out())
        if not math.isfinite(look.mean):
            self._diverge("its loss on the held-out windows")
            return
        came.looks.append(look)
        if self.progress.best.step == look.step:
            self._best = _copies(self._learning)

    def _diverge(self, what: str) -> None:
        self._came.diverged = True
        self._came.ended = f"diverged: {what} is not finite after {self._came.step} steps"

    def _end_or_plan(self) -> None:
        """End when there is nothing left; after the warm-up plan as many steps as there is time for.

        So the learning rate decays to the end on a slow machine too, and the plan is part of the state.
        """
        came, budget_s = self._came, self._job.seconds
        if came.ended:
            return
        if came.step == WARM_UP_STEPS:
            affordable = int(came.step * budget_s / came.seconds)
            came.planned_steps = max(came.step, min(self._job.steps, affordable))
        if came.step >= came.planned_steps or came.seconds >= budget_s:
            if came.looks[-1].step < came.step:
                self._look()
            came.ended = came.ended or f"{came.step} of {self._job.steps} steps in {came.seconds:.0f} s"

    def _held_out(self) -> tuple[float, ...]:
        import torch

        means: list[float] = []
        with torch.no_grad():
            for window in self._texts.held_out:
                values = self._divergences(window).numpy()
                means += [float(block.mean()) for block in np.array_split(values, blocks_of(len(values)))]
        return tuple(means)

    def _divergences(self, window: Tokens) -> torch.Tensor:
        """KL(whole‖pruned) at each position of ``window[n]``, in nats: ``float32[n]``."""
        import torch
        from torch.nn.functional import kl_div, log_softmax

        ids = torch.from_numpy(window)[None]
        with torch.no_grad():
            wanted = log_softmax(self._teacher(input_ids=ids, use_cache=False).logits[0], dim=-1)
        found = log_softmax(self._student(input_ids=ids, use_cache=False).logits[0], dim=-1)
        return kl_div(found, wanted, reduction="none", log_target=True).sum(-1)

    # ── state ────────────────────────────────────────────────────────────────────────────────────

    def _save(self) -> None:
        moments = self._optimiser.state_dict()["state"]
        tensors = {f"now.{name}": tensor for name, tensor in self._learning.items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self._best.items()}
        for number, name in enumerate(self._learning):
            tensors |= {f"{kind}.{name}": moment for kind, moment in moments.get(number, {}).items()}
        save(self._job.state, self.progress, tensors)

    def _take_up(self, progress: Progress, tensors: dict[str, torch.Tensor]) -> None:
        """Be as the process was that saved these."""
        import torch

        state = self._optimiser.state_dict()
        with torch.no_grad():
            for number, (name, tensor) in enumerate(self._learning.items()):
                tensor.copy_(tensors[f"now.{name}"])
                self._best[name] = tensors[f"best.{name}"]
                if progress.step:
                    state["state"][number] = {kind: tensors[f"{kind}.{name}"] for kind in _MOMENTS}
        self._optimiser.load_state_dict(state)
        self._came = _Came(**{name: getattr(progress, name) for name in _Came.__dataclass_fields__})
        self._came.losses, self._came.looks = list(progress.losses), list(progress.looks)


def learning_rate(step: int, planned_steps: int) -> float:
    """Of step ``step``, from 0: it rises over the warm-up and falls to nearly 0 by half a cosine."""
    if step < WARM_UP_STEPS:
        return LEARNING_RATE * (step + 1) / WARM_UP_STEPS
    share = (step - WARM_UP_STEPS) / max(1, planned_steps - WARM_UP_STEPS)
    return LEARNING_RATE * (1 + math.cos(math.pi * share)) / 2


def _copies(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


# ── jobs of the child ────────────────────────────────────────────────────────────────────────────


_training: Training | None = None
"""The one recovery of this process."""


def begin(job: RecoveryJob) -> Begun:
    """Load both models, and the state if there is one."""
    global _training
    _training = Training(job)
    return Begun(progress=_training.progress, parameters=_training.parameters)


def go_on(job: SliceJob) -> Progress:
    """One slice of the recovery that was begun. Raises OSError if its state cannot be saved."""
    return _the_training().go_on(job.seconds)


def finish(job: FinishJob) -> Finished:
    """Write what it came to. Raises OSError if that cannot be written; nothing is left of it then."""
    return _the_training().finish(job.directory)


def _the_training() -> Training:
    assert _training is not None, "begin comes first"
    return _training
