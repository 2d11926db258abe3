"""A transformers model in this process with its KV cache, on the CPU or on a GPU."""

from __future__ import annotations

import gc
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import numpy as np

from open_autoglm.engines.contract import (
    PEAK_DEVICE_BYTES,
    Logits,
    SessionOptions,
    Tokens,
    threads_of,
)
from open_autoglm.engines.torch_weights import round_linears
from open_autoglm.schemas import Candidate, ExportedModel, Phase, Precision

_TYPES: dict[Precision, str] = {"fp32": "float32", "fp16": "float16"}
"""Of weights and arithmetic; bfloat16 for all others."""

_ROUNDED: tuple[Precision, ...] = ("fp8", "int8", "int4")


class TorchSession:
    """A transformers model with a KV cache: static, as compiled graphs want it, or growing.

    Tokens come from the host and logits go there, so a call ends when the device is done.
    """

    def __init__(self, candidate: Candidate, exported: ExportedModel, options: SessionOptions) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._threads = threads_of(candidate, options)
        torch.set_num_threads(self._threads)
        self._torch = torch
        self._device = "cuda" if candidate.device == "gpu" else "cpu"
        self._compiled = bool(candidate.knobs["compile"])
        self._cuda_graphs = self._compiled and bool(candidate.knobs.get("cuda_graphs", False))
        self._static = self._compiled or candidate.knobs.get("kv_cache") == "static"
        self._options = options
        self._clock = _DeviceClock(torch, self._device)
        model, loading = AutoModelForCausalLM.from_pretrained(
            exported.path,
            dtype=getattr(torch, _TYPES.get(candidate.precision, "bfloat16")),
            trust_remote_code=bool(exported.details.get("trust_remote_code", False)),
            output_loading_info=True,
        )
        if loading["missing_keys"]:
            # transformers only warns and fills them with random numbers.
            raise RuntimeError(f"the checkpoint has no weights for {sorted(loading['missing_keys'])[:5]}")
        self._model = model.to(self._device).eval()
        self._rounded = ""
        if candidate.precision in _ROUNDED:
            self._rounded = round_linears(
                self._model, candidate.precision, int(candidate.knobs.get("group_size", 0))
            )
        self._decoder = self._model.get_decoder()
        self._uncompiled: Callable[..., Any] = self._decoder.forward
        if self._compiled:
            self._compile()
        self._cache: Any = None
        self._cache_rows = 0
        self._length = 0

    def _compile(self) -> None:
        """The decoder without the head, so that quality and timing run the very same kernels; one graph for
        the prompt's shape and one for a single token."""
        if self._cuda_graphs:
            self._skipped_before = _graphs_skipped()
            self._decoder.forward = _by_length(self._torch, self._uncompiled)
        else:
            self._decoder.compile(dynamic=False)
        if self._rounded:
            # By itself, or it would widen its weights for every token.
            self._model.get_output_embeddings().compile(dynamic=False)

    def prefill(self, tokens: Tokens) -> Logits:
        self._reset(len(tokens))
        with self._clock.timing("prefill"):
            return self._forward(tokens, keep=1)[:, -1]

    def decode(self, tokens: Tokens) -> Logits:
        with self._clock.timing("decode"):
            return self._forward(tokens[:, None], keep=1)[:, -1]

    def full_logits(self, tokens: Tokens) -> Logits:
        self._reset(len(tokens))
        return self._forward(tokens, keep=0)

    def _reset(self, rows: int) -> None:
        from transformers.cache_utils import DynamicCache, StaticCache

        if rows > self._options.batch_size:
            raise ValueError(f"batch of {rows} in a session opened for {self._options.batch_size}")
        self._length = 0
        if not self._static:
            self._cache = DynamicCache(config=self._model.config)
        elif self._cache_rows == rows:
            self._cache.reset()
        else:
            self._cache = StaticCache(config=self._model.config, max_cache_len=self._options.max_tokens)
            self._cache_rows = rows
            self._allocate_cache(rows)

    def _allocate_cache(self, rows: int) -> None:
        """Let one eager token allocate the cache, or the first prompt would compile a graph of its own; made
        outside of a graph it is also marked as memory that no CUDA graph may move."""
        torch = self._torch
        token = torch.zeros((rows, 1), dtype=torch.long, device=self._device)
        with torch.no_grad():
            self._uncompiled(input_ids=token, position_ids=token, past_key_values=self._cache, use_cache=True)
        self._cache.reset()

    def _forward(self, tokens: Tokens, *, keep: int) -> Logits:
        """Logits of the last ``keep`` positions, or of all for 0."""
        torch = self._torch
        length = self._length + tokens.shape[1]
        if length > self._options.max_tokens:
            raise ValueError(f"the cache holds {self._options.max_tokens} tokens, {length} were asked for")
        positions = torch.arange(self._length, length, device=self._device)
        if self._cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # the last call's results are read
        # Not inference_mode: a compiled graph may not update a cache that was made outside of it.
        with torch.no_grad():
            output = self._model(
                input_ids=torch.from_numpy(np.ascontiguousarray(tokens)).to(self._device),
                position_ids=positions[None].expand(len(tokens), -1),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=keep,
            )
            logits: Logits = output.logits.float().cpu().numpy()  # .cpu() waits for the device
        self._length = length
        return logits

    def facts(self) -> dict[str, str]:
        facts = {
            "torch": self._torch.__version__,
            "device": self._device,
            "threads": str(self._threads),
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "kv_cache": "static" if self._static else "growing",
            "attention": str(self._model.config._attn_implementation),
            **self._clock.facts(),
        }
        if self._rounded:
            facts["rounded"] = self._rounded
        if self._device == "cuda":
            facts |= self._gpu_facts()
        return facts

    def _gpu_facts(self) -> dict[str, str]:
        cuda = self._torch.cuda
        return {
            "gpu": cuda.get_device_name(),
            "cuda": str(self._torch.version.cuda),
            "cuda_graphs": self._graphs() if self._cuda_graphs else "none",
            "peak_allocated_bytes": str(cuda.max_memory_allocated()),
            PEAK_DEVICE_BYTES: str(cuda.max_memory_reserved()),
        }

    def _graphs(self) -> str:
        """Where one cannot be recorded, torch warns and goes on without."""
        skipped = _graphs_skipped() - self._skipped_before
        return f"skipped {skipped} times" if skipped else "decode"

    def close(self) -> None:
        self._cache = None
        del self._model, self._decoder, self._uncompiled
        gc.collect()  # a compiled model refers to itself
        if self._device == "cuda":
            self._torch.cuda.empty_cache()


