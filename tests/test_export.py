"""From a checkpoint to the files an engine needs: right by either route, learned once, stored by content."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from studies import demo_profile
from tiny_models import VOCAB_SIZE, build_checkpoint

from open_autoglm.checkpoint import load_checkpoint
from open_autoglm.engines.contract import ExportContext, SessionOptions
from open_autoglm.engines.onnxruntime_session import open_session
from open_autoglm.errors import UserError
from open_autoglm.export import genai_route, routes
from open_autoglm.export.graph import FIRST_LOGITS, GRAPH, DecoderFacts, choose_logits
from open_autoglm.export.ledger import Ledger
from open_autoglm.export.preflight import small_config, traits
from open_autoglm.export.quantize import weight_only
from open_autoglm.export.recipe import EXACT, OnnxRecipe
from open_autoglm.export.routes import NoRoute, choose_route, export_onnx, library_versions
from open_autoglm.export.store import RECORD, check_disk, export_candidate
from open_autoglm.measure.isolation import Failure
from open_autoglm.schemas import Candidate, Checkpoint, ExportedModel
from open_autoglm.settings import Settings

GENAI, TRANSFORMERS = "onnxruntime-genai", "transformers"
FP32 = EXACT
TOKENS: NDArray[np.int64] = np.random.default_rng(0).integers(4, VOCAB_SIZE, (2, 24))

Known = Callable[[Checkpoint, str, str, str], None]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """A tiny checkpoint of each model type, built once."""

    @cache
    def build(model_type: str) -> Checkpoint:
        return load_checkpoint(str(build_checkpoint(tmp_path_factory.mktemp(model_type) / "it", model_type)))

    return build


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.json")


@pytest.fixture
def know(ledger: Ledger) -> Known:
    """Enter an outcome for a checkpoint and a route."""

    def enter(checkpoint: Checkpoint, route: str, outcome: Any, reason: str = "told by a test") -> None:
        config = traits(small_config(checkpoint))
        ledger.put(checkpoint.model_type, route, config, library_versions(), outcome, reason)

    return enter


def export(checkpoint: Checkpoint, recipe: OnnxRecipe, output: Path, ledger: Path) -> str:
    """The route taken, in this process; the exporters' chatter is dropped."""
    with contextlib.redirect_stdout(io.StringIO()):
        return export_onnx(checkpoint, recipe, ExportContext(output=output, ledger=ledger))


def external_data_names(path: Path) -> set[str]:
    """Names of the external data files a graph refers to."""
    import onnx
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    model = onnx.load(path, load_external_data=False)
    return {
        ExternalDataInfo(tensor).location for tensor in model.graph.initializer if uses_external_data(tensor)
    }


def torch_logits(checkpoint: Checkpoint, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: NDArray[np.float32] = model(torch.from_numpy(tokens)).logits.numpy()
    return logits


# ── routes ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize(
    ("model_type", "route"),
    [("glm", GENAI), ("llama", GENAI), ("qwen2", GENAI), ("qwen3", GENAI), ("glm4", TRANSFORMERS)],
)
def test_each_family_is_exported_by_its_route_and_equals_torch(
    model_type: str,
    route: str,
    family: Callable[[str], Checkpoint],
    shared_ledger: Path,
    tmp_path: Path,
) -> None:
    """Both graphs agree with torch: the whole sequence at once, a prompt, and tokens one by one."""
    checkpoint = family(model_type)
    assert export(checkpoint, FP32, tmp_path, shared_ledger) == route
    expected = torch_logits(checkpoint, TOKENS)
    session = open_session(tmp_path, SessionOptions(batch_size=2, max_tokens=24, threads=1))
    np.testing.assert_allclose(session.full_logits(TOKENS), expected, atol=1e-3)
    np.testing.assert_allclose(session.prefill(TOKENS[:, :20]), expected[:, 19], atol=1e-3)
    for position in range(20, 24):
        found = session.decode(TOKENS[:, position])
        np.testing.assert_allclose(found, expected[:, position], atol=1e-3)
    if route == GENAI:
        assert attention_scales(tmp_path) == {1.0}, "the queries' weights carry the scale"


