"""A decoder graph in ONNX Runtime with its KV cache, on the CPU or on a GPU."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from open_autoglm.engines.contract import ALL_THREADS, RAN_ELSEWHERE, Logits, SessionOptions, Tokens
from open_autoglm.engines.onnxruntime_placement import (
    NO_CPU_NODES,
    ON_THE_CPU,
    RECORD_NODES,
    Nodes,
    Placement,
    WrongProvider,
)
from open_autoglm.export.graph import FIRST_LOGITS, GRAPH, DecoderFacts
from open_autoglm.schemas import Knob

SESSION_KNOBS: Mapping[str, Knob] = MappingProxyType(
    {
        "threads": ALL_THREADS,
        "graph_level": "all",
        "allow_spinning": True,
        "flash_attention": True,
        "memory_pattern": True,
        "arena": True,
    }
)
"""What only the session heeds, at ONNX Runtime's own defaults: no such knob changes an exported file."""

GRAPH_LEVELS = {"all": "ORT_ENABLE_ALL", "basic": "ORT_ENABLE_BASIC"}
"""Between the two is "extended", which leaves the same graph as "all": layouts are for convolutions."""

_SPINNING = "session.intra_op.allow_spinning"
_NO_FLASH = "ORT_GQA_DISABLE_FLASH_ATTENTION"
"""Read from the environment by each GroupQueryAttention when its session is made; there is no option."""


