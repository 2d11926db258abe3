"""What the engines for standard graphs share: how their weights are rounded, in which blocks, and what rules
them out."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from open_autoglm.engines.gpu import vetoed_if_too_old
from open_autoglm.export.decoder_graph import MODEL_TYPES
from open_autoglm.export.standard_recipe import StandardRecipe
from open_autoglm.schemas import Analysis, Candidate, Dimension, Knob, ModelProfile, Precision


class Scheme(NamedTuple):
    precision: Precision
    bits: int
    weights: str
    """In a :class:`StandardRecipe`."""
    because: str


SCHEMES: Mapping[str, Scheme] = MappingProxyType(
    {
        "fp16": Scheme("fp16", 16, "same", "half the bytes of fp32 on tensor cores, fused by TensorRT"),
        "bf16": Scheme("bf16", 16, "same", "as fp16, with fp32's range"),
        "w8": Scheme("int8", 8, "int8", "8-bit weights: decode reads half of fp16's bytes"),
        "w4": Scheme("int4", 4, "int4", "4-bit weights: decode reads a quarter of fp16's bytes"),
        "w8a8": Scheme("int8", 8, "w8a8", "int8 products: prefill is bound by arithmetic"),
        "fp8": Scheme("fp8", 8, "fp8", "fp8 products: int8's bytes and rate, rounded like a float"),
    }
)
"""By the value of the knob ``scheme``."""

BLOCK_SIZES = (128, 64)
"""Inputs that share a scale of int4 weights, the cheapest first."""


def start_knobs(scheme: str, profile: ModelProfile) -> dict[str, Knob]:
    """The knobs that decide a standard graph, as a search begins with them."""
    knobs: dict[str, Knob] = {"scheme": scheme, "compute": "bf16" if scheme == "bf16" else "fp16"}
    if SCHEMES[scheme].weights == "int4":
        knobs["block_size"] = (block_dimension(profile).values or BLOCK_SIZES)[0]
    return knobs


def block_dimension(profile: ModelProfile) -> Dimension:
    return Dimension(
        knob="block_size",
        values=profile.whole_blocks(BLOCK_SIZES),
        because="smaller blocks follow the weights closer and have more scales to read",
    )


def weight_bits(knobs: Mapping[str, Knob]) -> float:
    """Of a stored weight, with its share of a 16-bit scale per block."""
    bits = float(SCHEMES[str(knobs["scheme"])].bits)
    return bits + 16 / int(knobs["block_size"]) if "block_size" in knobs else bits


def scheme_parts(knobs: Mapping[str, Knob]) -> list[str]:
    """The scheme and its blocks, as an id has them."""
    blocks = [f"b{knobs['block_size']}"] if "block_size" in knobs else []
    return [str(knobs["scheme"]), *blocks]


def standard_recipe(candidate: Candidate) -> StandardRecipe:
    """The graph that the candidate's engine compiles."""
    knobs = candidate.knobs
    blocks = {"block_size": knobs["block_size"]} if "block_size" in knobs else {}
    weights = SCHEMES[str(knobs["scheme"])].weights
    return StandardRecipe.model_validate({"compute": knobs["compute"], "weights": weights, **blocks})


def vetoed_if_unfit(candidate: Candidate, analysis: Analysis) -> Candidate:
    """``candidate``, vetoed for a model without a standard graph or whose layers no block divides, and on a
    GPU without its arithmetic."""
    profile = analysis.profile
    if profile.model_type not in MODEL_TYPES:
        known = ", ".join(sorted(MODEL_TYPES))
        return candidate.vetoed(f"no standard graph for model type {profile.model_type}: there are {known}")
    if "block_size" in candidate.knobs and not block_dimension(profile).values:
        smallest = BLOCK_SIZES[-1]
        return candidate.vetoed(f"its layers' inputs are no multiples of {smallest}, the smallest block")
    return vetoed_if_too_old(candidate, analysis.hardware)