def attention_scales(directory: Path) -> set[float]:
    import onnx

    nodes = onnx.load(directory / GRAPH, load_external_data=False).graph.node
    attributes = [node.attribute for node in nodes if node.op_type == "GroupQueryAttention"]
    return {attribute.f for found in attributes for attribute in found if attribute.name == "scale"}


def test_an_export_is_one_graph_that_gives_the_logits_asked_for(
    family: Callable[[str], Checkpoint], shared_ledger: Path, tmp_path: Path
) -> None:
    """Serving computes the head for one row, quality for all, drafts for the last few."""
    import onnxruntime as ort

    export(family("glm"), FP32, tmp_path, shared_ledger)
    assert {file.name for file in tmp_path.iterdir()} == {GRAPH, f"{GRAPH}.data", "decoder.json"}
    assert external_data_names(tmp_path / GRAPH) == {f"{GRAPH}.data"}

    session = ort.InferenceSession(tmp_path / GRAPH)
    facts = DecoderFacts.read(tmp_path)
    empty = np.zeros((2, facts.kv_heads, 0, facts.head_dim), dtype=np.float32)
    known = {
        "input_ids": TOKENS,
        "attention_mask": np.ones_like(TOKENS),
        "position_ids": np.tile(np.arange(TOKENS.shape[1]), (2, 1)),
    }

    def logits(first: int) -> NDArray[np.float32]:
        known[FIRST_LOGITS] = np.array([first])
        feeds = {given.name: known.get(given.name, empty) for given in session.get_inputs()}
        found: NDArray[np.float32] = session.run(["logits"], feeds)[0]
        return found

    everything = logits(0)
    assert everything.shape[:2] == TOKENS.shape
    for first in (-1, -3, 5):
        np.testing.assert_allclose(logits(first), everything[:, first:], atol=1e-5)


def test_logits_are_chosen_before_the_head_wherever_it_is(tmp_path: Path) -> None:
    """Exporters put a bias, a scale or a cast behind the product; the rows are chosen before it."""
    import onnx
    from onnx import TensorProto, helper
    from onnx.reference import ReferenceEvaluator

    hidden = helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["batch", "sequence", 8])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", 8])
    weight = helper.make_tensor("weight", TensorProto.FLOAT, [8, 8], np.eye(8).ravel())
    nodes = [
        helper.make_node("MatMul", ["hidden", "weight"], ["product"]),
        helper.make_node("Tanh", ["product"], ["logits"]),
    ]
    graph = helper.make_graph(nodes, "g", [hidden], [logits], [weight])
    onnx.save(helper.make_model(graph), tmp_path / GRAPH)
    choose_logits(tmp_path)
    model = onnx.load(tmp_path / GRAPH)
    assert [node.op_type for node in model.graph.node] == ["Slice", "MatMul", "Tanh"]
    values = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)
    (found,) = ReferenceEvaluator(model).run(None, {"hidden": values, FIRST_LOGITS: np.array([-2])})
    np.testing.assert_allclose(found, np.tanh(values[:, -2:]), atol=1e-6)


def test_a_graph_with_nothing_to_quantise_is_refused(tmp_path: Path) -> None:
    """The candidate would be fp32 under another name."""
    import onnx
    from onnx import TensorProto, helper

    ids = helper.make_tensor_value_info("input_ids", TensorProto.FLOAT, ["batch", "sequence", 8])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", 8])
    graph = helper.make_graph([helper.make_node("Relu", ["input_ids"], ["logits"])], "g", [ids], [logits])
    onnx.save(helper.make_model(graph), tmp_path / GRAPH)
    with pytest.raises(RuntimeError, match="no MatMul"):
        weight_only(onnx.load(tmp_path / GRAPH), tmp_path, OnnxRecipe(scheme="weight_only", weight_bits=8))


