"""int8 products: what is rounded how, and that outliers of one token do not cost another its resolution."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tiny_models import VOCAB_SIZE, build_checkpoint
from transformers import AutoModelForCausalLM

from open_autoglm.checkpoint import load_checkpoint
from open_autoglm.engines.contract import ExportContext, SessionOptions
from open_autoglm.engines.onnxruntime_session import open_session
from open_autoglm.export import genai_route, int8
from open_autoglm.export.calibrate import Activations, calibration_windows, observe
from open_autoglm.export.graph import (
    DATA,
    GRAPH,
    DecoderFacts,
    load_decoder,
    save_decoder,
    store_embedding_by_row,
)
from open_autoglm.export.int8 import compute_in_int8
from open_autoglm.export.linears import Decoder
from open_autoglm.export.quantize import weight_only
from open_autoglm.export.recipe import EXACT, OnnxRecipe
from open_autoglm.export.rounding import by_source, fit, stream_error, worst
from open_autoglm.export.routes import export_onnx
from open_autoglm.schemas import Checkpoint

Numbers = NDArray[np.float32]
TOKENS: NDArray[np.int64] = np.random.default_rng(0).integers(4, VOCAB_SIZE, (2, 24))
INT8 = OnnxRecipe(scheme="int8", weight_bits=8, block_size=16, accuracy_level=4, fixed_scales=True)


Export = Callable[[Checkpoint, OnnxRecipe, Path], Path]


@pytest.fixture(scope="module")
def export(shared_ledger: Path) -> Export:
    """Write an export into a new directory and return that."""

    def write(checkpoint: Checkpoint, recipe: OnnxRecipe, output: Path) -> Path:
        output.mkdir(parents=True)
        with contextlib.redirect_stdout(io.StringIO()):
            export_onnx(checkpoint, recipe, ExportContext(output=output, ledger=shared_ledger))
        return output

    return write


@pytest.fixture(scope="module")
def glm(tiny_glm: Path) -> Checkpoint:
    return load_checkpoint(str(tiny_glm))


@pytest.fixture(scope="module")
def exact(glm: Checkpoint, export: Export, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fp32 export of the tiny GLM."""
    return export(glm, EXACT, tmp_path_factory.mktemp("exact") / "export")


@pytest.fixture
def own(exact: Path, tmp_path: Path) -> Path:
    """A copy of that export for a test that changes weights."""
    return shutil.copytree(exact, tmp_path / "own")


def logits(directory: Path) -> Numbers:
    session = open_session(directory, SessionOptions(batch_size=2, max_tokens=32, threads=1))
    found = session.full_logits(TOKENS)
    session.close()
    return found


# ── which layers ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("model_type", ["glm", "llama", "qwen3", "glm4"])
def test_layers_are_known_by_what_they_compute(model_type: str, export: Export, tmp_path: Path) -> None:
    """Two layers by either exporter: names and fusions differ, the roles do not. Some projections are packed:
    one matrix or three for query, key and value, one or two for gate and up.

    What down-projections are added to is found too, also behind GLM-4's norm of the branch: the first sum
    is what torch hands to the second layer.
    """
    checkpoint = load_checkpoint(str(build_checkpoint(tmp_path / "it", model_type)))
    directory = export(checkpoint, EXACT, tmp_path / "export")
    decoder = Decoder(onnx.load(directory / GRAPH, load_external_data=False).graph, directory)
    roles = decoder.roles()
    found = Counter(roles.values())
    assert {role: found[role] for role in ("head", "output", "down")} == {"head": 1, "output": 2, "down": 2}
    assert found["attention"] in (2, 6)
    assert found["mlp"] in (2, 4)
    down = [linear for linear in decoder.linears() if roles[linear.output] == "down"]
    operands, last = (decoder.addition(linear.output) for linear in down)
    assert operands is not None
    assert last is not None
    seen = observe(directory, operands, TOKENS[:1], DecoderFacts.read(directory))
    summed = sum(seen[name].rows for name in operands)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).eval()
    with torch.no_grad():
        hidden = model(torch.from_numpy(TOKENS[:1]), output_hidden_states=True).hidden_states[1][0].numpy()
    rows = np.linspace(0, TOKENS.shape[1] - 1, len(summed), dtype=np.int64)
    assert np.allclose(summed, hidden[rows], atol=1e-3)


# ── the arithmetic ───────────────────────────────────────────────────────────────────────────────

