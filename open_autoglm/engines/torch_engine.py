"""PyTorch through transformers: the fp32 reference, the baselines a person would tune by hand, and 8- and
4-bit weights by torchao."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from types import MappingProxyType

from open_autoglm.engines.contract import (
    ALL_THREADS,
    ExportContext,
    Session,
    SessionOptions,
    because_of,
    dimensions_around,
    thread_dimension,
)
from open_autoglm.engines.gpu import BF16_SINCE, FP8_SINCE, older_than
from open_autoglm.engines.torch_session import TorchSession
from open_autoglm.engines.torch_weights import GROUP_SIZES, missing_torchao
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
    Precision,
    Probe,
)

_BITS: dict[Precision, int] = {"fp32": 32, "bf16": 16, "fp16": 16, "fp8": 8, "int8": 8, "int4": 4}

_ON_GPU: Mapping[str, Knob] = MappingProxyType({"threads": ALL_THREADS, "kv_cache": "static"})
"""A cache that grows would be copied for every token, and no CUDA graph could hold it."""


class TorchEngine:
    """Loads the checkpoint itself; nothing is exported."""

    name = "torch"
    summary = "PyTorch eager and torch.compile: fp32 (the reference), 16 bits, 8- and 4-bit weights"

    def probe(self, device: Device) -> Probe:
        if device == "gpu":
            from open_autoglm.engines.nvidia import probe_nvidia

            return probe_nvidia("torch")
        return Probe(engine=self.name, stage="ready", version=version("torch"), reason="CPU")

    def propose(self, analysis: Analysis, spec: OptimizeSpec, device: Device) -> list[Candidate]:
        if device == "gpu":
            return _on_gpu(analysis)
        native = {"avx512_bf16", "amx_bf16"} & set(analysis.hardware.isa)
        bf16_hope = "this CPU computes bf16 natively" if native else "this CPU has no bf16 arithmetic"
        eager: dict[str, Knob] = {"compile": False, "threads": ALL_THREADS}
        reference = _candidate("cpu", "fp32", eager, _REFERENCE)
        plain = _candidate("cpu", "bf16", eager, f"half the bytes of fp32; {bf16_hope}")
        compiled = _candidate("cpu", "bf16", {**eager, "compile": True}, _BY_HAND)
        if (missing := _missing_compiler()) is not None:
            compiled = compiled.vetoed(missing)
        found = [
            reference.model_copy(update={"reference": True}),
            plain,
            compiled.model_copy(update={"baseline": True}),
        ]
        return [*found, *_rounded(analysis.profile)]

    def dimensions(
        self, candidate: Candidate, analysis: Analysis, spec: OptimizeSpec
    ) -> tuple[Dimension, ...]:
        """None for the reference and the baseline, which are yardsticks; on a GPU threads decide nothing."""
        if candidate.reference or candidate.baseline:
            return ()
        if candidate.device == "gpu":
            return dimensions_around(candidate, [_CUDA_GRAPHS] if candidate.knobs["compile"] else [])
        space = [thread_dimension(analysis.hardware)]
        if candidate.precision == "int4":
            space.insert(0, _group_dimension(analysis.profile))
        return dimensions_around(candidate, space)

    def variant(self, candidate: Candidate, knobs: Mapping[str, Knob]) -> Candidate:
        because = because_of(candidate, knobs)
        return _candidate(candidate.device, candidate.precision, {**candidate.knobs, **knobs}, because)

    def recipe(self, candidate: Candidate) -> None:
        return None

    def export(self, candidate: Candidate, checkpoint: Checkpoint, context: ExportContext) -> str:
        raise AssertionError("torch loads the checkpoint itself")  # recipe() is None

    def open(self, candidate: Candidate, exported: ExportedModel, options: SessionOptions) -> Session:
        return TorchSession(candidate, exported, options)


_REFERENCE = "the reference that every other candidate is judged by"
_BY_HAND = "what a careful person tunes by hand: static cache and torch.compile"

_CUDA_GRAPHS = Dimension(
    knob="cuda_graphs",
    values=(True, False),
    because="a token replayed as one launch waits for no Python, and a graph holds memory of its own",
)


def _on_gpu(analysis: Analysis) -> list[Candidate]:
    """fp16 and bf16, eager and compiled; rounded weights compiled only, or they are widened in every call."""
    eager: dict[str, Knob] = {"compile": False, **_ON_GPU}
    compiled: dict[str, Knob] = {"compile": True, "cuda_graphs": True, **_ON_GPU}
    found = [
        _candidate("gpu", "fp32", eager, _REFERENCE).model_copy(update={"reference": True}),
        _candidate("gpu", "bf16", eager, "half the bytes of fp32, on tensor cores"),
        _candidate("gpu", "fp16", eager, "as bf16, with more digits and less range"),
        _candidate("gpu", "bf16", compiled, _BY_HAND).model_copy(update={"baseline": True}),
        _candidate("gpu", "fp16", compiled, "as bf16, with more digits and less range"),
        _candidate("gpu", "int8", compiled, "8-bit weights: decode reads half of bf16's bytes"),
        _candidate("gpu", "fp8", compiled, "8-bit floats: as many bytes as int8, a finer grid near zero"),
    ]
    return [_vetoed_if_impossible(candidate, analysis) for candidate in found]


def _vetoed_if_impossible(candidate: Candidate, analysis: Analysis) -> Candidate:
    """On a GPU without the arithmetic, for a model that it cannot round, or where a package is missing."""
    precision = candidate.precision
    needed = {"bf16": BF16_SINCE, "int8": BF16_SINCE, "fp8": FP8_SINCE}.get(precision)
    reason = older_than(analysis.hardware, needed, precision) if needed else None
    if precision in ("int8", "fp8"):
        reason = _stacked_experts(analysis.profile) or reason or missing_torchao()
    if candidate.knobs["compile"]:
        reason = reason or _missing_triton() or _missing_compiler()
    return candidate if reason is None else candidate.vetoed(reason)


def _missing_triton() -> str | None:
    """On a GPU torch.compile writes Triton kernels; torch's CPU builds come without it."""
    return None if find_spec("triton") else "torch.compile on a GPU needs triton, which is not installed"


