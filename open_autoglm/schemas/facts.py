"""What is known before anything runs: the checkpoint, the model, the host, and the bound they set."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from open_autoglm.schemas.base import AttentionKind, Bound, Model, Phase, Precision, RotaryStyle


class FileDigest(Model):
    """One file of a checkpoint, export or bundle, relative to its directory."""

    path: str
    size_bytes: int
    sha256: str


class Checkpoint(Model):
    """A resolved, validated checkpoint: safetensors, config, tokenizer, and the digest of all of it."""

    path: Path
    name: str
    model_type: str
    architecture: str
    files: tuple[FileDigest, ...]
    digest: str
    weight_bytes: int
    weight_dtype: str
    context_tokens: int
    vocab_size: int
    trust_remote_code: bool = False

    @property
    def config_path(self) -> Path:
        return self.path / "config.json"


class PhaseCost(Model):
    """What one call of a phase must do at the workload's shape, in fp32 unless said otherwise."""

    flops: float
    bytes_read_weights: float
    bytes_moved_kv: float


class ModelProfile(Model):
    """Facts of structure, read from the config and the module tree on the meta device."""

    model_type: str
    architecture: str
    layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    context_tokens: int
    attention: AttentionKind
    attention_heads: int
    kv_heads: int
    head_dim: int = Field(description="of queries and keys")
    value_head_dim: int | None = Field(None, description="of values, if it differs from head_dim")
    attention_bias: bool
    qk_norm: bool
    rotary: RotaryStyle
    rotary_dims: int
    rotary_scaling: str = Field("default", description="how it is stretched for long contexts; default: not")
    mlp: Literal["fused_gate_up", "split_gate_up", "plain"]
    norms_per_layer: int
    norm_eps: float
    tied_embeddings: bool
    experts: int
    experts_per_token: int
    shared_experts: int
    dense_layers: int
    sliding_window: int | None
    limited_layers: int = Field(0, description="layers whose queries see at most `attended_tokens` keys")
    attended_tokens: int | None = Field(None, description="the sliding window, or the top-k of mla+dsa")
    parameters: int
    active_parameters: int
    embedding_parameters: int
    lm_head_parameters: int = Field(description="of the output matrix; the embedding's own number if tied")
    kv_elements_per_token: int = Field(description="cached numbers per token, over all layers")

    def weight_bytes(self, bits: float) -> int:
        """Bytes of all parameters stored at ``bits`` per parameter."""
        return int(self.parameters * bits / 8)

    def whole_blocks(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Those of ``sizes`` into which the inputs of every linear layer can be divided."""
        heads_width = self.attention_heads * (self.value_head_dim or self.head_dim)
        inputs = (self.hidden_size, self.intermediate_size, heads_width)
        return tuple(size for size in sizes if all(width % size == 0 for width in inputs))

    def kv_bytes_per_token(self, bits: float) -> int:
        return int(self.kv_elements_per_token * bits / 8)


class Gpu(Model):
    name: str
    memory_bytes: int
    driver: str
    compute_capability: str | None = None


class Hardware(Model):
    """The host as measured, with the fingerprint that cache keys use."""

    cpu_model: str
    cores: int
    isa: tuple[str, ...]
    memory_bytes: int
    available_memory_bytes: int
    read_bandwidth_bytes_per_s: float
    matmul_fp32_flops_per_s: float
    matmul_bf16_flops_per_s: float | None
    matmul_int8_ops_per_s: float | None
    gpus: tuple[Gpu, ...]
    gpu_reason: str = Field(description="why `gpus` is empty, or an empty string")
    os: str
    python: str
    fingerprint: str


class RooflineBound(Model):
    """The least time one phase can take on this host: max(compute, bandwidth), if it fits at all."""

    phase: Phase
    precision: Precision
    flops: float
    bytes_moved: float
    compute_ms: float
    bandwidth_ms: float
    capacity_bytes: float
    binds: Bound
    bound_ms: float


class Analysis(Model):
    """What `analyze` hands on: structure, host, and the roofline of each phase and precision."""

    profile: ModelProfile
    hardware: Hardware
    roofline: tuple[RooflineBound, ...]

    def bound(self, phase: Phase, precision: Precision) -> RooflineBound:
        return next(b for b in self.roofline if b.phase == phase and b.precision == precision)
