"""Export by the onnxruntime-genai model builder: seconds, and the graph ONNX Runtime likes best.

The builder emits fused operators (GroupQueryAttention with the rotary embedding inside, skip-RMSNorm,
packed QKV) over a KV cache whose past and present share one buffer. It knows no GLM; a
small subclass of its Llama model does, because GLM differs from Llama in three things only: its rotary
embedding pairs neighbouring dimensions, may turn only a part of them, and gate and up are one matrix.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from open_autoglm.export.attention import fold_scales
from open_autoglm.export.graph import store_embedding_by_row, widen_logits
from open_autoglm.schemas import Checkpoint

NAME = "onnxruntime-genai"
KV_CACHE = "in_place"

_AS_LLAMA = {"glm"}
"""Model types handled by the subclass below."""

_NATIVE = {"llama", "qwen2", "qwen3"}
"""Model types whose own builder class our tests compare with torch."""


def supports(model_type: str) -> str | None:
    """None if this route takes the model type, else the reason why not."""
    if model_type in _AS_LLAMA | _NATIVE:
        return None
    return f"the onnxruntime-genai builder has no verified class for model type {model_type!r}"


def export(checkpoint: Checkpoint, output: Path, scratch: Path) -> None:
    """Write ``model.onnx`` (logits of every position) and its data file into ``output``.

    ``scratch`` is an empty directory for temporary files. Raises whatever the builder raises.
    """
    build(checkpoint, output, scratch, precision="fp32")
    store_embedding_by_row(output)
    fold_scales(output)


def export_for_cuda(
    checkpoint: Checkpoint, output: Path, scratch: Path, compute: Literal["fp16", "bf16"]
) -> None:
    """As `export`, for ONNX Runtime's CUDA provider: weights, arithmetic and cache in ``compute``, logits
    in fp32. Needs no GPU."""
    build(checkpoint, output, scratch, precision=compute, provider="cuda")
    store_embedding_by_row(output)
    widen_logits(output)


def build(
    checkpoint: Checkpoint,
    output: Path,
    scratch: Path,
    *,
    precision: str,
    provider: Literal["cpu", "cuda"] = "cpu",
    options: Sequence[str] = (),
) -> None:
    """Run the builder; ``precision``, ``provider`` and ``options`` are its own words."""
    from onnxruntime_genai.models import builder

    source = _present_as_llama(checkpoint, scratch) if checkpoint.model_type in _AS_LLAMA else checkpoint.path
    remote = f"hf_remote={str(checkpoint.trust_remote_code).lower()}"
    arguments = (str(source), str(source), str(output), precision, provider, str(scratch / "cache"))
    with _glm_in_place_of_llama(checkpoint.model_type), contextlib.redirect_stdout(io.StringIO()):
        extra = builder.parse_extra_options(*arguments, [remote, *options])
        builder.create_model(*arguments, **extra)
    gc.collect()  # the builder's graph refers to itself, and to the mapped weights of the torch model


def _present_as_llama(checkpoint: Checkpoint, scratch: Path) -> Path:
    """Links to the checkpoint beside a config that names the architecture the builder dispatches on."""
    directory = scratch / "as-llama"
    directory.mkdir()
    for entry in checkpoint.path.iterdir():
        if entry.name != "config.json":
            (directory / entry.name).symlink_to(entry.resolve())
    config = json.loads(checkpoint.config_path.read_text())
    config["architectures"] = ["LlamaForCausalLM"]
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@contextlib.contextmanager
def _glm_in_place_of_llama(model_type: str) -> Any:
    """Let the builder's Llama entry build GLM for the length of the block."""
    if model_type not in _AS_LLAMA:
        yield
        return
    from onnxruntime_genai.models import builder

    class GlmModel(builder.LlamaModel):  # type: ignore[misc]
        def __init__(self, config: Any, *arguments: Any) -> None:
            config.partial_rotary_factor = config.rope_parameters.get("partial_rotary_factor", 1.0)
            super().__init__(config, *arguments)
            self.rope_attrs["interleaved"] = 1
            self.model_type = "llama"

    original, builder.LlamaModel = builder.LlamaModel, GlmModel
    try:
        yield
    finally:
        builder.LlamaModel = original


def installed() -> str | None:
    """None if the builder can be imported, else the reason."""
    from importlib.util import find_spec

    return None if find_spec("onnxruntime_genai") else "onnxruntime-genai is not installed"
