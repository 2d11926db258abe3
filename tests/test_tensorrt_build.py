"""Real plans, built by TensorRT-RTX, whose builder needs no GPU; and the networks they are built from.

A plan can be inspected only where it can be opened, which takes a driver. What goes into it can be read from
the network that TensorRT's parser made of the graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from studies import demo_analysis
from tiny_models import build_checkpoint

from open_autoglm import engines
from open_autoglm.checkpoint import load_checkpoint
from open_autoglm.engines.capability_driver import missing_driver
from open_autoglm.engines.contract import ExportContext
from open_autoglm.export.graph import DATA, GRAPH
from open_autoglm.export.standard_graph import MAX_TOKENS, write_standard
from open_autoglm.export.standard_recipe import StandardRecipe
from open_autoglm.export.tensorrt_api import TensorRTFailure, load
from open_autoglm.export.tensorrt_build import ParsedGraph, build_plan, input_ranges
from open_autoglm.export.tensorrt_plan import (
    PLAN,
    RECORD,
    REGIMES,
    RUNTIME_CACHE,
    PlanHost,
    PlanRecord,
    PlanSizes,
    check_plan,
    profiles_of,
    read_record,
)
from open_autoglm.export.tensorrt_runtime import OpenPlan
from open_autoglm.files import sha256_file
from open_autoglm.schemas import Candidate, OptimizeSpec

pytest.importorskip("tensorrt_rtx_bindings", reason="pip install 'open-autoglm[trt-rtx]' builds real plans")

SIZES = PlanSizes(batch_size=2, prompt_tokens=16, cache_tokens=48)
DEMO: dict[str, Any] = {
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0, "partial_rotary_factor": 1.0},
}
"""The shape of the demo GLM, but for its 30 layers."""

Write = Callable[[StandardRecipe], Path]


@pytest.fixture(scope="module")
def write(tiny_glm: Path, tmp_path_factory: pytest.TempPathFactory) -> Write:
    """Writes the standard graph of the tiny GLM."""

    def write_graph(recipe: StandardRecipe) -> Path:
        directory = tmp_path_factory.mktemp("standard")
        write_standard(load_checkpoint(str(tiny_glm)), recipe, directory)
        return directory

    return write_graph


def build(graph: Path, output: Path, sizes: PlanSizes = SIZES, **more: Any) -> PlanRecord:
    return build_plan(graph, output, sizes, "tensorrt-rtx", timings=output / "timings", **more)


def parse(graph: Path, cache_tokens: int = SIZES.cache_tokens) -> ParsedGraph:
    return ParsedGraph(load("tensorrt-rtx"), graph, cache_tokens)


def layers_of(parsed: ParsedGraph) -> Counter[str]:
    """How many there are of each type."""
    found = (parsed.network.get_layer(index) for index in range(parsed.network.num_layers))
    return Counter(layer.type.name for layer in found)


def tensors_of(parsed: ParsedGraph) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of inputs and outputs."""
    network = parsed.network
    found = [network.get_input(index) for index in range(network.num_inputs)]
    found += [network.get_output(index) for index in range(network.num_outputs)]
    return {tensor.name: (tensor.dtype.name, tuple(tensor.shape)) for tensor in found}


# ── the tiny GLM ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("compute", "typed"), [("fp16", "HALF"), ("bf16", "BF16"), ("fp32", "FLOAT")])
def test_the_network_is_the_graphs(write: Write, compute: Any, typed: str) -> None:
    """Types are the graph's; cache, rotary embedding and attention are single layers, not their parts."""
    parsed = parse(write(StandardRecipe(compute=compute)))
    cache = (-1, 2, SIZES.cache_tokens, 32)
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "input_ids": ("INT64", (-1, -1)),
        "position_ids": ("INT64", (-1, -1)),
        "write_indices": ("INT64", (-1,)),
        "first_logits": ("INT64", (1,)),
        "logits": ("FLOAT", (-1, -1, 512)),
    }
    for side in ("past_key_values", "present"):
        expected |= {
            f"{side}.{layer}.{part}": (typed, cache) for layer in (0, 1) for part in ("key", "value")
        }
    assert tensors_of(parsed) == expected
    layers = layers_of(parsed)
    assert (layers["KV_CACHE_UPDATE"], layers["ROTARY_EMBEDDING"]) == (4, 4)
    assert (layers["ATTENTION_INPUT"] > 0) == (compute != "fp32")  # no fused fp32 attention exists


