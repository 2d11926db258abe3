"""The corpus and the windows drawn from it."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from tiny_models import VOCAB_SIZE, build_tokenizer

from open_autoglm.checkpoint import load_checkpoint
from open_autoglm.errors import CheckpointError, UserError
from open_autoglm.quality.texts import TEXTS, Split, encode, load_tokenizer, read, windows


@pytest.fixture(scope="module")
def tokenizer(tiny_glm: Path) -> Any:
    return load_tokenizer(load_checkpoint(str(tiny_glm)))


def test_evaluation_and_calibration_share_no_paragraph() -> None:
    """No paragraph, of either kind, is in both an evaluation and a calibration text."""
    evaluation = {p for kind in TEXTS for p in read(kind, "eval").split("\n\n")}
    calibration = {p for kind in TEXTS for p in read(kind, "calibration").split("\n\n")}
    assert len(evaluation) > 500
    assert not evaluation & calibration


@pytest.mark.parametrize(("kind", "split"), list(product(TEXTS, get_args(Split))))
def test_every_text_is_long_clean_prose(kind: Any, split: Any) -> None:
    """Every text holds at least 100 kB and no markup that only a documentation builder reads."""
    text = read(kind, split)
    assert len(text.encode()) > 100_000
    assert "\r" not in text
    assert "\n.. _" not in text
    assert "code-block::" not in text


def test_windows_are_disjoint_runs_of_the_text(tokenizer: Any) -> None:
    """Each window is a run of consecutive tokens of the text, and no two windows overlap."""
    text = encode(tokenizer, "fiction", "eval")
    drawn = windows(tokenizer, "fiction", "eval", count=7, length=300, seed=3)
    everywhere = np.lib.stride_tricks.sliding_window_view(text, 300)
    starts = sorted(int(np.flatnonzero((everywhere == window).all(axis=1))[0]) for window in drawn)
    assert drawn.shape == (7, 300)
    assert drawn.dtype == np.int64
    assert min(np.diff(starts)) >= 300


def test_windows_depend_on_the_seed_only(tokenizer: Any) -> None:
    """The same seed draws the same windows, another seed others."""
    first, again, other = (windows(tokenizer, "technical", "eval", 4, 128, seed) for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()


def test_all_tokens_can_be_used(tokenizer: Any) -> None:
    """As many windows as fit can be drawn; one more is refused with the numbers."""
    fit = len(encode(tokenizer, "fiction", "calibration")) // 1000
    assert windows(tokenizer, "fiction", "calibration", fit, 1000, seed=0).shape == (fit, 1000)
    with pytest.raises(UserError, match=rf"too few for {fit + 1} windows of 1000: at most {fit} fit"):
        windows(tokenizer, "fiction", "calibration", fit + 1, 1000, seed=0)


def test_windows_are_text_without_special_tokens(tokenizer: Any) -> None:
    """A window decodes to a passage of the text, with nothing put before or after it."""
    window = windows(tokenizer, "technical", "calibration", 1, 200, seed=0)[0]
    passage = tokenizer.decode(window).strip("\N{REPLACEMENT CHARACTER}")
    assert passage in read("technical", "calibration")


def test_the_checkpoints_own_tokenizer_is_loaded(tokenizer: Any) -> None:
    """The tokenizer saved beside the weights is the one that encodes."""
    ids = encode(tokenizer, "fiction", "eval")
    assert (ids == build_tokenizer().encode(read("fiction", "eval"), add_special_tokens=False)).all()
    assert ids.max() < VOCAB_SIZE


def test_a_tokenizer_that_does_not_load_is_a_clear_error(tiny_glm: Path, tmp_path: Path) -> None:
    """A tokenizer that is gone by the time it is needed is reported with its directory."""
    moved = load_checkpoint(str(tiny_glm)).model_copy(update={"path": tmp_path})
    with pytest.raises(CheckpointError, match=f"the tokenizer in {tmp_path} does not load"):
        load_tokenizer(moved)
