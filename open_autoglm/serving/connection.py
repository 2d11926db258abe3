"""What a connection may leave undone, and for how long: below ASGI, where headers are still bytes.

uvicorn closes a connection that idles after an answer, but has no limit for one that never finishes its
headers ("Slowloris"), nor for one that does not read its answer; an ASGI application never sees the first,
and the second only as a ``send`` that does not return.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import resource
from functools import partial
from typing import Any

from uvicorn._types import ASGI3Application, ASGIReceiveCallable, ASGISendCallable
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from open_autoglm.schemas import Model
from open_autoglm.serving.openai_answers import error_body

_RESERVED_FILES = 64
"""For the model's files, the engine's socket, logs: what is no connection."""

_MOST_BESIDES_BYTES = 1 << 16

_OFFER = re.compile(rb"(\n)upgrade(?=[ \t]*:)", re.IGNORECASE)

_log = logging.getLogger(__name__)


class Patience(Model):
    """How many connections there may be, and how long a client may take for its part of one."""

    connections: int = 4096
    idle_s: int = 120
    """Between an answer's end and the next request. Longer than clients and proxies keep one (Go 90 s,
    AWS and nginx 60 s): a request that is on its way when this side closes would be lost."""
    head_s: float = 10
    """From the connection, or from the first byte of a later request, to the end of its headers."""
    body_s: float = 15
    write_s: float = 30
    """To take what has been written."""


class WithHead(asyncio.Transport):
    """A transport where an answer's head waits for the beginning of its body.

    Both are known at once, but are messages of their own in ASGI. In packets of their own, the first token
    would leave later by what it takes the kernel to deliver the head.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._transport = transport
        self._loop = loop
        self._head = b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self._head and data[:5] == b"HTTP/":
            self._head = bytes(data)
            self._loop.call_soon(self._let_go)  # there may be no body
            return
        head, self._head = self._head, b""
        self._transport.write(head + data if head else data)

    def _let_go(self) -> None:
        if self._head:
            self.write(b"")

    def close(self) -> None:
        self._let_go()
        self._transport.close()

    def abort(self) -> None:
        self._head = b""
        self._transport.abort()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()

    def get_extra_info(self, name: str, default: object = None) -> object:
        return self._transport.get_extra_info(name, default)


class Connection(HttpToolsProtocol):
    """uvicorn's, which closes on whoever keeps it waiting or sends it more than it can use."""

    patience = Patience()
    _head: asyncio.TimerHandle | None = None
    _stuck: asyncio.TimerHandle | None = None
    _besides_bytes = 0
    """Of the request that is being read, what is not its body."""
    _packet_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(WithHead(transport, self.loop))
        # So low that `pause_writing` says at once that the client does not read. Not 0: asyncio's TLS pauses
        # when a mark is reached, plain sockets only when it is passed.
        transport.set_write_buffer_limits(high=1)
        if len(self.connections) > self.patience.connections:
            self._make_room()
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_head()
        self._cancel_stuck()
        super().connection_lost(exc)

    # ── requests ─────────────────────────────────────────────────────────────────────────────────

    def data_received(self, data: bytes) -> None:
        in_body = self.cycle is not None and self.cycle.more_body
        if not in_body:
            data = _without_offers(data)
            if not self.busy and self._head is None:
                self._await_head()
        self._packet_bytes = len(data)
        self._besides_bytes += len(data)
        super().data_received(data)
        if self.busy:
            self._cancel_head()
        elif self._head is None and self.timeout_keep_alive_task is None:
            # The rest of a body that was answered already, which uvicorn took for another request's begin.
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )
        if self._besides_bytes > _MOST_BESIDES_BYTES and not self.transport.is_closing():
            self.send_400_response("what surrounds the body is too long")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._besides_bytes = self._packet_bytes

    def on_headers_complete(self) -> None:
        """Raises ValueError, which becomes the answer 400, where it is not said or said twice who is asked
        (RFC 9112, section 3.2)."""
        hosts = sum(name == b"host" for name, _ in self.headers)
        if hosts > 1 or (hosts == 0 and self.parser.get_http_version() != "1.0"):
            raise ValueError(f"{hosts} Host headers")
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._besides_bytes = max(0, self._besides_bytes - len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self.cycle.more_body = False  # uvicorn forgets that where the answer came first
        self._packet_bytes = 0  # or some of them, which are the next request's

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        if cycle.scope["http_version"] == "1.0":
            cycle.chunked_encoding = False
            app = partial(_ended_by_closing, cycle, app)
        super()._start_asgi_task(cycle, app)

    @property
    def busy(self) -> bool:
        """A request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def _await_head(self) -> None:
        self._head = self.loop.call_later(self.patience.head_s, self.transport.abort)

    def _cancel_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def send_400_response(self, msg: str) -> None:
        """To what is not HTTP; in OpenAI's shape, as every other error. What came before is answered first.

        Not so one whose own body it is: that has an answer already, or gets this one.
        """
        if self.busy and not self.cycle.more_body:
            self.cycle.keep_alive = False
            return
        if self.busy and (self.pipeline or self.cycle.response_started):
            self.transport.abort()
            return
        body = json.dumps(error_body(msg, "invalid_request_error")).encode()
        self.transport.write(
            b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body) + body
        )
        self.transport.close()

    # ── answers ──────────────────────────────────────────────────────────────────────────────────

    def pause_writing(self) -> None:
        super().pause_writing()
        self._cancel_stuck()
        self._stuck = self.loop.call_later(self.patience.write_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel_stuck()

    def _cancel_stuck(self) -> None:
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None

    # ── how many ─────────────────────────────────────────────────────────────────────────────────

    def _make_room(self) -> None:
        """End a connection that is not being answered: this one, if all others are."""
        others = (c for c in self.connections if isinstance(c, Connection) and c is not self and not c.busy)
        next(others, self).transport.abort()


def _without_offers(data: bytes) -> bytes:
    """A request whose client would rather speak something newer, as Java's does, without the word: it is
    not taken up (RFC 9110, section 7.8), but httptools would take the body for the beginning of the new."""
    end = data.find(b"\r\n\r\n")
    if _OFFER.search(data, 0, end) is None:
        return data
    return _OFFER.sub(b"\\1not-taken", data[:end]) + data[end:]


async def _ended_by_closing(
    cycle: RequestResponseCycle,
    app: ASGI3Application,
    scope: Any,
    receive: ASGIReceiveCallable,
    send: ASGISendCallable,
) -> None:
    """HTTP/1.0 knows no chunks: a body goes on to the end of the connection (RFC 9112, section 6.3), which
    uvicorn takes for one whose length is right."""

    async def send_plain(message: Any) -> None:
        if message["type"] == "http.response.body":
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    await app(scope, receive, send_plain)


def connection_class(patience: Patience) -> type[Connection]:
    """The protocol for a server, with as many connections as it may open files."""
    most = min(patience.connections, _files(patience.connections + _RESERVED_FILES) - _RESERVED_FILES)
    if most < patience.connections:
        _log.warning("at most %d connections at a time: raise the limit on open files (ulimit -n)", most)
    kept = patience.model_copy(update={"connections": most})
    return type("Connection", (Connection,), {"patience": kept})


def _files(wanted: int) -> int:
    """How many files this process may open, after asking for ``wanted``."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return allowed
