"""llama.cpp on the CPU: weights in blocks from a GGUF, a KV cache in 16 or 8 bits.

Sessions use the C interface as llama-cpp-python declares it, not its high-level class: that one samples,
keeps a prompt cache and hides what a measurement must control.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from open_autoglm.engines.contract import (
    ALL_THREADS,
    DRAFT_TOKENS,
    NO_DRAFTS,
    ExportContext,
    Logits,
    Session,
    SessionOptions,
    Tokens,
    because_of,
    dimensions_around,
    draft_dimensions,
    thread_dimension,
    threads_of,
)
from open_autoglm.schemas import (
    Analysis,
    Candidate,
    Checkpoint,
    Device,
    Dimension,
    ExportedModel,
    Knob,
    ModelProfile,
    OptimizeSpec,
    Precision,
    Probe,
)

_PACKAGE = "llama-cpp-python"
_INSTALL = "pip install 'open-autoglm[llamacpp]'"
_COMPILES = "pip compiles it in about five minutes, with a C++ compiler and cmake"
_MINIMUM = (0, 3, 36)
"""The C structures of this interface change between releases; this one's are used here."""

_PAD = 256
"""llama.cpp rounds the tokens of a sequence up to a multiple of this."""


class _FileType(NamedTuple):
    precision: Precision
    bits: float
    """Per weight of a linear layer, scales included."""


_FILE_TYPES: Mapping[str, _FileType] = MappingProxyType(
    {
        "F16": _FileType("fp16", 16),
        "BF16": _FileType("bf16", 16),
        "Q8_0": _FileType("int8", 8.5),  # 32 weights and a 16-bit scale in 34 bytes
        "Q4_0": _FileType("int4", 4.5),  # in 18 bytes
        "Q4_1": _FileType("int4", 5),  # with a minimum too
        "IQ4_NL": _FileType("int4", 4.5),  # levels that are not evenly spaced
        "Q4_K_M": _FileType("int4", 4.5),  # blocks of 256 weights
    }
)
"""By llama.cpp's names. The head of a 4-bit file, and a part of the matrices in Q4_K_M, have more bits."""

_K_BLOCK, _Q8_BLOCK = 256, 32
"""Numbers that share a scale: a row is a multiple, or llama.cpp takes another type."""


class _Attention(NamedTuple):
    flash: bool
    cache: str
    """The type of keys and values, by ggml's name."""


_ATTENTIONS: Mapping[str, _Attention] = MappingProxyType(
    {
        "flash": _Attention(flash=True, cache="F16"),
        "flash-q8": _Attention(flash=True, cache="Q8_0"),
        "plain": _Attention(flash=False, cache="F16"),
        "exact": _Attention(flash=False, cache="F32"),
    }
)
"""Kernel and cache in one knob, since only the fused kernel reads values in 8 bits. "exact" is for comparing
with torch: the fused kernel rounds to fp16 on the way, whatever the cache."""

SESSION_KNOBS: Mapping[str, Knob] = MappingProxyType(
    {"threads": ALL_THREADS, "attention": "flash", "ubatch": 512, "mmap": True}
)
"""What only the session heeds, at llama.cpp's own defaults: no such knob changes an exported file."""


class LlamaCppEngine:
    """An optional CPU engine: its package has no wheels and compiles for this very CPU."""

    name = "llamacpp"
    summary = "llama.cpp: 16-, 8- and 4-bit GGUF weights; compiled on installation"

    def probe(self, device: Device) -> Probe:
        if device != "cpu":
            return Probe(engine=self.name, stage="no_device", reason="llamacpp serves the CPU")
        try:
            found = version(_PACKAGE)
        except PackageNotFoundError:
            reason = f"{_PACKAGE} is not installed; {_COMPILES}"
            return Probe(engine=self.name, stage="missing", reason=reason, install=_INSTALL)
        if tuple(int(part) for part in found.split(".")[:3]) < _MINIMUM:
            reason = f"{_PACKAGE} {found} is older than {'.'.join(map(str, _MINIMUM))}; {_COMPILES}"
            return Probe(engine=self.name, stage="installed", version=found, reason=reason, install=_INSTALL)
        return Probe(engine=self.name, stage="ready", version=found, reason="CPU backend")

    def propose(self, analysis: Analysis, spec: OptimizeSpec, device: Device) -> list[Candidate]:
        from open_autoglm.export.gguf_writer import supports

        native = not {"avx512_bf16", "amx_bf16"}.isdisjoint(analysis.hardware.isa)
        sixteen = "this CPU computes bf16 natively" if native else "converted on the way to fp32 arithmetic"
        proposed = [
            _candidate(file_type, {**SESSION_KNOBS, **NO_DRAFTS}, because)
            for file_type, because in (
                ("BF16" if native else "F16", f"half the bytes of fp32; {sixteen}"),
                ("Q8_0", "8-bit weights with a scale for 32: decode reads little over a quarter of fp32"),
                ("Q4_0", "4-bit weights under a finer head: decode reads about a seventh of fp32"),
            )
        ]
        reason = supports(analysis.profile)
        return proposed if reason is None else [candidate.vetoed(reason) for candidate in proposed]

    def dimensions(
        self, candidate: Candidate, analysis: Analysis, spec: OptimizeSpec
    ) -> tuple[Dimension, ...]:
        """The block format for 4-bit candidates; threads and attention for all; memory where it counts."""
        memory_counts = spec.objective == "memory" or spec.max_memory is not None
        space = [
            *([_blocks(analysis.profile)] if candidate.precision == "int4" else ()),
            thread_dimension(analysis.hardware),
            _attention(analysis.profile),
            *draft_dimensions(spec),
            *(_MEMORY_DIMENSIONS if memory_counts else ()),
        ]
        return dimensions_around(candidate, space)

    def variant(self, candidate: Candidate, knobs: Mapping[str, Knob]) -> Candidate:
        turned = {**candidate.knobs, **knobs}
        return _candidate(str(turned["file_type"]), turned, because_of(candidate, knobs))

    def recipe(self, candidate: Candidate) -> dict[str, Any]:
        from open_autoglm.export.gguf_quantize import library_versions

        return {"file_type": candidate.knobs["file_type"], "versions": library_versions()}

    def export(self, candidate: Candidate, checkpoint: Checkpoint, context: ExportContext) -> str:
        from open_autoglm.export.gguf_quantize import export_gguf

        return export_gguf(checkpoint, str(candidate.knobs["file_type"]), context.output)

    def open(self, candidate: Candidate, exported: ExportedModel, options: SessionOptions) -> Session:
        from open_autoglm.export.gguf_quantize import MODEL

        options = options.model_copy(update={"threads": threads_of(candidate, options)})
        return LlamaCppSession(exported.path / MODEL, options, candidate.knobs)


