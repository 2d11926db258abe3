"""Quantisers of ONNX Runtime, applied to exported graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from open_autoglm.export.graph import LAST
from open_autoglm.export.recipe import OnnxRecipe


def weight_only(model: Any, recipe: OnnxRecipe) -> Any:
    """Replace every constant MatMul by MatMulNBits: block-wise symmetric rounding to nearest.

    Takes and returns an ``onnx.ModelProto`` with its weights loaded. Raises RuntimeError if there was
    nothing to quantise, since the candidate would then be fp32 under another name.
    """
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(
        model,
        bits=recipe.weight_bits,
        block_size=recipe.block_size,
        is_symmetric=True,
        accuracy_level=recipe.accuracy_level,
    )
    quantizer.process()
    quantised = quantizer.model.model
    if not any(node.op_type == "MatMulNBits" for node in quantised.graph.node):
        raise RuntimeError("the graph has no MatMul with constant weights to quantise")
    return quantised


def dynamic_int8(directory: Path) -> None:
    """Rewrite LAST in ``directory`` with int8 weights per channel and int8 activations, one scale per call.

    The single activation scale is why long prompts lose quality while one-token decode hardly does.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    source = directory / LAST
    data = directory / f"{LAST}.data"
    quantised = directory / "quantised.onnx"
    quantize_dynamic(
        source,
        quantised,
        weight_type=QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=["MatMul"],
        use_external_data_format=True,
        # The fused operators hide the types of their outputs from the quantiser: all are float32 (1).
        extra_options={"DefaultTensorType": 1},
    )
    source.unlink()
    data.unlink(missing_ok=True)
    _resave(quantised, source)


def _resave(source: Path, target: Path) -> None:
    """Save under the standard name, with one data file, and remove what the quantiser left."""
    import onnx

    model = onnx.load(source)
    for leftover in source.parent.glob(f"{source.name}*"):
        leftover.unlink()
    onnx.save(model, target, save_as_external_data=True, location=f"{target.name}.data")
