"""Opening a plan: the engine in it, and an execution context for each regime. Needs a GPU."""

from __future__ import annotations

import math
import mmap
from pathlib import Path

from open_autoglm.export.tensorrt_api import Context, CudaEngine, Log, RuntimeCache, TensorRT
from open_autoglm.export.tensorrt_plan import PAST, REGIMES, Regime


class OpenPlan:
    """A deserialised plan. A context per regime, so that none has to change its profile between calls."""

    def __init__(
        self,
        trt: TensorRT,
        plan: Path,
        *,
        weight_streaming: bool = False,
        cuda_graph: bool = False,
        runtime_cache: bytes | None = None,
    ) -> None:
        """Raises TensorRTFailure, or DeviceOutOfMemoryError where that is the reason."""
        self.trt = trt
        self.log = Log(trt)
        self._runtime = trt.Runtime(self.log.logger)  # lives as long as what it opened
        self.engine = self._deserialize(plan)
        if weight_streaming:  # only before there is a context
            self.engine.weight_streaming_budget_v2 = weight_budget(self.engine)
        self.runtime_cache: RuntimeCache | None = None
        self.runtime_cache_used = False
        self._how = self._runtime_config(cuda_graph, runtime_cache)
        self.contexts: dict[Regime, Context] = {regime: self._context(regime) for regime in REGIMES}
        self.log.errors.clear()  # what it got over, as a cache that does not fit, is no reason for what comes

    def _deserialize(self, plan: Path) -> CudaEngine:
        with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            engine = self._runtime.deserialize_cuda_engine(view)
        if engine is None:
            raise self.log.failure(f"TensorRT {self.trt.__version__} cannot open the plan")
        return engine

    def _runtime_config(self, cuda_graph: bool, runtime_cache: bytes | None) -> object:
        """What contexts are made by: memory for the profile in use only, and what TensorRT-RTX adds."""
        strategy = self.trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        if not hasattr(self.engine, "create_runtime_config"):
            return strategy
        config = self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        if self.captures_graphs and cuda_graph:
            config.cuda_graph_strategy = self.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if hasattr(config, "create_runtime_cache"):
            self.runtime_cache = config.create_runtime_cache()
            if runtime_cache is not None:
                self.runtime_cache_used = self.runtime_cache.deserialize(runtime_cache)
            config.set_runtime_cache(self.runtime_cache)
        return config

    @property
    def captures_graphs(self) -> bool:
        """Whether the runtime captures CUDA graphs by itself, as TensorRT-RTX does."""
        return hasattr(self.trt, "CudaGraphStrategy")

    def _context(self, regime: Regime) -> Context:
        context = self.engine.create_execution_context(self._how)
        if context is None:
            raise self.log.failure(f"TensorRT {self.trt.__version__} cannot make the plan ready for {regime}")
        return context


def weight_budget(engine: CudaEngine) -> int:
    """Bytes of weights that stay on the GPU, where others are streamed to it in every call.

    TensorRT knows what is free now and what its contexts will want, but not of the cache, which comes later
    and is kept out of it here. Where all weights fit, streaming was asked for to save memory: half stay.
    """
    weights, automatic = engine.streamable_weights_size, engine.get_weight_streaming_automatic_budget()
    if automatic >= weights:
        return weights // 2
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    return max(0, automatic - sum(_largest(engine, name) for name in names if name.startswith(PAST)))


def _largest(engine: CudaEngine, name: str) -> int:
    """Bytes of an input of the largest shape that the first profile takes."""
    _, _, most = engine.get_tensor_profile_shape(name, 0)
    return math.prod(tuple(most)) * int(engine.get_tensor_dtype(name).itemsize)
