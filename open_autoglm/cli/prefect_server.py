"""Where a flow run from the command line reports to: the address in the environment, the local stack
if it is up, or else a Prefect server that lives as long as the command."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from open_autoglm.errors import UserError
from open_autoglm.measure.child import die_with
from open_autoglm.settings import Settings

STARTUP_TIMEOUT_S = 120.0
NICENESS = 10


def is_up(url: str) -> bool:
    """Whether a server answers at ``url``; asks once and waits at most a second."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=1):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


@contextmanager
def prefect_server(settings: Settings) -> Iterator[None]:
    """Set Prefect's environment and see to a server. Must be entered before Prefect is imported."""
    defaults = {
        "PREFECT_HOME": str(settings.home / "prefect"),
        "PREFECT_LOGGING_LEVEL": "WARNING",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "open_autoglm.progress",
        # What ends a run is raised here too; its traceback need not be printed three times.
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "true",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    home = Path(os.environ["PREFECT_HOME"])
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to {home} ({error.strerror}): set AUTOGLM_HOME to a directory of yours"
        ) from None
    if "PREFECT_API_URL" in os.environ:
        yield
    elif is_up(f"{settings.prefect_url}/api"):
        os.environ["PREFECT_API_URL"] = f"{settings.prefect_url}/api"
        yield
    else:
        with _own_server(settings.home / "logs" / "prefect.log") as url:
            os.environ["PREFECT_API_URL"] = url
            yield


@contextmanager
def _own_server(log: Path) -> Iterator[str]:
    """A server on a free port of loopback; its address.

    Prefect would start one by itself, but that one outlives a command that is killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        application = "prefect.server.api.server:create_app"
        address = ["--host", "127.0.0.1", "--port", str(port)]
        server = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "--factory", application, *address, "--log-level", "warning"],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            preexec_fn=partial(_begin_server, os.getpid()),
            start_new_session=True,  # an interrupt is for the command, which then ends the server
        )
    try:
        _wait_until_up(url, server, log)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(timeout=10)
        except subprocess.TimeoutExpired:
            server.kill()


def _begin_server(parent: int) -> None:
    """Before the server begins: it ends with us, and gives way to a round that is being timed."""
    die_with(parent)
    os.nice(NICENESS)


def _wait_until_up(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    """The first start creates the database, which takes half a minute on a slow machine."""
    end = time.monotonic() + STARTUP_TIMEOUT_S
    while not is_up(url):
        if server.poll() is not None or time.monotonic() > end:
            raise UserError(f"Prefect's server did not start: {log} says why")
        time.sleep(0.2)