def _rounded(profile: ModelProfile) -> list[Candidate]:
    """Rounded weights, compiled only: run eagerly, torchao's int8 layers widen all weights in every call."""
    knobs: dict[str, Knob] = {"compile": True, "threads": ALL_THREADS}
    groups: dict[str, Knob] = {**knobs, "group_size": GROUP_SIZES[0]}
    int8 = _candidate("cpu", "int8", knobs, "8-bit weights: decode reads half of bf16's bytes")
    int4 = _candidate("cpu", "int4", groups, "4-bit weights: decode reads a third of bf16's bytes")
    if not _group_dimension(profile).values:
        int4 = int4.vetoed(f"its layers' inputs are no multiples of {GROUP_SIZES[0]}, the smallest group")
    reason = _stacked_experts(profile) or missing_torchao() or _missing_compiler()
    return [int8, int4] if reason is None else [int8.vetoed(reason), int4.vetoed(reason)]


def _stacked_experts(profile: ModelProfile) -> str | None:
    """Most of the weights of a mixture of experts would stay as they are, under another precision's name."""
    if not profile.experts:
        return None
    return (
        f"torchao rounds linear layers, and transformers stacks the {profile.experts} experts of "
        f"{profile.model_type} in parameters that are none"
    )


def _group_dimension(profile: ModelProfile) -> Dimension:
    return Dimension(
        knob="group_size",
        values=profile.whole_blocks(GROUP_SIZES),
        because="smaller groups follow the weights closer and have more scales to read",
    )


def _candidate(device: Device, precision: Precision, knobs: Mapping[str, Knob], because: str) -> Candidate:
    """The candidate of one configuration, from which alone its id follows."""
    parts = ["torch-cuda" if device == "gpu" else "torch", precision]
    bits = float(_BITS[precision])
    if precision == "int4":
        group_size = int(knobs["group_size"])
        bits += 32 / group_size  # a scale and a zero per group, in bf16
        parts += [f"g{group_size}"] if group_size != GROUP_SIZES[0] else []
    if knobs["compile"]:
        parts.append("compile")
    if knobs["compile"] and not knobs.get("cuda_graphs", True):
        parts.append("nograph")
    if knobs["threads"] != ALL_THREADS:
        parts.append(f"t{knobs['threads']}")
    return Candidate(
        id="-".join(parts),
        engine="torch",
        device=device,
        precision=precision,
        weight_bits=bits,
        knobs=dict(knobs),
        proposed_because=because,
    )


def _missing_compiler() -> str | None:
    wanted = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    if any(shutil.which(compiler) for compiler in wanted):
        return None
    return f"torch.compile needs a C++ compiler and there is no {' or '.join(wanted)}: apt-get install g++"
