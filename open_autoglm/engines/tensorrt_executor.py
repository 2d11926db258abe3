"""A TensorRT plan as an executor: its tensors lie in torch's CUDA memory, all work is on one stream."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from open_autoglm.engines.contract import Logits, SessionOptions
from open_autoglm.engines.tensorrt_session import Feeds
from open_autoglm.export.graph import FIRST_LOGITS
from open_autoglm.export.tensorrt_api import Context, Flavour, load
from open_autoglm.export.tensorrt_plan import (
    PAST,
    PLAN,
    REGIMES,
    RUNTIME_CACHE,
    PlanHost,
    PlanRecord,
    Regime,
    check_plan,
    host_gpu,
)
from open_autoglm.export.tensorrt_runtime import OpenPlan
from open_autoglm.schemas import Knob

LOGITS, PRESENT = "logits", "present."


def open_executor(
    directory: Path, flavour: Flavour, options: SessionOptions, knobs: Mapping[str, Knob]
) -> PlanExecutor:
    """The plan in ``directory``, ready to run on this host.

    Raises ImportError or OSError without the runtime, RuntimeError without a GPU, PlanRefused for a plan
    that is not for this host and these sizes, TensorRTFailure or DeviceOutOfMemoryError if it cannot be
    opened.
    """
    tensors = CudaTensors()
    trt = load(flavour)
    host = PlanHost(flavour=flavour, version=trt.__version__, gpu=host_gpu())
    record = check_plan(directory, host, batch_size=options.batch_size, cache_tokens=options.max_tokens)
    cuda_graph = bool(knobs["cuda_graph"])
    plan = OpenPlan(
        trt,
        directory / PLAN,
        weight_streaming=record.weight_streaming,
        cuda_graph=cuda_graph,
        runtime_cache=(directory / RUNTIME_CACHE).read_bytes() if record.runtime_cache else None,
    )
    return PlanExecutor(plan, record, tensors, cuda_graph=cuda_graph)


class CudaTensors:
    """Memory on the first GPU, and the stream on which it is used."""

    device = "cuda"

    def __init__(self) -> None:
        """Raises RuntimeError if torch has no GPU."""
        import torch

        if not torch.cuda.is_available():
            raise RuntimeError(
                f"a TensorRT session keeps its tensors in torch's CUDA memory, and torch {torch.__version__} "
                "finds no GPU: install a CUDA build of torch on a host with an NVIDIA driver"
            )
        self.torch: Any = torch
        self._stream = self.torch.cuda.Stream()
        self.handle = int(self._stream.cuda_stream)

    def on_stream(self) -> AbstractContextManager[Any]:
        """What torch does inside is done on the stream."""
        stream: AbstractContextManager[Any] = self.torch.cuda.stream(self._stream)
        return stream

    def wait(self) -> None:
        self._stream.synchronize()

    def capture(self, enqueue: Any) -> Any:
        """A CUDA graph of what ``enqueue()`` puts on the stream."""
        self.wait()
        graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(graph, stream=self._stream):
            enqueue()
        return graph


class PlanExecutor:
    """A plan with the memory of its cache: past and present are one buffer.

    A context is told shapes and addresses only when they change, so that decoding tells them once.
    """

    def __init__(self, plan: OpenPlan, record: PlanRecord, tensors: CudaTensors, *, cuda_graph: bool) -> None:
        """Raises TensorRTFailure if a context does not take its profile."""
        self._plan, self._record, self._tensors = plan, record, tensors
        self._cuda_graph = cuda_graph
        self._captures = cuda_graph and not plan.captures_graphs
        engine = plan.engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self._past = [name for name in names if name.startswith(PAST)]
        self._types = {
            name: _torch_type(tensors.torch, engine.get_tensor_dtype(name)) for name in [LOGITS, *self._past]
        }
        location = engine.get_tensor_location(FIRST_LOGITS)
        self._first_logits_on = "cpu" if location == plan.trt.TensorLocation.HOST else tensors.device
        self._vocab_size = int(engine.get_tensor_shape(LOGITS)[-1])
        self._cache: dict[str, Any] = {}
        self._calls: dict[Regime, _Call] = {}
        for regime in REGIMES:
            profile = record.profile_of(regime)
            taken = plan.contexts[regime].set_optimization_profile_async(profile, tensors.handle)
            self._require(taken, f"take the profile of {regime}")
        tensors.wait()

    def allocate(self, rows: int) -> None:
        self._calls.clear()  # they hold the old addresses
        self._cache.clear()  # before there is a new one
        with self._tensors.on_stream():
            for name in self._past:
                shape = (rows, *tuple(self._plan.engine.get_tensor_shape(name))[1:])
                self._cache[name] = self._tensors.torch.zeros(
                    shape, dtype=self._types[name], device=self._tensors.device
                )

    def run(self, feeds: Feeds) -> Logits:
        regime: Regime = "decode" if feeds.input_ids.shape[1] == 1 else "prefill"
        call = self._calls.get(regime)
        if call is None or not call.fits(feeds):
            self._calls.pop(regime, None)  # its logits may be large
            call = self._calls[regime] = self._bind(regime, feeds)
        with self._tensors.on_stream():
            call.fill(self._tensors.torch, feeds)
            self._execute(call, regime)
            logits: Logits = call.logits.float().to("cpu", copy=True).numpy()  # waits for the stream
        return logits

    def _execute(self, call: _Call, regime: Regime) -> None:
        if call.graph is not None:
            call.graph.replay()
            return
        self._enqueue(call.context)
        if self._captures and regime == "decode":
            # After the first call, which let TensorRT prepare what may not be done while capturing.
            call.graph = self._tensors.capture(lambda: self._enqueue(call.context))

    def _enqueue(self, context: Context) -> None:
        self._require(context.execute_async_v3(self._tensors.handle), "run")

    def _bind(self, regime: Regime, feeds: Feeds) -> _Call:
        """Shapes and addresses of all that calls like ``feeds`` read and write."""
        torch, context = self._tensors.torch, self._plan.contexts[regime]
        with self._tensors.on_stream():
            inputs = {
                name: torch.empty(given.shape, dtype=torch.int64, device=self._tensors.device)
                for name, given in feeds.arrays().items()
            }
            inputs[FIRST_LOGITS] = torch.tensor([feeds.first_logits], device=self._first_logits_on)
            rows, tokens = feeds.input_ids.shape
            shape = (rows, tokens - feeds.first_logits, self._vocab_size)
            logits = torch.empty(shape, dtype=self._types[LOGITS], device=self._tensors.device)
        for name, tensor in {**inputs, **self._cache}.items():
            self._require(context.set_input_shape(name, tuple(tensor.shape)), f"take the shape of {name}")
        present = {name.replace(PAST, PRESENT): tensor for name, tensor in self._cache.items()}
        for name, tensor in {**inputs, **self._cache, **present, LOGITS: logits}.items():
            self._require(context.set_tensor_address(name, tensor.data_ptr()), f"take the memory of {name}")
        return _Call(context, inputs, logits, feeds.first_logits)

    def _require(self, done: bool, what: str) -> None:
        if not done:
            raise self._plan.log.failure(f"TensorRT {self._record.host.version} could not {what}")

    def facts(self) -> dict[str, str]:
        host, record, plan = self._record.host, self._record, self._plan
        facts = {
            host.flavour: host.version,
            "gpu": str(host_gpu()),
            "torch": str(self._tensors.torch.__version__),
            "layers": f"{plan.engine.num_layers} after fusion, {record.layers} before",
            "profiles": ", ".join(record.profiles),
            "tuned_for": record.sizes.tuned_for,
            "plan_cache_tokens": str(record.sizes.cache_tokens),
            "cuda_graph": "on" if self._cuda_graph else "off",
        }
        if record.weight_streaming:
            facts["weights_on_device"] = f"{plan.engine.weight_streaming_budget_v2} bytes at most"
        if plan.runtime_cache is not None:
            facts["runtime_cache"] = "used" if plan.runtime_cache_used else "none that fits"
        return facts

    def close(self) -> None:
        self._tensors.wait()
        self._calls.clear()
        self._cache.clear()
        del self._plan


class _Call:
    """Memory of calls of one shape, as a context knows it; and the CUDA graph of such a call."""

    def __init__(self, context: Context, inputs: dict[str, Any], logits: Any, first_logits: int) -> None:
        self.context = context
        self.logits = logits
        self.graph: Any = None
        self._inputs = inputs
        self._first_logits = first_logits

    def fits(self, feeds: Feeds) -> bool:
        shape = tuple(self._inputs["input_ids"].shape)
        return feeds.input_ids.shape == shape and feeds.first_logits == self._first_logits

    def fill(self, torch: Any, feeds: Feeds) -> None:
        for name, given in feeds.arrays().items():
            self._inputs[name].copy_(torch.from_numpy(given))


def _torch_type(torch: Any, dtype: Any) -> Any:
    """torch's type for a TensorRT ``DataType``."""
    return {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16}[dtype.name]