# ── configurations ───────────────────────────────────────────────────────────────────────────────

_MEMORY_DIMENSIONS = (
    Dimension(
        knob="ubatch",
        values=(512, 128),
        because="a prompt read in smaller parts needs less room and reads the weights more often",
    ),
    Dimension(
        knob="mmap",
        values=(True, False),
        because="a mapped file loads at once, but 4-bit weights are then in memory twice while rearranged",
    ),
)


def _blocks(profile: ModelProfile) -> Dimension:
    k_blocks = ("Q4_K_M",) if profile.hidden_size % _K_BLOCK == 0 else ()
    return Dimension(
        knob="file_type",
        values=("Q4_0", "Q4_1", "IQ4_NL", *k_blocks),
        because="a block format that follows the weights closer has more to compute or to read",
    )


def _attention(profile: ModelProfile) -> Dimension:
    q8 = ("flash-q8",) if profile.head_dim % _Q8_BLOCK == 0 else ()
    return Dimension(
        knob="attention",
        values=("flash", *q8, "plain"),
        because="the fused kernel needs no matrix of scores, and reads a cache in 8 bits, which is half",
    )


def _candidate(file_type: str, knobs: Mapping[str, Knob], because: str) -> Candidate:
    """The candidate of one configuration, from which alone its id follows."""
    precision, bits = _FILE_TYPES[file_type]
    return Candidate(
        id=_id(file_type, knobs),
        engine="llamacpp",
        device="cpu",
        precision=precision,
        weight_bits=bits,
        knobs={"file_type": file_type, **knobs},
        proposed_because=because,
    )


def _id(file_type: str, knobs: Mapping[str, Knob]) -> str:
    """What the file is, then what the session does otherwise than by default."""
    parts = ["llamacpp", file_type.lower().replace("_", "-")]
    if knobs["threads"] != ALL_THREADS:
        parts.append(f"t{knobs['threads']}")
    if knobs["attention"] != "flash":
        parts.append(str(knobs["attention"]))
    if knobs["ubatch"] != SESSION_KNOBS["ubatch"]:
        parts.append(f"u{knobs['ubatch']}")
    if not knobs["mmap"]:
        parts.append("nommap")
    if knobs[DRAFT_TOKENS]:
        parts.append(f"draft{knobs[DRAFT_TOKENS]}")
    return "-".join(parts)


