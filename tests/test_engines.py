"""Finding engines by entry point, broken ones too, and the search spaces of those that are built in."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper
from studies import demo_analysis, demo_hardware

from open_autoglm import engines
from open_autoglm.engines.contract import SessionOptions
from open_autoglm.errors import UserError
from open_autoglm.export.graph import GRAPH, DecoderFacts
from open_autoglm.planning import plan
from open_autoglm.schemas import Candidate, ExportedModel, Knob, OptimizeSpec


@pytest.mark.parametrize("value", ["no_such_module:Engine", "json:NoSuchName", "json:dumps"])
def test_a_broken_plug_in_is_a_veto_with_its_reason(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that cannot be imported, lacks the class, or names no class ends nothing."""
    broken = EntryPoint(name="broken", value=value, group=engines.GROUP)
    monkeypatch.setattr(engines, "entry_points", lambda **_: [broken])
    for cached in (engines.names, engines.get):
        cached.cache_clear()
    try:
        probe = engines.get("broken").probe("cpu")
        assert not probe.ready
        assert value in probe.reason
        (candidate,) = plan(demo_analysis(), OptimizeSpec(model_path="x"), "cpu")
        assert candidate.vetoed_because == probe.reason
    finally:
        for cached in (engines.names, engines.get):
            cached.cache_clear()


def test_an_unknown_engine_is_refused_with_the_known_ones() -> None:
    """The sentence lists what could have been meant."""
    with pytest.raises(UserError, match=r"unknown engine 'onyx': choose from .*onnxruntime.*torch"):
        engines.get("onyx")


# ── search spaces ────────────────────────────────────────────────────────────────────────────────


def proposed(engine: str, **hardware: Any) -> dict[str, Candidate]:
    analysis = demo_analysis().model_copy(update={"hardware": demo_hardware(**hardware)})
    return {c.id: c for c in engines.get(engine).propose(analysis, OptimizeSpec(model_path="x"), "cpu")}


def space(candidate: Candidate, spec: OptimizeSpec | None = None, **hardware: Any) -> dict[str, Any]:
    """The values of each dimension by knob."""
    analysis = demo_analysis().model_copy(update={"hardware": demo_hardware(**hardware)})
    spec = spec or OptimizeSpec(model_path="x")
    found = engines.get(candidate.engine).dimensions(candidate, analysis, spec)
    return {dimension.knob: dimension.values for dimension in found}


def test_start_candidates_keep_their_names() -> None:
    """Ids name directories and MLflow runs: a default knob is not in them."""
    assert list(proposed("onnxruntime")) == [
        "onnxruntime-fp32",
        "onnxruntime-dynamic-int8",
        "onnxruntime-w8a8",
        "onnxruntime-w8-b32",
        "onnxruntime-w4-b32",
    ]
    assert list(proposed("torch")) == [
        "torch-fp32",
        "torch-bf16",
        "torch-bf16-compile",
        "torch-int8-compile",
        "torch-int4-compile",
    ]


@pytest.mark.parametrize(
    ("start", "knobs", "name", "bits"),
    [
        ("w8-b32", {"block_size": 16}, "w8-b16", 10),
        ("w4-b32", {"block_size": 128, "threads": 1}, "w4-b128-t1", 4.25),
        ("w4-b32", {"symmetric": False, "wide": "head-down"}, "w4-b32-asym-head-down8", 5),
        ("w8-b32", {"accuracy_level": 0, "graph_level": "basic"}, "w8-b32-a0-g-basic", 9),
        ("fp32", {"allow_spinning": False, "memory_pattern": False}, "fp32-nospin-nopattern", 32),
        ("fp32", {"flash_attention": False, "arena": False}, "fp32-noflash-noarena", 32),
        ("dynamic-int8", {"threads": 4}, "dynamic-int8-t4", 8),
        ("w8a8", {"fixed_scales": False}, "w8a8-token", 8),
        ("w8a8", {"weight_only_down": "none", "threads": 1}, "w8a8-down8-t1", 8),
        ("w8a8", {"weight_only_down": "all", "fixed_scales": False}, "w8a8-token-wdown", 8),
    ],
)
def test_onnxruntime_names_what_is_not_the_default(
    start: str, knobs: dict[str, Any], name: str, bits: float
) -> None:
    """Block size and bits always, everything else as a suffix; one fp32 scale per block counts as bits."""
    found = engines.get("onnxruntime").variant(proposed("onnxruntime")[f"onnxruntime-{start}"], knobs)
    assert (found.id, found.weight_bits) == (f"onnxruntime-{name}", bits)


def test_onnxruntime_turns_what_trades_something() -> None:
    """Blocks for weight-only candidates, scales for int8 ones; threads and session options for all."""
    start = proposed("onnxruntime")
    session = {
        "threads": ("all", 1),
        "graph_level": ("all", "basic"),
        "allow_spinning": (True, False),
        "flash_attention": (True, False),
        "draft_tokens": (0, 7),
    }
    int8 = {"fixed_scales": (True, False), "weight_only_down": ("worst", "none", "all")}
    assert space(start["onnxruntime-fp32"]) == session
    mixed = {"symmetric": (True, False), "wide": ("none", "head", "head-down")}
    assert space(start["onnxruntime-w4-b32"]) == {"block_size": (32, 16, 64, 128), **mixed, **session}
    assert space(start["onnxruntime-w8a8"]) == {**int8, **session}
    assert space(start["onnxruntime-w8-b32"]) == {"block_size": (32, 16, 64, 128), **session}


