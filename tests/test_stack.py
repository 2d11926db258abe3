"""The local stack: pid files, ports, health, and the whole of it up and down once."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import processes
import psutil
import pytest
import stack
from conftest import REPOSITORY
from prefect_api import ask_prefect
from processes import Processes, Service

from open_autoglm.errors import UserError
from open_autoglm.settings import Settings

SLEEPS = "import time; time.sleep(60)"
WITH_CHILD_DEAF_TO_SIGTERM = f"""
import signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "{SLEEPS}"], start_new_session=True).wait()
"""


def service(code: str = SLEEPS, *, healthy: bool = True, port: int | None = None) -> Service:
    command = (sys.executable, "-c", code)
    return Service("demo", command, "here", lambda _: healthy, port=port, port_variable="AUTOGLM_DEMO_PORT")


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Processes]:
    """Processes under a home of their own; whatever still runs is ended."""
    kept = Processes(tmp_path, tmp_path, os.environ)
    yield kept
    kept.stop(service())


@pytest.fixture
def pid_file(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "demo.json"
    path.parent.mkdir()
    return path


def write_record(path: Path, pid: int) -> None:
    """A pid file of long ago: init's birth is nobody else's."""
    record = {"pid": pid, "birth": "0", "started": "2026-01-01T00:00:00+00:00", "command": service().command}
    path.write_text(json.dumps(record))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((processes.HOST, 0))
        return int(probe.getsockname()[1])


def test_a_service_is_started_once_and_found_again(kept: Processes) -> None:
    """Starting what runs keeps the same process, and stopping it leaves nothing."""
    assert kept.state(service()) == "down"
    kept.start(service())
    kept.wait_until_healthy(service())
    first = kept.find(service())
    kept.start(service())
    assert kept.find(service()) == first
    assert kept.state(service()) == "up"
    assert kept.stop(service())
    assert kept.state(service()) == "down"
    assert not kept.stop(service())


def test_a_pid_file_of_a_dead_process_is_forgotten(kept: Processes, pid_file: Path) -> None:
    """A machine that lost power leaves pid files; they do not keep the stack down."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    write_record(pid_file, dead.pid)
    assert kept.find(service()) is None
    assert not pid_file.exists()


def test_a_process_with_a_reused_pid_is_left_alone(kept: Processes, pid_file: Path) -> None:
    """A pid that now belongs to another program (here: this test) is not ours to stop."""
    write_record(pid_file, os.getpid())
    assert not kept.stop(service())
    assert not pid_file.exists()


