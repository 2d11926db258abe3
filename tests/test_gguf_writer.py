"""The GGUF a checkpoint becomes: the same numbers under llama.cpp's names, or a refusal that says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from studies import demo_profile
from tiny_models import VOCAB_SIZE, build_checkpoint

from open_autoglm.checkpoint import load_checkpoint
from open_autoglm.export.gguf_writer import NoGguf, supports, write_gguf
from open_autoglm.schemas import Checkpoint

HEAD_DIM, ROTATED = 32, 16
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FREQUENCIES = 10000.0 ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
"""Of `HEAD_DIM` dimensions without `rope_freqs`, in radians per token."""

Numbers = NDArray[np.float32]
Written = tuple[Checkpoint, dict[str, Numbers], dict[str, Any]]


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Written]:
    """Build a tiny checkpoint and write it: with it the GGUF's tensors and metadata by name."""

    def write(model_type: str, **overrides: Any) -> Written:
        source = build_checkpoint(tmp_path / "checkpoint", model_type, **overrides)
        return (checkpoint := load_checkpoint(str(source)), *read_back(checkpoint, tmp_path / "it.gguf"))

    return write


def read_back(checkpoint: Checkpoint, path: Path) -> tuple[dict[str, Numbers], dict[str, Any]]:
    write_gguf(checkpoint, path)
    reader = GGUFReader(path)
    tensors = {tensor.name: np.asarray(tensor.data) for tensor in reader.tensors}
    return tensors, {name: field.contents() for name, field in reader.fields.items()}


def stored(checkpoint: Checkpoint) -> dict[str, Numbers]:
    return load_file(checkpoint.path / "model.safetensors")


# ── numbers ──────────────────────────────────────────────────────────────────────────────────────


def test_glm_keeps_its_rows_and_parts_gate_from_up(written: Callable[..., Written]) -> None:
    """Queries, keys and their biases as they are; the fused matrix is gate above up."""
    checkpoint, tensors, _ = written("glm")
    weights = stored(checkpoint)
    for part, name in (("q_proj", "attn_q"), ("k_proj", "attn_k"), ("v_proj", "attn_v")):
        for kind in ("weight", "bias"):
            expected = weights[f"model.layers.1.self_attn.{part}.{kind}"]
            np.testing.assert_array_equal(tensors[f"blk.1.{name}.{kind}"], expected)
    gate, up = np.split(weights["model.layers.1.mlp.gate_up_proj.weight"], 2)
    np.testing.assert_array_equal(tensors["blk.1.ffn_gate.weight"], gate)
    np.testing.assert_array_equal(tensors["blk.1.ffn_up.weight"], up)
    np.testing.assert_array_equal(tensors["output.weight"], weights["lm_head.weight"])


def test_llama_rows_move_to_neighbours(written: Callable[..., Written]) -> None:
    """Row i of a head goes to 2i, and row i + head_dim / 2, which it rotates with, right behind it."""
    checkpoint, tensors, _ = written("llama", attention_bias=True)
    weights = stored(checkpoint)
    for part, name in (("q_proj", "attn_q"), ("k_proj", "attn_k")):
        for kind in ("weight", "bias"):
            source = weights[f"model.layers.0.self_attn.{part}.{kind}"]
            found = tensors[f"blk.0.{name}.{kind}"]
            for start in range(0, len(source), HEAD_DIM):
                middle, end = start + HEAD_DIM // 2, start + HEAD_DIM
                np.testing.assert_array_equal(found[start:end:2], source[start:middle])
                np.testing.assert_array_equal(found[start + 1 : end : 2], source[middle:end])
    value = weights["model.layers.0.self_attn.v_proj.weight"]
    np.testing.assert_array_equal(tensors["blk.0.attn_v.weight"], value)


@pytest.mark.parametrize("model_type", ["glm4", "qwen3"])
def test_others_are_renamed_and_nothing_else(written: Callable[..., Written], model_type: str) -> None:
    """Every stored tensor is there once, its numbers untouched."""
    checkpoint, tensors, _ = written(model_type)
    found = sorted((values.shape, values.tobytes()) for values in tensors.values())
    assert found == sorted((values.shape, values.tobytes()) for values in stored(checkpoint).values())


def test_a_tied_head_is_not_written(written: Callable[..., Written]) -> None:
    """llama.cpp takes the embedding where there is no output matrix."""
    _, tensors, _ = written("glm", tie_word_embeddings=True)
    assert "output.weight" not in tensors
    assert tensors["token_embd.weight"].shape == (VOCAB_SIZE, 64)


def test_bf16_is_widened_without_loss(tmp_path: Path) -> None:
    """fp32 holds every bf16 number; numpy has no bf16, so this goes by torch."""
    import torch
    from transformers import AutoModelForCausalLM

    directory = build_checkpoint(tmp_path / "checkpoint", "glm")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    checkpoint = load_checkpoint(str(directory))
    assert checkpoint.weight_dtype == "bf16"
    tensors, _ = read_back(checkpoint, tmp_path / "it.gguf")
    expected = model.model.embed_tokens.weight.detach().float().numpy()
    np.testing.assert_array_equal(tensors["token_embd.weight"], expected)


