"""PyTorch through transformers: the fp32 reference, the baselines a person would tune by hand, and 8- and
4-bit weights by torchao."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np

from open_autoglm.engines.contract import (
    ALL_THREADS,
    ExportContext,
    Logits,
    Session,
    SessionOptions,
    Tokens,
    because_of,
    dimensions_around,
    thread_dimension,
    threads_of,
)
from open_autoglm.engines.torch_weights import GROUP_SIZES, missing_torchao, round_linears
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

_BITS: dict[Precision, int] = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4}


class TorchEngine:
    """Loads the checkpoint itself; nothing is exported."""

    name = "torch"
    summary = "PyTorch eager and torch.compile: fp32 (the reference), bf16, 8- and 4-bit weights"

    def probe(self, device: Device) -> Probe:
        if device == "gpu":
            from open_autoglm.engines.nvidia import probe_nvidia

            return probe_nvidia("torch")
        return Probe(engine=self.name, stage="ready", version=version("torch"), reason="CPU")

    def propose(self, analysis: Analysis, spec: OptimizeSpec, device: Device) -> list[Candidate]:
        native = {"avx512_bf16", "amx_bf16"} & set(analysis.hardware.isa)
        bf16_hope = "this CPU computes bf16 natively" if native else "this CPU has no bf16 arithmetic"
        if device == "gpu":
            bf16_hope = "the GPU computes bf16 natively"
        eager: dict[str, Knob] = {"compile": False, "threads": ALL_THREADS}
        reference = _candidate(device, "fp32", eager, "the reference that every other candidate is judged by")
        plain = _candidate(device, "bf16", eager, f"half the bytes of fp32; {bf16_hope}")
        by_hand = "what a careful person tunes by hand: static cache and torch.compile"
        compiled = _candidate(device, "bf16", {**eager, "compile": True}, by_hand)
        if (missing := _missing_compiler()) is not None:
            compiled = compiled.vetoed(missing)
        found = [
            reference.model_copy(update={"reference": True}),
            plain,
            compiled.model_copy(update={"baseline": True}),
        ]
        return found if device == "gpu" else [*found, *_rounded(analysis.profile)]

    def dimensions(
        self, candidate: Candidate, analysis: Analysis, spec: OptimizeSpec
    ) -> tuple[Dimension, ...]:
        """None for the reference and the baseline, which are yardsticks, and none on a GPU."""
        if candidate.reference or candidate.baseline or candidate.device == "gpu":
            return ()
        space = [thread_dimension(analysis.hardware)]
        if candidate.precision == "int4":
            space.insert(0, _group_dimension(analysis.profile))
        return dimensions_around(candidate, space)

    def variant(self, candidate: Candidate, knobs: Mapping[str, Knob]) -> Candidate:
        because = because_of(candidate, knobs)
        return _candidate(candidate.device, candidate.precision, {**candidate.knobs, **knobs}, because)

    def recipe(self, candidate: Candidate) -> None:
        return None

    def export(self, candidate: Candidate, checkpoint: Checkpoint, context: ExportContext) -> str:
        raise AssertionError("torch loads the checkpoint itself")  # recipe() is None

    def open(self, candidate: Candidate, exported: ExportedModel, options: SessionOptions) -> Session:
        return TorchSession(candidate, exported, options)


def _rounded(profile: ModelProfile) -> list[Candidate]:
    """Rounded weights, compiled only: run eagerly, torchao's int8 layers widen all weights in every call."""
    knobs: dict[str, Knob] = {"compile": True, "threads": ALL_THREADS}
    groups: dict[str, Knob] = {**knobs, "group_size": GROUP_SIZES[0]}
    int8 = _candidate("cpu", "int8", knobs, "8-bit weights: decode reads half of bf16's bytes")
    int4 = _candidate("cpu", "int4", groups, "4-bit weights: decode reads a third of bf16's bytes")
    if not _group_dimension(profile).values:
        int4 = int4.vetoed(f"its layers' inputs are no multiples of {GROUP_SIZES[0]}, the smallest group")
    missing = missing_torchao() or _missing_compiler()
    return [int8, int4] if missing is None else [int8.vetoed(missing), int4.vetoed(missing)]


def _group_dimension(profile: ModelProfile) -> Dimension:
    """Groups into which the inputs of every linear layer can be divided."""
    heads_width = profile.attention_heads * (profile.value_head_dim or profile.head_dim)
    inputs = (profile.hidden_size, profile.intermediate_size, heads_width)
    return Dimension(
        knob="group_size",
        values=tuple(size for size in GROUP_SIZES if all(width % size == 0 for width in inputs)),
        because="smaller groups follow the weights closer and have more scales to read",
    )


