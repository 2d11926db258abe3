"""OpenVINO on the CPU: graphs in the patterns its plugin fuses, bf16 or int8 arithmetic, its own KV cache."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from open_autoglm.engines.contract import (
    ALL_THREADS,
    ExportContext,
    Logits,
    Session,
    SessionOptions,
    Tokens,
    because_of,
    dimensions_around,
    thread_dimension,
    threads_of,
)
from open_autoglm.export.decoder_graph import MODEL_TYPES
from open_autoglm.export.openvino_graph import GRAPH, keep_every_position, write_graph
from open_autoglm.export.openvino_weights import Rounding
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

_INSTALL = "pip install 'open-autoglm[openvino]'"
_MINIMUM = (2026, 1)

_BITS: dict[Precision, int] = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4}

WHOLE_ROW = "row"
"""Value of the knob ``group_size``: one scale for all inputs of an output."""


class OpenVinoEngine:
    """An optional CPU engine."""

    name = "openvino"
    summary = "OpenVINO, CPU plugin: fp32, bf16, 8- and 4-bit weights"

    def probe(self, device: Device) -> Probe:
        if device != "cpu":
            return Probe(engine=self.name, stage="no_device", reason="this engine serves the CPU only")
        try:
            found = version("openvino")
        except PackageNotFoundError:
            return Probe(
                engine=self.name, stage="missing", reason="openvino is not installed", install=_INSTALL
            )
        if tuple(int(part) for part in found.split(".")[:2]) < _MINIMUM:
            reason = f"openvino {found} is older than {_MINIMUM[0]}.{_MINIMUM[1]}"
            return Probe(engine=self.name, stage="installed", version=found, reason=reason, install=_INSTALL)
        return Probe(engine=self.name, stage="ready", version=found, reason="CPU plugin")

    def propose(self, analysis: Analysis, spec: OptimizeSpec, device: Device) -> list[Candidate]:
        native = _has_bf16(analysis.hardware)
        fastest = _activations(analysis.hardware)[0]
        hope = {"bf16": "computes in bf16", "int8": "has VNNI for int8", "fp32": "computes in fp32"}[fastest]
        whole: dict[str, Knob] = {"threads": ALL_THREADS, "pinning": True}
        half = {**whole, "activations": "bf16", "kv_cache": "float"}
        rows = {**half, "activations": fastest, "group_size": WHOLE_ROW, "symmetric": False}
        bf16 = _candidate("bf16", half, "fp32's range in half its bytes; this CPU computes bf16 natively")
        if not native:
            bf16 = bf16.vetoed("this CPU has no bf16 arithmetic: OpenVINO would compute in fp32 instead")
        found = [
            _candidate(
                "fp32", whole, "fused attention and cache; held to fp32, which OpenVINO would not keep to"
            ),
            bf16,
            _candidate("int8", rows, f"8-bit weights are a quarter of the fp32 bytes; this CPU {hope}"),
            _candidate("int4", {**rows, "group_size": 64}, "4-bit weights: an eighth of the fp32 bytes"),
        ]
        unknown = _unknown_model(analysis.profile)
        return found if unknown is None else [candidate.vetoed(unknown) for candidate in found]

    def dimensions(
        self, candidate: Candidate, analysis: Analysis, spec: OptimizeSpec
    ) -> tuple[Dimension, ...]:
        """Threads and pinning for all; the cache where it may be rounded; groups and arithmetic of rounded
        weights."""
        space = [thread_dimension(analysis.hardware), _PINNING, _KV_CACHE]
        if candidate.precision in _GROUP_SIZES:
            space += _weight_dimensions(candidate.precision, analysis)
        return dimensions_around(candidate, [d for d in space if d.knob in candidate.knobs])

    def variant(self, candidate: Candidate, knobs: Mapping[str, Knob]) -> Candidate:
        because = because_of(candidate, knobs)
        return _candidate(candidate.precision, {**candidate.knobs, **knobs}, because)

    def recipe(self, candidate: Candidate) -> dict[str, Any]:
        # The graph is written here, so this package is among the libraries that write the files.
        packages = ("open-autoglm", "openvino", "torch", "transformers")
        return {
            "weights": _rounding(candidate).model_dump(),
            "versions": {name: version(name) for name in packages},
        }

    def export(self, candidate: Candidate, checkpoint: Checkpoint, context: ExportContext) -> str:
        write_graph(checkpoint, _rounding(candidate), context.output)
        return "openvino-graph"

    def open(self, candidate: Candidate, exported: ExportedModel, options: SessionOptions) -> Session:
        options = options.model_copy(update={"threads": threads_of(candidate, options)})
        return OpenVinoSession(exported.path, options, candidate.knobs)


# ── configurations ───────────────────────────────────────────────────────────────────────────────

_PINNING = Dimension(
    knob="pinning",
    values=(True, False),
    because="a thread bound to a core keeps its cache, and waits where the core is taken",
)

_KV_CACHE = Dimension(
    knob="kv_cache",
    values=("float", "int8"),
    because="an 8-bit cache is half of bf16's bytes or a quarter of fp32's, and rounds what is attended to",
)

_GROUP_SIZES: dict[Precision, tuple[Knob, ...]] = {"int8": (WHOLE_ROW, 128, 64), "int4": (128, 64, 32)}

_DYNAMIC_GROUP = 32
"""Neighbouring activations that share a scale where they are rounded to int8: OpenVINO's own default."""


