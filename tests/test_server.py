"""The socket that the endpoint listens on."""

from __future__ import annotations

import asyncio
import socket

import pytest

from open_autoglm.errors import UserError
from open_autoglm.serving.server import bind


def test_answers_are_sent_without_delay() -> None:
    """asyncio leaves Nagle's algorithm on if the protocol is not named, which costs 40 ms an answer."""

    async def accepted() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = writer.get_extra_info("socket")
            found.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listener = bind("127.0.0.1", 0)
        async with await asyncio.start_server(greet, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            nodelay = await found
            writer.close()
            return nodelay

    assert asyncio.run(accepted()) != 0


def test_a_taken_port_is_said() -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=str(port)):
            bind("127.0.0.1", port)
