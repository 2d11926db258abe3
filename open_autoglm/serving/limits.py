"""Limits on the bodies that a client may send: an ASGI middleware."""

from __future__ import annotations

import asyncio

from open_autoglm.serving.asgi import App, Message, Receive, Refused, Send, refuse, state_of

_CLOSE = ((b"connection", b"close"),)
"""What is left of the body is not waited for."""


class Limits:
    """Refuses bodies that are too long (413) or too slow (408)."""

    def __init__(self, app: App, *, body_bytes: int, read_s: float) -> None:
        self._app = app
        self._body_bytes = body_bytes
        self._read_s = read_s

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            body = await self._body(scope, receive)
        except Refused as refused:
            await refuse(send, refused)
            return
        if body is None:
            return
        state_of(scope)["body_bytes"] = len(body)
        given = False

        async def receive_body() -> Message:
            nonlocal given
            if given:
                return await receive()  # the client's leaving
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, receive_body, send)

    async def _body(self, scope: Message, receive: Receive) -> bytes | None:
        """The whole body; None if the client has gone. Raises Refused."""
        said = dict(scope["headers"]).get(b"content-length", b"0")
        if said.isdigit() and int(said) > self._body_bytes:
            raise self._too_long()
        parts, size, more = [], 0, True
        deadline = asyncio.get_running_loop().time() + self._read_s
        while more:
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise Refused(
                    408, f"the body did not arrive within {self._read_s:g} s", headers=_CLOSE
                ) from None
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._body_bytes:
                raise self._too_long()
            more = message.get("more_body", False)
        return b"".join(parts)

    def _too_long(self) -> Refused:
        return Refused(
            413,
            f"the body is longer than {self._body_bytes} bytes: send a shorter prompt",
            headers=_CLOSE,
        )