def _candidate(device: Device, precision: Precision, knobs: Mapping[str, Knob], because: str) -> Candidate:
    """The candidate of one configuration, from which alone its id follows."""
    parts = ["torch-cuda" if device == "gpu" else "torch", precision]
    bits = float(_BITS[precision])
    if precision == "int4":
        group_size = int(knobs["group_size"])
        bits += 32 / group_size  # a scale and a zero per group, in bf16
        parts += [f"g{group_size}"] if group_size != GROUP_SIZES[0] else []
    if knobs["compile"]:
        parts.append("compile")
    if knobs["threads"] != ALL_THREADS:
        parts.append(f"t{knobs['threads']}")
    return Candidate(
        id="-".join(parts),
        engine="torch",
        device=device,
        precision=precision,
        weight_bits=bits,
        knobs=dict(knobs),
        proposed_because=because,
    )


def _missing_compiler() -> str | None:
    wanted = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    if any(shutil.which(compiler) for compiler in wanted):
        return None
    return f"torch.compile needs a C++ compiler and there is no {' or '.join(wanted)}: apt-get install g++"


class TorchSession:
    """A transformers model with a KV cache: static and compiled, or growing and eager."""

    def __init__(self, candidate: Candidate, exported: ExportedModel, options: SessionOptions) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._threads = threads_of(candidate, options)
        torch.set_num_threads(self._threads)
        self._torch = torch
        self._device = "cuda" if candidate.device == "gpu" else "cpu"
        self._compiled = bool(candidate.knobs["compile"])
        self._options = options
        model, loading = AutoModelForCausalLM.from_pretrained(
            exported.path,
            dtype=torch.float32 if candidate.precision == "fp32" else torch.bfloat16,
            trust_remote_code=bool(exported.details.get("trust_remote_code", False)),
            output_loading_info=True,
        )
        if loading["missing_keys"]:
            # transformers only warns and fills them with random numbers.
            raise RuntimeError(f"the checkpoint has no weights for {sorted(loading['missing_keys'])[:5]}")
        self._model = model.to(self._device).eval()
        self._rounded = ""
        if candidate.precision in ("int8", "int4"):
            self._rounded = round_linears(
                self._model, candidate.precision, int(candidate.knobs.get("group_size", 0))
            )
        if self._compiled:
            # The decoder without the head, so that quality and timing run the very same kernels; one graph
            # for the prompt's shape and one for a single token.
            self._model.get_decoder().compile(dynamic=False)
            if self._rounded:
                # By itself, or it would widen its weights for every token.
                self._model.get_output_embeddings().compile(dynamic=False)
        self._cache: Any = None
        self._cache_rows = 0
        self._length = 0

    def prefill(self, tokens: Tokens) -> Logits:
        self._reset(len(tokens))
        return self._forward(tokens, keep=1)[:, -1]

    def decode(self, tokens: Tokens) -> Logits:
        return self._forward(tokens[:, None], keep=1)[:, -1]

    def full_logits(self, tokens: Tokens) -> Logits:
        self._reset(len(tokens))
        return self._forward(tokens, keep=0)

    def _reset(self, rows: int) -> None:
        from transformers.cache_utils import DynamicCache, StaticCache

        if rows > self._options.batch_size:
            raise ValueError(f"batch of {rows} in a session opened for {self._options.batch_size}")
        self._length = 0
        if not self._compiled:
            self._cache = DynamicCache(config=self._model.config)
        elif self._cache_rows == rows:
            self._cache.reset()
        else:
            self._cache = StaticCache(config=self._model.config, max_cache_len=self._options.max_tokens)
            self._cache_rows = rows
            self._allocate_cache(rows)

    def _allocate_cache(self, rows: int) -> None:
        """Let one eager token allocate the cache, or the first prompt would compile a graph of its own."""
        torch = self._torch
        token = torch.zeros((rows, 1), dtype=torch.long, device=self._device)
        with torch.no_grad():
            self._model.get_decoder().forward(
                input_ids=token, position_ids=token, past_key_values=self._cache, use_cache=True
            )
        self._cache.reset()

    def _forward(self, tokens: Tokens, *, keep: int) -> Logits:
        """Logits of the last ``keep`` positions, or of all for 0."""
        torch = self._torch
        length = self._length + tokens.shape[1]
        if length > self._options.max_tokens:
            raise ValueError(f"the cache holds {self._options.max_tokens} tokens, {length} were asked for")
        positions = torch.arange(self._length, length, device=self._device)
        # Not inference_mode: a compiled graph may not update a cache that was made outside of it.
        with torch.no_grad():
            output = self._model(
                input_ids=torch.from_numpy(np.ascontiguousarray(tokens)).to(self._device),
                position_ids=positions[None].expand(len(tokens), -1),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=keep,
            )
            logits: Logits = output.logits.float().cpu().numpy()
        self._length = length
        return logits

    def facts(self) -> dict[str, str]:
        facts = {
            "torch": self._torch.__version__,
            "device": self._device,
            "threads": str(self._threads),
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "kv_cache": "static" if self._compiled else "growing",
            "attention": str(self._model.config._attn_implementation),
        }
        return {**facts, "rounded": self._rounded} if self._rounded else facts

    def close(self) -> None:
        self._cache = None
        del self._model