def test_onnxruntime_leaves_out_what_cannot_help_here() -> None:
    """fp32 arithmetic on 8-bit weights only where int8 is slow, half the cores only where there are two,
    memory patterns only where memory counts."""
    start = proposed("onnxruntime")["onnxruntime-w8-b32"]
    assert space(start, isa=("avx2",))["accuracy_level"] == (4, 0)
    assert "threads" not in space(start, cores=1)
    assert space(start, cores=16)["threads"] == ("all", 8)
    for spec in ({"max_memory": "1GiB"}, {"objective": "memory"}):
        assert {"memory_pattern", "arena"} <= set(space(start, OptimizeSpec(model_path="x", **spec)))


@pytest.mark.parametrize(
    "asked", [{"batch_size": 2}, {"objective": "ttft"}, {"objective": "ttft_p95"}, {"objective": "memory"}]
)
def test_drafts_are_not_tried_where_they_cannot_help(asked: dict[str, Any]) -> None:
    """A batch would advance raggedly, and neither the first token nor memory gains by them."""
    start = proposed("onnxruntime")["onnxruntime-w8-b32"]
    assert "draft_tokens" not in space(start, OptimizeSpec(model_path="x", **asked))


def test_int8_products_are_vetoed_where_they_overflow() -> None:
    """Without VNNI the kernel's intermediate sums are 16 bits wide: wrong numbers, so no trial."""
    hardware = demo_hardware(isa=("avx2",))
    analysis = demo_analysis().model_copy(update={"hardware": hardware})
    found = engines.get("onnxruntime").propose(analysis, OptimizeSpec(model_path="x"), "cpu")
    vetoed = {c.id: c.vetoed_because for c in found if c.vetoed_because}
    assert list(vetoed) == ["onnxruntime-w8a8"]
    assert "VNNI" in str(vetoed["onnxruntime-w8a8"])


def test_session_options_share_the_files() -> None:
    """The recipe is the key of the export store: it knows the weights' knobs and no other."""
    engine, start = engines.get("onnxruntime"), proposed("onnxruntime")["onnxruntime-w8-b32"]
    recipe = engine.recipe(start)
    session = {"threads": 1, "graph_level": "basic", "allow_spinning": False, "memory_pattern": False}
    assert engine.recipe(engine.variant(start, session)) == recipe
    assert engine.recipe(engine.variant(start, {"block_size": 64})) != recipe
    assert engine.recipe(engine.variant(start, {"accuracy_level": 0})) != recipe
    int8 = proposed("onnxruntime")["onnxruntime-w8a8"]
    turned: list[dict[str, Knob]] = [
        {"fixed_scales": False},
        {"weight_only_down": "none"},
        {"weight_only_down": "all"},
    ]
    recipes = [engine.recipe(engine.variant(int8, knobs)) for knobs in [{}, *turned]]
    assert all(recipes.count(recipe) == 1 for recipe in recipes)


def identity_export(directory: Path) -> ExportedModel:
    """The smallest files that ONNX Runtime opens as a decoder; its cache has no layer."""
    value = [helper.make_tensor_value_info(name, TensorProto.INT64, [1]) for name in ("input_ids", "logits")]
    node = helper.make_node("Identity", ["input_ids"], ["logits"])
    graph = helper.make_graph([node], "identity", value[:1], value[1:])
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=opset), directory / GRAPH)
    DecoderFacts(kv_heads=1, head_dim=1, kv_cache="in_place").write(directory)
    return ExportedModel(
        candidate_id="identity", path=directory, digest="", route="", size_bytes=0, build_s=0
    )


def test_session_options_reach_the_runtime(tmp_path: Path) -> None:
    """What ONNX Runtime says of its session is what the knobs ask for."""
    exported = identity_export(tmp_path)
    engine, start = engines.get("onnxruntime"), proposed("onnxruntime")["onnxruntime-fp32"]
    options = SessionOptions(batch_size=1, max_tokens=8, threads=2)
    switched_off = ("allow_spinning", "memory_pattern", "arena", "flash_attention")
    knobs = {"threads": 1, "graph_level": "basic", **dict.fromkeys(switched_off, False)}
    told = ("threads", "graph_level", "spinning", "memory_pattern", "arena", "flash_attention")
    for candidate, expected in (
        (start, ("2", "all", "allowed", "planned", "on", "on")),
        (engine.variant(start, knobs), ("1", "basic", "off", "off", "off", "off")),
    ):
        session = engine.open(candidate, exported, options)
        facts = session.facts()
        session.close()
        assert tuple(facts[name] for name in told) == expected


def test_torch_turns_threads_and_spares_the_yardsticks() -> None:
    """Reference and baseline stay what they are; the others may run on half the cores, int4 in groups."""
    start = proposed("torch")
    assert {name: space(candidate) for name, candidate in start.items()} == {
        "torch-fp32": {},
        "torch-bf16": {"threads": ("all", 1)},
        "torch-bf16-compile": {},
        "torch-int8-compile": {"threads": ("all", 1)},
        "torch-int4-compile": {"group_size": (32, 64), "threads": ("all", 1)},
    }
    found = engines.get("torch").variant(start["torch-bf16"], {"threads": 1})
    assert (found.id, found.weight_bits, found.precision) == ("torch-bf16-t1", 16, "bf16")
