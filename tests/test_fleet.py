"""Changing who answers, as callers see it: a real server, real engines, nobody's request lost."""

from __future__ import annotations

import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from bundles import onnxruntime_bundle
from click.testing import CliRunner, Result
from endpoints import Endpoint, administration, endpoint, metric

from open_autoglm.bundle import open_bundle
from open_autoglm.cli.main import cli
from open_autoglm.serving.local import local_endpoints

NAME = "tiny"
_EIGHT_BITS = 3
"""The number of the candidate with 8-bit weights."""


@pytest.fixture(scope="module")
def bundles(
    tiny_bundle: Path, tiny_glm: Path, shared_ledger: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Two of the same checkpoint: exact, and with rounded weights."""
    root = tmp_path_factory.mktemp("served")
    return tiny_bundle, onnxruntime_bundle(tiny_glm, root, number=_EIGHT_BITS, ledger=shared_ledger)


@pytest.fixture
def served(bundles: tuple[Path, Path], tmp_path: Path) -> Iterator[Endpoint]:
    with endpoint(bundles[0], tmp_path, "--name", NAME, "--max-tokens", "200") as server:
        yield server


@pytest.fixture
def admin(served: Endpoint) -> Iterator[httpx.Client]:
    """By the token that the server leaves for its own user's commands."""
    with administration(served) as client:
        yield client


def digest(bundle: Path) -> str:
    return open_bundle(bundle, verify=False)[1].digest


def command(served: Endpoint, *arguments: str) -> Result:
    """As its user types it on the same machine."""
    return CliRunner().invoke(cli, list(arguments), env={"AUTOGLM_HOME": str(served.home)})


class Traffic:
    """Callers that ask without pause, each under its own name."""

    def __init__(self, url: str, callers: int) -> None:
        self.answers: list[tuple[str, int, str]] = []
        self.failures: list[str] = []
        self._url = url
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(f"caller-{n}",)) for n in range(callers)]

    def _ask(self, caller: str) -> None:
        body = {
            "model": NAME,
            "prompt": f"{caller} asks",
            "max_tokens": 20,
            "user": caller,
            "ignore_eos": True,
        }
        with httpx.Client(base_url=self._url, timeout=60) as http:
            while not self._stopped.is_set():
                try:
                    response = http.post("/v1/completions", json=body)
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))
                    return
                self.answers.append(
                    (caller, response.status_code, response.headers.get("x-autoglm-bundle", ""))
                )

    def by_bundle(self) -> Counter[str]:
        return Counter(bundle for _, _, bundle in self.answers)

    def check(self) -> None:
        assert self.failures == []
        assert {status for _, status, _ in self.answers} == {200}


@contextmanager
def traffic(url: str, callers: int = 4) -> Iterator[Traffic]:
    made = Traffic(url, callers)
    for thread in made._threads:
        thread.start()
    try:
        yield made
    finally:
        made._stopped.set()
        for thread in made._threads:
            thread.join()


def wait_for_answers(found: Traffic, more: int) -> None:
    """Until so many more answers have come."""
    enough, deadline = len(found.answers) + more, time.monotonic() + 60
    while len(found.answers) < enough:
        assert time.monotonic() < deadline
        assert not found.failures
        time.sleep(0.02)


def test_a_swap_under_load_fails_nobody(
    served: Endpoint, admin: httpx.Client, bundles: tuple[Path, Path]
) -> None:
    """There and back again: every answer is whole, and all are the newcomer's in the end."""
    with traffic(served.url) as found:
        wait_for_answers(found, 20)
        for bundle in (bundles[1], bundles[0], bundles[1]):
            said = command(served, "swap", str(bundle))
            assert said.exit_code == 0, said.output
            assert f"bundle {digest(bundle)[:12]} answers instead of" in said.output
            wait_for_answers(found, 20)
    found.check()
    first, second = (digest(bundle)[:12] for bundle in bundles)
    assert set(found.by_bundle()) == {first, second}
    assert {bundle for _, _, bundle in found.answers[-8:]} == {second}
    status = admin.get("/admin/fleet").json()
    assert status["champion"]["bundle_digest"] == digest(bundles[1])
    assert [event["kind"] for event in status["events"]] == ["started", "swapped", "swapped", "swapped"]
    assert {check["name"] for check in status["events"][-1]["checks"]} >= {"tokenizer", "golden_prompts"}
    text = admin.get("/metrics").text
    assert metric(text, "vllm:request_success_total", bundle_digest=first) > 0
    assert metric(text, "autoglm_model_info") == 1  # who was replaced has no state any more