def _by_length(torch: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward`` compiled twice: a single token as a CUDA graph, anything longer without.

    What transformers' ``generate`` does with a static cache. A prompt is long enough to hide its launches,
    and a graph would be recorded for every length.
    """
    prompt = torch.compile(forward, dynamic=False)
    token = torch.compile(forward, dynamic=False, mode="reduce-overhead")

    def chosen(*arguments: Any, input_ids: Any, **options: Any) -> Any:
        compiled = token if input_ids.shape[1] == 1 else prompt
        return compiled(*arguments, input_ids=input_ids, **options)

    return chosen


def _graphs_skipped() -> int:
    """How many CUDA graphs torch gave up in this process, by its own count."""
    from torch._dynamo.utils import counters

    return counters["inductor"]["cudagraph_skips"]


class _DeviceClock:
    """From a call's first work on the GPU to its last, by CUDA events in its own stream; silent on the CPU.

    In it are the gaps in which the GPU waits for the next launch: short of profiling, nothing tells them from
    work. Close to the wall clock's time it says nothing; far below it, the time went before or after.
    """

    def __init__(self, torch: Any, device: str) -> None:
        self._torch, self._on = torch, device == "cuda"
        self._calls_ms: defaultdict[Phase, deque[float]] = defaultdict(lambda: deque(maxlen=256))

    @contextmanager
    def timing(self, phase: Phase) -> Iterator[None]:
        if not self._on:
            yield
            return
        begin, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        end.synchronize()
        self._calls_ms[phase].append(begin.elapsed_time(end))

    def facts(self) -> dict[str, str]:
        """``decode_device_ms``: the median of the latest calls."""
        return {f"{phase}_device_ms": f"{median(calls):.4g}" for phase, calls in self._calls_ms.items()}
