"""A served model is watched: endpoint, Prometheus, Prefect and MLflow are real, and seconds are minutes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner
from endpoints import Endpoint, endpoint, engine_of, slowed
from flow_runs import started
from prometheus_server import needs_prometheus, prometheus, wait_for

from open_autoglm.cli.main import cli
from open_autoglm.monitoring.answer import is_curable
from open_autoglm.monitoring.config import read_watch_spec
from open_autoglm.schemas import Cause, Judgement
from open_autoglm.settings import Settings

NAME = "tiny"
WINDOW_S = 6.0

WATCH = """
service: tiny
endpoint: {endpoint}
prometheus: {prometheus}
slo:
  e2e_p95: 60ms
judge: {{window: 6s, min_requests: 5, confirm_windows: 2, probe: 3s, cool_down: 1h}}
action: {{canary_weight: 10, shadow_weight: 20}}
optimize: {{model_path: {model}, max_latency: 1s}}
"""

SCRAPES = """
global: {{scrape_interval: 500ms, scrape_timeout: 500ms}}
scrape_configs:
  - job_name: autoglm
    static_configs: [{{targets: ["{target}"]}}]
"""

pytestmark = [needs_prometheus, pytest.mark.usefixtures("prefect_harness")]


@contextmanager
def callers(url: str) -> Iterator[list[int]]:
    """Ask again and again, with pauses in which nobody is answered; the answers' statuses."""
    ended = threading.Event()
    statuses: list[int] = []

    def ask() -> None:
        body = {"model": NAME, "prompt": "The capital of France is", "max_tokens": 24, "ignore_eos": True}
        with httpx.Client(base_url=url, timeout=60) as client:
            while not ended.is_set():
                statuses.append(client.post("/v1/completions", json=body).status_code)
                time.sleep(0.1)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield statuses
    finally:
        ended.set()
        thread.join()


@pytest.fixture
def served(tiny_bundle: Path, tmp_path: Path) -> Iterator[Endpoint]:
    options = ("--name", NAME, "--max-tokens", "200", "--slo-e2e", "60ms")
    with endpoint(tiny_bundle, tmp_path / "home", *options) as server:
        yield server


