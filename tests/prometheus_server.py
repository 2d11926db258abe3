"""Prometheus itself, scraping what a test starts."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import httpx
import pytest

_START_S = 60

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="Prometheus is not installed: apt-get install prometheus"
)


needs_alertmanager = pytest.mark.skipif(
    shutil.which("prometheus-alertmanager") is None,
    reason="Alertmanager is not installed: apt-get install prometheus-alertmanager",
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


def sample(name: str, labels: Mapping[str, str], value: float, time_s: float) -> str:
    told = ",".join(f"{label}={json.dumps(text)}" for label, text in labels.items())
    return f"{name}{{{told}}} {value} {time_s:.3f}"


def store(folder: Path, samples: Iterable[str]) -> Path:
    """A data directory of Prometheus that holds these, and a configuration that scrapes nobody."""
    folder.mkdir()
    text = folder / "samples.txt"
    text.write_text("\n".join([*samples, "# EOF", ""]))
    command = ["promtool", "tsdb", "create-blocks-from", "openmetrics", str(text), str(folder / "data")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    configuration = folder / "prometheus.yml"
    configuration.write_text("{}")
    return configuration


def hasten(folder: Path) -> None:
    """Seconds for minutes."""
    for name, slow, fast in (
        ("prometheus.yml", r"(scrape_interval|evaluation_interval): 15s", r"\1: 1s"),
        ("prometheus.yml", "scrape_timeout: 5s", "scrape_timeout: 1s"),
        ("rules.yml", "for: [12]m", "for: 1s"),
        ("rules.yml", r"\[5m\]", "[10s]"),
        ("alertmanager.yml", "group_wait: 10s", "group_wait: 0s"),
    ):
        text, count = re.subn(slow, fast, (folder / name).read_text())
        assert count
        (folder / name).write_text(text)
