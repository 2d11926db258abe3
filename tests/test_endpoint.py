"""The endpoint as its users meet it: a real server, a real engine process, HTTP."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from bundles import openable_study
from endpoints import Endpoint, endpoint, metric

from open_autoglm.bundle import BundleModel, build_bundle

NAME = "tiny"
PROMPT = "The capital of France is"
PROMPTS = [PROMPT, "A model reads", "1, 12, 144", "When the test fails", "The faster a machine", "So are"]


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Path:
    return tiny_bundle


@pytest.fixture(scope="module")
def served(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """One server for the tests that leave it as it was."""
    home = tmp_path_factory.mktemp("home")
    with endpoint(bundle, home, "--name", NAME, "--slots", "4", "--max-tokens", "200") as server:
        yield server


@pytest.fixture(scope="module")
def truth(bundle: Path) -> Iterator[BundleModel]:
    """The bundle as MLflow would load it."""
    model = BundleModel(bundle, max_tokens=200)
    yield model
    model.close()


@pytest.fixture
def http(served: Endpoint) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=60) as client:
        yield client


def complete(http: httpx.Client, prompt: Any = PROMPT, **changes: Any) -> dict[str, Any]:
    body = {"model": NAME, "prompt": prompt, "max_tokens": 12, "temperature": 0, **changes}
    response = http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def events(http: httpx.Client, path: str, **body: Any) -> list[dict[str, Any]]:
    """The chunks of a stream, which must end with ``[DONE]``."""
    with http.stream("POST", path, json={"model": NAME, "stream": True, **body}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


# ── answers ──────────────────────────────────────────────────────────────────────────────────────


def test_the_answer_is_the_bundles(http: httpx.Client, truth: BundleModel) -> None:
    """Greedy text is what the bundle generates by itself, with OpenAI's fields around it."""
    found = complete(http)
    assert found["object"] == "text_completion"
    assert found["model"] == NAME
    choice = found["choices"][0]
    assert choice["text"] == truth.generate([PROMPT], 12)[0]
    assert choice["finish_reason"] in ("length", "stop")
    usage = found["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_many_at_once_get_their_own_answers(http: httpx.Client, truth: BundleModel) -> None:
    """More than there are slots, in one request and in several, each as if it were alone."""
    expected = truth.generate(PROMPTS, 12)
    found = complete(http, PROMPTS)["choices"]
    assert [choice["index"] for choice in found] == list(range(len(PROMPTS)))
    assert [choice["text"] for choice in found] == expected
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda prompt: complete(http, prompt), PROMPTS))
    assert [answer["choices"][0]["text"] for answer in answers] == expected


def test_token_ids_are_a_prompt_too(http: httpx.Client, truth: BundleModel) -> None:
    ids = truth._tokenizer(PROMPT)["input_ids"]
    assert complete(http, ids)["choices"][0]["text"] == complete(http)["choices"][0]["text"]
    assert len(complete(http, [ids, ids])["choices"]) == 2


def test_a_stream_is_the_answer_in_pieces(http: httpx.Client) -> None:
    """With a last chunk for the usage if it was asked for."""
    whole = complete(http)
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    chunks = events(http, "/v1/completions", **body, stream_options={"include_usage": True})
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == whole["choices"][0]["text"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]].count(None) == len(chunks) - 2
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_a_chat_goes_through_the_template(http: httpx.Client, truth: BundleModel) -> None:
    """Whole and in pieces; content may come as text parts."""
    prompt = f"<|user|>{PROMPT}<|end|><|assistant|>"
    expected = truth.generate([prompt], 10)[0]
    body: dict[str, Any] = {"temperature": 0, "max_tokens": 10}
    messages = [{"role": "user", "content": PROMPT}]
    found = http.post("/v1/chat/completions", json={"model": NAME, "messages": messages, **body}).json()
    assert found["object"] == "chat.completion"
    assert found["choices"][0]["message"] == {"role": "assistant", "content": expected, "refusal": None}
    parts = [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}]
    chunks = events(http, "/v1/chat/completions", messages=parts, **body)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta["content"] for delta in deltas) == expected


