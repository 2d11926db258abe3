"""Quantisers of ONNX Runtime, applied to exported graphs.

Each reads the exact export in ``source`` and writes GRAPH with one data file into ``output``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from open_autoglm.export.graph import load_decoder, save_decoder
from open_autoglm.export.linears import Decoder, Linear
from open_autoglm.export.recipe import OnnxRecipe


def exact_export(source: Path, output: Path) -> None:
    """The fp32 graph as it is."""
    save_decoder(load_decoder(source), source, output)


def weight_only_export(source: Path, output: Path, recipe: OnnxRecipe) -> None:
    """Low-bit weights in blocks, with more bits for the layers that the recipe names."""
    model = load_decoder(source)
    weight_only(model, source, recipe)
    save_decoder(model, source, output)


def weight_only(model: Any, directory: Path, recipe: OnnxRecipe) -> None:
    """Replace every constant MatMul by MatMulNBits: block-wise rounding to nearest.

    Changes ``model``, an ``onnx.ModelProto`` whose weights lie in ``directory``. Raises RuntimeError if
    there was nothing to quantise, since the candidate would then be fp32 under another name.
    """
    from onnx import helper

    decoder = Decoder(model.graph, directory)
    roles = decoder.roles()

    def low_bit(linear: Linear) -> list[Any]:
        wide = roles[linear.output] in recipe.wide_roles
        return [_low_bit(decoder, linear, recipe, bits=8 if wide else recipe.weight_bits)]

    _replace(decoder, low_bit)
    if "com.microsoft" not in {opset.domain for opset in model.opset_import}:
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def _replace(decoder: Decoder, quantised: Callable[[Linear], Iterable[Any]]) -> None:
    """Put the nodes of ``quantised`` in the place of each linear layer, and drop the weights it had."""
    linears = {linear.output: linear for linear in decoder.linears()}
    if not linears:
        raise RuntimeError("the graph has no MatMul with constant weights to quantise")
    graph = decoder.graph
    nodes: list[Any] = []
    for node in graph.node:
        linear = linears.get(node.output[0])
        nodes.extend([node] if linear is None else quantised(linear))
    del graph.node[:]
    graph.node.extend(nodes)
    unread = {linear.weight for linear in linears.values()} - {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name not in unread]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _low_bit(decoder: Decoder, linear: Linear, recipe: OnnxRecipe, *, bits: int) -> Any:
    from onnx import helper
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        DefaultWeightOnlyQuantizer,
    )

    config = DefaultWeightOnlyQuantConfig(
        bits=bits, block_size=recipe.block_size, is_symmetric=recipe.symmetric
    )
    weight = decoder.value(linear.weight)
    widened = weight.astype(np.float32, copy=False)
    packed, scales, zero_points = DefaultWeightOnlyQuantizer(config).qbits_block_quant(widened)
    names = [
        decoder.add(f"{linear.weight}_Q{bits}", packed),
        decoder.add(f"{linear.weight}_scales", scales.astype(weight.dtype, copy=False)),
    ]
    if not recipe.symmetric:
        names.append(decoder.add(f"{linear.weight}_zero_points", zero_points))
    rows, columns = weight.shape
    attributes = {"K": rows, "N": columns, "bits": bits, "block_size": recipe.block_size}
    if recipe.accuracy_level:
        attributes["accuracy_level"] = recipe.accuracy_level
    return helper.make_node(
        "MatMulNBits",
        [linear.source, *names],
        [linear.output],
        name=f"{linear.node.name}_Q{bits}",
        domain="com.microsoft",
        **attributes,
    )


def dynamic_int8_export(source: Path, output: Path) -> None:
    """int8 weights per channel and int8 activations, one scale per call.

    The single activation scale is why long prompts lose quality while one-token decode hardly does.
    """
    from onnx import numpy_helper

    model = load_decoder(source)
    decoder = Decoder(model.graph, source)
    made: set[str] = set()

    def dynamic_int8(linear: Linear) -> list[Any]:
        graph = _dynamic_int8(decoder, linear, source)
        for tensor in graph.initializer:
            decoder.add(tensor.name, numpy_helper.to_array(tensor))
        # Layers that read the same value share its rounding: the quantiser names it alike each time.
        nodes = [node for node in graph.node if node.output[0] not in made]
        made.update(node.output[0] for node in nodes)
        return nodes

    _replace(decoder, dynamic_int8)
    save_decoder(model, source, output)


def _dynamic_int8(decoder: Decoder, linear: Linear, directory: Path) -> Any:
    """One linear layer as the quantiser writes it, a graph of its own: it copies all it is given."""
    import onnx
    from onnx import TensorProto, helper
    from onnxruntime.quantization import QuantType, quantize_dynamic

    alone, quantised = directory / "linear.onnx", directory / "linear-int8.onnx"
    values = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        for name in (linear.source, linear.output)
    )
    given, made = ([value] for value in values)
    graph = helper.make_graph([linear.node], "linear", given, made, [decoder.constant(linear.weight)])
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])
    helper.set_model_props(model, {"onnx.quant.pre_process": "onnxruntime.quant"})  # else it advises to
    onnx.save(model, alone)
    quantize_dynamic(
        alone, quantised, weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=["MatMul"]
    )
    return onnx.load(quantised).graph
