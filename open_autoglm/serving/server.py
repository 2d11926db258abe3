"""From a bundle to a running server, and to its end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn
from prometheus_client import disable_created_metrics

from open_autoglm.errors import UserError
from open_autoglm.schemas import Model
from open_autoglm.serving.api import create_app
from open_autoglm.serving.engine import EngineLost
from open_autoglm.serving.limits import Limits
from open_autoglm.serving.messages import EngineOptions
from open_autoglm.serving.metrics import Metrics
from open_autoglm.serving.service import ServiceOptions, start_service

_BODY_BYTES = 4 << 20
_READ_S, _WRITE_S = 15.0, 30.0
_DRAIN_S = 60


class ServerOptions(Model):
    """Where the server listens and what it serves."""

    host: str
    port: int
    name: str
    version: str = ""
    digest: str
    engine: EngineOptions
    service: ServiceOptions
    log: Path
    warning: str = ""
    """Of the source, told by ``/readyz``."""


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, before anything is loaded. Raises UserError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from error
    return listener


async def serve(options: ServerOptions, listener: socket.socket, ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; answers under way are finished first, for up to a minute.

    ``ready`` is called with the URL once requests are answered. Raises UserError, EngineLost.
    """
    metrics = Metrics(options.name, options.digest, version=options.version)
    service = await start_service(
        options.name, options.engine.bundle, options.engine, options.service, metrics, options.log
    )
    app = Limits(
        create_app(service, lambda: options.warning), body_bytes=_BODY_BYTES, read_s=_READ_S, write_s=_WRITE_S
    )
    config = uvicorn.Config(
        app, log_config=None, access_log=False, timeout_graceful_shutdown=_DRAIN_S, server_header=False
    )
    server = _Server(config, lambda: ready(_url(listener)))
    try:
        await server.serve(sockets=[listener])
    finally:
        await service.engine.close()


class _Server(uvicorn.Server):
    """Says when it listens, and ends with exit code 0 when it is asked to end."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self._ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As in the base class, which would raise the signal again when all is done."""
        loop = asyncio.get_running_loop()
        for sign in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sign, self.handle_exit, sign, None)
        yield
        for sign in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(sign)


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(options: ServerOptions, ready: Callable[[str], None]) -> None:
    """`serve` in an event loop of its own. Raises UserError."""
    disable_created_metrics()  # type: ignore[no-untyped-call]  # twice the series, read by no dashboard
    listener = bind(options.host, options.port)
    try:
        asyncio.run(serve(options, listener, ready))
    except EngineLost as error:
        raise UserError(str(error)) from error
    finally:
        listener.close()
