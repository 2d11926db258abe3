"""ONNX Runtime's engines for GPUs, as far as a machine without one can tell: what they propose, the files
they write, and that those compute the right thing where the CPU has the kernels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest
from studies import demo_analysis, demo_hardware
from tiny_models import VOCAB_SIZE

from open_autoglm import engines
from open_autoglm.checkpoint import load_checkpoint
from open_autoglm.engines.contract import DRAFT_TOKENS, ExportContext, SessionOptions, Slotted
from open_autoglm.engines.onnxruntime_placement import Placement
from open_autoglm.engines.onnxruntime_session import OnnxRuntimeSession, open_session
from open_autoglm.engines.onnxruntime_tensorrt_engine import tensorrt_placement
from open_autoglm.export.graph import FIRST_LOGITS, GRAPH
from open_autoglm.schemas import Analysis, Candidate, Gpu, OptimizeSpec

CUDA, TENSORRT = "onnxruntime-cuda", "onnxruntime-tensorrt"
ROWS, PROMPT, LENGTH = 2, 20, 28
OPTIONS = SessionOptions(batch_size=ROWS, max_tokens=LENGTH, threads=1)
TOKENS = np.random.default_rng(5).integers(4, VOCAB_SIZE, (ROWS, LENGTH))
SPEC = OptimizeSpec(model_path="x")


def on_gpu(capability: str = "9.0") -> Analysis:
    gpu = Gpu(name="some GPU", memory_bytes=2**36, driver="580.65.06", compute_capability=capability)
    return demo_analysis().model_copy(update={"hardware": demo_hardware(gpus=(gpu,), gpu_reason="")})


def proposed(engine: str, capability: str = "9.0") -> dict[str, Candidate]:
    return {c.id: c for c in engines.get(engine).propose(on_gpu(capability), SPEC, "gpu")}


def space(candidate: Candidate, spec: OptimizeSpec = SPEC) -> dict[str, tuple[Any, ...]]:
    found = engines.get(candidate.engine).dimensions(candidate, on_gpu(), spec)
    return {dimension.knob: dimension.values for dimension in found}


# ── candidates ───────────────────────────────────────────────────────────────────────────────────


def test_start_candidates_keep_their_names() -> None:
    """Ids name directories and MLflow runs: a default knob is not in them."""
    assert list(proposed(CUDA)) == [
        "onnxruntime-cuda-fp16",
        "onnxruntime-cuda-bf16",
        "onnxruntime-cuda-w8-b32",
        "onnxruntime-cuda-w4-b32",
    ]
    assert list(proposed(TENSORRT)) == [
        "onnxruntime-tensorrt-fp16",
        "onnxruntime-tensorrt-bf16",
        "onnxruntime-tensorrt-w8",
        "onnxruntime-tensorrt-w4-b64",
        "onnxruntime-tensorrt-w8a8",
        "onnxruntime-tensorrt-fp8",
    ]


@pytest.mark.parametrize(
    ("start", "knobs", "name", "bits"),
    [
        ("cuda-w4-b32", {"block_size": 128, "symmetric": False}, "cuda-w4-b128-asym", 4.125),
        ("cuda-w8-b32", {"compute": "bf16", "draft_tokens": 7}, "cuda-w8-b32-bf16-draft7", 8.5),
        ("cuda-fp16", {"graph_level": "basic"}, "cuda-fp16-g-basic", 16),
        ("tensorrt-fp8", {"tuned_for": "prompt"}, "tensorrt-fp8-prompt", 8),
    ],
)
def test_ids_name_what_is_not_the_default(start: str, knobs: dict[str, Any], name: str, bits: float) -> None:
    """A 16-bit scale per block counts as bits."""
    engine = CUDA if start.startswith("cuda") else TENSORRT
    found = engines.get(engine).variant(proposed(engine)[f"onnxruntime-{start}"], knobs)
    assert (found.id, found.weight_bits) == (f"onnxruntime-{name}", bits)


def test_every_combination_of_knobs_has_an_id_of_its_own() -> None:
    """And a variant that is turned back is the candidate again."""
    for start in (*proposed(CUDA).values(), *proposed(TENSORRT).values()):
        engine, knobs = engines.get(start.engine), space(start)
        turned = [engine.variant(start, {k: v}) for k, values in knobs.items() for v in values]
        assert len({c.id for c in turned}) == 1 + sum(len(values) - 1 for values in knobs.values())
        assert all(engine.variant(c, start.knobs).id == start.id for c in turned)
        assert DRAFT_TOKENS in knobs
        assert DRAFT_TOKENS not in space(start, OptimizeSpec(model_path="x", batch_size=8))


@pytest.mark.parametrize(
    ("capability", "vetoed"),
    [
        ("9.0", set()),
        ("8.6", {"onnxruntime-tensorrt-fp8"}),
        ("7.5", {"onnxruntime-cuda-bf16", "onnxruntime-tensorrt-bf16", "onnxruntime-tensorrt-fp8"}),
    ],
)
def test_what_an_older_gpu_cannot_compute_is_vetoed(capability: str, vetoed: set[str]) -> None:
    """With what it needs and what the GPU has."""
    found = {**proposed(CUDA, capability), **proposed(TENSORRT, capability)}
    reasons = {name: c.vetoed_because for name, c in found.items() if c.vetoed_because}
    assert set(reasons) == vetoed
    assert all(f"some GPU has {capability}" in str(reason) for reason in reasons.values())


def test_a_model_without_a_standard_graph_is_vetoed() -> None:
    """Before minutes are spent on it, with the model types that have one."""
    profile = demo_analysis().profile.model_copy(update={"model_type": "glm4_moe"})
    found = engines.get(TENSORRT).propose(on_gpu().model_copy(update={"profile": profile}), SPEC, "gpu")
    assert all(
        "no standard graph for model type glm4_moe: there are glm," in str(c.vetoed_because) for c in found
    )


@pytest.mark.parametrize("engine", [CUDA, TENSORRT])
def test_the_cpu_is_for_others(engine: str) -> None:
    """Never a silent run on the CPU."""
    probe = engines.get(engine).probe("cpu")
    assert probe.stage == "no_device"
    assert "on the CPU use onnxruntime" in probe.reason


def test_session_knobs_share_the_files() -> None:
    """The recipe is the key of the export store."""
    engine, start = engines.get(CUDA), proposed(CUDA)["onnxruntime-cuda-w8-b32"]
    recipe = engine.recipe(start)
    assert engine.recipe(engine.variant(start, {"graph_level": "basic", "draft_tokens": 7})) == recipe
    for knobs in ({"block_size": 64}, {"symmetric": False}, {"compute": "bf16"}):
        assert engine.recipe(engine.variant(start, knobs)) != recipe
    tensorrt, fp16 = engines.get(TENSORRT), proposed(TENSORRT)["onnxruntime-tensorrt-fp16"]
    assert tensorrt.recipe(tensorrt.variant(fp16, {"tuned_for": "prompt"})) == tensorrt.recipe(fp16)
    assert tensorrt.recipe(proposed(TENSORRT)["onnxruntime-tensorrt-bf16"]) != tensorrt.recipe(fp16)


# ── files ────────────────────────────────────────────────────────────────────────────────────────


Export = Callable[[str, Candidate, Path, Path], Path]


@pytest.fixture(scope="module")
def exported(shared_ledger: Path) -> Export:
    """The files of an engine's candidate for a checkpoint, below a directory."""

    def export(engine: str, candidate: Candidate, checkpoint: Path, home: Path) -> Path:
        output = home / candidate.id
        output.mkdir()
        context = ExportContext(output=output, ledger=shared_ledger)
        engines.get(engine).export(candidate, load_checkpoint(str(checkpoint)), context)
        return output

    return export