class OnnxRuntimeSession:
    """A decoder graph and its KV cache.

    Where the graph allows it (GroupQueryAttention, TensorScatter), past and present are one pre-allocated
    buffer of ``[batch, kv_heads, max_tokens, head_dim]`` on the session's device, of the type of the graph's
    inputs; the attention mask's length or the positions say how much of it is valid. Otherwise past grows by
    concatenation. Tokens come from the host and logits go there, so a call ends when the device is done.

    Raises WrongProvider, or what ONNX Runtime raises, where it cannot run on ``placement``.
    """

    def __init__(
        self,
        directory: Path,
        options: SessionOptions,
        knobs: Mapping[str, Knob] = SESSION_KNOBS,
        placement: Placement = ON_THE_CPU,
    ) -> None:
        self._facts = DecoderFacts.read(directory)
        self._placement = placement
        self._shared_buffer = self._facts.kv_cache == "in_place"
        self._options = options
        self._knobs = {**SESSION_KNOBS, **knobs}
        self._session = self._load(directory / GRAPH)
        inputs = {value.name: value.type for value in self._session.get_inputs()}
        self._past_names = [name for name in inputs if name.startswith("past_key_values")]
        self._cache_type = _CACHE_TYPES[next((inputs[name] for name in self._past_names), "tensor(float)")]
        self._fed = [name for name in inputs if name not in self._past_names]
        self._present_names = [name.replace("past_key_values", "present") for name in self._past_names]
        self._vocab_size = int(self._session.get_outputs()[0].shape[-1])
        self._binding = self._session.io_binding()
        self._cache: list[Any] = []
        self._rows = 0
        self._length = 0

    def _load(self, path: Path) -> Any:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = self._options.threads
        options.inter_op_num_threads = 1
        level = GRAPH_LEVELS[str(self._knobs["graph_level"])]
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
        options.enable_mem_pattern = bool(self._knobs["memory_pattern"])
        options.enable_cpu_mem_arena = bool(self._knobs["arena"])
        options.add_session_config_entry(_SPINNING, "1" if self._knobs["allow_spinning"] else "0")
        options.add_session_config_entry(RECORD_NODES, "1")
        options.add_session_config_entry(NO_CPU_NODES, "1" if self._placement.whole else "0")
        for name, size in self._placement.fixed.items():
            options.add_free_dimension_override_by_name(name, size)
        os.environ[_NO_FLASH] = "0" if self._knobs["flash_attention"] else "1"
        asked = self._placement.provider
        if asked not in (compiled_in := ort.get_available_providers()):
            raise WrongProvider(f"this build of ONNX Runtime has no {asked}, only {', '.join(compiled_in)}")
        if self._placement.device == "cuda":
            ort.preload_dlls()  # its libraries lie in other packages, where the loader does not look
        session = ort.InferenceSession(
            path, options, providers=[(asked, dict(self._placement.options))], enable_fallback=0
        )
        if (found := session.get_providers()[0]) != asked:
            raise WrongProvider(f"{asked} was asked for and ONNX Runtime chose {found}; its log says why")
        return session

    def prefill(self, tokens: Tokens) -> Logits:
        self._reset(len(tokens))
        return self._run(tokens, _LAST_POSITION)[:, -1]

    def decode(self, tokens: Tokens) -> Logits:
        return self._run(tokens[:, None], _LAST_POSITION)[:, -1]

    def full_logits(self, tokens: Tokens) -> Logits:
        self._reset(len(tokens))
        return self._run(tokens, _EVERY_POSITION)

    def extend(self, tokens: Tokens) -> Logits:
        return self._run(tokens, _EVERY_POSITION)

    def rewind(self, tokens: int) -> None:
        if not 0 <= tokens <= self._length:
            raise ValueError(f"{self._length} tokens were read, {tokens} cannot be forgotten")
        self._length -= tokens
        if tokens and not self._shared_buffer:
            kept = [np.ascontiguousarray(value.numpy()[:, :, : self._length]) for value in self._cache]
            self._bind_cache([_on_cpu(array) for array in kept])

    def _reset(self, rows: int) -> None:
        if rows > self._options.batch_size:
            raise ValueError(f"batch of {rows} in a session opened for {self._options.batch_size}")
        self._length = 0
        if rows == self._rows and self._shared_buffer:
            return  # stale contents lie beyond the mask
        self._rows = rows
        length = self._options.max_tokens if self._shared_buffer else 0
        shape = (rows, self._facts.kv_heads, length, self._facts.head_dim)
        self._bind_cache([self._zeros(shape) for _ in self._past_names])

    def _zeros(self, shape: tuple[int, ...]) -> Any:
        """An OrtValue of ``shape`` on the session's device. Zeros, since what is masked is multiplied by 0
        in some kernels, and memory that nobody wrote may hold NaN."""
        import onnxruntime as ort

        stored, onnx_type = self._cache_type
        zeros = np.zeros(shape, dtype=stored)
        if self._placement.device == "cpu":
            # Values on the CPU share the memory of their arrays: every layer needs an array of its own.
            return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(zeros, onnx_type)
        value = ort.OrtValue.ortvalue_from_shape_and_type(shape, onnx_type, self._placement.device)
        value.update_inplace(zeros)
        return value

    def _bind_cache(self, cache: list[Any]) -> None:
        """Let the graph read ``cache``, and write into it where past and present are one."""
        self._cache = cache
        for past, present, value in zip(self._past_names, self._present_names, cache, strict=True):
            self._binding.bind_ortvalue_input(past, value)
            if self._shared_buffer:
                self._binding.bind_ortvalue_output(present, value)

    def _run(self, tokens: Tokens, first_logits: int) -> Logits:
        """Append ``int64[batch, n]``; logits of the positions from ``first_logits`` on."""
        rows, added = tokens.shape
        length = self._length + added
        if length > self._options.max_tokens:
            raise ValueError(f"the cache holds {self._options.max_tokens} tokens, {length} were asked for")
        feeds = {
            "input_ids": np.ascontiguousarray(tokens, dtype=np.int64),
            "attention_mask": np.ones((rows, length), dtype=np.int64),
            "position_ids": np.tile(np.arange(self._length, length, dtype=np.int64), (rows, 1)),
            "write_indices": np.full(rows, self._length, dtype=np.int64),
            FIRST_LOGITS: np.array([first_logits]),
        }
        # Bound once and for all but for what changes: 6 % of a token of a small model went into binding.
        for name in self._fed:
            self._binding.bind_cpu_input(name, feeds[name])
        given = 1 if first_logits == _LAST_POSITION and FIRST_LOGITS in self._fed else added
        logits: Logits = np.empty((rows, given, self._vocab_size), dtype=np.float32)
        self._binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        if not self._shared_buffer:
            for name in self._present_names:
                self._binding.bind_output(name, self._placement.device)
        self._session.run_with_iobinding(self._binding)
        if self._placement.device == "cuda":
            self._binding.synchronize_outputs()
        if not self._shared_buffer:
            self._bind_cache(self._binding.get_outputs()[1:])
        self._length = length
        return logits

    def facts(self) -> dict[str, str]:
        import onnxruntime as ort

        options = self._session.get_session_options()
        nodes = Nodes.of(self._session)
        elsewhere = nodes.elsewhere(self._placement.provider)
        return {
            **({RAN_ELSEWHERE: elsewhere} if elsewhere else {}),
            "onnxruntime": ort.__version__,
            "providers": ",".join(self._session.get_providers()),
            "nodes": nodes.words(),
            "threads": str(options.intra_op_num_threads),
            "graph_level": options.graph_optimization_level.name.removeprefix("ORT_ENABLE_").lower(),
            "spinning": {"1": "allowed", "0": "off"}[options.get_session_config_entry(_SPINNING)],
            "flash_attention": "on" if self._knobs["flash_attention"] else "off",
            "memory_pattern": "planned" if options.enable_mem_pattern else "off",
            "arena": "on" if options.enable_cpu_mem_arena else "off",
            "kv_cache": self._facts.kv_cache,
        }

    def close(self) -> None:
        self._session = self._binding = None
        self._cache = []


_LAST_POSITION, _EVERY_POSITION = -1, 0

_CACHE_TYPES = {
    "tensor(float)": (np.float32, 1),
    "tensor(float16)": (np.float16, 10),
    "tensor(bfloat16)": (np.uint16, 16),
}
"""How numpy stores a type of the cache, and ONNX's number for it (``TensorProto.DataType``)."""


def _on_cpu(array: Any) -> Any:
    """An OrtValue that shares the memory of ``array``, which it keeps alive."""
    import onnxruntime as ort

    return ort.OrtValue.ortvalue_from_numpy(array)
