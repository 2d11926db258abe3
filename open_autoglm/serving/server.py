"""From a bundle to a running server, and to its end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import logging
import os
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from prometheus_client import disable_created_metrics

from open_autoglm.errors import UserError
from open_autoglm.schemas import Model, Slo
from open_autoglm.serving.access import Access, AccessOptions, known_hosts
from open_autoglm.serving.api import create_app
from open_autoglm.serving.asgi import App
from open_autoglm.serving.connection import Patience, connection_class
from open_autoglm.serving.engine import EngineLost
from open_autoglm.serving.fleet import Fleet, Launcher
from open_autoglm.serving.follow import Follower
from open_autoglm.serving.judge import Policy
from open_autoglm.serving.keys import LOCAL_ADMIN, Key, digest_of_key, new_secret
from open_autoglm.serving.limits import Limits
from open_autoglm.serving.local import LocalEndpoint, announced
from open_autoglm.serving.logs import Logged, LogOptions, start_log
from open_autoglm.serving.messages import EngineOptions
from open_autoglm.serving.metrics import Board
from open_autoglm.serving.pace import keep_pace
from open_autoglm.serving.service import ServiceOptions
from open_autoglm.serving.source import Source, cache_of, connect
from open_autoglm.serving.tls import TlsOptions, tls_context
from open_autoglm.settings import Settings

_LOGGER = logging.getLogger(__name__)

_BODY_BYTES = 4 << 20
_BODIES_BYTES = 256 << 20
_DRAIN_S = 60


class ServerOptions(Model):
    """Where the server listens, what it serves, and to whom."""

    host: str
    port: int
    name: str
    source: Source
    follow: bool = False
    """Go where the aliases of the source's registered model go."""
    engine: EngineOptions
    service: ServiceOptions
    slo: Slo = Slo()
    access: AccessOptions = AccessOptions()
    patience: Patience = Patience()
    tls: TlsOptions | None = None
    log: LogOptions = LogOptions()
    engine_log: Path
    home: Path
    """Under which commands on this machine find the server."""


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, before anything is loaded. Raises UserError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where the protocol is named; with it every answer but the first
    # of a connection waits 40 ms for the caller's delayed acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from error
    return listener


async def serve(
    options: ServerOptions,
    listener: socket.socket,
    tls: ssl.SSLContext | None,
    ready: Callable[[str], None],
) -> None:
    """Serve until SIGTERM or SIGINT; answers under way are finished first, for up to a minute.

    ``ready`` is called with the URL once requests are answered. Raises UserError, EngineLost.
    """
    launcher = Launcher(options.name, options.engine, options.service, options.engine_log)
    champion = await launcher.launch(options.source)
    fleet = Fleet(launcher, Board(options.name, options.slo), champion, policy=_policy(options.slo))
    follower = _follower(options.source, fleet, Settings()) if options.follow else None
    if follower is not None:
        fleet.on_verdict = follower.verdict

    def warning() -> str:
        return follower.warning if follower else options.source.warning

    token = new_secret()
    config = uvicorn.Config(
        _guarded(options, create_app(fleet, warning), fleet, listener, token),
        http=connection_class(options.patience),
        timeout_keep_alive=options.patience.idle_s,
        ws="none",
        proxy_headers=False,  # anybody could say anything
        ssl_context_factory=None if tls is None else lambda _config, _default: tls,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=_DRAIN_S,
        server_header=False,
    )
    url = _url(listener, tls)
    server = _Server(config, lambda: ready(url))
    here = LocalEndpoint(
        url=_url(listener, tls, local=True),
        pid=os.getpid(),
        token=token,
        certificate=options.tls.certificate.absolute() if options.tls else None,
    )
    try:
        # Elsewhere than on loopback, /metrics asks for a key that Prometheus has to be given by hand.
        scraped = _on_loopback(listener) or not options.access.keys
        with announced(options.home, listener.getsockname()[1], here, scraped=scraped):
            async with (
                _running(fleet.history.run(), "its history is not kept any more"),
                _running(keep_pace(fleet), "the host's pace is not timed any more"),
                _running(follower.run() if follower else None, "the registry is not followed any more"),
            ):
                await server.serve(sockets=[listener])
    finally:
        await fleet.close()


def _policy(slo: Slo) -> Policy:
    """A challenger is held to what is promised of this endpoint."""
    return Policy(slo_ttft_ms=slo.ttft_p95_ms, slo_e2e_ms=slo.e2e_p95_ms)


def _follower(source: Source, fleet: Fleet, settings: Settings) -> Follower:
    return Follower(
        fleet,
        source.model,
        lambda: connect(settings),
        home=settings.home,
        cache=cache_of(settings),
        every_s=settings.follow_s,
        warning=source.warning,
    )


@contextlib.asynccontextmanager
async def _running(work: Coroutine[Any, Any, None] | None, without: str) -> AsyncIterator[None]:
    """Let it work for the length of the block; a bug in it ends that and not the serving.

    ``without``: what is said then.
    """
    if work is None:
        yield
        return
    task = asyncio.create_task(work)
    task.add_done_callback(partial(_tell_why, without))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([task])


def _tell_why(without: str, task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _LOGGER.error(without, exc_info=error)


def _guarded(options: ServerOptions, app: App, fleet: Fleet, listener: socket.socket, token: str) -> App:
    """The application behind everything that keeps it from harm; the log sees it all."""
    loopback = _on_loopback(listener)
    limited = Limits(app, body_bytes=_BODY_BYTES, bodies_bytes=_BODIES_BYTES, read_s=options.patience.body_s)
    access = Access(
        limited,
        options.access,
        admin=Key(name=LOCAL_ADMIN, digest=digest_of_key(token), admin=True),
        hosts=known_hosts(options.host, options.access.hosts, loopback=loopback),
        loopback=loopback,
        refused=lambda reason: fleet.champion.metrics.refused(reason),
    )
    return Logged(access, prompts=options.log.prompts)


class _Server(uvicorn.Server):
    """Says when it listens, and ends with exit code 0 when it is asked to end."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        gc.freeze()  # what is loaded stays: to look through it for garbage would stop all answers
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


def _on_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def _url(listener: socket.socket, tls: ssl.SSLContext | None, *, local: bool = False) -> str:
    """``local``: as this machine itself reaches it, though it may listen on every address."""
    host, port = listener.getsockname()[:2]
    if local and ipaddress.ip_address(host).is_unspecified:
        host = "::1" if ":" in host else "127.0.0.1"
    scheme = "http" if tls is None else "https"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def run(options: ServerOptions, ready: Callable[[str], None]) -> None:
    """`serve` in an event loop of its own. Raises UserError."""
    disable_created_metrics()  # type: ignore[no-untyped-call]  # twice the series, read by no dashboard
    tls = None if options.tls is None else tls_context(options.tls)
    listener = bind(options.host, options.port)
    try:
        if not (options.access.keys or options.access.exposed or _on_loopback(listener)):
            raise UserError(
                f"anybody who reaches {options.host} could use this server: give it keys (--keys FILE, or "
                "AUTOGLM_API_KEYS), or say that this is meant with --no-keys"
            )
        start_log(options.log)
        asyncio.run(serve(options, listener, tls, ready))
    except EngineLost as error:
        raise UserError(str(error)) from error
    finally:
        listener.close()
