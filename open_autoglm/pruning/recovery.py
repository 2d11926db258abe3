"""Give back some of what pruning took: a short distillation from the whole model.

The pruned model learns to predict what the whole one predicts on the calibration texts: the mean over
tokens of KL(whole‖pruned), by AdamW (Hinton et al., "Distilling the Knowledge in a Neural Network", 2015,
at temperature 1). Only the attention projections learn, because only they were cut: that keeps the
optimiser's memory to a fraction of the model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from open_autoglm.pruning.importance import WINDOW_TOKENS, calibration_windows, load_fp32
from open_autoglm.pruning.rewrite import Bytes, Edit, rewrite
from open_autoglm.pruning.surgery import PROJECTION
from open_autoglm.schemas import Checkpoint
from open_autoglm.weights import SAFETENSORS, SAFETENSORS_INDEX, find_weights, read_headers

if TYPE_CHECKING:
    import torch

LEARNING_RATE = 1e-4
RECOVERY_WINDOWS = 32
"""Of each calibration text; a longer recovery reads them again, in another order."""

_STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


def recover(whole: Checkpoint, pruned: Path, steps: int, seed: int) -> None:
    """Distil ``steps`` windows from ``whole`` into the checkpoint in ``pruned``, whose weights are replaced.

    Raises ArithmeticError if the loss is no longer finite.
    """
    import torch

    torch.manual_seed(seed)
    teacher, student = load_fp32(whole.path).requires_grad_(False), load_fp32(pruned)
    learning = {n: p for n, p in student.named_parameters() if PROJECTION.search(n)}
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    for parameter in learning.values():
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(learning.values(), lr=LEARNING_RATE, weight_decay=0.0)
    tokens = torch.from_numpy(calibration_windows(whole, RECOVERY_WINDOWS, WINDOW_TOKENS, seed))
    for window in _in_turn(steps, len(tokens), seed):
        loss = _divergence(teacher, student, tokens[window][None])
        if not bool(loss.isfinite()):
            raise ArithmeticError("the recovery diverged: its loss is not finite")
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    _write(pruned, learning)


def _in_turn(steps: int, count: int, seed: int) -> list[int]:
    """``steps`` numbers below ``count``: every one before any comes again, shuffled by ``seed``."""
    generator = np.random.default_rng(seed)
    passes = -(-steps // count)
    turns = np.concatenate([generator.permutation(count) for _ in range(passes)])
    return [int(turn) for turn in turns[:steps]]


def _divergence(teacher: Any, student: Any, ids: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens of ``ids[1, n]`` of KL(teacher‖student), in nats."""
    import torch
    from torch.nn.functional import kl_div, log_softmax

    with torch.no_grad():
        wanted = log_softmax(teacher(input_ids=ids, use_cache=False).logits[0], dim=-1)
    found = log_softmax(student(input_ids=ids, use_cache=False).logits[0], dim=-1)
    return kl_div(found, wanted, reduction="batchmean", log_target=True)


def _write(pruned: Path, learned: Mapping[str, torch.Tensor]) -> None:
    """Put what was ``learned`` into the weight files of ``pruned``, in the dtype each tensor is stored in."""
    import torch

    by_place = {_place(name): tensor for name, tensor in learned.items()}
    files = find_weights(pruned, SAFETENSORS, SAFETENSORS_INDEX)
    for file, tensors in read_headers(pruned, files).items():
        edits = {}
        for name, stored in tensors.items():
            tensor = by_place.get(_place(name))
            if tensor is not None:
                dtype = getattr(torch, _STORED[stored.dtype])
                edits[name] = _replacement(tensor.detach().to(dtype), stored.shape)
        rewrite(file, tensors, edits, file.with_suffix(".new"))
        file.with_suffix(".new").replace(file)


def _place(name: str) -> tuple[str, ...]:
    """Layer, projection and kind: the same with and without a prefix. () for any other tensor."""
    match = PROJECTION.search(name)
    return match.groups() if match else ()


def _replacement(tensor: torch.Tensor, shape: tuple[int, ...]) -> Edit:
    import torch

    def content(_: Bytes) -> Bytes:
        found: Bytes = tensor.contiguous().view(torch.uint8).numpy().reshape(-1)
        return found

    return Edit(shape, content)
