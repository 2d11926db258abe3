"""A model's structure, read from its config and from its modules on the meta device: no weight is loaded.

What can be seen in the module tree is taken from there and not from the family's name: fused or split
gate/up, norms, biases, experts (3-D parameters that a count of nn.Linear misses), and the rotary
style by rotating unit vectors with the model's own code.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from open_autoglm.checkpoint import load_config
from open_autoglm.errors import CheckpointError
from open_autoglm.schemas import AttentionKind, Checkpoint, ModelProfile, RotaryStyle

if TYPE_CHECKING:
    from torch import nn

_QK_NORM = re.compile(r"(q|k|qk|query|key)_?(layer)?norm")
_UNREADABLE = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError),
    *(LookupError, RuntimeError, TypeError, ValueError),
)
"""Constructors do arithmetic and look-ups on whatever a config says, and module trees are free in form."""

_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts")


def profile_model(checkpoint: Checkpoint) -> ModelProfile:
    """The structure of a checkpoint. Raises CheckpointError if it is of a kind not described here."""
    config = load_config(checkpoint.path, trust_remote_code=checkpoint.trust_remote_code)
    return profile_config(config, trust_remote_code=checkpoint.trust_remote_code)


def profile_config(config: Any, *, trust_remote_code: bool = False) -> ModelProfile:
    """The structure that a transformers config describes, weights or not; under a second at any size.

    Of a model that also sees images, ``parameters`` counts everything and all else the text decoder.
    Raises CheckpointError if the config is not of an attention-only causal language model.
    """
    try:
        return _read_structure(_build_on_meta(config, trust_remote_code), config)
    except _UNREADABLE as error:
        lines = (line.strip() for line in str(error).splitlines())
        reason = next(filter(None, lines), type(error).__name__).rstrip(".")
        raise CheckpointError(
            f"the structure of the {config.model_type!r} config cannot be read as a causal language model "
            f"({reason}): correct config.json, or pass a model such as glm, llama or qwen3"
        ) from error


def _build_on_meta(config: Any, trust_remote_code: bool) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def _read_structure(model: Any, config: Any) -> ModelProfile:
    text = config.get_text_config(decoder=True)
    layers = _decoder_layers(model, text)
    attentions = [_attention(layer, index, text) for index, layer in enumerate(layers)]
    return ModelProfile(
        model_type=config.model_type,
        architecture=type(model).__name__,
        layers=len(layers),
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        context_tokens=text.max_position_embeddings,
        **_attention_facts(attentions, text),
        **_rotary_facts(model.get_decoder(), attentions[0], text),
        **_mlp_facts(layers, text),
        **_norm_facts(layers[0]),
        **_parameter_facts(model, layers, text),
    )


# ── the module tree ──────────────────────────────────────────────────────────────────────────────


def _decoder_layers(model: Any, text: Any) -> Sequence[nn.Module]:
    from torch import nn

    for module in model.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == text.num_hidden_layers:
            return list(module)
    raise CheckpointError(
        f"the modules of {type(model).__name__} hold no list of {text.num_hidden_layers} layers, so its "
        "structure cannot be read: pass a decoder-only model such as glm or llama"
    )


def _attention(layer: nn.Module, index: int, text: Any) -> Any:
    for child in layer.children():
        if "attention" in type(child).__name__.lower():
            return child
    raise CheckpointError(
        f"layer {index} of the {text.model_type} model has no attention: models with recurrent or "
        "linear-attention layers are not supported"
    )


def _experts(layer: nn.Module) -> tuple[nn.Module, int] | None:
    """The routed experts of a layer and their number."""
    from torch import nn

    for name, module in layer.named_modules():
        if name.rpartition(".")[2] == "experts":
            if isinstance(module, nn.ModuleList):
                return module, len(module)
            stacked = [parameter for parameter in module.parameters() if parameter.dim() == 3]
            if stacked:
                return module, stacked[0].shape[0]
    return None


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


# ── attention ────────────────────────────────────────────────────────────────────────────────────


def _attention_facts(attentions: Sequence[Any], text: Any) -> dict[str, Any]:
    from torch import nn

    first = attentions[0]
    heads = text.num_attention_heads
    head_dim = _head_dim(first, text)
    kv_heads = _kv_heads(first, text, head_dim)
    value_dim = getattr(first, "v_head_dim", head_dim)
    topk = next((indexer.index_topk for indexer in _indexers(attentions)), None)
    window, sliding_layers = _sliding(text)
    return {
        "attention": _attention_kind(attentions, heads, kv_heads),
        "attention_heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "value_head_dim": None if value_dim == head_dim else value_dim,
        "attention_bias": any(m.bias is not None for m in first.modules() if isinstance(m, nn.Linear)),
        "qk_norm": any(_QK_NORM.fullmatch(name) for name, _ in first.named_children()),
        "sliding_window": window,
        "attended_tokens": topk or window,
        "limited_layers": len(attentions) if topk else sliding_layers,
        "kv_elements_per_token": sum(
            _kv_elements(attention, kv_heads * (head_dim + value_dim)) for attention in attentions
        ),
    }


def _head_dim(attention: Any, text: Any) -> int:
    """Of queries and keys; MLA calls the sum of its rotated and unrotated parts ``qk_head_dim``."""
    found = getattr(attention, "qk_head_dim", None) or getattr(attention, "head_dim", None)
    return int(found or text.hidden_size // text.num_attention_heads)


def _kv_heads(attention: Any, text: Any, head_dim: int) -> int:
    key: Any = getattr(attention, "k_proj", None)
    if hasattr(key, "out_features"):
        return int(key.out_features) // head_dim
    stated = getattr(attention, "num_kv_heads", None) or getattr(text, "num_key_value_heads", None)
    return int(stated or text.num_attention_heads)


def _attention_kind(attentions: Sequence[Any], heads: int, kv_heads: int) -> AttentionKind:
    if hasattr(attentions[0], "kv_lora_rank"):
        return "mla+dsa" if _indexers(attentions) else "mla"
    if kv_heads == heads:
        return "mha"
    return "mqa" if kv_heads == 1 else "gqa"


def _indexers(attentions: Sequence[Any]) -> list[Any]:
    """The modules that choose, for each query, the few keys it attends to (DeepSeek sparse attention)."""
    modules = (module for attention in attentions for module in attention.modules())
    return [module for module in modules if hasattr(module, "index_topk")]


def _kv_elements(attention: Any, plain: int) -> int:
    """Numbers one layer caches per token: keys and values, or MLA's latent with the shared rotated key."""
    if not hasattr(attention, "kv_lora_rank"):
        return plain
    latent = attention.kv_lora_rank + attention.qk_rope_head_dim
    return int(latent + sum(indexer.head_dim for indexer in _indexers([attention])))