WEIGHT: Numbers = np.random.default_rng(1).standard_normal((32, 16)).astype(np.float32)


def one_layer(operators: Callable[[Decoder], None]) -> Callable[[Numbers], Numbers]:
    """``x @ WEIGHT`` as a graph, after ``operators`` has changed it."""
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "tokens", 32])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "tokens", 16])]
    node = helper.make_node("MatMul", ["x", "weight"], ["logits"], name="layer")
    graph = helper.make_graph([node], "layer", inputs, outputs, [numpy_helper.from_array(WEIGHT, "weight")])
    operators(Decoder(graph, Path()))  # what is added is small and stays in the graph
    opset = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, ir_version=10, opset_imports=opset)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda x: session.run(["logits"], {"x": x})[0]  # type: ignore[no-any-return]


def per_token(decoder: Decoder) -> None:
    compute_in_int8(decoder, decoder.linears(), {})


@pytest.fixture
def activations() -> Numbers:
    """Two rows of five tokens, one of them a hundred times as large as the others."""
    found = np.random.default_rng(2).standard_normal((2, 5, 32)).astype(np.float32)
    found[1, 3] *= 100
    return found


def relative_error(found: Numbers, expected: Numbers) -> Numbers:
    """``float32[batch, tokens]``."""
    error: Numbers = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    return error


def test_a_large_token_costs_the_others_nothing(activations: Numbers) -> None:
    """Each token is rounded by its own scale: 1 % is what int8 on both sides costs. One scale for all of
    them, the alternative, loses the small ones."""
    expected = activations @ WEIGHT
    assert relative_error(one_layer(per_token)(activations), expected).max() < 0.015
    common = float(np.abs(activations).max() / 127)
    fixed = one_layer(lambda decoder: compute_in_int8(decoder, decoder.linears(), {"x": common}))
    error = relative_error(fixed(activations), expected)
    assert error[1, 3] < 0.015
    assert np.delete(error.ravel(), 8).min() > 0.1


def test_a_token_of_zeros_gives_zeros(activations: Numbers) -> None:
    """Dividing by the largest of a token must not turn nothing into something."""
    activations[0, 2] = 0
    found = one_layer(per_token)(activations)
    assert not found[0, 2].any()
    assert np.isfinite(found).all()


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused(broken: float, own: Path) -> None:
    """Bytes hold no NaN: rounded, it would be a number like any other, and the model silently wrong."""
    decoder = Decoder(load_decoder(own).graph, own)
    linear = decoder.linears()[0]
    weight = decoder.value(linear.weight).copy()
    weight[3, 4] = broken
    decoder.replace(linear.weight, weight)
    with pytest.raises(ValueError, match=rf"{linear.weight} .* not finite"):
        compute_in_int8(decoder, [linear], {})


def test_weights_stay_in_their_file(own: Path) -> None:
    """The graph never holds a matrix, whatever is done to it: a model's weights may be more than the memory.
    What is replaced is written in its own place, so that the file does not grow by the model either."""
    model = load_decoder(own)
    decoder = Decoder(model.graph, own)
    linear = decoder.linears()[0]
    doubled = decoder.value(linear.weight) * 2
    size_bytes = (own / DATA).stat().st_size
    decoder.replace(linear.weight, doubled)
    assert (decoder.value(linear.weight) == doubled).all()
    assert (own / DATA).stat().st_size == size_bytes
    others = {other.weight: decoder.value(other.weight) for other in decoder.linears()[1:]}
    decoder.replace(linear.weight, np.tile(doubled, 2))  # wider than its place
    assert (own / DATA).stat().st_size > size_bytes
    assert all((decoder.value(name) == before).all() for name, before in others.items())
    weight_only(model, own, OnnxRecipe(scheme="weight_only", weight_bits=8))
    assert max(len(tensor.raw_data) for tensor in model.graph.initializer) <= 1024


# ── calibration ──────────────────────────────────────────────────────────────────────────────────


def test_calibration_sees_what_flows(glm: Checkpoint, exact: Path) -> None:
    """The largest magnitude per channel is over all tokens, so no sampled row is above it."""
    sources = sorted(by_source(Decoder(load_decoder(exact).graph, exact).linears()[:-1]))
    windows = calibration_windows(glm)
    seen = observe(exact, sources, windows, DecoderFacts.read(exact))
    assert sorted(seen) == sources
    for found in seen.values():
        assert found.rows.shape[1:] == found.largest.shape
        assert len(found.rows) == 16 * len(windows)
        assert (np.abs(found.rows).max(axis=0) <= found.largest * 1.0001).all()
    left = sorted(path.name for path in exact.iterdir())
    assert left == ["decoder.json", "model.onnx", "model.onnx.data"]


