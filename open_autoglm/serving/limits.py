"""Limits on the bodies that a client may send: an ASGI middleware."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from open_autoglm.serving.asgi import App, Message, Receive, Refused, Send, refuse

_CLOSE = (b"connection", b"close")
"""What is left of the body is not waited for."""


_RETRY = (b"retry-after", b"1")


@dataclass
class _Held:
    """Bytes of one body that are in memory."""

    bytes: int = 0


class Limits:
    """Refuses bodies that are too long (413), too slow (408), or too many at a time (503)."""

    def __init__(self, app: App, *, body_bytes: int, bodies_bytes: int, read_s: float) -> None:
        """``bodies_bytes`` is how much all of them together may have, until they are answered."""
        self._app = app
        self._body_bytes = body_bytes
        self._read_s = read_s
        self._left_bytes = bodies_bytes

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        held = _Held()
        try:
            body = await self._body(scope, receive, held)
            if body is not None:
                await self._pass_on(body, scope, receive, send)
        except Refused as refused:
            await refuse(send, refused)
        finally:
            self._left_bytes += held.bytes

    async def _pass_on(self, body: bytes, scope: Message, receive: Receive, send: Send) -> None:
        given = False

        async def receive_body() -> Message:
            nonlocal given
            if given:
                return await receive()  # the client's leaving
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, receive_body, send)

    async def _body(self, scope: Message, receive: Receive, held: _Held) -> bytes | None:
        """The whole body; None if the client has gone. Raises Refused."""
        said = dict(scope["headers"]).get(b"content-length", b"0")
        if said.isdigit() and int(said) > self._body_bytes:
            raise self._too_long()
        parts, more = [], True
        deadline = asyncio.get_running_loop().time() + self._read_s
        while more:
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise Refused(
                    408, f"the body did not arrive within {self._read_s:g} s", headers=[_CLOSE]
                ) from None
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            self._hold(len(parts[-1]), held)
            more = message.get("more_body", False)
        return b"".join(parts)

    def _hold(self, more_bytes: int, held: _Held) -> None:
        """Raises Refused."""
        held.bytes += more_bytes
        self._left_bytes -= more_bytes
        if held.bytes > self._body_bytes:
            raise self._too_long()
        if self._left_bytes < 0:
            told = "too many long requests are being read or answered: send this one again"
            raise Refused(503, told, "overloaded_error", code="bodies", headers=[_CLOSE, _RETRY])

    def _too_long(self) -> Refused:
        return Refused(
            413,
            f"the body is longer than {self._body_bytes} bytes: send a shorter prompt",
            headers=[_CLOSE],
        )
