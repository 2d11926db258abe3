"""Other people's runtimes, each driven through the interface its own documentation shows first.

Every class reads one prompt of token ids and calls ``told`` whenever a new token is known: that is all
that interfaces which keep the loop to themselves have in common. Each is imported only in a child of its
own. ``prepare`` writes what the runtime loads, where it does not load the checkpoint or an export of ours.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from pydantic import Field

from open_autoglm import engines
from open_autoglm.engines.contract import SessionOptions, Tokens, draft_tokens_of, threads_of
from open_autoglm.generation import greedy
from open_autoglm.schemas import Candidate, Checkpoint, ExportedModel, Model

Told = Callable[[], None]


class Source(Model):
    """What a runtime is given."""

    checkpoint: Checkpoint
    candidate: Candidate = Field(description="our candidate on the same weights, or the contestant itself")
    exported: ExportedModel = Field(description="its files")
    options: SessionOptions
    prepared: Path = Field(description="where `prepare` wrote")


class Runtime(Protocol):
    """A loaded model."""

    def generate(self, prompt: Tokens, count: int, told: Told) -> list[int]:
        """Greedily continue ``int64[n]`` by ``count`` tokens, end of sequence or not."""
        ...

    def facts(self) -> dict[str, str]:
        """Versions and settings."""
        ...


# ── ours ─────────────────────────────────────────────────────────────────────────────────────────


class ContractRuntime:
    """A candidate of ours behind the engine contract, driven as a server drives it."""

    def __init__(self, source: Source) -> None:
        engine = engines.get(source.candidate.engine)
        self._session = engine.open(source.candidate, source.exported, source.options)
        self._threads = threads_of(source.candidate, source.options)
        self._draft_tokens = draft_tokens_of(source.candidate)

    def generate(self, prompt: Tokens, count: int, told: Told) -> list[int]:
        tokens: list[int] = []
        for step in greedy(self._session, prompt[None], count, self._draft_tokens):
            for token in step.tokens[0].tolist():
                told()
                tokens.append(token)
        return tokens

    def facts(self) -> dict[str, str]:
        return {"threads": str(self._threads), **self._session.facts()}


# ── transformers ─────────────────────────────────────────────────────────────────────────────────


class TransformersRuntime:
    """``generate`` as it comes, in fp32."""

    dtype = "float32"

    def __init__(self, source: Source) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(source.options.threads)
        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(
            source.checkpoint.path,
            dtype=getattr(torch, self.dtype),
            trust_remote_code=source.checkpoint.trust_remote_code,
        ).eval()
        # Nothing ends a sequence early, and no end is suppressed either: greedy tokens as they come.
        self._model.generation_config.eos_token_id = None
        self._settings: dict[str, Any] = {"do_sample": False}

    def generate(self, prompt: Tokens, count: int, told: Told) -> list[int]:
        ids = self._torch.from_numpy(np.ascontiguousarray(prompt[None]))
        with self._torch.no_grad():
            output = self._model.generate(
                ids,
                attention_mask=self._torch.ones_like(ids),
                max_new_tokens=count,
                streamer=_AfterPrompt(told),
                **self._settings,
            )
        return [int(token) for token in output[0, len(prompt) :]]

    def facts(self) -> dict[str, str]:
        return {
            "transformers": version("transformers"),
            "torch": self._torch.__version__,
            "threads": str(self._torch.get_num_threads()),
            "dtype": str(self._model.dtype).removeprefix("torch."),
        }


class CompiledTransformersRuntime(TransformersRuntime):
    """What a careful person tunes by hand: bf16, a static cache, and the forward pass compiled, as the
    transformers guide to optimising inference shows; one graph for the prompt, one for a token."""

    dtype = "bfloat16"

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self._model.forward = self._torch.compile(self._model.forward, dynamic=False)
        self._settings["cache_implementation"] = "static"


class _AfterPrompt:
    """A transformers streamer: it is first handed the prompt, then each new token."""

    def __init__(self, told: Told) -> None:
        self._told, self._seen_prompt = told, False

    def put(self, _value: object) -> None:
        if self._seen_prompt:
            self._told()
        self._seen_prompt = True

    def end(self) -> None:
        """Nothing is buffered."""


# ── llama.cpp ────────────────────────────────────────────────────────────────────────────────────


class LlamaCppRuntime:
    """llama-cpp-python's class ``Llama`` on the GGUF that our exporter wrote."""

    def __init__(self, source: Source) -> None:
        import llama_cpp

        from open_autoglm.export.gguf_quantize import MODEL

        self._llama = llama_cpp.Llama(
            str(source.exported.path / MODEL),
            n_ctx=source.options.max_tokens,
            n_threads=source.options.threads,
            n_threads_batch=source.options.threads,
            flash_attn=True,  # llama.cpp's own default where the backend has it; the Python class says no
            verbose=False,
        )

    def generate(self, prompt: Tokens, count: int, told: Told) -> list[int]:
        tokens: list[int] = []
        for token in self._llama.generate(prompt.tolist(), temp=0.0):
            told()
            tokens.append(int(token))
            if len(tokens) == count:
                break
        return tokens

    def facts(self) -> dict[str, str]:
        return {
            "llama-cpp-python": version("llama-cpp-python"),
            "threads": str(self._llama.n_threads),
            "file_type": str(self._llama.metadata.get("general.file_type", "not told")),
        }


