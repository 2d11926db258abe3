"""The rungs of TensorRT and TensorRT for RTX; see :mod:`open_autoglm.engines.capability`.

Building a plan and running it are two things: TensorRT for RTX builds without a GPU. Both have the same
Python interface (TensorRT API Reference, Python), which is asked here by what it can do, not by its version.
"""

from __future__ import annotations

import re
from typing import Any, cast

import numpy as np

from open_autoglm.engines.capability import WIDTH, Asked, Matrix, Reached, judge, operands
from open_autoglm.engines.capability_driver import DeviceMemory, find_device
from open_autoglm.engines.capability_packages import INSTALL, TENSORRT, TENSORRT_RTX
from open_autoglm.export.tensorrt_api import (
    Flavour,
    Log,
    TensorRT,
    TensorRTFailure,
    load,
    make_builder,
    make_network,
)
from open_autoglm.packages import version_of


def reach_import(asked: Asked) -> Reached:
    """Its bindings load its libraries. Older ones have no layer for what the graphs do to their cache."""
    try:
        trt = _load(asked)
    except (ImportError, OSError) as error:
        obstacle = f"{asked.engine} {asked.version} cannot be imported: {error}"
        return Reached(obstacle=obstacle, install=INSTALL[asked.engine])
    if not hasattr(trt.INetworkDefinition, "add_kv_cache_update"):
        obstacle = f"{asked.engine} {trt.__version__} cannot update a KV cache in place: TensorRT 10.15 can"
        return Reached(obstacle=obstacle, install=INSTALL[asked.engine])
    return Reached(found=str(trt.__version__))


def reach_plan(asked: Asked) -> Reached:
    """Compile a network of one matrix product."""
    trt = _load(asked)
    try:
        _build(trt, Log(trt))
    except TensorRTFailure as failure:
        return Reached(obstacle=str(failure))
    return Reached()


def reach_device(asked: Asked) -> Reached:
    return find_device(asked.engine, _cuda_major(asked.engine))


def _load(asked: Asked) -> TensorRT:
    return load(cast(Flavour, asked.engine))


def _cuda_major(engine: str) -> int | None:
    """The CUDA version it was built for, which only the names of its packages tell."""
    names = TENSORRT if engine == "tensorrt" else TENSORRT_RTX
    installed = [re.search(r"-cu(\d+)", name) for name in names if version_of(name)]
    return next((int(match[1]) for match in installed if match), None)


def reach_product(asked: Asked) -> Reached:
    trt = _load(asked)
    log = Log(trt)
    try:
        product = _run(trt, log, _build(trt, log))
    except TensorRTFailure as failure:
        return Reached(obstacle=str(failure))
    return judge(product)


def _build(trt: TensorRT, log: Log) -> Any:
    """The plan of ``product = left @ right``. Raises TensorRTFailure."""
    builder = make_builder(trt, log)
    network: Any = make_network(trt, builder)
    left, right = (network.add_input(name, trt.float32, (WIDTH, WIDTH)) for name in ("left", "right"))
    plain = trt.MatrixOperation.NONE
    product = network.add_matrix_multiply(left, plain, right, plain).get_output(0)
    product.name = "product"
    network.mark_output(product)
    plan = builder.build_serialized_network(network, builder.create_builder_config())
    if plan is None:
        raise log.failure(f"TensorRT {trt.__version__} cannot build a small network")
    return plan


def _run(trt: TensorRT, log: Log, plan: Any) -> Matrix:
    """The product, by ``plan`` on the GPU. Raises TensorRTFailure, or RuntimeError from the driver."""
    # None or False, not an exception, is how TensorRT says that something went wrong.
    runtime: Any = trt.Runtime(log.logger)
    engine = runtime.deserialize_cuda_engine(plan)
    context = engine.create_execution_context() if engine is not None else None
    if context is None:
        raise log.failure(f"TensorRT {trt.__version__} cannot load its own plan")
    memory, (left, right) = DeviceMemory(), operands()
    product = np.zeros_like(left)
    with memory.holding(left) as first, memory.holding(right) as second, memory.holding(product) as result:
        for name, address in {"left": first, "right": second, "product": result}.items():
            context.set_tensor_address(name, address)
        if not context.execute_async_v3(0):  # the default stream
            raise log.failure(f"TensorRT {trt.__version__} cannot run its own plan")
        memory.read(result, product)
    return product
