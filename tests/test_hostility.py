"""What clients do by mistake or on purpose, and what hosts do to servers: nobody else's request suffers."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from endpoints import Endpoint, endpoint, metric
from hasty_server import PATIENCE
from pydantic import BaseModel, ValidationError

from open_autoglm.serving.local import local_endpoints
from open_autoglm.serving.openai_types import ChatRequest, CompletionRequest

NAME = "tiny"
PROMPT = "The capital of France is"
HASTY = (str(Path(__file__).parent / "hasty_server.py"),)
BODY: dict[str, Any] = {"model": NAME, "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
LONG: dict[str, Any] = {**BODY, "max_tokens": 480, "ignore_eos": True, "stream": True}
HEALTHY = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
SLACK_S = 10.0
"""A loaded machine may be that late; what is never ended takes longer."""


@pytest.fixture(scope="module")
def served(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """One impatient server for all who misbehave: what one of them breaks, the next test sees."""
    home = tmp_path_factory.mktemp("hostility")
    options = ("--name", NAME, "--slots", "2", "--max-tokens", "500", "--log", str(home / "log"))
    with endpoint(tiny_bundle, home, *options, program=HASTY) as server:
        yield server
        assert server.stop() == 0


@pytest.fixture
def http(served: Endpoint) -> Iterator[httpx.Client]:
    """Its requests must be answered whatever else goes on."""
    with httpx.Client(base_url=served.url, timeout=60) as client:
        yield client


@pytest.fixture(autouse=True)
def well_in_the_end(served: Endpoint) -> Iterator[None]:
    """After each test: no slot is taken, a request is answered, and no traceback is in the log."""
    log = served.home / "log"
    known = log.stat().st_size
    yield
    with httpx.Client(base_url=served.url, timeout=60) as http:
        wait_until_idle(http)
        assert http.post("/v1/completions", json=BODY).status_code == 200
    lines = [json.loads(line) for line in log.read_bytes()[known:].splitlines()]
    assert [line for line in lines if "traceback" in line] == []


def wait_until_idle(http: httpx.Client) -> None:
    _wait_for(http, lambda running, waiting: running == waiting == 0)


def wait_until_running(http: httpx.Client) -> None:
    _wait_for(http, lambda running, _waiting: running > 0)


def _wait_for(http: httpx.Client, reached: Callable[[float, float], bool]) -> None:
    deadline = time.monotonic() + 20
    while True:
        text = http.get("/metrics").text
        if reached(metric(text, "vllm:num_requests_running"), metric(text, "vllm:num_requests_waiting")):
            return
        assert time.monotonic() < deadline, text
        time.sleep(0.02)


def connect(server: Endpoint, *, keeps_bytes: int | None = None) -> socket.socket:
    """A bare connection; with ``keeps_bytes``, whose kernel takes no more than that unread."""
    url = httpx.URL(server.url)
    made = socket.socket()
    if keeps_bytes is not None:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, keeps_bytes)
    made.settimeout(60)
    made.connect((url.host, url.port))
    return made


def message(body: Any, *, more: str = "", path: str = "/v1/completions") -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{more}"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def until_closed(connection: socket.socket) -> bytes:
    """All that comes before the server ends the connection."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while received := connection.recv(1 << 16):
            found += received
    return found


def drip(connection: socket.socket, text: bytes, pause_s: float = 0.1) -> float:
    """Send byte after byte until the server has had enough; how many seconds that took."""
    begin = time.monotonic()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for byte in text:
            connection.sendall(bytes([byte]))
            time.sleep(pause_s)
            connection.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                if connection.recv(1, socket.MSG_PEEK) is not None:
                    break
            connection.settimeout(60)
    connection.settimeout(60)
    return time.monotonic() - begin


def check_refusal(response: httpx.Response, *statuses: int) -> dict[str, Any]:
    """OpenAI's error, in one sentence."""
    assert response.status_code in statuses, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]
    return error


# ── who is slow ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("asked_before", [False, True])
def test_headers_that_never_end_are_not_waited_for(served: Endpoint, asked_before: bool) -> None:
    """Though a byte comes now and then ("Slowloris")."""
    with connect(served) as slow:
        if asked_before:
            check_health(slow)
        head = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n" + b"X-Pad: 1\r\n" * 200
        took_s = drip(slow, head)
        assert until_closed(slow) == b""
    assert PATIENCE.head_s - 0.1 < took_s < PATIENCE.head_s + SLACK_S


