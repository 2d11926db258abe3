"""Heads found and cut: which ones, what is left, and that it is the same model without them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError
from studies import demo_profile
from tiny_models import VOCAB_SIZE, build_checkpoint

from open_autoglm.analysis import profile_model
from open_autoglm.checkpoint import load_checkpoint
from open_autoglm.errors import CheckpointError
from open_autoglm.pruning.importance import (
    Importance,
    ImportanceJob,
    LayerScores,
    calibration_windows,
    load_fp32,
    measure_importance,
)
from open_autoglm.pruning.levels import (
    PRUNABLE,
    attention_parameters,
    levels,
    pruned_profile,
    removed_parameters,
    why_not,
)
from open_autoglm.pruning.loop import last_passing, search
from open_autoglm.pruning.surgery import KeptHeads, choose_heads, remove_heads
from open_autoglm.quality.texts import TEXTS, encode, load_tokenizer
from open_autoglm.schemas import Checkpoint, HeadPruning
from open_autoglm.weights import SAFETENSORS

TOKENS: NDArray[np.int64] = np.random.default_rng(3).integers(4, VOCAB_SIZE, (2, 24))
HEADS, GROUPS, HEAD_DIM = 4, 2, 32
"""Of every tiny model."""


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """A tiny checkpoint of each model type, built once."""

    @cache
    def build(model_type: str) -> Checkpoint:
        return load_checkpoint(str(build_checkpoint(tmp_path_factory.mktemp(model_type) / "it", model_type)))

    return build


def level(kv_groups: int, heads_per_group: int, **others: Any) -> HeadPruning:
    """A level of the tiny models."""
    return HeadPruning(
        kv_groups=kv_groups,
        heads_per_group=heads_per_group,
        of_kv_groups=GROUPS,
        of_heads_per_group=HEADS // GROUPS,
        **others,
    )


def silence(model: Any, layer: int, heads: Sequence[int]) -> None:
    """Take away what ``heads`` of a transformers model add, and leave everything else."""
    weight = model.model.layers[layer].self_attn.o_proj.weight
    for head in heads:
        weight.data[:, head * HEAD_DIM : (head + 1) * HEAD_DIM] = 0


def logits(model: Any) -> NDArray[np.float32]:
    import torch

    with torch.no_grad():
        found: NDArray[np.float32] = model(torch.from_numpy(TOKENS)).logits.numpy()
    return found


# ── levels ───────────────────────────────────────────────────────────────────────────────────────


def test_levels_rise_by_the_parameters_they_remove() -> None:
    """Every uniform choice of groups and heads but the whole, the cheapest first."""
    found = levels(demo_profile())
    assert [(x.kv_groups, x.heads_per_group) for x in found[:3]] == [(3, 2), (2, 3), (2, 2)]
    assert len(found) == 8
    removed = [removed_parameters(demo_profile(), x) for x in found]
    assert all(less <= more for less, more in pairwise(removed))
    assert removed[0] == 30 * 3 * 64 * 2 * 576
    assert removed[0] / attention_parameters(demo_profile()) == 0.25


def test_a_config_class_that_wants_whole_widths_gets_them() -> None:
    """transformers refuses a Llama whose width is no multiple of its heads; GLM has no such rule."""
    profile = demo_profile().model_copy(update={"hidden_size": 64, "attention_heads": 9})
    assert {x.heads for x in levels(profile)} == {1, 2, 3, 4, 6}
    assert {x.heads for x in levels(profile.model_copy(update={"model_type": "llama"}))} == {1, 2, 4}


def test_a_model_whose_heads_cannot_be_removed_says_why() -> None:
    """Unknown attention, or a single head."""
    assert why_not(demo_profile()) is None
    other = demo_profile().model_copy(update={"model_type": "phi3"})
    assert "model type 'phi3' cannot be removed: glm, glm4, llama" in (why_not(other) or "")
    single = demo_profile().model_copy(update={"attention_heads": 1, "kv_heads": 1})
    assert "no level is left" in (why_not(single) or "")


def test_a_level_removes_something_and_names_it() -> None:
    """The suffix tells apart what the number of heads does not."""
    assert level(2, 1).suffix == "heads2of4"
    assert level(1, 2).suffix == "heads2of4-kv1of2"
    assert level(1, 1, criterion="taylor", recover_steps=5, seed=7).suffix == (
        "heads1of4-kv1of2-taylor-r5-s7"
    )
    assert level(2, 1, recover_steps=5, recover_s=60.0).suffix == "heads2of4-r5-t60"
    assert level(2, 1, recover_steps=5, recover_s=60.0).unrecovered == level(2, 1)
    with pytest.raises(ValidationError, match="nothing is removed"):
        level(2, 2)
    with pytest.raises(ValidationError, match="more than there are"):
        level(1, 3)


@pytest.mark.parametrize("passing", range(9))
def test_a_chain_is_searched_for_the_last_that_passes(passing: int) -> None:
    """In few looks, each level at most once; where nothing passes, one is enough, and its price is told."""
    ladder, tried = levels(demo_profile()), []

    def passes(candidate: HeadPruning) -> bool:
        tried.append(candidate)
        return ladder.index(candidate) < passing

    assert last_passing(ladder, passes) == (ladder[passing - 1] if passing else None)
    assert len(tried) == len(set(tried)) <= 5
    assert passing > 0 or tried == ladder[:1]


@pytest.mark.parametrize("groups", range(1, 4))
@pytest.mark.parametrize("heads", range(1, 4))
@pytest.mark.parametrize("total", range(1, 10))
def test_the_search_finds_the_largest_level_that_passes(groups: int, heads: int, total: int) -> None:
    """Whatever is too much, groups, heads of each or heads in all: as an exhaustive search would."""
    ladder, tried = levels(demo_profile()), []

    def good(x: HeadPruning) -> bool:
        return x.kv_groups >= groups and x.heads_per_group >= heads and x.heads >= total

    def passes(x: HeadPruning) -> bool:
        tried.append(x)
        return good(x)

    found, passing = search(ladder, passes), [x for x in ladder if good(x)]
    assert (found is None) == (not passing)
    if found is not None:
        assert removed_parameters(demo_profile(), found) == removed_parameters(demo_profile(), passing[-1])
    assert len(tried) == len(set(tried))
    assert passing or set(tried) == {ladder[0], ladder[1]}  # one head of each group less, or one group


# ── importance ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A GLM in which head 2 of layer 0 and group 0 (heads 0 and 1) of layer 1 add nothing."""
    directory = build_checkpoint(tmp_path_factory.mktemp("planted") / "it")
    model = load_fp32(directory)
    silence(model, 0, [2])
    silence(model, 1, [0, 1])
    model.save_pretrained(directory)
    return load_checkpoint(str(directory))


