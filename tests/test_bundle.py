"""A bundle is whole or refused, the same winner is the same bundle, and it says what the model says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import openable_study
from tiny_models import build_checkpoint, build_tokenizer

from open_autoglm import engines
from open_autoglm.bundle import MANIFEST, BundleModel, build_bundle, generate, open_bundle, open_tokenizer
from open_autoglm.engines.contract import Logits, Tokens
from open_autoglm.errors import CheckpointError, UserError
from open_autoglm.schemas import ExportedModel, Probe, Study, Trial

PROMPTS = ["The capital of France is", "A model reads", "1, 12, 144"]


@pytest.fixture(scope="module")
def study(tiny_glm: Path) -> Study:
    return openable_study(tiny_glm)


@pytest.fixture(scope="module")
def shared_bundle(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle no test may change."""
    return build_bundle(study, champion(study), tmp_path_factory.mktemp("bundles") / "bundle").path


@pytest.fixture
def bundle(shared_bundle: Path, tmp_path: Path) -> Path:
    """A bundle to damage."""
    return Path(shutil.copytree(shared_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def model(shared_bundle: Path) -> Iterator[BundleModel]:
    model = BundleModel(shared_bundle)
    yield model
    model.close()


def champion(study: Study) -> Trial:
    return study.trial(study.champion or "")


def with_export(study: Study, directory: Path) -> Trial:
    """The champion as if an engine had exported it to ``directory``."""
    exported = ExportedModel(
        candidate_id="x", path=directory, digest="d", route="genai", size_bytes=4, build_s=1.5
    )
    return champion(study).model_copy(update={"exported": exported})


def test_holds_what_is_needed_to_serve_and_to_judge_it(study: Study, shared_bundle: Path) -> None:
    """The manifest names the candidate, its files, the versions and the figures it was chosen by."""
    manifest, described = open_bundle(shared_bundle)
    listed = {file.path for file in manifest.files}
    assert {"model/model.safetensors", "model/config.json", "tokenizer/tokenizer.json"} <= listed
    assert {
        "tokenizer/config.json",
        "tokenizer/generation_config.json",
        "tokenizer/chat_template.jinja",
    } <= listed
    assert "tokenizer/model.safetensors" not in listed
    assert manifest.candidate == champion(study).candidate
    assert manifest.exported.path == Path("model")
    assert {"python", "open-autoglm", "torch", "transformers"} <= manifest.versions.keys()
    assert "onnxruntime" not in manifest.versions
    assert manifest.evidence["metrics"]["ttft_ms"]["median"] == champion(study).metrics["ttft_ms"].median
    assert manifest.evidence["quality"]["ratio"] == 1
    capsule = champion(study).capsule
    assert capsule is not None
    assert manifest.evidence["host"] == capsule.host
    on_disk = sum(path.stat().st_size for path in shared_bundle.rglob("*") if path.is_file())
    assert described.size_bytes == on_disk - (shared_bundle / MANIFEST).stat().st_size


def test_digest_is_of_content_only(study: Study, tmp_path: Path) -> None:
    """Another study that chose the same files and knobs has the same digest; other knobs have another."""
    first = build_bundle(study, champion(study), tmp_path / "a")
    later = study.model_copy(update={"id": "another-study", "created": datetime(2027, 1, 1, tzinfo=UTC)})
    reworded = champion(study).candidate.model_copy(update={"proposed_because": "a fresh bound of 12.3 ms"})
    again = build_bundle(later, champion(study).model_copy(update={"candidate": reworded}), tmp_path / "b")
    other = champion(study).candidate.model_copy(update={"knobs": {"compile": True}})
    differs = build_bundle(study, champion(study).model_copy(update={"candidate": other}), tmp_path / "c")
    assert first.digest == again.digest == open_bundle(tmp_path / "b")[1].digest
    assert first.digest != differs.digest


def test_exports_are_linked_without_the_stores_notes(study: Study, tmp_path: Path) -> None:
    """Exported weights take no second place on the disk, and a rebuilt export gives the same digest."""
    export = tmp_path / "export"
    export.mkdir()
    (export / "model.onnx").write_bytes(b"onnx")
    (export / "export.json").write_text('{"build_s": 1.5}')
    first = build_bundle(study, with_export(study, export), tmp_path / "bundle")
    (export / "export.json").write_text('{"build_s": 1.7}')
    again = build_bundle(study, with_export(study, export), tmp_path / "again")
    assert (tmp_path / "bundle/model/model.onnx").samefile(export / "model.onnx")
    assert [path.name for path in (tmp_path / "bundle/model").iterdir()] == ["model.onnx"]
    assert first.digest == again.digest


def test_exports_on_another_file_system_are_copied(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no link is possible the bundle is still whole."""

    def no_links(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    (tmp_path / "export").mkdir()
    (tmp_path / "export/model.onnx").write_bytes(b"onnx")
    monkeypatch.setattr(os, "link", no_links)
    build_bundle(study, with_export(study, tmp_path / "export"), tmp_path / "bundle")
    assert (tmp_path / "bundle/model/model.onnx").read_bytes() == b"onnx"


def test_checkpoint_changed_since_the_study_is_refused(tiny_glm: Path, tmp_path: Path) -> None:
    """Weights that were overwritten after they were measured are not bundled, and no half bundle stays."""
    checkpoint = Path(shutil.copytree(tiny_glm, tmp_path / "checkpoint"))
    study = openable_study(checkpoint)
    build_checkpoint(checkpoint, "glm", seed=1)
    with pytest.raises(CheckpointError, match=r"model\.safetensors has changed"):
        build_bundle(study, champion(study), tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def flip_a_bit(bundle: Path) -> None:
    path = bundle / "model/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def set_version(bundle: Path) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps({**manifest, "format_version": 99}))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (flip_a_bit, r"model/model\.safetensors is damaged"),
        (lambda b: (b / "tokenizer/tokenizer.json").unlink(), r"tokenizer/tokenizer\.json is missing"),
        (lambda b: (b / "model/extra.py").write_text("1"), r"model/extra\.py is not listed"),
        (lambda b: (b / MANIFEST).unlink(), "is not a bundle"),
        (lambda b: (b / MANIFEST).write_text("{"), r"manifest\.json is damaged"),
        (lambda b: (b / MANIFEST).write_text("[1]"), r"manifest\.json is damaged"),
        (set_version, "has format version 99"),
    ],
)
def test_damage_is_named(bundle: Path, damage: Callable[[Path], Any], sentence: str) -> None:
    """A bundle that is not as it was built is refused, and the sentence names the file."""
    damage(bundle)
    with pytest.raises(UserError, match=sentence):
        open_bundle(bundle)


def test_says_what_the_model_says(model: BundleModel, tiny_glm: Path) -> None:
    """Greedy text equals that of transformers' own generate, prompt by prompt."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reference = AutoModelForCausalLM.from_pretrained(tiny_glm, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_glm)
    expected = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        answer = reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
        )
        expected.append(tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True))
    assert model.generate(PROMPTS, max_new_tokens=12) == expected
    assert all(expected)


def test_speaks_from_several_threads(model: BundleModel) -> None:
    """Calls that come at once answer as if they had come one after the other."""
    alone = [model.generate([prompt], 8) for prompt in PROMPTS]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda prompt: model.generate([prompt], 8), PROMPTS * 4))
    assert together == alone * 4


