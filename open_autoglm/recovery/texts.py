"""The windows that a recovery learns from, and those that it is watched by: calibration texts, both.

What a candidate is judged by in the end, the evaluation texts, is other documents; it is never read here.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from open_autoglm.engines.contract import Tokens
from open_autoglm.errors import UserError
from open_autoglm.quality.texts import TEXTS, encode, load_tokenizer
from open_autoglm.schemas import Checkpoint

WINDOW_TOKENS = 256
HELD_OUT_WINDOWS = 4
"""Of each text, its last ones: 2048 tokens in all, in blocks of 32 for their spread. A look at them takes
about as long as two steps."""


class Lessons(NamedTuple):
    """Windows of token ids, all of one length; no token is in two."""

    learned: Tokens
    """``int64[windows, length]``, the texts one after the other."""
    held_out: Tokens
    """``int64[texts * HELD_OUT_WINDOWS, length]``: the end of each text, far from most of what is learned."""


def lessons(checkpoint: Checkpoint, length: int = WINDOW_TOKENS) -> Lessons:
    """The calibration texts, cut into windows of ``length`` tokens, or of the context if that is shorter.

    Raises UserError if a text has not more windows than are held out.
    """
    tokenizer = load_tokenizer(checkpoint)
    length = min(length, checkpoint.context_tokens)
    learned, held_out = [], []
    for kind in TEXTS:
        tokens = encode(tokenizer, kind, "calibration")
        count = len(tokens) // length
        if count <= HELD_OUT_WINDOWS:
            raise UserError(
                f"the {kind} calibration text has {len(tokens)} tokens, too few to learn from windows of "
                f"{length} and to hold out {HELD_OUT_WINDOWS}: this model cannot be recovered"
            )
        cut = tokens[: count * length].reshape(count, length)
        learned.append(cut[:-HELD_OUT_WINDOWS])
        held_out.append(cut[-HELD_OUT_WINDOWS:])
    return Lessons(np.concatenate(learned), np.concatenate(held_out))


def window_in_turn(index: int, count: int, seed: int) -> int:
    """Which of ``count`` windows is the ``index``-th to be learned: each once, shuffled, before any again.

    A function of its arguments alone, so that a recovery that goes on needs to remember no order.
    """
    turn, position = divmod(index, count)
    return int(np.random.default_rng([seed, turn]).permutation(count)[position])
