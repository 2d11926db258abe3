"""The prompts that candidates are timed on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_models import VOCAB_SIZE

from open_autoglm.checkpoint import load_checkpoint
from open_autoglm.engines.contract import Tokens
from open_autoglm.errors import UserError
from open_autoglm.files import sha256_file
from open_autoglm.measure.workload import WARMUPS, draw_prompts, make_workload
from open_autoglm.quality.texts import Tokenizer, encode, load_tokenizer
from open_autoglm.schemas import Checkpoint, OptimizeSpec


@pytest.fixture(scope="module")
def checkpoint(tiny_glm: Path) -> Checkpoint:
    return load_checkpoint(str(tiny_glm))


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    return load_tokenizer(checkpoint)


def distinct(prompts: Tokens) -> int:
    return len(np.unique(prompts.reshape(-1, prompts.shape[-1]), axis=0))


def test_every_round_and_row_reads_another_prompt(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The saved file holds one batch per warm-up and round, and no two rows are alike."""
    spec = OptimizeSpec(model_path="m", batch_size=3, prompt_tokens=100, rounds=5)
    workload = make_workload(checkpoint, spec, tmp_path / "workload.npy")
    prompts = np.load(workload.path)
    assert prompts.shape == (WARMUPS + 5, 3, 100)
    assert prompts.dtype == np.int64
    assert distinct(prompts) == (WARMUPS + 5) * 3
    assert prompts.max() < VOCAB_SIZE
    assert workload.sha256 == sha256_file(workload.path)


def test_the_same_spec_gives_the_same_bytes(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Two workloads of equal specs are equal files; another seed gives another file."""
    digests = [
        make_workload(
            checkpoint,
            OptimizeSpec(model_path="m", prompt_tokens=64, rounds=3, seed=seed),
            tmp_path / f"{index}.npy",
        ).sha256
        for index, seed in enumerate((0, 0, 1))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_prompts_alternate_between_the_kinds_of_text(tokenizer: Tokenizer) -> None:
    """Even prompts are fiction, odd ones technical."""
    prompts = draw_prompts(tokenizer, count=4, length=80, seed=5)
    fiction, technical = (
        np.lib.stride_tricks.sliding_window_view(encode(tokenizer, kind, "eval"), 80)
        for kind in ("fiction", "technical")
    )
    for index, prompt in enumerate(prompts):
        assert (fiction == prompt).all(axis=1).any() == (index % 2 == 0)
        assert (technical == prompt).all(axis=1).any() == (index % 2 == 1)


def test_prompts_overlap_but_differ_when_the_text_is_short(tokenizer: Tokenizer) -> None:
    """More prompts than fit side by side, and prompts longer than the text, still all differ."""
    assert distinct(draw_prompts(tokenizer, count=400, length=2048, seed=0)) == 400
    longer = len(encode(tokenizer, "technical", "eval")) + 1000
    assert distinct(draw_prompts(tokenizer, count=6, length=longer, seed=0)) == 6


def test_more_prompts_than_tokens_are_refused(tokenizer: Tokenizer) -> None:
    """When prompts would have to repeat, the sentence says so with the numbers."""
    with pytest.raises(UserError, match="500000 different prompts are needed, but the fiction text has only"):
        draw_prompts(tokenizer, count=500_000, length=8, seed=0)
