"""ONNX Runtime on the CPU: fused graphs, weight-only quantisation, the KV cache updated in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType
from typing import Any, cast

from open_autoglm.engines.contract import (
    ALL_THREADS,
    DRAFT_TOKENS,
    NO_DRAFTS,
    ExportContext,
    Session,
    SessionOptions,
    because_of,
    dimensions_around,
    draft_dimensions,
    thread_dimension,
    threads_of,
)
from open_autoglm.engines.onnxruntime_session import GRAPH_LEVELS, SESSION_KNOBS, open_session
from open_autoglm.export.linears import Role
from open_autoglm.export.recipe import EXACT, OnnxRecipe, Which
from open_autoglm.schemas import (
    Analysis,
    Candidate,
    Checkpoint,
    Device,
    Dimension,
    ExportedModel,
    Hardware,
    Knob,
    OptimizeSpec,
    Precision,
    Probe,
)

_INSTALL = "pip install 'open-autoglm[cpu]'"
_MINIMUM = (1, 27)

_BITS: dict[Precision, int] = {"fp32": 32, "int8": 8, "int4": 4}

INT8_ACTIVATIONS = 4
"""The accuracy level of MatMulNBits that rounds activations to int8; 0 keeps them in fp32."""

_RUN_KNOBS: Mapping[str, Knob] = MappingProxyType({**SESSION_KNOBS, **NO_DRAFTS})
"""None of these changes an exported file."""


class OnnxRuntimeEngine:
    """The default CPU engine."""

    name = "onnxruntime"
    summary = "ONNX Runtime, CPU provider: fp32, int8 by calibration, 8- and 4-bit weights"

    def probe(self, device: Device) -> Probe:
        if device != "cpu":
            reason = "onnxruntime serves the CPU; on a GPU use onnxruntime-cuda"
            return Probe(engine=self.name, stage="no_device", reason=reason)
        found = _installed_version()
        if found is None:
            return Probe(
                engine=self.name, stage="missing", reason="onnxruntime is not installed", install=_INSTALL
            )
        if tuple(int(part) for part in found.split(".")[:2]) < _MINIMUM:
            reason = f"onnxruntime {found} is older than {_MINIMUM[0]}.{_MINIMUM[1]}"
            return Probe(engine=self.name, stage="installed", version=found, reason=reason, install=_INSTALL)
        return Probe(engine=self.name, stage="ready", version=found, reason="CPU execution provider")

    def propose(self, analysis: Analysis, spec: OptimizeSpec, device: Device) -> list[Candidate]:
        from open_autoglm.export.routes import refusal

        vnni = _has_vnni(analysis.hardware)
        hope = "has VNNI, so int8 arithmetic is fast" if vnni else "has no VNNI: int8 may not pay"
        blocks: dict[str, Knob] = {
            "scheme": "weight_only",
            "block_size": 32,
            "accuracy_level": INT8_ACTIVATIONS,
            **_RUN_KNOBS,
        }
        mixed: dict[str, Knob] = {**blocks, "symmetric": True, "wide": "none"}
        scales: dict[str, Knob] = {
            "scheme": "int8",
            "fixed_scales": True,
            "weight_only_down": "worst",
            **_RUN_KNOBS,
        }
        int8 = _candidate(
            "int8", scales, "int8 products, scales by calibration: prefill is bound by arithmetic"
        )
        found = [
            _candidate("fp32", {"scheme": "fp32", **_RUN_KNOBS}, "fused graph, in-place KV cache, exact"),
            _candidate(
                "int8",
                {"scheme": "dynamic_int8", **_RUN_KNOBS},
                f"int8 weights and activations; this CPU {hope}",
            ),
            int8 if vnni else int8.vetoed(_SATURATES),
            _candidate("int8", blocks, "8-bit weights: decode reads a quarter of the fp32 bytes"),
            _candidate("int4", mixed, "4-bit weights: decode reads an eighth of the fp32 bytes"),
        ]
        refused = refusal(analysis.profile.model_type)
        return found if refused is None else [candidate.vetoed(refused) for candidate in found]

    def dimensions(
        self, candidate: Candidate, analysis: Analysis, spec: OptimizeSpec
    ) -> tuple[Dimension, ...]:
        """What may bring most first: drafts, what decides quality by the scheme, threads, session options."""
        memory_counts = spec.objective == "memory" or spec.max_memory is not None
        space = [
            *draft_dimensions(spec),
            *_scheme_dimensions(candidate, analysis.hardware),
            thread_dimension(analysis.hardware),
            *_SESSION_DIMENSIONS,
            *(_MEMORY_DIMENSIONS if memory_counts else ()),
        ]
        return dimensions_around(candidate, space)

    def variant(self, candidate: Candidate, knobs: Mapping[str, Knob]) -> Candidate:
        because = because_of(candidate, knobs)
        return _candidate(candidate.precision, {**candidate.knobs, **knobs}, because)

    def recipe(self, candidate: Candidate) -> dict[str, Any]:
        from open_autoglm.export.routes import library_versions

        return {"onnx": _recipe_of(candidate).model_dump(), "versions": library_versions()}

    def export(self, candidate: Candidate, checkpoint: Checkpoint, context: ExportContext) -> str:
        from open_autoglm.export.routes import export_onnx

        return export_onnx(checkpoint, _recipe_of(candidate), context)

    def open(self, candidate: Candidate, exported: ExportedModel, options: SessionOptions) -> Session:
        options = options.model_copy(update={"threads": threads_of(candidate, options)})
        return open_session(exported.path, options, candidate.knobs)


# ── configurations ───────────────────────────────────────────────────────────────────────────────

_SESSION_DIMENSIONS = (
    Dimension(
        knob="graph_level",
        values=tuple(GRAPH_LEVELS),
        because="fusion at load time saves dispatches, though a fused kernel may be the slower one",
    ),
    Dimension(
        knob="allow_spinning",
        values=(True, False),
        because="threads that spin between operators start the next one sooner and keep the cores busy",
    ),
    Dimension(
        knob="flash_attention",
        values=(True, False),
        because="tiles save memory on long prompts; short ones can be faster with the whole score matrix",
    ),
)

_MEMORY_DIMENSIONS = (
    Dimension(
        knob="memory_pattern",
        values=(True, False),
        because="one block planned for a whole call saves allocations and holds more memory",
    ),
    Dimension(
        knob="arena",
        values=(True, False),
        because="an arena keeps what it once had from the system; without it every call asks again",
    ),
)

_INT8_DIMENSIONS = (
    Dimension(
        knob="fixed_scales",
        values=(True, False),
        because="one activation scale for all tokens is cheaper and coarser than one per token",
    ),
    Dimension(
        knob="weight_only_down",
        values=("worst", "none", "all"),
        because="8-bit weights alone are slower than int8 products, and closer where a few inputs are huge",
    ),
)

_SATURATES = (
    "this CPU has no VNNI: without it ONNX Runtime adds pairs of int8 products in 16 bits, which overflow"
)


_INT4_DIMENSIONS = (
    Dimension(
        knob="symmetric",
        values=(True, False),
        because="a zero point per block follows weights that are not centred, for half a byte more",
    ),
    Dimension(
        knob="wide",
        values=("none", "head", "head-down"),
        because="8 bits for the layers that lose most by 4: the logits', and the down-projections",
    ),
)

_WIDE: Mapping[str, tuple[Role, ...]] = MappingProxyType(
    {"none": (), "head": ("head",), "head-down": ("head", "down")}
)


_DOWN_NAMES: Mapping[str, list[str]] = MappingProxyType({"worst": [], "none": ["down8"], "all": ["wdown"]})
"""Of the choices of ``weight_only_down`` in ids; the first is where the search starts."""


def _scheme_dimensions(candidate: Candidate, hardware: Hardware) -> Sequence[Dimension]:
    if candidate.knobs["scheme"] == "int8":
        return _INT8_DIMENSIONS
    if candidate.knobs["scheme"] != "weight_only":
        return ()
    return [*_weight_dimensions(hardware), *(_INT4_DIMENSIONS if candidate.precision == "int4" else ())]


def _weight_dimensions(hardware: Hardware) -> list[Dimension]:
    block_size = Dimension(
        knob="block_size",
        values=(16, 32, 64, 128),
        because="smaller blocks follow the weights closer and have more scales to read",
    )
    if _has_vnni(hardware):
        # Not worth a trial: an 8-bit token took 150 ms at level 0 and 7 ms at level 4 on Zen 4.
        return [block_size]
    accuracy_level = Dimension(
        knob="accuracy_level",
        values=(INT8_ACTIVATIONS, 0),
        because="int8 activations (4) need fast int8 arithmetic, which this CPU has not; 0 computes in fp32",
    )
    return [block_size, accuracy_level]


def _has_vnni(hardware: Hardware) -> bool:
    return not {"avx512_vnni", "avx_vnni"}.isdisjoint(hardware.isa)


def _candidate(precision: Precision, knobs: Mapping[str, Knob], because: str) -> Candidate:
    """The candidate of one configuration, from which alone its id follows."""
    bits = float(_BITS[precision])
    if knobs["scheme"] == "weight_only":
        # One fp32 scale per block; the wide layers' share depends on the model and is left out.
        bits += 32 / int(knobs["block_size"])
    return Candidate(
        id=_id(precision, knobs),
        engine="onnxruntime",
        device="cpu",
        precision=precision,
        weight_bits=bits,
        knobs=dict(knobs),
        proposed_because=because,
    )


def _id(precision: Precision, knobs: Mapping[str, Knob]) -> str:
    """What the files are, then what the session does otherwise than by default."""
    names = {"fp32": "fp32", "dynamic_int8": "dynamic-int8", "int8": "w8a8"}
    parts = ["onnxruntime"]
    if knobs["scheme"] == "weight_only":
        parts.append(f"w{_BITS[precision]}-b{knobs['block_size']}")
        if knobs["accuracy_level"] != INT8_ACTIVATIONS:
            parts.append(f"a{knobs['accuracy_level']}")
        parts += [] if knobs.get("symmetric", True) else ["asym"]
        parts += [] if knobs.get("wide", "none") == "none" else [f"{knobs['wide']}8"]
    else:
        parts.append(names[str(knobs["scheme"])])
    if knobs["scheme"] == "int8":
        parts += [] if knobs["fixed_scales"] else ["token"]
        parts += _DOWN_NAMES[str(knobs["weight_only_down"])]
    if knobs["threads"] != ALL_THREADS:
        parts.append(f"t{knobs['threads']}")
    if knobs["graph_level"] != "all":
        parts.append(f"g-{knobs['graph_level']}")
    switched_off = {
        "allow_spinning": "nospin",
        "flash_attention": "noflash",
        "memory_pattern": "nopattern",
        "arena": "noarena",
    }
    parts += [name for knob, name in switched_off.items() if not knobs[knob]]
    parts += [f"draft{knobs[DRAFT_TOKENS]}"] if knobs[DRAFT_TOKENS] else []
    return "-".join(parts)


_REST_BLOCK_SIZE = 16
"""Of what stays weight-only beside int8 products: little of the bytes, so the closest fit."""


def _recipe_of(candidate: Candidate) -> OnnxRecipe:
    knobs = candidate.knobs
    if knobs["scheme"] == "fp32":
        return EXACT
    if knobs["scheme"] == "dynamic_int8":
        return EXACT.model_copy(update={"scheme": "dynamic_int8"})
    if knobs["scheme"] == "int8":
        return OnnxRecipe(
            scheme="int8",
            weight_bits=8,
            block_size=_REST_BLOCK_SIZE,
            accuracy_level=INT8_ACTIVATIONS,
            fixed_scales=bool(knobs["fixed_scales"]),
            weight_only_down=cast(Which, knobs["weight_only_down"]),
        )
    return OnnxRecipe(
        scheme="weight_only",
        weight_bits=8 if candidate.precision == "int8" else 4,
        block_size=int(knobs["block_size"]),
        accuracy_level=int(knobs["accuracy_level"]),
        symmetric=bool(knobs.get("symmetric", True)),
        wide_roles=_WIDE[str(knobs.get("wide", "none"))],
    )


def _installed_version() -> str | None:
    for package in ("onnxruntime", "onnxruntime-gpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None
