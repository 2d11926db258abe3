"""int8 times int8, with activation scales that keep the quality of a long prompt.

ONNX Runtime's own dynamic quantisation has one activation scale per call, so that one outlier in a prompt
takes the resolution of all its tokens. Here each token has its own or, where that does as well, all share
a fixed one. Weights have a scale per output. The kernel is the same, ``MatMulIntegerToFloat``, which takes
one activation scale per call: it is given 1 where the token's scale multiplies the product.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from open_autoglm.export.calibrate import calibration_windows, observe
from open_autoglm.export.graph import DecoderFacts, load_decoder, save_decoder
from open_autoglm.export.linears import Decoder, Linear
from open_autoglm.export.quantize import weight_only
from open_autoglm.export.recipe import OnnxRecipe
from open_autoglm.export.rounding import BUDGET, FIXED, by_source, fit, stream_error, worst
from open_autoglm.schemas import Checkpoint

_ZERO_POINT = 128
"""Activations are uint8 around 128: the instructions of x86 multiply unsigned by signed bytes."""

_LARGEST = np.float32(127)


def int8_export(
    source: Path, output: Path, checkpoint: Checkpoint, recipe: OnnxRecipe, facts: DecoderFacts
) -> None:
    """Write GRAPH and its data into ``output`` from the fp32 export in ``source``.

    The head, and the down-projections that the recipe says, get 8-bit weights only: the head multiplies
    one token per call, and the down-projection's inputs are the hardest to round.
    """
    model = load_decoder(source)
    decoder = Decoder(model.graph, source)
    roles = decoder.roles()
    kept = {"head", "down"} if recipe.weight_only_down == "all" else {"head"}
    linears = [linear for linear in decoder.linears() if roles[linear.output] not in kept]
    if not linears:
        raise RuntimeError("the graph has no linear layer to compute in int8")
    down = [linear for linear in linears if roles[linear.output] == "down"]
    judged = down if recipe.weight_only_down == "worst" else []
    values = by_source(linears).keys() | _added_to(decoder, judged)
    seen = observe(source, sorted(values), calibration_windows(checkpoint), facts)
    spared = worst({linear.output: stream_error(decoder, linear, seen) for linear in judged}, BUDGET)
    linears = [linear for linear in linears if linear.output not in spared]
    fixed = {
        source
        for source, readers in by_source(linears).items()
        if recipe.fixed_scales and all(roles[linear.output] in FIXED for linear in readers)
    }
    scales = fit(decoder, linears, seen, frozenset(fixed))
    compute_in_int8(decoder, linears, scales)
    weight_only(model, source, recipe)
    save_decoder(model, source, output)


def _added_to(decoder: Decoder, linears: list[Linear]) -> set[str]:
    """The operands of the additions that ``linears`` end in."""
    added = [decoder.addition(linear.output) for linear in linears]
    return {name for operands in added if operands is not None for name in operands}


def compute_in_int8(decoder: Decoder, linears: list[Linear], fixed: Mapping[str, float]) -> None:
    """Replace ``linears`` in the graph. ``fixed`` has the scale of values that need none per token."""
    chosen = {linear.output: linear for linear in linears}
    _add_constants(decoder)
    nodes, rounded = [], set()
    for node in decoder.graph.node:
        linear = chosen.get(node.output[0])
        if linear is None:
            nodes.append(node)
            continue
        if linear.source not in rounded:
            rounded.add(linear.source)
            scale = fixed.get(linear.source)
            nodes.extend(
                _round_per_token(linear.source)
                if scale is None
                else _round_fixed(decoder, linear.source, scale)
            )
        nodes.extend(_multiply(decoder, linear, per_token=linear.source not in fixed))
    del decoder.graph.node[:]
    decoder.graph.node.extend(nodes)
    del decoder.graph.value_info[:]  # the types of what was between


_LAST_AXIS, _ONE, _STEP, _ZERO = "int8/last_axis", "int8/one", "int8/step", "int8/zero_point"


def _add_constants(decoder: Decoder) -> None:
    decoder.add(_LAST_AXIS, np.array([-1], dtype=np.int64))
    decoder.add(_ONE, np.array(1, dtype=np.float32))
    decoder.add(_STEP, np.array(1 / _LARGEST, dtype=np.float32))
    decoder.add(_ZERO, np.array(_ZERO_POINT, dtype=np.uint8))


def _round_per_token(source: str) -> list[Any]:
    """``float32[batch, tokens, channels]`` to uint8, and the largest magnitude ``[batch, tokens, 1]``.

    Few nodes, because each costs a microsecond per decoded token. A token of zeros is divided by zero, and
    whatever its bytes are then, multiplying by its largest magnitude makes the product zero.
    """
    return [
        _node("Abs", [source], f"{source}/abs"),
        _node("ReduceMax", [f"{source}/abs", _LAST_AXIS], f"{source}/largest", keepdims=1),
        _node("Div", [source, f"{source}/largest"], f"{source}/share"),
        _node("QuantizeLinear", [f"{source}/share", _STEP, _ZERO], f"{source}/int8"),
    ]


def _round_fixed(decoder: Decoder, source: str, scale: float) -> list[Any]:
    name = decoder.add(f"{source}/scale", np.array(scale, dtype=np.float32))
    return [_node("QuantizeLinear", [source, name, _ZERO], f"{source}/int8")]


def _multiply(decoder: Decoder, linear: Linear, *, per_token: bool) -> list[Any]:
    weight = decoder.value(linear.weight)
    if not np.isfinite(weight).all():
        raise ValueError(f"{linear.weight} has weights that are not finite, and bytes cannot say so")
    scale = np.abs(weight).max(axis=0) / _LARGEST
    scale[scale == 0] = 1
    decoder.replace(linear.weight, np.rint(weight / scale).astype(np.int8))
    rounded = f"{linear.source}/int8"
    if not per_token:
        scales = decoder.add(f"{linear.weight}/scale", scale)
        return [_product([rounded, linear.weight, f"{linear.source}/scale", scales, _ZERO], linear.output)]
    scales, unscaled = decoder.add(f"{linear.weight}/scale", scale / _LARGEST), f"{linear.output}/unscaled"
    return [
        _product([rounded, linear.weight, _ONE, scales, _ZERO], unscaled),
        _node("Mul", [unscaled, f"{linear.source}/largest"], linear.output),
    ]


def _product(inputs: list[str], output: str) -> Any:
    return _node("MatMulIntegerToFloat", inputs, output, domain="com.microsoft")


def _node(operator: str, inputs: list[str], output: str, **attributes: Any) -> Any:
    from onnx import helper

    return helper.make_node(operator, inputs, [output], name=f"{output}/{operator}", **attributes)
