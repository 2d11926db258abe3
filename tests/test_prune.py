"""How far pruning goes: as far as the gate lets it, each step on record, only the accepted left on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from studies import demo_analysis, demo_hardware
from tiny_models import build_checkpoint

from open_autoglm.checkpoint import load_checkpoint
from open_autoglm.errors import UserError
from open_autoglm.measure.isolation import Failure
from open_autoglm.pruning.importance import load_fp32
from open_autoglm.pruning.levels import levels
from open_autoglm.pruning.loop import PruningRun, deliver, prune, pruning_spec
from open_autoglm.roofline import analyze
from open_autoglm.schemas import Analysis, Checkpoint
from open_autoglm.settings import Settings


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(home=tmp_path_factory.mktemp("prune") / "home")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A GLM of two heads, of which the second adds nothing: its removal costs no quality."""
    directory = tmp_path_factory.mktemp("two") / "two-heads"
    build_checkpoint(directory, "glm", num_attention_heads=2, max_position_embeddings=128)
    model = load_fp32(directory)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data[:, 32:] = 0
    model.save_pretrained(directory)
    return load_checkpoint(str(directory))


def run(checkpoint: Checkpoint, home: Settings, keep_quality: float) -> PruningRun:
    spec = pruning_spec(checkpoint, keep_quality, seed=0).model_copy(update={"quality_tokens": 256})
    return prune(checkpoint, analyze(checkpoint, spec, demo_hardware()), spec, home)


@pytest.fixture(scope="module")
def accepted(checkpoint: Checkpoint, home: Settings) -> PruningRun:
    return run(checkpoint, home, 0.999)


def folders(home: Settings) -> list[str]:
    return [path.name for path in home.checkpoints.iterdir() if path.is_dir()]


def test_what_costs_no_quality_is_removed(accepted: PruningRun, home: Settings) -> None:
    """The step tells what it saves and what it keeps, with an interval; its checkpoint is the result."""
    (step,) = accepted.steps
    assert step.verdict == "accepted"
    assert step.ratio == pytest.approx(1, abs=1e-4)
    assert step.ratio_interval is not None
    assert step.ratio_interval[0] <= 1.0001
    assert step.parameters_removed == 2 * 32 * (64 * 4 + 3)  # layers, dimensions, four matrices, three biases
    assert accepted.accepted == step.level
    assert accepted.pruned is not None
    assert folders(home) == [accepted.pruned.path.name]
    assert accepted.conclusion.startswith("1 of 2 heads in each layer are enough: that keeps 100.0% (")


def test_the_result_is_delivered_whole(accepted: PruningRun, tmp_path: Path) -> None:
    """A copy of its own, with the tokenizer, that any loader opens."""
    delivered = deliver(accepted, tmp_path / "out")
    assert delivered.pruned is not None
    assert accepted.pruned is not None
    found = load_checkpoint(str(tmp_path / "out"))
    assert found.digest == delivered.pruned.digest == accepted.pruned.digest
    assert load_fp32(tmp_path / "out").config.num_attention_heads == 1


def test_the_gate_says_stop(checkpoint: Checkpoint, home: Settings, tmp_path: Path) -> None:
    """More than all is not to be kept: the price of the first step is told, and no checkpoint stays."""
    found = run(checkpoint, home, 1.2)
    (step,) = found.steps
    assert (step.verdict, found.accepted, found.pruned) == ("rejected", None, None)
    assert "min_quality: 1.00 < 1.20" in step.reason
    assert found.conclusion.startswith(
        "No head can be removed if 120.0% of the quality is to be kept: the best first step, "
        "1 of 2 heads in 1 of 2 groups, keeps 100.0% ("
    )
    assert deliver(found, tmp_path / "out") == found
    assert not (tmp_path / "out").exists()
    assert folders(home) == []


def test_a_run_goes_on_where_it_stopped(
    accepted: PruningRun, checkpoint: Checkpoint, home: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was judged is not judged again; the checkpoint is cut again, if need be, and is the same."""

    def refuse(*_: object) -> None:
        raise AssertionError("nothing is left to judge")

    monkeypatch.setattr("open_autoglm.pruning.loop.judge_in_full", refuse)
    assert run(checkpoint, home, 0.999) == accepted


def test_a_level_that_cannot_be_made_is_no_answer(
    checkpoint: Checkpoint, home: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It failed, and says why; it was not rejected by the gate."""
    failure = Failure("out_of_memory", "ran out of memory")
    monkeypatch.setattr("open_autoglm.pruning.loop.export_candidate", lambda *_: failure)
    found = run(checkpoint, home, 0.999)
    assert [(step.verdict, step.ratio) for step in found.steps] == [("failed", None)]
    assert found.accepted is None
    assert found.conclusion.endswith("1 of 2 heads in 1 of 2 groups, failed, ran out of memory.")


def test_a_model_without_removable_heads_is_refused(checkpoint: Checkpoint, settings: Settings) -> None:
    """Before anything is computed."""
    analysis: Analysis = demo_analysis()
    other = analysis.profile.model_copy(update={"model_type": "phi3"})
    spec = pruning_spec(checkpoint, 0.99, seed=0)
    with pytest.raises(UserError, match="two-heads: heads of the model type 'phi3' cannot be removed"):
        prune(checkpoint, analysis.model_copy(update={"profile": other}), spec, settings)
    assert not settings.home.exists()


def test_levels_are_judged_as_a_study_judges(checkpoint: Checkpoint) -> None:
    """The prompts of a study, as far as the context goes."""
    assert pruning_spec(checkpoint, 0.99, seed=4).prompt_tokens == 64
    long = checkpoint.model_copy(update={"context_tokens": 8192})
    assert pruning_spec(long, 0.99, seed=4).prompt_tokens == 512
    assert pruning_spec(long, 0.99, seed=4).min_quality == 0.99
    assert levels(demo_analysis().profile, seed=4)[0].seed == 4
