"""Costs and bounds, against counts made another way: masks, a FLOP counter, a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from studies import demo_hardware

from open_autoglm.analysis import profile_config, profile_model
from open_autoglm.checkpoint import load_checkpoint, load_config
from open_autoglm.roofline import analyze, bound, bounds, capacity_bytes, peak_flops_per_s, phase_cost
from open_autoglm.schemas import Hardware, ModelProfile, OptimizeSpec

HARDWARE = demo_hardware()


def spec(**fields: Any) -> OptimizeSpec:
    return OptimizeSpec(model_path="here", **fields)


def profile(model_type: str, **overrides: Any) -> ModelProfile:
    from transformers import AutoConfig

    return profile_config(AutoConfig.for_model(model_type, **overrides))


def gemma(window: int) -> ModelProfile:
    """Six layers, five of them with a sliding window."""
    return profile("gemma3_text", num_hidden_layers=6, sliding_window=window)


def attention_flops(model: ModelProfile, prompt: int) -> float:
    """What the quadratic part adds to a prompt's cost."""
    linear = phase_cost(model, "prefill", 1, 1, 1, 32).flops
    head = 2.0 * model.lm_head_parameters
    one_token = linear - head - 4.0 * model.attention_heads * model.head_dim * model.layers
    return phase_cost(model, "prefill", 1, prompt, prompt, 32).flops - head - prompt * one_token


def test_decode_flops_are_those_of_the_real_model(tiny_glm: Path) -> None:
    """One decoded token costs what PyTorch's FLOP counter sees in a forward pass with a cache."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_glm, attn_implementation="eager").eval()
    with torch.inference_mode():
        cache = model(torch.arange(99)[None], use_cache=True).past_key_values
        with FlopCounterMode(display=False) as counter:
            model(torch.tensor([[7]]), past_key_values=cache)
    read = profile_config(load_config(tiny_glm))
    expected = phase_cost(read, "decode", 1, 1, 100, 32).flops
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.01)  # ours counts norms and biases


@pytest.mark.parametrize(("prompt", "window"), [(50, 8), (50, 49), (50, 50), (50, 512), (1, 8)])
def test_attention_counts_the_visible_pairs(prompt: int, window: int) -> None:
    """Score FLOPs are those of a causal mask, cut to the window in the layers that slide."""
    model = gemma(window)
    distance = np.arange(prompt)[:, None] - np.arange(prompt)[None]
    full = (distance >= 0).sum()
    sliding = ((distance >= 0) & (distance < window)).sum()
    pairs = 1 * full + 5 * sliding
    assert attention_flops(model, prompt) == pytest.approx(
        4.0 * model.attention_heads * model.head_dim * pairs
    )


def test_a_prompt_costs_as_much_as_its_tokens_one_by_one() -> None:
    """Prefill equals the sum of decodes over growing contexts, but for the head at every position."""
    model, prompt = gemma(8), 20
    decodes = sum(
        phase_cost(model, "decode", 1, prompt, context, 32).flops for context in range(1, prompt + 1)
    )
    prefill = phase_cost(model, "prefill", 1, prompt, prompt, 32).flops
    assert prefill == pytest.approx(decodes - (prompt - 1) * 2.0 * model.lm_head_parameters)


def test_weights_are_read_once_per_call_and_the_cache_once_per_row() -> None:
    """Llama-2-7B at 16 bits: all but the embedding per token, 512 KiB of cache per token of context."""
    model = profile("llama")
    one = phase_cost(model, "decode", 1, 512, 544, 16)
    eight = phase_cost(model, "decode", 8, 512, 544, 16)
    assert one.bytes_read_weights == (model.parameters - model.embedding_parameters) * 2
    assert one.bytes_moved_kv == 544 * 512 * 1024
    assert eight.bytes_read_weights == one.bytes_read_weights
    assert eight.bytes_moved_kv == 8 * one.bytes_moved_kv
    assert eight.flops == 8 * one.flops


def test_a_tied_head_is_read_though_the_embedding_is_not() -> None:
    """Tying changes what is stored, not what a token must read."""
    untied = profile("qwen3", num_hidden_layers=2, tie_word_embeddings=False)
    tied = profile("qwen3", num_hidden_layers=2, tie_word_embeddings=True)
    assert tied.parameters < untied.parameters
    assert phase_cost(tied, "decode", 1, 8, 8, 32) == phase_cost(untied, "decode", 1, 8, 8, 32)


def test_a_mixture_of_experts_reads_only_the_chosen_ones_but_stores_all() -> None:
    """GLM-4.7-Flash reads 3.6 of its 29.9 billion weights per token; memory must hold every one."""
    model = profile("glm4_moe_lite")
    read = phase_cost(model, "decode", 1, 8, 8, 8).bytes_read_weights
    assert read == model.active_parameters - model.embedding_parameters
    assert capacity_bytes(model, spec(prompt_tokens=8, output_tokens=8), 8) > model.parameters > 7 * read


def test_low_bit_weights_keep_a_16_bit_cache() -> None:
    """Eight times fewer bits per weight do not make the KV cache eight times smaller."""
    model = profile("llama")
    at = {bits: phase_cost(model, "decode", 1, 8, 100, bits).bytes_moved_kv for bits in (32, 16, 4.5)}
    assert at[32] == 2 * at[16] == 2 * at[4.5]


def test_a_sliding_window_bounds_the_cache() -> None:
    """Gemma's five sliding layers hold no more than their window, the sixth everything."""
    model, per_layer = gemma(16), 2 * 4 * 256 * 4
    cache = capacity_bytes(model, spec(prompt_tokens=80, output_tokens=20), 32) - model.parameters * 4
    assert cache == pytest.approx(per_layer * (5 * 16 + 100))