def _sliding(text: Any) -> tuple[int | None, int]:
    """The sliding window in tokens, and how many layers have it."""
    window = getattr(text, "sliding_window", None)
    if not window:
        return None, 0
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * text.num_hidden_layers
    layers = kinds.count("sliding_attention")
    return (window, layers) if layers else (None, 0)


# ── rotary embedding ─────────────────────────────────────────────────────────────────────────────


def _rotary_facts(decoder: nn.Module, attention: nn.Module, text: Any) -> dict[str, Any]:
    frequencies = next((b for name, b in decoder.named_buffers() if name.endswith("inv_freq")), None)
    stated = getattr(text, "rotary_dim", None) or 0
    dims = 2 * frequencies.shape[-1] if frequencies is not None else stated
    style: RotaryStyle = _rotary_style(attention, text) if dims else "none"
    scaling = (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default")
    return {"rotary": style, "rotary_dims": dims, "rotary_scaling": scaling}


def _rotary_style(attention: nn.Module, text: Any) -> RotaryStyle:
    """Which dimensions the model's own code rotates together: neighbours, or one from each half."""
    rotations = _rotations(attention)
    if not getattr(text, "rope_interleave", True):  # some classes can do both, and the config chooses
        rotations = [rotation for rotation in rotations if "interleave" not in rotation.__name__]
    if not rotations:
        raise CheckpointError(
            f"{type(attention).__name__} rotates positions in a way that is not known here (no "
            "apply_rotary function in its module): pass a model such as glm, llama or qwen3"
        )
    if "freqs_cis" in inspect.signature(rotations[0]).parameters:
        return "interleaved"  # a complex number is a pair of neighbours
    return "interleaved" if _rotation_partner(rotations[0]) == 1 else "half"


def _rotations(attention: nn.Module) -> list[Callable[..., Any]]:
    """The rotary functions that the attention's forward pass names, interleaved ones first."""
    code = vars(sys.modules[type(attention).__module__])
    known = sorted(
        (name for name in code if name.startswith("apply_rotary")), key=lambda n: "interleave" not in n
    )
    named = inspect.unwrap(type(attention).forward).__code__.co_names
    return [code[name] for name in known if name in named] or [code[name] for name in known]


def _rotation_partner(rotate: Callable[..., Any], dims: int = 8) -> int:
    """The dimension that ``rotate`` mixes with dimension 0: 1 if interleaved, dims / 2 if half-split.

    The rows of an identity matrix go in as ``dims`` positions, all turned by the same angle, so the
    result is the rotation's own matrix, input by output.
    """
    import torch

    unit = torch.eye(dims).view(1, 1, dims, dims)
    angle = torch.ones(1, dims, dims)
    given = dict.fromkeys(("q", "k", "x", "tensor"), unit) | {"cos": angle.cos(), "sin": angle.sin()}
    wanted = [name for name in inspect.signature(rotate).parameters if name in given]
    try:
        rotated = rotate(**{name: given[name] for name in wanted})
    except RuntimeError:  # it wants one angle per pair of dimensions
        given |= {name: given[name][..., : dims // 2] for name in ("cos", "sin")}
        rotated = rotate(**{name: given[name] for name in wanted})
    matrix = (rotated[0] if isinstance(rotated, tuple) else rotated).view(dims, dims)
    reached = matrix[0].nonzero().flatten()
    sources = matrix[:, reached].abs().sum(dim=1).nonzero().flatten().tolist()
    return int(max(sources))


# ── MLP, norms, counts ───────────────────────────────────────────────────────────────────────────


def _mlp_facts(layers: Sequence[nn.Module], text: Any) -> dict[str, Any]:
    routed = [found for layer in layers if (found := _experts(layer)) is not None]
    dense = [layer for layer in layers if _experts(layer) is None]
    matrices = _mlp_matrices(dense[0]) if dense else _expert_matrices(*routed[0])
    shared = any(name.endswith(("shared_experts", "shared_expert")) for name, _ in layers[-1].named_modules())
    return {
        "mlp": _mlp_kind(matrices),
        "intermediate_size": matrices[-1] // text.hidden_size,
        "experts": routed[0][1] if routed else 0,
        "experts_per_token": _experts_per_token(text) if routed else 0,
        "shared_experts": (getattr(text, "n_shared_experts", None) or 1) if shared else 0,
        "dense_layers": len(dense),
    }


def _mlp_matrices(layer: nn.Module) -> list[int]:
    """Sizes, in elements, of the matrices beside attention and norms, in the order of the forward pass."""
    parts = [c for c in layer.children() if not _is_norm(c) and "attention" not in type(c).__name__.lower()]
    return [p.numel() for part in parts for p in part.parameters() if p.dim() == 2]


def _expert_matrices(experts: nn.Module, count: int) -> list[int]:
    """The same for one expert of ``count``, stacked in 3-D parameters or listed one by one."""
    stacked = [p.numel() // count for p in experts.parameters() if p.dim() == 3]
    return stacked or [p.numel() for p in next(experts.children()).parameters() if p.dim() == 2]


def _mlp_kind(matrices: list[int]) -> str:
    """A gated MLP has gate, up and down of one size, or gate and up fused to one of double size."""
    if len(matrices) == 3:
        return "split_gate_up"
    return "fused_gate_up" if matrices[0] == 2 * matrices[-1] else "plain"


def _experts_per_token(text: Any) -> int:
    stated = [getattr(text, name) for name in _EXPERTS_PER_TOKEN if getattr(text, name, None)]
    return int(stated[0])


def _norm_facts(layer: nn.Module) -> dict[str, Any]:
    """Norms around attention and MLP, not those inside; 0.0 stands for an epsilon that is not stated."""
    norms = [child for child in layer.children() if _is_norm(child)]
    stated = [
        getattr(norm, name) for norm in norms for name in ("variance_epsilon", "eps") if hasattr(norm, name)
    ]
    return {"norms_per_layer": len(norms), "norm_eps": stated[0] if stated else 0.0}


def _parameter_facts(model: Any, layers: Sequence[nn.Module], text: Any) -> dict[str, Any]:
    """Counts. Active means used for one token of text: of the routed experts only the chosen ones."""
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    active = _count([*model.get_decoder().parameters(), head])
    for layer in layers:
        if (found := _experts(layer)) is not None:
            experts, number = found
            active -= _count(experts.parameters()) * (number - _experts_per_token(text)) // number
    return {
        "tied_embeddings": head is embedding,
        "parameters": _count(model.parameters()),
        "active_parameters": active,
        "embedding_parameters": embedding.numel(),
        "lm_head_parameters": head.numel(),
    }


def _count(parameters: Iterable[nn.Parameter]) -> int:
    """Elements, shared parameters once."""
    return sum(parameter.numel() for parameter in set(parameters))
