"""The way of a request for tokens through the server, whose every step its first token waits for.

FastAPI describes these requests and has all others. To find the route, read the body and wrap the answer took
it 0.4 ms of each first token, on two cores; here pydantic reads the body in 0.1, and nothing lies between.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import orjson
from pydantic import ValidationError
from starlette.responses import Response

from open_autoglm.serving.asgi import ANONYMOUS, App, Message, Receive, Send, state_of
from open_autoglm.serving.engine import EngineLost
from open_autoglm.serving.errors import UnknownModel
from open_autoglm.serving.failures import EXPECTED, failure, invalid, json_response, lost_words
from open_autoglm.serving.fleet import Fleet
from open_autoglm.serving.messages import Sampling
from open_autoglm.serving.openai_answers import CHAT, COMPLETION, Answer, Choice, Json, Usage, error_body
from open_autoglm.serving.openai_types import ChatRequest, CompletionRequest
from open_autoglm.serving.service import Asked, Overloaded, Piece, Service

T = TypeVar("T")
Body = CompletionRequest | ChatRequest
Ask = Callable[[Service], tuple[Answer, list[Asked]]]

DEFAULT_MAX_TOKENS = 16
"""Of a completion that does not say; OpenAI's. A chat goes on to the end of the context."""

_SHORT_BYTES = 1 << 15
"""Of a body whose text is tokenized within milliseconds."""

_BODIES: Mapping[str, type[Body]] = MappingProxyType(
    {"/v1/completions": CompletionRequest, "/v1/chat/completions": ChatRequest}
)


class Inference:
    """ASGI: answers requests for tokens, and leaves all others to ``rest``."""

    def __init__(self, fleet: Fleet, rest: App) -> None:
        self._fleet = fleet
        self._rest = rest

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        posted = scope["type"] == "http" and scope["method"] == "POST"
        body = _BODIES.get(scope["path"]) if posted else None
        if body is None:
            await self._rest(scope, receive, send)
            return
        content = await _content(receive)
        if content is not None:
            await _unless_left(receive, self._answer(body, content, scope, receive, send))

    async def _answer(
        self, body: type[Body], content: bytes, scope: Message, receive: Receive, send: Send
    ) -> None:
        try:
            asked = body.model_validate_json(content)
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False)[0]
            response = invalid(problem["loc"], problem["msg"])
        else:
            response = await self._answer_or_failure(asked, len(content), scope)
        await response(scope, receive, send)

    async def _answer_or_failure(self, body: Body, size_bytes: int, scope: Message) -> Response:
        try:
            return await self._respond(body, size_bytes, scope)
        except EXPECTED as error:
            return failure(error)

    async def _respond(self, body: Body, size_bytes: int, scope: Message) -> Response:
        """The answer of whoever the caller is given to. Of a challenger nobody hears that it failed before
        its first word: the champion answers then."""
        require_model(self._fleet, body.model)
        service = self._fleet.route(_caller(scope, body.user))
        ask = _completion(body) if isinstance(body, CompletionRequest) else _chat(body)
        try:
            return await _respond_by(service, *await _read(service, ask, size_bytes), body, scope)
        except (EngineLost, Overloaded):
            if service is self._fleet.champion:
                raise
            champion = self._fleet.champion
            return await _respond_by(champion, *await _read(champion, ask, size_bytes), body, scope)


async def _content(receive: Receive) -> bytes | None:
    """The body; None if the client left before its end."""
    parts, more = [], True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