@pytest.fixture
def config(
    served: Endpoint, tiny_glm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    monkeypatch.setenv("AUTOGLM_HOME", str(served.home))
    monkeypatch.delenv("AUTOGLM_TRACKING_URI", raising=False)
    scrapes = tmp_path / "prometheus.yml"
    scrapes.write_text(SCRAPES.format(target=served.url.removeprefix("http://")))
    with prometheus(tmp_path, scrapes) as url:
        wait_for(lambda: known(url))  # it takes seconds to look at its targets for the first time
        watch = tmp_path / "tiny.yaml"
        watch.write_text(WATCH.format(endpoint=served.url, prometheus=url, model=tiny_glm))
        yield watch


def known(url: str) -> bool:
    answer = httpx.get(f"{url}/api/v1/query", params={"query": "autoglm_model_info"}).json()
    return bool(answer["data"]["result"])


def judge(config: Path) -> Judgement:
    """At the end of the next window."""
    from flows.regression import regression

    time.sleep(WINDOW_S)
    judgement: Judgement = regression(str(config))
    return judgement


def deploy() -> None:
    """What `prefect deploy` does with the flows that are started; no worker takes their runs."""
    from flows.regression import regression
    from flows.reoptimize import reoptimize

    for flow in (regression, reoptimize):
        flow.to_deployment(flow.name).apply()


def test_a_slow_engine_is_found_explained_and_answered(served: Endpoint, config: Path) -> None:
    """Well, then breached in two windows running, explained, and answered once; nobody's request is lost."""
    deploy()
    with callers(served.url) as statuses:
        wait_for(lambda: len(statuses) > 5)
        well = judge(config)
        assert well.state == "ok", well.reasons
        with slowed(engine_of(served), stopped_s=0.095, running_s=0.005):
            found = [judge(config) for _ in range(3)]
    acted = [judgement for judgement in found if judgement.act]
    assert [judgement.state for judgement in acted] == ["breached"], [one.reasons for one in found]
    cause = acted[0].cause
    assert cause is not None
    # Which one it is depends on what else the tests' host does; test_probe and test_cause are about that.
    assert cause.evidence["probe_s"] == pytest.approx(3, abs=1)
    assert len(started(NAME)) == is_curable(cause)
    assert set(statuses) == {200}
    check_records(acted[0])
    check_answer(config, acted[0])


def check_answer(config: Path, acted: Judgement) -> None:
    """A breach that the engine has caused, told twice within the hour, is one run of `reoptimize`."""
    from prefect import flow

    from tasks.monitor import start_reoptimization

    watch = read_watch_spec(config)
    cause = Cause(kind="engine", told="it is slower alone", evidence={})

    @flow
    def answer() -> None:
        for _ in range(2):
            start_reoptimization(watch, acted, cause)

    answer()
    (run,) = started(NAME)
    asked = run.parameters["request"]
    assert asked["spec"]["output_tokens"] == 24
    assert asked["canary"] == {"weight_percent": 10, "shadow_percent": 20}


def check_records(acted: Judgement) -> None:
    """What people find in Prefect and in MLflow."""
    from mlflow import MlflowClient
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        keys = {artifact.key for artifact in client.read_artifacts()}
    assert {"judgement-tiny", "figures-tiny", "windows-tiny"} <= keys
    client = MlflowClient(Settings().mlflow_uri)
    experiment = client.get_experiment_by_name("open-autoglm/tiny")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.metrics["breached"] == 1
    assert run.data.metrics["e2e_p95_ms"] > 60
    assert acted.window is not None
    assert acted.window.bundle_digest in run.info.run_name
    assert client.list_artifacts(run.info.run_id, "breaches")


def ask_again(config: str, judgement: Judgement) -> None:
    """As the flow does."""
    from prefect import flow

    from tasks.monitor import look_again

    flow(look_again)(config, judgement)


def test_a_second_bad_window_is_found_before_its_end(served: Endpoint, config: Path) -> None:
    """The look that finds the first one asks Prefect for another, once; which begins the breach while the
    window is under way, by what was answered in it and nothing else."""
    from flows.regression import regression

    deploy()
    window_s = 40  # so long that a look costs little of it
    config.write_text(config.read_text().replace(f"window: {WINDOW_S:g}s", f"window: {window_s}s"))
    with callers(served.url), slowed(engine_of(served), stopped_s=0.095, running_s=0.005):
        time.sleep(window_s)
        first: Judgement = regression(str(config))
        assert (first.state, first.again is None) == ("ok", False), first.reasons
        assert first.window is not None
        assert first.again is not None
        wait_s = (first.again - datetime.now(UTC)).total_seconds()
        time.sleep(max(0.0, wait_s))
        second: Judgement = regression(str(config))
    assert (second.state, second.act) == ("breached", True), second.reasons
    assert "too many however the window ends, in 2 windows running" in second.reasons[0]
    assert second.window is not None
    assert second.window.begin >= first.window.end
    ask_again(str(config), first)
    (run,) = (run for run in started(NAME, "regression") if run.parameters == {"config": str(config)})
    assert run.expected_start_time == first.again


def test_a_look_that_nobody_can_be_asked_for_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Where Prefect refuses it, the schedule's next look has to do."""
    from prefect.client.orchestration import get_client

    deploy()
    with get_client(sync_client=True) as client:
        client.delete_deployment(client.read_deployment_by_name("regression/regression").id)
    now = datetime.now(UTC)
    ask_again("tiny.yaml", Judgement(service=NAME, at=now, state="no_data", reasons=("soon",), again=now))
    said = "no look before the schedule's next: `regression` could not be started: "
    assert any(said in one.getMessage() for one in caplog.records)


def test_nothing_is_known_without_prometheus(config: Path) -> None:
    """A server that is down is no data with a reason, and never healthy."""
    from flows.regression import regression

    text = config.read_text()
    url = next(line for line in text.splitlines() if line.startswith("prometheus: "))
    config.write_text(text.replace(url, "prometheus: http://127.0.0.1:9"))
    judgement: Judgement = regression(str(config))
    assert judgement.state == "no_data"
    assert "does not answer" in judgement.reasons[0]
    said = CliRunner().invoke(cli, ["watch", str(config), "--once"])
    assert (said.exit_code, "no data" in said.output) == (4, True)
    assert "does not answer" in said.output
