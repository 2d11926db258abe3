from __future__ import annotations

import asyncio
from collections.abc import Callable

from open_autoglm.serving.connection import WithHead


class Recorded(asyncio.Transport):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.ended = ""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written.append(bytes(data))

    def close(self) -> None:
        self.ended = "closed"

    def abort(self) -> None:
        self.ended = "aborted"


def after(act: Callable[[WithHead], None]) -> Recorded:
    """What a transport has got one turn of the loop after ``act``."""
    below = Recorded()

    async def run() -> None:
        act(WithHead(below, asyncio.get_running_loop()))
        await asyncio.sleep(0)

    asyncio.run(run())
    return below


HEAD = b"HTTP/1.1 200 OK\r\n\r\n"


def test_a_head_leaves_with_the_beginning_of_its_body() -> None:
    def act(transport: WithHead) -> None:
        for data in (HEAD, b"first", b"second"):
            transport.write(data)

    assert after(act).written == [HEAD + b"first", b"second"]


def test_a_head_without_a_body_does_not_wait_for_ever() -> None:
    assert after(lambda transport: transport.write(HEAD)).written == [HEAD]


def test_two_answers_keep_their_order() -> None:
    def act(transport: WithHead) -> None:
        transport.write(HEAD)
        transport.write(HEAD + b"the next one's")

    assert after(act).written == [HEAD + HEAD + b"the next one's"]


def test_closing_sends_the_head() -> None:
    def act(transport: WithHead) -> None:
        transport.write(HEAD)
        transport.close()

    below = after(act)
    assert below.written == [HEAD]
    assert below.ended == "closed"


def test_aborting_sends_nothing() -> None:
    def act(transport: WithHead) -> None:
        transport.write(HEAD)
        transport.abort()

    below = after(act)
    assert below.written == []
    assert below.ended == "aborted"
