"""Servers that are down, slow, wrong or of another time: each is a reason, and soon."""

from __future__ import annotations

import json
import os
import platform
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from open_autoglm.files import write_atomic
from open_autoglm.monitoring import http
from open_autoglm.monitoring.endpoint import LocalEndpoints
from open_autoglm.monitoring.prometheus import Prometheus
from open_autoglm.monitoring.windows import NoWindow, Source, window
from open_autoglm.serving.local import LocalEndpoint, announced

EMPTY = {"status": "success", "data": {"resultType": "matrix", "result": []}}


@contextmanager
def serving(
    body: bytes, *, status: int = 200, behind_s: float = 0, wait_s: float = 0, parts: int = 1
) -> Iterator[str]:
    """A server that says the same to everybody, ``wait_s`` before each part of it."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(parts * len(body)))
            self.end_headers()
            for _ in range(parts):
                time.sleep(wait_s)
                try:
                    self.wfile.write(body)
                except OSError:  # nobody listens any more
                    return

        def date_time_string(self, timestamp: float | None = None) -> str:
            return formatdate((timestamp or time.time()) - behind_s, usegmt=True)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def reason(source: Source) -> str:
    end = datetime.now(UTC)
    found = window(source, "tiny", end - timedelta(minutes=15), end)
    assert isinstance(found, NoWindow)
    assert "\n" not in found.reason
    return found.reason


def encoded(body: Any) -> bytes:
    return json.dumps(body).encode()


WRONG: dict[str, tuple[bytes, dict[str, Any], str]] = {
    "an error": (b'{"error": "out of memory"}', {"status": 503}, "status 503: {"),
    "no JSON": (b"<html>", {}, "answered with something else than samples"),
    "a vector": (encoded({"status": "success", "data": {"resultType": "vector", "result": []}}), {}, "else"),
    "a part": (encoded({**EMPTY, "warnings": ["a store is away"]}), {}, "only in part: a store is away"),
    "another clock": (encoded(EMPTY), {"behind_s": 300}, "s behind ours"),
    "a fast clock": (encoded(EMPTY), {"behind_s": -60}, "s ahead of ours"),
    "silence": (encoded(EMPTY), {"wait_s": 60}, "did not answer in time"),
    "a trickle": (b" ", {"wait_s": 0.2, "parts": 300}, "had not answered after 1 s"),
    "a flood": (b" " * (1 << 20), {"parts": 3}, "more than 1 MiB"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_prometheus_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is told within the limit, so that a look each quarter of an hour never hangs."""
    body, how, told = WRONG[name]
    if "wait_s" in how:
        monkeypatch.setattr(http, "TOTAL_S", 1.0)
    monkeypatch.setattr(http, "_MOST_BYTES", 1 << 20)
    with serving(body, **how) as url:
        began = time.monotonic()
        found = reason(Prometheus(url))
        assert time.monotonic() - began < 20
    assert told in found
    assert found.startswith(("Prometheus at ", "the clock of Prometheus at "))


def test_headers_that_never_end_are_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each letter comes soon after the one before."""
    monkeypatch.setattr(http, "TOTAL_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def trickle() -> None:
            connection, _ = listener.accept()
            with connection, suppress(OSError):
                connection.sendall(b"HTTP/1.1 200 OK\r\nX-Long: ")
                while not ended.wait(0.05):
                    connection.sendall(b"a")

        ended = threading.Event()
        thread = threading.Thread(target=trickle)
        thread.start()
        try:
            found = reason(Prometheus(f"http://127.0.0.1:{listener.getsockname()[1]}"))
        finally:
            ended.set()
            thread.join()
    assert found.endswith("had not answered after 1 s")


def test_a_prometheus_that_is_down_is_told_without_its_password() -> None:
    with serving(b"") as url:
        pass
    found = reason(Prometheus(url.replace("//", "//user:secret@")))
    assert f"Prometheus at {url} does not answer" in found
    assert "secret" not in found


def test_an_endpoint_of_another_time_is_told(tmp_path: Path) -> None:
    history = {"now_s": time.time() + 400, "started_s": 0, "times_s": [], "boot_s": [], "series": []}
    with serving(encoded(history)) as url:
        here = LocalEndpoint(url=url, pid=os.getpid(), token="key")
        with announced(tmp_path, 1234, here):
            found = reason(LocalEndpoints(tmp_path))
    assert found.startswith(f"the clock of the endpoint at {url} is ")
    assert found.endswith(" s ahead of ours")
    assert reason(LocalEndpoints(tmp_path)).startswith("no endpoint runs here")


def test_only_the_endpoint_that_the_watch_names_is_asked(tmp_path: Path) -> None:
    """Not a test server of the same name beside it; and whoever is elsewhere is not here."""
    history = {"now_s": time.time(), "started_s": 0, "times_s": [], "boot_s": [], "series": []}
    with serving(encoded(history)) as named, serving(b"{}") as other:
        for url in (named, other):
            port = httpx.URL(url).port or 0
            endpoint = LocalEndpoint(url=url, pid=os.getpid(), token="key")
            write_atomic(tmp_path / "endpoints" / f"{port}.json", endpoint.model_dump_json(), mode=0o600)
        port = httpx.URL(named).port
        for host in ("127.0.0.1", "localhost", "[::1]", platform.node()):
            found = reason(LocalEndpoints(tmp_path, f"http://{host}:{port}"))
            assert found == "no endpoint here serves tiny"
        for elsewhere in (f"http://gpu-host.example:{port}", "http://127.0.0.1:9"):
            found = reason(LocalEndpoints(tmp_path, elsewhere))
            assert f"no endpoint of this user on this machine serves at {elsewhere}, but at " in found
            assert named in found
            assert "or name a `prometheus`" in found


def test_an_endpoint_that_serves_something_else_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "_CLOCKS_S", 600)  # of this answer, which is always the same
    history = {"now_s": time.time(), "started_s": 0, "times_s": [], "boot_s": [], "series": []}
    with serving(encoded(history)) as url, serving(b"{}") as other:
        for port, address in ((1, url), (2, other)):
            endpoint = LocalEndpoint(url=address, pid=os.getpid(), token="key")
            write_atomic(tmp_path / "endpoints" / f"{port}.json", endpoint.model_dump_json(), mode=0o600)
        assert reason(LocalEndpoints(tmp_path)).startswith(f"the endpoint at {other} answered with something")
        (tmp_path / "endpoints" / "2.json").unlink()
        assert reason(LocalEndpoints(tmp_path)) == "no endpoint here serves tiny"
