"""ONNX Runtime on an NVIDIA GPU by its CUDA provider: fused graphs, weight-only quantisation."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, cast

from open_autoglm.engines.contract import (
    DRAFT_TOKENS,
    NO_DRAFTS,
    ExportContext,
    Session,
    SessionOptions,
    because_of,
    dimensions_around,
    draft_dimensions,
)
from open_autoglm.engines.gpu import vetoed_if_too_old
from open_autoglm.engines.nvidia import probe_nvidia
from open_autoglm.engines.onnxruntime_placement import Placement
from open_autoglm.engines.onnxruntime_session import GRAPH_LEVELS, open_session
from open_autoglm.export.recipe import Compute, OnnxRecipe
from open_autoglm.schemas import (
    Analysis,
    Candidate,
    Checkpoint,
    Device,
    Dimension,
    ExportedModel,
    Knob,
    OptimizeSpec,
    Precision,
    Probe,
)

_BITS: dict[Precision, int] = {"bf16": 16, "fp16": 16, "int8": 8, "int4": 4}

_CUDA = Placement(
    provider="CUDAExecutionProvider",
    options=MappingProxyType({"arena_extend_strategy": "kSameAsRequested"}),  # else it doubles what it holds
    device="cuda",
)
"""Not `whole`: the lengths that GroupQueryAttention wants on the host are rightly computed there."""

_RUN_KNOBS: Mapping[str, Knob] = MappingProxyType({"graph_level": "all", **NO_DRAFTS})


class OnnxRuntimeCudaEngine:
    """Graphs of the onnxruntime-genai builder: fused attention, the KV cache updated in place on the GPU."""

    name = "onnxruntime-cuda"
    summary = "ONNX Runtime, CUDA provider: fp16, bf16, 8- and 4-bit weights"

    def probe(self, device: Device) -> Probe:
        if device == "gpu":
            return probe_nvidia(self.name)
        reason = f"{self.name} serves NVIDIA GPUs; on the CPU use onnxruntime"
        return Probe(engine=self.name, stage="no_device", reason=reason)

    def propose(self, analysis: Analysis, spec: OptimizeSpec, device: Device) -> list[Candidate]:
        from open_autoglm.export.routes import CUDA_ROUTES, refusal

        plain: dict[str, Knob] = {"scheme": "half", **_RUN_KNOBS}
        blocks: dict[str, Knob] = {
            "compute": "fp16",
            "scheme": "weight_only",
            "block_size": 32,
            "symmetric": True,
            **_RUN_KNOBS,
        }
        found = [
            _candidate("fp16", {"compute": "fp16", **plain}, "half the bytes of fp32 on tensor cores"),
            _candidate("bf16", {"compute": "bf16", **plain}, "as fp16, with fp32's range"),
            _candidate("int8", blocks, "8-bit weights: decode reads half of fp16's bytes"),
            _candidate("int4", blocks, "4-bit weights: decode reads a quarter of fp16's bytes"),
        ]
        refused = refusal(analysis.profile.model_type, CUDA_ROUTES)
        if refused is not None:
            return [candidate.vetoed(refused) for candidate in found]
        return [vetoed_if_too_old(candidate, analysis.hardware) for candidate in found]

    def dimensions(
        self, candidate: Candidate, analysis: Analysis, spec: OptimizeSpec
    ) -> tuple[Dimension, ...]:
        """Drafts first, then how weights are rounded and what is computed with, then fusions."""
        rounding = _ROUNDING if candidate.knobs["scheme"] == "weight_only" else ()
        return dimensions_around(candidate, [*draft_dimensions(spec), *rounding, _FUSIONS])

    def variant(self, candidate: Candidate, knobs: Mapping[str, Knob]) -> Candidate:
        because = because_of(candidate, knobs)
        return _candidate(candidate.precision, {**candidate.knobs, **knobs}, because)

    def recipe(self, candidate: Candidate) -> dict[str, Any]:
        from open_autoglm.export.routes import library_versions

        return {"onnx": _onnx_recipe(candidate).model_dump(), "versions": library_versions()}

    def export(self, candidate: Candidate, checkpoint: Checkpoint, context: ExportContext) -> str:
        from open_autoglm.export.routes import export_onnx

        return export_onnx(checkpoint, _onnx_recipe(candidate), context)

    def open(self, candidate: Candidate, exported: ExportedModel, options: SessionOptions) -> Session:
        return open_session(exported.path, options, candidate.knobs, _CUDA)


_ROUNDING = (
    Dimension(
        knob="block_size",
        values=(32, 64, 128),
        because="smaller blocks follow the weights closer and have more scales to read",
    ),
    Dimension(
        knob="symmetric",
        values=(True, False),
        because="a zero point per block follows weights that are not centred, for half a byte more",
    ),
    Dimension(
        knob="compute",
        values=("fp16", "bf16"),
        because="bf16 has fp32's range and fewer digits; kernels may differ",
    ),
)

_FUSIONS = Dimension(
    knob="graph_level",
    values=tuple(GRAPH_LEVELS),
    because="fusion at load time saves launches, though a fused kernel may be the slower one",
)


def _candidate(precision: Precision, knobs: Mapping[str, Knob], because: str) -> Candidate:
    """The candidate of one configuration, from which alone its id follows."""
    parts, bits = ["onnxruntime-cuda"], float(_BITS[precision])
    if knobs["scheme"] == "weight_only":
        bits += 16 / int(knobs["block_size"])  # a 16-bit scale per block
        parts.append(f"w{_BITS[precision]}-b{knobs['block_size']}")
        parts += [] if knobs["symmetric"] else ["asym"]
        parts += [] if knobs["compute"] == "fp16" else [str(knobs["compute"])]
    else:
        parts.append(precision)
    parts += [] if knobs["graph_level"] == "all" else [f"g-{knobs['graph_level']}"]
    parts += [f"draft{knobs[DRAFT_TOKENS]}"] if knobs[DRAFT_TOKENS] else []
    return Candidate(
        id="-".join(parts),
        engine=OnnxRuntimeCudaEngine.name,
        device="gpu",
        precision=precision,
        weight_bits=bits,
        knobs=dict(knobs),
        proposed_because=because,
    )


def _onnx_recipe(candidate: Candidate) -> OnnxRecipe:
    knobs = candidate.knobs
    compute = cast(Compute, knobs["compute"])
    if knobs["scheme"] == "half":
        return OnnxRecipe(scheme="half", weight_bits=16, compute=compute)
    return OnnxRecipe(
        scheme="weight_only",
        weight_bits=8 if candidate.precision == "int8" else 4,
        compute=compute,
        block_size=int(knobs["block_size"]),
        symmetric=bool(knobs["symmetric"]),
    )
