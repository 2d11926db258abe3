"""Rules, dashboard, Prometheus, Alertmanager and the bridge to Prefect: the programs themselves."""

from __future__ import annotations

import json
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import alert_bridge
import httpx
import monitoring
import pytest
import stack
import yaml
from conftest import REPOSITORY
from endpoints import endpoint
from fastapi.testclient import TestClient
from grafana import dashboard
from prometheus_server import free_port, hasten, needs_alertmanager, needs_prometheus, wait_for

from open_autoglm.errors import UserError
from open_autoglm.monitoring.rules import slo_rules, write_slo
from open_autoglm.schemas import Slo
from open_autoglm.serving.local import LocalEndpoint, announced
from open_autoglm.serving.metrics import Board
from open_autoglm.settings import Settings

PROMETHEUS = REPOSITORY / "infra" / "prometheus"


def run(*command: str | Path, folder: Path = PROMETHEUS) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ── rules and dashboard ──────────────────────────────────────────────────────────────────────────


@needs_prometheus
def test_prometheus_takes_configuration_and_rules() -> None:
    """And its alerts are raised when they should be, and not otherwise."""
    run("promtool", "check", "config", "prometheus.yml")
    run("promtool", "test", "rules", "rules_test.yml")


@needs_alertmanager
def test_alertmanager_takes_its_configuration() -> None:
    run("amtool", "check-config", "alertmanager.yml")


@needs_prometheus
def test_a_promise_is_a_rule(tmp_path: Path) -> None:
    """Of a model whose name could be taken for something else."""
    name = 'models/"a b"'
    path = write_slo(tmp_path, name, Slo(ttft_p95_ms=137, error_fraction=0.02))
    assert path.parent == tmp_path / "prometheus" / "slo"
    run("promtool", "check", "rules", path)
    (group,) = json.loads(path.read_text())["groups"]
    assert group["rules"] == [
        {
            "record": "autoglm:slo_seconds:p95",
            "expr": "vector(0.137)",
            "labels": {"model_name": name, "stage": "ttft"},
        },
        {"record": "autoglm:slo_errors:share", "expr": "vector(0.02)", "labels": {"model_name": name}},
    ]


def expressions() -> list[str]:
    rules = yaml.safe_load((PROMETHEUS / "rules.yml").read_text())
    return [
        *(line.expression for panel in dashboard.PANELS for line in panel.lines),
        *(rule["expr"] for group in rules["groups"] for rule in group["rules"]),
    ]


def recorded() -> set[str]:
    rules = yaml.safe_load((PROMETHEUS / "rules.yml").read_text())
    promised = json.loads(slo_rules("m", Slo(ttft_p95_ms=1)))
    groups = [*rules["groups"], *promised["groups"]]
    return {rule["record"] for group in groups for rule in group["rules"] if "record" in rule}


def shown() -> set[str]:
    """All series that an endpoint has."""
    board = Board("m")
    metrics = board.of("1", "digest", "champion")
    metrics.refused("queue_full")
    metrics.request(3).finished("stop")
    families = list(board.registry.collect())
    parts = ("_bucket", "_sum", "_count")
    return {
        name
        for family in families
        for name in (
            {family.name + part for part in parts}
            if family.type == "histogram"
            else {family.name + ("_total" if family.type == "counter" else "")}
        )
    }


def test_what_is_looked_at_is_there() -> None:
    """Each metric in a rule or on the dashboard is one that an endpoint shows or a rule records."""
    known = shown() | recorded() | {"up"}
    named = {
        name
        for expression in expressions()
        for name in re.findall(r"(?<![\w:$\"])((?:vllm:|autoglm[:_]|process_|up\b)[\w:]*)", expression)
    }
    assert len(named) > 20
    assert named - known == set()


def test_the_dashboard_is_what_its_source_says() -> None:
    assert dashboard.FILE.read_text() == dashboard.rendered()
    panels = json.loads(dashboard.FILE.read_text())["panels"]
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels) == len({panel["id"] for panel in panels})


@needs_prometheus
def test_expressions_of_the_dashboard_can_be_read(tmp_path: Path) -> None:
    """By promtool, once Grafana's variables have values."""
    rules = [
        {"record": f"panel:{number}", "expr": expression.replace("$__rate_interval", "1m")}
        for number, expression in enumerate(expressions())
    ]
    path = tmp_path / "dashboard.json"
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"SUCCESS: {len(rules)} rules found" in run("promtool", "check", "rules", path)


# ── the bridge ───────────────────────────────────────────────────────────────────────────────────