def _weight_dimensions(precision: Precision, analysis: Analysis) -> list[Dimension]:
    group_size = Dimension(
        knob="group_size",
        values=_GROUP_SIZES[precision],
        because="smaller groups follow the weights closer and have more scales to read",
    )
    symmetric = Dimension(
        knob="symmetric",
        values=(False, True),
        because="without zero points there is less to read and compute, and a step is coarser",
    )
    activations = Dimension(
        knob="activations",
        values=_activations(analysis.hardware),
        because="int8 products are the cheapest, and bf16 and fp32 round the activations less",
    )
    return [group_size, symmetric, activations]


def _activations(hardware: Hardware) -> tuple[str, ...]:
    """Arithmetic worth trying with rounded weights, the most promising first."""
    found = ["bf16"] if _has_bf16(hardware) else []
    if not {"avx512_vnni", "avx_vnni"}.isdisjoint(hardware.isa):
        found.append("int8")
    return tuple(found) or ("fp32",)


def _has_bf16(hardware: Hardware) -> bool:
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(hardware.isa)


def _unknown_model(profile: ModelProfile) -> str | None:
    if profile.model_type in MODEL_TYPES:
        return None
    return (
        f"no OpenVINO graph for model type {profile.model_type}: there are {', '.join(sorted(MODEL_TYPES))}"
    )


def _rounding(candidate: Candidate) -> Rounding:
    """What the exported weights are; fp32 and bf16 share theirs, and the plugin converts."""
    if "group_size" not in candidate.knobs:
        return Rounding(bits=32)
    group_size = candidate.knobs["group_size"]
    return Rounding(
        bits=8 if candidate.precision == "int8" else 4,
        group_size=0 if group_size == WHOLE_ROW else int(group_size),
        symmetric=bool(candidate.knobs["symmetric"]),
    )


def _candidate(precision: Precision, knobs: Mapping[str, Knob], because: str) -> Candidate:
    """The candidate of one configuration, from which alone its id follows."""
    bits = float(_BITS[precision])
    if knobs.get("group_size", WHOLE_ROW) != WHOLE_ROW:
        zero_point = 0 if knobs["symmetric"] else bits
        bits += (32 + zero_point) / int(knobs["group_size"])
    return Candidate(
        id=_id(precision, knobs),
        engine="openvino",
        device="cpu",
        precision=precision,
        weight_bits=bits,
        knobs=dict(knobs),
        proposed_because=because,
    )


def _id(precision: Precision, knobs: Mapping[str, Knob]) -> str:
    """What the weights are and what is computed in, then what the session does otherwise than by default."""
    parts = ["openvino"]
    if "group_size" in knobs:
        parts.append(f"w{_BITS[precision]}")
        if knobs["group_size"] != WHOLE_ROW:
            parts.append(f"g{knobs['group_size']}")
        if knobs["symmetric"]:
            parts.append("sym")
        parts.append(f"a-{knobs['activations']}")
    else:
        parts.append(precision)
    if knobs.get("kv_cache") == "int8":
        parts.append("kv8")
    if knobs["threads"] != ALL_THREADS:
        parts.append(f"t{knobs['threads']}")
    if not knobs["pinning"]:
        parts.append("nopin")
    return "-".join(parts)


# ── the session ──────────────────────────────────────────────────────────────────────────────────