def test_smoothing_moves_outliers_and_changes_no_answer(exact: Path, own: Path, tmp_path: Path) -> None:
    """The scales are folded into norms and up-projections: the fp32 graph still computes the same."""
    model = load_decoder(own)
    decoder = Decoder(model.graph, own)
    roles = decoder.roles()
    linears = [linear for linear in decoder.linears() if roles[linear.output] != "head"]
    generator = np.random.default_rng(3)
    seen: dict[str, Any] = {}
    for source, readers in by_source(linears).items():
        rows = generator.standard_normal((64, len(decoder.value(readers[0].weight)))).astype(np.float32)
        rows[:, 5] *= 50
        seen[source] = Activations(largest=np.abs(rows).max(axis=0), rows=rows)
    before = {linear.weight: decoder.value(linear.weight).copy() for linear in linears}
    assert fit(decoder, linears, seen, frozenset()) == {}
    changed = {
        roles[linear.output]
        for linear in linears
        if (decoder.value(linear.weight) != before[linear.weight]).any()
    }
    assert changed == {"attention", "mlp", "down"}  # what attention makes takes no scale
    save_decoder(model, own, tmp_path)
    DecoderFacts.read(exact).write(tmp_path)
    session = open_session(tmp_path, SessionOptions(batch_size=2, max_tokens=32, threads=1))
    assert np.allclose(session.prefill(TOKENS), logits(exact)[:, -1], atol=1e-3)


