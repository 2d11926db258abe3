"""Pruned checkpoints in the store, under engines, in plans and in searches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benches import real_candidate
from demo_trials import SHAPES, demo_quality, demo_screening
from numpy.typing import NDArray
from studies import demo_analysis
from tiny_models import VOCAB_SIZE

from open_autoglm import engines
from open_autoglm.bracket import after_screening
from open_autoglm.checkpoint import load_checkpoint
from open_autoglm.conclusion import files_of
from open_autoglm.engines.contract import SessionOptions
from open_autoglm.errors import UserError
from open_autoglm.export.store import check_disk, export_candidate
from open_autoglm.measure.isolation import Failure
from open_autoglm.planning import check_workload, judge, plan
from open_autoglm.pruning import store
from open_autoglm.pruning.importance import load_fp32
from open_autoglm.pruning.levels import first_steps, levels, removed_parameters, with_pruning
from open_autoglm.pruning.store import discard, pruned_checkpoint
from open_autoglm.records import trial_metrics, trial_params
from open_autoglm.roofline import capacity_bytes
from open_autoglm.schemas import (
    RECOVER_STEPS,
    Analysis,
    Candidate,
    Checkpoint,
    ExportedModel,
    HeadPruning,
    OptimizeSpec,
    Recovery,
    Trial,
)
from open_autoglm.search import neighbours
from open_autoglm.settings import Settings
from open_autoglm.trials import configuration
from open_autoglm.units import ByteSize

TOKENS: NDArray[np.int64] = np.random.default_rng(5).integers(4, VOCAB_SIZE, (1, 24))
LEVEL = HeadPruning(kv_groups=1, heads_per_group=2, of_kv_groups=2, of_heads_per_group=2)
SPEC = OptimizeSpec(model_path="here", prune=True)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(home=tmp_path_factory.mktemp("pruning") / "home")


@pytest.fixture(scope="module")
def whole(tiny_glm: Path) -> Checkpoint:
    return load_checkpoint(str(tiny_glm))


@pytest.fixture(scope="module")
def pruned(whole: Checkpoint, home: Settings) -> Checkpoint:
    """Made as a study makes it: importance measured and heads cut in children."""
    made = pruned_checkpoint(whole, LEVEL, home, home.home / "made.log")
    assert isinstance(made, Checkpoint)
    return made


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The jobs that the store starts children for, from now on."""
    started: list[str] = []
    run = store.run_isolated

    def count(job: str, *arguments: Any, **options: Any) -> Any:
        started.append(job.partition(":")[2])
        return run(job, *arguments, **options)

    monkeypatch.setattr(store, "run_isolated", count)
    return started


# ── the store ────────────────────────────────────────────────────────────────────────────────────


def test_a_pruned_checkpoint_is_whole_and_named_by_its_level(pruned: Checkpoint, whole: Checkpoint) -> None:
    """A checkpoint of its own, with the tokenizer and all else that the whole one has."""
    assert pruned.path.name.startswith("tiny-glm-heads2of4-kv1of2-")
    assert load_checkpoint(str(pruned.path)) == pruned
    assert [file.path for file in pruned.files] == [file.path for file in whole.files]
    assert pruned.digest != whole.digest
    assert pruned.weight_bytes < whole.weight_bytes


def test_what_was_pruned_once_is_not_pruned_again(
    pruned: Checkpoint, whole: Checkpoint, home: Settings, children: list[str], tmp_path: Path
) -> None:
    """The same inputs find the same checkpoint."""
    assert pruned_checkpoint(whole, LEVEL, home, tmp_path / "log") == pruned
    assert children == []


@pytest.mark.parametrize("damage", ["weights", "record"])
def test_a_damaged_checkpoint_is_made_again(
    damage: str, pruned: Checkpoint, whole: Checkpoint, home: Settings, children: list[str], tmp_path: Path
) -> None:
    """Nothing stale can look fresh; how important the heads are is known still."""
    record = pruned.path.with_name(f"{pruned.path.name}.json")
    damaged = pruned.path / "model.safetensors" if damage == "weights" else record
    damaged.write_bytes(b"{" + damaged.read_bytes()[1:-1])
    assert pruned_checkpoint(whole, LEVEL, home, tmp_path / "log") == pruned
    assert children == ["pruning_job"]


def test_what_is_discarded_is_gone(
    whole: Checkpoint, pruned: Checkpoint, home: Settings, tmp_path: Path
) -> None:
    """Twice does no harm, and it can be made again, to the byte."""
    for _ in range(2):
        discard(whole, LEVEL, home)
    assert not pruned.path.exists()
    assert pruned_checkpoint(whole, LEVEL, home, tmp_path / "log") == pruned


