"""The server's log: a line for each request, and nothing in it that is not the operator's to read."""

from __future__ import annotations

import datetime
import io
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asgi
import httpx
import pytest
from endpoints import Endpoint, endpoint
from fastapi import FastAPI

from open_autoglm.serving.api import _add_errors
from open_autoglm.serving.logs import JsonLines, Logged, LogOptions, start_log

NAME = "tiny"
SECRET = "What nobody else is to read"


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """What this process logs."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("open_autoglm.serving.logs")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield stream
    logger.removeHandler(handler)
    logger.setLevel(before)


async def _app(scope: Any, _receive: Any, send: Any) -> None:
    assert scope["state"]["request_id"]
    await send({"type": "http.response.start", "status": 204, "headers": [(b"x-own", b"1")]})
    await send({"type": "http.response.body", "body": b""})


# ── one request ──────────────────────────────────────────────────────────────────────────────────


def test_a_request_is_named_by_its_client(written: io.StringIO) -> None:
    """If the name is fit to be shown; the answer and the log have the same."""
    client = asgi.Client(Logged(_app))
    answer = client.get("/healthz", headers={"X-Request-Id": "order-7.b_c"})
    assert answer.headers == {"x-own": "1", "x-request-id": "order-7.b_c"}
    line = json.loads(written.getvalue())
    assert line["request_id"] == "order-7.b_c"
    assert (line["method"], line["path"], line["status"]) == ("GET", "/healthz", 204)
    assert (line["client"], line["complete"]) == ("192.0.2.7", True)
    assert datetime.datetime.fromisoformat(line["time"]).tzinfo is not None


@pytest.mark.parametrize("given", [None, "", "a" * 65, "two words", 'quo"te', "line\nbreak", "ümlaut", "a/b"])
def test_a_request_gets_a_name_if_it_has_none(written: io.StringIO, given: str | None) -> None:
    """Or one that could do harm in a log or a header."""
    client = asgi.Client(Logged(_app))
    first, second = (
        client.get("/", headers={"X-Request-Id": given} if given is not None else {}) for _ in range(2)
    )
    names = {first.headers["x-request-id"], second.headers["x-request-id"]}
    assert len(names) == 2
    assert given not in names
    assert {json.loads(line)["request_id"] for line in written.getvalue().splitlines()} == names


def test_whatever_a_path_holds_a_line_is_a_line(written: io.StringIO) -> None:
    asgi.Client(Logged(_app)).get('/a\n{"forged": 1}\x00\udcff')
    (line,) = written.getvalue().splitlines()
    assert json.loads(line)["path"] == '/a\n{"forged": 1}\x00\udcff'


def test_a_bug_is_told_to_its_client_by_its_name_only(written: io.StringIO) -> None:
    """In OpenAI's shape; what happened is for the log, where it has the same name."""
    app = FastAPI()
    _add_errors(app)

    @app.get("/v1/broken")
    async def broken() -> None:
        raise ZeroDivisionError(SECRET)

    answer = asgi.Client(_like_uvicorn(Logged(app))).get("/v1/broken", headers={"X-Request-Id": "r1"})
    assert answer.status == 500
    assert answer.headers["x-request-id"] == "r1"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "r1" in error["message"]
    assert SECRET not in error["message"]
    request, bug = (json.loads(line) for line in written.getvalue().splitlines())
    assert (request["event"], request["level"], request["status"]) == ("request", "error", 500)
    assert bug["request_id"] == request["request_id"] == "r1"
    assert "ZeroDivisionError" in bug["traceback"]


def _like_uvicorn(app: Any) -> Any:
    """Logs what the application raises, in the task that called it."""

    async def call(scope: Any, receive: Any, send: Any) -> None:
        try:
            await app(scope, receive, send)
        except ZeroDivisionError:
            logging.getLogger("open_autoglm.serving.logs").exception("Exception in ASGI application\n")

    return call


def test_a_log_file_is_its_owners_and_may_be_rotated(tmp_path: Path) -> None:
    """A record after the file was moved goes to a new one."""
    path = tmp_path / "logs" / "requests.jsonl"
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    root.handlers.clear()
    try:
        start_log(LogOptions(file=path))
        assert path.stat().st_mode & 0o777 == 0o600
        # Of its own: Prefect, which other tests import, silences loggers that it finds.
        logger = logging.getLogger(str(tmp_path))
        logger.warning("Invalid HTTP request received.")
        moved = path.rename(path.with_suffix(".1"))
        logger.warning("again")
        assert path.stat().st_mode & 0o777 == 0o600
        assert json.loads(moved.read_text())["event"] == "Invalid HTTP request received."
        assert json.loads(path.read_text())["event"] == "again"
    finally:
        for handler in root.handlers:
            handler.close()
        root.handlers[:] = before
        root.setLevel(level)


