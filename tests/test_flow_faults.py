"""Flows whose Prefect or MLflow is down, hangs or is not set up: the next run does what one could not."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import alert_bridge
import httpx
import pytest
from breaches import NOT_ASKED, SLOWER, bad, breached, watch_of
from click.testing import CliRunner
from fastapi.testclient import TestClient
from flow_runs import started
from registries import Shelf

from open_autoglm.cli.main import cli
from open_autoglm.errors import StudyError, UserError
from open_autoglm.monitoring.config import WatchSpec
from open_autoglm.schemas import (
    Canary,
    Cause,
    Judgement,
    OptimizeSpec,
    Outcome,
    Reoptimization,
)
from open_autoglm.tracking import UnderWay, Unreachable, aliases

HERE = Path(__file__).parent
SECOND = timedelta(seconds=1)


@contextmanager
def silence() -> Iterator[str]:
    """A server that takes every connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        yield f"http://127.0.0.1:{silent.getsockname()[1]}"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AUTOGLM_HOME", str(tmp_path))
    monkeypatch.delenv("AUTOGLM_TRACKING_URI", raising=False)
    return tmp_path


# ── MLflow ───────────────────────────────────────────────────────────────────────────────────────


def artifacts() -> set[str]:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return {artifact.key or "" for artifact in client.read_artifacts(limit=200)}


def recorded(watch: WatchSpec, monkeypatch: pytest.MonkeyPatch) -> str:
    """Record a breach, and what is said of it."""
    from prefect import flow

    from tasks import monitor

    said: list[str] = []
    monkeypatch.setattr(monitor, "announce", said.append)

    @flow
    def run() -> None:
        monitor.record(breached(watch.service), watch)

    run()
    assert f"judgement-{watch.service}" in artifacts()
    (sentence,) = said
    return sentence


