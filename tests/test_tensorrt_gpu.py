"""Both TensorRT engines on a real GPU, held against transformers; each is skipped where it cannot run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from demo_host import demo_analysis, demo_hardware
from numpy.typing import NDArray
from tiny_models import VOCAB_SIZE

from open_autoglm import engines
from open_autoglm.checkpoint import load_checkpoint
from open_autoglm.engines.contract import ExportContext, SessionOptions, Tokens, Verifier, room_of
from open_autoglm.export.tensorrt_plan import read_record
from open_autoglm.hardware import find_gpus
from open_autoglm.schemas import Candidate, ExportedModel, Knob, OptimizeSpec

ROWS, PROMPT, LENGTH = 2, 32, 48
SPEC = OptimizeSpec(model_path="x", batch_size=ROWS, prompt_tokens=PROMPT, output_tokens=LENGTH - PROMPT)
OPTIONS = SessionOptions(batch_size=ROWS, max_tokens=LENGTH, threads=1)
TOKENS: Tokens = np.random.default_rng(1).integers(4, VOCAB_SIZE, (ROWS, LENGTH))
LEAST_CORRELATION = {"bf16": 0.999, "fp16": 0.999, "int8": 0.98, "fp8": 0.95, "int4": 0.8}

GPUS = find_gpus().gpus
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPUS, reason="needs an NVIDIA GPU")]
ANALYSIS = demo_analysis().model_copy(update={"hardware": demo_hardware(gpus=GPUS)})
CANDIDATES = [
    candidate
    for name in ("tensorrt", "tensorrt-rtx")
    for candidate in engines.get(name).propose(ANALYSIS, SPEC, "gpu")
]
TURNED: list[dict[str, Knob]] = [
    {"cuda_graph": True},
    {"weight_streaming": True},
    {"tuned_for": "token"},
    {"tuned_for": "prompt"},
]


@pytest.fixture(scope="module")
def truth(tiny_glm: Path) -> NDArray[np.float32]:
    """Logits of ``TOKENS`` by transformers in fp32, without a cache."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_glm, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: NDArray[np.float32] = model(torch.from_numpy(TOKENS)).logits.numpy()
    return logits


def require_ready(candidate: Candidate) -> None:
    if candidate.vetoed_because is not None:
        pytest.skip(candidate.vetoed_because)
    probe = engines.get(candidate.engine).probe("gpu")
    if not probe.ready:
        pytest.skip(f"{candidate.engine}: {probe.reason}")


def variants() -> list[Candidate]:
    """What is proposed, and of the first of each engine what its session does otherwise."""
    plain = [candidate for candidate in CANDIDATES if candidate.id.endswith("-fp16")]
    return CANDIDATES + [engines.get(c.engine).variant(c, knobs) for c in plain for knobs in TURNED]


@pytest.mark.parametrize("candidate", variants(), ids=lambda candidate: candidate.id)
def test_a_plan_answers_as_the_model_does(
    candidate: Candidate, truth: NDArray[np.float32], tiny_glm: Path, tmp_path: Path
) -> None:
    """All positions at once, a prompt and its tokens one by one, several after some were forgotten."""
    require_ready(candidate)
    engine, output = engines.get(candidate.engine), tmp_path / "export"
    output.mkdir()
    context = ExportContext(output=output, ledger=tmp_path / "ledger.json")
    engine.export(candidate, load_checkpoint(str(tiny_glm)), context)
    record = read_record(output)
    assert record.can_run, record.run_reason
    assert record.sizes.cache_tokens == room_of(candidate)
    exported = ExportedModel(
        candidate_id=candidate.id, path=output, digest="", route="", size_bytes=0, build_s=0
    )
    session = engine.open(candidate, exported, OPTIONS)
    least = LEAST_CORRELATION[candidate.precision]

    def assert_true(found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
        assert found.shape == expected.shape
        assert np.isfinite(found).all()
        assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > least

    assert_true(session.full_logits(TOKENS), truth)
    steps = [session.prefill(TOKENS[:, :PROMPT])]
    steps += [session.decode(TOKENS[:, position]) for position in range(PROMPT, LENGTH)]
    assert_true(np.stack(steps, axis=1), truth[:, PROMPT - 1 :])
    assert isinstance(session, Verifier)
    session.prefill(TOKENS[:1, :PROMPT])
    session.extend(TOKENS[1:, :4])
    session.rewind(4)
    assert_true(session.extend(TOKENS[:1, PROMPT:]), truth[:1, PROMPT:])
    assert session.facts()["kv_cache"] == "in_place"
    session.close()
