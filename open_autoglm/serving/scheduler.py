"""Continuous batching: who is read, and when.

Requests join and leave between two calls of the model (Yu et al., "Orca", 2022). A prompt is read in pieces,
and between two pieces every answer under way gets its next token, so that a long prompt delays the others by
one piece and not by its whole length (Agrawal et al., "Sarathi-Serve", 2024, arXiv:2403.02310).

What a slot has read stays there when its request ends. The next request takes the slot whose text begins
most like its own, and reads only what differs.

A candidate that drafts does so here while it answers one greedy request: then the next tokens are guessed and
verified as in :mod:`open_autoglm.generation`. With more to do, a call that reads a row of each is the better
use of the weights it reads.

When a request got its slot is told by CLOCK_MONOTONIC, which on Linux is one clock for all processes of a
host (man 2 clock_gettime), so the server may subtract from it what the clock said when the request came.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np

from open_autoglm.engines.contract import Logits, Tokens
from open_autoglm.generation import PromptLookup
from open_autoglm.serving.messages import Finish, Generation, Load, Token
from open_autoglm.serving.sampling import choose


class Slots(Protocol):
    """What is needed of :class:`open_autoglm.engines.contract.Slotted`."""

    def append(self, slot: int, tokens: Tokens, *, every: bool = False) -> Logits: ...
    def advance(self, slots: Sequence[int], tokens: Tokens) -> Logits: ...
    def truncate(self, slot: int, length: int) -> None: ...


class _Running:
    """A request in its slot."""

    def __init__(
        self, generation: Generation, slot: int, slot_s: float, read: int, draft_tokens: int
    ) -> None:
        self.generation = generation
        self.slot = slot
        self.slot_s = slot_s
        """When it got it."""
        self.read = read
        """Tokens of the prompt that the slot holds."""
        self.cached = read
        self.credit = 0
        """Tokens of others that were read while this one waited for its turn."""
        self.produced = 0
        self.last = -1
        """The token that is to be read next."""
        greedy = generation.sampling.temperature == 0
        # Gathering entropy takes longer than all else that is done for a greedy answer.
        self.random = None if greedy else np.random.default_rng(generation.sampling.seed)
        self.lookup = PromptLookup(draft_tokens) if greedy and draft_tokens else None


class Scheduler:
    """Serves generations from the slots of one session; every method returns at once but `step`."""

    def __init__(
        self,
        session: Slots,
        slots: int,
        chunk_tokens: int | None,
        *,
        reuse_prefixes: bool = True,
        draft_tokens: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``chunk_tokens`` is the longest piece of a prompt while others wait for tokens; None: all of it.
        ``draft_tokens`` are guessed per call, at most."""
        self._session = session
        self._chunk_tokens = chunk_tokens
        self._reuse = reuse_prefixes
        self._draft_tokens = draft_tokens
        self._clock = clock
        self._waiting: deque[Generation] = deque()
        self._reading: list[_Running] = []
        self._writing: list[_Running] = []
        self._free = set(range(slots))
        self._held: list[list[int]] = [[] for _ in range(slots)]
        """The tokens that each slot has read."""
        self._wrote_last = False

    # ── from outside ─────────────────────────────────────────────────────────────────────────────

    def add(self, generation: Generation) -> None:
        self._waiting.append(generation)

    def cancel(self, name: str) -> None:
        """Forget a generation; nothing happens if it has ended."""
        self._waiting = deque(g for g in self._waiting if g.id != name)
        for running in [*self._reading, *self._writing]:
            if running.generation.id == name:
                self._leave(running)

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._reading or self._writing)

    @property
    def load(self) -> Load:
        return Load(
            running=len(self._reading) + len(self._writing),
            waiting=len(self._waiting),
            cached_tokens=sum(map(len, self._held)),
        )

    # ── one call of the model ────────────────────────────────────────────────────────────────────

    def step(self) -> list[Token]:
        """Call the model once, for a piece of a prompt or for a token of every answer under way."""
        self._admit()
        if self._reading and (self._wrote_last or not self._writing):
            self._wrote_last = False
            return self._read(self._next_in_line())
        if self._writing:
            self._wrote_last = True
            return self._write()
        return []

    def _admit(self) -> None:
        while self._waiting and self._free:
            generation = self._waiting.popleft()
            slot, common = self._place(generation)
            self._free.discard(slot)
            self._session.truncate(slot, common)
            del self._held[slot][common:]
            self._reading.append(_Running(generation, slot, self._clock(), common, self._draft_tokens))

    def _place(self, generation: Generation) -> tuple[int, int]:
        """The free slot where most need not be read of the prompt, less what is thrown away for it; and how
        much that is. All prompts of one template begin alike: without the loss, each would take the place of
        the conversation before, though other slots are empty."""
        if not self._reuse or generation.fresh:
            return min(self._free, key=lambda slot: (len(self._held[slot]), slot)), 0
        # One token is left to read, since its logits are wanted.
        shared = {slot: _common(self._held[slot], generation.prompt[:-1]) for slot in self._free}
        slot = max(sorted(self._free), key=lambda slot: 2 * shared[slot] - len(self._held[slot]))
        return slot, shared[slot]

    def _next_in_line(self) -> _Running:
        """Who has least left to read, less what was read of others meanwhile: short prompts do not wait for
        long ones, and a long one does not wait forever."""

        def left(running: _Running) -> int:
            return len(running.generation.prompt) - running.read - running.credit

        return min(self._reading, key=left)

    def _read(self, running: _Running) -> list[Token]:
        prompt = running.generation.prompt
        piece = prompt[running.read :]
        if self._chunk_tokens is not None and (self._writing or len(self._reading) > 1):
            piece = piece[: self._chunk_tokens]
        logits = self._session.append(running.slot, np.array(piece, dtype=np.int64))
        self._held[running.slot] += piece
        running.read += len(piece)
        for other in self._reading:
            other.credit += len(piece) if other is not running else 0
        if running.read < len(prompt):
            return []
        self._reading.remove(running)
        self._writing.append(running)
        return [self._next(running, logits[-1])]

    def _write(self) -> list[Token]:
        batch = list(self._writing)
        if len(batch) == 1 and not self._reading and (lookup := batch[0].lookup) is not None:
            return self._write_with_draft(batch[0], lookup)
        tokens = np.array([running.last for running in batch], dtype=np.int64)
        logits = self._session.advance([running.slot for running in batch], tokens)
        for running in batch:
            self._held[running.slot].append(running.last)
        return [self._next(running, row) for running, row in zip(batch, logits, strict=True)]

    def _write_with_draft(self, running: _Running, lookup: PromptLookup) -> list[Token]:
        """The token after the last one and, as far as the draft is right, those after it."""
        held, left = self._held[running.slot], running.generation.max_tokens - running.produced
        text = np.array([*held, running.last], dtype=np.int64)
        guess = lookup.draft(text)[:left]
        draft = guess if len(guess) else text[-1:]  # never one row: see `open_autoglm.generation`
        every = self._session.append(running.slot, np.append(text[-1:], draft), every=True)
        right = int(np.logical_and.accumulate(every[:-1].argmax(axis=-1) == draft).sum())
        if len(guess):
            lookup.learn(len(draft), right)
        found = []
        for logits in every[: right + 1]:
            held.append(running.last)
            found.append(self._next(running, logits))
            if found[-1].ends:
                break
        self._session.truncate(running.slot, len(held))
        return found

    def _next(self, running: _Running, logits: Logits) -> Token:
        """Choose the next token of ``running``, which leaves if that ends its answer."""
        generation = running.generation
        if not np.isfinite(logits).all():
            self._leave(running)
            self._held[running.slot].clear()  # or its cache would spoil the next prompt that begins alike
            return Token(id=generation.id, token=None, not_finite=True)
        chosen = choose(logits, generation.sampling, running.random)
        first = running.produced == 0
        running.produced += 1
        running.last = chosen.token
        ended = chosen.token in generation.stop_tokens
        finish: Finish | None = (
            "stop" if ended else "length" if running.produced == generation.max_tokens else None
        )
        if finish is not None:
            self._leave(running)
        return Token(
            id=generation.id,
            token=None if ended else chosen.token,
            finish=finish,
            cached_tokens=running.cached if first else 0,
            slot_s=running.slot_s if first else None,
            logprob=chosen.logprob,
            likeliest=chosen.likeliest,
        )

    def _leave(self, running: _Running) -> None:
        for group in (self._reading, self._writing):
            if running in group:
                group.remove(running)
        self._free.add(running.slot)
        if not self._reuse:
            self._held[running.slot].clear()


def _common(held: Sequence[int], prompt: Iterable[int]) -> int:
    """How many tokens both begin with."""
    count = 0
    for one, other in zip(held, prompt, strict=False):
        if one != other:
            break
        count += 1
    return count