@pytest.fixture(scope="module")
def importance(planted: Checkpoint) -> Importance:
    return measure_importance(ImportanceJob(checkpoint=planted, seed=0, windows=2, window_tokens=64))


@pytest.mark.parametrize("criterion", ["taylor", "contribution"])
def test_a_useless_head_is_found(criterion: Any, importance: Importance) -> None:
    """What adds nothing has no importance by either measure, and it is what goes."""
    scores = importance.by(criterion)
    useless = {(layer, head) for layer, row in enumerate(scores.heads) for head in range(4) if row[head] == 0}
    assert useless == {(0, 2), (1, 0), (1, 1)}
    assert scores.groups[1][0] == 0
    assert min(scores.groups[0]) > 0
    kept = choose_heads(scores, level(2, 1))
    assert kept[0].heads[1] == 3
    assert choose_heads(scores, level(1, 2))[1] == KeptHeads(groups=(1,), heads=(2, 3))


def test_importance_is_what_its_definition_says(planted: Checkpoint, importance: Importance) -> None:
    """The Taylor score of a head is the squared change of the loss, as its output shrinks a little."""
    import torch

    job = ImportanceJob(checkpoint=planted, seed=0, windows=2, window_tokens=64)
    tokens = torch.from_numpy(calibration_windows(planted, job.windows, job.window_tokens, job.seed))
    model, step = load_fp32(planted.path).double(), 1e-2
    columns = model.model.layers[0].self_attn.o_proj.weight.data[:, : 2 * HEAD_DIM]  # group 0's
    slopes = []
    for window in tokens:
        losses = []
        for factor in (1 + step, (1 - step) / (1 + step), 1 / (1 - step)):
            columns *= factor
            with torch.no_grad():
                losses.append(float(model(window[None], labels=window[None]).loss))
        slopes.append((losses[0] - losses[1]) / (2 * step))
    assert importance.taylor.groups[0][0] == pytest.approx(np.mean(np.square(slopes)), rel=1e-2)


def test_importance_reads_the_calibration_texts_only(planted: Checkpoint) -> None:
    """Nothing is chosen on what it is judged by; the same seed reads the same windows."""
    drawn = calibration_windows(planted, 2, 64, seed=1)
    tokenizer = load_tokenizer(planted)
    texts = {split: [encode(tokenizer, kind, split) for kind in TEXTS] for split in ("calibration", "eval")}  # type: ignore[arg-type]

    def holds(text: NDArray[np.int64], window: NDArray[np.int64]) -> bool:
        views = np.lib.stride_tricks.sliding_window_view(text, len(window))
        return bool((views == window).all(axis=1).any())

    for window in drawn:
        assert any(holds(text, window) for text in texts["calibration"])
        assert not any(holds(text, window) for text in texts["eval"])
    np.testing.assert_array_equal(drawn, calibration_windows(planted, 2, 64, seed=1))
    assert not np.array_equal(drawn, calibration_windows(planted, 2, 64, seed=2))