def test_moved_bundle_ends_where_its_generation_config_says(tiny_glm: Path, tmp_path: Path) -> None:
    """A bundle opens without the checkpoint, in another place, and its end token is that of the config."""
    checkpoint = Path(shutil.copytree(tiny_glm, tmp_path / "checkpoint"))
    config = json.loads((checkpoint / "generation_config.json").read_text())
    everything = list(range(512))
    (checkpoint / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": everything}))
    study = openable_study(checkpoint)
    build_bundle(study, champion(study), tmp_path / "bundle")
    shutil.rmtree(checkpoint)
    (tmp_path / "bundle").rename(tmp_path / "moved")
    assert BundleModel(tmp_path / "moved").generate(["Hello"]) == [""]


def test_a_cache_of_one_size_limits_what_is_served(study: Study, tmp_path: Path) -> None:
    """Files that were built for 64 tokens serve 64, not the 4096 that others do."""
    won = champion(study)
    candidate = won.candidate.model_copy(update={"knobs": {**won.candidate.knobs, "cache_tokens": 64}})
    build_bundle(study, won.model_copy(update={"candidate": candidate}), tmp_path / "bundle")
    model = BundleModel(tmp_path / "bundle")
    assert model.max_tokens == 64
    model.close()


def test_prompts_that_do_not_fit_are_refused_with_the_numbers(model: BundleModel) -> None:
    """The room is the model's context, and the refusal counts the tokens."""
    assert model.max_tokens == 512
    with pytest.raises(UserError, match=r"prompt 2 has \d+ tokens and 64 new .* room for 512"):
        model.generate(["Hello", "word " * 500])
    with pytest.raises(UserError, match="prompt 1 is empty"):
        model.generate([""])
    with pytest.raises(UserError, match="max_new_tokens is 0"):
        model.generate(["Hello"], max_new_tokens=0)


def test_missing_runtime_is_said_at_once(shared_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the engine cannot run, opening says what is missing and how to get it."""
    engine = engines.get("torch")
    missing = Probe(
        engine="torch", stage="missing", reason="torch is not installed", install="pip install torch"
    )
    monkeypatch.setattr(engine, "probe", lambda _device: missing)
    with pytest.raises(UserError, match=r"needs the engine torch: torch is not installed.*pip install torch"):
        BundleModel(shared_bundle)


class Script:
    """A session that says the tokens it was given, and counts how it is called."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = iter(tokens)
        self.decoded: list[int] = []

    def _next(self) -> Logits:
        return np.eye(512, dtype=np.float32)[[next(self._tokens)]]

    def prefill(self, tokens: Tokens) -> Logits:
        assert tokens.shape[0] == 1
        assert tokens.dtype == np.int64
        return self._next()

    def decode(self, tokens: Tokens) -> Logits:
        self.decoded.append(int(tokens[0]))
        return self._next()

    full_logits = prefill

    def facts(self) -> dict[str, str]:
        return {}

    def close(self) -> None:
        return None


@pytest.mark.parametrize(
    ("said", "limit", "fed_back"),
    [
        ([40, 41, 1], 10, [40, 41]),  # the end token ends it
        ([40, 41, 42], 3, [40, 41]),  # the limit does, without a decode nobody reads
        ([1], 10, []),
        ([40], 1, []),
    ],
)
def test_generation_stops(said: list[int], limit: int, fed_back: list[int]) -> None:
    """An answer ends at the end token, which is not part of it, or at the limit."""
    tokenizer, session = build_tokenizer(), Script(said)
    answers = generate(session, tokenizer, ["Hello"], limit, {1}, max_tokens=64)
    assert answers == [tokenizer.decode([token for token in said if token != 1])]
    assert session.decoded == fed_back


# ── the tokenizer ────────────────────────────────────────────────────────────────────────────────


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("family", ["glm", "glm4", "llama", "qwen3"])
@pytest.mark.parametrize("named", ["PreTrainedTokenizerFast", "TokenizersBackend"])
def test_the_tokenizer_is_the_one_that_transformers_finds(family: str, named: str, tmp_path: Path) -> None:
    """The same class with the same words, whichever way it was found."""
    from transformers import AutoTokenizer

    build_tokenizer().save_pretrained(tmp_path)
    change_json(tmp_path / "tokenizer_config.json", tokenizer_class=named)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    found = open_tokenizer(tmp_path, trust_remote_code=False)
    expected = AutoTokenizer.from_pretrained(tmp_path)
    assert type(found) is type(expected)
    assert found.init_kwargs == expected.init_kwargs
    assert found.chat_template == expected.chat_template
    assert found.all_special_ids == expected.all_special_ids
    for prompt in PROMPTS:
        ids = found(prompt)["input_ids"]
        assert ids == expected(prompt)["input_ids"]
        assert found.decode(ids) == expected.decode(ids) == prompt


def test_the_tokenizer_of_a_glm_needs_no_torch(shared_bundle: Path) -> None:
    """A server of another runtime would pay for it with memory and with its start."""
    code = (
        "import sys; from pathlib import Path; from open_autoglm.bundle import open_tokenizer; "
        "tokenizer = open_tokenizer(Path(sys.argv[1]), trust_remote_code=False); "
        "tokenizer.apply_chat_template([{'role': 'user', 'content': 'Hello'}], tokenize=False); "
        "print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(shared_bundle / "tokenizer")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False\n"
