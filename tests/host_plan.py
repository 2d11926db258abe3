"""A TensorRT plan's stand-in on the CPU: ONNX Runtime computes the graph from the addresses it is given.

It has the part of TensorRT's interface that an executor uses and keeps to its rules: a context runs only
with a profile, with the shape and address of every tensor told, and with shapes inside the profile's.
"""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

from open_autoglm.engines.tensorrt_executor import CudaTensors, PlanExecutor
from open_autoglm.export.graph import FIRST_LOGITS
from open_autoglm.export.standard_graph import load_standard
from open_autoglm.export.tensorrt_build import input_ranges
from open_autoglm.export.tensorrt_plan import (
    REGIMES,
    InputRange,
    PlanHost,
    PlanRecord,
    PlanSizes,
    profiles_of,
)
from open_autoglm.schemas import FileDigest

_TYPES = {"tensor(float)": ("FLOAT", np.float32), "tensor(int64)": ("INT64", np.int64)}


class HostTensors(CudaTensors):
    """The CPU's memory; a captured graph is run again by running it again."""

    device = "cpu"

    def __init__(self) -> None:
        self.torch = torch
        self.handle = 0
        self.replayed = 0

    def on_stream(self) -> Any:
        return contextlib.nullcontext()

    def wait(self) -> None:
        pass

    def capture(self, enqueue: Any) -> Any:
        def replay() -> None:
            self.replayed += 1
            enqueue()

        return SimpleNamespace(replay=replay)


class HostContext:
    """An ``IExecutionContext``"""

    def __init__(self, session: Any, profiles: list[tuple[InputRange, ...]]) -> None:
        self._session, self._profiles = session, profiles
        self._ranges: dict[str, InputRange] | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self.told = 0

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        assert stream_handle == 0
        self._ranges = {found.name: found for found in self._profiles[profile_index]}
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.told += 1
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert self._ranges is not None
        feeds = {}
        for given in self._session.get_inputs():
            value = self._at(given.name, self._shapes[given.name], _TYPES[given.type][1])
            self._check(given.name, value)
            feeds[given.name] = value.copy()
        names = [output.name for output in self._session.get_outputs()]
        for name, result in zip(names, self._session.run(names, feeds), strict=True):
            self._at(name, result.shape, result.dtype.type)[...] = result
        return True

    def _at(self, name: str, shape: tuple[int, ...], kind: Any) -> Any:
        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        memory = (ctypes.c_char * size).from_address(self._addresses[name])
        return np.frombuffer(memory, dtype=kind).reshape(shape)

    def _check(self, name: str, value: Any) -> None:
        assert self._ranges is not None
        if name not in self._ranges:
            return
        allowed = self._ranges[name]
        found = tuple(value) if allowed.values else value.shape
        for least, size, most in zip(allowed.least, found, allowed.most, strict=True):
            assert least <= size <= most, f"{name}: {found} is outside {allowed}"


class HostEngine:
    """An ``ICudaEngine``"""

    num_layers = 1

    def __init__(self, session: Any) -> None:
        self._values = {v.name: v for v in (*session.get_inputs(), *session.get_outputs())}
        self.num_io_tensors = len(self._values)

    def get_tensor_name(self, index: int) -> str:
        return list(self._values)[index]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else -1 for size in self._values[name].shape)

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=_TYPES[self._values[name].type][0])

    def get_tensor_location(self, name: str) -> str:
        return "host" if name == FIRST_LOGITS else "device"


def network_of(model: Any) -> Any:
    """The inputs of an ``onnx.ModelProto`` as TensorRT's parser gives them."""
    inputs = [
        SimpleNamespace(
            name=value.name,
            shape=tuple(
                dim.dim_value if dim.HasField("dim_value") else -1 for dim in value.type.tensor_type.shape.dim
            ),
            is_shape_tensor=value.name == FIRST_LOGITS,
        )
        for value in model.graph.input
    ]
    return SimpleNamespace(num_inputs=len(inputs), get_input=inputs.__getitem__)


def open_on_host(graph: Path, sizes: PlanSizes, *, cuda_graph: bool = False) -> PlanExecutor:
    """The standard fp32 graph in ``graph`` in an executor, as if a plan had been built of it."""
    model = load_standard(graph, sizes.cache_tokens)
    profiles = {kind: input_ranges(network_of(model), sizes, kind) for kind in profiles_of(sizes)}
    fixed = graph / "fixed.onnx"
    fixed.write_bytes(model.SerializeToString())
    options = ort.SessionOptions()
    options.log_severity_level = 3  # it warns of every copy of the cache
    session = ort.InferenceSession(fixed, options, providers=["CPUExecutionProvider"])
    contexts = {regime: HostContext(session, list(profiles.values())) for regime in REGIMES}
    plan: Any = SimpleNamespace(
        trt=SimpleNamespace(TensorLocation=SimpleNamespace(HOST="host")),
        engine=HostEngine(session),
        contexts=contexts,
        captures_graphs=False,
        runtime_cache=None,
    )
    record = PlanRecord(
        host=PlanHost(flavour="tensorrt", version="10.16", gpu=None),
        sizes=sizes,
        profiles=profiles,
        layers=1,
        weight_streaming=False,
        graph_digest="",
        plan=FileDigest(path="model.plan", size_bytes=0, sha256=""),
        run_reason="",
    )
    return PlanExecutor(plan, record, HostTensors(), cuda_graph=cuda_graph)
