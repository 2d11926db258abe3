"""What is accepted as a checkpoint, and the sentence each unacceptable one is refused with."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB_SIZE, build_checkpoint

from open_autoglm.checkpoint import load_checkpoint
from open_autoglm.errors import CheckpointError
from open_autoglm.files import sha256_file

Damage = Callable[[Path], object]


@pytest.fixture
def glm(tiny_glm: Path, tmp_path: Path) -> Path:
    """A copy of the tiny GLM that a test may damage."""
    return Path(shutil.copytree(tiny_glm, tmp_path / "My GLM"))


def refusal(path: Path | str) -> str:
    """The one sentence that ``path`` is refused with."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(str(path))
    message = str(caught.value)
    assert "\n" not in message
    return message


# ── ways to damage a checkpoint ──────────────────────────────────────────────────────────────────


def remove(*names: str) -> Damage:
    def damage(directory: Path) -> None:
        for name in names:
            (directory / name).unlink()

    return damage


def replace(name: str, content: str) -> Damage:
    return lambda directory: (directory / name).write_text(content)


def configure(**entries: object) -> Damage:
    """Change entries of config.json; None removes one."""

    def damage(directory: Path) -> None:
        path = directory / "config.json"
        config = json.loads(path.read_text()) | entries
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))

    return damage


def flip_bit(name: str, position: int) -> Damage:
    """Turn one bit of the byte at ``position``, counted from the end if negative."""

    def damage(directory: Path) -> None:
        content = bytearray((directory / name).read_bytes())
        content[position] ^= 0x04
        (directory / name).write_bytes(content)

    return damage


def truncate(name: str, size_bytes: int) -> Damage:
    return lambda directory: os.truncate(directory / name, size_bytes)


def empty(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()


def shard(directory: Path) -> None:
    """Rewrite the weights as two shards and an index."""
    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    weight_map = {name: f"part-{1 + (number % 2)}.safetensors" for number, name in enumerate(names)}
    for file in set(weight_map.values()):
        part = {name: tensors[name] for name in names if weight_map[name] == file}
        save_file(part, directory / file, metadata={"format": "pt"})
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def shard_and_lose_one(directory: Path) -> None:
    shard(directory)
    (directory / "part-2.safetensors").unlink()


def shard_and_lose_a_tensor(directory: Path) -> None:
    shard(directory)
    tensors = load_file(directory / "part-1.safetensors")
    tensors.popitem()
    save_file(tensors, directory / "part-1.safetensors")


def shard_outside(directory: Path) -> None:
    shard(directory)
    index = directory / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("part-2", "../part-2"))


def rename_a_tensor(directory: Path) -> None:
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b'"model.norm.weight"', b'"model.norm.seight"'))


def to_pickle(directory: Path) -> None:
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def write_sums(directory: Path) -> None:
    files = [file for file in directory.iterdir() if file.name != "SHA256SUMS"]
    sums = [f"{sha256_file(file)}  ./{file.name}\n" for file in files]
    (directory / "SHA256SUMS").write_text("".join(sums))


def flip_weight_under_sums(directory: Path) -> None:
    write_sums(directory)
    flip_bit("model.safetensors", -1000)(directory)


def flip_weight_under_sidecar(directory: Path) -> None:
    digest = sha256_file(directory / "model.safetensors")
    (directory / "model.safetensors.sha256").write_text(f"{digest}\n")
    flip_bit("model.safetensors", -1000)(directory)


