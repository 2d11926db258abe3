"""Greedy generation: the same tokens with drafts and without, in fewer calls where text repeats itself."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from open_autoglm.engines.contract import Logits, Tokens
from open_autoglm.generation import PromptLookup, greedy

VOCAB = 50


class Plain:
    """A model of two tokens' memory, without means to verify: ``table[last, the one before]`` comes next.

    It keeps the contract strictly: it knows what its cache holds and refuses what does not fit.
    """

    def __init__(self, table: Tokens, room: int = 10_000) -> None:
        self._table, self._room = table, room
        self.read: Tokens = np.zeros((1, 0), dtype=np.int64)
        self.rows: list[int] = []

    def prefill(self, tokens: Tokens) -> Logits:
        self.read = tokens[:, :0]
        return self._append(tokens)[:, -1]

    def decode(self, tokens: Tokens) -> Logits:
        self.rows.append(1)
        return self._append(tokens[:, None])[:, -1]

    def _append(self, tokens: Tokens) -> Logits:
        self.read = np.concatenate([self.read, tokens], axis=1)
        if self.read.shape[1] > self._room:
            raise ValueError(f"room for {self._room} tokens")
        before = np.concatenate([np.zeros((len(tokens), 1), dtype=np.int64), self.read[:, :-1]], axis=1)
        following = self._table[self.read, before][:, -tokens.shape[1] :]
        return np.eye(VOCAB, dtype=np.float32)[following]

    def full_logits(self, tokens: Tokens) -> Logits:
        raise NotImplementedError

    def facts(self) -> dict[str, str]:
        return {}

    def close(self) -> None: ...


class Verifying(Plain):
    """The same with means to verify."""

    def extend(self, tokens: Tokens) -> Logits:
        self.rows.append(tokens.shape[1])
        return self._append(tokens)

    def rewind(self, tokens: int) -> None:
        assert 0 <= tokens <= self.read.shape[1]
        self.read = self.read[:, : self.read.shape[1] - tokens]


def random_table(seed: int) -> Tokens:
    """Some continuations are random, others always the same, so that drafts are partly right."""
    generator = np.random.default_rng(seed)
    table = generator.integers(0, VOCAB, (VOCAB, VOCAB))
    usual = generator.random(VOCAB) < 0.8
    table[usual] = generator.integers(0, VOCAB, (int(usual.sum()), 1))
    return table


def cycle_table(length: int) -> Tokens:
    """Counts to ``length`` and begins again."""
    return np.broadcast_to(((np.arange(VOCAB) + 1) % length)[:, None], (VOCAB, VOCAB))


def prompt(seed: int, length: int = 30) -> Tokens:
    return np.random.default_rng(seed).integers(0, VOCAB, (1, length))


def tokens_of(session: Plain, prompts: Tokens, count: int, draft_tokens: int = 0) -> Tokens:
    return np.concatenate([step.tokens for step in greedy(session, prompts, count, draft_tokens)], axis=1)


@pytest.mark.parametrize(("seed", "most"), list(itertools.product(range(12), (1, 2, 7, 15))))
def test_drafts_change_no_token(seed: int, most: int) -> None:
    """Right, wrong or half right, the tokens are those that come one by one, as many as asked for, and the
    cache holds all of them but the last. It needs no more room than prompt and output."""
    table, prompts, count = random_table(seed), prompt(seed), 40 + seed
    expected = tokens_of(Plain(table), prompts, count)
    session = Verifying(table, room=prompts.shape[1] + count)
    found = tokens_of(session, prompts, count, most)
    np.testing.assert_array_equal(found, expected)
    held = np.concatenate([prompts, found], axis=1)[:, : session.read.shape[1]]
    np.testing.assert_array_equal(session.read, held)
    assert held.shape[1] >= prompts.shape[1] + count - 1


def test_text_that_repeats_itself_takes_few_calls() -> None:
    """Twice the cycle is read before drafts are right; then each call brings as many as may be drafted."""
    session = Verifying(cycle_table(5))
    steps = list(greedy(session, np.array([[0, 1, 2, 3, 4, 0, 1, 2]]), 81, draft_tokens=15))
    assert len(session.rows) <= 2 + 80 // 16
    assert max(session.rows) == 16
    assert sum(step.tokens.shape[1] - 1 for step in steps) >= 70
    assert sum(step.drafted for step in steps) < 90


def test_no_call_reads_one_row_only() -> None:
    """Kernels for one row and for several round differently: tokens must not depend on what was guessed."""
    for seed in range(4):
        session = Verifying(random_table(seed))
        tokens_of(session, prompt(seed), 50, draft_tokens=7)
        assert min(session.rows) >= 2


def test_text_that_cannot_be_guessed_is_soon_left_alone() -> None:
    """Wrong drafts cost time, so they get rare: one of two tokens in so many calls, else the padding."""
    text = np.tile(np.arange(3), 40)
    lookup, drafted = PromptLookup(7), 0
    for _ in range(200):
        draft = lookup.draft(text)
        drafted += len(draft) > 0
        if len(draft):
            lookup.learn(len(draft), right=0)
    assert 5 <= drafted <= 15
    assert len(draft) <= 1


def test_the_draft_is_what_followed_latest() -> None:
    """The longest match decides before the latest one does, and what follows it goes round at its end."""
    assert PromptLookup(4).draft(np.array([7, 1, 2, 3, 7, 1, 2, 4, 7, 1, 2])).tolist() == [4, 7]
    assert PromptLookup(4).draft(np.array([9, 1, 2, 3, 7, 1, 2, 4, 9, 1, 2])).tolist() == [3, 7]
    assert PromptLookup(4).draft(np.array([5, 6, 6, 6])).tolist() == [6, 6]
    assert PromptLookup(4).draft(np.array([1, 2, 3, 4, 5])).tolist() == []
    assert PromptLookup(4).draft(np.array([1])).tolist() == []
    lookup = PromptLookup(7)
    lengths = []
    for _ in range(4):
        lengths.append(len(lookup.draft(np.tile(np.arange(3), 40))))
        lookup.learn(lengths[-1], right=lengths[-1])
    assert lengths == [2, 4, 7, 7]


def test_drafts_need_means_to_verify_and_one_prompt() -> None:
    """Never a silent generation without."""
    with pytest.raises(ValueError, match="drafts need"):
        tokens_of(Plain(cycle_table(5)), prompt(0), 4, draft_tokens=3)
    with pytest.raises(ValueError, match="drafts need"):
        tokens_of(Verifying(cycle_table(5)), np.repeat(prompt(0), 2, axis=0), 4, draft_tokens=3)


def test_a_batch_is_continued_row_by_row() -> None:
    """Without drafts, any number of rows."""
    table = random_table(3)
    rows = np.concatenate([prompt(1), prompt(2)])
    apart = [tokens_of(Plain(table), row[None], 9) for row in rows]
    np.testing.assert_array_equal(tokens_of(Plain(table), rows, 9), np.concatenate(apart))
