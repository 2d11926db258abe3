"""Matrices and activations of a standard graph in 8 or 4 bits: QuantizeLinear and DequantizeLinear.

The nodes say what is rounded, and a compiler finds the kernels: a product between two DequantizeLinear is
computed in 8 bits, and one with a dequantised weight alone reads fewer bytes. All is symmetric with zero
point 0, which is all that TensorRT computes with. Weights are stored rounded, ``[inputs, outputs]``.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from open_autoglm.export.decoder_graph import Floats
from open_autoglm.export.standard_nodes import Nodes, numbers
from open_autoglm.export.standard_recipe import Compute

Format = Literal["int8", "int4", "fp8"]

LARGEST: dict[Format, int] = {"int8": 127, "int4": 7, "fp8": 448}
"""The largest magnitude on both sides of zero; of fp8 E4M3 the largest finite one."""


def plain(nodes: Nodes, name: str, matrix: Floats, compute: Compute) -> str:
    """``matrix[outputs, inputs]`` as ``[inputs, outputs]`` of the type computed with."""
    return nodes.constant(name, numbers(matrix.T, compute))


def per_output(nodes: Nodes, name: str, matrix: Floats, compute: Compute) -> str:
    """``matrix[outputs, inputs]`` in int8, a scale for each output: ``[inputs, outputs]``."""
    scales = _scales(np.abs(matrix).max(axis=1), "int8", compute)
    rounded = _rounded(matrix, scales.astype(np.float32)[:, None], "int8")
    return _dequantized(nodes, name, rounded.T, scales, axis=1)


def per_block(nodes: Nodes, name: str, matrix: Floats, compute: Compute, block_size: int) -> str:
    """``matrix[outputs, inputs]`` in int4, a scale for each block of inputs: ``[inputs, outputs]``.

    Blocks are smaller than asked for where they would not be whole.
    """
    outputs, inputs = matrix.shape
    size = math.gcd(block_size, inputs)
    blocks = matrix.reshape(outputs, -1, size)
    scales = _scales(np.abs(blocks).max(axis=2), "int4", compute)
    rounded = _rounded(blocks, scales.astype(np.float32)[..., None], "int4").reshape(matrix.shape)
    return _dequantized(nodes, name, rounded.T, scales.T, axis=0, block_size=size)


def per_tensor(nodes: Nodes, name: str, matrix: Floats, compute: Compute) -> str:
    """``matrix[outputs, inputs]`` in fp8, one scale for all: ``[inputs, outputs]``."""
    scale = _scales(np.abs(matrix).max(), "fp8", compute)
    return _dequantized(nodes, name, _rounded(matrix, scale.astype(np.float32), "fp8").T, scale)


def activation(nodes: Nodes, value: str, scale: float, kind: Format, compute: Compute) -> str:
    """``value`` rounded to a multiple of ``scale``, or to the fp8 numbers times it."""
    from onnx import helper

    step = nodes.constant(f"{value}/scale", _at_least_tiny(numbers(np.array(scale), compute)))
    zero_type = helper.tensor_dtype_to_np_dtype(_onnx_type(kind))
    zero = nodes.constant(f"zero_point/{kind}", np.zeros((), dtype=zero_type))
    rounded = nodes.add("QuantizeLinear", [value, step, zero], f"{value}/quantized")
    return nodes.add("DequantizeLinear", [rounded, step, zero], f"{value}/dequantized")


def _dequantized(
    nodes: Nodes, name: str, rounded: NDArray[Any], scales: NDArray[Any], **attributes: int
) -> str:
    values = nodes.constant(name, rounded)
    steps = nodes.constant(f"{name}/scale", scales)
    return nodes.add("DequantizeLinear", [values, steps], f"{name}/dequantized", **attributes)


def _scales(largest: Any, kind: Format, compute: Compute) -> NDArray[Any]:
    """What the numbers are multiples of: already in the type computed with, so that it is these they fit."""
    return _at_least_tiny(numbers(np.asarray(largest / LARGEST[kind]), compute))


def _at_least_tiny(scales: NDArray[Any]) -> NDArray[Any]:
    """Zeros need a scale too; any will do."""
    return np.where(scales > 0, scales, np.ones_like(scales))


def _rounded(matrix: Floats, scales: Floats, kind: Format) -> NDArray[Any]:
    """``matrix / scales`` as the nearest numbers of ``kind``."""
    from onnx import helper

    shares = matrix / scales
    np.clip(shares, -LARGEST[kind], LARGEST[kind], out=shares)
    if kind != "fp8":
        np.rint(shares, out=shares)
    found: NDArray[Any] = shares.astype(helper.tensor_dtype_to_np_dtype(_onnx_type(kind)))
    return found


def _onnx_type(kind: Format) -> int:
    from onnx import TensorProto

    types = {"int8": TensorProto.INT8, "int4": TensorProto.INT4, "fp8": TensorProto.FLOAT8E4M3FN}
    return int(types[kind])