def test_an_answer_may_be_sent_back_as_it_came(http: httpx.Client) -> None:
    """As clients do who append it to the conversation, with all that was empty in it."""
    messages = [{"role": "user", "content": PROMPT}]
    body = {"model": NAME, "messages": messages, "max_tokens": 4, "n": None}
    turn = http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
    unset = {"annotations": None, "audio": None, "function_call": None, "tool_calls": None}
    for empty in ({}, unset, {"annotations": [], "tool_calls": []}):
        body["messages"] = [*messages, turn | empty, {"role": "user", "content": "And then?"}]
        found = http.post("/v1/chat/completions", json=body)
        assert found.status_code == 200, found.text
    body["messages"] = [*messages, turn | {"tool_calls": [{"id": "1"}]}]
    assert http.post("/v1/chat/completions", json=body).status_code == 400


def test_a_stop_string_ends_the_answer(http: httpx.Client) -> None:
    """Before it, and nothing of it is sent."""
    whole = complete(http, max_tokens=30)["choices"][0]["text"]
    word = whole[8:11]
    found = complete(http, max_tokens=30, stop=[word])["choices"][0]
    assert found["text"] == whole[: whole.index(word)]
    assert found["finish_reason"] == "stop"


def test_sampling_is_repeatable_by_its_seed(http: httpx.Client) -> None:
    """And another seed says something else, as do the choices of one request."""
    hot = {"temperature": 1.5, "max_tokens": 20}
    first, again, other = (complete(http, seed=seed, **hot)["choices"][0]["text"] for seed in (5, 5, 6))
    assert first == again
    assert first != other
    texts = [choice["text"] for choice in complete(http, seed=5, n=3, **hot)["choices"]]
    assert texts[:2] == [first, other]
    assert len(set(texts)) == 3


def test_logprobs_are_given_if_asked_for(http: httpx.Client) -> None:
    """In both dialects; the chosen token is the likeliest where it is chosen greedily."""
    logs = complete(http, logprobs=1)["choices"][0]["logprobs"]
    assert len(logs["tokens"]) == len(logs["token_logprobs"]) == len(logs["text_offset"])
    assert [max(best.values()) for best in logs["top_logprobs"]] == logs["token_logprobs"]
    body = {
        "model": NAME,
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 4,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
    }
    content = http.post("/v1/chat/completions", json=body).json()["choices"][0]["logprobs"]["content"]
    best = [entry["top_logprobs"][0]["logprob"] for entry in content]
    assert best == [entry["logprob"] for entry in content]


def test_logprobs_are_of_the_answers_own_bytes(http: httpx.Client) -> None:
    """Also where a token is half of a character: random weights say many. A stream tells the same."""
    asked = {"temperature": 1, "seed": 3, "max_tokens": 60, "ignore_eos": True}
    chat = {"messages": [{"role": "user", "content": PROMPT}], **asked, "logprobs": True}
    choice = http.post("/v1/chat/completions", json={"model": NAME, **chat}).json()["choices"][0]
    entries = [entry for entry in choice["logprobs"]["content"] if not entry["token"].startswith("<|")]
    assert any("\ufffd" in entry["token"] for entry in entries)
    said = b"".join(bytes(entry["bytes"]) for entry in entries)
    assert said.decode(errors="replace") == choice["message"]["content"]

    whole = complete(http, logprobs=20, **asked)["choices"][0]["logprobs"]
    parts = events(http, "/v1/completions", prompt=PROMPT, logprobs=20, **asked)
    logs = [chunk["choices"][0]["logprobs"] for chunk in parts]
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        assert [one for log in logs for one in log[name]] == whole[name]
    assert whole["text_offset"] == [sum(map(len, whole["tokens"][:n])) for n in range(60)]
    for best in whole["top_logprobs"]:
        assert list(best.values()) == sorted(best.values(), reverse=True)


def test_a_prompt_that_was_read_is_said_to_be_cached(http: httpx.Client) -> None:
    text = "A beginning that nobody else has: " + "again and " * 20
    complete(http, text)
    usage = complete(http, text)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1


def test_what_is_not_needed_is_not_loaded(http: httpx.Client, served: Endpoint) -> None:
    """torch would take 190 MB of the server and two seconds of its start; this engine is another."""
    complete(http)
    server = psutil.Process(served.process.pid)
    (engine,) = server.children()
    for process in (server, engine):
        assert "torch" not in Path(f"/proc/{process.pid}/maps").read_text()


