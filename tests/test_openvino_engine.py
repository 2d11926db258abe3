"""OpenVINO: graphs that answer like transformers and are fused, rounded weights, and the search space."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from numpy.typing import NDArray
from studies import demo_analysis, demo_hardware, demo_profile
from tiny_models import VOCAB_SIZE, build_checkpoint

from open_autoglm.checkpoint import load_checkpoint
from open_autoglm.engines import openvino_engine
from open_autoglm.engines.contract import ExportContext, SessionOptions
from open_autoglm.engines.openvino_engine import OpenVinoEngine, OpenVinoSession
from open_autoglm.export.decoder_graph import MODEL_TYPES, UnknownModel
from open_autoglm.export.openvino_graph import GRAPH, write_graph
from open_autoglm.export.openvino_weights import Rounding, matrix_node, round_to_nearest
from open_autoglm.schemas import Candidate, OptimizeSpec

runtime = pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")

ENGINE = OpenVinoEngine()
SPEC = OptimizeSpec(model_path="tiny")
FP32 = Rounding(bits=32)
ROWS, PROMPT, LENGTH = 2, 20, 24
TOKENS: NDArray[np.int64] = np.random.default_rng(1).integers(4, VOCAB_SIZE, (ROWS, LENGTH))
OPTIONS = SessionOptions(batch_size=ROWS, max_tokens=LENGTH, threads=1)

Build = Callable[..., Path]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """A tiny checkpoint by model type and changes to its config, built once."""

    @cache
    def build(model_type: str, **overrides: Any) -> Path:
        return build_checkpoint(tmp_path_factory.mktemp(model_type) / "it", model_type, **overrides)

    return build


def proposed(**hardware: Any) -> dict[str, Candidate]:
    analysis = demo_analysis().model_copy(update={"hardware": demo_hardware(**hardware)})
    return {candidate.id: candidate for candidate in ENGINE.propose(analysis, SPEC, "cpu")}


def served(checkpoint: Path, rounding: Rounding, output: Path, candidate: str = "fp32") -> OpenVinoSession:
    write_graph(load_checkpoint(str(checkpoint)), rounding, output)
    return OpenVinoSession(output, OPTIONS, proposed()[f"openvino-{candidate}"].knobs)


def by_transformers(checkpoint: Path) -> NDArray[np.float32]:
    """Logits of ``TOKENS``, every position."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: NDArray[np.float32] = model(torch.from_numpy(TOKENS)).logits.numpy()
    return logits


# ── graphs ───────────────────────────────────────────────────────────────────────────────────────

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}

VARIETIES: list[tuple[str, dict[str, Any]]] = [
    *((model_type, {}) for model_type in sorted(MODEL_TYPES)),
    ("glm", {"tie_word_embeddings": True}),
    ("glm", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}}),
    ("llama", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
    ("llama", {"rope_parameters": LLAMA3_ROPE}),
    ("qwen3", {"rope_parameters": YARN_ROPE}),  # the one that scales cosines and sines
]