@pytest.mark.parametrize(
    ("precision", "peak"),
    [("fp32", 190e9), ("bf16", 380e9), ("fp16", 380e9), ("int8", 700e9), ("int4", 700e9)],
)
def test_each_precision_may_use_any_arithmetic_that_can_carry_it(precision: Any, peak: float) -> None:
    """The peak is the fastest arithmetic that an engine could use for the precision."""
    assert peak_flops_per_s(HARDWARE, precision) == peak


def test_peaks_of_a_cpu_without_narrow_arithmetic() -> None:
    """Where bf16 and int8 are slow or missing, narrow weights are computed in fp32."""
    old = HARDWARE.model_copy(update={"matmul_bf16_flops_per_s": 9e9, "matmul_int8_ops_per_s": None})
    assert peak_flops_per_s(old, "bf16") == peak_flops_per_s(old, "int4") == 190e9


def test_what_binds_each_phase(tiny_glm: Path) -> None:
    """A long prompt is bound by compute, one token by bandwidth, and both by capacity if it is too small."""
    model = profile_config(load_config(tiny_glm))
    asked = spec(prompt_tokens=400, output_tokens=64)
    prefill = bound(model, HARDWARE, asked, "prefill", "fp32", 32)
    decode = bound(model, HARDWARE, asked, "decode", "fp32", 32)
    assert (prefill.binds, prefill.bound_ms) == ("compute", prefill.compute_ms)
    assert (decode.binds, decode.bound_ms) == ("bandwidth", decode.bandwidth_ms)
    assert decode.bandwidth_ms == pytest.approx(decode.bytes_moved / 29e9 * 1e3)

    needed = int(capacity_bytes(model, asked, 32))
    full: Hardware = HARDWARE.model_copy(update={"available_memory_bytes": needed - 1})
    cramped = bound(model, full, asked, "decode", "fp32", 32)
    assert cramped.binds == "capacity"
    assert cramped.bound_ms == decode.bound_ms


def test_decode_is_bounded_at_mid_output() -> None:
    """The decode bound reads a cache of the prompt and half the output."""
    model = profile("llama")
    measured = bound(model, HARDWARE, spec(prompt_tokens=512, output_tokens=64), "decode", "fp32", 32)
    cost = phase_cost(model, "decode", 1, 512, 544, 32)
    assert measured.bytes_moved == cost.bytes_read_weights + cost.bytes_moved_kv


def test_an_analysis_has_every_phase_and_precision(tiny_glm: Path) -> None:
    """Two phases by four precisions, and fewer bits never take longer."""
    checkpoint = load_checkpoint(str(tiny_glm))
    asked = spec(prompt_tokens=100, output_tokens=20)
    analysis = analyze(checkpoint, asked, HARDWARE)
    assert analysis.profile == profile_model(checkpoint)
    assert analysis.roofline == bounds(analysis.profile, HARDWARE, asked)
    for phase in ("prefill", "decode"):
        times = [analysis.bound(phase, p).bound_ms for p in ("fp32", "bf16", "int8", "int4")]
        assert len(times) == 4
        assert times == sorted(times, reverse=True)
