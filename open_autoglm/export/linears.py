"""The linear layers of an exported decoder, found by what they compute and not by their names.

Exporters name nodes as they please and fuse what they can; a product with a constant matrix is one in all of
them. Weights are ``float32[inputs, outputs]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from open_autoglm.export.graph import stored

Matrix = NDArray[np.float32]
Vector = NDArray[np.float32]

Role = Literal["head", "attention", "output", "mlp", "down"]
"""Logits; query, key and value; after attention; gate and up; after the gated product."""

_NORM_WEIGHT = {
    "RMSNormalization": 1,
    "SimplifiedLayerNormalization": 1,
    "SkipSimplifiedLayerNormalization": 2,
}
"""Fused RMSNorms, with the position of their weight among the inputs."""

_ACTIVATION = 6
"""Nodes between a gated product and the linear layers it comes from: an activation, a split, a bias."""


_NORM = 8
"""Nodes that a norm and a bias are made of at most, where they are not fused."""

_ADDITIONS = ("Add", "SkipSimplifiedLayerNormalization")
"""What adds a branch to the residual stream; the fused norm's first two inputs are its operands."""


@dataclass(frozen=True)
class Linear:
    """One ``MatMul`` with a constant right side."""

    node: Any
    source: str
    """The value it multiplies, ``float32[batch, tokens, inputs]``."""

    weight: str
    """The initializer it multiplies by."""

    @property
    def output(self) -> str:
        name: str = self.node.output[0]
        return name


class Decoder:
    """A graph whose weights lie in files of ``directory``, and an index over it.

    Initializers may be changed and added through it, nodes may not. One weight at a time is in memory:
    what is changed or added goes to the file as well (:func:`~open_autoglm.export.graph.stored`).
    """

    def __init__(self, graph: Any, directory: Path) -> None:
        self.graph = graph
        self._directory = directory
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._maker = {output: node for node in graph.node for output in node.output}
        self._readers: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)

    def linears(self) -> list[Linear]:
        """All linear layers in the order of the graph, the head among them."""
        return [
            Linear(node, *node.input)
            for node in self.graph.node
            if node.op_type == "MatMul" and self._rank(node.input[1]) == 2
        ]

    def roles(self) -> dict[str, Role]:
        """What each linear layer does, by the name of its output."""
        linears = self.linears()
        outputs = {linear.output for linear in linears}
        head = self._head(outputs)
        gated = {linear.source for linear in linears if self._is_gated_product(linear.source)}
        mlp = {name for source in gated for name in self._linears_before(source, outputs)}

        def role(linear: Linear) -> Role:
            if linear.output == head:
                return "head"
            if linear.source in gated:
                return "down"
            if linear.output in mlp:
                return "mlp"
            return "attention" if self.scaled_by(linear.source) else "output"

        return {linear.output: role(linear) for linear in linears}

    def _head(self, outputs: set[str]) -> str | None:
        """The linear layer that the logits come from."""
        name = "logits"
        while name not in outputs:
            if name not in self._maker:
                return None
            name = self._maker[name].input[0]
        return name

    def _linears_before(self, value: str, outputs: set[str], steps: int = _ACTIVATION) -> set[str]:
        """The nearest linear layers that ``value`` is computed from, within ``steps`` nodes."""
        if value in outputs:
            return {value}
        if steps == 0 or value not in self._maker:
            return set()
        made_from = self._maker[value].input
        return {name for operand in made_from for name in self._linears_before(operand, outputs, steps - 1)}

    def _is_gated_product(self, value: str) -> bool:
        node = self._maker.get(value)
        return node is not None and node.op_type == "Mul" and not set(node.input) & set(self._constants)

    def scaled_by(self, value: str) -> str | None:
        """The constant that ``value`` is proportional to, channel by channel, if nothing else depends on it.

        That is the weight of the norm before it or, in a gated MLP, the up-projection: its columns pass
        through the product with the gate unchanged.
        """
        node = self._maker.get(value)
        if node is None or node.output[0] != value:
            return None
        if node.op_type in _NORM_WEIGHT:
            return self._unshared(node.input[_NORM_WEIGHT[node.op_type]], rank=1)
        if node.op_type != "Mul":
            return None
        for operand in node.input:
            if operand in self._constants:
                return self._unshared(operand, rank=1)
        for operand in node.input:
            maker = self._maker.get(operand)
            if maker is not None and maker.op_type == "MatMul" and len(self._readers[operand]) == 1:
                return self._unshared(maker.input[1], rank=2)
        return None

    def addition(self, value: str) -> tuple[str, str] | None:
        """The branch that ``value`` ends in and the residual stream it is added to, by their names.

        A bias or a norm, fused or not, may lie between. None if nothing else is added within a few nodes.
        """
        branch = {value}
        for node in self.graph.node:
            if branch.isdisjoint(node.input):
                continue
            added = [name for name in node.input[:2] if name not in branch and name not in self._constants]
            if added and node.op_type in _ADDITIONS:
                return next(name for name in node.input[:2] if name in branch), added[0]
            if added or len(branch) > _NORM:
                return None
            branch.update(filter(None, node.output))
        return None

    def _unshared(self, name: str, *, rank: int) -> str | None:
        return name if self._rank(name) == rank and len(self._readers[name]) == 1 else None

    def _rank(self, name: str) -> int | None:
        return len(self._constants[name].dims) if name in self._constants else None

    def readers(self, value: str) -> int:
        """How many nodes read a value."""
        return len(self._readers.get(value, ()))

    def maker(self, value: str) -> Any | None:
        """The node that computes a value; None for inputs and initializers."""
        return self._maker.get(value)

    def is_constant(self, name: str) -> bool:
        """Whether it is an initializer."""
        return name in self._constants

    def constant(self, name: str) -> Any:
        """An initializer as the graph has it: a large one names its place in a file."""
        return self._constants[name]

    def value(self, name: str) -> Matrix:
        """An initializer as an array, read only."""
        from onnx import numpy_helper

        array: Matrix = numpy_helper.to_array(self._constants[name], str(self._directory))
        return array

    def replace(self, name: str, array: NDArray[Any]) -> None:
        """Give an initializer another value."""
        constant = self._constants[name]
        constant.CopyFrom(stored(name, array, self._directory, over=constant))

    def add(self, name: str, array: NDArray[Any]) -> str:
        """Add an initializer and return its name; one that is there already stays."""
        if name not in self._constants:
            self.graph.initializer.append(stored(name, array, self._directory))
            self._constants[name] = self.graph.initializer[-1]
        return name