def test_a_body_that_never_ends_is_not_waited_for(served: Endpoint) -> None:
    with connect(served) as slow:
        slow.sendall(message(b"x" * 1000)[:-1000])
        took_s = drip(slow, b" " * 1000)
        answer = until_closed(slow)
    assert b" 408 " in answer.splitlines()[0]
    assert b'"the body did not arrive within 1 s"' in answer
    assert PATIENCE.body_s - 0.1 < took_s < PATIENCE.body_s + SLACK_S


@pytest.mark.parametrize("said", [b"", HEALTHY, message(BODY)])
def test_who_says_nothing_more_is_left(served: Endpoint, said: bytes) -> None:
    """Before the first request, and after an answer."""
    begin = time.monotonic()
    with connect(served) as silent:
        silent.sendall(said)
        answer = until_closed(silent)
    assert answer.startswith(b"HTTP/1.1 200" if said else b"")
    assert time.monotonic() - begin < (PATIENCE.idle_s if said else PATIENCE.head_s) + SLACK_S


def test_who_pauses_between_two_requests_keeps_the_connection(served: Endpoint) -> None:
    """For longer than headers may take: they take it for open, and lose what they send on it if it is not."""
    with connect(served) as pausing:
        for _ in range(2):
            check_health(pausing)
            time.sleep(PATIENCE.head_s + 1)
        check_health(pausing)


def check_health(connection: socket.socket) -> None:
    """It answers, and goes on."""
    connection.sendall(HEALTHY)
    assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("stream", [True, False])
def test_who_does_not_read_is_left(served: Endpoint, http: httpx.Client, stream: bool) -> None:
    """Its slot is free long before, and its connection when it has taken nothing for a while."""
    body = {**LONG, "stream": stream, "logprobs": 20, "n": 2}
    with connect(served, keeps_bytes=1 << 12) as deaf:
        deaf.sendall(message(body, more="X-Request-Id: deaf\r\n"))
        wait_until_running(http)
        wait_until_idle(http)
        time.sleep(PATIENCE.write_s + 1)
        answer = until_closed(deaf)
    assert 0 < len(answer) < 1 << 18
    assert not answer.endswith((b"[DONE]\n\n\r\n0\r\n\r\n", b"}"))


def test_a_thousand_idle_connections_keep_nobody_out(served: Endpoint, http: httpx.Client) -> None:
    """As many as there may be, and then more: the idle ones make room, and answers go on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2000)), hard))
    count = PATIENCE.connections + 100
    with contextlib.ExitStack() as idle, http.stream("POST", "/v1/completions", json=LONG) as stream:
        lines = stream.iter_lines()
        next(lines)
        made = [idle.enter_context(connect(served)) for _ in range(count)]
        begin = time.monotonic()
        answer = httpx.post(f"{served.url}/v1/completions", json=BODY, timeout=60)
        assert answer.status_code == 200
        assert time.monotonic() - begin < SLACK_S
        assert [line for line in lines if line][-1] == "data: [DONE]"
        for connection in made:
            assert until_closed(connection) == b""
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_long_prompt_does_not_stall_the_others(served: Endpoint) -> None:
    """It takes the tokenizer seconds to find that it is too long."""
    content = {**BODY, "prompt": "so are commas " * 280_000}
    with ThreadPoolExecutor() as pool, httpx.Client(base_url=served.url, timeout=60) as http:
        begin = time.monotonic()
        refused = pool.submit(httpx.post, f"{served.url}/v1/completions", json=content, timeout=60)
        waits_s = []
        while not refused.done():
            asked = time.monotonic()
            assert http.get("/healthz").status_code == 200
            waits_s.append(time.monotonic() - asked)
            time.sleep(0.01)
        took_s = time.monotonic() - begin
        check_refusal(refused.result(), 400)
    assert max(waits_s) < took_s / 2


# ── who leaves ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("abruptly", [False, True])
def test_who_leaves_is_not_answered_on(served: Endpoint, http: httpx.Client, abruptly: bool) -> None:
    """At every stage: before the first token, in the middle of a stream, with several choices. The slots of
    all are free, and what they waited for is not computed."""
    before = metric(http.get("/metrics").text, "vllm:generation_tokens_total")
    for number in range(30):
        body = {**LONG, "stream": number % 2 == 0, "n": 1 + number % 3}
        leaving = connect(served)
        if abruptly:
            leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        leaving.sendall(message(body))
        if number % 4 == 0:
            leaving.recv(100)
        leaving.close()
    wait_until_idle(http)
    after = metric(http.get("/metrics").text, "vllm:generation_tokens_total")
    assert after - before < 60 * 480 / 2


# ── what is no request ───────────────────────────────────────────────────────────────────────────

PATHS = ["/v1/completions", "/v1/chat/completions", "/v1/models", f"/v1/models/{NAME}", "/healthz", "/readyz"]


@pytest.mark.parametrize("path", [*PATHS, "/metrics", "/nowhere", "/"])
@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "PUT", "PATCH", "DELETE", "TRACE", "LINK"])
def test_a_method_that_is_not_there_is_told(http: httpx.Client, method: str, path: str) -> None:
    """In OpenAI's shape, with those that are; of HEAD only the headers."""
    response = http.request(method, path)
    known = path not in ("/nowhere", "/")
    if method == "HEAD":
        assert response.status_code == (405 if known else 404)
        assert response.content == b""
        assert response.headers["content-type"] == "application/json"
    else:
        check_refusal(response, 405 if known else 404)
    assert ("allow" in response.headers) == known


