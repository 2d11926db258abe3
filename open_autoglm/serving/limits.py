"""Limits on what a client may send, and how slowly: an ASGI middleware."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import orjson

from open_autoglm.serving.openai_answers import error_body

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class _Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Limits:
    """Refuses bodies that are too long (413) or too slow (408), and leaves clients that do not read."""

    def __init__(self, app: App, *, body_bytes: int, read_s: float, write_s: float) -> None:
        self._app = app
        self._body_bytes = body_bytes
        self._read_s = read_s
        self._write_s = write_s

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def send_in_time(message: Message) -> None:
            nonlocal started
            started = True
            async with asyncio.timeout(self._write_s):  # wait_for would start a task for every token
                await send(message)

        try:
            body = await self._body(scope, receive)
        except _Refused as refused:
            await _answer(send_in_time, refused)
            return
        if body is None:
            return
        given = False

        async def receive_body() -> Message:
            nonlocal given
            if given:
                return await receive()  # the client's leaving
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        try:
            await self._app(scope, receive_body, send_in_time)
        except TimeoutError:
            if not started:
                raise
            # The client does not read: the connection is closed by returning early.

    async def _body(self, scope: Message, receive: Receive) -> bytes | None:
        """The whole body; None if the client has gone. Raises _Refused."""
        said = dict(scope["headers"]).get(b"content-length", b"0")
        if said.isdigit() and int(said) > self._body_bytes:
            raise _Refused(413, self._too_long())
        parts, size, more = [], 0, True
        deadline = asyncio.get_running_loop().time() + self._read_s
        while more:
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise _Refused(408, f"the body did not arrive within {self._read_s:g} s") from None
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._body_bytes:
                raise _Refused(413, self._too_long())
            more = message.get("more_body", False)
        return b"".join(parts)

    def _too_long(self) -> str:
        return f"the body is longer than {self._body_bytes} bytes: send a shorter prompt"


async def _answer(send: Send, refused: _Refused) -> None:
    body = orjson.dumps(error_body(str(refused), "invalid_request_error"))
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