BAD_CHECKPOINTS: list[tuple[str, Damage, str, str]] = [  # what happened, damage, culprit, mend
    ("empty directory", empty, "is empty", "pass the directory"),
    ("no config", remove("config.json"), "no config.json", "Hugging Face checkpoint"),
    ("config is cut", truncate("config.json", 40), "config.json is not valid JSON", "fetch the file again"),
    ("config is a list", replace("config.json", "[]"), "config.json does not hold", "fetch the file again"),
    ("config without model type", configure(model_type=None), "model_type", "add it"),
    ("config without weights", remove("model.safetensors"), "holds no weights", "it needs model.safetensors"),
    ("unknown model type", configure(model_type="glm99"), "'glm99'", "install a transformers that does"),
    ("wrong type in config", configure(hidden_size="wide"), "hidden_size", "correct that entry"),
    (
        "impossible config",
        configure(model_type="llama", architectures=None, num_attention_heads=0),
        "config.json",
        "correct that",
    ),
    ("no vocabulary", configure(vocab_size=0), "no usable vocab_size (0)", "give it"),
    (
        "own code",
        configure(model_type="glm99", auto_map={"AutoConfig": "configuration_glm99.Glm99Config"}),
        "its own Python code for the model_type 'glm99'",
        "--trust-remote-code",
    ),
    ("encoder", configure(model_type="bert", architectures=["BertModel"]), "BertModel", "GlmForCausalLM"),
    ("encoder without architectures", configure(model_type="bert", architectures=None), "'bert'", "GlmFor"),
    ("encoder-decoder", configure(model_type="t5", architectures=None), "'t5'", "GlmForCausalLM"),
    (
        "classifier",
        configure(architectures=["GlmForSequenceClassification"]),
        "GlmForSequenceClassification",
        "GlmForCausalLM",
    ),
    ("pickle", to_pickle, "pytorch_model.bin", "--allow-pickle"),
    ("missing shard", shard_and_lose_one, "part-2.safetensors", "fetch the checkpoint again"),
    ("tensor not in its shard", shard_and_lose_a_tensor, "part-1.safetensors lacks the tensor", "fetch the"),
    ("shard outside the directory", shard_outside, "'../part-2.safetensors'", "fetch the file again"),
    (
        "truncated weights",
        truncate("model.safetensors", 400_000),
        "model.safetensors (400000 bytes)",
        "again",
    ),
    ("truncated header", truncate("model.safetensors", 500), "model.safetensors (500 bytes)", "fetch"),
    ("weights of no bytes", truncate("model.safetensors", 0), "model.safetensors (0 bytes)", "fetch"),
    ("bit flip in the header's length", flip_bit("model.safetensors", 2), "model.safetensors", "fetch"),
    ("bit flip in the header", flip_bit("model.safetensors", 8), "truncated or damaged", "fetch"),
    ("bit flip against SHA256SUMS", flip_weight_under_sums, "model.safetensors does not match", "fetch"),
    ("bit flip against a sidecar", flip_weight_under_sidecar, "model.safetensors does not match", "fetch"),
    ("SHA256SUMS of something else", replace("SHA256SUMS", "hello"), "SHA256SUMS is not a list", "sha256sum"),
    (
        "bit flip in a tensor's name",
        rename_a_tensor,
        "lack the tensor model.norm.weight",
        "fetch the checkpoint",
    ),
    ("more layers than weights", configure(num_hidden_layers=3), "lack the tensor model.layers.2", "correct"),
    ("shape differs", configure(hidden_size=128), "but config.json calls for [512, 128]", "correct config"),
    ("quantised", configure(quantization_config={"quant_method": "gptq"}), "quantised (gptq)", "made from"),
    ("no tokenizer", remove("tokenizer.json"), "has no tokenizer", "add tokenizer.json"),
    ("tokenizer is cut", truncate("tokenizer.json", 900), "tokenizer.json is not valid JSON", "fetch"),
]


@pytest.mark.parametrize(
    ("damage", "culprit", "mend"),
    [pytest.param(*case[1:], id=case[0].replace(" ", "-")) for case in BAD_CHECKPOINTS],
)
def test_a_bad_checkpoint_is_refused(glm: Path, damage: Damage, culprit: str, mend: str) -> None:
    """The sentence names the directory, the culprit in it, and the mend."""
    damage(glm)
    message = refusal(glm)
    assert str(glm) in message
    assert culprit in message
    assert mend in message


NON_FINITE = [
    (dtype, number)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2, torch.float8_e4m3fn)
    for number in (math.nan, math.inf, -math.inf)
    if dtype != torch.float8_e4m3fn or math.isnan(number)  # that one has no infinities
]


@pytest.mark.parametrize(("dtype", "number"), NON_FINITE)
def test_weights_that_are_not_finite_are_refused(glm: Path, dtype: torch.dtype, number: float) -> None:
    """One NaN or infinity anywhere is refused with the name of its tensor, in every floating dtype."""
    weights = glm / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(weights).items()}
    save_file(tensors, weights)
    assert load_checkpoint(str(glm)).weight_bytes == weights.stat().st_size
    culprit = "model.layers.1.mlp.down_proj.weight"
    tensors[culprit][-1, -1] = number
    save_file(tensors, weights)
    assert f"the tensor {culprit} in {weights} holds NaN or infinite numbers" in refusal(glm)


def test_a_path_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    """An absolute path cannot be a hub id, so only the directory is spoken of."""
    assert refusal(tmp_path / "glm") == f"the directory {tmp_path / 'glm'} does not exist: check the path"


def test_a_file_is_refused(glm: Path) -> None:
    """Pointing at the weights instead of their directory is answered with what to point at."""
    assert "is a file: pass the directory" in refusal(glm / "model.safetensors")


@pytest.mark.parametrize("model_path", ["zai-org/no-such-glm", "no-such-directory", "bad--id/x"])
def test_a_hub_id_that_cannot_be_fetched_is_refused(model_path: str) -> None:
    """What could be a directory or a hub id is refused with both possibilities in one sentence."""
    message = refusal(model_path)
    assert f"{model_path} is not a directory here, and the model hub gave no model" in message
    assert "check the path, or the hub id and the connection" in message


# ── what is accepted ─────────────────────────────────────────────────────────────────────────────