def notification(**labels: str) -> dict[str, Any]:
    """As Alertmanager 0.25 posts it."""
    alert = {
        "status": "firing",
        "labels": {"alertname": "PromiseBroken", "model_name": "tiny", "stage": "ttft", **labels},
        "annotations": {"summary": "tiny: p95 of ttft is 750ms, more than promised"},
        "startsAt": "2026-01-01T10:00:00.123456789Z",
        "endsAt": "0001-01-01T00:00:00Z",
        "generatorURL": "http://prometheus/graph",
        "fingerprint": "7c3b5fcd1a1e4d0a",
    }
    return {
        "receiver": "prefect",
        "status": "firing",
        "alerts": [alert],
        "groupLabels": {},
        "commonLabels": {},
        "commonAnnotations": {},
        "externalURL": "http://alertmanager",
        "version": "4",
        "groupKey": "{}",
        "truncatedAlerts": 0,
    }


class Captured:
    """Stands where Prefect is, and answers with ``status``."""

    def __init__(self) -> None:
        self.status = 204
        self.events: list[dict[str, Any]] = []
        self.authorizations: list[str | None] = []
        captured = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                captured.events += json.loads(body)
                captured.authorizations.append(self.headers["Authorization"])
                self.send_response(captured.status)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/api"


@pytest.fixture
def prefect() -> Iterator[Captured]:
    captured = Captured()
    thread = threading.Thread(target=captured.server.serve_forever, args=(0.05,))
    thread.start()
    yield captured
    captured.server.shutdown()
    thread.join()
    captured.server.server_close()


def client(prefect_url: str, **variables: str) -> TestClient:
    app = alert_bridge.create_app(prefect_url, alert_bridge.authorization(variables))
    return TestClient(app, base_url="http://127.0.0.1")


def test_an_alert_is_one_event_however_often_it_is_told(prefect: Captured) -> None:
    """And another one when it comes again later; what has ended is none."""
    with client(prefect.url) as bridge:
        for _ in range(2):
            assert bridge.post("/alerts", json=notification()).json() == {"events": 1}
        later, over, nameless = notification(), notification(), notification(model_name="")
        later["alerts"][0]["startsAt"] = "2026-01-01T11:00:00Z"
        over["alerts"][0]["status"] = "resolved"
        assert bridge.post("/alerts", json=later).json() == {"events": 1}
        for nothing in (over, nameless):
            assert bridge.post("/alerts", json=nothing).json() == {"events": 0}
    first, again, other = prefect.events
    assert first["id"] == again["id"] != other["id"]
    assert first["event"] == "autoglm.slo.breached"
    assert first["resource"]["prefect.resource.id"] == "autoglm.service.tiny"
    assert first["payload"] == {
        "service": "tiny",
        "alert": "PromiseBroken",
        "stage": "ttft",
        "summary": "tiny: p95 of ttft is 750ms, more than promised",
        "since": "2026-01-01T10:00:00.123456+00:00",
    }


def test_a_prefect_that_does_not_take_it_is_told_again(prefect: Captured) -> None:
    """503 is what Alertmanager tries again."""
    prefect.status = 401
    with client(prefect.url, PREFECT_API_AUTH_STRING="user:secret") as bridge:
        refused = bridge.post("/alerts", json=notification())
        assert (refused.status_code, "status 401" in refused.json()["reason"]) == (503, True)
    with client(prefect.url, PREFECT_API_KEY="key") as bridge:
        bridge.post("/alerts", json=notification())
    assert prefect.authorizations == ["Basic dXNlcjpzZWNyZXQ=", "Bearer key"]
    with client(f"http://127.0.0.1:{free_port()}/api") as bridge:
        away = bridge.post("/alerts", json=notification())
        assert (away.status_code, "does not answer" in away.json()["reason"]) == (503, True)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 422),
        ({**notification(), "version": "3"}, 422),
        ({"version": "4", "alerts": [{"status": "firing"}]}, 422),
        ({"version": "4", "alerts": "x" * (2 << 20)}, 413),
    ],
    ids=["nothing", "version", "half", "long"],
)
def test_what_is_no_notification_is_refused(body: dict[str, Any], status: int) -> None:
    with client("http://127.0.0.1:1/api") as bridge:
        assert bridge.post("/alerts", json=body).status_code == status


def test_a_web_page_is_refused() -> None:
    with client("http://127.0.0.1:1/api") as bridge:
        found = bridge.post("/alerts", json=notification(), headers={"Host": "rebound.example"})
        assert found.status_code == 400