def test_a_cut_that_fails_is_a_reason_and_leaves_nothing(
    whole: Checkpoint, home: Settings, tmp_path: Path, pruned: Checkpoint
) -> None:
    """The candidate's trial tells it; no half-written checkpoint stays."""
    other = HeadPruning(kv_groups=1, heads_per_group=1, of_kv_groups=2, of_heads_per_group=1)
    failed = export_candidate(
        with_pruning(real_candidate("torch-bf16"), other), whole, home, tmp_path / "log"
    )
    assert isinstance(failed, Failure)
    assert "states 4 heads over 2 key/value heads, not the 2 over 2" in failed.reason
    folders = [path for path in home.checkpoints.iterdir() if path.is_dir()]
    assert folders == [pruned.path]


# ── engines ──────────────────────────────────────────────────────────────────────────────────────


def served(candidate: Candidate, checkpoint: Checkpoint, settings: Settings) -> tuple[ExportedModel, Any]:
    """The export of ``candidate`` and the logits that its session gives."""
    exported = export_candidate(candidate, checkpoint, settings, settings.home / "export.log")
    assert isinstance(exported, ExportedModel)
    options = SessionOptions(batch_size=1, max_tokens=24, threads=1)
    session = engines.get(candidate.engine).open(candidate, exported, options)
    found = session.full_logits(TOKENS)
    session.close()
    return exported, found


@pytest.fixture(scope="module")
def expected(pruned: Checkpoint) -> NDArray[np.float32]:
    """By transformers, on the pruned checkpoint, in fp32."""
    import torch

    with torch.no_grad():
        found: NDArray[np.float32] = load_fp32(pruned.path)(torch.from_numpy(TOKENS)).logits.numpy()
    return found


def test_an_engine_that_loads_checkpoints_gets_the_pruned_one(
    whole: Checkpoint, pruned: Checkpoint, home: Settings, expected: NDArray[np.float32]
) -> None:
    """Its path and its digest, so that nothing measured on the whole one is taken for its own."""
    exported, found = served(with_pruning(real_candidate("torch-fp32"), LEVEL), whole, home)
    assert (exported.path, exported.digest) == (pruned.path, pruned.digest)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_pruning_composes_with_quantisation(
    whole: Checkpoint, home: Settings, expected: NDArray[np.float32]
) -> None:
    """Exact in fp32, near in 8 bits; the files lie apart from those of the whole model."""
    for name, least in (("onnxruntime-fp32", 0.999999), ("onnxruntime-w8-b32", 0.98)):
        exported, found = served(with_pruning(real_candidate(name), LEVEL), whole, home)
        assert not exported.reused
        assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > least


# ── plans ────────────────────────────────────────────────────────────────────────────────────────


def test_a_plan_has_pruned_candidates_if_asked() -> None:
    """Of each engine its best kind, with the smallest step in heads and in groups; never the reference."""
    plain = plan(demo_analysis(), OptimizeSpec(model_path="here"), "cpu")
    asked = {c.id: c for c in plan(demo_analysis(), SPEC, "cpu")}
    added = asked.keys() - {c.id for c in plain}
    assert {"onnxruntime-w8-b32-heads6of9", "torch-bf16-heads6of9"} <= added
    assert {"onnxruntime-w8-b32-heads6of9-kv2of3", "torch-bf16-heads6of9-kv2of3"} <= added
    assert {asked[name].transform for name in added} == set(first_steps(demo_analysis().profile))
    assert all(c.transform is None for c in plain)
    candidate = asked["onnxruntime-w8-b32-heads6of9"]
    assert candidate.transform == levels(demo_analysis().profile)[0]
    assert "6 of 9 heads in each layer, 3 of 3 groups: 25%" in candidate.proposed_because
    assert (candidate.reference, candidate.baseline) == (False, False)


def test_a_plan_has_recovered_candidates_if_asked() -> None:
    """Each pruned one once more, distilled; the same gate and the same vetoes are for both."""
    plain = {c.id: c for c in plan(demo_analysis(), SPEC, "cpu")}
    asked = {c.id: c for c in plan(demo_analysis(), SPEC.model_copy(update={"recover": True}), "cpu")}
    added = asked.keys() - plain.keys()
    assert added == {f"{c.id}-r{RECOVER_STEPS}" for c in plain.values() if c.transform is not None}
    for name in added:
        twin, pruning = plain[name.removesuffix(f"-r{RECOVER_STEPS}")], asked[name].transform
        assert pruning is not None
        assert pruning.unrecovered == twin.transform
        assert asked[name].proposed_because == twin.proposed_because + "; then distilled from the whole model"


def test_recovery_without_pruning_is_refused(whole: Checkpoint) -> None:
    """There is nothing to give back."""
    spec = OptimizeSpec(model_path="here", recover=True, prompt_tokens=32, output_tokens=8)
    with pytest.raises(UserError, match="add --prune to --recover"):
        check_workload(spec, whole)


def test_a_recovery_that_does_not_fit_is_vetoed() -> None:
    """Two models in fp32 need memory where one in 8 bits does not."""
    analysis, least = demo_analysis(), levels(demo_analysis().profile, recover_steps=5)[0]
    gibibyte = analysis.hardware.model_copy(update={"available_memory_bytes": 2**30})
    small = analysis.model_copy(update={"hardware": gibibyte})
    candidate = real_candidate("onnxruntime-w8-b32")
    assert judge(with_pruning(candidate, least.unrecovered), small, SPEC).vetoed_because is None
    vetoed = judge(with_pruning(candidate, least), small, SPEC).vetoed_because
    assert vetoed is not None
    assert "cannot be recovered: the whole and the pruned model in fp32 need at least" in vetoed


