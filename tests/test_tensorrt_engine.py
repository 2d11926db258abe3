"""The search space of both TensorRT engines, and what decides whether a plan is built again."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
from benches import tiny_bench
from studies import demo_analysis, demo_hardware

from open_autoglm import engines
from open_autoglm.engines import tensorrt_engine
from open_autoglm.engines.contract import room_of
from open_autoglm.export import tensorrt_plan
from open_autoglm.export.tensorrt_plan import PlanGpu
from open_autoglm.schemas import Analysis, Candidate, Device, Gpu, Knob, OptimizeSpec
from open_autoglm.settings import Settings

WIDE = {"hidden_size": 1024, "intermediate_size": 4096, "attention_heads": 16}
"""Layers that blocks of every size divide; the demo's are divided by 64 alone."""

ENGINES = pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
SPEC = OptimizeSpec(model_path="x")
GIB = 2**30


def analysis(capability: str | None = "9.0", memory_bytes: int = 80 * GIB, **profile: Any) -> Analysis:
    """The demo GLM on a host with one GPU."""
    gpu = Gpu(name="NVIDIA X", memory_bytes=memory_bytes, driver="580.1", compute_capability=capability)
    demo = demo_analysis()
    return demo.model_copy(
        update={
            "hardware": demo_hardware(gpus=(gpu,)),
            "profile": demo.profile.model_copy(update=profile),
        }
    )


def proposed(
    name: str, found: Analysis | None = None, spec: OptimizeSpec = SPEC, device: Device = "gpu"
) -> dict[str, Candidate]:
    candidates = engines.get(name).propose(found or analysis(), spec, device)
    return {candidate.id: candidate for candidate in candidates}


def space(candidate: Candidate, found: Analysis | None = None, spec: OptimizeSpec = SPEC) -> dict[str, Any]:
    dimensions = engines.get(candidate.engine).dimensions(candidate, found or analysis(), spec)
    return {dimension.knob: dimension.values for dimension in dimensions}


@ENGINES
def test_start_candidates_keep_their_names(name: str) -> None:
    """Precision of what is stored, with its scales."""
    found = {candidate.id: candidate.weight_bits for candidate in proposed(name).values()}
    assert found == {
        f"{name}-fp16": 16,
        f"{name}-bf16": 16,
        f"{name}-w8": 8,
        f"{name}-w4-b64": 4.25,
        f"{name}-w8a8": 8,
        f"{name}-fp8": 8,
    }
    assert not [candidate for candidate in proposed(name).values() if candidate.vetoed_because]


@ENGINES
def test_on_the_cpu_one_line_stands_for_all(name: str) -> None:
    """The engine says why, and a study's table does not list six candidates that cannot run."""
    assert list(proposed(name, demo_analysis(), device="cpu")) == [f"{name}-fp16"]
    probe = engines.get(name).probe("cpu")
    assert (probe.stage, probe.ready) == ("no_device", False)
    assert "NVIDIA GPUs only" in probe.reason


@ENGINES
def test_a_knob_that_is_not_the_default_is_in_the_id(name: str) -> None:
    """Every combination has an id of its own, and the same one has the same."""
    spec = OptimizeSpec(model_path="x", objective="throughput", max_memory="4GiB")
    engine, ids = engines.get(name), []
    for start in proposed(name, spec=spec).values():
        found = space(start, spec=spec)
        turns = [dict(zip(found, values, strict=True)) for values in product(*found.values())]
        ids += [engine.variant(start, knobs).id for knobs in turns]
        assert engine.variant(start, {}).id == start.id
        assert all(
            engine.variant(engine.variant(start, knobs), dict(start.knobs)).id == start.id for knobs in turns
        )
    assert len(set(ids)) == len(ids) == 2 * 24 + 4 * 48
    everything = {
        "block_size": 64,
        "compute": "bf16",
        "tuned_for": "token",
        "weight_streaming": True,
        "cuda_graph": True,
        "draft_tokens": 7,
    }
    start = proposed(name, analysis(**WIDE))[f"{name}-w4-b128"]
    assert engine.variant(start, everything).id == f"{name}-w4-b64-bf16-token-stream-graph-draft7"
    with pytest.raises(KeyError):
        engine.variant(start, {"threads": 1})