@pytest.mark.usefixtures("prefect_harness")
@pytest.mark.parametrize("fault", ["hangs", "down", "deleted", "files", "nonsense"])
def test_an_mlflow_that_does_not_answer_costs_only_its_own_record(
    fault: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The judgement is in Prefect, and one sentence says that it is not in MLflow, and why."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    watch = watch_of(home, f"record-{fault}")
    with silence() as silent:
        spoil(fault, watch, silent, monkeypatch)
        said = recorded(watch, monkeypatch)
    assert said.startswith("the judgement is not in MLflow: ")
    assert "\n" not in said
    assert {
        "hangs": "timed out",
        "down": "refused",
        "deleted": "was deleted: restore it",
        "files": "Not a directory",
        "nonsense": "http://[::1 is no address of an MLflow server",
    }[fault] in said


def spoil(fault: str, watch: WatchSpec, silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from open_autoglm.settings import Settings
    from open_autoglm.tracking import Tracker

    places = {"hangs": silent, "down": "http://127.0.0.1:9", "nonsense": "http://[::1"}
    if fault in places:
        monkeypatch.setenv("AUTOGLM_TRACKING_URI", places[fault])
        return
    settings = Settings()
    tracker = Tracker(settings.mlflow_uri, settings.mlflow_artifacts)
    if fault == "files":
        settings.mlflow_artifacts.write_text("this is no folder")
        return
    experiment = tracker._client.create_experiment(f"open-autoglm/{watch.service}")
    tracker._client.delete_experiment(experiment)


# ── Prefect ──────────────────────────────────────────────────────────────────────────────────────


def deployed() -> Any:
    """`reoptimize`, as `prefect deploy` leaves it; no worker takes its runs."""
    from flows.reoptimize import reoptimize

    return reoptimize.to_deployment("reoptimize").apply()


def removed() -> None:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        client._client.delete(f"/deployments/{deployed()}").raise_for_status()


def run_regression(service: str, number: int, cause: Cause, monkeypatch: pytest.MonkeyPatch) -> Judgement:
    """The flow, a second after the end of that bad window."""
    from flows.regression import regression
    from tasks import monitor

    one = bad(number, service)
    with monkeypatch.context() as patch:
        patch.setattr(monitor, "datetime", SimpleNamespace(now=lambda _: one.end + SECOND))
        patch.setattr(monitor, "fetch", lambda *_: one)
        patch.setattr(monitor, "diagnose", lambda *_: cause)
        patch.setattr(monitor, "begin_run", monitor.begin_run.with_options(retries=0))
        judgement: Judgement = regression(service)
    return judgement


@pytest.mark.usefixtures("prefect_harness")
@pytest.mark.parametrize("fault", ["no deployment", "no endpoint"])
def test_what_could_not_be_done_is_done_by_the_next_run(
    fault: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the cool-down, once, and by the key of the hour in which it was found."""
    from open_autoglm.monitoring.answer import once_key

    service = f"again-{fault.replace(' ', '-')}"
    watch_of(home, service)
    removed()
    first = SLOWER if fault == "no deployment" else NOT_ASKED
    found = [run_regression(service, number, first, monkeypatch) for number in (0, 1)]
    assert [(one.state, one.act) for one in found] == [("ok", False), ("breached", True)]
    assert found[1].reasons[-1].endswith("; the next look tries again")
    said = "`reoptimize` could not be started" if fault == "no deployment" else "could not be looked for"
    assert said in found[1].reasons[-1]
    assert started(service) == []
    deployed()
    later = [run_regression(service, number, SLOWER, monkeypatch) for number in (2, 3)]
    assert [(one.state, one.act) for one in later] == [("breached", True), ("breached", False)]
    (run,) = started(service)
    assert run.idempotency_key == once_key(service, bad(1, service).end + SECOND)


ANSWERING = """
import sys
sys.path.insert(0, sys.argv[1])
from prefect import flow
from breaches import SLOWER, breached
from open_autoglm.monitoring.config import read_watch_spec, watch_file
from open_autoglm.settings import Settings
from tasks.monitor import start_reoptimization

service, number = sys.argv[2], int(sys.argv[3])
watch = read_watch_spec(watch_file(service, Settings().home))

@flow
def answer():
    return start_reoptimization(watch, breached(service, number), SLOWER)

print("ready", flush=True)
sys.stdin.readline()
print(answer())
"""


@pytest.mark.usefixtures("prefect_harness")
def test_a_poll_and_an_alert_at_once_are_one_study(home: Path) -> None:
    """Two workers' processes, each with a breach of the same hour, ask in the same moment."""
    from prefect.settings import PREFECT_API_URL

    deployed()
    watch_of(home, "twice")
    environment = os.environ | {"PREFECT_API_URL": str(PREFECT_API_URL.value())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ANSWERING, str(HERE), "twice", number],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in ("1", "2")
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate(timeout=300)[0].splitlines()[-1] for process in processes]
    assert said == ["None", "None"]
    (run,) = started("twice")
    assert run.parameters["request"]["spec"]["register_as"] == "twice"


@pytest.mark.usefixtures("prefect_harness", "home")
def test_a_study_is_found_again_after_prefect_was_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is waited for: a retry waits for the same run, and one that ended badly is not made again."""
    from prefect import flow

    from flows.optimize import optimize
    from tasks import deploy

    optimize.to_deployment("optimize").apply()
    begin, begun = deploy.run_deployment, []

    def interrupted(name: str, **asked: Any) -> Any:
        begun.append(begin(name, **{**asked, "timeout": 0}))
        if len(begun) == 1:
            raise httpx.ConnectError("connection refused")
        return begun[-1]

    monkeypatch.setattr(deploy, "run_deployment", interrupted)
    patient = deploy.run_study.with_options(retry_delay_seconds=0)

    @flow
    def study() -> None:
        patient("quantise", OptimizeSpec(model_path="m"))

    with pytest.raises(StudyError, match="the study of rung quantise ended as Scheduled"):
        study()
    assert len(begun) == 2
    assert begun[0].id == begun[1].id


@pytest.mark.usefixtures("prefect_harness", "home")
def test_a_flow_that_is_run_again_takes_its_study_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both had died with their worker, and a person presses Retry: the dead run is not waited for again."""
    from prefect import flow
    from prefect.client.orchestration import get_client
    from prefect.states import Crashed

    from flows.optimize import optimize
    from tasks import deploy

    optimize.to_deployment("optimize").apply()
    begin, begun = deploy.run_deployment, []

    def dying(name: str, **asked: Any) -> Any:
        run = begin(name, **{**asked, "timeout": 0})
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(run.id, Crashed(), force=True)
            begun.append(client.read_flow_run(run.id))
        return begun[-1]

    monkeypatch.setattr(deploy, "run_deployment", dying)

    @flow(retries=1)
    def study() -> None:
        deploy.run_study("quantise", OptimizeSpec(model_path="m"))

    with pytest.raises(StudyError, match="the study of rung quantise ended as Crashed"):
        study()
    assert len(begun) == 3
    assert begun[0].id == begun[1].id != begun[2].id
    assert len({run.parameters["spec"]["output"] for run in begun}) == 1


LOOKING = """
import sys
from flows.regression import regression
regression(sys.argv[1])
"""


def test_a_prefect_that_hangs_costs_a_look_and_leaves_nothing_half(home: Path) -> None:
    """The run cannot begin, so nothing is judged that nobody would hear of. The shell needs no Prefect."""
    watch_of(home, "hanging")
    with silence() as url:
        environment = os.environ | {
            "PREFECT_API_URL": f"{url}/api",
            "PREFECT_API_REQUEST_TIMEOUT": "1",
            "PREFECT_CLIENT_MAX_RETRIES": "0",
        }
        command = [sys.executable, "-c", LOOKING, "hanging"]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert ended.returncode != 0
        assert not (home / "watch").exists()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PREFECT_API_URL", f"{url}/api")
            said = CliRunner().invoke(cli, ["watch", "hanging", "--once"])
    assert (said.exit_code, "does not answer" in said.output) == (4, True)


def test_a_prefect_that_hangs_is_told_again_by_alertmanager(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bridge does not wait with it: 503, with the reason."""
    monkeypatch.setattr(alert_bridge, "_PREFECT_S", 0.3)
    alert = {
        "status": "firing",
        "labels": {"alertname": "PromiseBroken", "model_name": "tiny"},
        "annotations": {},
        "startsAt": "2026-01-01T10:00:00Z",
        "fingerprint": "f",
    }
    with silence() as url:
        app = alert_bridge.create_app(f"{url}/api", {})
        with TestClient(app, base_url="http://127.0.0.1") as bridge:
            answer = bridge.post("/alerts", json={"version": "4", "alerts": [alert]})
    assert answer.status_code == 503
    assert answer.json()["reason"].endswith("/api/events: ReadTimeout")


# ── the registry, from a flow ────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("prefect_harness")
def test_a_move_whose_writer_was_killed_is_waited_for(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is undone, and the winner becomes the challenger."""
    from prefect import flow

    from tasks.deploy import challenge

    name = shelf.register("waited", 3)
    before = shelf.tracker.aliases(name)
    after = before.model_copy(update={"champion": "3", "previous": "1"})
    shelf.tracker._begin(name, "promote", before, after, by="ada", reason="", evidence=None)
    monkeypatch.setenv("AUTOGLM_TRACKING_URI", shelf.tracker.uri)
    monkeypatch.setattr(aliases, "_LONGEST_MOVE_S", 3.0)
    patient = challenge.with_options(retry_delay_seconds=[0.1, 0.5, 3.0])
    share = Canary(weight_percent=10)
    request = Reoptimization(spec=OptimizeSpec(model_path="m"), canary=share, reason="slow")
    outcome = Outcome(kind="challenger", told="", model_name=name, champion="1", challenger="2", studies=())

    @flow
    def try_it() -> None:
        patient(outcome, request)

    try_it()
    assert shelf.aliases(name) == {"champion": "1", "challenger": "2"}
    newest, died = shelf.tracker.events(name)
    assert (newest.kind, newest.state) == ("canary", "done")
    assert (died.kind, died.state, "undone by the next move" in died.note) == ("promote", "failed", True)


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (UnderWay("ada is moving aliases"), True),
        (Unreachable("MLflow is away"), True),
        (OSError("a wire fell out"), True),
        (UserError("the disk became full"), False),
    ],
)
def test_patience_is_longer_than_a_move_may_take(error: Exception, again: bool) -> None:
    """What stays wrong is told at once."""
    from prefect.states import Failed

    from tasks.deploy import challenge
    from tasks.register import PATIENCE_S, may_help

    assert sum(PATIENCE_S) > aliases._LONGEST_MOVE_S
    assert may_help(challenge, None, Failed(data=error)) is again  # type: ignore[arg-type]
