"""llama.cpp as an engine: what it proposes, and sessions that compute what transformers computes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader
from numpy.typing import NDArray
from studies import demo_analysis, demo_hardware, demo_profile
from tiny_models import VOCAB_SIZE, build_checkpoint

from open_autoglm.checkpoint import load_checkpoint
from open_autoglm.engines import llamacpp_engine
from open_autoglm.engines.contract import SessionOptions, Tokens
from open_autoglm.engines.llamacpp_engine import LlamaCppEngine, LlamaCppSession
from open_autoglm.export.gguf_quantize import MODEL, export_gguf
from open_autoglm.planning import plan
from open_autoglm.schemas import Analysis, Candidate, Checkpoint, ExportedModel, OptimizeSpec

ENGINE = LlamaCppEngine()
SPEC = OptimizeSpec(model_path="x")
ROWS, PROMPT, LENGTH = 2, 32, 48
OPTIONS = SessionOptions(batch_size=ROWS, max_tokens=LENGTH, threads=1)
TOKENS: Tokens = np.random.default_rng(1).integers(4, VOCAB_SIZE, (ROWS, LENGTH))
EXACT = {"attention": "exact"}
"""Otherwise llama.cpp rounds to fp16 on the way through the attention."""

PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

Numbers = NDArray[np.float32]


def analysed(isa: tuple[str, ...] = ("avx2",), **profile: Any) -> Analysis:
    """The demo's analysis on two cores with these instructions, with entries of its profile changed."""
    changes = {
        "profile": demo_profile().model_copy(update=profile),
        "hardware": demo_hardware(isa=isa, cores=2),
    }
    return demo_analysis().model_copy(update=changes)


def proposed(analysis: Analysis | None = None) -> dict[str, Candidate]:
    return {c.id: c for c in ENGINE.propose(analysis or analysed(), SPEC, "cpu")}


def space(name: str, spec: OptimizeSpec = SPEC, **profile: Any) -> dict[str, Any]:
    """The values of each dimension by knob."""
    found = ENGINE.dimensions(proposed()[name], analysed(**profile), spec)
    return {dimension.knob: dimension.values for dimension in found}


# ── probe ────────────────────────────────────────────────────────────────────────────────────────


def test_a_missing_package_is_a_veto_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """It also says what the command will need, since pip compiles."""

    def absent(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(llamacpp_engine, "version", absent)
    probe = ENGINE.probe("cpu")
    assert (probe.stage, probe.install) == ("missing", "pip install 'open-autoglm[llamacpp]'")
    assert "five minutes, with a C++ compiler and cmake" in probe.reason
    spec = OptimizeSpec(model_path="x", engines=("llamacpp",))
    vetoes = [candidate.vetoed_because for candidate in plan(demo_analysis(), spec, "cpu")]
    assert len(vetoes) == len(proposed())
    assert all(veto is not None and "open-autoglm[llamacpp]" in veto for veto in vetoes)


def test_an_older_package_is_not_driven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its structures have other fields: memory would be read as something else."""
    monkeypatch.setattr(llamacpp_engine, "version", lambda _: "0.3.16")
    probe = ENGINE.probe("cpu")
    assert (probe.stage, probe.version) == ("installed", "0.3.16")
    assert "older than 0.3.36" in probe.reason


def test_a_gpu_is_for_others() -> None:
    """llama.cpp has GPU backends; this engine asks for none of them."""
    assert ENGINE.probe("gpu").stage == "no_device"


# ── candidates ───────────────────────────────────────────────────────────────────────────────────


def test_start_candidates_keep_their_names() -> None:
    """Ids name directories and MLflow runs; 16 bits are those that the CPU computes with."""
    assert list(proposed()) == ["llamacpp-f16", "llamacpp-q8-0", "llamacpp-q4-0"]
    assert "llamacpp-bf16" in proposed(analysed(isa=("avx2", "avx512_bf16")))


def test_a_name_tells_what_is_not_the_default() -> None:
    """The file type always, the session's knobs as suffixes."""
    knobs = {"file_type": "IQ4_NL", "threads": 1, "attention": "flash-q8", "ubatch": 128, "mmap": False}
    found = ENGINE.variant(proposed()["llamacpp-q4-0"], knobs)
    assert found.id == "llamacpp-iq4-nl-t1-flash-q8-u128-nommap"


def test_what_cannot_be_written_is_vetoed() -> None:
    """In the plan, with the writer's reason, before an export is tried."""
    found = proposed(analysed(model_type="phi3"))
    assert {c.vetoed_because for c in found.values()} == {
        "no GGUF is written for model type 'phi3', only for glm, glm4, llama, qwen3"
    }


def test_only_what_trades_something_is_turned() -> None:
    """Block formats at 4 bits, blocks only of a size that fits, memory where it counts."""
    session: dict[str, Any] = {"threads": ("all", 1), "attention": ("flash", "flash-q8", "plain")}
    session["draft_tokens"] = (0, 7)
    assert space("llamacpp-q8-0") == session
    assert space("llamacpp-q4-0") == {"file_type": ("Q4_0", "Q4_1", "IQ4_NL"), **session}
    assert space("llamacpp-q4-0", hidden_size=4096)["file_type"] == ("Q4_0", "Q4_1", "IQ4_NL", "Q4_K_M")
    assert space("llamacpp-q8-0", head_dim=80)["attention"] == ("flash", "plain")
    memory = {"ubatch": (512, 128), "mmap": (True, False)}
    assert space("llamacpp-q8-0", OptimizeSpec(model_path="x", max_memory="1GiB")) == {**session, **memory}


@pytest.mark.parametrize("file_type", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "IQ4_NL"])
def test_weight_bits_are_the_formats(file_type: str) -> None:
    """Block and scales, as the format's own library counts them."""
    found = ENGINE.variant(proposed()["llamacpp-f16"], {"file_type": file_type})
    weights, size_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[file_type]]
    assert found.weight_bits == 8 * size_bytes / weights


