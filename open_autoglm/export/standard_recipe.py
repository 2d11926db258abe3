"""What determines a standard ONNX graph besides the checkpoint."""

from __future__ import annotations

from typing import Literal

from open_autoglm.schemas import Model

Compute = Literal["fp32", "fp16", "bf16"]

Weights = Literal["same"]
"""How matrices are stored: as they are computed with."""


class StandardRecipe(Model):
    """Precision of one standard graph."""

    compute: Compute
    weights: Weights = "same"
