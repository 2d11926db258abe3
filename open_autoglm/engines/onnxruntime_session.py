"""A decoder graph in ONNX Runtime with its KV cache, on the CPU or on a GPU."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
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
from open_autoglm.export.graph import FIRST_LOGITS, GRAPH, WRITE_INDICES, DecoderFacts
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


class OnnxRuntimeSession(ABC):
    """A decoder graph and its KV cache: a :class:`SlottedSession` where the graph updates that in place, else
    a :class:`GrowingSession`.

    The cache is on the session's device, of the type of the graph's inputs. Tokens come from the host and
    logits go there, so a call ends when the device is done. Raises WrongProvider, or what ONNX Runtime
    raises, where it cannot run on ``placement``.
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
        self._options = options
        self._knobs = {**SESSION_KNOBS, **knobs}
        self._session = self._load(directory / GRAPH)
        inputs = {value.name: value.type for value in self._session.get_inputs()}
        self._past_names = [name for name in inputs if name.startswith("past_key_values")]
        self._cache_type = _CACHE_TYPES[next((inputs[name] for name in self._past_names), "tensor(float)")]
        self._fed = [name for name in inputs if name not in self._past_names]
        self._present_names = [name.replace("past_key_values", "present") for name in self._past_names]
        self._vocab_size = int(self._session.get_outputs()[0].shape[-1])
        self._lengths = np.zeros(options.batch_size, dtype=np.int64)
        """Tokens that each row of the cache holds."""

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
        return self._run(range(len(tokens)), tokens, _LAST_POSITION)[:, -1]

    def decode(self, tokens: Tokens) -> Logits:
        return self._run(range(len(tokens)), tokens[:, None], _LAST_POSITION)[:, -1]

    def full_logits(self, tokens: Tokens) -> Logits:
        self._reset(len(tokens))
        return self._run(range(len(tokens)), tokens, _EVERY_POSITION)

    def extend(self, tokens: Tokens) -> Logits:
        return self._run(range(1), tokens, _EVERY_POSITION)

    def rewind(self, tokens: int) -> None:
        length = int(self._lengths[0])
        if not 0 <= tokens <= length:
            raise ValueError(f"{length} tokens were read, {tokens} cannot be forgotten")
        self._shorten(0, length - tokens)

    def _reset(self, rows: int) -> None:
        """Empty the cache for so many rows."""
        if rows > self._options.batch_size:
            raise ValueError(f"batch of {rows} in a session opened for {self._options.batch_size}")
        self._lengths[:] = 0

    def _shorten(self, row: int, length: int) -> None:
        self._lengths[row] = length

    @abstractmethod
    def _bound(self, rows: range) -> Any:
        """A binding that reads the cache of ``rows`` and knows where its next contents go."""

    def _run(self, rows: range, tokens: Tokens, first_logits: int, idle: Sequence[int] = ()) -> Logits:
        """Append ``int64[batch, n]`` to the cache of ``rows``, but for those that are ``idle``; logits of
        the positions from ``first_logits`` on."""
        added = tokens.shape[1]
        lengths = self._lengths[rows.start : rows.stop] + added
        room = self._options.max_tokens
        # What an idle row reads lies behind its last token, where the next one will overwrite it.
        lengths[list(idle)] = np.minimum(lengths[list(idle)], room)
        if lengths.max() > room:
            raise ValueError(f"the cache holds {room} tokens, {lengths.max()} were asked for")
        feeds = {
            "input_ids": np.ascontiguousarray(tokens, dtype=np.int64),
            "attention_mask": (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64),
            "position_ids": lengths[:, None] - np.arange(added, 0, -1),
            WRITE_INDICES: lengths - added,
            FIRST_LOGITS: np.array([first_logits]),
        }
        binding = self._bound(rows)
        for name in self._fed:
            binding.bind_cpu_input(name, feeds[name])
        given = 1 if first_logits == _LAST_POSITION and FIRST_LOGITS in self._fed else added
        logits: Logits = np.empty((len(rows), given, self._vocab_size), dtype=np.float32)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        if self._placement.device == "cuda":
            binding.synchronize_inputs()  # copies of what was bound may be queued in a stream of their own
        self._session.run_with_iobinding(binding)
        if self._placement.device == "cuda":
            binding.synchronize_outputs()
        lengths[list(idle)] = self._lengths[rows.start : rows.stop][list(idle)]
        self._lengths[rows.start : rows.stop] = lengths
        return logits

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
        self._session = None