def test_a_model_that_cannot_be_pruned_is_refused() -> None:
    """With the flag to leave out."""
    analysis = demo_analysis()
    other = analysis.profile.model_copy(update={"model_type": "phi3"})
    with pytest.raises(UserError, match="--prune: heads of the model type 'phi3' cannot be removed"):
        plan(analysis.model_copy(update={"profile": other}), SPEC, "cpu")


def test_a_pruned_candidate_needs_less_memory() -> None:
    """It is vetoed by what it needs itself, and the disk must hold one more checkpoint."""
    analysis, least = demo_analysis(), levels(demo_analysis().profile)[0]
    whole = real_candidate("torch-bf16")
    pruned = with_pruning(whole, least)
    saved = 2 * removed_parameters(analysis.profile, least)
    bytes_whole = capacity_bytes(analysis.profile, SPEC, 16) + 64 * 2**20
    limit = ByteSize(f"{(bytes_whole - saved / 2) / 2**20:.3f}MiB")
    asked = SPEC.model_copy(update={"max_memory": limit})
    assert judge(whole, analysis, asked).vetoed_because is not None
    assert judge(pruned, analysis, asked).vetoed_because is None


def test_a_disk_without_room_for_the_pruned_checkpoint_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that exports nothing needs room all the same once its checkpoint is pruned."""
    usage = type("Usage", (), {"free": 2**20})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    whole, profile = real_candidate("torch-bf16"), demo_analysis().profile
    check_disk([whole], profile, tmp_path)
    with pytest.raises(UserError, match="the exports need"):
        check_disk([with_pruning(whole, levels(profile)[0])], profile, tmp_path)


def test_a_search_around_a_pruned_candidate_stays_on_its_checkpoint() -> None:
    """Engines know nothing of the transform; their variants have it all the same, and in their ids."""
    analysis: Analysis = demo_analysis()
    leader = with_pruning(real_candidate("onnxruntime-w8-b32"), levels(analysis.profile)[0])
    found = neighbours(leader, (), analysis, SPEC)
    assert "onnxruntime-w8-b64-heads6of9" in {candidate.id for candidate in found}
    assert {candidate.transform for candidate in found} == {leader.transform}


def test_pruning_is_part_of_what_a_candidate_is() -> None:
    """Two that differ in it are told apart, in the memo and in the record."""
    whole = real_candidate("torch-bf16")
    pruned = with_pruning(whole, LEVEL)
    assert configuration(whole) != configuration(pruned)
    trial = Trial(id=pruned.id, engine="torch", candidate=pruned, status="ok", reason="")
    assert trial_params(trial)["pruning.kv_groups"] == 1
    assert with_pruning(whole, None) is whole


def test_a_recovery_is_on_the_trials_record(tmp_path: Path) -> None:
    """Its figures are metrics of the trial, its raw losses a file of it."""
    record = tmp_path / "recovered.json"
    recovery = Recovery(
        helped=True,
        reason="recovered",
        steps=100,
        kept_step=90,
        seconds=412.5,
        learning_parameters=4_600_000,
        tokens=51_200,
        divergence_before=0.52,
        divergence_after=0.31,
        gain_interval=(0.18, 0.24),
        record=record,
    )
    exported = ExportedModel(
        candidate_id="it", path=tmp_path, digest="d", route="r", size_bytes=1, build_s=0, recovery=recovery
    )
    candidate = with_pruning(real_candidate("torch-bf16"), LEVEL)
    trial = Trial(id="it", engine="torch", candidate=candidate, status="ok", reason="", exported=exported)
    found = trial_metrics(trial)
    assert (found["recovery_divergence_before"], found["recovery_divergence_after"]) == (0.52, 0.31)
    assert (found["recovery_helped"], found["recovery_kept_step"], found["recovery_seconds"]) == (
        1,
        90,
        412.5,
    )
    assert files_of(tmp_path, trial) == []
    record.touch()
    assert files_of(tmp_path, trial) == [record]


def test_a_study_tells_the_price_of_pruning() -> None:
    """A pruned candidate that loses too much is stopped like any other, with its figure."""
    candidate = with_pruning(real_candidate("onnxruntime-w8-b32"), levels(demo_analysis().profile)[0])
    shape = SHAPES[5]._replace(id=candidate.id, kept=(0.871, 0.882))
    trial = Trial(
        id=candidate.id,
        engine=candidate.engine,
        candidate=candidate,
        status="ok",
        reason="screened",
        screening=demo_screening(shape),
        quality=demo_quality(shape),
    )
    (stopped,) = after_screening([trial], SPEC)
    assert stopped.status == "stopped"
    assert stopped.fall is not None
    assert "min_quality: 0.871 < 0.990 (prefill path, 768 tokens)" in stopped.fall.reason