@pytest.mark.parametrize(
    "target", ["*", "http://evil.example/", "//v1/models", "/v1/%00", "/v1/models/%ff", "/" + "a" * 60_000]
)
def test_an_odd_target_is_told(served: Endpoint, target: str) -> None:
    with connect(served) as odd:
        odd.sendall(f"OPTIONS {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = until_closed(odd)
    assert answer.startswith(b"HTTP/1.1 4")
    assert b'{"error":' in answer


NO_HTTP = {
    "TLS": bytes.fromhex("16030100c8010000c40303"),
    "noise": bytes(range(256)),
    "no length": b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: many\r\n\r\n",
    "an endless length": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
    "endless headers": b"GET / HTTP/1.1\r\n" + b"X-Pad: 1\r\n" * 10_000,
    "no method": b"BREW /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "no host": b"GET /v1/models HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: elsewhere\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n",
    "an endless header": b"GET / HTTP/1.1\r\nX-Pad: " + b"1" * 100_000,
    "endless trailers": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"X-Pad: 1\r\n" * 10_000,
    "bad chunks": b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
}


def test_what_is_no_http_spoils_no_request_before_it(served: Endpoint) -> None:
    with connect(served) as odd:
        odd.sendall(message(BODY) + b"\x16\x03\x01")
        answer = until_closed(odd)
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.count(b"HTTP/1.1") == 1


def test_an_offer_to_speak_something_newer_is_not_taken(served: Endpoint) -> None:
    """As Java's HttpClient makes it with every request."""
    offer = "Connection: Upgrade, HTTP2-Settings, close\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAA\r\n"
    with connect(served) as java:
        java.sendall(message(BODY, more=offer))
        assert until_closed(java).startswith(b"HTTP/1.1 200")


def test_a_body_that_comes_after_its_refusal_leaves_the_connection_well(served: Endpoint) -> None:
    """It is no beginning of another request: the next one may take its time, and may make an offer."""
    offer = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAA\r\n"
    whole = message(BODY, more=offer)
    head, _, body = whole.partition(b"\r\n\r\n")
    with connect(served) as late:
        late.sendall(head.replace(b"application/json", b"text/plain") + b"\r\n\r\n")
        assert late.recv(1 << 16).startswith(b"HTTP/1.1 415")
        late.sendall(body)
        time.sleep(PATIENCE.head_s + 0.5)
        late.sendall(whole)
        assert late.recv(1 << 16).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("stream", [True, False])
def test_http_1_0_is_answered_without_chunks(served: Endpoint, stream: bool) -> None:
    """As nginx asks unless told otherwise."""
    with connect(served) as old:
        old.sendall(message({**BODY, "stream": stream}).replace(b"HTTP/1.1", b"HTTP/1.0"))
        head, _, body = until_closed(old).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert body.endswith(b"data: [DONE]\n\n") if stream else json.loads(body)["usage"]


@pytest.mark.parametrize("name", NO_HTTP)
def test_what_is_no_http_is_told(served: Endpoint, name: str) -> None:
    with connect(served) as odd:
        odd.sendall(NO_HTTP[name])
        answer = until_closed(odd)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b'{"error":' in answer


def test_what_follows_a_refusal_may_be_anything(served: Endpoint) -> None:
    """The body that was not waited for, broken: there is nobody to tell."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with connect(served) as odd:
        odd.sendall(head)
        assert odd.recv(1 << 16).startswith(b"HTTP/1.1 415")
        odd.sendall(b"zz\r\nzz\r\n")
        until_closed(odd)


HALF = "\ud800"
DEEP = b"[" * 100_000
WRONG: dict[str, bytes | dict[str, Any]] = {
    "half a surrogate in the prompt": {"prompt": HALF},
    "in one of the prompts": {"prompt": ["a", HALF]},
    "in a stop": {"stop": HALF},
    "in one of the stops": {"stop": ["a", HALF]},
    "in the user": {"user": HALF},
    "in the model": {"model": HALF},
    "in a field's name": {HALF: 1},
    "in a value that is wrong anyhow": {"max_tokens": HALF},
    "not a number": {"temperature": float("nan")},
    "infinity": {"temperature": float("inf")},
    "no share": {"top_p": float("nan")},
    "no integer": {"max_tokens": float("inf")},
    "a number beyond floats": json.dumps(BODY).replace('"temperature": 0', '"temperature": 1e999').encode(),
    "a number beyond integers": json.dumps(BODY).replace("4", "4" * 5000).encode(),
    "more tokens than there is room for": {"max_tokens": 496},
    "more tokens than integers of C": {"max_tokens": 2**64},
    "a token beyond integers of C": {"prompt": [2**64]},
    "a seed beyond integers of C": {"seed": 2**64},
    "a prompt beyond the context": {"prompt": "so are commas " * 300},
    "tokens beyond the context": {"prompt": [1] * 500},
    "a prompt far beyond the context": {"prompt": "so are commas " * 200_000},
    "deep lists": DEEP,
    "deep objects": b'{"a":' * 100_000,
    "a deep prompt": b'{"model": "tiny", "prompt": ' + b"[" * 900 + b"]" * 900 + b"}",
    "two bodies": json.dumps(BODY).encode() * 2,
    "a body that is too long": b" " * (4 << 20) + b"{}",
    "NUL": b"\0" * 100,
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_told_in_a_sentence(http: httpx.Client, name: str) -> None:
    """Half a surrogate can be written in JSON, NaN cannot, but Python's parser reads it."""
    wrong = WRONG[name]
    content = wrong if isinstance(wrong, bytes) else json.dumps({**BODY, **wrong}).encode()
    response = http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    error = check_refusal(response, 400, 404, 413)
    assert len(error["message"]) < 1000


@pytest.mark.parametrize("wrong", [-1, None, [], {}, "", [-1]])
def test_of_a_million_mistakes_one_is_told(wrong: Any) -> None:
    """Each would take its time and its memory, on the thread that everybody waits for."""
    many = [wrong] * 10_000
    bodies: list[tuple[type[BaseModel], dict[str, Any]]] = [
        (CompletionRequest, {"prompt": many}),
        (CompletionRequest, {"prompt": [many]}),
        (CompletionRequest, {"prompt": "a", "stop": many}),
        (ChatRequest, {"messages": many}),
        (ChatRequest, {"messages": [{"role": "user", "content": many}]}),
    ]
    for kind, body in bodies:
        with pytest.raises(ValidationError) as caught:
            kind.model_validate_json(json.dumps({"model": NAME, **body}))
        assert caught.value.error_count() < 20


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": HALF},
        {"role": "user", "content": "a", "name": HALF},
        {"role": HALF, "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": HALF}]},
        {"role": "user", "content": None},
        {"role": "user", "content": "so are commas " * 300},
    ],
)
def test_a_wrong_turn_of_a_chat_is_told(http: httpx.Client, message: dict[str, Any]) -> None:
    content = json.dumps({"model": NAME, "messages": [message]}).encode()
    headers = {"Content-Type": "application/json"}
    check_refusal(http.post("/v1/chat/completions", content=content, headers=headers), 400)


