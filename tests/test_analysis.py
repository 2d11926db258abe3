"""Structure read from configs and meta modules, against published sizes and against real forward passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tiny_models import build_checkpoint

from open_autoglm.analysis import profile_config, profile_model
from open_autoglm.checkpoint import load_checkpoint
from open_autoglm.errors import CheckpointError


def config_of(model_type: str, **overrides: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **overrides)


class Published(NamedTuple):
    """A released model: its size in billions of parameters, and facts that its config must yield."""

    model_type: str
    total: float
    active: float
    facts: dict[str, Any]
    config: dict[str, Any] = {}  # noqa: RUF012 - read only; where it differs from the class's defaults


# fmt: off
PUBLISHED = {
    "glm-4-9b-chat-hf": Published(
        "glm", 9.40, 9.40,
        {"attention": "gqa", "kv_heads": 2, "head_dim": 128, "attention_bias": True, "qk_norm": False,
         "rotary": "interleaved", "rotary_dims": 64, "mlp": "fused_gate_up", "intermediate_size": 13696,
         "norms_per_layer": 2, "norm_eps": 1.5625e-07, "tied_embeddings": False, "experts": 0},
    ),
    "glm-edge-1.5b": Published(
        "glm", 1.47, 1.47,
        {"attention_bias": False, "tied_embeddings": True, "rotary": "interleaved"},
        {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
         "num_key_value_heads": 4, "vocab_size": 59264, "pad_token_id": 0, "attention_bias": False,
         "tie_word_embeddings": True},
    ),
    "glm-4-9b-0414": Published(
        "glm4", 9.40, 9.40,
        {"rotary": "interleaved", "rotary_dims": 64, "mlp": "fused_gate_up", "norms_per_layer": 4},
    ),
    "glm-4-32b-0414": Published(
        "glm4", 33.1, 33.1,
        {"attention_bias": False, "kv_heads": 8, "kv_elements_per_token": 122 * 1024},
        {"hidden_size": 6144, "intermediate_size": 23040, "num_hidden_layers": 61, "num_attention_heads": 48,
         "num_key_value_heads": 8, "attention_bias": False},
    ),
    "glm-4.5-air": Published(
        "glm4_moe", 106.9, 13.4,
        {"rotary": "half", "rotary_dims": 64, "mlp": "split_gate_up", "qk_norm": False, "experts": 128,
         "experts_per_token": 8, "shared_experts": 1, "dense_layers": 1, "kv_elements_per_token": 92 * 1024},
        {"head_dim": 128, "attention_bias": True},
    ),
    "glm-4.5": Published(
        "glm4_moe", 352.8, 33.6,
        {"qk_norm": True, "experts": 160, "dense_layers": 3, "kv_elements_per_token": 184 * 1024},
        {"head_dim": 128, "attention_bias": True, "use_qk_norm": True, "hidden_size": 5120,
         "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 92,
         "n_routed_experts": 160, "first_k_dense_replace": 3},
    ),
    "glm-4.7-flash": Published(
        "glm4_moe_lite", 29.9, 3.9,
        {"attention": "mla", "head_dim": 256, "rotary": "interleaved", "rotary_dims": 64, "qk_norm": False,
         "experts": 64, "experts_per_token": 4, "dense_layers": 1, "kv_elements_per_token": 47 * (512 + 64)},
    ),
    "glm-5": Published(
        "glm_moe_dsa", 743.9, 41.8,
        {"attention": "mla+dsa", "rotary": "interleaved", "experts": 256, "dense_layers": 3,
         "limited_layers": 78, "attended_tokens": 2048, "sliding_window": None,
         "kv_elements_per_token": 78 * (512 + 64 + 128)},
    ),
    "llama-2-7b": Published(
        "llama", 6.74, 6.74,
        {"attention": "mha", "kv_heads": 32, "rotary": "half", "rotary_dims": 128, "mlp": "split_gate_up",
         "attention_bias": False, "qk_norm": False, "norms_per_layer": 2, "dense_layers": 32},
    ),
    "qwen2.5-0.5b": Published(
        "qwen2", 0.494, 0.494,
        {"attention": "gqa", "attention_bias": True, "tied_embeddings": True, "sliding_window": None},
        {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
         "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "qwen3-0.6b": Published(
        "qwen3", 0.596, 0.596,
        {"qk_norm": True, "attention_bias": False, "head_dim": 128, "norms_per_layer": 2},
        {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
         "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True},
    ),
    "gemma-3-1b": Published(
        "gemma3_text", 1.0, 1.0,
        {"attention": "mqa", "rotary": "half", "qk_norm": True, "norms_per_layer": 4, "sliding_window": 512,
         "limited_layers": 22, "attended_tokens": 512},
        {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4,
         "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144, "sliding_window": 512},
    ),
}
# fmt: on


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name: str) -> None:
    """Each family's structure and its published parameter counts are read from the config alone."""
    published = PUBLISHED[name]
    profile = profile_config(config_of(published.model_type, **published.config))
    assert profile.parameters / 1e9 == pytest.approx(published.total, rel=5e-3)
    assert profile.active_parameters / 1e9 == pytest.approx(published.active, rel=1e-2)
    assert profile.model_dump(include=set(published.facts)) == published.facts


