"""The texts an engine is timed, judged and calibrated on, and how to draw token windows from them.

Two kinds of real text, each with its own documents for evaluation and for calibration, so that nothing
is tuned on what it is judged by. Origin and licence: ``corpus/README.md``.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Literal, Protocol

import numpy as np

from open_autoglm.engines.contract import Tokens
from open_autoglm.errors import CheckpointError, UserError
from open_autoglm.schemas import Checkpoint

Kind = Literal["fiction", "technical"]
Split = Literal["eval", "calibration"]

TEXTS: tuple[Kind, ...] = ("fiction", "technical")


class Tokenizer(Protocol):
    """The one method of a transformers tokenizer that is needed here."""

    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool) -> list[int]: ...


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The checkpoint's own tokenizer, from its directory only. Raises CheckpointError if it does not load."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(
            checkpoint.path, trust_remote_code=checkpoint.trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the tokenizer in {checkpoint.path} does not load ({error}): save it there with save_pretrained"
        ) from error
    return tokenizer


def read(kind: Kind, split: Split) -> str:
    """One text of the corpus."""
    return (files("open_autoglm.quality") / "corpus" / f"{kind}.{split}.txt").read_text(encoding="utf-8")


def encode(tokenizer: Tokenizer, kind: Kind, split: Split) -> Tokens:
    """A whole text as token ids ``int64[tokens]``, without special tokens."""
    ids = tokenizer.encode(read(kind, split), add_special_tokens=False, verbose=False)
    return np.asarray(ids, dtype=np.int64)


def windows(tokenizer: Tokenizer, kind: Kind, split: Split, count: int, length: int, seed: int) -> Tokens:
    """``count`` runs of ``length`` consecutive tokens, ``int64[count, length]``, that do not overlap.

    They are spread evenly over the text (systematic sampling), shifted and shuffled by ``seed``.
    Raises UserError if the text has fewer than ``count * length`` tokens.
    """
    tokens = encode(tokenizer, kind, split)
    if len(tokens) < count * length:
        raise UserError(
            f"the {kind} {split} text has {len(tokens)} tokens, too few for {count} windows of {length}: "
            f"at most {len(tokens) // length} fit, so ask for fewer tokens to be scored"
        )
    generator = np.random.default_rng(seed)
    stride = len(tokens) // count
    starts = generator.permutation(count) * stride + generator.integers(stride - length + 1)
    return np.stack([tokens[start : start + length] for start in starts])
