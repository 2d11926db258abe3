"""Decoders as standard ONNX graphs for compilers such as TensorRT: ONNX's own operators and nothing else.

ONNX Runtime's exports have operators of its own, which no other parser knows, and rounding that only its
kernels compute. Here attention, rotary embedding and RMSNorm are ONNX-23 operators, each one kernel where a
compiler has it, and the KV cache is ONNX-24's TensorScatter: new tokens are written into memory that the
caller owns. TensorRT has no fused attention in fp32, so that there it is spelled out.

RMSNorm is computed in fp32 whatever the rest is in. The squares of a small stream vanish in fp16, and so
does the epsilon of GLM, 1.56e-7.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from open_autoglm.export import standard_weights
from open_autoglm.export.decoder_graph import DecoderGraph, Floats
from open_autoglm.export.graph import FIRST_LOGITS, WRITE_INDICES, DecoderFacts, load_decoder
from open_autoglm.export.standard_calibrate import (
    NOT_CALIBRATED,
    Calibration,
    calibrate_fp8,
    calibrate_int8,
)
from open_autoglm.export.standard_nodes import Nodes, numbers, onnx_type
from open_autoglm.export.standard_recipe import StandardRecipe
from open_autoglm.schemas import Checkpoint

EXACT = StandardRecipe(compute="fp32")

MAX_TOKENS = "max_tokens"
"""The places of a row in the cache: a length that is open in the graph that is written."""


def write_standard(checkpoint: Checkpoint, recipe: StandardRecipe, output: Path) -> None:
    """Write GRAPH, its weights and the decoder facts into ``output``.

    Inputs: ``input_ids`` and ``position_ids``, ``int64[batch, sequence]``; WRITE_INDICES; FIRST_LOGITS; and
    ``past_key_values.{layer}.key`` and ``.value``, ``[batch, kv_heads, max_tokens, head_dim]`` of the type
    computed in. Outputs: ``logits``, ``float32[batch, logits_length, vocab]``, and ``present.{layer}.key``
    and ``.value`` like those of the past, which they may share memory with.

    A token sees the places of the cache up to its own position. What lies beyond is multiplied by zero and
    must be finite: let a new cache hold zeros. Rows may differ in length. A shorter prompt is padded at its
    end; the places of the padding lie beyond the row's length and are overwritten by its next tokens.

    Raises UnknownModel for what the graph has no nodes for, ValueError for weights beyond the type.
    """
    calibrate = {"fp8": calibrate_fp8, "w8a8": calibrate_int8}.get(recipe.weights)
    calibration = NOT_CALIBRATED
    if calibrate is not None:
        # Inside the output, so that it goes with it if the process ends.
        with tempfile.TemporaryDirectory(dir=output) as scratch:
            exact = Path(scratch)
            StandardGraph(checkpoint, EXACT, exact).write()
            calibration = calibrate(checkpoint, exact)
    StandardGraph(checkpoint, recipe, output, calibration).write()


def load_standard(directory: Path, max_tokens: int) -> Any:
    """GRAPH of ``directory``, an ``onnx.ModelProto``, with a cache of ``max_tokens`` places.

    TensorRT's parser refuses a TensorScatter whose cache has no fixed length. The weights stay in their file.
    """
    import onnx

    model = load_decoder(directory)
    for value in (*model.graph.input, *model.graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param == MAX_TOKENS:
                dimension.dim_value = max_tokens
    del model.graph.value_info[:]  # inferred from the length that was open
    return onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)


class StandardGraph(DecoderGraph):
    FORMAT = "the standard graph"

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: StandardRecipe,
        output: Path,
        calibration: Calibration = NOT_CALIBRATED,
    ) -> None:
        super().__init__(checkpoint)
        self._recipe = recipe
        self._compute = recipe.compute
        self._calibration = calibration
        self._output = output
        self._nodes = Nodes(output)
        self._context_tokens = checkpoint.context_tokens
        self._rounded: dict[str, str] = {}
        self._cos = self._sin = self._visible = ""

    def write(self) -> None:
        """The graph and its facts. Raises UnknownModel if the checkpoint holds tensors of no use here."""
        from onnx import TensorProto

        nodes = self._nodes
        for name in ("input_ids", "position_ids"):
            nodes.input(name, TensorProto.INT64, ["batch", "sequence"])
        nodes.input(WRITE_INDICES, TensorProto.INT64, ["batch"])
        nodes.input(FIRST_LOGITS, TensorProto.INT64, [1])
        cache: list[str | int] = ["batch", self._shape.kv_heads, MAX_TOKENS, self._shape.head_dim]
        for past in self._caches("past_key_values"):
            nodes.input(past, onnx_type(self._compute), cache)
        self._visible = self._visible_places()
        self._cos, self._sin = self._rotary("cos"), self._rotary("sin")
        self._logits()
        self._require_all_read()
        nodes.output("logits", TensorProto.FLOAT, ["batch", "logits_length", self._shape.vocab_size])
        for present in self._caches("present"):
            nodes.output(present, onnx_type(self._compute), cache)
        nodes.save()
        shape = self._shape
        facts = DecoderFacts(kv_heads=shape.kv_heads, head_dim=shape.head_dim, kv_cache="in_place")
        facts.write(self._output)

    def _logits(self) -> None:
        """The embedding is looked up and not multiplied: rounded it would save nothing, and be worse."""
        nodes, name, tied = self._nodes, "model.embed_tokens.weight", self._shape.tied_embeddings
        rows = nodes.constant(name, numbers(self._tensors.read(name), self._compute))
        hidden = self._layers(nodes.add("Gather", [rows, "input_ids"], "model.embed_tokens"))
        if tied and self._recipe.weights in _PLAIN_HEAD:
            weight = nodes.add("Transpose", [rows], "lm_head.weight", perm=[1, 0])
        else:
            weight = self._head_weight(self._tensors.read(name if tied else "lm_head.weight"))
        nodes.cast(nodes.add("MatMul", [hidden, weight], "lm_head"), "fp32", "logits")

    def _head_weight(self, matrix: Floats) -> str:
        """Of rounded graphs int8, and its input as it is: 4 bits are too few for what logits come from."""
        if self._recipe.weights in _PLAIN_HEAD:
            return standard_weights.plain(self._nodes, "lm_head.weight", matrix, self._compute)
        return standard_weights.per_output(self._nodes, "lm_head.weight", matrix, self._compute)

    def _caches(self, prefix: str) -> list[str]:
        layers = range(self._shape.layers)
        return [f"{prefix}.{layer}.{part}" for layer in layers for part in ("key", "value")]

    # ── positions ────────────────────────────────────────────────────────────────────────────────

    def _visible_places(self) -> str:
        """``bool[batch, 1, sequence, max_tokens]``: which places of the cache each token sees."""
        nodes = self._nodes
        size = nodes.add("Shape", ["past_key_values.0.key"], "mask/max_tokens", start=2, end=3)
        limit = nodes.add("Squeeze", [size, nodes.integers(0)], "mask/limit")
        places = nodes.add("Range", [nodes.integer(0), limit, nodes.integer(1)], "mask/places")
        positions = nodes.add("Unsqueeze", ["position_ids", nodes.integers(1, 3)], "mask/positions")
        return nodes.add("LessOrEqual", [places, positions], "mask/visible")

    def _rotary(self, function: str) -> str:
        """Cosines or sines of the call's positions, ``[batch, sequence, rotary_dims / 2]``.

        From a table, since fast sines of large angles, which compilers may choose, are far off.
        """
        frequencies, scaling = self._frequencies()
        angles = np.arange(self._context_tokens, dtype=np.float32)[:, None] * frequencies
        table = getattr(np, function)(angles) * np.float32(scaling)
        stored_table = self._nodes.constant(f"rotary/{function}/table", numbers(table, self._compute))
        return self._nodes.add("Gather", [stored_table, "position_ids"], f"rotary/{function}")

    def _turned(self, heads: str) -> str:
        """Rotary embedding of ``[batch, heads, sequence, head_dim]``, of its first dimensions if partial."""
        return self._nodes.add(
            "RotaryEmbedding",
            [heads, self._cos, self._sin],
            f"{heads}/rotary",
            interleaved=int(self._shape.rotary == "interleaved"),
            rotary_embedding_dim=self._shape.rotary_dims,
        )

    def _wanted(self, value: str) -> str:
        nodes = self._nodes
        bounds = [FIRST_LOGITS, nodes.integers(np.iinfo(np.int64).max), nodes.integers(1)]
        return nodes.add("Slice", [value, *bounds], f"{value}/wanted")

    # ── attention ────────────────────────────────────────────────────────────────────────────────

    def _attention(self, name: str, hidden: str) -> str:
        nodes, shape = self._nodes, self._shape
        query = self._turned(self._heads(f"{name}.q", hidden, shape.attention_heads))
        key = self._with_past(name, "key", self._turned(self._heads(f"{name}.k", hidden, shape.kv_heads)))
        value = self._with_past(name, "value", self._heads(f"{name}.v", hidden, shape.kv_heads))
        if self._compute == "fp32":
            mixed = self._spelled_out(name, query, key, value)
        else:
            mixed = nodes.add("Attention", [query, key, value, self._visible], f"{name}/mixed")
        by_token = nodes.add("Transpose", [mixed], f"{name}/by_token", perm=[0, 2, 1, 3])
        together = nodes.integers(0, 0, shape.attention_heads * shape.head_dim)
        return nodes.add("Reshape", [by_token, together], name)

    def _heads(self, name: str, hidden: str, heads: int) -> str:
        """A projection as ``[batch, heads, sequence, head_dim]``."""
        nodes = self._nodes
        projected = self._linear(f"{name}_proj", hidden)
        split = nodes.integers(0, 0, heads, self._shape.head_dim)
        projected = nodes.add("Reshape", [projected, split], f"{name}/split")
        projected = self._optional_norm(f"{name}_norm", projected)
        return nodes.add("Transpose", [projected], f"{name}/heads", perm=[0, 2, 1, 3])

    def _with_past(self, name: str, part: str, new: str) -> str:
        """The cache with the new keys or values in it, which is an output of the graph too."""
        layer = name.split(".")[2]
        past, present = f"past_key_values.{layer}.{part}", f"present.{layer}.{part}"
        return self._nodes.add("TensorScatter", [past, new, WRITE_INDICES], present, axis=2)

    def _spelled_out(self, name: str, query: str, key: str, value: str) -> str:
        """Attention by its parts. Queries that share a key lie in one matrix, so that none is repeated."""
        nodes, shape = self._nodes, self._shape
        shared = nodes.integers(0, shape.kv_heads, -1, shape.head_dim)
        queries = nodes.add("Reshape", [query, shared], f"{name}/queries")
        scale = nodes.constant("attention/scale", np.array(shape.head_dim**-0.5, dtype=np.float32))
        scaled = nodes.add("Mul", [queries, scale], f"{name}/scaled")
        columns = nodes.add("Transpose", [key], f"{name}/columns", perm=[0, 1, 3, 2])
        together = nodes.add("MatMul", [scaled, columns], f"{name}/together")
        like_query = nodes.add("Shape", [query], f"{name}/like_query", end=3)
        by_head = nodes.add("Concat", [like_query, nodes.integers(-1)], f"{name}/by_head", axis=0)
        scores = nodes.add("Reshape", [together, by_head], f"{name}/scores")
        hidden = nodes.constant("attention/hidden", np.array(np.finfo(np.float32).min))
        masked = nodes.add("Where", [self._visible, scores, hidden], f"{name}/masked")
        shares = nodes.add("Softmax", [masked], f"{name}/shares", axis=-1)
        like_scores = nodes.add("Shape", [together], f"{name}/like_scores")
        shares = nodes.add("Reshape", [shares, like_scores], f"{name}/shares_together")
        mixed = nodes.add("MatMul", [shares, value], f"{name}/mixed_together")
        like_query = nodes.add("Shape", [query], f"{name}/like_query_too")
        return nodes.add("Reshape", [mixed, like_query], f"{name}/mixed")

    # ── parts ────────────────────────────────────────────────────────────────────────────────────

    def _product(self, name: str, hidden: str, matrix: Floats) -> str:
        return self._nodes.add(
            "MatMul",
            [self._operand(hidden), self._weight(f"{name}.weight", self._smoothed(name, hidden, matrix))],
            f"{name}/product",
        )

    def _smoothed(self, name: str, hidden: str, matrix: Floats) -> Floats:
        smoothing = self._calibration.smoothing.get(hidden)
        divided = self._calibration.divided.get(f"{name}.weight")
        matrix = matrix if smoothing is None else matrix * smoothing
        return matrix if divided is None else matrix / divided[:, None]

    def _operand(self, value: str) -> str:
        """What a matrix multiplies: rounded once, however many do."""
        scale = self._calibration.scales.get(value)
        if scale is None:
            return value
        if value not in self._rounded:
            kind: standard_weights.Format = "fp8" if self._recipe.weights == "fp8" else "int8"
            self._rounded[value] = standard_weights.activation(self._nodes, value, scale, kind, self._compute)
        return self._rounded[value]

    def _weight(self, name: str, matrix: Floats) -> str:
        nodes, compute = self._nodes, self._compute
        match self._recipe.weights:
            case "same":
                return standard_weights.plain(nodes, name, matrix, compute)
            case "int8" | "w8a8":
                return standard_weights.per_output(nodes, name, matrix, compute)
            case "int4":
                return standard_weights.per_block(nodes, name, matrix, compute, self._recipe.block_size)
            case "fp8":
                return standard_weights.per_tensor(nodes, name, matrix, compute)

    def _biased(self, name: str, product: str, bias: Floats) -> str:
        stored_bias = self._nodes.constant(f"{name}.bias", numbers(bias, self._compute))
        return self._nodes.add("Add", [product, stored_bias], f"{name}/biased")

    def _rms(self, name: str, hidden: str, weight: Floats) -> str:
        nodes, exact = self._nodes, self._compute == "fp32"
        wide = hidden if exact else nodes.cast(hidden, "fp32", f"{name}/wide")
        divided = self._calibration.divided.get(f"{name}.weight", np.float32(1))
        weights = nodes.constant(f"{name}.weight", weight / divided)
        normed = name if exact else f"{name}/normed"
        nodes.add("RMSNormalization", [wide, weights], normed, axis=-1, epsilon=self._eps)
        return normed if exact else nodes.cast(normed, self._compute, name)

    def _sum(self, stream: str, branch: str) -> str:
        return self._nodes.add("Add", [stream, branch], f"{branch}/added")

    def _gated(self, name: str, gate: str, up: str) -> str:
        nodes = self._nodes
        share = nodes.add("Sigmoid", [gate], f"{name}/share")
        activated = nodes.add("Mul", [gate, share], f"{name}/activated")
        return nodes.add("Mul", [activated, up], f"{name}/gated")


_PLAIN_HEAD = ("same", "fp8")
"""Where the head is as it is computed with: fp8's too, as NVIDIA's ModelOpt has it by default."""
