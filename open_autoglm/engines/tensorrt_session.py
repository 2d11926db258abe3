"""A standard graph as a session: where tokens go in the cache, and the plan that computes it on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from open_autoglm.engines.contract import Logits, SessionOptions, Tokens
from open_autoglm.export.graph import FIRST_LOGITS
from open_autoglm.export.standard_graph import WRITE_INDICES
from open_autoglm.export.tensorrt_api import Context, Flavour, load
from open_autoglm.export.tensorrt_plan import (
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

LOGITS, PAST, PRESENT = "logits", "past_key_values.", "present."


class Feeds(NamedTuple):
    """What one call of a standard graph reads besides the cache; named as its inputs."""

    input_ids: NDArray[np.int64]
    """``[batch, sequence]``"""
    position_ids: NDArray[np.int64]
    """``[batch, sequence]``"""
    write_indices: NDArray[np.int64]
    """``[batch]``: where in each row of the cache the call's tokens go"""
    first_logits: int
    """Of the call's positions, the first that logits are wanted of, counted from the front"""


class Executor(Protocol):
    """A standard graph with the memory of its cache."""

    def allocate(self, rows: int) -> None:
        """Have a cache for ``rows`` rows, of zeros where it is new; stale contents may stay."""
        ...

    def run(self, feeds: Feeds) -> Logits:
        """Write the call's keys and values into the cache; return ``float32[batch, sequence - first_logits,
        vocab]`` in memory of its own."""
        ...

    def facts(self) -> dict[str, str]: ...

    def close(self) -> None: ...


class StandardSession:
    """A standard graph with one KV cache, whose rows have the same length."""

    def __init__(self, executor: Executor, options: SessionOptions) -> None:
        self._executor = executor
        self._options = options
        self._rows = 0
        self._length = 0

    def prefill(self, tokens: Tokens) -> Logits:
        self._reset(len(tokens))
        return self._run(tokens, tokens.shape[1] - 1)[:, -1]

    def decode(self, tokens: Tokens) -> Logits:
        return self._run(tokens[:, None], 0)[:, -1]

    def full_logits(self, tokens: Tokens) -> Logits:
        self._reset(len(tokens))
        return self._run(tokens, 0)

    def extend(self, tokens: Tokens) -> Logits:
        return self._run(tokens, 0)

    def rewind(self, tokens: int) -> None:
        if not 0 <= tokens <= self._length:
            raise ValueError(f"{self._length} tokens were read, {tokens} cannot be forgotten")
        self._length -= tokens  # what lies beyond is not seen, and overwritten

    def _reset(self, rows: int) -> None:
        if rows > self._options.batch_size:
            raise ValueError(f"batch of {rows} in a session opened for {self._options.batch_size}")
        self._length = 0
        if rows != self._rows:
            self._executor.allocate(rows)
            self._rows = rows

    def _run(self, tokens: Tokens, first_logits: int) -> Logits:
        """Append ``int64[batch, n]``; logits of the positions from ``first_logits`` on."""
        rows, added = tokens.shape
        length = self._length + added
        if length > self._options.max_tokens:
            raise ValueError(f"the cache holds {self._options.max_tokens} tokens, {length} were asked for")
        feeds = Feeds(
            input_ids=np.ascontiguousarray(tokens, dtype=np.int64),
            position_ids=np.tile(np.arange(self._length, length, dtype=np.int64), (rows, 1)),
            write_indices=np.full(rows, self._length, dtype=np.int64),
            first_logits=first_logits,
        )
        logits = self._executor.run(feeds)
        self._length = length
        return logits

    def facts(self) -> dict[str, str]:
        return {**self._executor.facts(), "kv_cache": "in_place"}

    def close(self) -> None:
        self._executor.close()


# ── on the GPU ───────────────────────────────────────────────────────────────────────────────────