async def _unless_left(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do it; it is cancelled if the client leaves."""
    task = asyncio.create_task(work)
    leaving = asyncio.create_task(_left(receive))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        for pending in (task, leaving):
            pending.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    """Until the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


# ── what is asked ────────────────────────────────────────────────────────────────────────────────


def require_model(fleet: Fleet, name: str) -> None:
    """Raises UnknownModel for another one's."""
    if name != fleet.name:
        raise UnknownModel(f"the model {name!r} is not served here: this is {fleet.name!r}")


def _completion(body: CompletionRequest) -> Ask:
    def ask(service: Service) -> tuple[Answer, list[Asked]]:
        prompts = [service.encode(prompt) for prompt in body.prompts]
        sampling = _sampling(body, body.logprobs)
        asked = [
            _asked(service, prompt, body, body.max_tokens or DEFAULT_MAX_TOKENS, sampling, choice)
            for prompt in prompts
            for choice in range(body.choices)
        ]
        return _begun(COMPLETION, service, prompts, len(asked), body.logprobs is not None), asked

    return ask


def _chat(body: ChatRequest) -> Ask:
    def ask(service: Service) -> tuple[Answer, list[Asked]]:
        prompt = service.encode_chat([message.as_template_input() for message in body.messages])
        sampling = _sampling(body, (body.top_logprobs or 0) if body.logprobs else None)
        most = body.max_completion_tokens or body.max_tokens
        asked = [_asked(service, prompt, body, most, sampling, choice) for choice in range(body.choices)]
        return _begun(CHAT, service, [prompt], len(asked), bool(body.logprobs)), asked

    return ask


def _caller(scope: Message, user: str | None) -> str:
    """Who stays with one version: the end user if the client names one, else its key, else its address."""
    key: str = state_of(scope).get("caller", ANONYMOUS)
    address = scope["client"][0] if scope.get("client") else ""
    return user or (key if key != ANONYMOUS else address)


def _sampling(body: Body, logprobs: int | None) -> Sampling:
    temperature = 1.0 if body.temperature is None else body.temperature
    top_p = 1.0 if body.top_p is None else body.top_p
    return Sampling(temperature=temperature, top_p=top_p, seed=body.seed, logprobs=logprobs)


def _asked(
    service: Service,
    prompt: tuple[int, ...],
    body: Body,
    max_tokens: int | None,
    sampling: Sampling,
    choice: int,
) -> Asked:
    """The ``choice``-th answer to a prompt: choices differ by their seed."""
    if sampling.seed is not None:
        sampling = sampling.model_copy(update={"seed": sampling.seed + choice})
    return Asked(prompt, service.room(prompt, max_tokens), sampling, tuple(body.stops), body.ignore_eos)


def _begun(
    shape: Any, service: Service, prompts: Sequence[Sequence[int]], choices: int, with_logprobs: bool
) -> Answer:
    usage = Usage(prompt_tokens=sum(map(len, prompts)))
    vocabulary = service.vocabulary if with_logprobs else None
    return Answer(shape, service.name, vocabulary, [Choice() for _ in range(choices)], usage)


async def _read(service: Service, ask: Ask, size_bytes: int) -> tuple[Answer, list[Asked]]:
    """What ``ask`` makes of the request. Long texts take a tokenizer seconds, during which others' tokens
    must be sent."""
    if size_bytes <= _SHORT_BYTES:
        return ask(service)
    return await service.aside(lambda: ask(service))


# ── what is answered ─────────────────────────────────────────────────────────────────────────────


async def _respond_by(
    service: Service, answer: Answer, asked: Sequence[Asked], body: Body, scope: Message
) -> Response:
    """The whole answer, or a stream whose status is sent only once its first piece is known."""
    for_log = state_of(scope)
    for_log["asked"], for_log["usage"] = body, answer.usage
    for_log["role"], for_log["version"] = service.metrics.role, service.version or None
    headers = {"X-Autoglm-Bundle": service.digest[:12]}
    pieces = _together(service, asked)
    if body.stream:
        response = _EventStream(answer, _events(answer, pieces, usage=body.wants_usage), headers)
        await response.begin()
        return response
    async with contextlib.aclosing(pieces):
        async for index, piece in pieces:
            answer.add(index, piece)
    # Of thousands of tokens, with twenty alternatives each, it takes a second.
    whole = await service.aside(answer.whole) if answer.vocabulary else answer.whole()
    return json_response(whole, headers=headers)


class _EventStream(Response):
    """Server-sent events (html.spec.whatwg.org, section 9.2) as they come, once the first one has."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer, events: AsyncGenerator[bytes], headers: Mapping[str, str]) -> None:
        super().__init__(headers={**headers, "Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._answer = answer
        self._events = events
        self._first = b""

    async def begin(self) -> None:
        """Wait for the first one. Raises what it ends with instead."""
        self._first = await anext(self._events)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self._events) as events:
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
            await send(self._body(self._first))
            async for event in events:
                await send(self._body(event))
            if not self._answer.done:
                await send({"type": "http.response.body"})

    def _body(self, event: bytes) -> Message:
        """The last one ends the response, or its end would be a packet of its own."""
        return {"type": "http.response.body", "body": event, "more_body": not self._answer.done}


async def _events(
    answer: Answer, pieces: AsyncGenerator[tuple[int, Piece]], *, usage: bool
) -> AsyncGenerator[bytes]:
    """One for each piece; the last has OpenAI's ending as well. Raises EngineLost, Overloaded before the
    first one; of what comes later it tells, since the status is out already and clients raise what an event
    calls an error."""
    begun = False
    async with contextlib.aclosing(pieces):
        try:
            async for index, piece in pieces:
                answer.add(index, piece)
                event = _event(answer.chunk(index, piece))
                if answer.done:
                    event += (_event(answer.usage_chunk()) if usage else b"") + b"data: [DONE]\n\n"
                yield event
                begun = True
        except EngineLost as error:
            if not begun:
                raise
            yield _event(error_body(lost_words(error), "engine_error", code=error.code))


def _event(content: Json) -> bytes:
    return b"data: " + orjson.dumps(content) + b"\n\n"


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
