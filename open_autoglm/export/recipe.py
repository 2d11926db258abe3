"""What determines an ONNX export besides the checkpoint."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from open_autoglm.schemas import Model


class OnnxRecipe(Model):
    """Precision and quantisation of one ONNX export."""

    weight_bits: Literal[4, 8, 32] = Field(description="stored bits per linear weight, scales apart")
    block_size: int = Field(32, description="weights per scale (MatMulNBits)")
    accuracy_level: int = Field(0, description="MatMulNBits arithmetic: 0 fp32, 4 int8 activations")
    dynamic_int8: bool = Field(
        False, description="int8 weights and activations, one activation scale per call"
    )