@ENGINES
def test_what_trades_something_is_turned(name: str) -> None:
    """Arithmetic where weights are rounded, streaming where memory counts, drafts for one prompt."""
    start = proposed(name)
    session = {"draft_tokens": (0, 7), "cuda_graph": (False, True)}
    compute = {"compute": ("fp16", "bf16")}
    assert space(start[f"{name}-fp16"]) == session == space(start[f"{name}-bf16"])
    assert space(start[f"{name}-w4-b64"]) == {**session, **compute} == space(start[f"{name}-w8a8"])
    wide = analysis(**WIDE)
    blocks = {"block_size": (128, 64)}
    assert space(proposed(name, wide)[f"{name}-w4-b128"], wide) == {**session, **blocks, **compute}
    assert space(start[f"{name}-w8"], analysis("7.5")) == session
    streaming, narrow = {"weight_streaming": (False, True)}, {"tuned_for": ("token", "prompt")}
    small = analysis(memory_bytes=2**27)
    found = proposed(name, small)[f"{name}-fp16-token"]
    assert space(found, small) == {**session, **narrow, **streaming}
    tight = OptimizeSpec(model_path="x", objective="memory", batch_size=2)
    saving = {"tuned_for": ("both", "token", "prompt"), **streaming}
    assert space(start[f"{name}-fp16"], spec=tight) == {"cuda_graph": (False, True), **saving}


@ENGINES
@pytest.mark.parametrize(("objective", "tuned_for"), [("latency", "token"), ("ttft", "prompt")])
def test_a_gpu_without_room_for_twice_the_weights_gets_one_profile(
    name: str, objective: Any, tuned_for: str
) -> None:
    """With the figures in its reason, for each precision by itself; a GPU without memory has the host's."""
    spec = OptimizeSpec(model_path="x", objective=objective)
    large = {"parameters": 9_400_000_000, "memory_bytes": 24 * GIB}
    found = {c.precision: c for c in proposed(name, analysis(**large), spec).values()}
    assert {precision: c.knobs["tuned_for"] for precision, c in found.items()} == {
        **dict.fromkeys(("fp16", "bf16"), tuned_for),
        **dict.fromkeys(("int8", "fp8", "int4"), "both"),
    }
    assert found["fp16"].id == f"{name}-fp16-{tuned_for}"
    assert found["fp16"].proposed_because.endswith(
        "; one profile for all lengths, since twice the weights, 35.0 GiB, are more than 80% of the 24.0 GiB "
        "of NVIDIA X"
    )
    assert "one profile" not in found["int4"].proposed_because
    shared = proposed(name, analysis(memory_bytes=0, parameters=10**12), spec)
    assert {c.knobs["tuned_for"] for c in shared.values()} == {tuned_for}
    without = proposed(name, demo_analysis().model_copy(update={"hardware": demo_hardware(gpus=())}), spec)
    assert {c.knobs["tuned_for"] for c in without.values()} == {"both"}


@ENGINES
def test_layers_that_no_block_divides_veto_4_bits(name: str) -> None:
    """The id would name a block that the file does not have."""
    found = proposed(name, analysis(hidden_size=72)).values()
    vetoes = {c.precision: c.vetoed_because for c in found if c.vetoed_because}
    assert vetoes == {"int4": "its layers' inputs are no multiples of 64, the smallest block"}


EVERY = {"fp16", "bf16", "int8", "int4", "fp8"}


@pytest.mark.parametrize(
    ("name", "capability", "vetoed"),
    [
        ("tensorrt", "7.0", EVERY),
        ("tensorrt", "7.5", {"bf16", "fp8"}),
        ("tensorrt", "8.6", {"fp8"}),
        ("tensorrt", "8.9", set()),
        ("tensorrt", None, set()),
        ("tensorrt-rtx", "7.5", EVERY),
        ("tensorrt-rtx", "8.6", {"fp8"}),
        ("tensorrt-rtx", "12.0", set()),
    ],
)
def test_a_gpu_of_an_older_generation_vetoes(name: str, capability: str | None, vetoed: set[str]) -> None:
    """What it cannot run at all, or without the arithmetic; with both numbers. One that does not tell is
    tried."""
    found = proposed(name, analysis(capability)).values()
    reasons = {c.precision: c.vetoed_because for c in found if c.vetoed_because}
    assert set(reasons) == vetoed
    assert all(str(capability) in reason and "NVIDIA X" in reason for reason in reasons.values())


