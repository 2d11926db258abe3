"""A slowdown on purpose: one engine process is slower, everybody can see it, and it ends with the process."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import psutil
import pytest
from click.testing import CliRunner, Result
from endpoints import Endpoint, administration, endpoint, metric
from prometheus_server import wait_for

from open_autoglm.cli.main import cli
from open_autoglm.errors import UserError
from open_autoglm.serving.local import LocalEndpoint, announced

NAME = "tiny"
SHARE = "autoglm_engine_slowed_share"


@pytest.fixture(scope="module")
def served(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    home = tmp_path_factory.mktemp("slow")
    with endpoint(tiny_bundle, home, "--name", NAME, "--max-tokens", "200") as server:
        yield server


@pytest.fixture
def admin(served: Endpoint) -> Iterator[httpx.Client]:
    with administration(served) as client:
        yield client


def command(served: Endpoint, *arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments), env={"AUTOGLM_HOME": str(served.home)})


def answer_s(served: Endpoint) -> float:
    """What an answer takes, the quickest of a few."""
    body = {"model": NAME, "prompt": "The capital of France is", "max_tokens": 16, "ignore_eos": True}
    taken = []
    for _ in range(3):
        begin_s = time.perf_counter()
        assert httpx.post(f"{served.url}/v1/completions", json=body, timeout=60).status_code == 200
        taken.append(time.perf_counter() - begin_s)
    return min(taken)


def shown(served: Endpoint) -> float:
    return metric(httpx.get(f"{served.url}/metrics").text, SHARE)


def test_it_is_slow_until_told_otherwise(served: Endpoint, admin: httpx.Client) -> None:
    """By the command; events, metrics and `endpoints` say so."""
    usual_s = answer_s(served)
    assert shown(served) == 0
    said = command(served, "slow", "--by", "20000%")
    assert (said.exit_code, "is 20000% slower on purpose" in said.output) == (0, True)
    slow_s = answer_s(served)
    assert slow_s > 3 * usual_s
    assert shown(served) == 200
    assert "20000% slower on purpose" in command(served, "endpoints").output
    assert command(served, "slow", "--by", "0%").exit_code == 0
    assert answer_s(served) < slow_s / 3
    assert shown(served) == 0
    event = admin.get("/admin/fleet").json()["events"][-1]
    assert (event["kind"], "not slowed any more" in event["told"]) == ("slowed", True)


def test_a_proxy_does_not_hear_the_key(served: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands are for this machine, whatever the environment says of others."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    assert served.url in command(served, "endpoints").output


def test_whoever_took_the_port_is_told(tmp_path: Path) -> None:
    """A file that was left behind, and another server's page."""
    page = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]
        here = LocalEndpoint(url=f"http://127.0.0.1:{port}", pid=os.getpid(), token="key")
        with announced(tmp_path, port, here):
            found = CliRunner().invoke(cli, ["endpoints"], env={"AUTOGLM_HOME": str(tmp_path)})
        server.shutdown()
    assert isinstance(found.exception, UserError)
    assert str(found.exception) == f"{here.url} answered with status 404 and not as an endpoint does"


def test_another_engine_process_is_not_slow(served: Endpoint, admin: httpx.Client) -> None:
    """One that takes over, and one that is started because the other died."""
    admin.post("/admin/slow", json={"share": 2}).raise_for_status()
    source = admin.get("/admin/fleet").json()["champion"]["bundle"]
    admin.post("/admin/swap", json={"source": source}).raise_for_status()
    assert admin.get("/admin/fleet").json()["champion"]["slower"] == 0
    admin.post("/admin/slow", json={"share": 2}).raise_for_status()
    wait_for(lambda: shown(served) == 2)
    before = admin.get("/admin/fleet").json()["champion"]["restarts"]
    wait_for(lambda: engines(served) == 1)  # who was replaced has left
    os.kill(served.engine_pid, signal.SIGKILL)

    def again() -> bool:
        champion = admin.get("/admin/fleet").json()["champion"]
        return bool(champion["restarts"] > before and champion["engine"] == "ready")

    wait_for(again)
    assert shown(served) == 0


def engines(served: Endpoint) -> int:
    found = 0
    for child in psutil.Process(served.process.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just left
            found += "open_autoglm.serving.engine_main" in child.cmdline()
    return found


def test_who_may_not_or_means_nothing_is_refused(served: Endpoint, admin: httpx.Client) -> None:
    assert httpx.post(f"{served.url}/admin/slow", json={"share": 1}).status_code == 401
    for share in (-0.1, 1001, "1", None):
        assert admin.post("/admin/slow", json={"share": share}).status_code == 400
    said = command(served, "slow", "--by", "60")
    assert isinstance(said.exception, UserError)
    assert "write it like 60%" in str(said.exception)
