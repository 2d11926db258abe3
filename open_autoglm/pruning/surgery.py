"""Remove heads from a checkpoint: a new, complete checkpoint with smaller projections.

A query head owns ``head_dim`` rows of q_proj and as many columns of o_proj; a group owns rows of k_proj and
v_proj, and its query heads are neighbours. What is removed takes its biases with it. Norms of queries and
keys are over ``head_dim`` and stay as they are.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from open_autoglm.checkpoint import load_config
from open_autoglm.errors import CheckpointError
from open_autoglm.files import sha256_file, write_atomic
from open_autoglm.pruning.importance import LayerScores
from open_autoglm.pruning.rewrite import Edit, keep_parts, rewrite
from open_autoglm.schemas import Checkpoint, HeadPruning
from open_autoglm.weights import (
    SAFETENSORS,
    SAFETENSORS_INDEX,
    StoredTensor,
    find_weights,
    read_headers,
    read_json,
)

PROJECTION = re.compile(r"(?:^|\.)layers\.(\d+)\.self_attn\.([qkvo])_proj\.(weight|bias)$")


class KeptHeads(NamedTuple):
    """What stays of one layer, in ascending order, so that each group's heads stay neighbours."""

    groups: tuple[int, ...]
    heads: tuple[int, ...]
    """Numbered through the layer."""


def choose_heads(scores: LayerScores, pruning: HeadPruning) -> list[KeptHeads]:
    """The most important groups of each layer and the most important heads of each; of equals the first."""
    per_group = pruning.of_heads_per_group
    chosen = []
    for head_scores, group_scores in zip(scores.heads, scores.groups, strict=True):
        groups = _largest(dict(enumerate(group_scores)), pruning.kv_groups)
        heads: list[int] = []
        for group in groups:
            members = range(group * per_group, (group + 1) * per_group)
            heads += _largest({head: head_scores[head] for head in members}, pruning.heads_per_group)
        chosen.append(KeptHeads(groups, tuple(heads)))
    return chosen


def _largest(scores: Mapping[int, float], count: int) -> tuple[int, ...]:
    ranked = sorted(scores, key=lambda number: (-scores[number], number))
    return tuple(sorted(ranked[:count]))


def remove_heads(checkpoint: Checkpoint, kept: list[KeptHeads], pruning: HeadPruning, output: Path) -> None:
    """Write into the directory ``output`` the checkpoint with only the heads in ``kept``, one entry a layer.

    Raises CheckpointError if the checkpoint has changed or does not have the heads that ``pruning`` says.
    """
    weights = find_weights(checkpoint.path, SAFETENSORS, SAFETENSORS_INDEX)
    headers = read_headers(checkpoint.path, weights)
    size = 0
    for file, tensors in headers.items():
        edits = {name: edit for name, t in tensors.items() if (edit := _edit(name, t, kept, pruning))}
        size += rewrite(file, tensors, edits, output / file.name)
    _write_config(checkpoint, pruning, output)
    _write_companions(checkpoint, output, size)


def _edit(name: str, tensor: StoredTensor, kept: list[KeptHeads], pruning: HeadPruning) -> Edit | None:
    match = PROJECTION.search(name)
    if match is None or (match[2] == "o" and match[3] == "bias"):
        return None
    stays = kept[int(match[1])]
    if match[2] in "kv":
        return keep_parts(tensor.shape, 0, pruning.of_kv_groups, stays.groups)
    return keep_parts(tensor.shape, 1 if match[2] == "o" else 0, pruning.of_heads, stays.heads)


def _write_config(checkpoint: Checkpoint, pruning: HeadPruning, output: Path) -> None:
    """The config with its new numbers of heads, and the size of a head, which no longer follows from them."""
    known = load_config(checkpoint.path)
    stated = (known.num_attention_heads, known.num_key_value_heads)
    if stated != (pruning.of_heads, pruning.of_kv_groups):
        raise CheckpointError(
            f"{checkpoint.config_path} states {stated[0]} heads over {stated[1]} key/value heads, not the "
            f"{pruning.of_heads} over {pruning.of_kv_groups} that were to be pruned: plan again"
        )
    config = read_json(checkpoint.config_path)
    config["head_dim"] = getattr(known, "head_dim", None) or known.hidden_size // known.num_attention_heads
    config["num_attention_heads"] = pruning.heads
    config["num_key_value_heads"] = pruning.kv_groups
    write_atomic(output / "config.json", json.dumps(config, indent=2) + "\n")


def _write_companions(checkpoint: Checkpoint, output: Path, size: int) -> None:
    """Copy what is neither weights nor config, as it was when the checkpoint was loaded; ``size`` is the
    bytes of all tensors. Raises CheckpointError if a file has changed."""
    for file in checkpoint.files:
        source = checkpoint.path / file.path
        if file.path == SAFETENSORS_INDEX:
            index = read_json(source)
            index["metadata"] = {**index.get("metadata", {}), "total_size": size}
            write_atomic(output / file.path, json.dumps(index, indent=2) + "\n")
        elif not (output / file.path).exists():
            shutil.copyfile(source, output / file.path)
        if sha256_file(source) != file.sha256:
            raise CheckpointError(f"{source} has changed since it was read: start again")
