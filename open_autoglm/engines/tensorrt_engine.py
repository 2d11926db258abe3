"""TensorRT without a runtime between: a plan built from the standard graph for the sizes of the request."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

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
from open_autoglm.engines.gpu import BF16_SINCE, older_than
from open_autoglm.engines.nvidia import probe_nvidia
from open_autoglm.engines.standard_schemes import (
    SCHEMES,
    block_dimension,
    scheme_parts,
    standard_recipe,
    start_knobs,
    vetoed_if_unfit,
    weight_bits,
)
from open_autoglm.engines.tensorrt_executor import open_executor
from open_autoglm.engines.tensorrt_session import StandardSession
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
    Probe,
)
from open_autoglm.units import quantity

_SESSION_KNOBS: Mapping[str, Knob] = MappingProxyType({"cuda_graph": False, **NO_DRAFTS})
"""None of these changes a plan."""


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
        schemes = ["fp16"] if device == "cpu" else list(SCHEMES)
        found = [self._start(scheme, analysis, spec) for scheme in schemes]
        return [self._vetoed_if_unfit(candidate, analysis) for candidate in found]

    def _start(self, scheme: str, analysis: Analysis, spec: OptimizeSpec) -> Candidate:
        """Tuned for both regimes where there is room for a plan with twice the weights, and else for one."""
        knobs: dict[str, Knob] = {
            **start_knobs(scheme, analysis.profile),
            "weight_streaming": False,
            **_size_knobs(analysis.profile, spec),
            "tuned_for": "both",
            **_SESSION_KNOBS,
        }
        because = SCHEMES[scheme].because
        if (narrow := _no_room_for_two(knobs, analysis)) is not None:
            tuned_for = "prompt" if spec.objective in ("ttft", "ttft_p95") else "token"
            knobs, because = {**knobs, "tuned_for": tuned_for}, f"{because}; {narrow}"
        return self._candidate(knobs, because)

    def dimensions(
        self, candidate: Candidate, analysis: Analysis, spec: OptimizeSpec
    ) -> tuple[Dimension, ...]:
        """Drafts, CUDA graphs, how weights are rounded and what is computed with; then what saves memory."""
        knobs, scarce = candidate.knobs, spec.objective == "memory" or spec.max_memory is not None
        wide = _no_room_for_two(knobs, analysis) is None
        rounded = knobs["scheme"] not in ("fp16", "bf16")
        space = [
            *draft_dimensions(spec),
            _CUDA_GRAPH,
            *([block_dimension(analysis.profile)] if "block_size" in knobs else []),
            *([_COMPUTE] if rounded and not _lacks_bf16(analysis.hardware) else []),
            *([_tuned_for(*(["both"] if wide else []), "token", "prompt")] if scarce or not wide else []),
            *([_WEIGHT_STREAMING] if scarce or _overfull(knobs, analysis) else []),
        ]
        return dimensions_around(candidate, space)

    def variant(self, candidate: Candidate, knobs: Mapping[str, Knob]) -> Candidate:
        return self._candidate({**candidate.knobs, **knobs}, because_of(candidate, knobs))

    def recipe(self, candidate: Candidate) -> dict[str, Any]:
        from open_autoglm.export.routes import library_versions

        gpu = host_gpu()
        return {
            "standard": standard_recipe(candidate).model_dump(),
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
            write_standard(checkpoint, standard_recipe(candidate), Path(scratch))
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

    def _vetoed_if_unfit(self, candidate: Candidate, analysis: Analysis) -> Candidate:
        """Also on a GPU of a generation that it does not serve."""
        reason = older_than(analysis.hardware, self.oldest, self.name)
        return candidate.vetoed(reason) if reason is not None else vetoed_if_unfit(candidate, analysis)

    def _candidate(self, knobs: Mapping[str, Knob], because: str) -> Candidate:
        """The candidate of one configuration, from which alone its id follows."""
        return Candidate(
            id="-".join([self.name, *_id_parts(knobs)]),
            engine=self.name,
            device="gpu",
            precision=SCHEMES[str(knobs["scheme"])].precision,
            weight_bits=weight_bits(knobs),
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

_WEIGHTS_SHARE = 0.8
"""Of a GPU's memory: cache, activations and the runtime itself want the rest."""

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


def _tuned_for(*values: Knob) -> Dimension:
    because = (
        "a plan for prompts and tokens each may hold the weights twice; one for all lengths holds them once"
    )
    return Dimension(knob="tuned_for", values=values, because=because)


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


def _id_parts(knobs: Mapping[str, Knob]) -> list[str]:
    """What the files are, then what is done otherwise than by default. Sizes are the study's."""
    parts = scheme_parts(knobs)
    parts += [] if knobs["compute"] in ("fp16", knobs["scheme"]) else [str(knobs["compute"])]
    parts += [] if knobs["tuned_for"] == "both" else [str(knobs["tuned_for"])]
    parts += ["stream"] if knobs["weight_streaming"] else []
    parts += ["graph"] if knobs["cuda_graph"] else []
    parts += [f"draft{knobs[DRAFT_TOKENS]}"] if knobs[DRAFT_TOKENS] else []
    return parts


def _lacks_bf16(hardware: Hardware) -> bool:
    return older_than(hardware, BF16_SINCE, "bf16") is not None


def _overfull(knobs: Mapping[str, Knob], analysis: Analysis) -> bool:
    """Whether the weights alone are more than the first GPU holds."""
    room = _gpu_bytes(analysis.hardware)
    return room is not None and analysis.profile.weight_bytes(weight_bits(knobs)) > room


def _no_room_for_two(knobs: Mapping[str, Knob], analysis: Analysis) -> str | None:
    """Why a plan is to have one profile: twice its weights leave the first GPU too little for the rest."""
    room, twice = _gpu_bytes(analysis.hardware), 2 * analysis.profile.weight_bytes(weight_bits(knobs))
    if room is None or twice <= _WEIGHTS_SHARE * room:
        return None
    gpu = analysis.hardware.gpus[0]
    return (
        f"one profile for all lengths, since twice the weights, {quantity(twice, 'bytes')}, are more than "
        f"{_WEIGHTS_SHARE:.0%} of the {quantity(room, 'bytes')} of {gpu.name}"
    )


def _gpu_bytes(hardware: Hardware) -> int | None:
    """Of the first GPU; of the host where it has none of its own. None without a GPU."""
    return (hardware.gpus[0].memory_bytes or hardware.memory_bytes) if hardware.gpus else None
