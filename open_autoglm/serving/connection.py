"""What a connection may leave undone, and for how long: below ASGI, where headers are still bytes.

uvicorn closes a connection that idles after an answer, but has no limit for one that never finishes its
headers ("Slowloris"), nor for one that does not read its answer; an ASGI application never sees the first,
and the second only as a ``send`` that does not return.
"""

from __future__ import annotations

import asyncio
import json
import logging
import resource

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from open_autoglm.schemas import Model
from open_autoglm.serving.openai_answers import error_body

_RESERVED_FILES = 64
"""For the model's files, the engine's socket, logs: what is no connection."""

_log = logging.getLogger(__name__)


class Patience(Model):
    """How many connections there may be, and how long a client may take for its part of one."""

    connections: int = 4096
    head_s: float = 10
    """From the connection, or from the end of the last answer, to the end of a request's headers."""
    body_s: float = 15
    write_s: float = 30
    """To take what has been written."""


class Gathered(asyncio.Transport):
    """A transport whose writes of one turn of the event loop leave together.

    An answer's head and its first event, or its last event, its usage and its end, are messages of their own
    in ASGI; each would be a packet, whose sending takes the kernel longer than its making took us.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._transport = transport
        self._loop = loop
        self._held: list[bytes] = []

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self._held:
            self._loop.call_soon(self._let_go)
        self._held.append(bytes(data))

    def _let_go(self) -> None:
        if self._held:
            held, self._held = b"".join(self._held), []
            self._transport.write(held)

    def close(self) -> None:
        self._let_go()
        self._transport.close()

    def abort(self) -> None:
        self._held.clear()
        self._transport.abort()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()

    def get_extra_info(self, name: str, default: object = None) -> object:
        return self._transport.get_extra_info(name, default)


class Connection(H11Protocol):
    """uvicorn's, which closes on whoever keeps it waiting."""

    patience = Patience()
    _head: asyncio.TimerHandle | None = None
    _stuck: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(Gathered(transport, self.loop))
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

    # ── headers ──────────────────────────────────────────────────────────────────────────────────

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.busy:
            self._cancel_head()

    def on_response_complete(self) -> None:
        self._await_head()
        super().on_response_complete()  # takes up a request that had arrived already
        if self.busy:
            self._cancel_head()

    @property
    def busy(self) -> bool:
        """A request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def _await_head(self) -> None:
        self._cancel_head()
        self._head = self.loop.call_later(self.patience.head_s, self.transport.abort)

    def _cancel_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def send_400_response(self, msg: str) -> None:
        """To what is not HTTP; in OpenAI's shape, as every other error, unless an answer is out already."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        body = json.dumps(error_body(msg, "invalid_request_error")).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
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
