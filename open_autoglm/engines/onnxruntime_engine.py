"""ONNX Runtime on the CPU: fused graphs, weight-only quantisation, the KV cache updated in place."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from open_autoglm.engines.contract import ExportContext, Logits, Session, SessionOptions, Tokens
from open_autoglm.export.recipe import OnnxRecipe
from open_autoglm.schemas import Analysis, Candidate, Checkpoint, Device, ExportedModel, OptimizeSpec, Probe

_INSTALL = "pip install 'open-autoglm[cpu]'"
_MINIMUM = (1, 27)


class OnnxRuntimeEngine:
    """The default CPU engine."""

    name = "onnxruntime"
    summary = "ONNX Runtime, CPU provider: fp32, dynamic int8, 8- and 4-bit weights"

    def probe(self, device: Device) -> Probe:
        if device != "cpu":
            reason = "onnxruntime serves the CPU; on a GPU use onnxruntime-cuda"
            return Probe(engine=self.name, stage="no_device", reason=reason)
        found = _installed_version()
        if found is None:
            return Probe(
                engine=self.name, stage="missing", reason="onnxruntime is not installed", install=_INSTALL
            )
        if tuple(int(part) for part in found.split(".")[:2]) < _MINIMUM:
            reason = f"onnxruntime {found} is older than {_MINIMUM[0]}.{_MINIMUM[1]}"
            return Probe(engine=self.name, stage="installed", version=found, reason=reason, install=_INSTALL)
        return Probe(engine=self.name, stage="ready", version=found, reason="CPU execution provider")

    def propose(self, analysis: Analysis, spec: OptimizeSpec, device: Device) -> list[Candidate]:
        vnni = {"avx512_vnni", "avx_vnni"} & set(analysis.hardware.isa)
        int8_hope = "has VNNI, so int8 arithmetic is fast" if vnni else "has no VNNI: int8 may not pay"
        return [
            self._candidate("fp32", 32, "fused graph with in-place KV cache, exact arithmetic"),
            self._candidate(
                "int8", 8, f"int8 weights and activations; this CPU {int8_hope}", "dynamic-int8", dynamic=True
            ),
            self._candidate("int8", 8, "8-bit weights: decode reads a quarter of the fp32 bytes", "w8-b32"),
            self._candidate("int4", 4, "4-bit weights: decode reads an eighth of the fp32 bytes", "w4-b32"),
        ]

    def _candidate(
        self, precision: Any, bits: int, because: str, label: str = "fp32", *, dynamic: bool = False
    ) -> Candidate:
        knobs: dict[str, str | int | float | bool] = {"dynamic_int8": dynamic}
        weight_only = bits < 32 and not dynamic
        if weight_only:
            knobs |= {"block_size": 32, "accuracy_level": 4}
        return Candidate(
            id=f"onnxruntime-{label}",
            engine=self.name,
            device="cpu",
            precision=precision,
            weight_bits=bits + 1 if weight_only else bits,  # one fp32 scale per 32 weights
            knobs=knobs,
            proposed_because=because,
        )

    def recipe(self, candidate: Candidate) -> dict[str, Any]:
        from open_autoglm.export.routes import library_versions

        return {"onnx": _recipe_of(candidate).model_dump(), "versions": library_versions()}

    def export(self, candidate: Candidate, checkpoint: Checkpoint, context: ExportContext) -> str:
        from open_autoglm.export.routes import export_onnx

        return export_onnx(checkpoint, _recipe_of(candidate), context)

    def open(self, candidate: Candidate, exported: ExportedModel, options: SessionOptions) -> Session:
        return OnnxRuntimeSession(exported.path, options)


def _recipe_of(candidate: Candidate) -> OnnxRecipe:
    dynamic = bool(candidate.knobs["dynamic_int8"])
    if candidate.precision == "fp32" or dynamic:
        return OnnxRecipe(weight_bits=32, dynamic_int8=dynamic)
    return OnnxRecipe(
        weight_bits=8 if candidate.precision == "int8" else 4,
        block_size=int(candidate.knobs["block_size"]),
        accuracy_level=int(candidate.knobs["accuracy_level"]),
    )


def _installed_version() -> str | None:
    for package in ("onnxruntime", "onnxruntime-gpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


class OnnxRuntimeSession:
    """A decoder graph and its KV cache.

    Where the graph allows it (GroupQueryAttention), past and present are one pre-allocated buffer of
    ``float32[batch, kv_heads, max_tokens, head_dim]``, and the length of the attention mask says how much
    of it is valid. Otherwise past grows by concatenation.
    """

    def __init__(self, directory: Path, options: SessionOptions) -> None:
        from open_autoglm.export.graph import LAST, DecoderFacts

        self._facts = DecoderFacts.read(directory)
        self._shared_buffer = self._facts.kv_cache == "in_place"
        self._directory = directory
        self._options = options
        self._session = self._load(directory / LAST)
        self._past_names = [
            i.name for i in self._session.get_inputs() if i.name.startswith("past_key_values")
        ]
        self._present_names = [name.replace("past_key_values", "present") for name in self._past_names]
        self._cache: list[Any] = []
        self._rows = 0
        self._length = 0
        self._full: Any = None

    def _load(self, path: Path) -> Any:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = self._options.threads
        options.inter_op_num_threads = 1
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        session.disable_fallback()
        return session

    def prefill(self, tokens: Tokens) -> Logits:
        self._reset(len(tokens))
        return self._run(self._session, tokens)[:, -1]

    def decode(self, tokens: Tokens) -> Logits:
        return self._run(self._session, tokens[:, None])[:, -1]

    def full_logits(self, tokens: Tokens) -> Logits:
        from open_autoglm.export.graph import FULL

        if self._full is None:
            self._full = self._load(self._directory / FULL)
        self._reset(len(tokens))
        return self._run(self._full, tokens)

    def _reset(self, rows: int) -> None:
        import onnxruntime as ort

        if rows > self._options.batch_size:
            raise ValueError(f"batch of {rows} in a session opened for {self._options.batch_size}")
        self._length = 0
        if rows == self._rows and self._shared_buffer:
            return  # stale contents lie beyond the mask
        self._rows = rows
        length = self._options.max_tokens if self._shared_buffer else 0
        shape = (rows, self._facts.kv_heads, length, self._facts.head_dim)
        # An OrtValue made from an array shares its memory: every layer needs an array of its own.
        self._cache = [
            ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype=np.float32)) for _ in self._past_names
        ]

    def _run(self, session: Any, tokens: Tokens) -> Logits:
        length = self._length + tokens.shape[1]
        if length > self._options.max_tokens:
            raise ValueError(f"the cache holds {self._options.max_tokens} tokens, {length} were asked for")
        binding = session.io_binding()
        feeds = {
            "input_ids": np.ascontiguousarray(tokens, dtype=np.int64),
            "attention_mask": np.ones((len(tokens), length), dtype=np.int64),
            "position_ids": np.tile(np.arange(self._length, length, dtype=np.int64), (len(tokens), 1)),
        }
        for graph_input in session.get_inputs():
            if graph_input.name in feeds:
                binding.bind_cpu_input(graph_input.name, feeds[graph_input.name])
        for name, value in zip(self._past_names, self._cache, strict=True):
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("logits", "cpu")
        for name, value in zip(self._present_names, self._cache, strict=True):
            if self._shared_buffer:
                binding.bind_ortvalue_output(name, value)
            else:
                binding.bind_output(name, "cpu")
        session.run_with_iobinding(binding)
        logits, *present = binding.get_outputs()
        if not self._shared_buffer:
            self._cache = present
        self._length = length
        result: Logits = logits.numpy()
        return result

    def facts(self) -> dict[str, str]:
        import onnxruntime as ort

        return {
            "onnxruntime": ort.__version__,
            "providers": ",".join(self._session.get_providers()),
            "threads": str(self._options.threads),
            "kv_cache": self._facts.kv_cache,
        }

    def close(self) -> None:
        self._session = self._full = None
        self._cache = []
