"""What a recovery learns: a low-rank addition to each linear layer, merged into the weights at its end.

LoRA (Hu et al., 2022), as LLM-Pruner recovers with (Ma et al., "LLM-Pruner: On the Structural Pruning of
Large Language Models", NeurIPS 2023, section 3.3). A few per cent of the weights learn, so that their
gradients, the optimiser's two moments and the state that is saved stay small beside the model; and every
layer can adapt to what is missing before it, the feed-forward ones too, which were not cut.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_autoglm.pruning.rewrite import Bytes, Edit, rewrite
from open_autoglm.schemas import Checkpoint
from open_autoglm.weights import SAFETENSORS, SAFETENSORS_INDEX, find_weights, read_headers

if TYPE_CHECKING:
    import torch

RANK = 16

_STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


class Adapters:
    """Of every linear layer of a transformers decoder: ``y = Wx + up @ (down @ x)``.

    ``down[rank, inputs]`` begins random and ``up[outputs, rank]`` at zero, so that at first nothing changes.
    They belong to the model from then on: every call of it goes through them.
    """

    def __init__(self, model: Any, seed: int) -> None:
        import torch

        generator = torch.Generator().manual_seed(seed)
        self._pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for name, layer in _linears(model):
            down = torch.randn(RANK, layer.in_features, generator=generator) / math.sqrt(layer.in_features)
            up = torch.zeros(layer.out_features, RANK)
            self._pairs[name] = down.requires_grad_(True), up.requires_grad_(True)
            layer.register_forward_hook(_adding(*self._pairs[name]))

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """What learns, by name and in a stable order."""
        return {
            f"{name}.{part}": tensor
            for name, pair in self._pairs.items()
            for part, tensor in zip(("down", "up"), pair, strict=True)
        }


def _linears(model: Any) -> Iterator[tuple[str, Any]]:
    """Those of the layers, by the names of their weights in a checkpoint, less `model.` and `.weight`."""
    from torch.nn import Linear

    for name, module in model.base_model.named_modules():
        if isinstance(module, Linear):
            yield name, module


def _adding(down: torch.Tensor, up: torch.Tensor) -> Any:
    def add(_: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return output + inputs[0] @ down.T @ up.T

    return add


def write_merged(student: Checkpoint, tensors: Mapping[str, torch.Tensor], prefix: str, output: Path) -> None:
    """Write ``student`` into the directory ``output`` with the adapters' ``tensors`` added to its weights.

    Sums are taken in fp32 at least and stored in the dtype of each tensor. ``prefix`` is what the names in a
    checkpoint may begin with; those of a few old ones do not.
    """
    weights = find_weights(student.path, SAFETENSORS, SAFETENSORS_INDEX)
    for file, stored in read_headers(student.path, weights).items():
        edits = {}
        for name, tensor in stored.items():
            place = name.removeprefix(f"{prefix}.").removesuffix(".weight")
            if f"{place}.up" in tensors:
                down, up = tensors[f"{place}.down"], tensors[f"{place}.up"]
                edits[name] = _plus(up @ down, tensor.dtype)
        rewrite(file, stored, edits, output / file.name)
    for part in student.files:
        if not (output / part.path).exists():
            shutil.copyfile(student.path / part.path, output / part.path)


def _plus(delta: torch.Tensor, stored: str) -> Edit:
    import torch

    dtype = getattr(torch, _STORED[stored])

    def apply(content: Bytes) -> Bytes:
        weight = torch.from_numpy(content.copy()).view(dtype).reshape(delta.shape)
        merged = (weight.to(torch.promote_types(dtype, delta.dtype)) + delta).to(dtype)
        found: Bytes = merged.contiguous().view(torch.uint8).numpy().reshape(-1)
        return found

    return Edit(tuple(delta.shape), apply)
