"""Which heads matter: two measures of importance, from the texts that nobody is judged by.

**taylor**: each head's output is multiplied by a gate of 1, and the squared derivative of the loss by that
gate, as a mean over windows, estimates what its removal would do to the loss, squared. The first-order
criterion of Molchanov et al., "Importance Estimation for Neural Network Pruning" (CVPR 2019, eq. 8), with
the gates of Michel et al., "Are Sixteen Heads Really Better than One?" (NeurIPS 2019, eq. 2). A group has
one gate for all its heads: their derivatives are added before they are squared.

**contribution**: the mean squared norm of what a head, or a group, adds to its layer's attention output.
The norm-based analysis of Kobayashi et al., "Attention is Not Only a Weight" (EMNLP 2020), by head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from open_autoglm.engines.contract import Tokens
from open_autoglm.quality.texts import TEXTS, load_tokenizer, windows
from open_autoglm.schemas import Checkpoint, Criterion, Model

if TYPE_CHECKING:
    import torch

CALIBRATION_WINDOWS = 16
"""Of each text; with 256 tokens each that is 8192 tokens."""
WINDOW_TOKENS = 256

Scores = tuple[tuple[float, ...], ...]


class LayerScores(Model):
    """One measure: ``[layers][query heads]`` and ``[layers][key/value groups]``; more is more important."""

    heads: Scores
    groups: Scores


class Importance(Model):
    """Both measures of one checkpoint."""

    taylor: LayerScores
    contribution: LayerScores
    tokens: int

    def by(self, criterion: Criterion) -> LayerScores:
        return self.taylor if criterion == "taylor" else self.contribution


class ImportanceJob(Model):
    """Payload of :func:`measure_importance`, and with the versions of the software its cache key."""

    checkpoint: Checkpoint
    seed: int
    windows: int = CALIBRATION_WINDOWS
    window_tokens: int = WINDOW_TOKENS


def measure_importance(job: ImportanceJob) -> Importance:
    """Runs in a child. Raises ArithmeticError if loss or derivatives are not finite."""
    import torch

    model = load_fp32(job.checkpoint.path).requires_grad_(False)
    attentions = [layer.self_attn for layer in model.model.layers]
    groups = model.config.num_key_value_heads
    gates = torch.ones(len(attentions), model.config.num_attention_heads, requires_grad=True)
    derivatives: list[torch.Tensor] = []
    contributions = _Contributions(len(attentions), groups, gates.shape[1] // groups)
    tokens = calibration_windows(job.checkpoint, job.windows, job.window_tokens, job.seed)
    with _gated(attentions, gates, contributions):
        for window in torch.from_numpy(tokens):
            loss = model(input_ids=window[None], labels=window[None], use_cache=False).loss
            derivatives.append(torch.autograd.grad(loss, gates)[0])
    slopes = torch.stack(derivatives).double()
    _require_finite(slopes)
    grouped = slopes.reshape(*slopes.shape[:2], groups, -1).sum(-1)
    return Importance(
        taylor=LayerScores(heads=_scores(slopes.square().mean(0)), groups=_scores(grouped.square().mean(0))),
        contribution=LayerScores(
            heads=_scores(contributions.heads / tokens.size),
            groups=_scores(contributions.groups / tokens.size),
        ),
        tokens=tokens.size,
    )


def load_fp32(path: Path) -> Any:
    """The transformers model in ``path``, in fp32 and without dropout."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def calibration_windows(checkpoint: Checkpoint, count: int, length: int, seed: int) -> Tokens:
    """``count`` windows of each calibration text, ``int64[texts * count, length]``, the texts in turn.

    Windows are as long as the context at most. Raises UserError if the texts are too short.
    """
    tokenizer = load_tokenizer(checkpoint)
    length = min(length, checkpoint.context_tokens)
    drawn = [windows(tokenizer, kind, "calibration", count, length, seed) for kind in TEXTS]
    return np.stack(drawn, axis=1).reshape(-1, length)


class _Contributions:
    """Sums over tokens of the squared norm of what heads and groups add, ``[layers, heads or groups]``."""

    def __init__(self, layers: int, groups: int, per_group: int) -> None:
        import torch

        self.heads = torch.zeros(layers, groups * per_group, dtype=torch.float64)
        self.groups = torch.zeros(layers, groups, dtype=torch.float64)
        self._per_group = per_group

    def add(self, layer: int, outputs: torch.Tensor, weight: torch.Tensor) -> None:
        """``outputs[tokens, heads, dim]`` go through the output matrix ``weight[hidden, heads * dim]``."""
        import torch

        per_head = weight.reshape(-1, *outputs.shape[1:])
        for group in range(self.groups.shape[1]):
            members = slice(group * self._per_group, (group + 1) * self._per_group)
            added = torch.einsum("thd,ohd->tho", outputs[:, members], per_head[:, members])
            self.heads[layer, members] += added.double().square().sum((0, 2))
            self.groups[layer, group] += added.sum(1).double().square().sum()


@contextmanager
def _gated(attentions: list[Any], gates: torch.Tensor, contributions: _Contributions) -> Iterator[None]:
    """Multiply what reaches each output projection by its layer's gates, and note what the heads add."""

    def hook_of(layer: int) -> Any:
        def gate(projection: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            heads = inputs[0].reshape(*inputs[0].shape[:2], gates.shape[1], -1)
            contributions.add(layer, heads.detach().flatten(0, 1), projection.weight)
            return ((heads * gates[layer][:, None]).flatten(-2),)

        return gate

    with ExitStack() as hooks:
        for layer, attention in enumerate(attentions):
            hooks.callback(attention.o_proj.register_forward_pre_hook(hook_of(layer)).remove)
        yield


def _require_finite(slopes: torch.Tensor) -> None:
    if not bool(slopes.isfinite().all()):
        raise ArithmeticError(
            "the derivatives of the loss are not finite, so no head can be called unimportant"
        )


def _scores(values: torch.Tensor) -> Scores:
    return tuple(tuple(row) for row in values.tolist())