# ── OpenVINO GenAI ───────────────────────────────────────────────────────────────────────────────


def prepare_openvino_genai(source: Source) -> None:
    """Our graph, by the names the pipeline looks for, with an input for the mask it hands over (nothing
    reads it: a single prompt has no padding), and the tokenizer it insists on.

    The paged backend refuses this graph, so the pipeline takes its stateful one, as it does by itself.
    """
    import openvino as ov
    import openvino.opset13 as ops
    import openvino_tokenizers
    from transformers import AutoTokenizer

    from open_autoglm.export.openvino_graph import GRAPH

    model = ov.Core().read_model(source.exported.path / GRAPH)
    mask = ops.parameter([-1, -1], ov.Type.i64, "attention_mask")
    mask.output(0).set_names({"attention_mask"})
    model.add_parameters([mask])
    ov.save_model(model, source.prepared / "openvino_model.xml", compress_to_fp16=False)
    tokenizer = AutoTokenizer.from_pretrained(source.checkpoint.path, local_files_only=True)
    pair = openvino_tokenizers.convert_tokenizer(tokenizer, with_detokenizer=True)
    for name, graph in zip(("tokenizer", "detokenizer"), pair, strict=True):
        ov.save_model(graph, source.prepared / f"openvino_{name}.xml")


class OpenVinoGenAiRuntime:
    """``LLMPipeline`` with its own settings, told only how many threads it has."""

    def __init__(self, source: Source) -> None:
        import openvino_genai

        self._threads = source.options.threads
        self._pipeline = openvino_genai.LLMPipeline(
            str(source.prepared), "CPU", INFERENCE_NUM_THREADS=self._threads
        )

    def generate(self, prompt: Tokens, count: int, told: Told) -> list[int]:
        import openvino as ov
        import openvino_genai as genai

        class Streamer(genai.StreamerBase):  # type: ignore[misc]
            def write(self, token: int | list[int]) -> Any:
                for _ in [token] if isinstance(token, int) else token:
                    told()
                return genai.StreamingStatus.RUNNING

            def end(self) -> None:
                """Nothing is buffered."""

        config = genai.GenerationConfig()
        config.max_new_tokens, config.do_sample, config.ignore_eos = count, False, True
        ids = np.ascontiguousarray(prompt[None])
        inputs = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        return [int(token) for token in self._pipeline.generate(inputs, config, Streamer()).tokens[0]]

    def facts(self) -> dict[str, str]:
        return {"openvino-genai": version("openvino-genai"), "threads": str(self._threads)}


