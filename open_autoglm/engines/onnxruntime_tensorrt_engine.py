"""ONNX Runtime on an NVIDIA GPU by its TensorRT provider: standard graphs, built whole into one engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

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
from open_autoglm.engines.nvidia import probe_nvidia
from open_autoglm.engines.onnxruntime_placement import Placement
from open_autoglm.engines.onnxruntime_session import open_session
from open_autoglm.engines.standard_schemes import (
    SCHEMES,
    block_dimension,
    scheme_parts,
    standard_recipe,
    start_knobs,
    vetoed_if_unfit,
    weight_bits,
)
from open_autoglm.schemas import (
    Analysis,
    Candidate,
    Checkpoint,
    Device,
    Dimension,
    ExportedModel,
    Knob,
    ModelProfile,
    OptimizeSpec,
    Probe,
)


class OnnxRuntimeTensorRTEngine:
    """Types are the graph's own: ONNX Runtime makes a strongly typed network as long as none of the
    provider's precision flags is set, and none is."""

    name = "onnxruntime-tensorrt"
    summary = "ONNX Runtime, TensorRT provider: fp16, bf16, 8- and 4-bit weights, int8 and fp8 products"

    def probe(self, device: Device) -> Probe:
        if device == "gpu":
            return probe_nvidia(self.name)
        reason = f"{self.name} serves NVIDIA GPUs; on the CPU use onnxruntime"
        return Probe(engine=self.name, stage="no_device", reason=reason)

    def propose(self, analysis: Analysis, spec: OptimizeSpec, device: Device) -> list[Candidate]:
        found = [_start(scheme, analysis.profile) for scheme in SCHEMES]
        return [vetoed_if_unfit(candidate, analysis) for candidate in found]

    def dimensions(
        self, candidate: Candidate, analysis: Analysis, spec: OptimizeSpec
    ) -> tuple[Dimension, ...]:
        blocks = [block_dimension(analysis.profile)] if "block_size" in candidate.knobs else []
        return dimensions_around(candidate, [*draft_dimensions(spec), *blocks, _TUNED_FOR])

    def variant(self, candidate: Candidate, knobs: Mapping[str, Knob]) -> Candidate:
        return _candidate({**candidate.knobs, **knobs}, because_of(candidate, knobs))

    def recipe(self, candidate: Candidate) -> dict[str, Any]:
        from open_autoglm.export.routes import library_versions

        return {"standard": standard_recipe(candidate).model_dump(), "versions": library_versions()}

    def export(self, candidate: Candidate, checkpoint: Checkpoint, context: ExportContext) -> str:
        from open_autoglm.export.standard_graph import write_standard

        write_standard(checkpoint, standard_recipe(candidate), context.output)
        return "standard ONNX"

    def open(self, candidate: Candidate, exported: ExportedModel, options: SessionOptions) -> Session:
        """The first session of a size builds the engine, which takes minutes; later ones find it."""
        placement = tensorrt_placement(exported.path, options, str(candidate.knobs["tuned_for"]))
        return open_session(exported.path, options, candidate.knobs, placement)


# ── candidates ───────────────────────────────────────────────────────────────────────────────────

_TUNED_FOR = Dimension(
    knob="tuned_for",
    values=("token", "prompt"),
    because="TensorRT chooses its kernels for one length: a token's or a prompt's",
)


def _start(scheme: str, profile: ModelProfile) -> Candidate:
    knobs: dict[str, Knob] = {**start_knobs(scheme, profile), "tuned_for": "token", **NO_DRAFTS}
    return _candidate(knobs, SCHEMES[scheme].because)


def _candidate(knobs: Mapping[str, Knob], because: str) -> Candidate:
    """The candidate of one configuration, from which alone its id follows."""
    parts = [OnnxRuntimeTensorRTEngine.name, *scheme_parts(knobs)]
    parts += ["prompt"] if knobs["tuned_for"] == "prompt" else []
    parts += [f"draft{knobs[DRAFT_TOKENS]}"] if knobs[DRAFT_TOKENS] else []
    return Candidate(
        id="-".join(parts),
        engine=OnnxRuntimeTensorRTEngine.name,
        device="gpu",
        precision=SCHEMES[str(knobs["scheme"])].precision,
        weight_bits=weight_bits(knobs),
        knobs=dict(knobs),
        proposed_because=because,
    )


# ── the provider's options ───────────────────────────────────────────────────────────────────────


def tensorrt_placement(directory: Path, options: SessionOptions, tuned_for: str) -> Placement:
    """The TensorRT provider with one profile for all shapes of the session, and a cache for what it builds.

    Without a profile it would build again for each new shape. It takes several profiles for an input, but
    always runs the first (microsoft/onnxruntime#31624), so prefill and decode share one, from a single token
    of a single row to a full cache of all rows; ``tuned_for`` says at which length kernels are timed. Its
    parser wants the places of the cache to be a constant.
    """
    from open_autoglm.export.graph import GRAPH, input_shapes
    from open_autoglm.export.standard_graph import MAX_TOKENS

    cache = directory / f"tensorrt-b{options.batch_size}-t{options.max_tokens}-{tuned_for}"
    cache.mkdir(exist_ok=True)
    shapes = input_shapes(directory / GRAPH)
    caching = {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(cache),
    }
    longest = options.max_tokens
    usual = (options.batch_size, 1 if tuned_for == "token" else longest)
    bounds = {"min": (1, 1), "opt": usual, "max": (options.batch_size, longest)}
    profile = {
        f"trt_profile_{bound}_shapes": _profile(
            shapes, batch, sequence, longest, first=0 if bound == "max" else -1
        )
        for bound, (batch, sequence) in bounds.items()
    }
    return Placement(
        provider="TensorrtExecutionProvider",
        options=MappingProxyType({**caching, **profile}),
        device="cuda",
        whole=True,
        fixed=MappingProxyType({MAX_TOKENS: longest}),
    )


def _profile(
    shapes: Mapping[str, tuple[int | str, ...]], batch: int, sequence: int, max_tokens: int, *, first: int
) -> str:
    """``input_ids:8x512,write_indices:8,…``: one bound of a profile. Raises KeyError for another dimension.

    FIRST_LOGITS is given by its value, ``first``, since lengths inside the graph depend on it.
    """
    from open_autoglm.export.graph import FIRST_LOGITS

    figures = {"batch": batch, "sequence": sequence, "max_tokens": max_tokens}
    sizes = {
        name: "x".join(str(size if isinstance(size, int) else figures[size]) for size in shape)
        for name, shape in shapes.items()
    }
    sizes[FIRST_LOGITS] = str(first)
    return ",".join(f"{name}:{size}" for name, size in sizes.items())
