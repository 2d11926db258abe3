"""Tokens by themselves, as logprobs show them."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

_BYTE = re.compile("<0x([0-9A-F]{2})>")
"""As SentencePiece writes a byte that is no character (byte fallback)."""
_NO_CHARACTER = "\ufffd"


class Vocabulary:
    """Of one tokenizer. What was looked up is kept: there are no more than its tokens."""

    def __init__(self, tokenizer: Any) -> None:
        """``tokenizer`` is one of transformers', with a ``tokenizers.Tokenizer`` behind it."""
        self._tokenizer = tokenizer
        self.text = cache(self._text)
        self.bytes = cache(self._bytes)

    def _text(self, token: int) -> str:
        """U+FFFD where it is half of a character."""
        return str(self._tokenizer.decode([token]))

    def _bytes(self, token: int) -> bytes:
        """Those of an answer put together are its text, also if each is only half of a character."""
        text = self.text(token)
        piece = self._tokenizer.backend_tokenizer.id_to_token(token)
        if _NO_CHARACTER not in text or piece is None:
            return text.encode()
        if found := _BYTE.fullmatch(piece):
            return bytes.fromhex(found[1])
        letters = _letters()
        return bytes(letters[one] for one in piece) if letters.keys() >= set(piece) else text.encode()


@cache
def _letters() -> dict[str, int]:
    """The letters that byte-level vocabularies write bytes with (GPT-2, ``encoder.py``)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(0x100 + n): byte for n, byte in enumerate(others)}
