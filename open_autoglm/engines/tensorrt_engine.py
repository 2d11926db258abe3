"""TensorRT without a runtime between: a plan built from the standard graph for the sizes of the request."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from open_autoglm.engines.capability_packages import TENSORRT, TENSORRT_RTX
from open_autoglm.engines.contract import (
    CACHE_TOKENS,
    DRAFT_TOKENS,
    NO_DRAFTS,
    ExportContext,
    Session,
    SessionOptions,
    because_of,
    dimensions_around,
    draft_dimensions,
)
from open_autoglm.engines.gpu import BF16_SINCE, FP8_SINCE, older_than
from open_autoglm.engines.nvidia import probe_nvidia
from open_autoglm.engines.tensorrt_executor import open_executor
from open_autoglm.engines.tensorrt_session import StandardSession
from open_autoglm.export.decoder_graph import MODEL_TYPES
from open_autoglm.export.standard_recipe import StandardRecipe
from open_autoglm.export.tensorrt_api import Flavour
from open_autoglm.export.tensorrt_plan import PlanSizes, host_gpu
from open_autoglm.measure.scenarios import LEAD_IN_TOKENS
from open_autoglm.packages import version_of
from open_autoglm.quality.reference import plan_layout
from open_autoglm.schemas import (
    Analysis,
    Candidate,
    Checkpoint,
    Device,
    Dimension,
    ExportedModel,
    Hardware,
    Knob,
    ModelProfile,
    OptimizeSpec,
    Precision,
    Probe,
)

_SESSION_KNOBS: Mapping[str, Knob] = MappingProxyType({"cuda_graph": False, **NO_DRAFTS})
"""None of these changes a plan."""


class _Scheme(NamedTuple):
    precision: Precision
    bits: int
    weights: str
    """In a :class:`StandardRecipe`."""
    because: str


_SCHEMES: Mapping[str, _Scheme] = MappingProxyType(
    {
        "fp16": _Scheme("fp16", 16, "same", "half the bytes of fp32 on tensor cores"),
        "bf16": _Scheme("bf16", 16, "same", "as fp16, with fp32's range"),
        "w8": _Scheme("int8", 8, "int8", "8-bit weights: decode reads half of fp16's bytes"),
        "w4": _Scheme("int4", 4, "int4", "4-bit weights: decode reads a quarter of fp16's bytes"),
        "w8a8": _Scheme("int8", 8, "w8a8", "int8 products: prefill is bound by arithmetic"),
        "fp8": _Scheme("fp8", 8, "fp8", "fp8 products: int8's bytes and rate, rounded like a float"),
    }
)
"""By the value of the knob ``scheme``."""


class _NativeEngine:
    """Either flavour; the classes below say which."""

    name: Flavour
    summary: str
    packages: tuple[str, ...]
    oldest: tuple[int, int]
    """The least compute capability that it runs on."""

    def probe(self, device: Device) -> Probe:
        if device != "gpu":
            reason = f"{self.name} runs on NVIDIA GPUs only"
            return Probe(engine=self.name, stage="no_device", reason=reason)
        return probe_nvidia(self.name)

    def propose(self, analysis: Analysis, spec: OptimizeSpec, device: Device) -> list[Candidate]:
        """On the CPU only the first, which stands there for all that it cannot run."""
        shared: dict[str, Knob] = {**_size_knobs(analysis.profile, spec), **_SESSION_KNOBS}
        schemes = ["fp16"] if device == "cpu" else list(_SCHEMES)
        found = [self._start(scheme, shared) for scheme in schemes]
        unknown = _unknown_model(analysis.profile)
        if unknown is not None:
            return [candidate.vetoed(unknown) for candidate in found]
        return [self._vetoed_if_too_old(candidate, analysis.hardware) for candidate in found]

    def _start(self, scheme: str, shared: Mapping[str, Knob]) -> Candidate:
        compute = "bf16" if scheme == "bf16" else "fp16"
        knobs: dict[str, Knob] = {"scheme": scheme, "compute": compute, "weight_streaming": False, **shared}
        if scheme == "w4":
            knobs["block_size"] = _BLOCK_SIZE.values[0]
        return self._candidate(knobs, _SCHEMES[scheme].because)

    def dimensions(
        self, candidate: Candidate, analysis: Analysis, spec: OptimizeSpec
    ) -> tuple[Dimension, ...]:
        """Drafts, CUDA graphs, then how weights are rounded and what is computed with."""
        memory_counts = spec.objective == "memory" or spec.max_memory is not None
        rounded = candidate.knobs["scheme"] not in ("fp16", "bf16")
        space = [
            *draft_dimensions(spec),
            _CUDA_GRAPH,
            *([_BLOCK_SIZE] if "block_size" in candidate.knobs else []),
            *([_COMPUTE] if rounded and not _lacks_bf16(analysis.hardware) else []),
            *([_WEIGHT_STREAMING] if memory_counts or _overfull(candidate, analysis) else []),
        ]
        return dimensions_around(candidate, space)

    def variant(self, candidate: Candidate, knobs: Mapping[str, Knob]) -> Candidate:
        return self._candidate({**candidate.knobs, **knobs}, because_of(candidate, knobs))

    def recipe(self, candidate: Candidate) -> dict[str, Any]:
        from open_autoglm.export.routes import library_versions

        gpu = host_gpu()
        return {
            "standard": _standard_recipe(candidate).model_dump(),
            "sizes": _sizes(candidate).model_dump(),
            "weight_streaming": candidate.knobs["weight_streaming"],
            "gpu": None if gpu is None else gpu.model_dump(),
            "versions": {**library_versions(), self.name: version_of(*self.packages) or "absent"},
        }

    def export(self, candidate: Candidate, checkpoint: Checkpoint, context: ExportContext) -> str:
        from open_autoglm.export.standard_graph import write_standard
        from open_autoglm.export.tensorrt_build import build_plan

        # The graph is as large as the weights, and of no use beside the plan.
        with tempfile.TemporaryDirectory(dir=context.output) as scratch:
            write_standard(checkpoint, _standard_recipe(candidate), Path(scratch))
            build_plan(
                Path(scratch),
                context.output,
                _sizes(candidate),
                self.name,
                weight_streaming=bool(candidate.knobs["weight_streaming"]),
                timings=context.ledger.parent / "tensorrt",
            )
        return "standard-graph, plan"

    def open(self, candidate: Candidate, exported: ExportedModel, options: SessionOptions) -> Session:
        return StandardSession(open_executor(exported.path, self.name, options, candidate.knobs), options)

    def _vetoed_if_too_old(self, candidate: Candidate, hardware: Hardware) -> Candidate:
        """On a GPU of a generation that it does not serve, or without the arithmetic."""
        needed = {"bf16": BF16_SINCE, "fp8": FP8_SINCE}.get(candidate.precision, self.oldest)
        reason = older_than(hardware, self.oldest, self.name) or older_than(
            hardware, needed, candidate.precision
        )
        return candidate if reason is None else candidate.vetoed(reason)

    def _candidate(self, knobs: Mapping[str, Knob], because: str) -> Candidate:
        """The candidate of one configuration, from which alone its id follows."""
        scheme = _SCHEMES[str(knobs["scheme"])]
        bits = float(scheme.bits)
        if "block_size" in knobs:
            bits += 16 / int(knobs["block_size"])  # a 16-bit scale per block
        return Candidate(
            id="-".join([self.name, *_id_parts(knobs)]),
            engine=self.name,
            device="gpu",
            precision=scheme.precision,
            weight_bits=bits,
            knobs=dict(knobs),
            proposed_because=because,
        )


class TensorRTEngine(_NativeEngine):
    """TensorRT 10 or 11."""

    name = "tensorrt"
    summary = "TensorRT: fp16, bf16, 8- and 4-bit weights, int8 and fp8 products"
    packages = TENSORRT
    oldest = (7, 5)


class TensorRTRtxEngine(_NativeEngine):
    """TensorRT-RTX: plans are built ahead, without a GPU if need be, and finished where they run."""

    name = "tensorrt-rtx"
    summary = "TensorRT-RTX: the same for GeForce and RTX GPUs, built ahead of time"
    packages = TENSORRT_RTX
    oldest = (8, 0)  # of plans built for every GPU it serves; for (7, 5) it builds others


# ── configurations ───────────────────────────────────────────────────────────────────────────────

_CUDA_GRAPH = Dimension(
    knob="cuda_graph",
    values=(False, True),
    because="a token launched as one graph saves launches, which count where kernels are short",
)

_COMPUTE = Dimension(
    knob="compute",
    values=("fp16", "bf16"),
    because="bf16 has fp32's range and fewer digits; kernels may differ",
)

_BLOCK_SIZE = Dimension(
    knob="block_size",
    values=(128, 64),
    because="smaller blocks follow the weights closer and have more scales to read",
)

_WEIGHT_STREAMING = Dimension(
    knob="weight_streaming",
    values=(False, True),
    because="weights that stay on the host leave room on the GPU and are copied in every call",
)


def _size_knobs(profile: ModelProfile, spec: OptimizeSpec) -> dict[str, Knob]:
    """A plan is for the sizes asked for: those a study times and scores by, and its `SessionOptions`."""
    request = min(spec.prompt_tokens + spec.output_tokens + LEAD_IN_TOKENS, profile.context_tokens)
    window = plan_layout(profile.context_tokens, spec).window_tokens
    return {
        "batch_size": spec.batch_size,
        "prompt_tokens": spec.prompt_tokens,
        CACHE_TOKENS: max(request, window),
    }


def _sizes(candidate: Candidate) -> PlanSizes:
    return PlanSizes.model_validate({name: candidate.knobs[name] for name in PlanSizes.model_fields})


def _standard_recipe(candidate: Candidate) -> StandardRecipe:
    knobs = candidate.knobs
    blocks = {"block_size": knobs["block_size"]} if "block_size" in knobs else {}
    weights = _SCHEMES[str(knobs["scheme"])].weights
    return StandardRecipe.model_validate({"compute": knobs["compute"], "weights": weights, **blocks})


def _id_parts(knobs: Mapping[str, Knob]) -> list[str]:
    """What the files are, then what is done otherwise than by default. Sizes are the study's."""
    parts = [str(knobs["scheme"])]
    parts += [f"b{knobs['block_size']}"] if "block_size" in knobs else []
    parts += [] if knobs["compute"] in ("fp16", knobs["scheme"]) else [str(knobs["compute"])]
    parts += ["stream"] if knobs["weight_streaming"] else []
    parts += ["graph"] if knobs["cuda_graph"] else []
    parts += [f"draft{knobs[DRAFT_TOKENS]}"] if knobs[DRAFT_TOKENS] else []
    return parts


def _unknown_model(profile: ModelProfile) -> str | None:
    if profile.model_type in MODEL_TYPES:
        return None
    known = ", ".join(sorted(MODEL_TYPES))
    return f"no standard graph for model type {profile.model_type}: there are {known}"


def _lacks_bf16(hardware: Hardware) -> bool:
    return older_than(hardware, BF16_SINCE, "bf16") is not None


def _overfull(candidate: Candidate, analysis: Analysis) -> bool:
    """Whether the weights alone are more than the first GPU holds."""
    gpus = analysis.hardware.gpus
    return bool(gpus) and analysis.profile.weight_bytes(candidate.weight_bits) > gpus[0].memory_bytes