def test_models_are_listed(http: httpx.Client) -> None:
    found = http.get("/v1/models").json()
    assert [model["id"] for model in found["data"]] == [NAME]
    assert found["data"][0]["slots"] == 4
    assert http.get(f"/v1/models/{NAME}").json()["max_model_len"] == 200
    assert http.get("/v1/models/other").status_code == 404
    assert http.get("/docs").status_code == 200


# ── what is refused ──────────────────────────────────────────────────────────────────────────────

REFUSED = {
    "another model": ({"model": "gpt-4"}, 404, "is not served here"),
    "no model": ({"model": None}, 400, "model"),
    "an empty prompt": ({"prompt": ""}, 400, "empty"),
    "no prompts": ({"prompt": []}, 400, "prompt"),
    "an unknown token": ({"prompt": [99999]}, 400, "99999"),
    "a negative token": ({"prompt": [-1]}, 400, "prompt"),
    "a mixed prompt": ({"prompt": ["a", 1]}, 400, "prompt"),
    "too many tokens": ({"max_tokens": 10**9}, 400, "room for 200 together"),
    "no tokens": ({"max_tokens": 0}, 400, "max_tokens"),
    "tokens as text": ({"max_tokens": "12"}, 400, "max_tokens"),
    "a long prompt": ({"prompt": "so are commas " * 200}, 400, "shorten the prompt"),
    "too hot": ({"temperature": 3}, 400, "temperature"),
    "no nucleus": ({"top_p": 0}, 400, "top_p"),
    "penalties": ({"presence_penalty": 0.5}, 400, "presence_penalty"),
    "an unknown field": ({"best_off": 3}, 400, "best_off"),
    "an empty stop": ({"stop": [""]}, 400, "stop"),
    "stream options alone": ({"stream_options": {"include_usage": True}}, 400, "stream"),
    "too many choices": ({"n": 1000}, 400, "n:"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused_in_a_sentence(http: httpx.Client, name: str) -> None:
    """In OpenAI's shape, with the field that is wrong."""
    changes, status, said = REFUSED[name]
    body = {"model": NAME, "prompt": PROMPT, "max_tokens": 4, **changes}
    response = http.post("/v1/completions", json=body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert said in error["message"]
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    ("content", "status"),
    [(b"{", 400), (b"[]", 400), (b"", 400), (b"\xff\xfe", 400), (b"x" * (5 << 20), 413)],
    ids=["half", "list", "nothing", "no text", "too long"],
)
def test_what_is_no_request_is_refused(http: httpx.Client, content: bytes, status: int) -> None:
    response = http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == status
    assert response.json()["error"]["message"]


def test_what_is_not_there_is_not_found(http: httpx.Client) -> None:
    assert http.get("/v1/nothing").status_code == 404
    assert "error" in http.get("/v1/nothing").json()
    assert http.get("/v1/completions").status_code == 405


# ── faults ───────────────────────────────────────────────────────────────────────────────────────


def wait_until_ready(http: httpx.Client) -> None:
    deadline = time.monotonic() + 60
    while http.get("/readyz").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_client_that_leaves_frees_its_slot(http: httpx.Client) -> None:
    """What it had asked for is not computed to its end."""
    body = {"model": NAME, "prompt": PROMPT, "max_tokens": 190, "stream": True, "ignore_eos": True}
    brief = httpx.Timeout(60, read=0.01)  # shorter than the answer takes
    for _ in range(4):
        with http.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_lines())
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/completions", json={**body, "stream": False, "n": 4}, timeout=brief)
    complete(http)
    deadline = time.monotonic() + 20
    while metric(text := http.get("/metrics").text, "vllm:num_requests_running") != 0:
        assert time.monotonic() < deadline, text


def test_metrics_tell_what_happened(http: httpx.Client) -> None:
    """Counters of what was asked, and names that dashboards know."""
    before = http.get("/metrics").text
    complete(http, max_tokens=5, ignore_eos=True)
    after = http.get("/metrics").text

    for name, more in {
        "vllm:generation_tokens_total": 5,
        "vllm:time_to_first_token_seconds_count": 1,
        "vllm:inter_token_latency_seconds_count": 4,
        "vllm:e2e_request_latency_seconds_count": 1,
    }.items():
        assert metric(after, name) - metric(before, name) == more
    assert metric(after, "autoglm_engine_memory_bytes") > 10 << 20
    assert 0 < metric(after, "vllm:kv_cache_usage_perc") <= 1
    assert 'role="champion"' in after


def test_a_crash_of_the_engine_costs_only_what_it_was_answering(bundle: Path, tmp_path: Path) -> None:
    """That request gets an error that can be retried, readiness says so, and soon all is well again."""
    with (
        endpoint(bundle, tmp_path, "--name", NAME, "--max-tokens", "500") as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        body = {"model": NAME, "prompt": PROMPT, "max_tokens": 490, "stream": True, "ignore_eos": True}
        with http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            os.kill(server.engine_pid, signal.SIGKILL)
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_lost"
        response = http.post("/v1/completions", json={**body, "stream": False, "max_tokens": 2})
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1
        assert http.get("/readyz").status_code == 503
        assert "signal 9" in http.get("/readyz").json()["reason"]
        assert http.get("/healthz").status_code == 200
        wait_until_ready(http)
        assert complete(http, max_tokens=2)["choices"][0]["finish_reason"]
        assert metric(http.get("/metrics").text, "autoglm_requests_failed_total") == 1


def test_a_full_queue_is_said(bundle: Path, tmp_path: Path) -> None:
    """429 with a time to come back, and those who were let in are answered."""
    options = ("--name", NAME, "--slots", "1", "--queue", "1", "--max-tokens", "500")
    with (
        endpoint(bundle, tmp_path, *options) as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
        ThreadPoolExecutor(8) as pool,
    ):
        body = {"model": NAME, "prompt": PROMPT, "max_tokens": 400, "ignore_eos": True}
        answers = list(pool.map(lambda _: http.post("/v1/completions", json=body), range(8)))
        assert {answer.status_code for answer in answers} == {200, 429}
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
        many = http.post("/v1/completions", json={**body, "n": 3, "max_tokens": 2})
        assert many.status_code == 400  # there is no time to come back at
        assert "3 answers at a time were asked for, and 2 may be" in many.json()["error"]["message"]


def test_a_server_that_is_asked_to_end_answers_first(bundle: Path, tmp_path: Path) -> None:
    """SIGTERM in the middle of a stream: it is told to its end, and nothing is left behind."""
    with (
        endpoint(bundle, tmp_path, "--name", NAME, "--max-tokens", "500") as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        engine = server.engine_pid
        body = {"model": NAME, "prompt": PROMPT, "max_tokens": 300, "stream": True, "ignore_eos": True}
        with http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert server.process.wait(30) == 0
        assert not Path(f"/proc/{engine}").exists()


# ── other engines, other sources ─────────────────────────────────────────────────────────────────


def test_an_engine_without_slots_is_served_one_at_a_time(tiny_glm: Path, tmp_path: Path) -> None:
    """`/v1/models` says so, and the answers are right."""
    study = openable_study(tiny_glm)
    made = build_bundle(study, study.trials[0], tmp_path / "bundle").path
    with (
        endpoint(made, tmp_path, "--name", NAME, "--slots", "4") as server,
        httpx.Client(base_url=server.url, timeout=120) as http,
    ):
        assert http.get("/v1/models").json()["data"][0]["slots"] == 1
        found = [choice["text"] for choice in complete(http, PROMPTS[:3])["choices"]]
        model = BundleModel(made)
        assert found == model.generate(PROMPTS[:3], 12)
        model.close()


@pytest.mark.parametrize("damage", ["model/model.onnx", "manifest.json"])
def test_a_damaged_bundle_is_refused(bundle: Path, tmp_path: Path, damage: str) -> None:
    """Before anything is loaded, with the file's name."""
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    content = bytearray((copy / damage).read_bytes())
    content[1] ^= 64
    (copy / damage).write_bytes(content)
    with pytest.raises(AssertionError, match=r"error: .*copy"):
        Endpoint(copy, tmp_path)


def test_nothing_to_serve_is_said(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="neither a bundle"):
        Endpoint(tmp_path, tmp_path)
