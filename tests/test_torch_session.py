"""What torch's sessions for a GPU do, as far as the CPU can do it too: a static cache, 16 bits, 8-bit floats,
and a graph of its own for single tokens. And what is proposed for which GPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from studies import demo_analysis, demo_hardware
from tiny_models import VOCAB_SIZE

from open_autoglm import engines
from open_autoglm.engines import torch_engine
from open_autoglm.engines.contract import Session, SessionOptions
from open_autoglm.engines.torch_session import TorchSession, _by_length, _graphs_skipped
from open_autoglm.schemas import Candidate, ExportedModel, Gpu, Knob, OptimizeSpec

ROWS, PROMPT, LENGTH = 2, 20, 28
OPTIONS = SessionOptions(batch_size=ROWS, max_tokens=LENGTH, threads=1)
TOKENS = np.random.default_rng(5).integers(4, VOCAB_SIZE, (ROWS, LENGTH))
SPEC = OptimizeSpec(model_path="x")


def proposed(capability: str | None = "9.0") -> dict[str, Candidate]:
    gpu = Gpu(name="some GPU", memory_bytes=2**36, driver="580.65.06", compute_capability=capability)
    analysis = demo_analysis().model_copy(update={"hardware": demo_hardware(gpus=(gpu,), gpu_reason="")})
    return {c.id: c for c in engines.get("torch").propose(analysis, SPEC, "gpu")}


@pytest.fixture
def complete(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with everything that a GPU's candidates need besides the GPU."""
    for missing in ("_missing_triton", "_missing_compiler", "missing_torchao"):
        monkeypatch.setattr(torch_engine, missing, lambda: None)


def opened(name: str, checkpoint: Path, **knobs: Knob) -> Session:
    """A candidate for a GPU, on the CPU and not compiled."""
    candidate = proposed()[name]
    update = {"device": "cpu", "knobs": {**candidate.knobs, "compile": False, **knobs}}
    exported = ExportedModel(candidate_id=name, path=checkpoint, digest="", route="", size_bytes=0, build_s=0)
    return engines.get("torch").open(candidate.model_copy(update=update), exported, OPTIONS)


def decoded(session: Session, tokens: Any = TOKENS) -> Any:
    steps = [session.prefill(tokens[:, :PROMPT])]
    steps += [session.decode(tokens[:, place]) for place in range(PROMPT, LENGTH)]
    return np.stack(steps, axis=1)


# ── candidates ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("complete")
def test_on_a_gpu_there_are_two_kinds_of_16_bits_and_two_of_8() -> None:
    """Eager and compiled; nothing is vetoed on a Hopper."""
    found = proposed()
    assert list(found) == [
        "torch-cuda-fp32",
        "torch-cuda-bf16",
        "torch-cuda-fp16",
        "torch-cuda-bf16-compile",
        "torch-cuda-fp16-compile",
        "torch-cuda-int8-compile",
        "torch-cuda-fp8-compile",
    ]
    assert [name for name, c in found.items() if c.reference] == ["torch-cuda-fp32"]
    assert [name for name, c in found.items() if c.baseline] == ["torch-cuda-bf16-compile"]
    assert not any(c.vetoed_because for c in found.values())
    assert {c.knobs["kv_cache"] for c in found.values()} == {"static"}


@pytest.mark.usefixtures("complete")
@pytest.mark.parametrize(
    ("capability", "vetoed"),
    [
        (None, set()),
        ("8.9", set()),
        ("8.6", {"fp8-compile"}),
        ("7.5", {"bf16", "bf16-compile", "int8-compile", "fp8-compile"}),
    ],
)
def test_what_an_older_gpu_cannot_compute_is_vetoed(capability: str | None, vetoed: set[str]) -> None:
    """fp8 since Ada; bf16, and what is computed in it, since Ampere; a GPU that does not tell gets a try."""
    found = proposed(capability)
    reasons = {name: c.vetoed_because for name, c in found.items() if c.vetoed_because}
    assert set(reasons) == {f"torch-cuda-{name}" for name in vetoed}
    assert all(f"some GPU has {capability}" in str(reason) for reason in reasons.values())


def test_graphs_need_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's absence is a veto of what is compiled, and of nothing else."""
    monkeypatch.setattr(torch_engine, "_missing_triton", lambda: "no triton")
    found = proposed()
    assert {name for name, c in found.items() if c.vetoed_because == "no triton"} >= {
        "torch-cuda-bf16-compile",
        "torch-cuda-fp16-compile",
    }
    assert found["torch-cuda-bf16"].vetoed_because is None


