"""Studies as `optimize` leaves them, without running one: the figures are those of the 135 M demo GLM.

``demo_study()`` has a champion; ``infeasible_study()``, ``blocked_study()`` and ``planned_study()`` have
the other three verdicts. The answer is the product's own: the trials go through `choose`.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from open_autoglm.measure.statistics import summarise
from open_autoglm.schemas import (
    Analysis,
    Bundle,
    Candidate,
    Checkpoint,
    ExportedModel,
    FileDigest,
    GateResult,
    Hardware,
    Measurements,
    ModelProfile,
    OptimizeSpec,
    PathQuality,
    Phase,
    Precision,
    QualityReport,
    Registration,
    RooflineBound,
    Study,
    Trial,
    Verdict,
)
from open_autoglm.selection import choose
from open_autoglm.units import ByteSize, Duration

ROUNDS = 10
CHAMPION = "onnxruntime-int8-b32"
BASELINE = "torch-bf16-compiled"
_SHA = "4f1c0e6a9b7d2c35" * 4


class Shape(NamedTuple):
    """What makes one measured engine different from the next."""

    id: str
    precision: Precision
    bits: float
    ttft_ms: float
    tokens_per_s: float
    rss_mb: float
    kept: tuple[float, float]  # quality on prefill, on decode
    top1: float
    kl: float
    same_tokens: int
    because: str


SHAPES = (
    Shape("torch-fp32", "fp32", 32, 1245, 11.8, 989, (1, 1), 1, 0, 64, "the reference"),
    Shape("torch-bf16", "bf16", 16, 669, 13.5, 1160, (0.9991, 0.9993), 0.969, 0.0011, 7,
          "half the bytes per weight, and the CPU has avx512_bf16"),
    Shape(BASELINE, "bf16", 16, 573, 22.6, 1160, (0.9991, 0.9993), 0.969, 0.0011, 19,
          "what a careful engineer would write by hand"),
    Shape("onnxruntime-fp32", "fp32", 32, 756, 41.6, 789, (1, 1), 1, 1e-9, 64,
          "fused graph with an in-place cache, full precision"),
    Shape("onnxruntime-int8-dynamic", "int8", 8, 378, 86.4, 358, (0.6262, 0.9852), 0.621, 0.483, 0,
          "prefill is bound by compute, and the CPU has avx512_vnni"),
    Shape(CHAMPION, "int8", 9, 738, 81.0, 312, (0.9937, 0.9965), 0.958, 0.0043, 7,
          "decode is bound by bandwidth: a quarter of the bytes per weight"),
    Shape("onnxruntime-int4-b32", "int4", 5, 782, 112.1, 254, (0.757, 0.7569), 0.656, 0.365, 2,
          "decode is bound by bandwidth: an eighth of the bytes per weight"),
)  # fmt: skip


# ── studies ──────────────────────────────────────────────────────────────────────────────────────


def demo_study(spec: OptimizeSpec | None = None, **changes: Any) -> Study:
    """A finished study of ``spec`` (by default one with a champion); ``changes`` replace its fields."""
    spec = spec or OptimizeSpec(
        model_path="demo-glm", max_latency=Duration("1s"), max_memory=ByteSize("800MiB")
    )
    choice = choose(demo_trials(), spec)
    content: dict[str, Any] = {
        "id": "demo-glm-20261122-093000-5d1f09",
        "created": datetime(2026, 11, 22, 9, 30, tzinfo=UTC),
        "finished": datetime(2026, 11, 22, 9, 38, 12, tzinfo=UTC),
        "spec": spec,
        "checkpoint": demo_checkpoint(),
        "analysis": demo_analysis(),
        "verdict": choice.verdict,
        "champion": choice.champion,
        "pareto": choice.pareto,
        "trials": choice.trials,
        "gate": demo_gate(),
        "bundle": Bundle(path=Path("studies/demo/bundle"), digest=_SHA, size_bytes=176_200_000),
        "registration": demo_registration(),
        "not_measured": (
            "Server load (concurrent requests) and energy were not measured.",
            "No GPU engine was measured: no NVIDIA driver is loaded.",
        ),
        "environment": {"torch": "2.13.0", "onnxruntime": "1.31.1", "threads": "2"},
        "output_dir": Path("studies/demo"),
    }
    return Study(**{**content, **changes})


def infeasible_study() -> Study:
    """Nothing has a TTFT of 300 ms in 200 MiB."""
    spec = OptimizeSpec(model_path="demo-glm", max_latency=Duration("300ms"), max_memory=ByteSize("200MiB"))
    return demo_study(spec, bundle=None, registration=None)


def blocked_study() -> Study:
    """A champion was found, and the gate over the results table refused it."""
    failure = "ttft_ms: p50 <= p95 <= p99 fails for torch-bf16"
    return demo_study(
        verdict=Verdict(kind="gate_failed", reasons=(f"gate: {failure}",), nearest=CHAMPION),
        champion=None,
        gate=GateResult(passed=False, evaluated=14, failures=(failure,), warnings=(), data_docs=None),
        bundle=None,
        registration=None,
    )


def planned_study() -> Study:
    """A dry run: no trial."""
    return demo_study(
        verdict=Verdict(kind="dry_run", reasons=("7 candidates would be measured, 2 are vetoed",)),
        champion=None,
        pareto=(),
        trials=(),
        gate=None,
        bundle=None,
        registration=None,
    )


def demo_gate() -> GateResult:
    warning = "at least 90 timed rounds for a p95 that decides: 10 found in ttft_ms"
    return GateResult(
        passed=True, evaluated=14, failures=(), warnings=(warning,), data_docs="data-docs/index.html"
    )


def demo_registration(tracking_uri: str = "http://127.0.0.1:5000") -> Registration:
    return Registration(
        tracking_uri=tracking_uri,
        experiment_id="1",
        run_id="9f2b6c1d0a5e4f7fb1a0c2d3e4f5a6b7",
        model_name="demo-glm",
        model_version="3",
        model_uri="models:/demo-glm@champion",
    )


# ── trials ───────────────────────────────────────────────────────────────────────────────────────


def demo_trials() -> tuple[Trial, ...]:
    """Seven measured trials, not yet held to a limit; one that crashed; two engines that cannot run here."""
    return (*map(measured_trial, SHAPES), crashed_trial(), *vetoed_trials())


def measured_trial(shape: Shape) -> Trial:
    measurements = demo_measurements(shape)
    candidate = Candidate(
        id=shape.id,
        engine=shape.id.split("-")[0],
        device="cpu",
        precision=shape.precision,
        weight_bits=shape.bits,
        knobs={"block_size": 32} if shape.id.endswith("b32") else {},
        proposed_because=shape.because,
        reference=shape.id == "torch-fp32",
        baseline=shape.id == BASELINE,
    )
    return Trial(
        id=shape.id,
        engine=candidate.engine,
        candidate=candidate,
        status="ok",
        reason="timed and judged",
        metrics=measurements.metrics,
        measurements=measurements,
        quality=demo_quality(shape),
        samples_path=f"samples/{shape.id}.json",
        log_path=f"logs/{shape.id}-benchmark.log",
        exported=ExportedModel(
            candidate_id=shape.id, path=Path("exports") / shape.id, digest=_SHA, route="genai",
            size_bytes=int(134_515_008 * shape.bits / 8), build_s=14.2,
        ),
    )  # fmt: skip


def crashed_trial() -> Trial:
    candidate = Candidate(
        id="onnxruntime-int8-b128",
        engine="onnxruntime",
        device="cpu",
        precision="int8",
        weight_bits=8.25,
        knobs={"block_size": 128},
        proposed_because="fewer scales than blocks of 32 have",
    )
    return Trial(
        id=candidate.id,
        engine=candidate.engine,
        candidate=candidate,
        status="crashed",
        reason="benchmark: ended with SIGSEGV",
        log_path=f"logs/{candidate.id}-benchmark.log",
    )


def vetoed_trials() -> tuple[Trial, ...]:
    reasons = {
        "onnxruntime-cuda": "this machine has no NVIDIA GPU: /dev/nvidia0 does not exist",
        "tensorrt": "not installed; install it with: pip install tensorrt",
    }
    return tuple(vetoed_trial(engine, reason) for engine, reason in reasons.items())


def vetoed_trial(engine: str, reason: str) -> Trial:
    candidate = Candidate(
        id=f"{engine}-fp16",
        engine=engine,
        device="gpu",
        precision="fp16",
        weight_bits=16,
        proposed_because="fp16 on tensor cores",
        vetoed_because=reason,
    )
    return Trial(id=candidate.id, engine=engine, candidate=candidate, status="vetoed", reason=reason)


def demo_measurements(shape: Shape) -> Measurements:
    """Ten rounds around the medians, with the spread of a shared host; two of torch-bf16 are disturbed."""
    noise = np.random.default_rng(sum(shape.id.encode()))

    def around(median: float) -> list[float]:
        samples = np.exp(noise.normal(0, 0.045, ROUNDS))
        return [float(s) for s in median * samples / np.median(samples)]

    ttft_ms, tpot_ms = around(shape.ttft_ms), around(1000 / shape.tokens_per_s)
    e2e_ms = [first + 63 * each for first, each in zip(ttft_ms, tpot_ms, strict=True)]
    disturbed = (3, 4) if shape.id == "torch-bf16" else ()
    return Measurements(
        metrics={
            "ttft_ms": summarise(ttft_ms, "ms"),
            "tpot_ms": summarise(tpot_ms, "ms"),
            "tokens_per_s": summarise([1000 / each for each in tpot_ms], "tokens/s"),
            "e2e_ms": summarise(e2e_ms, "ms"),
            "throughput_tokens_per_s": summarise([64_000 / each for each in e2e_ms], "tokens/s"),
            "load_ms": summarise([380 + shape.rss_mb], "ms"),
            "peak_rss_bytes": summarise([shape.rss_mb * 1e6], "bytes"),
        },
        warmups={"ttft_ms": (shape.ttft_ms * 1.6,), "tpot_ms": (1100 / shape.tokens_per_s,)},
        token_ms=(),
        foreign_cpu_share=tuple(0.31 if index in disturbed else 0.02 for index in range(ROUNDS)),
        output_tokens_ratio=1.0,
        environment={"threads": "2"},
    )


def demo_quality(shape: Shape) -> QualityReport:
    on_prefill, on_decode = shape.kept
    return QualityReport(
        prefill=demo_path(on_prefill, shape.kl, shape.top1),
        decode=demo_path(on_decode, shape.kl / 2, (1 + shape.top1) / 2),
        worse_path="prefill" if on_prefill <= on_decode else "decode",
        ratio=min(shape.kept),
        greedy_same_tokens=(shape.same_tokens, min(64, shape.same_tokens + 4)),
        greedy_tokens=64,
        finite=True,
        seconds=41.0,
    )


def demo_path(ratio: float, kl: float, top1: float) -> PathQuality:
    margin = 0.2 * (1 - ratio)
    return PathQuality(
        tokens=768,
        perplexity=25.748 / ratio,
        reference_perplexity=25.748,
        ratio=ratio,
        ratio_interval=(ratio - margin, ratio + margin),
        clear_of_limit=True,
        kl_divergence=kl,
        top1_agreement=top1,
        by_text={"debian-handbook": ratio, "python-docs": min(1.0, ratio + 0.0004)},
    )


# ── model and host ───────────────────────────────────────────────────────────────────────────────


def demo_checkpoint() -> Checkpoint:
    return Checkpoint(
        path=Path("demo-glm"),
        name="demo-glm",
        model_type="glm",
        architecture="GlmForCausalLM",
        files=(FileDigest(path="model.safetensors", size_bytes=538_060_032, sha256=_SHA),),
        digest=_SHA,
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