@ENGINES
def test_an_unknown_model_is_vetoed(name: str) -> None:
    """Before minutes are spent: the standard graph says which it knows."""
    found = proposed(name, analysis(model_type="glm4_moe")).values()
    assert all("no standard graph for model type glm4_moe" in str(c.vetoed_because) for c in found)


# ── plans ────────────────────────────────────────────────────────────────────────────────────────


@ENGINES
@pytest.mark.parametrize("asked", [{}, {"prompt_tokens": 300, "output_tokens": 90}, {"prompt_tokens": 504}])
def test_a_plan_has_the_room_that_a_study_asks_for(
    name: str, asked: dict[str, int], tiny_glm: Path, settings: Settings, tmp_path: Path
) -> None:
    """Candidates are proposed before requests and texts are drawn, and must know how long they will be."""
    bench = tiny_bench(tiny_glm, settings, tmp_path, **asked)
    found = analysis(context_tokens=bench.checkpoint.context_tokens)
    candidate = proposed(name, found, bench.spec)[f"{name}-fp16"]
    options = bench.options()
    assert room_of(candidate) == options.max_tokens
    assert candidate.knobs["batch_size"] == options.batch_size
    assert candidate.knobs["prompt_tokens"] == bench.spec.prompt_tokens


def test_a_candidate_of_another_engine_has_no_such_limit() -> None:
    (start, *_) = engines.get("torch").propose(demo_analysis(), SPEC, "cpu")
    assert room_of(start) is None


@ENGINES
def test_session_knobs_share_the_plan(name: str) -> None:
    """CUDA graphs and drafts are the session's; everything else is another plan."""
    engine, start = engines.get(name), proposed(name)[f"{name}-w4-b64"]
    recipe = engine.recipe(start)
    assert engine.recipe(engine.variant(start, {"cuda_graph": True, "draft_tokens": 7})) == recipe
    turned: list[dict[str, Knob]] = [
        {"block_size": 128},
        {"compute": "bf16"},
        {"weight_streaming": True},
        {"cache_tokens": 4096},
    ]
    turned += [{"batch_size": 2}, {"prompt_tokens": 7}, {"tuned_for": "token"}]
    recipes = [recipe, *(engine.recipe(engine.variant(start, knobs)) for knobs in turned)]
    assert all(recipes.count(found) == 1 for found in recipes)
    assert len({str(engine.recipe(c)) for c in proposed(name).values()}) == len(proposed(name))


@ENGINES
def test_another_gpu_or_version_is_another_recipe(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stored plan is found again only where it can be opened."""
    engine, start = engines.get(name), proposed(name)[f"{name}-fp16"]
    recipes = []
    for gpu in (None, PlanGpu(name="NVIDIA X", compute_capability="9.0")):
        for version in (None, "10.16", "11.4"):
            monkeypatch.setattr(tensorrt_engine, "host_gpu", lambda gpu=gpu: gpu)
            monkeypatch.setattr(tensorrt_engine, "version_of", lambda *_, version=version: version)
            recipes.append(engine.recipe(start))
    assert all(recipes.count(found) == 1 for found in recipes)


def test_the_gpu_is_the_first_that_the_driver_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the hardware's description has it; none without a driver."""
    from open_autoglm.hardware import Gpus

    first, second = (Gpu(name=n, memory_bytes=1, driver="1", compute_capability="9.0") for n in ("A", "B"))
    for gpus, expected in (((), None), ((first, second), PlanGpu(name="A", compute_capability="9.0"))):
        monkeypatch.setattr(tensorrt_plan, "find_gpus", lambda gpus=gpus: Gpus(gpus, ""))
        tensorrt_plan.host_gpu.cache_clear()
        assert tensorrt_plan.host_gpu() == expected
    tensorrt_plan.host_gpu.cache_clear()
