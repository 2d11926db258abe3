"""A standard ONNX graph in the making: nodes named after their outputs, large constants in the data file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from open_autoglm.export.graph import DATA, GRAPH, stored
from open_autoglm.export.standard_recipe import Compute

OPSET = 24
"""The first with TensorScatter; RotaryEmbedding, RMSNormalization and Attention came with 23."""

IR_VERSION = 12
"""The least that opset 24 goes with, since parsers warn of what is newer than they are."""


class Nodes:
    """The nodes of one graph in ``directory``. A value is the name of what a node returns."""

    def __init__(self, directory: Path) -> None:
        (directory / DATA).write_bytes(b"")  # every graph has one; weights are appended
        self._directory = directory
        self._nodes: list[Any] = []
        self._constants: dict[str, Any] = {}
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []

    def add(self, operator: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        """A node whose one output has its name."""
        from onnx import helper

        self._nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def constant(self, name: str, array: NDArray[Any]) -> str:
        """A constant; one that is there already stays."""
        if name not in self._constants:
            self._constants[name] = stored(name, array, self._directory)
        return name

    def integers(self, *values: int) -> str:
        """``int64[values]``, named after what it holds."""
        return self.constant(f"integers/{'_'.join(map(str, values))}", np.array(values, dtype=np.int64))

    def integer(self, value: int) -> str:
        """``int64[]``."""
        return self.constant(f"integer/{value}", np.array(value, dtype=np.int64))

    def cast(self, value: str, to: Compute, name: str) -> str:
        return self.add("Cast", [value], name, to=onnx_type(to))

    def input(self, name: str, element: int, shape: Sequence[str | int]) -> str:
        """An input of the graph; ``element`` is an ``onnx.TensorProto.DataType``."""
        from onnx import helper

        self._inputs.append(helper.make_tensor_value_info(name, element, shape))
        return name

    def output(self, name: str, element: int, shape: Sequence[str | int]) -> None:
        """Make the value ``name`` an output of the graph."""
        from onnx import helper

        self._outputs.append(helper.make_tensor_value_info(name, element, shape))

    def save(self) -> None:
        """Write GRAPH, with the types and shapes of all values.

        Raises ``onnx.shape_inference.InferenceError`` if they contradict each other.
        """
        import onnx
        from onnx import helper

        graph = helper.make_graph(
            self._nodes, "decoder", self._inputs, self._outputs, list(self._constants.values())
        )
        opset = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, ir_version=IR_VERSION, opset_imports=opset, producer_name="autoglm")
        model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
        onnx.save(model, self._directory / GRAPH)


def onnx_type(compute: Compute) -> int:
    """An ``onnx.TensorProto.DataType``."""
    from onnx import TensorProto

    found: int = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[
        compute
    ]
    return found


def numbers(array: NDArray[Any], compute: Compute) -> NDArray[Any]:
    """``array`` in the type that is computed with. Raises ValueError if a number lies beyond it."""
    from onnx import helper

    with np.errstate(over="ignore"):
        found: NDArray[Any] = array.astype(helper.tensor_dtype_to_np_dtype(onnx_type(compute)), order="C")
    if not np.isfinite(found).all():
        raise ValueError(f"there are weights that are not finite in {compute}")
    return found