def test_each_regime_has_its_profile(write: Write) -> None:
    """Prefill takes any length up to the cache's, decode one token; the cache has one size in both."""
    parsed = parse(write(StandardRecipe(compute="fp16")))
    network = parsed.network
    prefill, decode = (
        {found.name: (found.least, found.best, found.most) for found in input_ranges(network, SIZES, regime)}
        for regime in REGIMES
    )
    assert prefill["input_ids"] == ((1, 1), (2, 16), (2, 48))
    assert decode["input_ids"] == ((1, 1), (2, 1), (2, 1))
    assert prefill["first_logits"] == ((0,), (15,), (47,))
    assert decode["first_logits"] == ((0,), (0,), (0,))
    for ranges in (prefill, decode):
        assert ranges["position_ids"] == ranges["input_ids"]
        assert ranges["write_indices"] == ((1,), (2,), (2,))
        assert ranges["past_key_values.1.value"] == ((1, 2, 48, 32), (2, 2, 48, 32), (2, 2, 48, 32))
        assert len(ranges) == network.num_inputs


@pytest.mark.parametrize(("tuned_for", "usual"), [("token", 1), ("prompt", 16)])
def test_one_profile_may_serve_both_regimes(write: Write, tuned_for: Any, usual: int) -> None:
    """From a token to a full cache, with kernels chosen for one of the lengths."""
    parsed = parse(write(StandardRecipe(compute="fp16")))
    sizes = SIZES.model_copy(update={"tuned_for": tuned_for})
    assert profiles_of(sizes) == ("any",)
    ranges = {found.name: found for found in input_ranges(parsed.network, sizes, "any")}
    for name, expected in (
        ("input_ids", ((1, 1), (2, usual), (2, 48))),
        ("first_logits", ((0,), (usual - 1,), (47,))),
    ):
        assert (ranges[name].least, ranges[name].best, ranges[name].most) == expected


def test_one_profile_holds_the_weights_once(tmp_path: Path) -> None:
    """Which is what it is for: TensorRT-RTX writes those of linear layers for each profile."""
    checkpoint = load_checkpoint(
        str(build_checkpoint(tmp_path / "glm", layers=1, **{**DEMO, "vocab_size": 2048}))
    )
    graph = tmp_path / "graph"
    graph.mkdir()
    write_standard(checkpoint, StandardRecipe(compute="fp16"), graph)
    weights = (graph / DATA).stat().st_size
    plans = {}
    for tuned_for in ("both", "token"):
        (tmp_path / tuned_for).mkdir()
        sizes = PlanSizes.model_validate(
            {"batch_size": 1, "prompt_tokens": 128, "cache_tokens": 256, "tuned_for": tuned_for}
        )
        plans[tuned_for] = build(graph, tmp_path / tuned_for, sizes)
    assert list(plans["token"].profiles) == ["any"]
    once, twice = plans["token"].plan.size_bytes, plans["both"].plan.size_bytes
    assert weights < once < 1.3 * weights  # of the tied embedding there are two forms
    assert twice - once > 0.7 * weights


@pytest.mark.parametrize(("compute", "weight_streaming"), [("fp16", True), ("fp32", False)])
def test_a_plan_is_built(write: Write, tmp_path: Path, compute: Any, weight_streaming: bool) -> None:
    """Prefill and decode in one; the record says what it is, and is what is asked before it is opened."""
    graph = write(StandardRecipe(compute=compute))
    record = build(graph, tmp_path, weight_streaming=weight_streaming)
    assert read_record(tmp_path) == record
    assert record.plan.sha256 == sha256_file(tmp_path / PLAN)
    assert (record.sizes, record.weight_streaming) == (SIZES, weight_streaming)
    assert set(record.profiles) == set(REGIMES)
    assert check_plan(tmp_path, record.host, batch_size=2, cache_tokens=48) == record


SPEC = OptimizeSpec(model_path="x", prompt_tokens=32, output_tokens=16)
CANDIDATES = engines.get("tensorrt-rtx").propose(demo_analysis(), SPEC, "gpu")


@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda candidate: candidate.id)
def test_what_is_proposed_is_exported(candidate: Candidate, tiny_glm: Path, tmp_path: Path) -> None:
    """The engine's own way, calibration included: a plan with its record, and the graph is gone."""
    output = tmp_path / "export"
    output.mkdir()
    context = ExportContext(output=output, ledger=tmp_path / "ledger.json")
    engines.get(candidate.engine).export(candidate, load_checkpoint(str(tiny_glm)), context)
    assert {path.name for path in output.iterdir()} - {RUNTIME_CACHE} == {PLAN, RECORD}
    record = read_record(output)
    assert record.plan.size_bytes > 100_000
    assert record.sizes.cache_tokens == candidate.knobs["cache_tokens"]
    assert not [warning for warning in record.warnings if "Int64 binding" not in warning]