class OpenVinoSession:
    """A compiled decoder, whose KV cache is the state of its infer request and grows with it."""

    def __init__(self, directory: Path, options: SessionOptions, knobs: Mapping[str, Knob]) -> None:
        import openvino as ov

        self._graph = directory / GRAPH
        self._options = options
        self._core = ov.Core()
        self._properties = _properties(options, knobs)
        self._compiled = self._compile(self._core.read_model(self._graph))
        self._request = self._compiled.create_infer_request()
        self._length = 0
        self._full: Any = None

    def _compile(self, model: Any) -> Any:
        """Raises RuntimeError if the plugin does not fuse attention with its cache.

        By the specification the causal mask begins at the first key, so that a single token would see that
        alone; the fused kernel ends it at the last key, which is what the graph is written for.
        """
        layers = sum(node.get_type_name() == "ScaledDotProductAttention" for node in model.get_ops())
        compiled = self._core.compile_model(model, "CPU", self._properties)
        kinds = [node.get_rt_info()["layerType"].value for node in compiled.get_runtime_model().get_ops()]
        fused = kinds.count("ScaledDotProductAttention")
        if fused != layers:
            raise RuntimeError(f"OpenVINO fused the attention of {fused} layers out of {layers}")
        return compiled

    def prefill(self, tokens: Tokens) -> Logits:
        self._check_rows(tokens)
        self._length = 0
        self._request.reset_state()
        return self._run(tokens)

    def decode(self, tokens: Tokens) -> Logits:
        return self._run(tokens[:, None])

    def full_logits(self, tokens: Tokens) -> Logits:
        self._check_rows(tokens)
        self._check_length(tokens.shape[1])
        if self._full is None:
            model = self._core.read_model(self._graph)
            keep_every_position(model)
            self._full = self._compile(model).create_infer_request()
        self._full.reset_state()
        return _infer(self._full, tokens, 0)

    def _run(self, tokens: Tokens) -> Logits:
        length = self._length + tokens.shape[1]
        self._check_length(length)
        logits = _infer(self._request, tokens, self._length)[:, -1]
        self._length = length
        return logits

    def _check_rows(self, tokens: Tokens) -> None:
        if len(tokens) > self._options.batch_size:
            raise ValueError(f"batch of {len(tokens)} in a session opened for {self._options.batch_size}")

    def _check_length(self, length: int) -> None:
        if length > self._options.max_tokens:
            raise ValueError(f"the cache holds {self._options.max_tokens} tokens, {length} were asked for")

    def facts(self) -> dict[str, str]:
        import openvino as ov

        told = self._compiled.get_property
        return {
            "openvino": ov.get_version(),
            "devices": ",".join(told("EXECUTION_DEVICES")),
            "threads": str(told("INFERENCE_NUM_THREADS")),
            "pinning": "on" if told("ENABLE_CPU_PINNING") else "off",
            "arithmetic": told("INFERENCE_PRECISION_HINT").get_type_name(),
            "int8_activations": str(told("DYNAMIC_QUANTIZATION_GROUP_SIZE") or "off"),
            "kv_cache": told("KV_CACHE_PRECISION").get_type_name(),
        }

    def close(self) -> None:
        self._request = self._full = self._compiled = None


def _infer(request: Any, tokens: Tokens, past: int) -> Logits:
    """Logits of one call on a cache that holds ``past`` tokens, in memory of their own."""
    rows, new = tokens.shape
    outputs = request.infer(
        {
            "input_ids": np.ascontiguousarray(tokens, dtype=np.int64),
            "position_ids": np.tile(np.arange(past, past + new, dtype=np.int64), (rows, 1)),
            "beam_idx": np.arange(rows, dtype=np.int32),
        },
        share_inputs=True,
    )
    logits: Logits = outputs["logits"]
    return logits


def _properties(options: SessionOptions, knobs: Mapping[str, Knob]) -> dict[str, Any]:
    """The plugin's settings: nothing that changes figures is left to its own choice."""
    activations = knobs.get("activations", "fp32")
    exact = "bf16" if activations == "bf16" else "f32"
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": options.threads,
        "ENABLE_CPU_PINNING": bool(knobs["pinning"]),
        "INFERENCE_PRECISION_HINT": exact,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": _DYNAMIC_GROUP if activations == "int8" else 0,
        "KV_CACHE_PRECISION": "u8" if knobs.get("kv_cache") == "int8" else exact,
    }