def test_a_model_with_eyes_is_profiled_as_its_text_decoder() -> None:
    """gemma3's vision tower counts as stored parameters and not as active ones."""
    text = {
        "hidden_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "vocab_size": 512,
        "head_dim": 16,
    }
    seeing = profile_config(config_of("gemma3", text_config=text, image_token_index=500))
    blind = profile_config(config_of("gemma3_text", **text))
    assert seeing.parameters > blind.parameters == blind.active_parameters == seeing.active_parameters
    assert seeing.layers == 6
    assert seeing.limited_layers == 5


@pytest.mark.parametrize(("interleave", "style"), [(True, "interleaved"), (False, "half")])
def test_the_config_can_choose_the_rotary_style(interleave: bool, style: str) -> None:
    """Where one class has both rotations, the one that this config uses is reported."""
    profile = profile_config(config_of("glm4_moe_lite", num_hidden_layers=2, rope_interleave=interleave))
    assert profile.rotary == style


# fmt: off
TINY: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
}
LATENT: dict[str, Any] = {
    **TINY, "num_key_value_heads": 4, "moe_intermediate_size": 24, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "kv_lora_rank": 24, "q_lora_rank": 32, "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 8, "v_head_dim": 20,
}
# fmt: on


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("glm", {**TINY, "head_dim": 32}),
        ("qwen3", {**TINY, "head_dim": 24}),
        ("llama", TINY),
        ("glm4_moe_lite", LATENT),
        ("glm_moe_dsa", {**LATENT, "index_head_dim": 40, "index_n_heads": 2, "first_k_dense_replace": 1}),
    ],
)
def test_cached_numbers_are_those_of_a_forward_pass(model_type: str, overrides: dict[str, Any]) -> None:
    """The KV elements per token equal what a real forward pass leaves in the cache, latent or not."""
    import torch
    from transformers import AutoModelForCausalLM

    config = config_of(model_type, **overrides)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.inference_mode():
        cache = model(torch.arange(7)[None], use_cache=True).past_key_values
    tensors = [value for layer in cache.layers for value in vars(layer).values() if torch.is_tensor(value)]
    cached = sum(tensor.numel() for tensor in tensors if tensor.dim() >= 3)
    assert profile_config(config).kv_elements_per_token * 7 == cached


def test_a_checkpoint_is_profiled_without_its_weights(tmp_path: Path) -> None:
    """A tied checkpoint on disk has as many parameters as its safetensors file, the head counted once."""
    from safetensors import safe_open

    directory = build_checkpoint(tmp_path / "tied", "glm", tie_word_embeddings=True)
    with safe_open(directory / "model.safetensors", framework="np") as file:
        stored = sum(file.get_tensor(name).size for name in file.keys())  # noqa: SIM118 - not a dict
    profile = profile_model(load_checkpoint(str(directory)))
    assert profile.parameters == profile.active_parameters == stored
    assert profile.tied_embeddings
    assert profile.lm_head_parameters == profile.embedding_parameters == 512 * 64


@pytest.mark.parametrize(
    ("model_type", "overrides", "sentence"),
    [
        ("t5", {}, "'t5' config cannot be read as a causal language model"),
        ("mamba", {"num_hidden_layers": 2}, "layer 0 of the mamba model has no attention"),
        ("glm", {**TINY, "pad_token_id": 4096}, "Padding_idx must be within num_embeddings"),
    ],
)
def test_what_cannot_be_profiled_is_refused(
    model_type: str, overrides: dict[str, Any], sentence: str
) -> None:
    """An encoder-decoder, a recurrent model and a contradictory config each get one sentence."""
    with pytest.raises(CheckpointError, match=sentence):
        profile_config(config_of(model_type, **overrides))