class PlanExecutor:
    """A TensorRT plan, its tensors in torch's CUDA memory, all work on one stream.

    Past and present of the cache are one buffer. A context is told shapes and addresses only when they
    change, so that decoding tells them once.
    """

    def __init__(
        self, directory: Path, flavour: Flavour, options: SessionOptions, knobs: Mapping[str, Knob]
    ) -> None:
        """Raises ImportError without the runtime, PlanRefused for a plan that is not for this host and these
        sizes, TensorRTFailure or DeviceOutOfMemoryError if it cannot be opened."""
        self._torch = _torch_with_cuda()
        trt = load(flavour)
        self._host = PlanHost(flavour=flavour, version=trt.__version__, gpu=host_gpu())
        self._record = check_plan(
            directory, self._host, batch_size=options.batch_size, cache_tokens=options.max_tokens
        )
        cuda_graph = bool(knobs["cuda_graph"])
        self._plan = OpenPlan(
            trt,
            directory / PLAN,
            weight_streaming=self._record.weight_streaming,
            cuda_graph=cuda_graph,
            runtime_cache=_runtime_cache(directory, self._record),
        )
        self._cuda_graph = cuda_graph
        self._captures = cuda_graph and not self._plan.captures_graphs
        self._stream = self._torch.cuda.Stream()
        engine = self._plan.engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self._past = [name for name in names if name.startswith(PAST)]
        self._types = {name: _torch_type(self._torch, engine.get_tensor_dtype(name)) for name in names}
        self._on_host = {
            name for name in names if engine.get_tensor_location(name) == trt.TensorLocation.HOST
        }
        self._vocab_size = int(engine.get_tensor_shape(LOGITS)[-1])
        self._cache: dict[str, Any] = {}
        self._calls: dict[Regime, _Call] = {}
        for index, regime in enumerate(REGIMES):
            context = self._plan.contexts[regime]
            self._require(
                context.set_optimization_profile_async(index, self._handle), f"take the profile of {regime}"
            )
        self._stream.synchronize()

    @property
    def _handle(self) -> int:
        return int(self._stream.cuda_stream)

    def allocate(self, rows: int) -> None:
        self._calls.clear()  # they hold the old addresses
        self._cache.clear()  # before there are new ones
        engine = self._plan.engine
        with self._torch.cuda.stream(self._stream):
            for name in self._past:
                shape = (rows, *tuple(engine.get_tensor_shape(name))[1:])
                self._cache[name] = self._torch.zeros(shape, dtype=self._types[name], device="cuda")

    def run(self, feeds: Feeds) -> Logits:
        regime: Regime = "decode" if feeds.input_ids.shape[1] == 1 else "prefill"
        call = self._calls.get(regime)
        if call is None or not call.fits(feeds):
            self._calls.pop(regime, None)  # its logits may be large
            call = self._calls[regime] = self._bind(regime, feeds)
        with self._torch.cuda.stream(self._stream):
            call.fill(self._torch, feeds)
            self._execute(call)
            logits: Logits = call.logits.cpu().numpy()
        return logits

    def _execute(self, call: _Call) -> None:
        if call.graph is not None:
            call.graph.replay()
            return
        self._enqueue(call.context)
        if self._captures and call.regime == "decode":
            # The first call above let TensorRT prepare what may not be done within a capture.
            self._stream.synchronize()
            call.graph = self._torch.cuda.CUDAGraph()
            with self._torch.cuda.graph(call.graph, stream=self._stream):
                self._enqueue(call.context)

    def _enqueue(self, context: Context) -> None:
        self._require(context.execute_async_v3(self._handle), "run")

    def _bind(self, regime: Regime, feeds: Feeds) -> _Call:
        """Shapes and addresses of all that calls like ``feeds`` read and write."""
        torch, context = self._torch, self._plan.contexts[regime]
        rows, tokens = feeds.input_ids.shape
        with torch.cuda.stream(self._stream):
            inputs = {
                "input_ids": torch.empty((rows, tokens), dtype=torch.int64, device="cuda"),
                "position_ids": torch.empty((rows, tokens), dtype=torch.int64, device="cuda"),
                WRITE_INDICES: torch.empty((rows,), dtype=torch.int64, device="cuda"),
            }
            place = "cpu" if FIRST_LOGITS in self._on_host else "cuda"
            inputs[FIRST_LOGITS] = torch.tensor([feeds.first_logits], dtype=torch.int64, device=place)
            wanted = (rows, tokens - feeds.first_logits, self._vocab_size)
            logits = torch.empty(wanted, dtype=self._types[LOGITS], device="cuda")
        for name, tensor in {**inputs, **self._cache}.items():
            self._require(context.set_input_shape(name, tuple(tensor.shape)), f"take the shape of {name}")
        both = {past.replace(PAST, PRESENT): tensor for past, tensor in self._cache.items()}
        for name, tensor in {**inputs, **self._cache, **both, LOGITS: logits}.items():
            self._require(context.set_tensor_address(name, tensor.data_ptr()), f"take the memory of {name}")
        return _Call(regime, context, inputs, logits)

    def _require(self, done: bool, what: str) -> None:
        if not done:
            raise self._plan.log.failure(f"TensorRT {self._host.version} could not {what}")

    def facts(self) -> dict[str, str]:
        engine, record = self._plan.engine, self._record
        facts = {
            self._host.flavour: self._host.version,
            "gpu": str(self._host.gpu),
            "torch": self._torch.__version__,
            "layers": f"{engine.num_layers} after fusion, {record.layers} before",
            "profiles": ", ".join(record.profiles),
            "plan_cache_tokens": str(record.sizes.cache_tokens),
            "cuda_graph": "on" if self._cuda_graph else "off",
        }
        if record.weight_streaming:
            facts["weights_on_device"] = f"{engine.weight_streaming_budget_v2} bytes at most"
        if self._plan.runtime_cache is not None:
            facts["runtime_cache"] = "used" if self._plan.runtime_cache_used else "none that fits"
        return facts

    def close(self) -> None:
        self._stream.synchronize()
        self._calls.clear()
        self._cache.clear()
        del self._plan


