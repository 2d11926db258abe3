"""From a safetensors checkpoint to a GGUF in fp32: the same numbers under llama.cpp's names.

GLM is written as llama.cpp's `llama`. A GGUF of that architecture keeps the rows of queries and keys so
that neighbouring dimensions rotate together, which is GLM's own order and not that of Llama checkpoints:
those are reordered, GLM's are not. llama.cpp also has `chatglm`, GLM's older form; it wants heads times
head size to equal the hidden size, which `llama` does not.

The file holds no tokenizer, since sessions take and give token ids: llama.cpp accepts a vocabulary of a
size and no words (``tokenizer.ggml.model`` = ``no_vocab``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from open_autoglm.analysis import profile_config
from open_autoglm.checkpoint import build_on_meta, load_config
from open_autoglm.schemas import Checkpoint, ModelProfile
from open_autoglm.weights import SAFETENSORS, SAFETENSORS_INDEX, StoredTensor, find_weights, read_headers

Array = NDArray[np.float32]

_UNROTATED = 1e30
"""A frequency divided by this turns nothing. llama.cpp's own converter writes the same for Gemma."""

_STATIC_SCALINGS = {"default", "linear", "llama3"}
"""Rotary scalings that divide each frequency by a constant, whatever the length of the context."""

_FLOATS = {"F64", "F32", "F16", "BF16"}


class _Form(NamedTuple):
    """How llama.cpp computes a model type."""

    architecture: str
    rope_factors: bool = False
    """It reads ``rope_freqs.weight``, a divisor for each rotary frequency."""
    partial_rotary: bool = True
    """It can leave dimensions of a head unrotated: by a dimension count, or by ``rope_freqs``."""
    attention_bias: bool = True
    """It has a place for every bias that the model type's attention may have."""


_FORMS = {
    "glm": _Form("llama", rope_factors=True),
    "glm4": _Form("glm4"),
    "llama": _Form("llama", rope_factors=True),
    "qwen3": _Form("qwen3", partial_rotary=False, attention_bias=False),
}


class NoGguf(ValueError):
    """llama.cpp would compute something else, or nothing; the message says why."""


def supports(profile: ModelProfile) -> str | None:
    """None if the model can be written so that llama.cpp computes the same, else the reason why not."""
    form = _FORMS.get(profile.model_type)
    if form is None:
        return f"no GGUF is written for model type {profile.model_type!r}, only for {', '.join(_FORMS)}"
    if profile.sliding_window is not None:
        return f"a sliding window of {profile.sliding_window} tokens is not written into the GGUF"
    if profile.rotary_scaling not in (_STATIC_SCALINGS if form.rope_factors else {"default"}):
        return f"{profile.rotary_scaling!r} rotary scaling is not written into the GGUF"
    if profile.rotary_dims != profile.head_dim and not form.partial_rotary:
        return f"llama.cpp's {form.architecture} rotates whole heads, and this model a part of each"
    if profile.attention_bias and not form.attention_bias:
        return f"llama.cpp's {form.architecture} has no bias at the attention's output"
    return None


class _Tensor(NamedTuple):
    """One tensor of the GGUF, ``float32[shape]``, loaded when its turn comes."""

    name: str
    shape: tuple[int, ...]
    load: Callable[[], Array]


def write_gguf(checkpoint: Checkpoint, path: Path) -> None:
    """Write the weights of ``checkpoint`` to ``path`` as a GGUF in fp32, one tensor in memory at a time.

    Raises NoGguf if llama.cpp would not compute this model.
    """
    from gguf import GGUFWriter

    config = load_config(checkpoint.path, trust_remote_code=checkpoint.trust_remote_code)
    profile = profile_config(config, trust_remote_code=checkpoint.trust_remote_code)
    _refuse(profile, config)
    tensors = [*_rope_factors(profile, config), *_weights(checkpoint.path, profile)]
    writer = GGUFWriter(path, _FORMS[profile.model_type].architecture)
    _add_metadata(writer, profile, config)
    for tensor in tensors:
        size_bytes = 4 * int(np.prod(tensor.shape))
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size_bytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(np.ascontiguousarray(tensor.load()))
    writer.close()


def _refuse(profile: ModelProfile, config: Any) -> None:
    """Raise NoGguf for what `supports` refuses, and for what only the config tells."""
    reason = supports(profile)
    if reason is None and config.hidden_act != "silu":
        reason = f"llama.cpp's {profile.model_type} computes silu, and this model {config.hidden_act}"
    if reason is not None:
        raise NoGguf(reason)


