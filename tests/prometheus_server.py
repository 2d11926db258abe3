"""Prometheus itself, scraping what a test starts."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

_START_S = 30

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="Prometheus is not installed: apt-get install prometheus"
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], bool], limit_s: float = _START_S, *, every_s: float = 0.1) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(every_s)


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.TransportError:
        return False


@contextlib.contextmanager
def running(folder: Path, url: str, *command: str) -> Iterator[None]:
    """A server, from when it answers at ``url`` to the end of the block."""
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        wait_for(lambda: answers(url) or process.poll() is not None)
        assert process.poll() is None, (folder / "server.log").read_text()
        yield
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def prometheus(folder: Path, configuration: Path) -> Iterator[str]:
    """Prometheus with that configuration; its address."""
    url = f"http://127.0.0.1:{free_port()}"
    command = (
        "prometheus",
        f"--config.file={configuration}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={url.removeprefix('http://')}",
    )
    with running(folder, f"{url}/-/ready", *command):
        yield url