# ── the ledger ───────────────────────────────────────────────────────────────────────────────────


def test_what_preflight_finds_is_entered_and_believed(
    family: Callable[[str], Checkpoint], ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second export of a model type asks the ledger instead of trying again."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    assert choose_route(family("llama"), tmp_path / "ledger.json", tmp_path / "one").NAME == GENAI
    (entry,) = ledger.entries().values()
    assert (entry.model_type, entry.route, entry.outcome) == ("llama", GENAI, "works")
    assert entry.versions == library_versions()
    monkeypatch.setattr(routes, "try_route", unexpected)
    assert choose_route(family("llama"), tmp_path / "ledger.json", tmp_path / "two").NAME == GENAI


def unexpected(*_: Any) -> None:
    raise AssertionError("a second preflight")


def test_a_route_that_fails_its_preflight_gives_way_to_the_next(
    family: Callable[[str], Checkpoint], ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why it failed is entered, and it is not tried again."""
    asked: list[str] = []

    def only_transformers(route: Any, *_: Any) -> Failure | None:
        asked.append(route.NAME)
        return Failure("crashed", "ended with SIGSEGV") if route.NAME == GENAI else None

    monkeypatch.setattr(routes, "try_route", only_transformers)
    for attempt in ("one", "two"):
        (tmp_path / attempt).mkdir()
        route = choose_route(family("llama"), tmp_path / "ledger.json", tmp_path / attempt)
        assert route.NAME == TRANSFORMERS
    assert asked == [GENAI, TRANSFORMERS]
    failed = next(entry for entry in ledger.entries().values() if entry.route == GENAI)
    assert failed.outcome == "fails"
    assert failed.reason == "ended with SIGSEGV"


def test_an_exporter_that_raises_is_a_failure_with_its_reason(
    family: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    """The preflight child answers with what the exporter said; here the builder is asked for a GLM-4."""
    failure = routes.try_route(genai_route, family("glm4"), tmp_path)
    assert failure is not None
    assert failure.status == "failed"
    assert "not currently supported" in failure.reason


def test_if_no_route_is_right_each_says_why(
    family: Callable[[str], Checkpoint], know: Known, tmp_path: Path
) -> None:
    """The trial's reason names every route with its own."""
    know(family("glm4"), TRANSFORMERS, "fails", "logits differ by 3 standard deviations")
    with pytest.raises(NoRoute) as caught:
        choose_route(family("glm4"), tmp_path / "ledger.json", tmp_path)
    assert f"{GENAI}: the onnxruntime-genai builder has no verified class" in str(caught.value)
    assert f"{TRANSFORMERS}: logits differ by 3 standard deviations" in str(caught.value)


def test_other_library_versions_are_other_entries(
    family: Callable[[str], Checkpoint], ledger: Ledger, know: Known
) -> None:
    """An upgrade may mend or break a route, so it is tried anew."""
    know(family("llama"), GENAI, "works")
    config = traits(small_config(family("llama")))
    newer = library_versions() | {"onnxruntime-genai": "99.0"}
    assert ledger.get("llama", GENAI, config, library_versions()) is not None
    assert ledger.get("llama", GENAI, config, newer) is None


# ── the store ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def store(fake_engine: Callable[..., Candidate], settings: Settings, tiny_glm: Path) -> Callable[..., Any]:
    """Export with the third-party engine; the knob says how it goes."""
    checkpoint = load_checkpoint(str(tiny_glm))

    def run(how: str) -> ExportedModel | Failure:
        candidate = fake_engine("fake-it", export=how)
        return export_candidate(candidate, checkpoint, settings, settings.home / "log")

    return run


def test_an_export_is_made_once(store: Callable[..., Any], settings: Settings) -> None:
    """The second time the same files are found, however deep they lie."""
    first, second = store("works"), store("works")
    assert not first.reused
    assert first.route == "by hand"
    assert (first.path / "deep" / "graph.txt").read_text() == "tiny-glm as fake-it"
    assert first.size_bytes == sum(f.stat().st_size for f in first.path.rglob("*") if f.is_file()) - (
        (first.path / RECORD).stat().st_size
    )
    assert second == first.model_copy(update={"reused": True})
    assert first.path.parent == settings.exports


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda path: (path / "weights.bin").write_bytes(b"W" * 1000), "weights.bin .* did not match"),
        (lambda path: (path / "weights.bin").unlink(), "weights.bin was missing"),
        (lambda path: (path / RECORD).write_text("{"), "export.json .* could not be read"),
    ],
    ids=["changed", "missing", "record"],
)
def test_a_damaged_export_is_made_again_and_says_so(
    damage: Callable[[Path], object], told: str, store: Callable[..., Any]
) -> None:
    """Nothing stale can look fresh: the files are compared with their digests at every use."""
    first = store("works")
    damage(first.path)
    again = store("works")
    assert not again.reused
    assert again.digest == first.digest
    assert re.search(told, again.details["rebuilt_because"])
    assert store("works").reused


