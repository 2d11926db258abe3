"""OpenAI's answers, whole or in pieces, and its errors: plain dictionaries in the order clients show them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from open_autoglm.serving.messages import Token
from open_autoglm.serving.service import Piece
from open_autoglm.serving.vocabulary import Vocabulary

Json = dict[str, Any]


def error_body(message: str, kind: str, *, param: str | None = None, code: str | None = None) -> Json:
    """``{"error": …}`` as OpenAI's clients expect it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass
class Usage:
    """Tokens of one HTTP request."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    first_s: float | None = None
    """When the first piece came, by ``time.monotonic``."""

    def count(self, piece: Piece) -> None:
        if self.first_s is None:
            self.first_s = time.monotonic()
        self.completion_tokens += piece.token.token is not None
        self.cached_tokens += piece.token.cached_tokens

    def body(self) -> Json:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass
class Choice:
    """One answer so far."""

    text: str = ""
    finish: str | None = None
    pieces: list[Piece] = field(default_factory=list)
    told: int = 0
    """Characters of the tokens whose logprobs were sent."""

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.finish = piece.finish
        self.pieces.append(piece)


@dataclass(frozen=True)
class Shape:
    """What completions and chats say differently."""

    prefix: str
    whole: str
    chunk: str
    logprobs: Callable[[Sequence[Token], Vocabulary, int], Json]
    """Of these tokens, before which the answer has so many characters."""
    body: Callable[[str], Json]
    delta: Callable[[str, bool], Json]


def _text_logprobs(tokens: Sequence[Token], vocabulary: Vocabulary, begin: int) -> Json:
    words = [vocabulary.text(t.token) for t in tokens if t.token is not None]
    return {
        "tokens": words,
        "token_logprobs": [t.logprob for t in tokens],
        "top_logprobs": [_by_text(t, vocabulary) for t in tokens],
        "text_offset": list(accumulate(map(len, words), initial=begin))[:-1],
    }


def _by_text(token: Token, vocabulary: Vocabulary) -> dict[str, float]:
    """Where several read alike, as halves of characters do, that of the likeliest."""
    found: dict[str, float] = {}
    for other, logprob in token.likeliest:
        found.setdefault(vocabulary.text(other), logprob)
    return found


def _chat_logprobs(tokens: Sequence[Token], vocabulary: Vocabulary, _begin: int) -> Json:
    def entry(token: int, logprob: float | None) -> Json:
        return {
            "token": vocabulary.text(token),
            "logprob": logprob,
            "bytes": list(vocabulary.bytes(token)),
        }

    content = [
        entry(t.token, t.logprob) | {"top_logprobs": [entry(i, value) for i, value in t.likeliest]}
        for t in tokens
        if t.token is not None
    ]
    return {"content": content, "refusal": None}


COMPLETION = Shape(
    prefix="cmpl",
    whole="text_completion",
    chunk="text_completion",
    logprobs=_text_logprobs,
    body=lambda text: {"text": text},
    delta=lambda text, first: {"text": text},
)
CHAT = Shape(
    prefix="chatcmpl",
    whole="chat.completion",
    chunk="chat.completion.chunk",
    logprobs=_chat_logprobs,
    body=lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
    delta=lambda text, first: {"delta": ({"role": "assistant"} if first else {}) | {"content": text}},
)


@dataclass
class Answer:
    """One HTTP request's answer in the making."""

    shape: Shape
    model: str
    vocabulary: Vocabulary | None
    """None: no logprobs are wanted."""
    choices: list[Choice]
    usage: Usage
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = f"{self.shape.prefix}-{uuid.uuid4().hex}"

    def add(self, index: int, piece: Piece) -> None:
        self.usage.count(piece)
        self.choices[index].add(piece)

    @property
    def done(self) -> bool:
        """Whether every choice has ended."""
        return all(choice.finish is not None for choice in self.choices)

    def whole(self) -> Json:
        choices = [
            {
                "index": index,
                **self.shape.body(choice.text),
                "logprobs": self._logprobs(choice.pieces, 0),
                "finish_reason": choice.finish,
            }
            for index, choice in enumerate(self.choices)
        ]
        return self._head(self.shape.whole) | {"choices": choices, "usage": self.usage.body()}

    def chunk(self, index: int, piece: Piece) -> Json:
        """One event of a stream, after `add`."""
        so_far = self.choices[index]
        choice = {
            "index": index,
            **self.shape.delta(piece.text, len(so_far.pieces) == 1),
            "logprobs": self._logprobs([piece], so_far.told),
            "finish_reason": piece.finish,
        }
        if self.vocabulary and piece.token.token is not None:
            so_far.told += len(self.vocabulary.text(piece.token.token))
        return self._head(self.shape.chunk) | {"choices": [choice]}

    def usage_chunk(self) -> Json:
        return self._head(self.shape.chunk) | {"choices": [], "usage": self.usage.body()}

    def _logprobs(self, pieces: Sequence[Piece], begin: int) -> Json | None:
        if self.vocabulary is None:
            return None
        tokens = [piece.token for piece in pieces if piece.token.token is not None]
        return self.shape.logprobs(tokens, self.vocabulary, begin)

    def _head(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}
