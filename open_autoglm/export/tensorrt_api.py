"""The part of TensorRT's Python interface that is used here, the same in TensorRT 10, 11 and TensorRT-RTX.

The bindings ship no types; these protocols say what is called and what comes back. Where the flavours
differ, the code asks for the feature, not for a version.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Literal, Protocol, cast

Flavour = Literal["tensorrt", "tensorrt-rtx"]
"""TensorRT for data centres, whose plans fit one type of GPU, or TensorRT-RTX, which finishes them at run
time. Neither opens the other's plans."""

Shape = tuple[int, ...]


class Tensor(Protocol):
    """``ITensor`` of a network."""

    name: str
    dtype: Any
    shape: Sequence[int]

    @property
    def is_shape_tensor(self) -> bool: ...


class Layer(Protocol):
    name: str
    type: Any


class Network(Protocol):
    """``INetworkDefinition``"""

    num_inputs: int
    num_outputs: int
    num_layers: int

    def get_input(self, index: int) -> Tensor: ...
    def get_output(self, index: int) -> Tensor: ...
    def get_layer(self, index: int) -> Layer: ...


class ParserError(Protocol):
    def desc(self) -> str: ...


class Parser(Protocol):
    """``OnnxParser``"""

    num_errors: int

    def parse(self, model: bytes, path: str) -> bool: ...
    def get_error(self, index: int) -> ParserError: ...


class Profile(Protocol):
    """``IOptimizationProfile``"""

    def set_shape(self, name: str, least: Shape, best: Shape, most: Shape) -> None: ...
    def set_shape_input(self, name: str, least: Shape, best: Shape, most: Shape) -> None: ...


class Buffer(Protocol):
    """Bytes that need not be copied."""

    def __buffer__(self, flags: int, /) -> memoryview: ...


class HostMemory(Buffer, Protocol):
    """``IHostMemory``"""

    nbytes: int


class TimingCache(Protocol):
    def serialize(self) -> HostMemory: ...


class BuilderConfig(Protocol):
    def add_optimization_profile(self, profile: Profile) -> int: ...
    def set_flag(self, flag: Any) -> None: ...
    def create_timing_cache(self, serialized: bytes) -> TimingCache: ...
    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool: ...
    def get_timing_cache(self) -> TimingCache | None: ...


class Builder(Protocol):
    def create_network(self, flags: int) -> Network: ...
    def create_builder_config(self) -> BuilderConfig: ...
    def create_optimization_profile(self) -> Profile: ...
    def build_serialized_network(self, network: Network, config: BuilderConfig) -> HostMemory | None: ...


class RuntimeCache(Protocol):
    """TensorRT-RTX: kernels compiled at run time."""

    def serialize(self) -> HostMemory: ...
    def deserialize(self, blob: bytes) -> bool: ...


class RuntimeConfig(Protocol):
    """``IRuntimeConfig``; the cache and the strategy for CUDA graphs are TensorRT-RTX's."""

    cuda_graph_strategy: Any

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None: ...
    def create_runtime_cache(self) -> RuntimeCache: ...
    def set_runtime_cache(self, cache: RuntimeCache) -> bool: ...


class Context(Protocol):
    """``IExecutionContext``"""

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool: ...
    def set_input_shape(self, name: str, shape: Shape) -> bool: ...
    def set_tensor_address(self, name: str, memory: int) -> bool: ...
    def execute_async_v3(self, stream_handle: int) -> bool: ...


class CudaEngine(Protocol):
    """``ICudaEngine``. A budget of weights can be set only while there is no context."""

    num_io_tensors: int
    num_layers: int
    num_optimization_profiles: int
    streamable_weights_size: int
    weight_streaming_budget_v2: int

    def get_tensor_name(self, index: int) -> str: ...
    def get_tensor_shape(self, name: str) -> Sequence[int]: ...
    def get_tensor_dtype(self, name: str) -> Any: ...
    def get_tensor_profile_shape(self, name: str, profile_index: int) -> Sequence[Sequence[int]]: ...
    def get_tensor_location(self, name: str) -> Any: ...
    def get_weight_streaming_automatic_budget(self) -> int: ...
    def create_runtime_config(self) -> RuntimeConfig: ...
    def create_execution_context(self, how: Any) -> Context | None: ...


