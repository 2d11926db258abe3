"""Where ONNX Runtime's nodes go: counted, told, and never silently on the CPU."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from open_autoglm.engines.contract import RAN_ELSEWHERE, SessionOptions
from open_autoglm.engines.onnxruntime_placement import CPU, Nodes, Placement, WrongProvider
from open_autoglm.engines.onnxruntime_session import _CACHE_TYPES, open_session
from open_autoglm.export.graph import GRAPH, DecoderFacts

CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"
OPTIONS = SessionOptions(batch_size=1, max_tokens=8, threads=1)


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """Logits by one product; an input's first dimension is called rows."""
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["rows", 1])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", 4])
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["floats", "weight"], ["logits"]),
    ]
    weight = numpy_helper.from_array(np.ones((1, 4), dtype=np.float32), "weight")
    model = helper.make_graph(nodes, "product", [ids], [logits], [weight])
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(model, ir_version=8, opset_imports=opset), tmp_path / GRAPH)
    DecoderFacts(kv_heads=1, head_dim=1, kv_cache="in_place").write(tmp_path)
    return tmp_path


# ── counting ─────────────────────────────────────────────────────────────────────────────────────


def test_nodes_are_counted_by_provider_and_operator() -> None:
    """In one sentence, the most frequent first."""
    nodes = Nodes.from_pairs([(CUDA, "MatMul"), (CUDA, "Softmax"), (CUDA, "MatMul"), (CPU, "Shape")])
    assert nodes.words() == f"{CUDA} 3 (MatMul 2, Softmax 1); {CPU} 1 (Shape 1)"


@pytest.mark.parametrize("operator", ["MatMul", "MatMulNBits", "GroupQueryAttention", "Attention", "Softmax"])
def test_work_that_another_provider_got_is_told(operator: str) -> None:
    """How much of how much, where, and what; arithmetic of shapes is not work."""
    nodes = Nodes.from_pairs([(CUDA, "MatMul"), (CPU, operator), (CPU, "Shape")])
    assert nodes.elsewhere(CUDA) == f"of 3 nodes {CUDA} left to others: {CPU} 1 ({operator} 1)"


def test_shapes_may_be_computed_on_the_host() -> None:
    """ONNX Runtime puts a few integers there on purpose."""
    nodes = Nodes.from_pairs([(CUDA, "GroupQueryAttention"), (CPU, "Shape"), (CPU, "Gather"), (CPU, "Sub")])
    assert nodes.elsewhere(CUDA) == ""


# ── real sessions ────────────────────────────────────────────────────────────────────────────────


def test_a_session_tells_which_nodes_its_provider_got(graph: Path) -> None:
    """On the CPU too, where all of them are at home."""
    session = open_session(graph, OPTIONS)
    facts = session.facts()
    session.close()
    assert facts["nodes"] == f"{CPU} 2 (Cast 1, MatMul 1)"
    assert RAN_ELSEWHERE not in facts


def test_a_session_whose_provider_left_work_to_another_says_so(graph: Path) -> None:
    """The nodes of a real session, asked for on behalf of a provider that got none of them."""
    session = open_session(graph, OPTIONS)
    nodes = Nodes.of(session._session)
    session.close()
    assert nodes.elsewhere(CUDA) == f"of 2 nodes {CUDA} left to others: {CPU} 1 (MatMul 1)"


@pytest.mark.parametrize("provider", [CUDA, TENSORRT])
def test_a_provider_that_is_not_there_is_refused(provider: str, graph: Path) -> None:
    """ONNX Runtime itself would print a line and run on the CPU."""
    import onnxruntime as ort

    if provider in ort.get_available_providers():
        pytest.skip("this build of ONNX Runtime has it")
    with pytest.raises(WrongProvider, match=f"no {provider}, only .*{CPU}"):
        open_session(graph, OPTIONS, placement=Placement(provider=provider, device="cuda"))


def test_the_provider_found_must_be_the_one_asked_for(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library may be missing although the build has the provider: then ONNX Runtime falls back silently."""
    import onnxruntime as ort

    if CUDA in ort.get_available_providers():
        pytest.skip("this build of ONNX Runtime has it")
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU])
    with pytest.raises(WrongProvider, match=f"{CUDA} was asked for and ONNX Runtime chose {CPU}"):
        open_session(graph, OPTIONS, placement=Placement(provider=CUDA))


def test_a_graph_that_must_be_whole_leaves_no_node_to_the_cpu(graph: Path) -> None:
    """ONNX Runtime's own refusal, which `whole` asks for."""
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail

    with pytest.raises(Fail, match="fallback to CPU EP has been explicitly disabled"):
        open_session(graph, OPTIONS, placement=Placement(provider="AzureExecutionProvider", whole=True))


@pytest.mark.parametrize("name", list(_CACHE_TYPES))
def test_memory_of_every_type_can_be_filled_from_the_host(name: str) -> None:
    """As a cache on a device is: bf16, which numpy does not know, by its bits."""
    import onnxruntime as ort

    stored, onnx_type = _CACHE_TYPES[name]
    value = ort.OrtValue.ortvalue_from_shape_and_type((2, 3), onnx_type)
    value.update_inplace(np.ones((2, 3), dtype=stored))
    assert value.data_type() == name
    filled = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
    assert filled == np.ones((2, 3), dtype=stored).tobytes()


def test_a_named_dimension_can_be_made_a_constant(graph: Path) -> None:
    """As TensorRT's parser wants the places of the cache."""
    session = open_session(graph, OPTIONS, placement=Placement(fixed={"rows": 3}))
    assert session._session.get_inputs()[0].shape == [3, 1]
    session.close()
