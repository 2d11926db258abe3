"""``open-autoglm serve`` that waits for nobody: clients have a second or two for each of their parts, and
what they do not read is noticed soon."""

from __future__ import annotations

import socket
from collections.abc import Callable

from open_autoglm.cli import main, serve
from open_autoglm.serving import server
from open_autoglm.serving.connection import Patience

PATIENCE = Patience(connections=1000, idle_s=5, head_s=2, body_s=1, write_s=2)
_UNREAD_BYTES = 1 << 14
"""That the kernel keeps for a client; connections have it from the socket they come in by."""


def run(options: server.ServerOptions, ready: Callable[[str], None]) -> None:
    server.run(options.model_copy(update={"patience": PATIENCE}), ready)


def bind(host: str, port: int) -> socket.socket:
    listener = _bind(host, port)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNREAD_BYTES)
    return listener


if __name__ == "__main__":
    _bind, server.bind, serve.run = server.bind, bind, run
    main()