# ── metadata ─────────────────────────────────────────────────────────────────────────────────────


def test_metadata_are_the_configs(written: Callable[..., Written]) -> None:
    """What llama.cpp cannot see in the tensors' shapes, and a vocabulary that is a number only."""
    _, _, metadata = written("llama", rms_norm_eps=3e-6, rope_parameters={**PLAIN, "rope_theta": 5e5})
    expected = {
        "general.architecture": "llama",
        "general.file_type": 0,
        "tokenizer.ggml.model": "no_vocab",
        "llama.vocab_size": VOCAB_SIZE,
        "llama.context_length": 512,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 160,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": HEAD_DIM,
        "llama.attention.value_length": HEAD_DIM,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(3e-6),
        "llama.rope.freq_base": 5e5,
        "llama.rope.dimension_count": HEAD_DIM,
    }
    assert {name: metadata[name] for name in expected} == expected


def test_glm4_states_the_rotated_dimensions(written: Callable[..., Written]) -> None:
    """Its own architecture rotates a part of a head by a count, without factors."""
    _, tensors, metadata = written("glm4")
    assert metadata["general.architecture"] == "glm4"
    assert metadata["glm4.rope.dimension_count"] == ROTATED
    assert "rope_freqs.weight" not in tensors


# ── rotary embedding ─────────────────────────────────────────────────────────────────────────────


def test_plain_rotation_needs_no_factors(written: Callable[..., Written]) -> None:
    """Nor does a GLM that rotates whole heads."""
    _, tensors, _ = written("glm", rope_parameters={**PLAIN, "partial_rotary_factor": 1.0})
    assert "rope_freqs.weight" not in tensors


def test_partial_rotation_is_factors(written: Callable[..., Written]) -> None:
    """Divided by them, the frequencies of a whole head are those of its rotated part, then nothing."""
    _, tensors, metadata = written("glm")
    assert metadata["llama.rope.dimension_count"] == HEAD_DIM
    turned = FREQUENCIES / tensors["rope_freqs.weight"]
    expected = 10000.0 ** -(np.arange(0, ROTATED, 2) / ROTATED)
    np.testing.assert_allclose(turned[: ROTATED // 2], expected, rtol=1e-6)
    assert turned[ROTATED // 2 :].max() < 1e-20


def test_llama3_scaling_is_factors(written: Callable[..., Written]) -> None:
    """Divided by them, the plain frequencies are those of transformers' own module."""
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    checkpoint, tensors, _ = written("llama", rope_parameters=LLAMA3)
    expected = LlamaRotaryEmbedding(AutoConfig.from_pretrained(checkpoint.path)).inv_freq.numpy()
    np.testing.assert_allclose(FREQUENCIES / tensors["rope_freqs.weight"], expected, rtol=1e-6)
    assert not np.allclose(expected, FREQUENCIES)


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "phi3"}, "model type 'phi3'"),
        ({"sliding_window": 4096}, "sliding window of 4096"),
        ({"rotary_scaling": "yarn"}, "'yarn' rotary scaling"),
        ({"model_type": "glm4", "rotary_scaling": "llama3"}, "'llama3' rotary scaling"),
        ({"model_type": "qwen3", "attention_bias": True}, "no bias at the attention's output"),
        ({"model_type": "qwen3", "rotary_dims": 32}, "rotates whole heads"),
    ],
)
def test_what_would_be_computed_wrong_is_refused(changes: dict[str, Any], reason: str) -> None:
    """From the profile alone, before anything is written; the same model without the trait is taken."""
    profile = demo_profile()
    assert supports(profile) is None
    refused = supports(profile.model_copy(update=changes))
    assert refused is not None
    assert reason in refused


def test_the_writer_refuses_what_the_profile_refuses(written: Callable[..., Written]) -> None:
    """Nobody gets a file of a model that llama.cpp would compute otherwise."""
    yarn = {**PLAIN, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    with pytest.raises(NoGguf, match="'yarn' rotary scaling"):
        written("llama", rope_parameters=yarn)


def test_another_activation_is_refused(written: Callable[..., Written]) -> None:
    """llama.cpp has silu built in, whatever the config says."""
    with pytest.raises(NoGguf, match="silu, and this model gelu"):
        written("llama", hidden_act="gelu")


def test_a_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    """A weight that llama.cpp does not know is not left out in silence."""
    directory = build_checkpoint(tmp_path / "checkpoint", "llama")
    file = directory / "model.safetensors"
    save_file({**load_file(file), "model.layers.0.adapter.weight": np.ones((4, 4), np.float32)}, file)
    with pytest.raises(NoGguf, match=r"model\.layers\.0\.adapter\.weight .* no place"):
        write_gguf(load_checkpoint(str(directory)), tmp_path / "it.gguf")
