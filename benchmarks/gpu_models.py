"""What the GPU benchmark runs: GLMs of published shapes with random weights, and random prompts.

Speed and memory do not depend on what the weights are, quality does: nothing is judged here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field

from benchmarks.random_model import RandomModelJob, write_random_model
from open_autoglm.files import sha256_file
from open_autoglm.schemas import Checkpoint, Model, Workload

_GLM: dict[str, Any] = {
    "architectures": ["GlmForCausalLM"],
    "model_type": "glm",
    "attention_bias": True,
    "rms_norm_eps": 1.5625e-07,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": [1],
}


class Shape(NamedTuple):
    """A model's size, and the length of its requests."""

    config: dict[str, Any]
    prompt_tokens: int
    output_tokens: int


SHAPES = {
    "tiny": Shape(
        {
            "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
            "max_position_embeddings": 256, "tie_word_embeddings": False,
        },
        prompt_tokens=16,
        output_tokens=4,
    ),
    "glm-1.5b": Shape(
        {
            "vocab_size": 59264, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
            "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128,
            "max_position_embeddings": 8192, "tie_word_embeddings": True,
        },
        prompt_tokens=512,
        output_tokens=64,
    ),
    "glm-9b": Shape(
        {
            "vocab_size": 151552, "hidden_size": 4096, "intermediate_size": 13696, "num_hidden_layers": 40,
            "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128,
            "max_position_embeddings": 8192, "tie_word_embeddings": False,
        },
        prompt_tokens=512,
        output_tokens=64,
    ),
}  # fmt: skip
"""``glm-9b`` has the shapes of GLM-4-9B; ``glm-1.5b`` those of a GLM-Edge of that size."""


class CheckpointJob(Model):
    """Payload of :func:`checkpoint_job`."""

    name: str
    folder: Path
    device: str = Field(description="draws the numbers")


def checkpoint_job(job: CheckpointJob) -> Checkpoint:
    """Runs in the child."""
    return write_checkpoint(job.name, job.folder, job.device)


def write_checkpoint(name: str, folder: Path, device: str) -> Checkpoint:
    """A random checkpoint of a shape, in fp32 if tiny and else in bf16."""
    source, output = folder / "shape", folder / "checkpoint"
    dtype = "float32" if name == "tiny" else "bfloat16"
    source.mkdir(parents=True)
    config = _GLM | SHAPES[name].config
    (source / "config.json").write_text(json.dumps(config))
    _write_tokenizer(source)
    write_random_model(RandomModelJob(like=source, output=output, changes={}, dtype=dtype, device=device))
    return Checkpoint(
        path=output,
        name=name,
        model_type=config["model_type"],
        architecture=config["architectures"][0],
        files=(),
        digest=f"random {name}",
        weight_bytes=sum(file.stat().st_size for file in output.glob("*.safetensors")),
        weight_dtype=dtype,
        context_tokens=config["max_position_embeddings"],
        vocab_size=config["vocab_size"],
    )


def _write_tokenizer(folder: Path) -> None:
    """A token per byte: exporters want a tokenizer, and calibration has texts to read."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(["<pad>", "<end>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>").save_pretrained(
        folder
    )


def draw_workload(name: str, batch_size: int, rounds: int, path: Path) -> Workload:
    """Random prompts, another one for each row and round."""
    shape, vocabulary = SHAPES[name], SHAPES[name].config["vocab_size"]
    prompts = np.random.default_rng(batch_size).integers(
        2, vocabulary, (rounds, batch_size, shape.prompt_tokens)
    )
    lengths = np.ones((rounds, 1), dtype=np.int64)
    np.savez(
        path,
        prompts=prompts,
        prompt_tokens=lengths * shape.prompt_tokens,
        output_tokens=lengths * shape.output_tokens,
        arrivals_ms=np.zeros((rounds, 1)),
    )
    return Workload(
        path=path,
        sha256=sha256_file(path),
        batch_size=batch_size,
        prompt_tokens=shape.prompt_tokens,
        output_tokens=shape.output_tokens,
        rounds=rounds,
        seed=batch_size,
        corpus="random tokens",
    )
