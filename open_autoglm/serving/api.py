"""HTTP as OpenAI's clients speak it."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from importlib.metadata import version
from typing import Any, TypeVar

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from open_autoglm.errors import UserError
from open_autoglm.serving.admin import admin_routes
from open_autoglm.serving.engine import EngineLost, NotFinite
from open_autoglm.serving.errors import Rejected
from open_autoglm.serving.fleet import Fleet
from open_autoglm.serving.messages import Sampling
from open_autoglm.serving.openai_answers import CHAT, COMPLETION, Answer, Choice, Json, Usage, error_body
from open_autoglm.serving.openai_types import ChatRequest, CompletionRequest
from open_autoglm.serving.openapi import (
    KEY,
    Alive,
    ChatCompletion,
    Completion,
    ModelCard,
    ModelList,
    Prepared,
    Responses,
    Unprepared,
    answers,
    refusals,
)
from open_autoglm.serving.service import Asked, Overloaded, Piece, Service

T = TypeVar("T")

DEFAULT_MAX_TOKENS = 16
"""Of a completion that does not say; OpenAI's. A chat goes on to the end of the context."""

_LOST_RETRY_S = 2

_SHORT_BYTES = 1 << 15
"""Of a body whose text is tokenized within milliseconds."""

_CLIENT_LEFT = 499
"""Seen in logs only; nginx's number."""


