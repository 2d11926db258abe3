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
        self._stream = _behind(tokenizer, prompt[-_BEFORE:])
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


_BEFORE = 10
"""Tokens. A character takes four at most, so there is a whole one even if halves are at both ends."""
_NO_CHARACTER = "\ufffd"


def _behind(tokenizer: Any, before: Sequence[int]) -> Any:
    """A stream of what follows these tokens: what the first one looks like may depend on them (a leading
    space). Where they end within a character, the stream knows its half, and shows nothing of them."""
    from tokenizers.decoders import DecodeStream

    def text(tokens: Sequence[int]) -> str:
        found: str = tokenizer.decode(list(tokens), skip_special_tokens=True)
        return found

    whole = next(n for n in range(len(before), -1, -1) if not text(before[:n]).endswith(_NO_CHARACTER))
    stream = DecodeStream(ids=list(before[:whole]), skip_special_tokens=True)
    if text(before[whole:]) == _NO_CHARACTER:  # several are no half of anything, and nothing makes it whole
        for token in before[whole:]:
            stream.step(tokenizer, token)
    return stream
