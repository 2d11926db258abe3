"""Export by transformers' own ONNX exporter: slower and less fused, but it takes every causal LM.

It is the fallback where the onnxruntime-genai builder has no class, and the cross-check where it has.
The graph is one for prefill and decode, with batch, sequence and past as dynamic dimensions; its KV
cache grows by concatenation. The exporter calls itself experimental: versions are pinned, and the
preflight decides whether to trust it for a model type.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from open_autoglm.export.graph import save_decoder
from open_autoglm.schemas import Checkpoint

NAME = "transformers"
KV_CACHE = "growing"

_KV_NAME = re.compile(r"(input|output)\.past_key_values\.layers\.(\d+)\.(key|value)s")


def supports(model_type: str) -> str | None:
    """None if this route takes the model type, else the reason why not."""
    if model_type.endswith(("_moe", "_moe_lite", "_moe_dsa")):
        return f"mixtures of experts such as {model_type} are not verified with transformers' exporter"
    return None


def export(checkpoint: Checkpoint, output: Path, scratch: Path) -> None:
    """Write ``model.onnx`` (logits of every position) and its data file into ``output``."""
    import onnx

    _trace(checkpoint).save_pretrained(str(scratch))
    graph_file = next(scratch.rglob("*.onnx"))
    model = onnx.load(graph_file, load_external_data=False)
    _rename_cache(model.graph)
    save_decoder(model, graph_file.parent, output)


def _trace(checkpoint: Checkpoint) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.cache_utils import DynamicCache
    from transformers.exporters import OnnxConfig, OnnxExporter

    model = AutoModelForCausalLM.from_pretrained(
        checkpoint.path, dtype=torch.float32, trust_remote_code=checkpoint.trust_remote_code
    ).eval()
    # Two rows, five cached and three new tokens: any sizes will do, but 0 and 1 would be specialised.
    rows, cached, new = 2, 5, 3
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.ones(rows, cached, dtype=torch.long), past_key_values=cache, use_cache=True)
    inputs = {
        "input_ids": torch.ones(rows, new, dtype=torch.long),
        "attention_mask": torch.ones(rows, cached + new, dtype=torch.long),
        "position_ids": torch.arange(cached, cached + new).repeat(rows, 1),
        "past_key_values": cache,
        "use_cache": True,
    }
    free = torch.export.Dim.DYNAMIC
    shapes: dict[str, Any] = {
        name: {0: free, 1: free} for name in ("input_ids", "attention_mask", "position_ids")
    }
    shapes["past_key_values"] = [{0: free, 2: free}] * (2 * len(cache.layers))
    config = OnnxConfig(dynamic_shapes=shapes, prefer_deferred_runtime_asserts_over_guards=True)
    return OnnxExporter().export(model, inputs, config=config)


def _rename_cache(graph: Any) -> None:
    """Give the cache the names the other route uses: ``past_key_values.0.key``, ``present.0.key``."""

    def renamed(name: str) -> str:
        match = _KV_NAME.fullmatch(name)
        if match is None:
            return name
        prefix = "past_key_values" if match[1] == "input" else "present"
        return f"{prefix}.{match[2]}.{match[3]}"

    for value in [*graph.input, *graph.output, *graph.value_info]:
        value.name = renamed(value.name)
    for node in graph.node:
        node.input[:] = [renamed(name) for name in node.input]
        node.output[:] = [renamed(name) for name in node.output]


def installed() -> str | None:
    """None if the exporter can be imported, else the reason."""
    from importlib.util import find_spec

    return None if find_spec("onnxscript") else "onnxscript is not installed"
