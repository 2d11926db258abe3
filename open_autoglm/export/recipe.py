"""What determines an ONNX export besides the checkpoint."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from open_autoglm.export.linears import Role
from open_autoglm.schemas import Model

Scheme = Literal["fp32", "half", "weight_only", "dynamic_int8", "int8"]
"""Exact; weights in the 16 bits of `compute`; low-bit weights (MatMulNBits); int8 with one activation scale
per call; int8 with one per token."""

Compute = Literal["fp32", "fp16", "bf16"]

Which = Literal["none", "worst", "all"]
"""Of the layers of one role: those that int8 products would cost most, as many as it takes."""


class OnnxRecipe(Model):
    """Precision and quantisation of one ONNX export."""

    scheme: Scheme
    compute: Compute = Field(
        "fp32", description="arithmetic and cache; the narrow ones are for a GPU's kernels"
    )
    weight_bits: Literal[4, 8, 16, 32] = Field(description="stored bits per linear weight, scales apart")
    block_size: int = Field(32, description="weights per scale (MatMulNBits)")
    symmetric: bool = Field(True, description="no zero points (MatMulNBits)")
    wide_roles: tuple[Role, ...] = Field((), description="weight_only: layers that get 8 bits instead")
    accuracy_level: int = Field(0, description="MatMulNBits arithmetic: 0 fp32, 4 int8 activations")
    fixed_scales: bool = Field(False, description="int8: one activation scale for all tokens where it does")
    weight_only_down: Which = Field("none", description="int8: down-projections with 8-bit weights only")


EXACT = OnnxRecipe(scheme="fp32", weight_bits=32)
