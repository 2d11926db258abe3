"""What ``/openapi.json`` says of answers. Answers with tokens are made without these models, which would take
longer than the tokens; a test compares what a running server sends with what is said here."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

Responses = dict[int | str, dict[str, Any]]

_REFUSALS = {
    400: "The request cannot be understood or done",
    401: "No key, or one that is not known",
    403: "The key or the Host name does not allow it",
    404: "Another model than the one that is served",
    408: "The body came too slowly",
    409: "The same is being done already",
    413: "The body is too long",
    415: "The body is not said to be JSON",
    429: "The queue is full, or the key's rate used up; `Retry-After` says when to come back",
    500: "The model computed NaN or infinity",
    503: "The engine is being started again, or the answer would come too late; see `Retry-After`",
}
_BODY = (400, 408, 413, 415)


class Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Every error, as OpenAI's clients expect it."""

    error: Error


class RejectedAnswer(ErrorAnswer):
    """A bundle that may not answer."""

    checks: list[dict[str, Any]]


def refusals(*statuses: int) -> Responses:
    """These errors, by their reasons, and any other."""
    words: dict[int | str, str] = {status: _REFUSALS[status] for status in statuses}
    words["default"] = "Any other error"
    return {status: {"model": ErrorAnswer, "description": told} for status, told in words.items()}


KEY: Responses = refusals(401, 403)
_REJECTED: Responses = {
    409: {"model": RejectedAnswer, "description": "The bundle was refused, by these checks"}
}
ADMIN_BODY: Responses = refusals(401, 403, *_BODY) | _REJECTED
RENEWED: Responses = refusals(400, 401, 403, 415) | _REJECTED


def answers(whole: type[BaseModel]) -> Responses:
    """Of a request for tokens: ``whole``, or events with the same content in pieces."""
    told = "The answer, or with `stream` its pieces as server-sent events"
    # Of each event: before OpenAPI 3.2, a schema has no other way to tell of a stream.
    event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
    content = {"text/event-stream": {"schema": event}}
    return {
        200: {"model": whole, "description": told, "content": content},
        **refusals(401, 403, 404, *_BODY, 429, 500, 503),
    }


# ── answers ──────────────────────────────────────────────────────────────────────────────────────

Finish = Literal["stop", "length"]


class CachedTokens(BaseModel):
    cached_tokens: int


class TokenUsage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: TokenUsage


class TokenLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChosenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChosenLogprob]
    refusal: None


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: TokenUsage


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["open-autoglm"] = "open-autoglm"
    max_model_len: int
    version: str
    """The registry's; '' without one."""
    bundle_digest: str
    slots: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Alive(BaseModel):
    status: Literal["ok"] = "ok"


class Prepared(BaseModel):
    status: Literal["ready"] = "ready"
    warning: str = ""
    """What is not as it should be, though requests are answered."""


class Unprepared(BaseModel):
    status: Literal["starting", "restarting", "closed"]
    reason: str