# ── sessions ─────────────────────────────────────────────────────────────────────────────────────


def need_llama_cpp() -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra llamacpp)")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tiny GLM's export as a file type, made once."""
    need_llama_cpp()
    checkpoint = load_checkpoint(str(build_checkpoint(tmp_path_factory.mktemp("glm") / "it", "glm")))

    @cache
    def export(file_type: str) -> Path:
        directory = tmp_path_factory.mktemp(file_type)
        export_gguf(checkpoint, file_type, directory)
        return directory

    return export


def transformers_logits(checkpoint: Checkpoint) -> Numbers:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: Numbers = model(torch.from_numpy(TOKENS)).logits.numpy()
    return logits


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("glm", {}),
        ("glm", {"tie_word_embeddings": True, "attention_bias": False}),
        ("glm", {"rope_parameters": {**PLAIN, "partial_rotary_factor": 1.0}}),
        ("glm4", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("llama", {"rope_parameters": {**PLAIN, "rope_type": "linear", "factor": 4.0}}),
        ("qwen3", {}),
    ],
    ids=["glm", "glm-tied", "glm-whole", "glm4", "llama-bias", "llama3", "llama-linear", "qwen3"],
)
def test_every_form_computes_what_transformers_computes(
    model_type: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    """In fp32, every position at once and one token at a time, two rows: the writing loses nothing."""
    need_llama_cpp()
    checkpoint = load_checkpoint(str(build_checkpoint(tmp_path / "it", model_type, **overrides)))
    export_gguf(checkpoint, "F32", tmp_path)
    expected = transformers_logits(checkpoint)
    session = LlamaCppSession(tmp_path / MODEL, OPTIONS, EXACT)
    at_once = session.full_logits(TOKENS)
    steps = [session.prefill(TOKENS[:, :PROMPT])]
    steps += [session.decode(TOKENS[:, position]) for position in range(PROMPT, LENGTH)]
    session.close()
    np.testing.assert_allclose(at_once, expected, atol=1e-4)
    np.testing.assert_allclose(np.stack(steps, axis=1), expected[:, PROMPT - 1 :], atol=1e-4)


def test_a_4_bit_file_has_a_finer_head(exported: Callable[[str], Path]) -> None:
    """llama.cpp's choice: matrices in the type asked for, the head in 6 or 8 bits, vectors in fp32."""
    types = {t.name: t.tensor_type.name for t in GGUFReader(exported("Q4_0") / MODEL).tensors}
    assert types["blk.0.ffn_down.weight"] == "Q4_0"
    assert types["output.weight"] == "Q8_0"  # Q6_K, if 256 divided its rows
    assert types["blk.0.attn_norm.weight"] == types["blk.0.attn_q.bias"] == "F32"


def test_the_fp32_file_does_not_stay(exported: Callable[[str], Path]) -> None:
    """An export holds what is served and no more."""
    assert [file.name for file in exported("Q8_0").iterdir()] == [MODEL]


def test_knobs_reach_the_runtime(exported: Callable[[str], Path]) -> None:
    """What llama.cpp says of its context and file is what the candidate asks for."""
    knobs = {"threads": 1, "attention": "plain", "ubatch": 128, "mmap": False}
    start = proposed()["llamacpp-q8-0"]
    model = ExportedModel(
        candidate_id=start.id, path=exported("Q8_0"), digest="", route="", size_bytes=0, build_s=0
    )
    options = SessionOptions(batch_size=1, max_tokens=1024, threads=2)
    told = ("file_type", "threads", "flash_attention", "kv_cache", "ubatch", "weights")
    for candidate, expected in (
        (start, ("Q8_0", "2", "on", "f16", "512", "mapped")),
        (ENGINE.variant(start, knobs), ("Q8_0", "1", "off", "f16", "128", "read")),
    ):
        session = ENGINE.open(candidate, model, options)
        facts = session.facts()
        session.close()
        assert tuple(facts[name] for name in told) == expected


def test_a_broken_file_is_refused_in_llama_cpps_words(tmp_path: Path) -> None:
    """The reason becomes the trial's, so it must say more than that it failed."""
    need_llama_cpp()
    (tmp_path / MODEL).write_bytes(b"not a model")
    with pytest.raises(RuntimeError, match=r"could not load model\.gguf: .*"):
        LlamaCppSession(tmp_path / MODEL, OPTIONS)


def test_a_token_outside_the_vocabulary_is_an_error(exported: Callable[[str], Path]) -> None:
    """llama.cpp refuses the call; the first of its reasons names the token."""
    session = LlamaCppSession(exported("Q8_0") / MODEL, OPTIONS)
    with pytest.raises(RuntimeError, match="invalid token"):
        session.prefill(np.full((1, 4), VOCAB_SIZE + 7))
    session.close()
