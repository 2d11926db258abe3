"""What determines a standard ONNX graph besides the checkpoint."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from open_autoglm.schemas import Model

Compute = Literal["fp32", "fp16", "bf16"]

Weights = Literal["same", "int8", "int4", "fp8", "w8a8"]
"""How the matrices of linear layers are stored.

``same`` as what is computed with, ``int8`` with a scale per output, ``int4`` with one per block of inputs;
``fp8`` (E4M3) and ``w8a8`` (int8) with activations rounded alike, so that products are computed in 8 bits.
"""


class StandardRecipe(Model):
    """Precision of one standard graph."""

    compute: Compute
    weights: Weights = "same"
    block_size: int = Field(128, description="int4: inputs that share a scale", ge=2)