@pytest.mark.parametrize("source", ["", "\0", HALF, "a" * 5000, "~nobody/x", "/proc/1/root/x", "models:/"])
def test_an_odd_source_is_told(served: Endpoint, source: str) -> None:
    """To the administrator, who is answered as civilly."""
    (here,) = local_endpoints(served.home)
    headers = {"Authorization": f"Bearer {here.token}", "Content-Type": "application/json"}
    content = json.dumps({"source": source}).encode()
    for path in ("/admin/swap", "/admin/challenger"):
        check_refusal(httpx.post(f"{served.url}{path}", content=content, headers=headers, timeout=60), 400)


# ── what hosts do ────────────────────────────────────────────────────────────────────────────────


STREAMS = 8
"""So many that they are not done before the server has heard that it is to end."""


def wait_until_refused(server: Endpoint) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            connect(server).close()
        except ConnectionRefusedError:
            return
        time.sleep(0.01)
    pytest.fail("it still listens")


def test_a_server_that_is_told_to_end_finishes_every_stream(tiny_bundle: Path, tmp_path: Path) -> None:
    """Those that wait for a slot, too, though the engine gets the signals as well, as terminals and systemd
    send them. Who comes now is refused."""
    options = ("--name", NAME, "--slots", "2", "--max-tokens", "500")
    with endpoint(tiny_bundle, tmp_path, *options) as server, ThreadPoolExecutor(STREAMS) as pool:
        streams = [connect(server, keeps_bytes=1 << 12) for _ in range(STREAMS)]
        for stream in streams:
            stream.sendall(message(LONG))
        assert streams[0].recv(10).startswith(b"HTTP/1.1 2")
        engine = server.engine_pid
        os.kill(engine, signal.SIGINT)
        for pid in (engine, server.process.pid):
            os.kill(pid, signal.SIGTERM)
        wait_until_refused(server)
        assert server.process.poll() is None
        texts = list(pool.map(until_closed, streams))
        assert server.process.wait(60) == 0
    assert [text.count(b"data: {") for text in texts] == [480] * STREAMS
    assert all(b"data: [DONE]" in text for text in texts)
    assert not Path(f"/proc/{engine}").exists()


CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>

/* The time of day is ten years ago or ten years ahead, by the toss of a coin with every look. */
static long jump(void) {
    static unsigned state;
    state = state * 1664525u + 1013904223u;
    return state >> 31 ? 315360000L : -315360000L;
}

int clock_gettime(clockid_t id, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(id, now);
    if (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE) now->tv_sec += jump();
    return code;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec found;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &found);
    now->tv_sec = found.tv_sec;
    now->tv_usec = found.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *told) {
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    if (told) *told = found.tv_sec;
    return found.tv_sec;
}
"""


@pytest.fixture
def jumping_clock(tmp_path: Path) -> Path:
    """A library that, loaded first, makes the time of day useless to a process and all its children."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    source, library = tmp_path / "clock.c", tmp_path / "clock.so"
    source.write_text(CLOCK)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    return library


def test_the_time_of_day_does_not_matter(tiny_bundle: Path, tmp_path: Path, jumping_clock: Path) -> None:
    """It jumps by decades whenever somebody looks: every deadline is held, every duration told is true."""
    options = ("--name", NAME, "--slots", "1", "--max-tokens", "500", "--log", str(tmp_path / "log"))
    begin = time.monotonic()
    with (
        endpoint(
            tiny_bundle, tmp_path, *options, program=HASTY, environment={"LD_PRELOAD": str(jumping_clock)}
        ) as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        years = {http.post("/v1/completions", json=BODY).json()["created"] // 31_536_000 for _ in range(9)}
        assert max(years) - min(years) >= 19, "the clock does not jump"
        with http.stream("POST", "/v1/completions", json={**LONG, "n": 3}) as stream:
            lines = [line for line in stream.iter_lines() if line]
        assert len(lines) == 3 * 480 + 1
        with connect(server) as slow, connect(server) as silent:
            slow.sendall(message(b"x" * 1000)[:-1000])
            took_s = drip(slow, b" " * 1000)
            assert b" 408 " in until_closed(slow).splitlines()[0]
            assert PATIENCE.body_s - 0.1 < took_s < PATIENCE.body_s + SLACK_S
            assert until_closed(silent) == b""
        text = http.get("/metrics").text
        assert server.stop() == 0
    whole_s = time.monotonic() - begin
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time", "request_decode_time"):
        assert 0 <= metric(text, f"vllm:{name}_seconds_sum") < 13 * whole_s
        assert metric(text, f"vllm:{name}_seconds_count") == 12
    requests = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert all(0 <= line["e2e_ms"] < 1e3 * whole_s for line in requests if "e2e_ms" in line)