@pytest.mark.skipif(missing_driver() is None, reason="this host has a driver")
def test_what_can_be_built_need_not_run(write: Write, tmp_path: Path) -> None:
    """Without a GPU the record says that nobody tried, and opening gives the reason in one line."""
    record = build(write(StandardRecipe(compute="fp16")), tmp_path)
    assert (record.host.gpu, record.can_run) == (None, None)
    assert record.run_reason == "no GPU to try it on"
    with pytest.raises(TensorRTFailure, match=r"cannot open the plan: .*CUDA driver") as failed:
        OpenPlan(load("tensorrt-rtx"), tmp_path / PLAN)
    assert "\n" not in str(failed.value)


def test_the_same_graph_has_the_same_digest(write: Write, tmp_path: Path) -> None:
    """And another graph another one."""
    digests = []
    for number, compute in enumerate(("fp16", "fp16", "bf16")):
        output = tmp_path / str(number)
        output.mkdir()
        digests.append(build(write(StandardRecipe.model_validate({"compute": compute})), output).graph_digest)
    assert digests[0] == digests[1] != digests[2]


def test_a_plan_of_one_row_and_two_tokens_is_built(write: Write, tmp_path: Path) -> None:
    """The smallest sizes there are."""
    sizes = PlanSizes(batch_size=1, prompt_tokens=1, cache_tokens=2)
    record = build(write(StandardRecipe(compute="fp16")), tmp_path, sizes)
    ranges = {found.name: found for found in record.profiles["prefill"]}
    assert ranges["input_ids"].most == (1, 2)


# ── failures ─────────────────────────────────────────────────────────────────────────────────────


def write_attention(directory: Path, **attributes: Any) -> Path:
    """A graph of one attention in fp32, over what it makes of a cache."""
    shape = ["batch", 2, MAX_TOKENS, 64]
    past = helper.make_tensor_value_info("past_key_values.0.key", TensorProto.FLOAT, shape)
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)
    kinds, parts = ("Abs", "Neg", "Exp"), ["query", "key", "value"]
    nodes = [helper.make_node(kind, [past.name], [part]) for kind, part in zip(kinds, parts, strict=True)]
    nodes.append(helper.make_node("Attention", parts, ["logits"], "mixed", **attributes))
    graph = helper.make_graph(nodes, "attention", [past], [logits])
    model = helper.make_model(graph, ir_version=11, opset_imports=[helper.make_opsetid("", 24)])
    onnx.save(model, directory / GRAPH)
    return directory


def test_what_the_parser_cannot_read_is_one_sentence(tmp_path: Path) -> None:
    """In the parser's own words."""
    graph = write_attention(tmp_path, softmax_precision=TensorProto.FLOAT)
    with pytest.raises(
        TensorRTFailure, match=r"TensorRT 1\.\d+\S* cannot read the graph: .*softmax"
    ) as failed:
        build(graph, tmp_path)
    assert "\n" not in str(failed.value)
    assert not (tmp_path / PLAN).exists()


def test_what_the_builder_cannot_build_is_one_sentence(tmp_path: Path) -> None:
    """There is no fused attention in fp32, which only the builder finds out."""
    with pytest.raises(
        TensorRTFailure, match=r"TensorRT 1\.\d+\S* cannot build the graph: .*kernel"
    ) as failed:
        build(write_attention(tmp_path), tmp_path)
    assert "\n" not in str(failed.value)
    assert not (tmp_path / RECORD).exists()


# ── as wide as the demo ──────────────────────────────────────────────────────────────────────────


def test_twelve_layers_are_built(tmp_path: Path) -> None:
    """Twelve of the demo GLM's 30 layers and all of its vocabulary in fp16, 71 M parameters drawn at random:
    the builder takes as long for each further layer, and learns nothing from it."""
    checkpoint = load_checkpoint(str(build_checkpoint(tmp_path / "glm", layers=12, **DEMO)))
    graph, output = tmp_path / "graph", tmp_path / "plan"
    graph.mkdir()
    output.mkdir()
    write_standard(checkpoint, StandardRecipe(compute="fp16"), graph)
    sizes = PlanSizes(batch_size=1, prompt_tokens=512, cache_tokens=640)
    record = build(graph, output, sizes)
    assert record.plan.size_bytes > 2 * 70e6
    layers = layers_of(parse(graph, sizes.cache_tokens))
    assert (layers["KV_CACHE_UPDATE"], layers["ROTARY_EMBEDDING"]) == (24, 24)
    assert record.layers == sum(layers.values())
    assert np.prod([found.most for found in record.profiles["decode"] if found.name == "input_ids"]) == 1
    assert record.host == PlanHost(flavour="tensorrt-rtx", version=record.host.version, gpu=record.host.gpu)