@pytest.mark.usefixtures("prefect_harness")
def test_an_event_starts_one_run() -> None:
    """A real Prefect server, with an automation as a deployment's trigger makes it."""
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value()
    assert url
    with httpx.Client(base_url=url, timeout=30) as api, client(url) as bridge:

        def post(path: str, body: dict[str, Any]) -> Any:
            response = api.post(path, json=body)
            assert response.is_success, response.text
            return response.json()

        def runs() -> int:
            return len(post("/flow_runs/filter", {"deployments": {"id": {"any_": [deployment]}}}))

        flow = post("/flows/", {"name": "regression"})["id"]
        deployment = post("/deployments/", {"name": "regression", "flow_id": flow})["id"]
        trigger = {
            "type": "event",
            "match": {"prefect.resource.id": "autoglm.service.*"},
            "expect": [alert_bridge.EVENT],
            "posture": "Reactive",
            "threshold": 1,
            "within": 0,
        }
        action = {"type": "run-deployment", "source": "selected", "deployment_id": deployment}
        post("/automations/", {"name": "breached", "trigger": trigger, "actions": [action]})
        wait_until_heard(bridge, runs)
        known = runs()
        for hour in (10, 10, 11):
            assert bridge.post("/alerts", json=alert_of(f"2026-01-01T{hour}:00:00Z")).json() == {"events": 1}
        wait_for(lambda: runs() == known + 2)
        time.sleep(1)
        assert runs() == known + 2


def alert_of(begun: str) -> dict[str, Any]:
    told = notification()
    told["alerts"][0]["startsAt"] = begun
    return told


def wait_until_heard(bridge: TestClient, runs: Callable[[], int]) -> None:
    """An automation is made before it listens: what is told meanwhile starts nothing."""
    for second in range(60):
        bridge.post("/alerts", json=alert_of(f"2025-01-01T00:00:{second:02}Z"))
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            if runs():
                return
            time.sleep(0.1)
    pytest.fail("no alert starts a run")


# ── all of it ────────────────────────────────────────────────────────────────────────────────────


def test_what_is_not_installed_is_said_with_its_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="prometheus and prometheus-alertmanager cannot be found: apt-get"):
        monitoring.check_installed()


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("http://127.0.0.1:8000", {"targets": ["127.0.0.1:8000"], "labels": {"__scheme__": "http"}}),
        ("https://[::1]:8000", {"targets": ["[::1]:8000"], "labels": {"__scheme__": "https"}}),
    ],
)
def test_a_server_says_where_it_can_be_scraped(tmp_path: Path, url: str, target: dict[str, Any]) -> None:
    """For as long as it runs, and if Prometheus needs no key for it."""
    path = tmp_path / "prometheus" / "targets" / "8000.json"
    here = LocalEndpoint(url=url, pid=1, token="secret")
    with announced(tmp_path, 8000, here, scraped=True):
        assert json.loads(path.read_text()) == [target]
    assert not path.exists()
    with announced(tmp_path, 8000, here, scraped=False):
        assert not path.exists()


@needs_prometheus
@needs_alertmanager
def test_an_endpoint_that_is_killed_becomes_an_event(
    tiny_bundle: Path, tmp_path: Path, prefect: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is found by the file it leaves, missed, and told of; all ends with `down`."""
    settings = Settings(
        home=tmp_path,
        prefect_port=prefect.server.server_address[1],
        prometheus_port=free_port(),
        alertmanager_port=free_port(),
        alert_bridge_port=free_port(),
    )
    for name in ("home", "prefect_port", "prometheus_port", "alertmanager_port", "alert_bridge_port"):
        monkeypatch.setenv(f"AUTOGLM_{name.upper()}", str(getattr(settings, name)))

    def command(*arguments: str) -> None:
        stack.cli.main(arguments, standalone_mode=False)

    def ask(path: str) -> Any:
        return httpx.get(f"{settings.prometheus_url}/api/v1/{path}").json()["data"]

    try:
        command("up-monitoring")
        hasten(tmp_path / "prometheus")
        command("slo", "tiny", "--ttft-p95-ms", "500")
        wait_for(lambda: "autoglm-slo-tiny" in {group["name"] for group in ask("rules")["groups"]})
        with endpoint(tiny_bundle, tmp_path, "--name", "tiny") as server:
            wait_for(lambda: bool(ask('query?query=autoglm_model_info{model_name="tiny"}')["result"]))
            wait_for(lambda: bool(ask("query?query=autoglm:slo_seconds:p95")["result"]))
            assert ask("alerts")["alerts"] == []
            address = server.url.removeprefix("http://")
        wait_for(lambda: bool(prefect.events))
    finally:
        command("down")
    event = prefect.events[0]
    assert event["payload"]["alert"] == "EndpointDown"
    assert event["payload"]["summary"] == f"the endpoint {address} of tiny does not answer"
    assert event["resource"]["prefect.resource.id"] == "autoglm.service.tiny"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["stack.lock"]
