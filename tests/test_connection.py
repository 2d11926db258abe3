from __future__ import annotations

import asyncio
from collections.abc import Callable

from open_autoglm.serving.connection import Gathered


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


def after(act: Callable[[Gathered], None]) -> Recorded:
    """What a transport has got one turn of the loop after ``act``."""
    below = Recorded()

    async def run() -> None:
        act(Gathered(below, asyncio.get_running_loop()))
        await asyncio.sleep(0)

    asyncio.run(run())
    return below


def test_writes_of_one_turn_leave_together() -> None:
    def act(gathered: Gathered) -> None:
        gathered.write(b"head ")
        gathered.write(b"event")

    assert after(act).written == [b"head event"]


def test_writes_of_two_turns_leave_apart() -> None:
    below = Recorded()

    async def run() -> None:
        gathered = Gathered(below, asyncio.get_running_loop())
        for word in (b"one", b"two"):
            gathered.write(word)
            await asyncio.sleep(0)

    asyncio.run(run())
    assert below.written == [b"one", b"two"]


def test_closing_sends_what_was_written_and_nothing_twice() -> None:
    def act(gathered: Gathered) -> None:
        gathered.write(b"last words")
        gathered.close()

    below = after(act)
    assert below.written == [b"last words"]
    assert below.ended == "closed"


def test_aborting_sends_nothing() -> None:
    def act(gathered: Gathered) -> None:
        gathered.write(b"never")
        gathered.abort()

    below = after(act)
    assert below.written == []
    assert below.ended == "aborted"
