"""The load generator: completions asked over HTTP/1.1, timed as a client sees them.

It runs in a process of its own (:func:`run` is a job of :mod:`open_autoglm.measure.isolation`) and shares the
host with the server it asks, so it does as little as it can: a thread that waits in the kernel for each
request under way, no HTTP library, no JSON of the pieces on their way. What it cost is part of its answer.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import orjson
from pydantic import Field

from open_autoglm.schemas import Model

PREFIX = __name__

_KEPT_BYTES = 8192
"""Of an answer's end, where its usage stands."""
_MOST_AT_ONCE = 4096
"""Requests under way where they arrive by the clock: more than any server here takes in."""

LOST = 0
"""Status of a request whose connection broke before it was answered."""


class LoadJob(Model):
    """Payload of :func:`run`."""

    port: int
    bodies: tuple[str, ...] = Field(description="JSON of each request, in the order they are asked")
    streams: int = Field(1, ge=1, description="requests under way at a time, where they do not arrive")
    arrivals_s: tuple[float, ...] | None = Field(
        None, description="when each request arrives, whatever became of those before it; None: closed loop"
    )
    path: str = "/v1/completions"


class Answer(Model):
    """What one client saw."""

    status: int
    begin_ms: float = Field(description="since the load began")
    ttft_ms: float = 0.0
    e2e_ms: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str = Field("", description="what the server said instead of an answer")

    @property
    def tpot_ms(self) -> float:
        """Mean time of the tokens after the first."""
        return (self.e2e_ms - self.ttft_ms) / max(1, self.output_tokens - 1)


class Load(Model):
    """Answer of :func:`run`: all answers, in the order of the requests."""

    answers: tuple[Answer, ...]
    wall_ms: float
    client_cpu_ms: float


def run(job: LoadJob) -> Load:
    """Ask all requests and wait for every answer."""
    cpu, begin = time.process_time(), time.perf_counter()
    answers = _ask_all(job)
    return Load(
        answers=tuple(answers),
        wall_ms=(time.perf_counter() - begin) * 1e3,
        client_cpu_ms=(time.process_time() - cpu) * 1e3,
    )


def _ask_all(job: LoadJob) -> list[Answer]:
    begin = time.perf_counter()
    clients = _Clients(job.port, job.path, begin)
    with ThreadPoolExecutor(job.streams if job.arrivals_s is None else _MOST_AT_ONCE) as pool:
        if job.arrivals_s is None:  # whoever has an answer asks what is next
            asked = [pool.submit(clients.ask, body) for body in job.bodies]
        else:
            asked = []
            for body, due_s in zip(job.bodies, job.arrivals_s, strict=True):
                time.sleep(max(0.0, begin + due_s - time.perf_counter()))
                asked.append(pool.submit(clients.ask, body))
        answers = [future.result() for future in asked]
    clients.close()
    return answers


class _Clients:
    """Connections to one server, kept open and used again."""

    def __init__(self, port: int, path: str, begin: float) -> None:
        self._port = port
        self._path = path
        self._begin = begin
        self._idle: list[_Connection] = []

    def ask(self, body: str) -> Answer:
        asked = time.perf_counter()
        try:
            return self._ask(body.encode(), asked)
        except OSError as error:
            told = f"{type(error).__name__}: {error}"
            return Answer(status=LOST, begin_ms=(asked - self._begin) * 1e3, error=told)

    def _ask(self, body: bytes, asked: float) -> Answer:
        """Over an idle connection if there is one; a server may have closed that without saying so."""
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                return self._over(_Connection(self._port), body, asked)
            if connection.open:
                with suppress(Unused):
                    return self._over(connection, body, asked)

    def _over(self, connection: _Connection, body: bytes, asked: float) -> Answer:
        try:
            status, content, first, last = connection.ask(self._path, body)
        except OSError:
            connection.close()
            raise
        if connection.open:
            self._idle.append(connection)
        return Answer(
            status=status,
            begin_ms=(asked - self._begin) * 1e3,
            ttft_ms=(first - asked) * 1e3,
            e2e_ms=(last - asked) * 1e3,
            **_told(status, content),
        )

    def close(self) -> None:
        for connection in self._idle:
            connection.close()


class Unused(OSError):
    """The connection was closed before a byte of an answer came: the request may be sent again."""


class _Connection:
    """One connection: a request, its answer, the next request (RFC 9112)."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._answers = self._socket.makefile("rb")
        self._last = False

    @property
    def open(self) -> bool:
        """Whether another request may be sent, as far as is known."""
        if self._last:
            return False
        with suppress(BlockingIOError):
            self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            self.close()  # it is at its end, or holds what nobody asked for
        return not self._last

    def close(self) -> None:
        self._last = True
        self._answers.close()
        self._socket.close()

    def ask(self, path: str, body: bytes) -> tuple[int, bytes, float, float]:
        """Status, end of the content, and when its first and its last part were here.

        Raises OSError or Unused if the connection breaks.
        """
        self._socket.sendall(
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        status, headers = self._head()
        first, last, content = 0.0, 0.0, b""
        for part in self._parts(headers):
            last = time.perf_counter()
            first = first or last
            content = content[-_KEPT_BYTES:] + part
        if headers.get("connection", "").lower() == "close":
            self.close()
        return status, content, first, last

    def _head(self) -> tuple[int, dict[str, str]]:
        try:
            status = int(self._line().split()[1])
        except ConnectionError as error:
            raise Unused(f"closed without an answer: {error}") from error
        headers = {}
        while line := self._line():
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        return status, headers

    def _parts(self, headers: Mapping[str, str]) -> Iterator[bytes]:
        """The body as it comes."""
        if headers.get("transfer-encoding", "").lower() != "chunked":
            yield self._exactly(int(headers.get("content-length", "0")))
            return
        while size := int(self._line(), 16):
            yield self._exactly(size + 2)[:-2]
        self._line()

    def _line(self) -> bytes:
        line = self._answers.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionError("the connection was closed in the middle of an answer")
        return line[:-2]

    def _exactly(self, size: int) -> bytes:
        found = self._answers.read(size)
        if len(found) < size:
            raise ConnectionError("the connection was closed in the middle of an answer")
        return found


def _told(status: int, content: bytes) -> dict[str, Any]:
    """What an answer's end says: its usage, or why there is none."""
    if status != 200:
        return {"error": content.decode(errors="replace")[:300]}
    for line in reversed(content.split(b"\n")):
        with suppress(orjson.JSONDecodeError):  # [DONE], and an event whose beginning was not kept
            said = orjson.loads(line.removeprefix(b"data: "))
            if error := said.get("error"):
                return {"error": str(error)[:300]}
            if usage := said.get("usage"):
                return {"prompt_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"]}
    return {"error": "the answer says nothing of its tokens"}