@pytest.mark.usefixtures("complete")
def test_the_search_may_turn_cuda_graphs_off() -> None:
    """Where something is compiled and is no yardstick."""
    engine, found = engines.get("torch"), proposed()
    spaces = {
        name: [(d.knob, d.values) for d in engine.dimensions(c, demo_analysis(), SPEC)]
        for name, c in found.items()
    }
    turned = {"torch-cuda-fp16-compile", "torch-cuda-int8-compile", "torch-cuda-fp8-compile"}
    assert {name for name, space in spaces.items() if space} == turned
    assert spaces["torch-cuda-fp16-compile"] == [("cuda_graphs", (True, False))]
    without = engine.variant(found["torch-cuda-fp16-compile"], {"cuda_graphs": False})
    assert without.id == "torch-cuda-fp16-compile-nograph"
    assert engine.variant(without, {"cuda_graphs": True}).id == "torch-cuda-fp16-compile"


# ── sessions ─────────────────────────────────────────────────────────────────────────────────────


def test_a_static_cache_gives_what_a_growing_one_gives(tiny_glm: Path) -> None:
    """In fp32, in prefill, in decode, for a second prompt and for fewer rows."""
    static = opened("torch-cuda-fp32", tiny_glm)
    growing = opened("torch-cuda-fp32", tiny_glm, kv_cache="growing")
    for tokens in (TOKENS, TOKENS[::-1], TOKENS[:1]):
        np.testing.assert_allclose(decoded(static, tokens), decoded(growing, tokens), atol=1e-4)
        np.testing.assert_allclose(static.full_logits(tokens), growing.full_logits(tokens), atol=1e-4)
    assert (static.facts()["kv_cache"], growing.facts()["kv_cache"]) == ("static", "growing")
    with pytest.raises(ValueError, match=str(LENGTH)):
        static.full_logits(np.tile(TOKENS, 2))


@pytest.mark.parametrize(
    ("name", "dtype", "least"), [("fp16", "float16", 0.99999), ("bf16", "bfloat16", 0.999)]
)
def test_sixteen_bits_are_near_the_reference(name: str, dtype: str, least: float, tiny_glm: Path) -> None:
    """And are what the facts say."""
    expected = decoded(opened("torch-cuda-fp32", tiny_glm))
    session = opened(f"torch-cuda-{name}", tiny_glm)
    found = decoded(session)
    assert found.dtype == np.float32
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > least
    assert session.facts()["dtype"] == dtype


def test_eight_bit_floats_round_every_linear_layer(tiny_glm: Path) -> None:
    """torchao writes them on the CPU too; only a GPU's products read them as they are."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    expected = decoded(opened("torch-cuda-fp32", tiny_glm))
    session = opened("torch-cuda-fp8-compile", tiny_glm)
    assert np.corrcoef(decoded(session).ravel(), expected.ravel())[0, 1] > 0.98
    assert session.facts()["rounded"] == "13 of 13 linear layers"


def test_a_single_token_has_a_graph_of_its_own() -> None:
    """CUDA graphs are recorded for tokens and for nothing longer."""
    compiled: list[dict[str, Any]] = []

    def compile_(forward: Any, **options: Any) -> Any:
        compiled.append(options)
        return lambda **inputs: (options.get("mode", "default"), forward(**inputs))

    forward = _by_length(SimpleNamespace(compile=compile_), lambda input_ids, scale: input_ids * scale)
    for length, mode in ((1, "reduce-overhead"), (2, "default"), (PROMPT, "default")):
        chosen, result = forward(input_ids=TOKENS[:, :length], scale=2)
        assert chosen == mode
        np.testing.assert_array_equal(result, TOKENS[:, :length] * 2)
    assert compiled == [{"dynamic": False}, {"dynamic": False, "mode": "reduce-overhead"}]


def test_a_graph_that_torch_gave_up_is_told(tiny_glm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch only warns, and goes on without: the fact would be a hope."""
    from torch._dynamo.utils import counters

    monkeypatch.setitem(counters["inductor"], "cudagraph_skips", 3)  # by sessions before this one
    session = opened("torch-cuda-fp32", tiny_glm)
    assert isinstance(session, TorchSession)
    session._skipped_before = _graphs_skipped()
    assert session._graphs() == "decode"
    counters["inductor"]["cudagraph_skips"] += 2
    assert session._graphs() == "skipped 2 times"
    session.close()