def test_a_checkpoint_is_described(glm: Path) -> None:
    """Name, structure, sizes and the digest's files come from what is on disk."""
    checkpoint = load_checkpoint(str(glm))
    assert (checkpoint.path, checkpoint.name) == (glm.resolve(), "my-glm")
    assert (checkpoint.model_type, checkpoint.architecture) == ("glm", "GlmForCausalLM")
    assert (checkpoint.context_tokens, checkpoint.vocab_size) == (512, VOCAB_SIZE)
    assert checkpoint.weight_dtype == "fp32"
    assert checkpoint.weight_bytes == (glm / "model.safetensors").stat().st_size
    assert not checkpoint.trust_remote_code
    digests = {file.path: file.sha256 for file in checkpoint.files}
    assert digests["model.safetensors"] == sha256_file(glm / "model.safetensors")
    assert {"config.json", "generation_config.json", "tokenizer.json"} < set(digests)


@pytest.mark.parametrize("model_type", ["glm4", "llama", "qwen3"])
def test_other_families_are_accepted(model_type: str, tmp_path: Path) -> None:
    """Any causal language model that transformers knows is a checkpoint."""
    directory = build_checkpoint(tmp_path / model_type, model_type)
    assert load_checkpoint(str(directory)).model_type == model_type


def test_the_digest_follows_the_content_only(glm: Path, tmp_path: Path) -> None:
    """A README or another place changes nothing; one weight or one tokenizer entry changes the digest."""
    digest = load_checkpoint(str(glm)).digest
    (glm / "README.md").write_text("notes")
    moved = glm.rename(tmp_path / "elsewhere")
    assert load_checkpoint(str(moved)).digest == digest
    flip_bit("model.safetensors", -1000)(moved)
    other_weights = load_checkpoint(str(moved)).digest
    configure(pad_token_id=3)(moved)
    assert len({digest, other_weights, load_checkpoint(str(moved)).digest}) == 3


def test_a_sharded_checkpoint_is_accepted(glm: Path) -> None:
    """Shards count together, and the index is part of the digest."""
    shard(glm)
    checkpoint = load_checkpoint(str(glm))
    shards = sum(file.stat().st_size for file in glm.glob("part-*"))
    assert checkpoint.weight_bytes == shards
    assert "model.safetensors.index.json" in {file.path for file in checkpoint.files}


def test_checksums_that_match_are_accepted(glm: Path) -> None:
    """`sha256sum ./*` beside an intact checkpoint is fine."""
    write_sums(glm)
    assert load_checkpoint(str(glm)).name == "my-glm"


def test_an_allowed_pickle_becomes_a_safetensors_copy(glm: Path, tmp_path: Path) -> None:
    """The copy in the cache holds the same tensors, is the checkpoint from then on, and is made once."""
    expected = load_file(glm / "model.safetensors")
    to_pickle(glm)
    cache = tmp_path / "cache"
    checkpoint = load_checkpoint(str(glm), allow_pickle=True, cache=cache)
    assert checkpoint.path.parent == cache
    assert checkpoint.name == "my-glm"
    (weights,) = checkpoint.path.glob("*.safetensors")
    assert {name: tensor.tolist() for name, tensor in load_file(weights).items()} == {
        name: tensor.tolist() for name, tensor in expected.items()
    }
    written = weights.stat().st_mtime_ns
    assert load_checkpoint(str(glm), allow_pickle=True, cache=cache) == checkpoint
    assert weights.stat().st_mtime_ns == written


class Intruder:
    """Runs code when unpickled, as any pickle may."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return Path.touch, (self.target,)


def test_an_allowed_pickle_still_runs_no_code(glm: Path, tmp_path: Path) -> None:
    """A pickle that holds more than tensors is refused, its code does not run, and nothing is left."""
    to_pickle(glm)
    victim, cache = tmp_path / "victim", tmp_path / "cache"
    with (glm / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"weight": Intruder(victim)}, file, protocol=2)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is damaged or holds more than tensors"):
        load_checkpoint(str(glm), allow_pickle=True, cache=cache)
    assert not victim.exists()
    assert list(cache.iterdir()) == []


def test_remote_code_runs_only_when_trusted(
    glm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the opt-in, the checkpoint's own config class is used and its code joins the digest."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    code = "from transformers import LlamaConfig\nclass Glm99Config(LlamaConfig):\n    model_type = 'glm99'\n"
    (glm / "configuration_glm99.py").write_text(code)
    configure(
        model_type="glm99",
        architectures=["Glm99ForCausalLM"],
        auto_map={"AutoConfig": "configuration_glm99.Glm99Config"},
    )(glm)
    assert "--trust-remote-code" in refusal(glm)
    assert not (tmp_path / "modules").exists()
    checkpoint = load_checkpoint(str(glm), trust_remote_code=True)
    assert (checkpoint.model_type, checkpoint.architecture) == ("glm99", "Glm99ForCausalLM")
    assert checkpoint.trust_remote_code
    assert "configuration_glm99.py" in {file.path for file in checkpoint.files}


def test_trust_is_not_used_where_it_is_not_needed(glm: Path) -> None:
    """A model type that transformers knows is loaded by transformers even if remote code is allowed."""
    configure(auto_map={"AutoConfig": "configuration_evil.Config"})(glm)
    assert not load_checkpoint(str(glm), trust_remote_code=True).trust_remote_code