def test_derivatives_that_are_not_finite_rank_nothing(planted: Checkpoint, tmp_path: Path) -> None:
    """Finite weights may overflow; then no head is called unimportant."""
    directory = Path(shutil.copytree(planted.path, tmp_path / "it"))
    model = load_fp32(directory)
    model.model.layers[0].self_attn.o_proj.weight.data.mul_(1e38)
    model.lm_head.weight.data.mul_(1e38)
    model.save_pretrained(directory)
    job = ImportanceJob(checkpoint=load_checkpoint(str(directory)), seed=0, windows=1, window_tokens=32)
    with pytest.raises(ArithmeticError, match="not finite"):
        measure_importance(job)


# ── surgery ──────────────────────────────────────────────────────────────────────────────────────

KEPT = {
    (1, 2): [KeptHeads((1,), (2, 3)), KeptHeads((0,), (0, 1))],
    (2, 1): [KeptHeads((0, 1), (1, 2)), KeptHeads((0, 1), (0, 3))],
    (1, 1): [KeptHeads((0,), (1,)), KeptHeads((1,), (2,))],
}


def cut(checkpoint: Checkpoint, pruning: HeadPruning, directory: Path) -> Checkpoint:
    directory.mkdir()
    kept = KEPT[pruning.kv_groups, pruning.heads_per_group]
    remove_heads(checkpoint, kept, pruning, directory)
    return load_checkpoint(str(directory))


def without(path: Path, kept: list[KeptHeads]) -> Any:
    """The whole model with the heads that are not ``kept`` masked."""
    model = load_fp32(path)
    for layer, stays in enumerate(kept):
        silence(model, layer, sorted(set(range(HEADS)) - set(stays.heads)))
    return model


@pytest.mark.parametrize("size", KEPT, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("model_type", PRUNABLE)
def test_a_pruned_checkpoint_is_the_model_without_those_heads(
    model_type: str, size: tuple[int, int], family: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    """transformers opens it as it is, and its logits are those of the whole model with the heads masked."""
    whole = family(model_type)
    pruned = cut(whole, level(*size), tmp_path / "pruned")
    expected = logits(without(whole.path, KEPT[size]))
    np.testing.assert_allclose(logits(load_fp32(pruned.path)), expected, atol=2e-5)
    assert not np.allclose(logits(load_fp32(whole.path)), expected, atol=1e-2)


@pytest.mark.parametrize("model_type", PRUNABLE)
def test_the_profile_of_a_level_is_that_of_its_checkpoint(
    model_type: str, family: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    """What planning reckons with, before anything is cut, is what is there after."""
    whole = family(model_type)
    pruned = cut(whole, level(1, 1), tmp_path / "pruned")
    assert pruned_profile(profile_model(whole), level(1, 1)) == profile_model(pruned)


def test_shards_dtypes_and_output_biases_are_kept(tmp_path: Path) -> None:
    """A bf16 Llama in shards, with a bias on every projection."""
    import torch
    from transformers import AutoModelForCausalLM

    directory = build_checkpoint(tmp_path / "whole", "llama", attention_bias=True)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    (directory / SAFETENSORS).unlink()
    model.save_pretrained(directory, max_shard_size="60kB")
    whole = load_checkpoint(str(directory))
    pruned = cut(whole, level(1, 2), tmp_path / "pruned")
    assert pruned.weight_dtype == "bf16"
    names = [file.path for file in whole.files]
    assert sum(name.endswith(".safetensors") for name in names) > 2
    assert [file.path for file in pruned.files] == names
    expected = logits(without(whole.path, KEPT[1, 2]))
    np.testing.assert_allclose(logits(load_fp32(pruned.path)), expected, atol=2e-5)


def test_what_has_changed_since_it_was_read_is_not_cut(planted: Checkpoint, tmp_path: Path) -> None:
    """A checkpoint is named by its digest: other weights would be another one's."""
    copy = Path(shutil.copytree(planted.path, tmp_path / "copy"))
    checkpoint = load_checkpoint(str(copy))
    with (copy / SAFETENSORS).open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0\0")
    with pytest.raises(CheckpointError, match=r"model.safetensors has changed"):
        cut(checkpoint, level(1, 2), tmp_path / "pruned")


def test_a_level_of_another_model_is_refused(planted: Checkpoint, tmp_path: Path) -> None:
    """The counts that a level was planned for are checked against the config."""
    other = HeadPruning(kv_groups=1, heads_per_group=2, of_kv_groups=4, of_heads_per_group=2)
    with pytest.raises(CheckpointError, match="states 4 heads over 2 key/value heads, not the 8 over 4"):
        remove_heads(planted, KEPT[1, 2], other, tmp_path)


def test_choosing_keeps_the_first_of_equals() -> None:
    """So that the same scores give the same checkpoint."""
    scores = LayerScores(heads=((1.0, 1.0, 2.0, 2.0),), groups=((3.0, 3.0),))
    assert choose_heads(scores, level(1, 1)) == [KeptHeads((0,), (0,))]
    assert choose_heads(scores, level(2, 1)) == [KeptHeads((0, 1), (0, 2))]
