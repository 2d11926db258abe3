"""Decoders as OpenVINO graphs, written node by node straight from a checkpoint: seconds, and no tracing.

A graph is as fast as the patterns that the runtime recognises in it. This one is written in those that the
CPU plugin fuses: RMSNorm, rotary embedding by halves, and attention over a KV cache that is the plugin's own
state (``ReadValue``, ``Gather`` by ``beam_idx``, ``Concat``, ``Assign``, ``ScaledDotProductAttention``).

Where a model rotates neighbouring dimensions, as GLM does, the rows of its query and key matrices are
reordered once, here, so that the same dimensions are turned as halves. Queries and keys are permuted alike,
so their products, which are all that counts, stay the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from open_autoglm.export.decoder_graph import DecoderGraph, Floats
from open_autoglm.export.openvino_weights import Rounding, matrix_node
from open_autoglm.schemas import Checkpoint

GRAPH = "model.xml"
"""The graph that serves; its weights lie beside it in ``model.bin``."""

_LAST = "last_position/"
"""How the names of the nodes begin that keep only the last position."""


def write_graph(checkpoint: Checkpoint, rounding: Rounding, output: Path) -> None:
    """Write GRAPH and its weights into ``output``.

    Its inputs are ``input_ids`` and ``position_ids``, both ``int64[batch, tokens]``, and ``beam_idx``,
    ``int32[batch]``: the rows of the cache to go on with. Its output is ``logits``, of the last position,
    ``float32[batch, 1, vocab]``. Raises UnknownModel.
    """
    import openvino as ov

    ov.save_model(_Decoder(checkpoint, rounding).model(), output / GRAPH, compress_to_fp16=False)


def keep_every_position(model: Any) -> None:
    """Change a graph of `write_graph` so that its logits are of all positions: ``[batch, tokens, vocab]``."""
    for node in model.get_ops():
        if node.friendly_name.startswith(_LAST):
            node.output(0).replace(node.input_value(0))
    model.validate_nodes_and_infer_types()


class _Decoder(DecoderGraph):
    FORMAT = "the OpenVINO graph"

    def __init__(self, checkpoint: Checkpoint, rounding: Rounding) -> None:
        import openvino as ov
        import openvino.opset13 as ops

        super().__init__(checkpoint)
        self._ops = ops
        self._rounding = rounding
        # 4 bits are too few for embeddings and the head, which NNCF leaves at 8 as well.
        self._end_rounding = Rounding(bits=8) if rounding.bits == 4 else rounding
        self._ids = ops.parameter([-1, -1], ov.Type.i64, "input_ids")
        self._positions = ops.parameter([-1, -1], ov.Type.i64, "position_ids")
        self._rows = ops.parameter([-1], ov.Type.i32, "beam_idx")
        self._cos, self._sin = self._rotary_tables()
        self._empty_cache = self._make_empty_cache()
        self._stores: list[Any] = []

    def model(self) -> Any:
        """The whole graph. Raises UnknownModel if the checkpoint holds tensors that it does not use."""
        import openvino as ov

        ops = self._ops
        embedding = matrix_node(self._tensors.read("model.embed_tokens.weight"), self._end_rounding)
        hidden = self._layers(ops.gather(embedding, self._ids, np.int32(0)))
        head = embedding
        if not self._shape.tied_embeddings:
            head = matrix_node(self._tensors.read("lm_head.weight"), self._end_rounding)
        logits = ops.matmul(hidden, head, False, True)
        self._require_all_read()
        inputs = {"input_ids": self._ids, "position_ids": self._positions, "beam_idx": self._rows}
        for name, node in {**inputs, "logits": logits}.items():
            node.output(0).set_names({name})
        return ov.Model([ops.result(logits)], self._stores, list(inputs.values()), "decoder")

    # ── attention ────────────────────────────────────────────────────────────────────────────────

    def _attention(self, name: str, hidden: Any) -> Any:
        ops, shape = self._ops, self._shape
        query = self._turn(self._heads(f"{name}.q", hidden, shape.attention_heads, turned=True))
        key = self._turn(self._heads(f"{name}.k", hidden, shape.kv_heads, turned=True))
        value = self._heads(f"{name}.v", hidden, shape.kv_heads, turned=False)
        key, value = self._with_past(f"{name}.key", key), self._with_past(f"{name}.value", value)
        # The plugin's kernel aligns the causal mask with the last key, so one flag serves prompt and token.
        mixed = ops.scaled_dot_product_attention(query, key, value, causal=True)
        together = np.array([0, 0, shape.attention_heads * shape.head_dim])
        return ops.reshape(ops.transpose(mixed, _SWAP), together, special_zero=True)

    def _heads(self, name: str, hidden: Any, heads: int, *, turned: bool) -> Any:
        """A projection as ``[batch, heads, tokens, head_dim]``, ordered for `_turn` if ``turned``."""
        ops, head_dim = self._ops, self._shape.head_dim
        order = self._half_split()
        rows = (np.arange(heads)[:, None] * head_dim + order).ravel() if turned else None
        projected = self._linear(f"{name}_proj", hidden, rows)
        projected = ops.reshape(projected, np.array([0, 0, heads, head_dim]), special_zero=True)
        if f"{name}_norm.weight" in self._tensors:  # of queries and keys only
            weight = self._tensors.read(f"{name}_norm.weight")[order]
            projected = self._rms(f"{name}_norm", projected, weight)
        return ops.transpose(projected, _SWAP)

    def _with_past(self, name: str, new: Any) -> Any:
        """Keys or values with those of earlier calls before them, once for each query head."""
        ops, shape = self._ops, self._shape
        cache = [-1, shape.kv_heads, -1, shape.head_dim]
        past = ops.read_value(self._empty_cache, name, np.float32, cache)
        all_tokens = ops.concat([ops.gather(past, self._rows, np.int32(0)), new], 2)
        self._stores.append(ops.assign(all_tokens, name))
        queries_per_key = shape.attention_heads // shape.kv_heads
        if queries_per_key == 1:
            return all_tokens
        repeats = np.array([1, 1, queries_per_key, 1, 1])
        repeated = ops.broadcast(
            ops.unsqueeze(all_tokens, np.int32(2)), repeats, broadcast_spec="BIDIRECTIONAL"
        )
        heads = np.array([0, shape.attention_heads, -1, shape.head_dim])
        return ops.reshape(repeated, heads, special_zero=True)

    # ── parts ────────────────────────────────────────────────────────────────────────────────────

    def _product(self, name: str, hidden: Any, matrix: Floats) -> Any:
        return self._ops.matmul(hidden, matrix_node(matrix, self._rounding), False, True)

    def _biased(self, name: str, product: Any, bias: Floats) -> Any:
        return self._ops.add(product, self._ops.constant(bias[None, None]))

    def _sum(self, stream: Any, branch: Any) -> Any:
        return self._ops.add(stream, branch)

    def _gated(self, name: str, gate: Any, up: Any) -> Any:
        return self._ops.multiply(self._ops.swish(gate), up)

    def _rms(self, name: str, hidden: Any, weight: Floats) -> Any:
        """In the nodes that the plugin's RMS fusion expects."""
        ops = self._ops
        mean = ops.reduce_mean(ops.power(hidden, np.float32(2)), np.array([-1]), keep_dims=True)
        inverse = ops.power(ops.sqrt(ops.add(mean, np.float32(self._eps))), np.float32(-1))
        return ops.multiply(ops.constant(weight), ops.multiply(hidden, inverse))

    def _turn(self, heads: Any) -> Any:
        """Rotary embedding of ``[batch, heads, tokens, head_dim]``, of its first dimensions if partial."""
        ops, dims, head_dim = self._ops, self._shape.rotary_dims, self._shape.head_dim
        turning, resting = heads, []
        if dims < head_dim:
            turning, *resting = ops.variadic_split(
                heads, np.int32(3), np.array([dims, head_dim - dims])
            ).outputs()
        first, second = ops.variadic_split(turning, np.int32(3), np.array([dims // 2, dims // 2])).outputs()
        partners = ops.concat([ops.multiply(second, np.float32(-1)), first], -1)
        turned = ops.add(ops.multiply(turning, self._cos), ops.multiply(partners, self._sin))
        return ops.concat([turned, *resting], -1) if resting else turned

    def _half_split(self) -> NDArray[np.int64]:
        """Where each dimension of a head is taken from, so that partners lie half the rotary size apart."""
        dims = np.arange(self._shape.rotary_dims)
        if self._shape.rotary == "interleaved":
            dims = np.concatenate([dims[0::2], dims[1::2]])
        return np.concatenate([dims, np.arange(len(dims), self._shape.head_dim)])

    def _rotary_tables(self) -> tuple[Any, Any]:
        """Cosines and sines of the positions asked for, ``[batch, 1, tokens, rotary_dims]``."""
        ops = self._ops
        frequencies, scaling = self._frequencies()
        positions = ops.unsqueeze(ops.convert(self._positions, np.float32), np.array([1, 3]))
        angles = ops.multiply(positions, ops.constant(np.tile(frequencies, 2)[None, None, None]))
        tables = ops.cos(angles), ops.sin(angles)
        if scaling == 1:
            return tables
        cos, sin = (ops.multiply(table, np.float32(scaling)) for table in tables)
        return cos, sin

    def _make_empty_cache(self) -> Any:
        """What a cache holds before the first call: as many rows as there are prompts, and no token."""
        ops, shape = self._ops, self._shape
        rows = ops.gather(ops.shape_of(self._ids), np.array([0]), np.int32(0))
        rest = ops.constant(np.array([shape.kv_heads, 0, shape.head_dim]))
        return ops.broadcast(np.float32(0), ops.concat([rows, rest], 0))

    def _wanted(self, value: Any) -> Any:
        """The last position."""
        ends = (np.array([-1]), np.array([np.iinfo(np.int32).max]), np.array([1]), np.array([1]))
        node = self._ops.slice(value, *ends)
        node.friendly_name = _LAST + value.friendly_name
        return node


_SWAP = np.array([0, 2, 1, 3])
"""Exchanges tokens and heads."""