def fixed_scale_of(rows: Numbers) -> float | None:
    """What one layer that reads ``rows`` gets, if a fixed scale may be taken."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["logits"], name="layer")],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "tokens", 32])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "tokens", 16])],
        [numpy_helper.from_array(WEIGHT, "weight")],
    )
    decoder = Decoder(graph, Path())
    seen = {"x": Activations(largest=np.abs(rows).max(axis=0), rows=rows)}
    return fit(decoder, decoder.linears(), seen, frozenset({"x"})).get("x")


def test_fixed_scales_clip_what_is_rare() -> None:
    """The one scale for all tokens follows the many, not the one."""
    rows = np.random.default_rng(4).uniform(-1, 1, (16384, 32)).astype(np.float32)
    rows[0, 0] = 2
    scale = fixed_scale_of(rows)
    assert scale is not None
    assert 0.9 < scale * 127 < 1.5


def test_tokens_that_differ_in_range_keep_their_own_scales() -> None:
    """One scale for all would have several times the error."""
    generator = np.random.default_rng(5)
    rows = generator.uniform(-1, 1, (1024, 32)) * generator.lognormal(0, 1, (1024, 1))
    assert fixed_scale_of(rows.astype(np.float32)) is None


# ── which layers are spared ──────────────────────────────────────────────────────────────────────


def stream_graph() -> Decoder:
    """``stream + x @ WEIGHT``: the end of a layer."""
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "tokens", None])
        for name in ("x", "stream")
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "tokens", 16])]
    nodes = [
        helper.make_node("MatMul", ["x", "weight"], ["product"], name="layer"),
        helper.make_node("Add", ["product", "stream"], ["logits"]),
    ]
    return Decoder(
        helper.make_graph(nodes, "layer", inputs, outputs, [numpy_helper.from_array(WEIGHT, "weight")]),
        Path(),
    )


def test_an_error_counts_by_the_stream_it_enters() -> None:
    """Where the stream is ten times as large, the same error is a hundredth of it; a token that is large
    both in branch and stream counts no more than another."""
    decoder = stream_graph()
    (linear,) = decoder.linears()
    generator = np.random.default_rng(6)
    rows = generator.standard_normal((64, 32)).astype(np.float32)
    stream = generator.standard_normal((64, 16)).astype(np.float32) * 20

    def error(rows: Numbers, stream: Numbers) -> float:
        values = {"x": rows, "product": rows @ WEIGHT, "stream": stream}
        seen = {
            name: Activations(largest=np.abs(value).max(axis=0), rows=value) for name, value in values.items()
        }
        return stream_error(decoder, linear, seen)

    usual = error(rows, stream)
    assert 1e-6 < usual < 1e-4
    assert 0.008 < error(rows, stream * 10) / usual < 0.015
    sink = np.ones((64, 1), dtype=np.float32)
    sink[0] = 1000
    assert error(rows * sink, stream * sink) == pytest.approx(usual, rel=0.2)


def test_an_error_is_of_the_output_itself_where_it_is_added_to_nothing() -> None:
    """The end of a graph, or a structure that is not known: then nothing dilutes it."""
    graph = stream_graph().graph
    del graph.node[1]
    graph.node[0].output[0] = "logits"
    decoder = Decoder(graph, Path())
    (linear,) = decoder.linears()
    rows = np.random.default_rng(7).standard_normal((64, 32)).astype(np.float32)
    found = stream_error(decoder, linear, {"x": Activations(largest=np.abs(rows).max(axis=0), rows=rows)})
    assert 1e-5 < found < 3e-4


def test_as_few_are_spared_as_the_budget_asks_for() -> None:
    """The largest first, whatever the order of the graph."""
    errors = {"a": 1.0, "b": 8.0, "c": 0.5, "d": 2.0}
    for budget, expected in ((20.0, ""), (11.0, "b"), (3.5, "b"), (3.4, "bd"), (0.0, "abcd")):
        assert worst(errors, budget) == frozenset(expected)


# ── the export ───────────────────────────────────────────────────────────────────────────────────


def test_the_export_is_closer_than_one_scale_per_call(
    glm: Checkpoint, exact: Path, export: Export, tmp_path: Path
) -> None:
    """On the same weights and tokens, against fp32; and the recipe decides which operators there are."""
    expected = logits(exact)
    error = {
        name: float(np.square(logits(path) - expected).mean())
        for name, path in {
            "call": export(glm, EXACT.model_copy(update={"scheme": "dynamic_int8"}), tmp_path / "call"),
            "fixed": export(glm, INT8, tmp_path / "fixed"),
            "token": export(glm, INT8.model_copy(update={"fixed_scales": False}), tmp_path / "token"),
            "down": export(glm, INT8.model_copy(update={"weight_only_down": "all"}), tmp_path / "down"),
        }.items()
    }
    assert max(error["fixed"], error["token"], error["down"]) < error["call"]

    def operators(name: str) -> Counter[str]:
        graph = onnx.load(tmp_path / name / GRAPH, load_external_data=False).graph
        return Counter(node.op_type for node in graph.node)

    # Two layers: qkv, output, gate, up and down are products; the head stays weight-only.
    assert (operators("fixed")["MatMulIntegerToFloat"], operators("fixed")["MatMulNBits"]) == (10, 1)
    assert (operators("down")["MatMulIntegerToFloat"], operators("down")["MatMulNBits"]) == (8, 3)
    assert operators("fixed")["ReduceMax"] == 6  # gate and up of each layer share a fixed scale
    assert operators("token")["ReduceMax"] == 8


def test_a_tied_embedding_is_looked_up_in_rows_of_its_own(export: Export, tmp_path: Path) -> None:
    """The builder looks it up in the transposed head, which would be transposed again at every start."""
    checkpoint = load_checkpoint(
        str(build_checkpoint(tmp_path / "it", "glm", seed=5, tie_word_embeddings=True))
    )
    scratch = tmp_path / "scratch"
    scratch.mkdir()

    def transposes() -> int:
        return sum(node.op_type == "Transpose" for node in load_decoder(tmp_path).graph.node)

    genai_route.build(checkpoint, tmp_path, scratch, precision="fp32")
    assert transposes() == 1
    store_embedding_by_row(tmp_path)
    assert transposes() == 0
    found = logits(export(checkpoint, EXACT, tmp_path / "export"))
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.from_numpy(TOKENS)).logits.numpy()
    assert np.allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize(("budget", "spared"), [(0.0, 2), (1.0, 0)])
def test_the_recipe_spares_what_exceeds_the_budget(
    budget: float,
    spared: int,
    glm: Checkpoint,
    export: Export,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing may be lost, or anything: all down-projections keep 8-bit weights beside the head, or none."""
    monkeypatch.setattr(int8, "BUDGET", budget)
    found = export(glm, INT8.model_copy(update={"weight_only_down": "worst"}), tmp_path / "export")
    graph = onnx.load(found / GRAPH, load_external_data=False).graph
    counted = Counter(node.op_type for node in graph.node)
    assert (counted["MatMulIntegerToFloat"], counted["MatMulNBits"]) == (10 - spared, 1 + spared)
