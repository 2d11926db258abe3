"""The rungs of TensorRT and TensorRT for RTX; see :mod:`open_autoglm.engines.capability`.

Building a plan and running it are two things: TensorRT for RTX builds without a GPU. Both have the same
Python interface (TensorRT API Reference, Python), which is asked here by what it can do, not by its version.
"""

from __future__ import annotations

import re
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

from open_autoglm.engines.capability import WIDTH, Asked, Reached, judge, operands
from open_autoglm.engines.capability_driver import DeviceMemory, find_device
from open_autoglm.engines.capability_packages import INSTALL, TENSORRT, TENSORRT_RTX
from open_autoglm.packages import version_of

_MODULES = {
    "tensorrt": ("tensorrt", "tensorrt_bindings"),
    "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}
"""The module, and the one that does its work where only the bindings are installed."""


def load_tensorrt(engine: str) -> Any:
    """The module of that engine. Raises ImportError."""
    module, bindings = _MODULES[engine]
    return import_module(module if find_spec(module) else bindings)


def reach_import(asked: Asked) -> Reached:
    """Its bindings load its libraries."""
    try:
        found = load_tensorrt(asked.engine)
    except (ImportError, OSError) as error:
        obstacle = f"{asked.engine} {asked.version} cannot be imported: {error}"
        return Reached(obstacle=obstacle, install=INSTALL[asked.engine])
    return Reached(found=str(found.__version__))


def reach_plan(asked: Asked) -> Reached:
    """Compile a network of one matrix product."""
    words = _logger(load_tensorrt(asked.engine))
    if _build(load_tensorrt(asked.engine), words) is None:
        return Reached(obstacle=f"{asked.engine} could not build a small network: {words.last_error()}")
    return Reached()


def reach_device(asked: Asked) -> Reached:
    return find_device(asked.engine, _cuda_major(asked.engine))


def _cuda_major(engine: str) -> int | None:
    """The CUDA version it was built for, which only the names of its packages tell."""
    names = TENSORRT if engine == "tensorrt" else TENSORRT_RTX
    installed = [re.search(r"-cu(\d+)", name) for name in names if version_of(name)]
    return next((int(match[1]) for match in installed if match), None)


def reach_product(asked: Asked) -> Reached:
    trt = load_tensorrt(asked.engine)
    words = _logger(trt)
    plan = _build(trt, words)
    # None, not an exception, is how TensorRT says that something went wrong.
    engine = trt.Runtime(words).deserialize_cuda_engine(plan)
    context = engine.create_execution_context() if engine is not None else None
    if context is None:
        return Reached(obstacle=f"{asked.engine} could not load its own plan: {words.last_error()}")
    memory, (left, right) = DeviceMemory(), operands()
    product = np.zeros_like(left)
    with memory.holding(left) as first, memory.holding(right) as second, memory.holding(product) as result:
        for name, address in {"left": first, "right": second, "product": result}.items():
            context.set_tensor_address(name, address)
        if not context.execute_async_v3(0):  # the default stream
            return Reached(obstacle=f"{asked.engine} could not run its own plan: {words.last_error()}")
        memory.read(result, product)
    return judge(product)


def _build(trt: Any, words: Any) -> Any:
    """The plan of ``product = left @ right``, or None."""
    builder = trt.Builder(words)
    # TensorRT 10 must be asked for strong typing; later ones know nothing else.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    left, right = (network.add_input(name, trt.float32, (WIDTH, WIDTH)) for name in ("left", "right"))
    plain = trt.MatrixOperation.NONE
    product = network.add_matrix_multiply(left, plain, right, plain).get_output(0)
    product.name = "product"
    network.mark_output(product)
    return builder.build_serialized_network(network, builder.create_builder_config())


def _logger(trt: Any) -> Any:
    """A logger that keeps the errors it is told."""

    class Words(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self._errors.append(message)

        def last_error(self) -> str:
            return self._errors[-1] if self._errors else "it gave no reason"

    return Words()
