"""The smallest graph worth running: one matrix product, by which a probe sees that a runtime computes."""

from __future__ import annotations


def matmul_graph(width: int) -> bytes:
    """A serialised ONNX model: ``product = left @ right``, each ``float32[width, width]``."""
    from onnx import TensorProto, helper

    left, right, product = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [width, width])
        for name in ("left", "right", "product")
    )
    node = helper.make_node("MatMul", ["left", "right"], ["product"])
    graph = helper.make_graph([node], "matmul", [left, right], [product])
    opsets = [helper.make_opsetid("", 17)]
    serialized: bytes = helper.make_model(graph, ir_version=8, opset_imports=opsets).SerializeToString()
    return serialized