class GrowingSession(OnnxRuntimeSession):
    """Past and present are tensors of their own: each call concatenates and leaves a longer cache."""

    def __init__(
        self,
        directory: Path,
        options: SessionOptions,
        knobs: Mapping[str, Knob] = SESSION_KNOBS,
        placement: Placement = ON_THE_CPU,
    ) -> None:
        super().__init__(directory, options, knobs, placement)
        self._binding = self._session.io_binding()
        self._cache: list[Any] = []

    def _reset(self, rows: int) -> None:
        super()._reset(rows)
        shape = (rows, self._facts.kv_heads, 0, self._facts.head_dim)
        self._cache = [self._zeros(shape) for _ in self._past_names]

    def _shorten(self, row: int, length: int) -> None:
        super()._shorten(row, length)
        self._cache = [self._shortened(value, length) for value in self._cache]

    def _shortened(self, value: Any, length: int) -> Any:
        import onnxruntime as ort

        kept = np.ascontiguousarray(value.numpy()[:, :, :length])
        return ort.OrtValue.ortvalue_from_numpy(kept, self._placement.device)

    def _bound(self, rows: range) -> Any:
        for past, present, value in zip(self._past_names, self._present_names, self._cache, strict=True):
            self._binding.bind_ortvalue_input(past, value)
            self._binding.bind_output(present, self._placement.device)
        return self._binding

    def _run(self, rows: range, tokens: Tokens, first_logits: int, idle: Sequence[int] = ()) -> Logits:
        logits = super()._run(rows, tokens, first_logits, idle)
        self._cache = self._binding.get_outputs()[: len(self._cache)]
        return logits

    def close(self) -> None:
        super().close()
        self._binding, self._cache = None, []


class SlottedSession(OnnxRuntimeSession):
    """Past and present are one buffer, ``[batch, kv_heads, max_tokens, head_dim]`` a layer: as
    GroupQueryAttention has it, which reads from the attention mask how much of each row is valid, and
    TensorScatter, which is told where to write.

    So every row is a slot, with a sequence of its own. GroupQueryAttention appends several tokens to a past
    for one row only: prompts are read slot by slot, which costs nothing where one keeps all cores busy.
    """

    def __init__(
        self,
        directory: Path,
        options: SessionOptions,
        knobs: Mapping[str, Knob] = SESSION_KNOBS,
        placement: Placement = ON_THE_CPU,
    ) -> None:
        super().__init__(directory, options, knobs, placement)
        shape = (options.batch_size, self._facts.kv_heads, options.max_tokens, self._facts.head_dim)
        self._cache = [self._zeros(shape) for _ in self._past_names]
        self._bindings: dict[range, Any] = {}

    def append(self, slot: int, tokens: Tokens, *, every: bool = False) -> Logits:
        first_logits = _EVERY_POSITION if every else _LAST_POSITION
        logits: Logits = self._run(range(slot, slot + 1), tokens[None], first_logits)[0]
        return logits

    def advance(self, slots: Sequence[int], tokens: Tokens) -> Logits:
        rows = range(min(slots), max(slots) + 1)
        places = [slot - rows.start for slot in slots]
        spread = np.zeros((len(rows), 1), dtype=np.int64)
        spread[places, 0] = tokens
        idle = [place for place in range(len(rows)) if place not in places]
        logits: Logits = self._run(rows, spread, _LAST_POSITION, idle)[places, -1]
        return logits

    def truncate(self, slot: int, length: int) -> None:
        if not 0 <= length <= self._lengths[slot]:
            raise ValueError(f"slot {slot} holds {self._lengths[slot]} tokens, not {length}")
        self._shorten(slot, length)

    def _bound(self, rows: range) -> Any:
        """Bound once and kept: 6 % of a token of a small model went into binding the cache anew."""
        if rows not in self._bindings:
            self._bindings[rows] = self._bind(rows)
        return self._bindings[rows]

    def _bind(self, rows: range) -> Any:
        binding = self._session.io_binding()
        _, onnx_type = self._cache_type
        for past, present, value in zip(self._past_names, self._present_names, self._cache, strict=True):
            slots, *sizes = value.shape()
            start = value.data_ptr() + value.tensor_size_in_bytes() // slots * rows.start
            place = (self._placement.device, 0, onnx_type, [len(rows), *sizes], start)
            binding.bind_input(past, *place)
            binding.bind_output(present, *place)
        return binding

    def close(self) -> None:
        super().close()
        self._bindings, self._cache = {}, []


def open_session(
    directory: Path,
    options: SessionOptions,
    knobs: Mapping[str, Knob] = SESSION_KNOBS,
    placement: Placement = ON_THE_CPU,
) -> OnnxRuntimeSession:
    """The session that fits the graph in ``directory``."""
    kind = SlottedSession if DecoderFacts.read(directory).kv_cache == "in_place" else GrowingSession
    return kind(directory, options, knobs, placement)


_LAST_POSITION, _EVERY_POSITION = -1, 0

_CACHE_TYPES = {
    "tensor(float)": (np.float32, 1),
    "tensor(float16)": (np.float16, 10),
    "tensor(bfloat16)": (np.uint16, 16),
}
"""How numpy stores a type of the cache, and ONNX's number for it (``TensorProto.DataType``)."""