def test_a_bundle_that_cannot_serve_changes_nothing(
    served: Endpoint, admin: httpx.Client, bundles: tuple[Path, Path], tmp_path: Path
) -> None:
    """A flipped bit, and a place where nothing is: the reason is said, and the old one goes on."""
    copy = Path(shutil.copytree(bundles[1], tmp_path / "copy"))
    graph = copy / "model" / "model.onnx"
    content = bytearray(graph.read_bytes())
    content[100] ^= 1
    graph.write_bytes(content)
    torn = Path(shutil.copytree(bundles[1], tmp_path / "torn"))
    tokenizer = next(torn.rglob("tokenizer.json"))
    tokenizer.write_bytes(tokenizer.read_bytes()[:100])
    with traffic(served.url, 2) as found:
        cut = admin.post("/admin/swap", json={"source": str(torn)})
        damaged = admin.post("/admin/swap", json={"source": str(copy)})
        refused = command(served, "swap", str(copy))
        missing = admin.post("/admin/swap", json={"source": str(tmp_path / "nothing")})
        wait_for_answers(found, 10)
    found.check()
    assert damaged.status_code == 409
    assert "is damaged, its SHA-256" in damaged.json()["error"]["message"]
    assert cut.status_code == 409
    assert f"{tokenizer} cannot be read" in cut.json()["error"]["message"]
    assert missing.status_code == 400
    assert str(refused.exception) == damaged.json()["error"]["message"]
    status = admin.get("/admin/fleet").json()
    assert status["champion"]["bundle_digest"] == digest(bundles[0])
    assert [event["kind"] for event in status["events"]] == ["started", *["rejected"] * 3]
    shown = command(served, "endpoints").output
    assert served.url in shown
    assert f"({digest(bundles[0])[:12]}): engine ready, 0 restarts" in shown


def test_a_challenger_keeps_its_callers(
    served: Endpoint, admin: httpx.Client, bundles: tuple[Path, Path]
) -> None:
    """Each caller meets one version only; promoted, the challenger has them all; each role is counted."""
    body = {"source": str(bundles[1]), "weight_percent": 50}
    assert admin.post("/admin/challenger", json=body).status_code == 200
    with traffic(served.url, 12) as found:
        wait_for_answers(found, 60)
    found.check()
    met: dict[str, set[str]] = {}
    for caller, _, bundle in found.answers:
        met.setdefault(caller, set()).add(bundle)
    assert all(len(versions) == 1 for versions in met.values())
    assert len(found.by_bundle()) == 2
    text = admin.get("/metrics").text
    to_challenger = found.by_bundle()[digest(bundles[1])[:12]]
    assert metric(text, "vllm:request_success_total", role="challenger") == to_challenger
    assert f"trial      0 pairs, {to_challenger} answers to clients: " in command(served, "endpoints").output
    with traffic(served.url, 4) as found:
        wait_for_answers(found, 8)
        assert admin.post("/admin/promote", json={}).status_code == 200
        wait_for_answers(found, 16)
    found.check()
    assert {bundle for _, _, bundle in found.answers[-4:]} == {digest(bundles[1])[:12]}
    assert admin.post("/admin/promote", json={}).status_code == 400


def test_a_challenger_that_dies_fails_nobody(
    served: Endpoint, admin: httpx.Client, bundles: tuple[Path, Path]
) -> None:
    """Its requests are the champion's when its engine is gone, and when it is dropped."""
    import os
    import signal

    import psutil

    before = {child.pid for child in psutil.Process(served.process.pid).children()}
    body = {"source": str(bundles[1]), "weight_percent": 100}
    assert admin.post("/admin/challenger", json=body).status_code == 200
    (engine,) = {child.pid for child in psutil.Process(served.process.pid).children()} - before
    with traffic(served.url) as found:
        wait_for_answers(found, 10)
        os.kill(engine, signal.SIGKILL)
        wait_for_answers(found, 10)
        assert admin.delete("/admin/challenger").status_code == 200
        wait_for_answers(found, 10)
    found.check()
    assert set(found.by_bundle()) == {digest(bundle)[:12] for bundle in bundles}
    assert admin.get("/admin/fleet").json()["challenger"] is None


def test_a_challenger_is_held_to_the_promise(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    """One that nobody could keep: it is dropped once there are enough answers to say so, whose lines in the
    log say that they were its own."""
    options = ("--name", NAME, "--max-tokens", "200", "--slo-e2e", "1us")
    with endpoint(bundles[0], tmp_path, *options) as server:
        (here,) = local_endpoints(tmp_path)
        headers = {"Authorization": f"Bearer {here.token}"}
        with httpx.Client(base_url=server.url, headers=headers, timeout=60) as admin:
            body = {"source": str(bundles[1]), "weight_percent": 100}
            assert admin.post("/admin/challenger", json=body).status_code == 200
            deadline = time.monotonic() + 60
            with traffic(server.url) as found:
                while (status := admin.get("/admin/fleet").json())["challenger"] is not None:
                    assert time.monotonic() < deadline
                    time.sleep(0.5)
            found.check()
        judged = next(event["told"] for event in status["events"] if event["kind"] == "judged")
        assert judged.startswith("rollback: p95 e2e is over its limit of 0.001 ms")
        roles = {'"role": "champion"', '"role": "challenger"'}
        assert all(any(role in line for line in server.said) for role in roles)
