"""Checkpoints of any size without knowledge: a config's shapes, random weights, written layer by layer."""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from open_autoglm.checkpoint import build_on_meta
from open_autoglm.files import directory_atomic, write_atomic
from open_autoglm.schemas import Model
from open_autoglm.weights import SAFETENSORS_INDEX

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")


class RandomModelJob(Model):
    """Payload of :func:`write_random_model`."""

    like: Path = Field(description="the checkpoint whose config and tokenizer are taken")
    output: Path
    changes: dict[str, Any] = Field(description="entries of the config that differ")
    dtype: str = "float32"
    seed: int = 0
    device: str = Field("cpu", description="draws the numbers; they differ from device to device")


class RandomModelDone(Model):
    """Answer of :func:`write_random_model`."""

    parameters: int


def write_random_model(job: RandomModelJob) -> RandomModelDone:
    """Write the checkpoint, holding one layer at a time; norms are one, the rest as a fresh model has it."""
    config = json.loads((job.like / "config.json").read_text()) | job.changes | {"dtype": job.dtype}
    with directory_atomic(job.output) as output:
        write_atomic(output / "config.json", json.dumps(config, indent=2))
        for name in TOKENIZER_FILES:
            if (job.like / name).exists():
                shutil.copyfile(job.like / name, output / name)
        return RandomModelDone(parameters=_write_weights(output, job))


def _write_weights(output: Path, job: RandomModelJob) -> int:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(output)
    parts: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, shape in _shapes(config).items():
        parts[_part_of(name)][name] = shape
    generator = torch.Generator(job.device).manual_seed(job.seed)
    places: dict[str, str] = {}
    numbers = total_bytes = 0
    for index, shapes in enumerate(parts.values(), start=1):
        file = f"model-{index:05d}-of-{len(parts):05d}.safetensors"
        tensors = {}
        for name, shape in shapes.items():
            drawn = torch.ones if "norm" in name else partial(torch.randn, generator=generator)
            values = drawn(shape, device=job.device) * (1 if "norm" in name else 0.02)
            tensors[name] = values.to(getattr(torch, job.dtype)).cpu()
            numbers += values.numel()
            total_bytes += tensors[name].nbytes
        save_file(tensors, output / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shapes, file)
    index_of = {"metadata": {"total_size": total_bytes}, "weight_map": places}
    write_atomic(output / SAFETENSORS_INDEX, json.dumps(index_of, indent=1))
    return numbers


def _shapes(config: Any) -> dict[str, Any]:
    """Of every tensor a checkpoint stores, by name; a tied head is the embedding, stored once."""
    stored = build_on_meta(config).state_dict()
    if config.tie_word_embeddings:
        stored = {name: tensor for name, tensor in stored.items() if name != "lm_head.weight"}
    return {name: tensor.shape for name, tensor in stored.items()}


def _part_of(name: str) -> str:
    """The layer a tensor is of, or what lies outside of all layers."""
    found = re.match(r"model\.layers\.\d+\.", name)
    return found[0] if found else name
