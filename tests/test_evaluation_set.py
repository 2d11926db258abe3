"""Which windows of real text candidates are judged on."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import VOCAB_SIZE, build_tokenizer

from open_autoglm.checkpoint import load_checkpoint
from open_autoglm.errors import UserError
from open_autoglm.quality.reference import EvaluationSet, Layout, make_evaluation_set, plan_layout
from open_autoglm.quality.texts import TEXTS
from open_autoglm.schemas import OptimizeSpec


@pytest.mark.parametrize("context", [64, 100, 512, 131072])
@pytest.mark.parametrize("quality_tokens", [64, 769, 3072, 5001])
@pytest.mark.parametrize("prompt_tokens", [1, 512, 1500, 100_000])
def test_every_layout_fits(context: int, quality_tokens: int, prompt_tokens: int) -> None:
    """Whatever is asked for, decode can score nearly that many tokens, inside the window and the context."""
    spec = OptimizeSpec(model_path="m", quality_tokens=quality_tokens, prompt_tokens=prompt_tokens)
    layout = plan_layout(context, spec)
    assert layout.window_tokens <= min(context, 2048 + 192 + 1)
    assert layout.prompt_tokens >= 32
    assert layout.windows >= 2
    windows = len(TEXTS) * layout.windows
    assert quality_tokens - windows < windows * layout.decode_tokens <= quality_tokens
    assert layout.decode_tokens >= 1
    assert layout.decode_positions.stop < layout.window_tokens
    assert layout.greedy_tokens >= 1
    assert layout.prompt_tokens + layout.greedy_tokens <= layout.window_tokens


@pytest.mark.parametrize(("asked", "judged"), [(1, 128), (128, 128), (700, 700), (2048, 2048), (9000, 2048)])
def test_prompts_are_judged_at_the_length_they_are_timed_at(asked: int, judged: int) -> None:
    """Where the context has room, a window's prompt is as long as the workload's, from 128 to 2048 tokens."""
    assert plan_layout(131072, OptimizeSpec(model_path="m", prompt_tokens=asked)).prompt_tokens == judged


def test_the_default_layout() -> None:
    """By default 8 windows per text, each a prompt of 512 tokens and 192 decoded ones."""
    assert plan_layout(8192, OptimizeSpec(model_path="m")) == Layout(
        windows=8, window_tokens=512 + 192 + 1, prompt_tokens=512, decode_tokens=192, greedy_tokens=32
    )


def test_a_small_request_is_a_small_layout() -> None:
    """Few tokens to decode mean few windows on both paths."""
    assert plan_layout(512, OptimizeSpec(model_path="m", quality_tokens=64)) == Layout(
        windows=2, window_tokens=319 + 16 + 1, prompt_tokens=319, decode_tokens=16, greedy_tokens=16
    )


def test_a_tiny_context_is_refused() -> None:
    """A context too short to judge quality in is a user error with the number."""
    with pytest.raises(UserError, match="context of 63 tokens is too short"):
        plan_layout(63, OptimizeSpec(model_path="m"))


def test_the_evaluation_set_is_real_text_of_both_kinds(tiny_glm: Path, tmp_path: Path) -> None:
    """Made from a checkpoint's own tokenizer, it holds readable windows, the same for the same spec."""
    checkpoint = load_checkpoint(str(tiny_glm))
    spec = OptimizeSpec(model_path="m")
    made, again = (make_evaluation_set(checkpoint, spec, tmp_path / name) for name in ("a.npy", "b.npy"))
    assert made.sha256 == again.sha256
    assert made.load().shape == (2, 8, 512)  # all of its context
    assert made.load().max() < VOCAB_SIZE
    fiction, technical = (build_tokenizer().decode(rows.reshape(-1)) for rows in made.load())
    assert "Anne" in fiction
    assert "``" in technical  # reStructuredText
    assert EvaluationSet.model_validate_json(made.model_dump_json()) == made