class Runtime(Protocol):
    def deserialize_cuda_engine(self, plan: Buffer) -> CudaEngine | None: ...


class TensorRT(Protocol):
    """The module."""

    __version__: str
    float32: Any
    ILogger: Any
    BuilderFlag: Any
    NetworkDefinitionCreationFlag: Any
    ExecutionContextAllocationStrategy: Any
    CudaGraphStrategy: Any
    INetworkDefinition: Any
    MatrixOperation: Any
    TensorLocation: Any

    def Builder(self, logger: Any) -> Builder: ...  # noqa: N802
    def OnnxParser(self, network: Network, logger: Any) -> Parser: ...  # noqa: N802
    def Runtime(self, logger: Any) -> Runtime: ...  # noqa: N802


def load(flavour: Flavour) -> TensorRT:
    """Import the module. Raises ImportError if it is not installed, ImportError or OSError if its libraries
    cannot be loaded."""
    if flavour == "tensorrt":
        import tensorrt

        return cast(TensorRT, tensorrt)
    if find_spec("tensorrt_rtx") is None:  # the name comes with the metapackage; the wheels do without
        import tensorrt_rtx_bindings

        return cast(TensorRT, tensorrt_rtx_bindings)
    import tensorrt_rtx

    return cast(TensorRT, tensorrt_rtx)


def make_builder(trt: TensorRT, log: Log) -> Builder:
    """Raises TensorRTFailure if TensorRT gives none, as without a GPU that it needs."""
    try:
        return trt.Builder(log.logger)
    except TypeError as error:  # how the bindings say so
        raise log.failure(f"TensorRT {trt.__version__} cannot build here") from error


def make_network(trt: TensorRT, builder: Builder) -> Network:
    """One that computes in the types it says. TensorRT 10 must be asked for it; later ones know no other."""
    return builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))


# ── what went wrong ──────────────────────────────────────────────────────────────────────────────


class TensorRTFailure(RuntimeError):
    """The parser, the builder or the runtime refused; one sentence with its own reason."""


class DeviceOutOfMemoryError(TensorRTFailure):
    """The GPU has too little memory to build or to run."""


_OUT_OF_MEMORY = re.compile(r"out ?of ?memory|insufficient memory|MEM_ALLOC_FAILED|cudaError 2\b", re.I)
_SOURCE = re.compile(r" ?\bIn \S+ at \S+:\d+|\[\w+\.cpp::\w+::\d+\] | \(In \S+ at \S+:\d+\)")
"""Where in TensorRT's own source a message comes from."""
_NO_DRIVER = "cudaError 35"
"""TensorRT-RTX builds without a GPU, and says at every step that there is none."""


class Log:
    """An ``ILogger`` that keeps errors and warnings, so that a failure can say its reason."""

    def __init__(self, trt: TensorRT) -> None:
        self.errors: list[str] = []
        self.warnings: list[str] = []
        severity = trt.ILogger.Severity
        kept = {
            severity.INTERNAL_ERROR: self.errors,
            severity.ERROR: self.errors,
            severity.WARNING: self.warnings,
        }

        def log(_: Any, level: Any, message: str) -> None:
            if level in kept:
                kept[level].append(message)

        # The base class is not known before the import.
        self.logger: Any = type("KeepingLogger", (trt.ILogger,), {"log": log})()

    def failure(self, what: str, said: Sequence[str] = ()) -> TensorRTFailure:
        """That ``what`` failed, for the first reason in ``said`` or, without any, in the log."""
        lines = [line for message in said or self.errors for line in message.splitlines()]
        found = [_SOURCE.sub("", line).strip() for line in lines if line.strip()]
        specific = [line for line in found if _NO_DRIVER not in line]
        reason = ": ".join((specific or found or ["it gave no reason"])[:2])
        kind = DeviceOutOfMemoryError if _OUT_OF_MEMORY.search("\n".join(lines)) else TensorRTFailure
        return kind(f"{what}: {reason}")
