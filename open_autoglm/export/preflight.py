"""Find out in seconds whether an export route is right for a model, before minutes are spent on it.

A route is tried on a random two-layer copy of the model's config: same attention, rotary, norms, biases
and tying, small sizes. It passes if ONNX Runtime reproduces torch's logits in prefill and in decode.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from open_autoglm.engines.contract import SessionOptions
from open_autoglm.export.graph import DecoderFacts
from open_autoglm.files import digest_of
from open_autoglm.schemas import Checkpoint

TOLERANCE = 1e-3
"""Largest |logit| difference, in standard deviations of the reference's logits."""

# No linear layer may have as many outputs as the vocabulary has entries: the builder would take it for the
# head. Head sizes are multiples of 8 and this is not.
_VOCABULARY = 1021
_PROMPT, _TOKENS = 13, 17


class WrongLogits(RuntimeError):
    """The export runs, and computes something else."""


def small_config(checkpoint: Checkpoint) -> Any:
    """The checkpoint's config with two layers and small sizes; head size and grouping are kept, and whether
    the heads together are as wide as the model."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=checkpoint.trust_remote_code)
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    as_wide = heads * head_dim == config.hidden_size
    small_kv_heads = 4 if kv_heads in (None, heads) else 1 if kv_heads == 1 else 2
    changes = {
        "num_hidden_layers": 2,
        "vocab_size": _VOCABULARY,
        "num_attention_heads": 4,
        "num_key_value_heads": small_kv_heads,
        "head_dim": head_dim,
        "hidden_size": (4 if as_wide else 8) * head_dim,
        "intermediate_size": 160,
        "max_position_embeddings": min(config.max_position_embeddings, 512),
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": 1,
        "dtype": "float32",
    }
    for name, value in changes.items():
        setattr(config, name, value)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    return config


def traits(config: Any) -> str:
    """What distinguishes two configs of one model type, for the ledger's key."""
    content = config.to_dict()
    for noise in ("transformers_version", "_name_or_path", "architectures"):
        content.pop(noise, None)
    return digest_of(content)[:16]


def check_route(route: Any, checkpoint: Checkpoint, config: Any, scratch: Path) -> None:
    """Export a random model of ``config`` by ``route`` and compare it with torch.

    Raises WrongLogits if the numbers differ, and whatever the route or the runtime raises.
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=checkpoint.trust_remote_code)
    model = model.to(torch.float32).eval()
    source, output, work = (scratch / name for name in ("source", "output", "work"))
    for directory in (source, output, work):
        directory.mkdir()
    model.save_pretrained(source)
    for pattern in ("*token*", "vocab.json", "merges.txt"):
        for file in checkpoint.path.glob(pattern):
            (source / file.name).symlink_to(file.resolve())
    small = checkpoint.model_copy(update={"path": source})
    route.export(small, output, work)
    decoder_facts(config, route.KV_CACHE).write(output)
    tokens = np.random.default_rng(0).integers(2, _VOCABULARY, (2, _TOKENS))
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)).logits.numpy()
    _compare(output, tokens, expected)


def _compare(output: Path, tokens: Any, expected: Any) -> None:
    from open_autoglm.engines.onnxruntime_session import open_session

    session = open_session(output, SessionOptions(batch_size=2, max_tokens=_TOKENS + 3, threads=1))
    found = [session.prefill(tokens[:, :_PROMPT])]
    found += [session.decode(tokens[:, position]) for position in range(_PROMPT, _TOKENS)]
    session.close()
    for step, logits in enumerate(found):
        position = _PROMPT - 1 + step
        difference = float(np.abs(logits - expected[:, position]).max() / expected.std())
        if not difference <= TOLERANCE:
            phase = "prefill" if step == 0 else "decode"
            raise WrongLogits(
                f"{phase} logits at position {position} differ from torch by {difference:.2g} standard "
                f"deviations on a two-layer copy (limit {TOLERANCE:g})"
            )


def decoder_facts(config: Any, kv_cache: Any) -> DecoderFacts:
    heads = config.num_attention_heads
    return DecoderFacts(
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        kv_cache=kv_cache,
    )