class LlamaCppSession:
    """A GGUF and one context: each row of the batch is a sequence with its own KV cache.

    llama.cpp rounds the room of a sequence up, so the limit of ``max_tokens`` is kept here.
    """

    def __init__(
        self, path: Path, options: SessionOptions, knobs: Mapping[str, Knob] = SESSION_KNOBS
    ) -> None:
        from open_autoglm.export.llamacpp_library import llama_cpp

        self._library = llama_cpp()
        self._lib = self._library.c
        self._options = options
        self._knobs = {**SESSION_KNOBS, **knobs}
        self._attention = _ATTENTIONS[str(self._knobs["attention"])]
        self._model = self._load(path)
        self._context = self._lib.llama_init_from_model(self._model, self._context_parameters())
        if not self._context:
            raise self._library.why("llama.cpp made no context for the model")
        self._vocab_size = self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._model))
        self._length = 0

    def _load(self, path: Path) -> Any:
        parameters = self._lib.llama_model_default_params()
        parameters.n_gpu_layers = 0
        parameters.load_mode = (
            self._lib.LLAMA_LOAD_MODE_MMAP if self._knobs["mmap"] else self._lib.LLAMA_LOAD_MODE_NONE
        )
        model = self._lib.llama_model_load_from_file(str(path).encode(), parameters)
        if not model:
            raise self._library.why(f"llama.cpp could not load {path.name}")
        return model

    def _context_parameters(self) -> Any:
        rows, tokens = self._options.batch_size, self._options.max_tokens
        parameters = self._lib.llama_context_default_params()
        parameters.n_seq_max = rows
        parameters.n_ctx = rows * (-(-tokens // _PAD) * _PAD)
        parameters.n_batch = rows * tokens
        parameters.n_ubatch = min(int(self._knobs["ubatch"]), rows * tokens)
        parameters.n_threads = parameters.n_threads_batch = self._options.threads
        parameters.type_k = parameters.type_v = getattr(self._lib, f"GGML_TYPE_{self._attention.cache}")
        flash = "ENABLED" if self._attention.flash else "DISABLED"
        parameters.flash_attn_type = getattr(self._lib, f"LLAMA_FLASH_ATTN_TYPE_{flash}")
        parameters.offload_kqv = parameters.op_offload = False
        parameters.kv_unified = False
        parameters.no_perf = True
        return parameters

    def prefill(self, tokens: Tokens) -> Logits:
        self._reset(len(tokens))
        return self._run(tokens, every=False)[:, -1]

    def decode(self, tokens: Tokens) -> Logits:
        return self._run(tokens[:, None], every=False)[:, -1]

    def full_logits(self, tokens: Tokens) -> Logits:
        self._reset(len(tokens))
        return self._run(tokens, every=True)

    def extend(self, tokens: Tokens) -> Logits:
        return self._run(tokens, every=True)

    def rewind(self, tokens: int) -> None:
        if not 0 <= tokens <= self._length:
            raise ValueError(f"{self._length} tokens were read, {tokens} cannot be forgotten")
        self._length -= tokens
        self._lib.llama_memory_seq_rm(self._lib.llama_get_memory(self._context), 0, self._length, -1)

    def _reset(self, rows: int) -> None:
        if rows > self._options.batch_size:
            raise ValueError(f"batch of {rows} in a session opened for {self._options.batch_size}")
        # What stays in the buffers is of no sequence, so nothing attends to it.
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), False)
        self._length = 0

    def _run(self, tokens: Tokens, *, every: bool) -> Logits:
        """Logits of each row's last position, or of every one: ``float32[batch, positions, vocab]``."""
        rows, added = tokens.shape
        length = self._length + added
        if length > self._options.max_tokens:
            raise ValueError(f"the cache holds {self._options.max_tokens} tokens, {length} were asked for")
        asked = np.ones((rows, added), np.int8)
        if not every:
            asked[:, :-1] = 0
        status = self._decode(tokens, asked)
        if status != 0:
            raise self._library.why(f"llama_decode returned {status}")
        self._length = length
        found = [self._logits(index) for index in np.flatnonzero(asked).tolist()]
        return np.stack(found).reshape(rows, -1, self._vocab_size)

    def _decode(self, tokens: Tokens, asked: np.typing.NDArray[np.int8]) -> int:
        """Let llama.cpp read ``tokens``, one sequence per row, and say how it went."""
        rows, added = tokens.shape
        count = tokens.size
        ids = np.ascontiguousarray(tokens, np.int32)
        positions = np.tile(np.arange(self._length, self._length + added, dtype=np.int32), rows)
        sequences = np.repeat(np.arange(rows, dtype=np.int32), added)
        pointers = sequences.ctypes.data + sequences.itemsize * np.arange(count, dtype=np.uintp)
        one_each = np.ones(count, np.int32)
        int_p = ctypes.POINTER(ctypes.c_int32)
        batch = self._lib.llama_batch(
            n_tokens=count,
            token=ids.ctypes.data_as(int_p),
            pos=positions.ctypes.data_as(int_p),
            n_seq_id=one_each.ctypes.data_as(int_p),
            seq_id=pointers.ctypes.data_as(ctypes.POINTER(int_p)),
            logits=asked.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )
        return int(self._lib.llama_decode(self._context, batch))

    def _logits(self, index: int) -> Logits:
        """A view of the logits of the token at ``index`` of the last batch; the next call writes over it."""
        return np.ctypeslib.as_array(
            self._lib.llama_get_logits_ith(self._context, index), (self._vocab_size,)
        )

    def facts(self) -> dict[str, str]:
        lib = self._lib
        return {
            "llama-cpp-python": lib.__version__,
            "llama.cpp": lib.llama_version().decode(),
            "system": lib.llama_print_system_info().decode().strip(),
            "file_type": lib.llama_ftype_name(lib.llama_model_ftype(self._model)).decode(),
            "threads": str(lib.llama_n_threads(self._context)),
            "ubatch": str(lib.llama_n_ubatch(self._context)),
            "kv_cache": self._attention.cache.lower(),
            "flash_attention": "on" if self._attention.flash else "off",
            "weights": "mapped" if self._knobs["mmap"] else "read",
        }

    def close(self) -> None:
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)
        self._context = self._model = None
