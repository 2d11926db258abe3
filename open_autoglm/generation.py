"""Greedy generation: one token per call, or several where a draft guessed them right.

A draft is what followed the same few tokens earlier in the text (prompt lookup decoding, Saxena, 2023,
github.com/apoorvumang/prompt-lookup-decoding). The model reads the whole draft in one call, which on weights
that are read from memory takes little longer than one token, and as many of its tokens count as the model
would have chosen itself (speculative decoding, Leviathan et al., 2023, arXiv:2211.17192, for the likeliest
token). So every token is the model's own choice.

Kernels for one row and for several round differently. In ONNX Runtime's 8-bit ones that was enough to change
the 30th to 50th token, while two rows and eight gave the same bits. So with drafts no call reads one row
only, and what is generated does not depend on what was guessed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from open_autoglm.engines.contract import Logits, Session, Tokens, Verifier

LONGEST_MATCH, SHORTEST_MATCH = 3, 2
"""Tokens that must be the same for what followed them to be a draft; longer matches are tried first.

A single token says too little: its drafts are mostly wrong.
"""

_LONGEST_REST = 32


class Step(NamedTuple):
    """What one call of the model brought."""

    tokens: Tokens
    """``int64[batch, n]``: newly known; more than one where a draft was right."""
    logits: Logits
    """``float32[batch, vocab]``: what the last of them was chosen from."""
    drafted: int = 0
    """Tokens of the draft that the call read, the one that only keeps it from a single row included."""


def greedy(session: Session, prompts: Tokens, count: int, draft_tokens: int = 0) -> Iterator[Step]:
    """Continue ``prompts`` (``int64[batch, n]``) by the likeliest token ``count`` times.

    With ``draft_tokens`` up to so many are guessed per call, and one at least; that needs a
    :class:`Verifier` and one prompt. The session must have room for prompt and output together, and must not
    be used otherwise meanwhile.
    """
    if draft_tokens == 0:
        yield from _one_by_one(session, prompts, count)
        return
    if not isinstance(session, Verifier) or len(prompts) != 1:
        raise ValueError("drafts need an engine that can extend and rewind its cache, and a batch of 1")
    yield from _with_drafts(session, prompts, count, draft_tokens)


def _one_by_one(session: Session, prompts: Tokens, count: int) -> Iterator[Step]:
    logits = session.prefill(prompts)
    for left in range(count - 1, -1, -1):
        tokens = logits.argmax(axis=-1)
        yield Step(tokens[:, None], logits)
        if left:
            logits = session.decode(tokens)


def _with_drafts(session: Verifier, prompts: Tokens, count: int, most: int) -> Iterator[Step]:
    text = np.concatenate([prompts[0], np.zeros(count, dtype=np.int64)])
    known = prompts.shape[1]
    lookup = PromptLookup(most)
    logits = session.prefill(prompts)
    drafted, chosen = 0, logits.argmax(axis=-1)
    while True:
        text[known : known + len(chosen)] = chosen
        known += len(chosen)
        yield Step(chosen[None], logits, drafted)
        left = len(text) - known
        if left == 0:
            return
        guess = lookup.draft(text[:known])[:left]
        draft = guess if len(guess) else text[known - 1 : known]  # never one row
        drafted = len(draft)
        every = session.extend(np.concatenate([text[known - 1 : known], draft])[None])[0]
        likeliest = every.argmax(axis=-1)
        right = int(np.logical_and.accumulate(likeliest[:-1] == draft).sum())
        if len(guess):
            lookup.learn(drafted, right)
        session.rewind(drafted - right)
        chosen = likeliest[: right + 1][:left]
        logits = every[None, len(chosen) - 1]


class PromptLookup:
    """Drafts from the text itself, as long as the text has lately been predictable.

    A wrong draft costs time, so its length follows what was right: twice as long after a draft that was
    right to its end, else one more than was right. After drafts that were wrong from their first token on
    there is none for a while, twice as long each time.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._length = min(2, most)
        self._wrong = 0
        self._rest = 0

    def draft(self, text: Tokens) -> Tokens:
        """What may follow ``text`` (``int64[n]``); empty if nothing is likely."""
        if self._rest > 0:
            self._rest -= 1
            return text[:0]
        for size in range(LONGEST_MATCH, SHORTEST_MATCH - 1, -1):
            start = _last_match(text, size)
            if start is not None:
                # What follows may be shorter than the draft where the text repeats itself: go round.
                return np.resize(text[start + size :], self._length)
        return text[:0]

    def learn(self, drafted: int, right: int) -> None:
        """Of ``drafted`` tokens the first ``right`` were what the model chose."""
        self._length = min(self._most, 2 * drafted if right == drafted else right + 1)
        self._wrong = 0 if right else self._wrong + 1
        self._rest = 0 if right else min(_LONGEST_REST, 2**self._wrong // 2)


def _last_match(text: Tokens, size: int) -> int | None:
    """Where the last ``size`` tokens of ``text`` stand latest before its end; None if nowhere."""
    starts = len(text) - size
    if starts < 1:
        return None
    same = np.ones(starts, dtype=np.bool_)
    for offset in range(size):
        same &= text[offset : offset + starts] == text[starts + offset]
    found = np.flatnonzero(same)
    return int(found[-1]) if len(found) else None
