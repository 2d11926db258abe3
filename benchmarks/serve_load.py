"""The load generator: completions asked over HTTP/1.1, timed as a client sees them.

It runs in a process of its own (:func:`run` is a job of :mod:`open_autoglm.measure.isolation`) and shares the
host with the server it asks, so it does as little as it can: sockets, no HTTP library, no JSON of the pieces
on their way. What it cost is part of its answer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import orjson
from pydantic import Field

from open_autoglm.schemas import Model

PREFIX = __name__

_LINE_BYTES = 1 << 20
_KEPT_BYTES = 8192
"""Of an answer's end, where its usage stands."""

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
    answers = asyncio.run(_ask_all(job))
    return Load(
        answers=tuple(answers),
        wall_ms=(time.perf_counter() - begin) * 1e3,
        client_cpu_ms=(time.process_time() - cpu) * 1e3,
    )


async def _ask_all(job: LoadJob) -> list[Answer]:
    clients, begin = _Clients(job.port, job.path), time.perf_counter()
    if job.arrivals_s is None:
        answers = await _closed_loop(clients, job, begin)
    else:
        arrivals = zip(job.bodies, job.arrivals_s, strict=True)
        answers = await asyncio.gather(*(clients.ask_at(body, begin, due) for body, due in arrivals))
    clients.close()
    return answers


async def _closed_loop(clients: _Clients, job: LoadJob, begin: float) -> list[Answer]:
    """``streams`` clients, each of whom asks again as soon as it has its answer."""
    found: dict[int, Answer] = {}

    async def client(waiting: Iterator[tuple[int, str]]) -> None:
        for number, body in waiting:
            found[number] = await clients.ask(body, begin)

    waiting = iter(enumerate(job.bodies))
    await asyncio.gather(*(client(waiting) for _ in range(job.streams)))
    return [found[number] for number in sorted(found)]


class _Clients:
    """Connections to one server, kept open and used again."""

    def __init__(self, port: int, path: str) -> None:
        self._port = port
        self._path = path
        self._idle: list[_Connection] = []

    async def ask_at(self, body: str, begin: float, due_s: float) -> Answer:
        await asyncio.sleep(begin + due_s - time.perf_counter())
        return await self.ask(body, begin)

    async def ask(self, body: str, begin: float) -> Answer:
        asked = time.perf_counter()
        try:
            return await self._ask(body.encode(), begin, asked)
        except (OSError, asyncio.IncompleteReadError) as error:
            told = f"{type(error).__name__}: {error}"
            return Answer(status=LOST, begin_ms=(asked - begin) * 1e3, error=told)

    async def _ask(self, body: bytes, begin: float, asked: float) -> Answer:
        """Over an idle connection if there is one; a server may have closed that without saying so."""
        while self._idle:
            connection = self._idle.pop()
            if connection.open:
                with suppress(Unused):
                    return await self._over(connection, body, begin, asked)
        return await self._over(await _Connection.to(self._port), body, begin, asked)

    async def _over(self, connection: _Connection, body: bytes, begin: float, asked: float) -> Answer:
        answer = await connection.ask(self._path, body, begin, asked)
        if connection.open:
            self._idle.append(connection)
        return answer

    def close(self) -> None:
        for connection in self._idle:
            connection.close()


class Unused(OSError):
    """The connection was closed before a byte of an answer came: the request may be sent again."""


class _Connection:
    """One connection: a request, its answer, the next request (RFC 9112)."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._last = False

    @property
    def open(self) -> bool:
        """Whether another request may be sent, as far as is known."""
        return not (self._last or self._reader.at_eof())

    @classmethod
    async def to(cls, port: int) -> _Connection:
        return cls(*await asyncio.open_connection("127.0.0.1", port, limit=_LINE_BYTES))

    def close(self) -> None:
        self._writer.close()

    async def ask(self, path: str, body: bytes, begin: float, asked: float) -> Answer:
        """The answer. Raises OSError, Unused or IncompleteReadError if the connection breaks."""
        self._writer.write(
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        status, headers = await self._head()
        first, last, content = 0.0, 0.0, b""
        async for part in self._parts(headers):
            last = time.perf_counter()
            first = first or last
            content = content[-_KEPT_BYTES:] + part
        self._last = headers.get("connection", "").lower() == "close"
        if self._last:
            self.close()
        times = {"begin_ms": (asked - begin) * 1e3, "ttft_ms": (first - asked) * 1e3}
        return Answer(status=status, e2e_ms=(last - asked) * 1e3, **times, **_told(status, content))

    async def _head(self) -> tuple[int, dict[str, str]]:
        try:
            head = await self._reader.readuntil(b"\r\n\r\n")
        except (ConnectionError, asyncio.IncompleteReadError) as error:
            raise Unused(f"closed without an answer: {error}") from error
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines if ": " in line)
        return int(first.split()[1]), {name.lower(): value for name, value in headers.items()}

    async def _parts(self, headers: Mapping[str, str]) -> Any:
        """The body as it comes."""
        if headers.get("transfer-encoding", "").lower() != "chunked":
            yield await self._reader.readexactly(int(headers.get("content-length", "0")))
            return
        while size := int(await self._reader.readuntil(b"\r\n"), 16):
            yield (await self._reader.readexactly(size + 2))[:-2]
        await self._reader.readuntil(b"\r\n")


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
