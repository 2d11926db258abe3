"""The local stack: Prefect's server, MLflow's server and one worker, all on loopback.

    python infra/stack.py up | up-monitoring | slo | watch | down | status

State is kept under ``$AUTOGLM_HOME``; ports are ``AUTOGLM_PREFECT_PORT`` and ``AUTOGLM_MLFLOW_PORT``, and of
the monitoring ``AUTOGLM_PROMETHEUS_PORT``, ``AUTOGLM_ALERTMANAGER_PORT`` and ``AUTOGLM_ALERT_BRIDGE_PORT``.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

import click
import httpx
import monitoring
import psutil
from prefect_api import ask_prefect
from processes import HOST, Processes, Service
from schedules import look_every, stop_looking

from open_autoglm.cli.prefect_server import is_up
from open_autoglm.errors import UserError
from open_autoglm.monitoring.config import find_watch
from open_autoglm.monitoring.rules import write_slo
from open_autoglm.progress import LOGGER
from open_autoglm.schemas import Slo
from open_autoglm.settings import Settings
from open_autoglm.units import Duration

PROJECT = Path(__file__).resolve().parent.parent
POOL = "cpu-pool"

log = logging.getLogger("stack")


# ── what runs ────────────────────────────────────────────────────────────────────────────────────


def services(settings: Settings) -> tuple[Service, ...]:
    """In the order they are started, the worker last: it needs Prefect's server."""
    prefect = Service(
        name="prefect",
        command=python("prefect", "server", "start", "--host", HOST, "--port", str(settings.prefect_port)),
        address=settings.prefect_url,
        healthy=lambda _: is_up(f"{settings.prefect_url}/api"),
        port=settings.prefect_port,
        port_variable="AUTOGLM_PREFECT_PORT",
    )
    mlflow = Service(
        name="mlflow",
        command=python(
            "mlflow", "server", "--host", HOST, "--port", str(settings.mlflow_port), "--workers", "1"
        ),
        # Without the mode, its pages open on generative AI instead of experiments and models.
        address=f"{settings.mlflow_url}/#/experiments?workflowType=machine_learning",
        healthy=lambda _: is_up(settings.mlflow_url),
        port=settings.mlflow_port,
        port_variable="AUTOGLM_MLFLOW_PORT",
    )
    worker = Service(
        name="worker",
        # No --limit: the deployment's own limit keeps a second study waiting, and says so on its page.
        command=python("prefect", "worker", "start", "--pool", POOL, "--type", "process", "--name", "local"),
        address=f"work pool {POOL}",
        healthy=lambda started: heartbeat_since(started, settings),
    )
    served_elsewhere = settings.mlflow_uri.startswith(("http://", "https://"))
    return (prefect, worker) if served_elsewhere else (prefect, mlflow, worker)


def python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", *arguments)


def environment(settings: Settings) -> Mapping[str, str]:
    """What servers, worker and flows share, whatever directory the stack is started from."""
    return os.environ | {
        "AUTOGLM_HOME": str(settings.home),
        "AUTOGLM_TRACKING_URI": settings.tracking_uri,
        "AUTOGLM_PREFECT_PORT": str(settings.prefect_port),
        "AUTOGLM_MLFLOW_PORT": str(settings.mlflow_port),
        "DO_NOT_TRACK": "true",
        "PREFECT_HOME": str(settings.home / "prefect"),
        "PREFECT_API_URL": f"{settings.prefect_url}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # On disk: a server that is started again would else forget who holds the device, and end the study.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_LOGGING_EXTRA_LOGGERS": LOGGER,  # progress lines are shown among a run's logs
        # Studies write to this database and these files themselves; the server shows them.
        "MLFLOW_BACKEND_STORE_URI": settings.mlflow_uri,  # not an argument: it may hold a password
        "MLFLOW_ARTIFACTS_DESTINATION": str(settings.mlflow_artifacts),
        "MLFLOW_SERVER_ALLOWED_HOSTS": f"localhost:{settings.mlflow_port},{HOST}:{settings.mlflow_port}",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # saves eight processes and 500 MB
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }


# ── Prefect's workers and runs ───────────────────────────────────────────────────────────────────


def heartbeat_since(started: datetime, settings: Settings) -> bool:
    """Whether the worker has reported to the server since it was started."""
    try:
        workers = ask_prefect(settings, f"work_pools/{POOL}/workers/filter", {})
    except httpx.HTTPError:  # no server, or no pool yet: the worker creates it
        return False
    beats = [worker["last_heartbeat_time"] for worker in workers if worker["status"] == "ONLINE"]
    return any(datetime.fromisoformat(beat) > started for beat in beats)