# ── onnxruntime-genai ────────────────────────────────────────────────────────────────────────────


def prepare_onnxruntime_genai(source: Source) -> None:
    """The model and the ``genai_config.json`` of its own builder; our export keeps only the model."""
    import tempfile

    from open_autoglm.export import genai_route

    # Its 8-bit embedding, shared with the head, needs an operator that ONNX Runtime has for 4 bits only.
    options = ("prune_lm_head=true", "accuracy_level=4", "block_size=32", "shared_embeddings=false")
    with tempfile.TemporaryDirectory(dir=source.prepared) as scratch:
        genai_route.build(
            source.checkpoint, source.prepared, Path(scratch), precision="int8", options=options
        )


class OnnxGenAiRuntime:
    """``og.Model`` and ``og.Generator``, with a thread count and the length of the cache."""

    def __init__(self, source: Source) -> None:
        import onnxruntime_genai as og

        self._og = og
        self._options = source.options
        config = og.Config(str(_genai_directory(source.prepared)))
        threads = {"intra_op_num_threads": source.options.threads}
        config.overlay(_as_json({"model": {"decoder": {"session_options": threads}}}))
        self._model = og.Model(config)

    def generate(self, prompt: Tokens, count: int, told: Told) -> list[int]:
        # As long each time, so that the cache is; it counts from the start of the prompt.
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(
            do_sample=False, max_length=self._options.max_tokens, min_length=len(prompt) + count
        )
        generator = self._og.Generator(self._model, params)
        generator.append_tokens(prompt.astype(np.int32))
        tokens: list[int] = []
        while len(tokens) < count:
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
            told()
        return tokens

    def facts(self) -> dict[str, str]:
        return {"onnxruntime-genai": version("onnxruntime-genai"), "threads": str(self._options.threads)}


def _genai_directory(root: Path) -> Path:
    """Olive puts the model into a folder of its output."""
    return next(iter(sorted(root.rglob("genai_config.json")))).parent


def _as_json(content: dict[str, Any]) -> str:
    import json

    return json.dumps(content)


# ── Olive ────────────────────────────────────────────────────────────────────────────────────────


def prepare_olive(source: Source) -> None:
    """``olive optimize`` for a CPU in 8 bits. Raises RuntimeError with what it said last if it fails."""
    asked = {
        "--model_name_or_path": str(source.checkpoint.path),
        "--output_path": str(source.prepared / "olive"),
        "--provider": "CPUExecutionProvider",
        "--device": "cpu",
        "--precision": "int8",
    }
    command = [sys.executable, "-m", "olive", "optimize", *(part for pair in asked.items() for part in pair)]
    done = subprocess.run(  # in its own folder, where it keeps a cache
        [*command, "--disable_telemetry"], capture_output=True, text=True, check=False, cwd=source.prepared
    )
    if done.returncode != 0 or not list(source.prepared.rglob("genai_config.json")):
        said = (done.stderr or done.stdout).strip().splitlines() or ["nothing"]
        raise RuntimeError(f"olive optimize says: {said[-1]}")


# ── all ──────────────────────────────────────────────────────────────────────────────────────────

RUNTIMES: Mapping[str, Callable[[Source], Runtime]] = MappingProxyType(
    {
        "contract": ContractRuntime,
        "transformers": TransformersRuntime,
        "transformers-compiled": CompiledTransformersRuntime,
        "llamacpp": LlamaCppRuntime,
        "openvino-genai": OpenVinoGenAiRuntime,
        "onnxruntime-genai": OnnxGenAiRuntime,
        "olive": OnnxGenAiRuntime,  # it writes for that runtime
    }
)

PREPARATIONS: Mapping[str, Callable[[Source], None]] = MappingProxyType(
    {
        "openvino-genai": prepare_openvino_genai,
        "onnxruntime-genai": prepare_onnxruntime_genai,
        "olive": prepare_olive,
    }
)