def test_a_taken_port_is_named_with_the_variable_that_moves_it(kept: Processes) -> None:
    """The message says which port and how to choose another one."""
    with socket.socket() as other:
        other.bind((processes.HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"port {port}; stop it, or set AUTOGLM_DEMO_PORT to a free port"
        ):
            kept.start(service(port=port))


def test_other_settings_ask_for_a_restart(kept: Processes) -> None:
    """A service that runs with another command line is not mistaken for the wanted one."""
    kept.start(service())
    with pytest.raises(UserError, match="with other settings: make down first"):
        kept.start(service("import time; time.sleep(61)"))


def test_a_service_that_ends_at_once_shows_the_end_of_its_log(kept: Processes) -> None:
    """The reason is in the message, so nobody needs to look for a log."""
    broken = service("raise SystemExit('the database is broken')", healthy=False)
    kept.start(broken)
    with pytest.raises(UserError, match=r"ended while it started; [^\n]+\nthe database is broken"):
        kept.wait_until_healthy(broken)


def test_a_stubborn_service_ends_with_its_children(kept: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ignores SIGTERM, or has moved to a session of its own, is killed."""
    monkeypatch.setattr(processes, "STOP_LIMIT_S", 0.5)
    stubborn = service(WITH_CHILD_DEAF_TO_SIGTERM)
    kept.start(stubborn)
    running = kept.find(stubborn)
    assert running is not None
    process = psutil.Process(running.pid)
    while not (children := process.children()):
        time.sleep(0.01)
    assert kept.stop(stubborn)
    assert not any(ended.is_running() for ended in (process, *children))


def test_two_at_once_are_refused(kept: Processes, tmp_path: Path) -> None:
    """A second make up waits for nobody: it says that another one is at work."""
    with kept.alone(), pytest.raises(UserError, match="at work"), Processes(tmp_path, tmp_path, {}).alone():
        pass


def test_no_mlflow_server_if_studies_go_to_another_one(tmp_path: Path) -> None:
    """With AUTOGLM_TRACKING_URI at a server, none is started here."""
    elsewhere = Settings(home=tmp_path, tracking_uri="http://mlflow.example:5000")
    assert [service.name for service in stack.services(elsewhere)] == ["prefect", "worker"]


def test_a_server_that_was_killed_knows_who_has_the_device(tmp_path: Path) -> None:
    """Started again, it lets a study that runs go on, and a second one wait."""
    settings = Settings(home=tmp_path / "home", prefect_port=free_port())
    server, *_ = stack.services(settings)
    kept = Processes(settings.home, REPOSITORY, stack.environment(settings))

    def ask(path: str, body: dict[str, Any]) -> Any:
        return ask_prefect(settings, path, body)

    def started(deployment: str) -> Any:
        run = ask(f"deployments/{deployment}/create_flow_run", {})
        return ask(f"flow_runs/{run['id']}/set_state", {"state": {"type": "PENDING"}})

    try:
        stack.bring_up(kept, [server])
        flow = ask("flows/", {"name": "optimize"})["id"]
        about = {"name": "optimize", "flow_id": flow, "concurrency_limit": 1}
        deployment = ask("deployments/", about)["id"]
        holder = started(deployment)["state"]["state_details"]["deployment_concurrency_lease_id"]
        killed = kept.find(server)
        assert killed is not None
        os.killpg(killed.pid, signal.SIGKILL)
        psutil.Process(killed.pid).wait(60)
        stack.bring_up(kept, [server])
        with httpx.Client(base_url=f"{settings.prefect_url}/api/v2", timeout=30) as api:
            renewed = api.post(f"/concurrency_limits/leases/{holder}/renew", json={"lease_duration": 300})
            assert renewed.status_code == 204, renewed.text
        assert started(deployment)["status"] == "REJECT"
    finally:
        kept.stop(server)


def test_up_deploys_and_down_leaves_nothing(tmp_path: Path) -> None:
    """The whole stack comes up, offers the deployments, buries runs of a killed worker, and goes down."""
    settings = Settings(home=tmp_path / "home", prefect_port=free_port(), mlflow_port=free_port())
    environment = stack.environment(settings)

    def run(*command: str) -> int:
        script = REPOSITORY / "infra" / "stack.py"
        return subprocess.run([sys.executable, script, *command], env=environment, cwd=tmp_path).returncode

    def ask(path: str, body: dict[str, Any]) -> Any:
        return ask_prefect(settings, path, body)

    try:
        assert run("up") == 0
        deployments = {found["name"]: found for found in ask("deployments/filter", {})}
        assert set(deployments) == {"optimize", "reoptimize", "regression"}
        (automation,) = ask("automations/filter", {})
        assert automation["actions"][0]["parameters"] == {"config": "{{ event.payload.service }}"}
        deployment = deployments["optimize"]
        assert deployment["global_concurrency_limit"]["limit"] == 1
        assert [schedule["active"] for schedule in deployment["schedules"]] == [True]
        assert deployment["parameters"] == {"spec": {"model_path": f"{settings.home}/demo-glm"}}

        watched = settings.home / "watches" / "chat.yaml"
        watched.parent.mkdir()
        watched.write_text(
            "{service: chat, endpoint: 'http://127.0.0.1:1', slo: {}, optimize: {model_path: m}}"
        )
        assert run("watch", "chat", "--every", "20min") == 0
        assert run("watch", "chat") == 0  # as often as its window is long
        assert run("watch", "chat", "--every", "1min") == 2

        orphan = ask(f"deployments/{deployment['id']}/create_flow_run", {"state": {"type": "PENDING"}})
        worker = json.loads((settings.home / "run" / "worker.json").read_text())["pid"]
        os.kill(worker, signal.SIGKILL)
        assert run("status") == 1
        assert run("up") == 0
        (found,) = ask("flow_runs/filter", {"flow_runs": {"id": {"any_": [orphan["id"]]}}})
        assert found["state_type"] == "CRASHED"
        assert looks(ask) == {"quarter-hourly": ({}, None), "watch-chat": ({"config": "chat"}, 900)}
        assert run("watch", "chat", "--stop") == 0
        assert looks(ask) == {"quarter-hourly": ({}, None)}
    finally:
        assert run("down") == 0
    assert not processes.is_taken(settings.prefect_port)
    assert not processes.is_taken(settings.mlflow_port)
    assert [path.name for path in (settings.home / "run").iterdir()] == ["stack.lock"]


def looks(ask: Callable[[str, dict[str, Any]], Any]) -> dict[str, Any]:
    """The schedules of `regression`: the parameters of each, and the seconds between two looks."""
    (found,) = ask("deployments/filter", {"deployments": {"name": {"any_": ["regression"]}}})
    return {
        schedule["slug"]: (schedule["parameters"], schedule["schedule"].get("interval"))
        for schedule in found["schedules"]
    }


# ── runs whose process is gone ───────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("prefect_harness")
def test_a_run_that_waits_for_a_person_in_no_process_is_buried() -> None:
    """Who answers it would be told that it goes on, and nobody would."""
    from prefect import flow
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.settings import PREFECT_API_URL
    from prefect.states import Paused, Pending, Running

    @flow
    def waiting() -> None: ...

    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=stack.POOL, type="process"))
        deployment = client.create_deployment(
            client.create_flow(waiting), name="waiting", work_pool_name=stack.POOL
        )
        run = client.create_flow_run_from_deployment(deployment, state=Pending())
        client.update_flow_run(run.id, infrastructure_pid=str(2**22 + 1))
        for state in (Running(), Paused(timeout_seconds=3600)):
            client.set_flow_run_state(run.id, state)
        url = httpx.URL(str(PREFECT_API_URL.value()))
        stack.bury_dead_runs(Settings(prefect_port=url.port or 0))
        found = client.read_flow_run(run.id)
    assert found.state is not None
    assert (found.state.type.value, found.state.message) == (
        "CRASHED",
        "Its worker was stopped. Run it again: it goes on where it was.",
    )