class _Call:
    """Memory of calls of one shape, as one context knows it; and the CUDA graph of such a call."""

    def __init__(self, regime: Regime, context: Context, inputs: dict[str, Any], logits: Any) -> None:
        self.regime = regime
        self.context = context
        self.logits = logits
        self.graph: Any = None
        self._inputs = inputs
        self._first_logits = int(inputs[FIRST_LOGITS].item())

    def fits(self, feeds: Feeds) -> bool:
        shape = tuple(self._inputs["input_ids"].shape)
        return feeds.input_ids.shape == shape and feeds.first_logits == self._first_logits

    def fill(self, torch: Any, feeds: Feeds) -> None:
        for name in ("input_ids", "position_ids", WRITE_INDICES):
            self._inputs[name].copy_(torch.from_numpy(getattr(feeds, name)))


def _torch_with_cuda() -> Any:
    """Raises RuntimeError if torch has no GPU."""
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError(
            f"the tensors of a TensorRT session lie in torch's CUDA memory, and torch {torch.__version__} "
            "finds no GPU: install a CUDA build of torch on a host with an NVIDIA driver"
        )
    return torch


def _torch_type(torch: Any, dtype: Any) -> Any:
    """torch's type for a TensorRT ``DataType``."""
    names = {
        "FLOAT": torch.float32,
        "HALF": torch.float16,
        "BF16": torch.bfloat16,
        "INT64": torch.int64,
        "INT32": torch.int32,
    }
    return names[dtype.name]


def _runtime_cache(directory: Path, record: PlanRecord) -> bytes | None:
    return None if record.runtime_cache is None else (directory / RUNTIME_CACHE).read_bytes()
