"""The model and the host of the made-up studies: the 135 M demo GLM on two cores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from open_autoglm.schemas import (
    Analysis,
    Checkpoint,
    FileDigest,
    Hardware,
    ModelProfile,
    Phase,
    Precision,
    RooflineBound,
)

SHA = "4f1c0e6a9b7d2c35" * 4


def demo_checkpoint() -> Checkpoint:
    return Checkpoint(
        path=Path("demo-glm"),
        name="demo-glm",
        model_type="glm",
        architecture="GlmForCausalLM",
        files=(FileDigest(path="model.safetensors", size_bytes=538_060_032, sha256=SHA),),
        digest=SHA,
        weight_bytes=538_060_032,
        weight_dtype="float32",
        context_tokens=8192,
        vocab_size=49_152,
    )


def demo_analysis() -> Analysis:
    return Analysis(profile=demo_profile(), hardware=demo_hardware(), roofline=demo_roofline())


def demo_profile() -> ModelProfile:
    return ModelProfile(
        model_type="glm", architecture="GlmForCausalLM", layers=30, hidden_size=576, intermediate_size=1536,
        vocab_size=49_152, context_tokens=8192, attention="gqa", attention_heads=9, kv_heads=3, head_dim=64,
        attention_bias=False, qk_norm=False, rotary="interleaved", rotary_dims=64, mlp="fused_gate_up",
        norms_per_layer=2, norm_eps=1e-5, tied_embeddings=True, experts=0, experts_per_token=0,
        shared_experts=0, dense_layers=30, sliding_window=None, parameters=134_515_008,
        active_parameters=134_515_008, embedding_parameters=28_311_552, lm_head_parameters=28_311_552,
        kv_elements_per_token=11_520,
    )  # fmt: skip


def demo_hardware(**changes: Any) -> Hardware:
    content: dict[str, Any] = {
        "cpu_model": "AMD EPYC (Zen 4)",
        "cores": 2,
        "isa": ("avx2", "avx512f", "avx512_vnni", "avx512_bf16"),
        "memory_bytes": 23 * 2**30,
        "available_memory_bytes": 20 * 2**30,
        "read_bandwidth_bytes_per_s": 29e9,
        "matmul_fp32_flops_per_s": 190e9,
        "matmul_bf16_flops_per_s": 380e9,
        "matmul_int8_ops_per_s": 700e9,
        "gpus": (),
        "gpu_reason": "no NVIDIA driver is loaded",
        "os": "Linux 6.1",
        "python": "3.11.7",
        "fingerprint": "epyc-zen4-2c-23g-7be1",
    }
    return Hardware(**{**content, **changes})


def demo_roofline() -> tuple[RooflineBound, ...]:
    kinds: tuple[tuple[Precision, float, float], ...] = (
        ("fp32", 32, 190e9), ("bf16", 16, 380e9), ("int8", 9, 700e9), ("int4", 5, 700e9)
    )  # fmt: skip
    return tuple(
        bound
        for precision, bits, peak in kinds
        for bound in (
            demo_bound("prefill", precision, 113e9, 134_515_008 * bits / 8 + 23.6e6, peak),
            demo_bound("decode", precision, 0.28e9, 134_515_008 * bits / 8 + 25e6, peak),
        )
    )


def demo_bound(
    phase: Phase, precision: Precision, flops: float, bytes_moved: float, peak: float
) -> RooflineBound:
    compute_ms, bandwidth_ms = flops / peak * 1e3, bytes_moved / 29e9 * 1e3
    return RooflineBound(
        phase=phase,
        precision=precision,
        flops=flops,
        bytes_moved=bytes_moved,
        compute_ms=compute_ms,
        bandwidth_ms=bandwidth_ms,
        capacity_bytes=bytes_moved,
        binds="compute" if compute_ms > bandwidth_ms else "bandwidth",
        bound_ms=max(compute_ms, bandwidth_ms),
    )