def create_app(fleet: Fleet, warning: Callable[[], str] = str) -> FastAPI:
    """The application that serves ``fleet``; ``/readyz`` says what ``warning`` returns, if anything."""
    app = FastAPI(title="Open-AutoGLM endpoint", version=version("open-autoglm"), redoc_url=None)
    _add_errors(app)

    @app.post("/v1/completions", responses=answers(Completion))
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue a prompt, or several."""
        _require_model(fleet, body.model)

        def ask(service: Service) -> tuple[Answer, list[Asked]]:
            prompts = [service.encode(prompt) for prompt in body.prompts]
            sampling = _sampling(body, body.logprobs)
            asked = [
                _asked(service, prompt, body, body.max_tokens or DEFAULT_MAX_TOKENS, sampling, choice)
                for prompt in prompts
                for choice in range(body.n)
            ]
            return _answer(COMPLETION, service, prompts, len(asked), body.logprobs is not None), asked

        return await _respond(fleet, ask, body, request)

    @app.post("/v1/chat/completions", responses=answers(ChatCompletion))
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        _require_model(fleet, body.model)

        def ask(service: Service) -> tuple[Answer, list[Asked]]:
            prompt = service.encode_chat([message.as_template_input() for message in body.messages])
            sampling = _sampling(body, (body.top_logprobs or 0) if body.logprobs else None)
            most = body.max_completion_tokens or body.max_tokens
            asked = [_asked(service, prompt, body, most, sampling, choice) for choice in range(body.n)]
            return _answer(CHAT, service, [prompt], len(asked), bool(body.logprobs)), asked

        return await _respond(fleet, ask, body, request)

    @app.get("/v1/models", responses=KEY)
    async def models() -> ModelList:
        """The model that is served."""
        return ModelList(data=[_model(fleet.champion)])

    @app.get("/v1/models/{name:path}", responses=refusals(401, 403, 404))
    async def model(name: str) -> ModelCard:
        """The model, if it is this one."""
        _require_model(fleet, name)
        return _model(fleet.champion)

    _add_health(app, fleet, warning)
    app.include_router(admin_routes(fleet))
    return app


Ask = Callable[[Service], tuple[Answer, list[Asked]]]


# ── requests ─────────────────────────────────────────────────────────────────────────────────────


class UnknownModel(UserError):
    """Another model than the one that is served."""


def _require_model(fleet: Fleet, name: str) -> None:
    if name != fleet.name:
        raise UnknownModel(f"the model {name!r} is not served here: this is {fleet.name!r}")


def _caller(request: Request, user: str | None) -> str:
    """Who stays with one version: the end user if the client names one, else its key, else its address."""
    key: str = getattr(request.state, "caller", "anonymous")
    address = request.client.host if request.client else ""
    return user or (key if key != "anonymous" else address)


def _sampling(body: CompletionRequest | ChatRequest, logprobs: int | None) -> Sampling:
    temperature = 1.0 if body.temperature is None else body.temperature
    top_p = 1.0 if body.top_p is None else body.top_p
    return Sampling(temperature=temperature, top_p=top_p, seed=body.seed, logprobs=logprobs)


def _asked(
    service: Service,
    prompt: tuple[int, ...],
    body: CompletionRequest | ChatRequest,
    max_tokens: int | None,
    sampling: Sampling,
    choice: int,
) -> Asked:
    """The ``choice``-th answer to a prompt: choices differ by their seed."""
    if sampling.seed is not None:
        sampling = sampling.model_copy(update={"seed": sampling.seed + choice})
    return Asked(prompt, service.room(prompt, max_tokens), sampling, tuple(body.stops), body.ignore_eos)


def _answer(
    shape: Any, service: Service, prompts: Sequence[Sequence[int]], choices: int, with_logprobs: bool
) -> Answer:
    def decode(token: int) -> str:
        return str(service.tokenizer.decode([token]))

    usage = Usage(prompt_tokens=sum(map(len, prompts)))
    return Answer(shape, service.name, decode, with_logprobs, [Choice() for _ in range(choices)], usage)


# ── answers ──────────────────────────────────────────────────────────────────────────────────────


async def _respond(
    fleet: Fleet,
    ask: Ask,
    body: CompletionRequest | ChatRequest,
    request: Request,
) -> Response:
    """The answer of whoever the caller is given to. Of a challenger nobody hears that it failed before its
    first word: the champion answers then."""
    service = fleet.route(_caller(request, body.user))
    try:
        return await _respond_by(service, *await _read(service, ask, request), body, request)
    except (EngineLost, Overloaded):
        if service is fleet.champion:
            raise
        champion = fleet.champion
        return await _respond_by(champion, *await _read(champion, ask, request), body, request)


async def _read(service: Service, ask: Ask, request: Request) -> tuple[Answer, list[Asked]]:
    """What ``ask`` makes of the request. Long texts take a tokenizer seconds, during which others' tokens
    must be sent."""
    if getattr(request.state, "body_bytes", 0) <= _SHORT_BYTES:
        return ask(service)
    return await service.aside(lambda: ask(service))


async def _respond_by(
    service: Service,
    answer: Answer,
    asked: Sequence[Asked],
    body: CompletionRequest | ChatRequest,
    request: Request,
) -> Response:
    """The whole answer, or a stream whose status is sent only once its first piece is known."""
    for_log = request.state
    for_log.asked, for_log.usage = body, answer.usage
    for_log.role, for_log.version = service.metrics.role, service.version or None
    pieces = _together(service, asked)
    if body.stream:
        first = await anext(pieces)
        events = _events(answer, first, pieces, usage=body.wants_usage)
        response: Response = _EventStream(events)
    else:
        left = Response(status_code=_CLIENT_LEFT)
        response = await _unless_left(request.receive, _whole(answer, pieces)) or left
    response.headers["X-Autoglm-Bundle"] = service.digest[:12]
    return response


async def _whole(answer: Answer, pieces: AsyncGenerator[tuple[int, Piece]]) -> Response:
    async with contextlib.aclosing(pieces):
        async for index, piece in pieces:
            answer.add(index, piece)
    return _json(answer.whole())


class _EventStream(Response):
    """Events as they come. Starlette's stream does the same in a task group, whose making takes the first
    token as long as all the rest of an answer's way through the server."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _unless_left(receive, self._stream(send))

    async def _stream(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with contextlib.aclosing(self._events) as events:
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _unless_left(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """What ``work`` returns; it is cancelled if the client leaves."""
    task = asyncio.create_task(work)
    leaving = asyncio.create_task(_left(receive))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for pending in (task, leaving):
            pending.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    """Until the client has closed the connection; its body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _together(service: Service, asked: Sequence[Asked]) -> AsyncGenerator[tuple[int, Piece]]:
    """The pieces of several answers as they come, each with its answer's index."""
    with service.places(len(asked)):
        if len(asked) == 1:
            async with contextlib.aclosing(service.answer(asked[0])) as only:
                async for piece in only:
                    yield 0, piece
            return
        queue: asyncio.Queue[tuple[int, Piece | EngineLost]] = asyncio.Queue()
        tasks = [asyncio.create_task(_follow(service, *numbered, queue)) for numbered in enumerate(asked)]
        try:
            left = len(asked)
            while left:
                index, found = await queue.get()
                if isinstance(found, EngineLost):
                    raise found
                left -= found.finish is not None
                yield index, found
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _follow(
    service: Service, index: int, asked: Asked, queue: asyncio.Queue[tuple[int, Piece | EngineLost]]
) -> None:
    try:
        async with contextlib.aclosing(service.answer(asked)) as answer:
            async for piece in answer:
                queue.put_nowait((index, piece))
    except EngineLost as error:
        queue.put_nowait((index, error))


async def _events(
    answer: Answer, first: tuple[int, Piece], rest: AsyncGenerator[tuple[int, Piece]], *, usage: bool
) -> AsyncGenerator[bytes]:
    """Server-sent events (html.spec.whatwg.org, section 9.2), as OpenAI ends them."""

    def event(content: Json) -> bytes:
        return b"data: " + orjson.dumps(content) + b"\n\n"

    async with contextlib.aclosing(rest):
        try:
            answer.add(*first)
            yield event(answer.chunk(*first))
            async for index, piece in rest:
                answer.add(index, piece)
                yield event(answer.chunk(index, piece))
        except EngineLost as error:
            # The status is out already; clients raise what an event calls an error.
            yield event(error_body(_lost(error), "engine_error", code=error.code))
            return
        if usage:
            yield event(answer.usage_chunk())
        yield b"data: [DONE]\n\n"


def _lost(error: EngineLost) -> str:
    return str(error) if isinstance(error, NotFinite) else f"{error}: send the request again"


def _json(content: Json, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(content), status, headers, media_type="application/json")


def _model(service: Service) -> ModelCard:
    ready = service.engine.ready
    return ModelCard(
        id=service.name,
        created=service.created,
        max_model_len=service.max_tokens,
        version=service.version,
        bundle_digest=service.digest,
        slots=ready.slots if ready else 0,
    )


# ── health ───────────────────────────────────────────────────────────────────────────────────────


def _add_health(app: FastAPI, fleet: Fleet, warning: Callable[[], str]) -> None:
    @app.get("/healthz", responses=refusals(403))
    async def healthz() -> Alive:
        """The server answers."""
        return Alive()

    starting: Responses = {503: {"model": Unprepared, "description": "The engine does not answer"}}

    @app.get("/readyz", responses={**refusals(403), 200: {"model": Prepared}, **starting})
    async def readyz() -> Response:
        """The engine answers; 503 with the reason while it does not."""
        engine = fleet.champion.engine
        if engine.state == "ready":
            told = warning()
            return _json({"status": "ready"} | ({"warning": told} if told else {}))
        return _json({"status": engine.state, "reason": engine.last_words}, 503)

    text: Responses = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}

    @app.get("/metrics", responses={**KEY, **text}, response_class=Response)
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(fleet.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")


# ── errors ───────────────────────────────────────────────────────────────────────────────────────


def _add_errors(app: FastAPI) -> None:
    def told(status: int, kind: str, message: str, **more: Any) -> Response:
        headers = more.pop("headers", None)
        return _json(error_body(message, kind, **more), status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> Response:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"][1:])
        message = f"{place}: {problem['msg']}" if place else str(problem["msg"])
        return told(400, "invalid_request_error", message, param=place or None)

    @app.exception_handler(UnknownModel)
    async def unknown(_request: Request, error: UnknownModel) -> Response:
        return told(404, "invalid_request_error", str(error), param="model", code="model_not_found")

    @app.exception_handler(UserError)
    async def refused(_request: Request, error: UserError) -> Response:
        return told(400, "invalid_request_error", str(error))

    @app.exception_handler(Rejected)
    async def rejected(_request: Request, error: Rejected) -> Response:
        body = error_body(error.reason, "invalid_request_error", code="bundle_rejected")
        return _json(body | {"checks": [check.model_dump() for check in error.checks]}, 409)

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        message = f"{request.scope['path']}: {error.detail}"
        return told(error.status_code, "invalid_request_error", message, headers=error.headers)

    @app.exception_handler(Overloaded)
    async def overloaded(_request: Request, error: Overloaded) -> Response:
        retry = {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
        if error.full:
            return told(429, "rate_limit_error", str(error), code="queue_full", headers=retry)
        return told(503, "overloaded_error", str(error), code="deadline", headers=retry)

    @app.exception_handler(NotFinite)
    async def not_finite(_request: Request, error: NotFinite) -> Response:
        return told(500, "engine_error", _lost(error), code=error.code)

    @app.exception_handler(EngineLost)
    async def lost(_request: Request, error: EngineLost) -> Response:
        return told(
            503,
            "engine_error",
            _lost(error),
            code=error.code,
            headers={"Retry-After": str(_LOST_RETRY_S)},
        )

    @app.exception_handler(Exception)
    async def bug(request: Request, _error: Exception) -> Response:
        """Starlette raises it again, so that its traceback gets into the log."""
        name = getattr(request.state, "request_id", "unknown")
        return told(500, "server_error", f"the server failed on request {name}; its log says why")
