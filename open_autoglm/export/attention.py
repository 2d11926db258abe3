"""What is changed at attention, so that ONNX Runtime computes a decoded token's by its fast kernel."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from open_autoglm.export.graph import GRAPH, load_decoder
from open_autoglm.export.linears import Decoder

_SCALE = "scale"
_NORM = "SimplifiedLayerNormalization"


def fold_scales(directory: Path) -> None:
    """Give the scales of attention's scores to the weights that make the queries, in GRAPH and its data.

    One query times a slot's keys is a product of a row with a matrix. MLAS computes that where the keys lie,
    unless the product has a factor: then they are first copied and transposed (``MlasSgemmOperation``, "the
    special case of a small M"). A power of two, as the scale is for heads of 64 or 256, rounds nothing.
    Attention whose queries are made in another way keeps its scale.
    """
    import onnx

    model = load_decoder(directory)
    decoder = Decoder(model.graph, directory)
    for node in decoder.graph.node:
        if node.op_type != "GroupQueryAttention":
            continue
        attributes = {attribute.name: attribute for attribute in node.attribute}
        scale = attributes[_SCALE].f if _SCALE in attributes else 0.0
        weights = _weights_of(decoder, node.input[0])
        if scale in (0.0, 1.0) or weights is None:  # 0: ONNX Runtime chooses, as the schema says
            continue
        packed = not node.input[1]
        heads, shared = attributes["num_heads"].i, attributes["kv_num_heads"].i
        for name in weights:
            array = decoder.value(name).copy()
            queries = array.shape[-1] * heads // (heads + 2 * shared) if packed else array.shape[-1]
            array[..., :queries] *= np.float32(scale)
            decoder.replace(name, array)
        attributes[_SCALE].f = 1.0
    onnx.save(model, directory / GRAPH)


def _weights_of(decoder: Decoder, value: str) -> list[str] | None:
    """Constants that, multiplied by a number, multiply ``value`` by it; None if that is not certain."""
    if decoder.readers(value) != 1:
        return None
    node = decoder.maker(value)
    if node is None:
        return None
    constant = [name for name in node.input if decoder.is_constant(name)]
    if any(decoder.readers(name) != 1 for name in constant) and node.op_type != "Reshape":
        return None
    if node.op_type in ("MatMul", _NORM) and list(node.input[1:]) == constant:
        return constant
    if node.op_type == "Add" and len(constant) == 1:
        rest = next(name for name in node.input if name not in constant)
        before = _weights_of(decoder, rest)
        return None if before is None else [*constant, *before]
    return _weights_of(decoder, node.input[0]) if node.op_type == "Reshape" else None
