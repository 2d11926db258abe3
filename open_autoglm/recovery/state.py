"""How far a recovery has come, in one file: tensors as safetensors, the rest as JSON in its header.

One file is replaced as a whole, so that weights, moments and step are always of the same moment, whenever
the process is killed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from open_autoglm.files import write_atomic
from open_autoglm.schemas import Model

if TYPE_CHECKING:
    import torch

_PROGRESS = "progress"


class Look(Model):
    """The held-out windows, as the model stood after so many steps."""

    step: int
    divergences: tuple[float, ...] = Field(
        description="KL(whole‖pruned) in nats per token: means of blocks of neighbouring tokens"
    )

    @property
    def mean(self) -> float:
        """In nats per token."""
        return sum(self.divergences) / len(self.divergences)


class Progress(Model):
    """What a recovery remembers besides its tensors."""

    key: str = Field(description="of what is recovered and how: no other state is taken up")
    step: int = 0
    planned_steps: int
    tokens: int = Field(0, description="learned from, repetitions included")
    seconds: float = Field(0.0, description="of work, in all the processes that took part")
    losses: tuple[float, ...] = Field((), description="of each step's windows, in nats per token")
    looks: tuple[Look, ...] = ()
    ended: str = Field("", description="why it ended; empty while it has not")
    diverged: bool = False

    @property
    def best(self) -> Look:
        """The first of those that were nearest to the whole model."""
        return min(self.looks, key=lambda look: look.mean)


def save(path: Path, progress: Progress, tensors: Mapping[str, torch.Tensor]) -> None:
    """Replace ``path``, or leave it as it is. Raises OSError."""
    from safetensors.torch import save as to_bytes

    contents = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    write_atomic(path, to_bytes(contents, {_PROGRESS: progress.model_dump_json()}))


def load(path: Path, key: str) -> tuple[Progress, dict[str, torch.Tensor]] | None:
    """What lies in ``path``; None if there is nothing, it is damaged, or it is not ``key``'s."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            progress = Progress.model_validate_json((file.metadata() or {}).get(_PROGRESS, ""))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, ValueError):
        return None
    return (progress, tensors) if progress.key == key else None