@runtime
@pytest.mark.parametrize(
    ("model_type", "overrides"), VARIETIES, ids=[f"{t}-{'-'.join(o) or 'plain'}" for t, o in VARIETIES]
)
def test_a_graph_answers_like_transformers(
    model_type: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    """Prompt, single tokens after it, and every position at once, in a batch of two."""
    checkpoint = build_checkpoint(tmp_path / "checkpoint", model_type, **overrides)
    expected = by_transformers(checkpoint)
    session = served(checkpoint, FP32, tmp_path)
    found = [session.prefill(TOKENS[:, :PROMPT])]
    found += [session.decode(TOKENS[:, position]) for position in range(PROMPT, LENGTH)]
    np.testing.assert_allclose(np.stack(found, axis=1), expected[:, PROMPT - 1 :], atol=1e-3)
    np.testing.assert_allclose(session.full_logits(TOKENS), expected, atol=1e-3)
    session.close()


@runtime
@pytest.mark.parametrize("model_type", sorted(MODEL_TYPES))
def test_the_plugin_fuses_what_the_graph_spells_out(model_type: str, build: Build, tmp_path: Path) -> None:
    """Per layer one attention with its cache, two rotary embeddings, and every RMSNorm in one node."""
    session = served(build(model_type), FP32, tmp_path)
    kinds = Counter(
        node.get_rt_info()["layerType"].value for node in session._compiled.get_runtime_model().get_ops()
    )
    session.close()
    norms_per_layer = {"glm4": 4, "qwen3": 4}.get(model_type, 2)
    assert kinds["ScaledDotProductAttention"] == 2
    assert kinds["RoPE"] == 2 * 2
    assert kinds["RMS"] == 2 * norms_per_layer + 1
    assert kinds["Softmax"] == 0


@runtime
def test_attention_that_is_not_fused_is_refused(build: Build, tmp_path: Path) -> None:
    """Its causal mask would hide the cache from every decoded token: no session, and the reason."""
    import openvino as ov

    write_graph(load_checkpoint(str(build("glm"))), FP32, tmp_path / "sound")
    model = ov.Core().read_model(tmp_path / "sound" / GRAPH)
    for node in model.get_ops():  # without beam_idx the cache is no pattern the plugin knows
        source = node.input_value(0) if node.get_input_size() else None
        if source is not None and source.get_node().get_type_name() == "ReadValue":
            node.output(0).replace(source)
    ov.save_model(model, tmp_path / GRAPH, compress_to_fp16=False)
    with pytest.raises(RuntimeError, match="attention of 0 layers out of 2"):
        OpenVinoSession(tmp_path, OPTIONS, proposed()["openvino-fp32"].knobs)


@runtime
def test_a_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    """A checkpoint with more than the graph computes would be answered wrongly, without a word."""
    from safetensors.torch import load_file, save_file

    checkpoint = build_checkpoint(tmp_path / "checkpoint", "llama")
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.gate.weight"] = tensors["model.norm.weight"].clone()
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UnknownModel, match=r"layers\.0\.self_attn\.gate"):
        write_graph(load_checkpoint(str(checkpoint)), FP32, tmp_path)


