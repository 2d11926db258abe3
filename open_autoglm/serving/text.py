"""Tokens into text as they come, up to where the answer is to stop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class TextStream:
    """Text of one answer, given out as soon as no later token can change it.

    A character may need several tokens, and a stop string may begin in one token and end in another: both are
    held back until it is known what they are.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str]) -> None:
        """``tokenizer`` is a ``tokenizers.Tokenizer``; ``prompt`` the ids before the answer."""
        from tokenizers.decoders import DecodeStream

        # What the first token looks like may depend on the one before it (a leading space).
        self._stream = DecodeStream(ids=list(prompt[-_BEFORE:]), skip_special_tokens=True)
        self._tokenizer = tokenizer
        self._stop = [word for word in stop if word]
        self._half: list[int] = []
        """Tokens that are no whole character yet."""
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The new text after one more token; '' if it is not certain yet, or behind a stop string."""
        if self.stopped:
            return ""
        new = self._stream.step(self._tokenizer, token)
        self._half = [*self._half, token] if new is None else []
        self._held += new or ""
        ends = [place for word in self._stop if (place := self._held.find(word)) >= 0]
        if ends:
            self.stopped = True
            self._held = self._held[: min(ends)]
        return self._release(0 if self.stopped else self._may_be_a_stop())

    def end(self) -> str:
        """What was held back, when nothing more will come; half a character is shown as U+FFFD."""
        if self._half and not self.stopped:
            self._held += self._tokenizer.decode(self._half, skip_special_tokens=True)
        return self._release(0)

    def _release(self, kept: int) -> str:
        cut = len(self._held) - kept
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def _may_be_a_stop(self) -> int:
        """Characters at the end with which a stop string begins."""
        longest = 0
        for word in self._stop:
            for size in range(min(len(word) - 1, len(self._held)), longest, -1):
                if self._held.endswith(word[:size]):
                    longest = size
                    break
        return longest


_BEFORE = 5
