"""Windows of what an endpoint did: from its own history, and what a real Prometheus has scraped of it."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from endpoints import Endpoint, endpoint
from prometheus_server import free_port, needs_prometheus, prometheus, wait_for

from open_autoglm.monitoring.endpoint import LocalEndpoints
from open_autoglm.monitoring.prometheus import Prometheus
from open_autoglm.monitoring.windows import NoWindow, Source, window
from open_autoglm.schemas import LatencyWindow
from open_autoglm.serving.local import local_endpoints

NAME = "tiny"
TOKENS = 5


def send(server: Endpoint, count: int) -> None:
    """Requests of ``TOKENS`` tokens, one by one."""
    body = {"model": NAME, "prompt": "The capital", "max_tokens": TOKENS, "ignore_eos": True}
    with httpx.Client(base_url=server.url, timeout=60) as http:
        for _ in range(count):
            assert http.post("/v1/completions", json=body).status_code == 200


def seen(source: Source, begin: datetime) -> LatencyWindow | NoWindow:
    return window(source, NAME, begin, datetime.now(UTC))


def counted(source: Source, begin: datetime) -> LatencyWindow:
    found = seen(source, begin)
    assert isinstance(found, LatencyWindow), found
    return found


def check_that_a_history_is_for_administrators(server: Endpoint) -> None:
    """And its moments have to be said."""
    (here,) = local_endpoints(server.home)
    key = {"Authorization": f"Bearer {here.token}"}
    url, day = f"{server.url}/admin/history", {"begin": "2026-01-01T00:00:00Z", "end": "2026-01-02T00:00:00Z"}
    assert httpx.get(url, params=day).status_code == 401
    assert httpx.get(url, params=day, headers=key).json()["times_s"] == []
    for wrong in ({}, day | {"end": "2026-01-02T00:00:00"}, day | {"begin": "yesterday"}):
        refused = httpx.get(url, params=wrong, headers=key)
        assert (refused.status_code, bool(refused.json()["error"]["param"])) == (400, True)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def scraped(home: Path, port: int) -> Iterator[Prometheus]:
    """Each second, an address at which there is somebody or not."""
    job = {"job_name": "autoglm", "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}
    path = home / "prometheus.yml"  # YAML is a superset of JSON
    path.write_text(json.dumps({"global": {"scrape_interval": "1s"}, "scrape_configs": [job]}))
    with prometheus(home, path) as url:
        yield Prometheus(url)


@needs_prometheus
def test_what_was_sent_is_what_a_window_has(
    tiny_bundle: Path, home: Path, port: int, scraped: Prometheus
) -> None:
    """By Prometheus and by the endpoint's own memory, across a server that is killed and started again."""
    begin = datetime.now(UTC)
    options = ("--name", NAME, "--port", str(port), "--max-tokens", "200")
    local = LocalEndpoints(home)
    with endpoint(tiny_bundle, home, *options) as server:
        wait_for(lambda: isinstance(seen(scraped, begin), LatencyWindow))
        assert counted(scraped, begin).requests == counted(local, begin).requests == 0
        send(server, 3)
        wait_for(lambda: counted(scraped, begin).requests == 3)
        by_prometheus, by_itself = counted(scraped, begin), counted(local, begin)
        same = {"begin", "end", "source", "memory_bytes", "pace_ms"}
        assert by_prometheus.model_dump(exclude=same) == by_itself.model_dump(exclude=same)
        assert by_itself.output_tokens.sum == 3 * TOKENS
        assert {stage: times.count for stage, times in by_itself.times_ms.items()} == {
            "ttft": 3,
            "tpot": 3,
            "e2e": 3,
            "queue": 3,
        }
        assert 0 < by_itself.times_ms["e2e"].sum < 60_000
        assert by_itself.memory_bytes > 10 << 20
        assert begin < by_prometheus.begin < by_prometheus.end < datetime.now(UTC)
        server.stop(signal.SIGKILL)

    wait_for(lambda: isinstance(seen(scraped, begin), NoWindow))
    down = seen(scraped, begin)
    assert isinstance(down, NoWindow)
    assert f"no endpoint of tiny answers Prometheus: 127.0.0.1:{port} since" in down.reason
    again = datetime.now(UTC)
    nobody = seen(local, begin)
    assert isinstance(nobody, NoWindow)
    assert nobody.reason.startswith("no endpoint runs here")

    with endpoint(tiny_bundle, home, *options) as server:
        send(server, 5)  # more than before: no counter is ever seen to fall
        wait_for(lambda: isinstance(found := seen(scraped, begin), LatencyWindow) and found.requests == 8)
        both, last = counted(scraped, begin), counted(local, begin)
        assert both.output_tokens.sum == 8 * TOKENS
        assert both.times_ms["ttft"].count == both.times_ms["e2e"].count == 8
        assert (both.restarts, last.restarts) == (1, 0)
        assert last.requests == 5
        check_that_a_history_is_for_administrators(server)
        assert last.begin > again


@needs_prometheus
def test_who_was_never_seen_is_not_taken_for_idle(scraped: Prometheus) -> None:
    found = window(scraped, "other", datetime.now(UTC) - timedelta(minutes=15), datetime.now(UTC))
    assert isinstance(found, NoWindow)
    assert found.reason.endswith("knows no champion of other: is its endpoint scraped?")


@needs_prometheus
def test_who_was_seen_long_ago_is_named(scraped: Prometheus, port: int) -> None:
    """A window after the last figures, of an address that is still asked."""
    wait_for(lambda: isinstance(seen(scraped, datetime.now(UTC) - timedelta(hours=1)), NoWindow))
    time.sleep(2.1)
    found = window(scraped, NAME, datetime.now(UTC) - timedelta(seconds=2), datetime.now(UTC))
    assert isinstance(found, NoWindow)
    assert f"127.0.0.1:{port}, which had the champion of tiny until" in found.reason
    assert found.reason.endswith("does not answer Prometheus")
