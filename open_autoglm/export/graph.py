"""Small passes over exported ONNX graphs; none of them touches the weights' file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from open_autoglm.schemas import Model

LAST = "model.onnx"
"""The graph; its weights lie in one file beside it."""

FIRST_LOGITS = "first_logits"
"""Its input ``int64[1]``: the first of a call's positions that logits are wanted of; 0: all, -1: the last."""

_PRODUCTS = ("MatMul", "Gemm")

FACTS = "decoder.json"
"""What a session must know that the graph does not say."""


class DecoderFacts(Model):
    """The KV cache of a decoder: keys and values, ``float32[batch, kv_heads, tokens, head_dim]``."""

    kv_heads: int
    head_dim: int
    kv_cache: Literal["in_place", "growing"]

    def write(self, directory: Path) -> None:
        (directory / FACTS).write_text(self.model_dump_json(indent=2))

    @classmethod
    def read(cls, directory: Path) -> DecoderFacts:
        return cls.model_validate_json((directory / FACTS).read_bytes())


def choose_logits(directory: Path) -> None:
    """Let the caller of LAST say which positions it wants logits of: add the input FIRST_LOGITS.

    The head is the widest layer of all and serving needs its last row only, quality and drafts need more;
    with an input one graph does for all. The rows are chosen before the head, wherever it is.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(directory / LAST, load_external_data=False)
    graph = model.graph
    maker = {output: node for node in graph.node for output in node.output}
    head = maker["logits"]
    while head.op_type not in _PRODUCTS:
        head = maker[head.input[0]]
    for name, value in (("end", np.iinfo(np.int64).max), ("axis", 1)):
        graph.initializer.append(numpy_helper.from_array(np.array([value]), f"{FIRST_LOGITS}/{name}"))
    bounds = [FIRST_LOGITS, f"{FIRST_LOGITS}/end", f"{FIRST_LOGITS}/axis"]
    chosen = helper.make_node(
        "Slice", [head.input[0], *bounds], [f"{FIRST_LOGITS}/hidden"], name=FIRST_LOGITS
    )
    graph.node.insert(list(graph.node).index(head), chosen)
    head.input[0] = chosen.output[0]
    graph.input.append(helper.make_tensor_value_info(FIRST_LOGITS, TensorProto.INT64, [1]))
    logits = next(output for output in graph.output if output.name == "logits")
    logits.type.tensor_type.shape.dim[1].dim_param = "logits_length"
    del graph.value_info[:]  # what lies behind the head's input has fewer rows now
    onnx.save(model, directory / LAST)


def load_decoder(directory: Path) -> Any:
    """LAST of ``directory`` with its weights, an ``onnx.ModelProto``; a tied embedding in rows of its own."""
    import onnx

    model = onnx.load(directory / LAST)
    store_embedding_by_row(model.graph)
    return model


def save_decoder(model: Any, directory: Path) -> None:
    """Write ``model`` as LAST of ``directory``, its weights in one file beside it."""
    import onnx

    onnx.save(model, directory / LAST, save_as_external_data=True, location=f"{LAST}.data")


def store_embedding_by_row(graph: Any) -> None:
    """Give a tied embedding rows of its own where the builder looks it up in the transposed head.

    Otherwise ONNX Runtime transposes the matrix when it loads the graph and keeps the copy in memory. Rows
    that lie in the file are mapped, and only those that are looked up are ever read.
    """
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "Transpose"]:
        readers = [reader for reader in graph.node if node.output[0] in reader.input]
        if node.input[0] in constants and all(reader.op_type == "Gather" for reader in readers):
            rows = np.ascontiguousarray(numpy_helper.to_array(constants[node.input[0]]).T)
            graph.initializer.append(numpy_helper.from_array(rows, f"{node.output[0]}/rows"))
            for reader in readers:
                reader.input[0] = f"{node.output[0]}/rows"
            graph.node.remove(node)