def truth(checkpoint: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


CASES = [
    ("fp16", {}, 0.9999),
    ("w8-b32", {}, 0.999),
    ("w4-b32", {"symmetric": False}, 0.9),
]


@pytest.mark.parametrize("family", ["tiny_glm", "tiny_llama"])
@pytest.mark.parametrize(("start", "knobs", "least"), CASES)
def test_a_graph_for_cuda_computes_the_model(
    family: str,
    start: str,
    knobs: dict[str, Any],
    least: float,
    exported: Export,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    """In fp16, whose operators the CPU provider has too: prefill, decode with the cache, all positions."""
    checkpoint: Path = request.getfixturevalue(family)
    candidate = engines.get(CUDA).variant(proposed(CUDA)[f"onnxruntime-cuda-{start}"], knobs)
    session = open_session(exported(CUDA, candidate, checkpoint, tmp_path), OPTIONS)
    assert_computes(session, truth(checkpoint), least)


def test_a_standard_graph_runs_in_the_same_session(tiny_glm: Path, exported: Export, tmp_path: Path) -> None:
    """The cache's places made a constant, past and present in one memory, fp16 with fp32 logits."""
    candidate = proposed(TENSORRT)["onnxruntime-tensorrt-fp16"]
    output = exported(TENSORRT, candidate, tiny_glm, tmp_path)
    fixed = tensorrt_placement(output, OPTIONS, "token").fixed
    session = open_session(output, OPTIONS, placement=Placement(fixed=fixed))
    assert_computes(session, truth(tiny_glm), 0.9999)


def assert_computes(session: OnnxRuntimeSession, expected: Any, least: float) -> None:
    everything = session.full_logits(TOKENS)
    steps = [session.prefill(TOKENS[:, :PROMPT])]
    steps += [session.decode(TOKENS[:, place]) for place in range(PROMPT, LENGTH)]
    assert isinstance(session, Slotted)
    for row in range(ROWS):
        session.truncate(row, LENGTH - 4)
    session_again = session.decode(TOKENS[:, LENGTH - 4])
    session.close()
    decoded = np.stack(steps, axis=1)
    assert everything.dtype == decoded.dtype == np.float32
    for found, wanted in ((everything, expected), (decoded, expected[:, PROMPT - 1 :])):
        assert float(np.corrcoef(found.ravel(), wanted.ravel())[0, 1]) > least
    np.testing.assert_array_equal(session_again, steps[-4])


@pytest.mark.parametrize("compute", ["fp16", "bf16"])
def test_weights_and_cache_are_as_wide_as_the_arithmetic(
    compute: Literal["fp16", "bf16"], tiny_glm: Path, exported: Export, tmp_path: Path
) -> None:
    """16 bits each, and logits in fp32, for both types; bf16 has no kernels on the CPU to run it by."""
    output = exported(CUDA, proposed(CUDA)[f"onnxruntime-cuda-{compute}"], tiny_glm, tmp_path)
    model = onnx.load(output / GRAPH)
    narrow = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[compute]
    types = {
        value.name: value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)
    }
    assert {types[name] for name in types if name.startswith(("past", "present"))} == {narrow}
    assert types["logits"] == onnx.TensorProto.FLOAT
    large = [tensor for tensor in model.graph.initializer if len(tensor.dims) == 2]
    assert {tensor.data_type for tensor in large} == {narrow}
    assert "GroupQueryAttention" in {node.op_type for node in model.graph.node}


# ── TensorRT's profile ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("tuned_for", "length"), [("token", 1), ("prompt", LENGTH)])
def test_one_profile_covers_every_call(
    tuned_for: str, length: int, tiny_glm: Path, exported: Export, tmp_path: Path
) -> None:
    """From one token of one row to a full cache of all rows, in the words of the provider's options."""
    candidate = proposed(TENSORRT)["onnxruntime-tensorrt-fp16"]
    output = exported(TENSORRT, candidate, tiny_glm, tmp_path)
    placement = tensorrt_placement(output, OPTIONS, tuned_for)
    bounds = {
        bound: shapes(placement.options[f"trt_profile_{bound}_shapes"]) for bound in ("min", "opt", "max")
    }
    assert [bounds[bound]["input_ids"] for bound in bounds] == ["1x1", f"{ROWS}x{length}", f"{ROWS}x{LENGTH}"]
    assert [bounds[bound]["write_indices"] for bound in bounds] == ["1", str(ROWS), str(ROWS)]
    assert [bounds[bound][FIRST_LOGITS] for bound in bounds] == ["-1", "-1", "0"]
    cache = "past_key_values.1.value"
    assert [bounds[bound][cache] for bound in bounds] == [f"{rows}x2x{LENGTH}x32" for rows in (1, ROWS, ROWS)]
    inputs = {value.name for value in onnx.load(output / GRAPH, load_external_data=False).graph.input}
    assert all(set(named) == inputs for named in bounds.values())
    assert placement.whole
    assert Path(placement.options["trt_engine_cache_path"]).parent == output


def shapes(option: str) -> dict[str, str]:
    return dict(part.split(":") for part in option.split(","))