def bury_dead_runs(settings: Settings) -> None:
    """Tell the server of runs that died with the last worker; they would keep later studies waiting."""
    unfinished = {
        # Who waits for a person's answer waits in a process; nobody would hear it.
        "flow_runs": {"state": {"type": {"any_": ["PENDING", "RUNNING", "PAUSED"]}}},
        "work_pools": {"name": {"any_": [POOL]}},
    }
    crashed = {"type": "CRASHED", "message": "Its worker was stopped. Run it again: it goes on where it was."}
    for run in ask_prefect(settings, "flow_runs/filter", unfinished):
        if not is_flow_process(run["infrastructure_pid"]):
            ask_prefect(settings, f"flow_runs/{run['id']}/set_state", {"state": crashed})
            log.info("run %s had died with its worker: marked as crashed", run["name"])


def is_flow_process(pid: str | None) -> bool:
    try:
        return pid is not None and "prefect.engine" in psutil.Process(int(pid)).cmdline()
    except psutil.Error:
        return False


# ── commands ─────────────────────────────────────────────────────────────────────────────────────


@click.group()
def cli() -> None:
    """Prefect's server, MLflow's server and one worker, on this machine only; Prometheus if it is wanted."""


@cli.command()
def up() -> None:
    """Start what is down, wait until it works, and deploy prefect.yaml."""
    settings = Settings()
    processes = Processes(settings.home, PROJECT, environment(settings))
    *servers, worker = services(settings)
    with processes.alone():
        bring_up(processes, servers)
        if processes.find(worker) is None:
            bury_dead_runs(settings)
        bring_up(processes, [worker])
        processes.run("deploy", python("prefect", "--no-prompt", "deploy", "--all"))
    log.info("Start a study: %s/deployments, then Run. make down stops all this.", settings.prefect_url)


@cli.command("up-monitoring")
def up_monitoring() -> None:
    """Start Prometheus, Alertmanager and the bridge from it to Prefect; the endpoints here are scraped."""
    settings = Settings()
    monitoring.check_installed()
    processes = Processes(settings.home, PROJECT, environment(settings))
    with processes.alone():
        monitoring.write_configuration(settings)
        monitoring.read_again(processes, settings)
        bring_up(processes, monitoring.services(settings))


@cli.command()
@click.argument("service")
@click.option("--ttft-p95-ms", type=click.FloatRange(0, min_open=True))
@click.option("--tpot-p95-ms", type=click.FloatRange(0, min_open=True))
@click.option("--e2e-p95-ms", type=click.FloatRange(0, min_open=True))
@click.option("--error-fraction", type=click.FloatRange(0, 1), default=0.01, show_default=True)
def slo(service: str, **promised: float | None) -> None:
    """Tell Prometheus what was promised of SERVICE, a model's public name."""
    settings = Settings()
    path = write_slo(settings.home, service, Slo.model_validate(promised))
    monitoring.read_again(Processes(settings.home, PROJECT, environment(settings)), settings)
    log.info("%s is compared with %s", service, path)


@cli.command()
@click.argument("service")
@click.option("--every", help="Such as 15min.  [default: the window that its file says]")
@click.option("--stop", is_flag=True, help="Do not look any more.")
def watch(service: str, every: str | None, stop: bool) -> None:
    """Let `regression` look at SERVICE regularly, as AUTOGLM_HOME/watches/SERVICE.yaml says."""
    settings = Settings()
    if stop:
        stopped = stop_looking(settings, service)
        log.info("%s %s", service, "is not looked at any more" if stopped else "was not looked at from here")
        return
    window = find_watch(service, settings.home).judge.window
    interval = _duration(every) if every else window
    if interval.ms < window.ms:
        raise UserError(
            f"--every: a window is {window} long, and those that overlap are not judged: wait as long"
        )
    look_every(settings, service, interval.ms / 1000)
    log.info("%s is looked at every %s: %s/deployments", service, interval, settings.prefect_url)


def _duration(text: str) -> Duration:
    try:
        return Duration(text)
    except ValueError as error:
        raise UserError(f"--every: {error}") from None


def bring_up(processes: Processes, wanted: Sequence[Service]) -> None:
    """Start services side by side and wait for all of them."""
    for service in wanted:
        processes.start(service)
    for service in wanted:
        processes.wait_until_healthy(service)
        log.info("%-12s is up: %s", service.name, service.address)


@cli.command()
def down() -> None:
    """Stop the monitoring, the worker and its study, then the servers."""
    settings = Settings()
    processes = Processes(settings.home, PROJECT, environment(settings))
    with processes.alone():
        for service in monitoring.services(settings):
            if processes.stop(service):
                log.info("%-12s is down", service.name)
        for service in reversed(services(settings)):
            was_up = processes.stop(service)
            log.info("%-12s %s", service.name, "is down" if was_up else "was not up")


@cli.command()
def status() -> None:
    """Say what runs; exit code 1 unless all of it works."""
    settings = Settings()
    processes = Processes(settings.home, PROJECT, environment(settings))
    watching = [service for service in monitoring.services(settings) if processes.find(service)]
    states = {service: processes.state(service) for service in (*services(settings), *watching)}
    for service, state in states.items():
        log.info("%-12s %-15s %s", service.name, state, service.address)
    sys.exit(0 if set(states.values()) == {"up"} else 1)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # each question to a server that starts is a line
    try:
        cli()
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