@runtime
@pytest.mark.parametrize(
    ("model_type", "overrides", "reason"),
    [
        ("llama", {"hidden_act": "gelu"}, "gelu"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "length"),
    ],
)
def test_what_the_graph_lacks_is_refused(
    model_type: str, overrides: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    """By name, before anything is written."""
    checkpoint = build_checkpoint(tmp_path / "checkpoint", model_type, **overrides)
    with pytest.raises(UnknownModel, match=reason):
        write_graph(load_checkpoint(str(checkpoint)), FP32, tmp_path)
    assert not (tmp_path / GRAPH).exists()


# ── rounded weights ──────────────────────────────────────────────────────────────────────────────

ROUNDINGS = [
    Rounding(bits=8),
    Rounding(bits=8, group_size=64, symmetric=True),
    Rounding(bits=4, group_size=64),
    Rounding(bits=4, symmetric=True),
]
MATRIX: NDArray[np.float32] = np.random.default_rng(2).normal(0.1, 1, (6, 160)).astype(np.float32)


def restored(rounding: Rounding, matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    values, scales, zero_points = round_to_nearest(matrix, rounding)
    integers = values.astype(np.float32) - (0 if zero_points is None else zero_points.astype(np.float32))
    return (integers * scales).reshape(matrix.shape)


@pytest.mark.parametrize("rounding", ROUNDINGS, ids=str)
def test_rounding_errs_by_half_a_step(rounding: Rounding) -> None:
    """Half a step, or one where the zero point had to be rounded too and cuts an end off."""
    scales = round_to_nearest(MATRIX, rounding).scales
    step = np.broadcast_to(scales, (*scales.shape[:2], 160 // scales.shape[1])).reshape(MATRIX.shape)
    error = np.abs(restored(rounding, MATRIX) - MATRIX)
    assert (error <= step * (0.501 if rounding.symmetric else 1.001)).all()
    assert np.median(error / step) < 0.3


def test_groups_are_whole() -> None:
    """64 does not divide 160, and 32 does; no group size means the row."""
    assert round_to_nearest(MATRIX, Rounding(bits=4, group_size=64)).values.shape == (6, 5, 32)
    assert round_to_nearest(MATRIX, Rounding(bits=4)).values.shape == (6, 1, 160)


@pytest.mark.parametrize("rounding", ROUNDINGS, ids=str)
def test_zeros_and_one_sided_rows_stay_what_they_are(rounding: Rounding) -> None:
    """A row of zeros divides by nothing, and zero is exact on a row that is far from it."""
    matrix = np.stack([np.zeros(64), np.where(np.arange(64) % 2, 7.0, 0.0)]).astype(np.float32)
    np.testing.assert_allclose(restored(rounding, matrix), matrix, atol=1e-6)


@runtime
@pytest.mark.parametrize("rounding", ROUNDINGS, ids=str)
def test_the_plugin_computes_with_the_rounded_matrix(rounding: Rounding) -> None:
    """4-bit numbers are packed in OpenVINO's order, and scales and zero points meet their groups."""
    import openvino as ov
    from openvino import opset13 as ops

    given = ops.parameter([-1, 160], ov.Type.f32)
    product = ops.matmul(given, matrix_node(MATRIX, rounding), False, True)
    model = ov.Model([ops.result(product)], [given], "product")
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    compiled = ov.Core().compile_model(model, "CPU", exact)
    vectors = np.random.default_rng(3).normal(size=(4, 160)).astype(np.float32)
    np.testing.assert_allclose(compiled(vectors)[0], vectors @ restored(rounding, MATRIX).T, atol=1e-3)


@runtime
@pytest.mark.parametrize(("bits", "kind"), [(8, "u8"), (4, "u4")])
def test_rounded_weights_are_stored_in_their_bits(bits: Any, kind: str, build: Build, tmp_path: Path) -> None:
    """Every matrix of every layer; at 4 bits the embedding and the head keep 8."""
    import openvino as ov

    write_graph(load_checkpoint(str(build("glm"))), Rounding(bits=bits, group_size=32), tmp_path)
    nodes = ov.Core().read_model(tmp_path / GRAPH).get_ops()
    constants = [node for node in nodes if node.get_type_name() == "Constant"]
    kinds = Counter(node.get_element_type().get_type_name() for node in constants if _numbers(node) > 2000)
    in_layers = 2 * 7  # query, key, value, output, gate, up, down
    assert kinds == Counter({kind: in_layers}) + Counter({"u8": 2})


def _numbers(node: Any) -> int:
    return int(np.prod(list(node.get_output_shape(0))))


# ── the engine ───────────────────────────────────────────────────────────────────────────────────


def test_probe_says_what_is_missing_and_how_to_mend_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not installed, too old, new enough, and another device."""

    def missing(_: str) -> NoReturn:
        raise PackageNotFoundError

    monkeypatch.setattr(openvino_engine, "version", missing)
    assert ENGINE.probe("cpu").stage == "missing"
    assert ENGINE.probe("cpu").install == "pip install 'open-autoglm[openvino]'"
    monkeypatch.setattr(openvino_engine, "version", lambda _: "2024.6.0")
    assert (ENGINE.probe("cpu").stage, ENGINE.probe("cpu").version) == ("installed", "2024.6.0")
    assert "2024.6.0 is older than 2026.1" in ENGINE.probe("cpu").reason
    monkeypatch.setattr(openvino_engine, "version", lambda _: "2026.4.1")
    assert ENGINE.probe("cpu").ready
    assert ENGINE.probe("gpu").stage == "no_device"


def test_arithmetic_is_the_best_the_cpu_has() -> None:
    """bf16 where it is native; then bf16 is no candidate elsewhere, since OpenVINO would run fp32."""
    native = proposed()
    assert list(native) == [
        "openvino-fp32",
        "openvino-bf16",
        "openvino-w8-a-bf16",
        "openvino-w4-g64-a-bf16",
    ]
    assert all(candidate.vetoed_because is None for candidate in native.values())
    vnni = proposed(isa=("avx2", "avx512_vnni"))
    assert "no bf16 arithmetic" in str(vnni["openvino-bf16"].vetoed_because)
    assert {"openvino-w8-a-int8", "openvino-w4-g64-a-int8"} < set(vnni)
    assert "openvino-w8-a-fp32" in proposed(isa=("avx2",))


def test_a_model_without_a_graph_is_vetoed() -> None:
    """The reason names the model types there are."""
    profile = demo_profile().model_copy(update={"model_type": "gemma3"})
    analysis = demo_analysis().model_copy(update={"profile": profile})
    reasons = {candidate.vetoed_because for candidate in ENGINE.propose(analysis, SPEC, "cpu")}
    assert reasons == {"no OpenVINO graph for model type gemma3: there are glm, glm4, llama, qwen2, qwen3"}


def space(candidate: Candidate) -> dict[str, tuple[Any, ...]]:
    return {d.knob: d.values for d in ENGINE.dimensions(candidate, demo_analysis(), SPEC)}


def test_only_what_trades_something_is_turned() -> None:
    """fp32 stays exact; groups and arithmetic are for rounded weights."""
    start = proposed()
    always = {"threads": ("all", 1), "pinning": (True, False)}
    assert space(start["openvino-fp32"]) == always
    assert space(start["openvino-bf16"]) == {**always, "kv_cache": ("float", "int8")}
    assert space(start["openvino-w4-g64-a-bf16"]) == {
        **always,
        "kv_cache": ("float", "int8"),
        "group_size": (64, 128, 32),
        "symmetric": (False, True),
        "activations": ("bf16", "int8"),
    }


@pytest.mark.parametrize(
    ("start", "knobs", "name", "bits"),
    [
        ("w8-a-bf16", {"group_size": 64}, "w8-g64-a-bf16", 8.625),
        ("w8-a-bf16", {"symmetric": True, "activations": "int8"}, "w8-sym-a-int8", 8),
        ("w4-g64-a-bf16", {"group_size": 32, "symmetric": True}, "w4-g32-sym-a-bf16", 5),
        ("bf16", {"kv_cache": "int8", "threads": 1, "pinning": False}, "bf16-kv8-t1-nopin", 16),
    ],
)
def test_names_and_bits_follow_from_the_configuration(
    start: str, knobs: dict[str, Any], name: str, bits: float
) -> None:
    """Each group has one fp32 scale and, if asymmetric, a zero point."""
    found = ENGINE.variant(proposed()[f"openvino-{start}"], knobs)
    assert (found.id, found.weight_bits) == (f"openvino-{name}", bits)


@runtime
def test_files_are_shared_where_the_weights_are_equal() -> None:
    """fp32 and bf16 read the same file, and no session knob changes one."""
    start = proposed()
    assert ENGINE.recipe(start["openvino-fp32"]) == ENGINE.recipe(start["openvino-bf16"])
    whole = start["openvino-w8-a-bf16"]
    session = {"activations": "int8", "kv_cache": "int8", "threads": 1, "pinning": False}
    assert ENGINE.recipe(ENGINE.variant(whole, session)) == ENGINE.recipe(whole)
    for knobs in ({"group_size": 64}, {"symmetric": True}):
        assert ENGINE.recipe(ENGINE.variant(whole, knobs)) != ENGINE.recipe(whole)


@runtime
def test_session_knobs_reach_the_runtime(build: Build, tmp_path: Path) -> None:
    """What OpenVINO says of the compiled graph is what was asked for, fp32 above all."""
    checkpoint = load_checkpoint(str(build("glm")))
    start = proposed()["openvino-w8-a-bf16"]
    ENGINE.export(start, checkpoint, ExportContext(output=tmp_path, ledger=tmp_path / "ledger.json"))
    told = ("devices", "threads", "pinning", "arithmetic", "int8_activations", "kv_cache")
    exact = proposed()["openvino-fp32"]
    rounded = ENGINE.variant(start, {"activations": "int8", "kv_cache": "int8", "pinning": False})
    for candidate, expected in (
        (exact, ("CPU", "1", "on", "f32", "off", "f32")),
        (rounded, ("CPU", "1", "off", "f32", "32", "u8")),
    ):
        session = OpenVinoSession(tmp_path, OPTIONS, candidate.knobs)
        facts = session.facts()
        session.close()
        assert tuple(facts[name] for name in told) == expected
