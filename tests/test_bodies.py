"""How much of what clients send is kept in memory."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest

from open_autoglm.serving.asgi import Message
from open_autoglm.serving.limits import Limits


class Answering:
    """An application that answers when it is told to, with the number of bytes that it was sent."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.app = Limits(self._answer, body_bytes=100, bodies_bytes=250, read_s=5)

    async def _answer(self, _scope: Message, receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        await self.go_on.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(len(body)).encode()})

    async def ask(self, *parts: bytes) -> tuple[int, bytes]:
        """Status and body of the answer to a body that comes in these parts."""
        left = [
            {"type": "http.request", "body": part, "more_body": number < len(parts)}
            for number, part in enumerate(parts, 1)
        ]
        sent: list[Any] = []

        async def receive() -> Any:
            await asyncio.sleep(0)
            return left.pop(0)

        async def send(message: Any) -> None:
            sent.append(message)

        await self.app({"type": "http", "headers": []}, receive, send)
        return sent[0]["status"], sent[1]["body"]


async def _all(bodies: Sequence[bytes]) -> list[tuple[int, bytes]]:
    answering = Answering()
    asked = [asyncio.create_task(answering.ask(body)) for body in bodies]
    while len(refused := [task for task in asked if task.done()]) < len(bodies) - 2:
        await asyncio.sleep(0)
    answering.go_on.set()
    found = await asyncio.gather(*asked)
    assert all(task.result()[0] == 503 for task in refused)
    return [*found, await answering.ask(b"x" * 100)]


def test_bodies_share_the_memory_for_them() -> None:
    """Two of three find room until they are answered, and then there is room again."""
    first, second, third, after = asyncio.run(_all([b"x" * 100] * 3))
    assert first == second == after == (200, b"100")
    assert third[0] == 503
    assert json.loads(third[1])["error"]["code"] == "bodies"


@pytest.mark.parametrize(("parts", "status"), [((b"x" * 60, b"x" * 40), 200), ((b"x" * 60, b"x" * 41), 413)])
def test_a_body_is_counted_over_its_parts(parts: tuple[bytes, ...], status: int) -> None:
    """And what was refused is not counted any more."""

    async def ask() -> list[int]:
        answering = Answering()
        answering.go_on.set()
        return [(await answering.ask(*parts))[0] for _ in range(5)]

    assert asyncio.run(ask()) == [status] * 5
