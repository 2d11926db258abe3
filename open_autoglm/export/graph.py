"""Exported ONNX graphs and small passes over them. Weights stay in a file beside the graph."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from open_autoglm.schemas import Model

GRAPH = "model.onnx"
"""The graph; its weights lie in one file beside it."""

FIRST_LOGITS = "first_logits"
"""Its input ``int64[1]``: the first of a call's positions that logits are wanted of; 0: all, -1: the last."""

WRITE_INDICES = "write_indices"
"""Input ``int64[batch]`` of graphs that write new tokens into the cache they are given: where in each row."""

_PRODUCTS = ("MatMul", "Gemm")

DATA = f"{GRAPH}.data"
"""The weights of GRAPH."""

FACTS = "decoder.json"
"""What a session must know that the graph does not say."""

_SMALL_BYTES = 1024
"""Constants of up to this size are in the graph itself, where shapes are inferred from them."""


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
    """Let the caller of GRAPH say which positions it wants logits of: add the input FIRST_LOGITS.

    The head is the widest layer of all and serving needs its last row only, quality and drafts need more;
    with an input one graph does for all. The rows are chosen before the head, wherever it is.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(directory / GRAPH, load_external_data=False)
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
    onnx.save(model, directory / GRAPH)


def load_decoder(directory: Path) -> Any:
    """GRAPH of ``directory``, an ``onnx.ModelProto``; its weights stay in their file."""
    import onnx

    return onnx.load(directory / GRAPH, load_external_data=False)


def save_decoder(model: Any, weights: Path, output: Path) -> None:
    """Write ``model``, whose weights lie in ``weights``, as GRAPH of ``output`` with one data file beside it.

    The numbers go from file to file, a tensor at a time.
    """
    import onnx_ir

    decoder = onnx_ir.from_proto(model)
    onnx_ir.external_data.set_base_dir(decoder.graph, weights)
    onnx_ir.save(decoder, output / GRAPH, external_data=DATA, size_threshold_bytes=_SMALL_BYTES)


def stored(name: str, array: NDArray[Any], directory: Path, *, over: Any = None) -> Any:
    """``array`` as an ``onnx.TensorProto`` of a graph in ``directory``: a large one is written to DATA there,
    in the place of the tensor ``over`` if there is room, else at the end.

    A protobuf message keeps the memory of all it ever held, so that a graph whose weights are replaced one
    by one would hold both the old and the new.
    """
    from onnx import TensorProto, helper, numpy_helper

    if array.nbytes <= _SMALL_BYTES:
        return numpy_helper.from_array(array, name)
    path = directory / DATA
    room = None if over is None else _room(over, array.nbytes)
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    numbers = np.ascontiguousarray(array).reshape(-1).view(np.uint8)  # bfloat16 has no buffer
    data = _pack(numbers) if kind == TensorProto.INT4 else numbers
    with path.open("r+b" if path.exists() else "w+b") as file:
        offset = file.seek(0, os.SEEK_END) if room is None else file.seek(room)
        file.write(data.data)
    tensor = TensorProto(name=name, dims=array.shape, data_type=kind, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": DATA, "offset": offset, "length": data.nbytes}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _pack(numbers: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """4-bit numbers, one to a byte, as two to a byte: the first in the lower half, as ONNX has them."""
    first, second = np.pad(numbers, (0, numbers.size % 2)).reshape(-1, 2).T & 0xF
    packed: NDArray[np.uint8] = first | (second << 4)
    return packed


def _room(tensor: Any, size_bytes: int) -> int | None:
    """Where in DATA ``tensor`` begins, if it lies there and is large enough."""
    place = {entry.key: entry.value for entry in tensor.external_data}
    fits = place.get("location") == DATA and int(place["length"]) >= size_bytes
    return int(place["offset"]) if fits else None


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
    onnx.save(model, directory / GRAPH)
