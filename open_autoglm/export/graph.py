"""Small passes over exported ONNX graphs; none of them touches the weights' file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from open_autoglm.schemas import Model

LAST = "model.onnx"
"""The graph that serves: logits of the last position only."""

FULL = "model_full.onnx"
"""The same weights and kernels with logits of every position, for quality."""

FACTS = "decoder.json"
"""What a session must know that the graph does not say."""


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
