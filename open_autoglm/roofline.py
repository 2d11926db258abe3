"""The least time each phase can take on this host: what must be computed and moved, over measured peaks.

A roofline in the sense of Williams, Waterman and Patterson (2009): a call takes at least as long as
its arithmetic at the matmul peak, and at least as long as its bytes at the memory bandwidth.
"""

from __future__ import annotations

from open_autoglm.analysis import profile_model
from open_autoglm.schemas import (
    Analysis,
    Bound,
    Checkpoint,
    Hardware,
    ModelProfile,
    OptimizeSpec,
    Phase,
    PhaseCost,
    Precision,
    RooflineBound,
)

BITS: dict[Precision, float] = {"fp32": 32, "bf16": 16, "fp16": 16, "fp8": 8, "int8": 8, "int4": 4}
"""Nominal bits per weight; stored formats add scales (see ``Candidate.weight_bits``)."""

SHOWN: tuple[Precision, ...] = ("fp32", "bf16", "int8", "int4")


def analyze(checkpoint: Checkpoint, spec: OptimizeSpec, hardware: Hardware) -> Analysis:
    """Structure, host and bounds of one checkpoint at one workload. Raises CheckpointError."""
    profile = profile_model(checkpoint)
    return Analysis(profile=profile, hardware=hardware, roofline=bounds(profile, hardware, spec))


def bounds(profile: ModelProfile, hardware: Hardware, spec: OptimizeSpec) -> tuple[RooflineBound, ...]:
    """Bounds of prefill and decode on the CPU, for each of ``SHOWN`` at its nominal bits."""
    phases: tuple[Phase, ...] = ("prefill", "decode")
    return tuple(bound(profile, hardware, spec, phase, p, BITS[p]) for phase in phases for p in SHOWN)


def bound(
    profile: ModelProfile,
    hardware: Hardware,
    spec: OptimizeSpec,
    phase: Phase,
    precision: Precision,
    weight_bits: float,
) -> RooflineBound:
    """The bound of one call: the whole prompt (prefill), or one token per row at mid-output (decode).

    ``binds`` is "capacity" if weights and a full KV cache exceed the available memory; the time is
    then what it would be with enough.
    """
    context = spec.prompt_tokens + (spec.output_tokens // 2 if phase == "decode" else 0)
    cost = phase_cost(profile, phase, spec.batch_size, spec.prompt_tokens, context, weight_bits)
    moved = cost.bytes_read_weights + cost.bytes_moved_kv
    compute_ms = 1e3 * cost.flops / peak_flops_per_s(hardware, precision)
    bandwidth_ms = 1e3 * moved / hardware.read_bandwidth_bytes_per_s
    capacity = capacity_bytes(profile, spec, weight_bits)
    binds: Bound = "compute" if compute_ms >= bandwidth_ms else "bandwidth"
    return RooflineBound(
        phase=phase,
        precision=precision,
        flops=cost.flops,
        bytes_moved=moved,
        compute_ms=compute_ms,
        bandwidth_ms=bandwidth_ms,
        capacity_bytes=capacity,
        binds="capacity" if capacity > hardware.available_memory_bytes else binds,
        bound_ms=max(compute_ms, bandwidth_ms),
    )


def phase_cost(
    profile: ModelProfile, phase: Phase, batch: int, prompt_tokens: int, context_tokens: int, bits: float
) -> PhaseCost:
    """What one call must do at least, with weights of ``bits`` bits.

    Prefill reads ``prompt_tokens`` per row and writes their keys and values; decode reads one token per
    row and the cache of ``context_tokens`` (itself included). Two FLOPs per weight and token, the head
    at the last position only; the embedding is a look-up. Attention counts scores and weighted sums
    over the visible half. Each weight in use is read once per call, of the experts as many as one
    token chooses: more tokens choose more, so for mixtures of experts this is a loose bound.
    """
    tokens, context = (prompt_tokens, prompt_tokens) if phase == "prefill" else (1, context_tokens)
    tables = profile.embedding_parameters + (0 if profile.tied_embeddings else profile.lm_head_parameters)
    body = profile.active_parameters - tables
    attention = _attention_flops(profile, tokens, context)
    cached = tokens if phase == "prefill" else _visible_tokens(profile, context)
    return PhaseCost(
        flops=batch * (2.0 * body * tokens + 2.0 * profile.lm_head_parameters + attention),
        bytes_read_weights=(body + profile.lm_head_parameters) * bits / 8,
        bytes_moved_kv=batch * cached * profile.kv_elements_per_token * kv_bits(bits) / 8,
    )


def kv_bits(weight_bits: float) -> float:
    """Bits per cached number: as the weights, but no engine here quantises the cache below 16."""
    return max(weight_bits, 16)


def capacity_bytes(profile: ModelProfile, spec: OptimizeSpec, weight_bits: float) -> float:
    """All weights, of all experts, and the KV cache of every row at its full length."""
    length = spec.prompt_tokens + spec.output_tokens
    # What has left a sliding window is dropped; top-k attention keeps everything.
    kept = _visible_tokens(profile, length) if profile.sliding_window else length
    cache = spec.batch_size * kept * profile.kv_elements_per_token * kv_bits(weight_bits) / 8
    return profile.parameters * weight_bits / 8 + cache


def peak_flops_per_s(hardware: Hardware, precision: Precision) -> float:
    """The fastest arithmetic that can carry ``precision`` on this CPU.

    fp32 has only its own. 16-bit weights may be widened to fp32. 8- and 4-bit weights may meet
    activations of any kind, so the best peak of all applies: optimistic for engines that compute
    weight-only formats in fp32, and therefore still a bound.
    """
    wide = hardware.matmul_fp32_flops_per_s
    if precision == "fp32":
        return wide
    half = hardware.matmul_bf16_flops_per_s or 0.0
    if precision in ("bf16", "fp16"):
        return max(wide, half)
    return max(wide, half, hardware.matmul_int8_ops_per_s or 0.0)


def _attention_flops(profile: ModelProfile, tokens: int, context: int) -> float:
    """Of the last ``tokens`` positions of ``context``: q·k and p·v, each two FLOPs per dimension."""
    dims = profile.head_dim + (profile.value_head_dim or profile.head_dim)
    full = profile.layers - profile.limited_layers
    pairs = full * (_pairs(context) - _pairs(context - tokens))
    if (window := profile.attended_tokens) is not None:
        pairs += profile.limited_layers * (_pairs(context, window) - _pairs(context - tokens, window))
    return 2.0 * profile.attention_heads * dims * pairs


def _pairs(tokens: int, window: int | None = None) -> int:
    """Query-key pairs of a causal sequence in which a query sees itself and what came before it, at
    most ``window`` keys in all."""
    ramp = min(tokens, window or tokens)
    return ramp * (ramp + 1) // 2 + (tokens - ramp) * ramp


def _visible_tokens(profile: ModelProfile, context: int) -> float:
    """Cached tokens that the next token reads, as the mean over layers, whose caches are taken as equal."""
    seen = min(context, profile.attended_tokens or context)
    limited = profile.limited_layers / profile.layers
    return (1 - limited) * context + limited * seen