def _add_metadata(writer: Any, profile: ModelProfile, config: Any) -> None:
    from gguf import LlamaFileType

    writer.add_file_type(LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(profile.vocab_size)
    writer.add_context_length(profile.context_tokens)
    writer.add_embedding_length(profile.hidden_size)
    writer.add_block_count(profile.layers)
    writer.add_feed_forward_length(profile.intermediate_size)
    writer.add_head_count(profile.attention_heads)
    writer.add_head_count_kv(profile.kv_heads)
    writer.add_key_length(profile.head_dim)
    writer.add_value_length(profile.head_dim)
    writer.add_layer_norm_rms_eps(profile.norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    # `llama` insists on whole heads; its unrotated dimensions are those with a factor of `_UNROTATED`.
    whole = _FORMS[profile.model_type].rope_factors
    writer.add_rope_dimension_count(profile.head_dim if whole else profile.rotary_dims)


# ── rotary embedding ─────────────────────────────────────────────────────────────────────────────


def _rope_factors(profile: ModelProfile, config: Any) -> Iterator[_Tensor]:
    """``rope_freqs``, ``float32[head_dim / 2]``, unless the plain frequencies of whole heads are right."""
    if profile.rotary_dims == profile.head_dim and profile.rotary_scaling == "default":
        return
    if not _FORMS[profile.model_type].rope_factors:
        return
    base = float(config.rope_parameters["rope_theta"])
    plain = base ** -(np.arange(0, profile.head_dim, 2) / profile.head_dim)
    wanted = _frequencies(config)
    factors = np.full(len(plain), _UNROTATED, np.float32)
    factors[: len(wanted)] = plain[: len(wanted)] / wanted
    yield _Tensor("rope_freqs.weight", factors.shape, lambda: factors)


def _frequencies(config: Any) -> NDArray[np.float64]:
    """What transformers turns each pair of dimensions by, in radians per token."""
    rotary = build_on_meta(config).get_decoder().rotary_emb
    on_cpu = type(rotary)(config)  # on the meta device the buffer has no numbers
    if on_cpu.attention_scaling != 1:
        raise NoGguf(f"the rotary embedding scales attention by {on_cpu.attention_scaling:g}")
    frequencies: NDArray[np.float64] = on_cpu.inv_freq.double().numpy()
    return frequencies


# ── weights ──────────────────────────────────────────────────────────────────────────────────────


def _weights(directory: Path, profile: ModelProfile) -> Iterator[_Tensor]:
    """The tensors of a checkpoint under their GGUF names. Raises NoGguf for one that has none."""
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    architecture = _FORMS[profile.model_type].architecture
    (known,) = (arch for arch in MODEL_ARCH if MODEL_ARCH_NAMES[arch] == architecture)
    names = get_tensor_name_map(known, profile.layers)
    for file, header in read_headers(
        directory, find_weights(directory, SAFETENSORS, SAFETENSORS_INDEX)
    ).items():
        for source, stored in header.items():
            if source.endswith(".inv_freq") or (profile.tied_embeddings and source == "lm_head.weight"):
                continue  # derived from the config, or the embedding's own numbers
            name = names.get_name(source, try_suffixes=(".weight", ".bias"))
            if name is None or stored.dtype not in _FLOATS:
                raise NoGguf(f"the tensor {source} ({stored.dtype}) has no place in a GGUF of {architecture}")
            yield from _written(name, stored, _reader(file, source), profile)


def _written(
    name: str, stored: StoredTensor, load: Callable[[], Array], profile: ModelProfile
) -> Iterator[_Tensor]:
    """One stored tensor as llama.cpp wants it: itself, with its heads reordered, or as gate and up."""
    if profile.model_type == "llama" and (".attn_q." in name or ".attn_k." in name):
        yield _Tensor(name, stored.shape, lambda: _neighbours_first(load(), profile.head_dim))
    elif profile.model_type == "glm" and ".ffn_up." in name:
        half = stored.shape[0] // 2
        shape = (half, *stored.shape[1:])
        yield _Tensor(name.replace("ffn_up", "ffn_gate"), shape, lambda: load()[:half])
        yield _Tensor(name, shape, lambda: load()[half:])
    else:
        yield _Tensor(name, stored.shape, load)


def _neighbours_first(rows: Array, head_dim: int) -> Array:
    """Rows of a projection or its bias from half-split to interleaved order, head by head.

    transformers rotates dimension i of a head with i + head_dim / 2, llama.cpp's `llama` 2i with 2i + 1.
    """
    heads = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return heads.swapaxes(1, 2).reshape(rows.shape)


def _reader(file: Path, name: str) -> Callable[[], Array]:
    def read() -> Array:
        import torch
        from safetensors import safe_open

        with safe_open(file, framework="pt") as tensors:  # numpy has no bf16
            array: Array = tensors.get_tensor(name).to(torch.float32).numpy()
        return array

    return read