@pytest.mark.parametrize(
    ("how", "status", "reason"),
    [
        ("raises", "failed", "RuntimeError: no kernel for this model"),
        ("segfaults", "crashed", "ended with SIGSEGV"),
        ("ends", "crashed", "ended without an answer"),
    ],
)
def test_a_failed_export_leaves_nothing_half_written(
    how: str, status: str, reason: str, store: Callable[..., Any], settings: Settings
) -> None:
    """Only the empty lock file stays, and the reason comes back."""
    assert store(how) == Failure(status, reason)  # type: ignore[arg-type]
    assert [path.suffix for path in settings.exports.iterdir()] == [".lock"]


def test_what_a_killed_export_left_is_cleared_away(store: Callable[..., Any], settings: Settings) -> None:
    """A process that is killed cannot tidy up; the next export of the same files does."""
    path = store("works").path
    path.rename(path.with_name(f".{path.name}.k1ll3d"))
    assert not store("works").reused
    assert sorted(p.name for p in settings.exports.iterdir()) == [path.name, f"{path.name}.lock"]


def test_an_engine_that_loads_the_checkpoint_needs_no_export(settings: Settings, tiny_glm: Path) -> None:
    """Its files are the checkpoint's, under the checkpoint's digest."""
    checkpoint = load_checkpoint(str(tiny_glm))
    candidate = fp32_of("torch")
    exported = export_candidate(candidate, checkpoint, settings, settings.home / "log")
    assert isinstance(exported, ExportedModel)
    assert (exported.path, exported.digest, exported.reused) == (checkpoint.path, checkpoint.digest, True)
    assert not settings.home.exists()


def fp32_of(engine: str) -> Candidate:
    return Candidate(
        id=f"{engine}-fp32",
        engine=engine,
        device="cpu",
        precision="fp32",
        weight_bits=32,
        knobs={"scheme": "fp32"},
        proposed_because="",
    )


def test_a_disk_too_small_is_found_before_the_first_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sentence says how much is needed, where, how much is free, and three ways out."""
    exporting = [fp32_of("onnxruntime")]

    def free(count: int) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=count))

    free(10 * 2**30)
    check_disk(exporting, demo_profile(), tmp_path / "not" / "there")
    free(100 * 2**20)
    with pytest.raises(UserError, match=f"{tmp_path} has 100 MiB free") as caught:
        check_disk(exporting, demo_profile(), tmp_path / "not" / "there")
    assert "AUTOGLM_HOME" in str(caught.value)
    check_disk([fp32_of("torch")], demo_profile(), tmp_path)
    check_disk([exporting[0].vetoed("no need")], demo_profile(), tmp_path)
