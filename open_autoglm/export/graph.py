"""Exported ONNX graphs and small passes over them. Weights stay in a file beside the graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from open_autoglm.schemas import Model

LAST = "model.onnx"
"""The graph that serves: logits of the last position only."""

DATA = f"{LAST}.data"
"""The weights of both graphs."""

FULL = "model_full.onnx"
"""The same weights and kernels with logits of every position, for quality."""

FACTS = "decoder.json"
"""What a session must know that the graph does not say."""

_SMALL_BYTES = 1024
"""Constants of up to this size are in the graph itself, where shapes are inferred from them."""


_GATHER, _UNSQUEEZE = "/lm_head/prune/Gather", "/lm_head/prune/Unsqueeze"
"""The builder's two nodes that keep only the last position."""


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


def write_full_logits_variant(directory: Path) -> None:
    """Write FULL beside LAST: the same graph without the gather that keeps only the last position.

    On a graph that has no such gather (its logits are complete already) the two are alike.
    Both name the same external data file, so the variant costs kilobytes.
    """
    import onnx

    model = onnx.load(directory / LAST, load_external_data=False)
    graph = model.graph
    pruned = {node.name: node for node in graph.node if node.name in (_GATHER, _UNSQUEEZE)}
    if pruned:
        gather, unsqueeze = pruned[_GATHER], pruned[_UNSQUEEZE]
        for node in graph.node:
            node.input[:] = [gather.input[0] if name == unsqueeze.output[0] else name for name in node.input]
        kept = [node for node in graph.node if node.name not in pruned]
        _drop_unused_constants(graph, pruned.values(), kept)
        del graph.node[:]
        graph.node.extend(kept)
        _free_sequence_dimension(graph)
    onnx.save(model, directory / FULL)


def _drop_unused_constants(graph: Any, removed: Any, kept: list[Any]) -> None:
    still_used = {name for node in kept for name in node.input}
    unused = {name for node in removed for name in node.input} - still_used
    initializers = [tensor for tensor in graph.initializer if tensor.name not in unused]
    del graph.initializer[:]
    graph.initializer.extend(initializers)


def _free_sequence_dimension(graph: Any) -> None:
    """Logits change from [batch, 1, vocab] to [batch, sequence, vocab]; intermediate shapes are dropped."""
    del graph.value_info[:]
    logits = next(output for output in graph.output if output.name == "logits")
    logits.type.tensor_type.shape.dim[1].dim_param = "sequence_length"


def load_decoder(directory: Path) -> Any:
    """LAST of ``directory``, an ``onnx.ModelProto``; its weights stay in their file."""
    import onnx

    return onnx.load(directory / LAST, load_external_data=False)


def save_decoder(model: Any, weights: Path, output: Path) -> None:
    """Write ``model``, whose weights lie in ``weights``, as LAST of ``output`` with one data file beside it.

    The numbers go from file to file, a tensor at a time.
    """
    import onnx_ir

    decoder = onnx_ir.from_proto(model)
    onnx_ir.external_data.set_base_dir(decoder.graph, weights)
    onnx_ir.save(decoder, output / LAST, external_data=DATA, size_threshold_bytes=_SMALL_BYTES)


def stored(name: str, array: NDArray[Any], directory: Path) -> Any:
    """``array`` as an ``onnx.TensorProto`` of a graph in ``directory``: a large one is added to DATA there.

    A protobuf message keeps the memory of all it ever held, so that a graph whose weights are replaced one
    by one would hold both the old and the new.
    """
    from onnx import TensorProto, helper, numpy_helper

    if array.nbytes <= _SMALL_BYTES:
        return numpy_helper.from_array(array, name)
    with (directory / DATA).open("ab") as file:
        place = {"location": DATA, "offset": file.tell(), "length": array.nbytes}
        file.write(np.ascontiguousarray(array).data)
    tensor = TensorProto(
        name=name,
        dims=array.shape,
        data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
        data_location=TensorProto.EXTERNAL,
    )
    for key, value in place.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def store_embedding_by_row(directory: Path) -> None:
    """Give a tied embedding rows of its own where the builder looks it up in the transposed head.

    Otherwise ONNX Runtime transposes the matrix when it loads the graph and keeps the copy in memory. Rows
    that lie in the file are mapped, and only those that are looked up are ever read.
    """
    import onnx
    from onnx import numpy_helper

    model = load_decoder(directory)
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "Transpose"]:
        readers = [reader for reader in graph.node if node.output[0] in reader.input]
        if node.input[0] in constants and all(reader.op_type == "Gather" for reader in readers):
            rows = numpy_helper.to_array(constants[node.input[0]], str(directory)).T
            graph.initializer.append(stored(f"{node.output[0]}/rows", rows, directory))
            for reader in readers:
                reader.input[0] = f"{node.output[0]}/rows"
            graph.node.remove(node)
    onnx.save(model, directory / LAST)
