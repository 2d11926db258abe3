"""A checkpoint's matrices as OpenVINO constants: in fp32, or rounded to 8 or 4 bits.

A rounded matrix is stored as integers with ``(integer - zero point) * scale`` in front of the matmul. That is
how OpenVINO expects compressed weights (its own compressor, NNCF, writes the same): the CPU plugin keeps the
integers in memory and turns them back inside the matmul.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from open_autoglm.export.decoder_graph import Floats
from open_autoglm.schemas import Model

Integers = NDArray[np.uint8] | NDArray[np.int8]


class Rounding(Model):
    """How a matrix is stored."""

    bits: Literal[4, 8, 32]
    group_size: int = Field(0, description="columns that share a scale; 0 for a whole row")
    symmetric: bool = Field(False, description="around zero, so that no zero points are needed")


class Rounded(NamedTuple):
    """A matrix in integers: ``(values - zero_points) * scales`` is near the original."""

    values: Integers
    """``[rows, groups, group_size]``"""
    scales: Floats
    """``[rows, groups, 1]``"""
    zero_points: NDArray[np.uint8] | None
    """``[rows, groups, 1]``; None if symmetric"""


def round_to_nearest(matrix: Floats, rounding: Rounding) -> Rounded:
    """Round ``matrix[rows, columns]``, each group of columns on a scale of its own.

    A scale spans what lies between the group's least and largest number and zero; if symmetric, between the
    largest magnitude and its negative. Groups are smaller than asked for where they would not be whole.
    """
    rows, columns = matrix.shape
    size = math.gcd(rounding.group_size, columns)  # all columns for 0
    groups = matrix.reshape(rows, columns // size, size)
    low = np.minimum(groups.min(axis=-1, keepdims=True), 0)
    high = np.maximum(groups.max(axis=-1, keepdims=True), 0)
    if rounding.symmetric:
        scales = _not_zero(np.maximum(high, -low) / (2 ** (rounding.bits - 1) - 1))
        return Rounded(np.rint(groups / scales).astype(np.int8), scales, None)
    most = 2**rounding.bits - 1
    scales = _not_zero((high - low) / most)
    zero_points = np.rint(-low / scales)
    values = np.clip(np.rint(groups / scales) + zero_points, 0, most)
    return Rounded(values.astype(np.uint8), scales, zero_points.astype(np.uint8))


def _not_zero(scales: Floats) -> Floats:
    """A group of zeros needs a scale too; any will do."""
    return np.where(scales > 0, scales, np.float32(1))


def matrix_node(matrix: Floats, rounding: Rounding) -> Any:
    """A node whose output is ``matrix``, or near it: ``float32[rows, columns]``."""
    import openvino.opset13 as ops

    if rounding.bits == 32:
        return ops.constant(np.ascontiguousarray(matrix), shared_memory=True)
    rounded = round_to_nearest(matrix, rounding)
    # One group to a row is written without the axis of groups: the plugin has faster kernels for that.
    index = (slice(None), 0) if rounded.values.shape[1] == 1 else ...
    numbers = ops.convert(_integers(rounded.values[index], rounding.bits), np.float32)
    if rounded.zero_points is not None:
        zeros = _integers(rounded.zero_points[index], rounding.bits)
        numbers = ops.subtract(numbers, ops.convert(zeros, np.float32))
    numbers = ops.multiply(numbers, ops.constant(rounded.scales[index]))
    return ops.reshape(numbers, np.array(matrix.shape), special_zero=False) if index is ... else numbers


def _integers(values: Integers, bits: int) -> Any:
    """A constant of 8- or 4-bit integers, unsigned or not as ``values`` are."""
    import openvino as ov

    if bits == 8:
        return ov.op.Constant(np.ascontiguousarray(values))
    tensor = ov.Tensor(ov.Type.u4 if values.dtype == np.uint8 else ov.Type.i4, ov.Shape(values.shape))
    first, second = values.reshape(-1, 2).T & 0xF  # two to a byte, the first in the lower half
    tensor.data[:] = (first | (second << 4)).view(tensor.data.dtype)
    return ov.op.Constant(tensor)
