"""Quantisers of ONNX Runtime, applied to exported graphs.

Each reads the exact export in ``source`` and writes LAST with one data file into ``output``.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from open_autoglm.export.graph import LAST, load_decoder, save_decoder
from open_autoglm.export.linears import Decoder
from open_autoglm.export.recipe import OnnxRecipe


def exact_export(source: Path, output: Path) -> None:
    """The fp32 graph as it is, but for the embedding's rows."""
    save_decoder(load_decoder(source), output)


def weight_only_export(source: Path, output: Path, recipe: OnnxRecipe) -> None:
    """Low-bit weights in blocks, with more bits for the layers that the recipe names."""
    save_decoder(weight_only(load_decoder(source), recipe), output)


def weight_only(model: Any, recipe: OnnxRecipe) -> Any:
    """Replace every constant MatMul by MatMulNBits: block-wise rounding to nearest.

    Takes and returns an ``onnx.ModelProto`` with its weights loaded. Raises RuntimeError if there was
    nothing to quantise, since the candidate would then be fp32 under another name.
    """
    decoder = Decoder(model.graph)
    roles = decoder.roles()
    wide = {linear.node.name for linear in decoder.linears() if roles[linear.output] in recipe.wide_roles}
    narrow = {linear.node.name for linear in decoder.linears()} - wide
    if wide:
        model = _quantised(model, recipe, bits=8, spared=narrow)
    if narrow:
        model = _quantised(model, recipe, bits=recipe.weight_bits, spared=set())
    if not any(node.op_type == "MatMulNBits" for node in model.graph.node):
        raise RuntimeError("the graph has no MatMul with constant weights to quantise")
    return model


def _quantised(model: Any, recipe: OnnxRecipe, *, bits: int, spared: set[str]) -> Any:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    from onnxruntime.quantization.matmul_nbits_quantizer import logger as chatter

    chatter.setLevel(logging.WARNING)  # two lines per node otherwise
    quantizer = MatMulNBitsQuantizer(
        model,
        bits=bits,
        block_size=recipe.block_size,
        is_symmetric=recipe.symmetric,
        accuracy_level=recipe.accuracy_level,
        nodes_to_exclude=sorted(spared),
    )
    quantizer.process()
    return quantizer.model.model


def dynamic_int8_export(source: Path, output: Path) -> None:
    """int8 weights per channel and int8 activations, one scale per call.

    The single activation scale is why long prompts lose quality while one-token decode hardly does.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    by_row, work = source / "by-row", source / "dynamic-int8"
    for directory in (by_row, work):
        directory.mkdir()
    exact_export(source, by_row)
    quantize_dynamic(
        by_row / LAST,
        work / LAST,
        weight_type=QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=["MatMul"],
        use_external_data_format=True,
        # The fused operators hide the types of their outputs from the quantiser: all are float32 (1).
        extra_options={"DefaultTensorType": 1},
    )
    save_decoder(load_decoder(work), output)
    for directory in (by_row, work):
        shutil.rmtree(directory)
