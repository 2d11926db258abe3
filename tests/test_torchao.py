"""Weights that torchao rounds for the torch engine: what is int8 or int4, what stays, what is missing."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from studies import demo_analysis
from tiny_models import VOCAB_SIZE, build_checkpoint

from open_autoglm import bundle, engines
from open_autoglm.engines import torch_weights
from open_autoglm.engines.contract import Session, SessionOptions
from open_autoglm.engines.torch_weights import missing_torchao, round_linears
from open_autoglm.schemas import Candidate, ExportedModel, OptimizeSpec

INSTALL = "pip install 'open-autoglm[torchao]'"
TOKENS = np.random.default_rng(3).integers(4, VOCAB_SIZE, (1, 40))


def proposed(device: str = "cpu") -> dict[str, Candidate]:
    found = engines.get("torch").propose(demo_analysis(), OptimizeSpec(model_path="x"), device)  # type: ignore[arg-type]
    return {candidate.id: candidate for candidate in found}


def opened(candidate: Candidate, path: Path) -> Session:
    """The candidate without compiling, which takes half a minute and is checked with the contract."""
    eager = candidate.model_copy(update={"knobs": {**candidate.knobs, "compile": False}})
    exported = ExportedModel(
        candidate_id=candidate.id, path=path, digest="", route="", size_bytes=0, build_s=0
    )
    options = SessionOptions(batch_size=1, max_tokens=TOKENS.shape[1], threads=1)
    return engines.get("torch").open(eager, exported, options)


def load(path: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()


def stored_bytes(model: Any) -> int:
    """Of every weight as it lies in memory; what is shared counts once."""
    parts = {}
    for weight in model.parameters():
        names = weight.__tensor_flatten__()[0] if hasattr(weight, "qdata") else [None]
        for name in names:
            tensor = weight if name is None else getattr(weight, name)
            parts[tensor.data_ptr()] = tensor.nbytes
    return sum(parts.values())


# ── without torchao ──────────────────────────────────────────────────────────────────────────────


def test_without_torchao_its_candidates_are_vetoed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the command that installs it; the others stay."""

    def absent(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(torch_weights, "version", absent)
    vetoed = {name: c.vetoed_because for name, c in proposed().items() if c.vetoed_because}
    assert list(vetoed) == ["torch-int8-compile", "torch-int4-compile"]
    assert all(f"not installed; mend it with: {INSTALL}" in str(reason) for reason in vetoed.values())


def test_an_older_torchao_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layouts are others."""
    monkeypatch.setattr(torch_weights, "version", lambda _: "0.17.2")
    reason = missing_torchao()
    assert reason is not None
    assert reason.startswith("torchao 0.17.2 is older than 0.18")
    assert reason.endswith(INSTALL)
    monkeypatch.setattr(torch_weights, "version", lambda _: "0.18.0+cpu")
    assert missing_torchao() is None


# ── candidates ───────────────────────────────────────────────────────────────────────────────────


def test_the_yardsticks_are_what_they_were() -> None:
    """Same reference, same baseline, none of them rounded."""
    found = proposed()
    assert [name for name, c in found.items() if c.reference] == ["torch-fp32"]
    assert [name for name, c in found.items() if c.baseline] == ["torch-bf16-compile"]
    assert found["torch-bf16-compile"].knobs == {"compile": True, "threads": "all"}


@pytest.mark.parametrize(
    ("start", "knobs", "name", "bits"),
    [
        ("torch-int8-compile", {"threads": 1}, "torch-int8-compile-t1", 8),
        ("torch-int4-compile", {}, "torch-int4-compile", 5),
        ("torch-int4-compile", {"group_size": 128, "threads": 1}, "torch-int4-g128-compile-t1", 4.25),
    ],
)
def test_ids_name_what_is_not_the_default(start: str, knobs: dict[str, Any], name: str, bits: float) -> None:
    """The group at int4; its scale and zero count as bits."""
    found = engines.get("torch").variant(proposed()[start], knobs)
    assert (found.id, found.weight_bits) == (name, bits)


def test_int4_needs_groups_that_divide_every_layers_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or some layers would silently stay bf16: 576 inputs are no multiple of 128, 48 of no group."""
    monkeypatch.setattr(torch_weights, "version", lambda _: "0.18.0")
    analysis, spec, engine = demo_analysis(), OptimizeSpec(model_path="x"), engines.get("torch")
    start = proposed()["torch-int4-compile"]
    values = {d.knob: d.values for d in engine.dimensions(start, analysis, spec)}
    assert values["group_size"] == (32, 64)
    narrow = analysis.profile.model_copy(update={"hidden_size": 48})
    narrowed = analysis.model_copy(update={"profile": narrow})
    vetoes = {c.precision: c.vetoed_because for c in engine.propose(narrowed, spec, "cpu")}
    assert "no multiples of 32" in str(vetoes["int4"])


@pytest.mark.parametrize(
    "name", ["torch-fp32", "torch-bf16-compile", "torch-int8-compile", "torch-int4-compile"]
)
def test_a_bundle_asks_for_torchao_where_weights_are_rounded(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are the checkpoint's: without torchao a server could not make int8 of them."""
    monkeypatch.setattr(bundle, "version", lambda package: f"{package} 1")
    candidate = proposed()[name]
    needed = bundle._installed_versions(candidate)
    assert "torch" in needed
    assert ("torchao" in needed) == (candidate.precision in ("int8", "int4"))


# ── with torchao ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GLM whose head is its embedding."""
    return build_checkpoint(tmp_path_factory.mktemp("tied") / "glm", "glm", tie_word_embeddings=True)


def test_linears_are_int8_and_the_embedding_is_not(tied: Path) -> None:
    """A row is its integers times its scale to within half a step; a tied head has weights of its own."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    import torch

    exact, model = load(tied), load(tied)
    told = round_linears(model, "int8", 0)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert told == f"{len(linears)} of {len(linears)} linear layers"
    for name, linear in linears.items():
        integers, scale = linear.weight.qdata, linear.weight.scale
        assert integers.dtype == torch.int8
        original = exact.get_submodule(name).weight.float()
        assert ((integers.float() * scale - original).abs() <= 0.501 * scale).all()
    assert "lm_head" in linears
    embedding = model.get_input_embeddings().weight
    assert embedding.dtype == torch.bfloat16
    assert torch.equal(embedding, exact.get_input_embeddings().weight)


@pytest.mark.parametrize(("precision", "bits"), [("int8", 9), ("int4", 6)])
def test_memory_is_what_the_bits_say(tiny_glm: Path, precision: Any, bits: float) -> None:
    """Linear layers shrink to their bits, scales included, the rest does not grow."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    import torch

    model = load(tiny_glm)
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    rest = stored_bytes(model) - 2 * weights
    round_linears(model, precision, 32)
    assert stored_bytes(model) - rest <= weights * bits / 8


def test_a_layer_that_no_group_fits_keeps_its_weights(tiny_glm: Path) -> None:
    """160 inputs are no multiple of 64, so the two down-projections stay; and it is told."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    assert round_linears(load(tiny_glm), "int4", 64) == "11 of 13 linear layers"
    with pytest.raises(RuntimeError, match="no linear layer has a multiple of 256"):
        round_linears(load(tiny_glm), "int4", 256)


@pytest.mark.parametrize(("name", "least"), [("torch-int8-compile", 0.998), ("torch-int4-compile", 0.9)])
def test_rounded_weights_answer_like_the_model(tied: Path, name: str, least: float) -> None:
    """Near fp32 in prefill and in decode, and the facts say what was rounded."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    session, exact = opened(proposed()[name], tied), opened(proposed()["torch-fp32"], tied)
    expected = exact.full_logits(TOKENS)[:, -1]
    session.prefill(TOKENS[:, :-1])
    for found in (session.decode(TOKENS[:, -1]), session.prefill(TOKENS)):
        assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > least
    facts = session.facts()
    assert facts["rounded"] == "13 of 13 linear layers"
    assert "rounded" not in exact.facts()


def test_an_installed_torchao_is_not_heard() -> None:
    """transformers imports it in the terminal's own process: its warnings would stand above every answer."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    code = "import open_autoglm, torchao.quantization"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (said.stdout, said.stderr) == ("", "")