# ── a real server ────────────────────────────────────────────────────────────────────────────────


class Log:
    """A server's log file, read on."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def line(self, request_id: str) -> dict[str, Any]:
        """Of one request, as soon as it is there."""
        deadline = time.monotonic() + 20
        while True:
            lines = [json.loads(line) for line in self._path.read_text().splitlines()]
            found = [line for line in lines if line["request_id"] == request_id]
            if found:
                assert len(found) == 1
                return found[0]
            assert time.monotonic() < deadline, lines
            time.sleep(0.05)


@pytest.fixture(scope="module")
def served(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    home = tmp_path_factory.mktemp("logged")
    options = ("--name", NAME, "--max-tokens", "500", "--log", str(home / "log"))
    with endpoint(tiny_bundle, home, *options) as server:
        yield server


@pytest.fixture
def log(served: Endpoint) -> Log:
    return Log(served.home / "log")


@pytest.fixture
def http(served: Endpoint) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=60) as client:
        yield client


BODY = {"model": NAME, "prompt": SECRET, "max_tokens": 5, "ignore_eos": True, "temperature": 0}


@pytest.mark.parametrize("stream", [False, True])
def test_an_answers_line_has_its_tokens_and_times(http: httpx.Client, log: Log, stream: bool) -> None:
    """Of whole answers and of streams alike, and neither prompt nor answer nor query."""
    name = f"answer-{stream}"
    answer = http.post(
        "/v1/completions?secret=1", json=BODY | {"stream": stream}, headers={"X-Request-Id": name}
    )
    assert answer.headers["x-request-id"] == name
    line = log.line(name)
    assert (line["status"], line["complete"], line["caller"]) == (200, True, "anonymous")
    assert line["role"] == "champion"
    assert line["path"] == "/v1/completions"
    assert line["completion_tokens"] == 5
    assert line["prompt_tokens"] >= 4
    assert 0 < line["ttft_ms"] < line["e2e_ms"] < 60_000
    expected = {"time", "level", "event", "request_id", "method", "path", "caller", "client", "status"}
    expected |= {"complete", "role", "prompt_tokens", "completion_tokens", "ttft_ms", "e2e_ms"}
    assert set(line) == expected
    assert SECRET not in json.dumps(line)
    assert "secret" not in json.dumps(line)


def test_who_leaves_is_seen_to_have_left(http: httpx.Client, log: Log) -> None:
    """The tokens that were made for nobody are counted, too."""
    body = BODY | {"stream": True, "max_tokens": 450}
    with http.stream("POST", "/v1/completions", json=body, headers={"X-Request-Id": "left"}) as answer:
        next(answer.iter_lines())
    line = log.line("left")
    assert (line["status"], line["complete"]) == (200, False)
    assert 1 <= line["completion_tokens"] < 450


def test_what_is_refused_has_a_line(http: httpx.Client, log: Log) -> None:
    http.post("/v1/completions", json=BODY | {"temperature": 9}, headers={"X-Request-Id": "bad"})
    http.post("/v1/completions", content=b"{", headers={"X-Request-Id": "form", "Content-Type": "text/plain"})
    http.get("/nowhere", headers={"X-Request-Id": "nowhere"})
    assert [log.line(name)["status"] for name in ("bad", "form", "nowhere")] == [400, 415, 404]
    assert "prompt_tokens" not in log.line("bad")


def test_prompts_are_written_if_that_is_asked_for(tiny_bundle: Path, tmp_path: Path) -> None:
    """On standard error here; answers and keys never are."""
    with (
        endpoint(tiny_bundle, tmp_path, "--name", NAME, "--log-prompts") as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        headers = {"Authorization": "Bearer a-key-of-somebody"}
        answer = http.post("/v1/completions", json=BODY, headers=headers).json()["choices"][0]["text"]
        chat = {"model": NAME, "messages": [{"role": "user", "content": SECRET}], "max_tokens": 2}
        assert http.post("/v1/chat/completions", json=chat, headers=headers).status_code == 200
        server.stop()
        server._reader.join()
    lines = [json.loads(line) for line in server.said if '"request"' in line]
    assert lines[0]["prompt"] == SECRET
    assert lines[1]["messages"][0]["content"] == SECRET
    said = "".join(server.said)
    assert "a-key-of-somebody" not in said
    assert json.dumps(answer)[1:-1] not in said
