"""The local stack: Prefect's server, MLflow's server and one worker, all on loopback.

    python infra/stack.py up | down | status

Each service has a pid file in ``$AUTOGLM_HOME/run`` and a log in ``$AUTOGLM_HOME/logs``. Only a process
that a pid file names, and that still runs the command written there, is ever signalled.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import click
import psutil

from open_autoglm.cli.prefect_server import is_up
from open_autoglm.errors import UserError
from open_autoglm.files import file_lock, write_atomic
from open_autoglm.progress import LOGGER
from open_autoglm.settings import Settings

HOST = "127.0.0.1"
POOL = "cpu-pool"
PROJECT = Path(__file__).resolve().parent.parent
START_LIMIT_S = 120
"""The first start creates the databases: 20 s on two idle cores."""
STOP_LIMIT_S = 45
"""Prefect gives a flow 30 s to end before it kills it."""

log = logging.getLogger("stack")


# ── what runs ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Running:
    """A service's process."""

    process: psutil.Process
    started: datetime


@dataclass(frozen=True)
class Service:
    """One process of the stack and how to ask it whether it works (given when it was started)."""

    name: str
    command: tuple[str, ...]
    address: str
    healthy: Callable[[datetime], bool]
    port: int | None = None
    port_variable: str = ""


def services(settings: Settings) -> tuple[Service, ...]:
    """In the order they are started: the worker needs Prefect's server."""
    prefect = Service(
        name="prefect",
        command=python("prefect", "server", "start"),
        address=settings.prefect_url,
        healthy=lambda _: is_up(f"{settings.prefect_url}/api"),
        port=settings.prefect_port,
        port_variable="AUTOGLM_PREFECT_PORT",
    )
    worker = Service(
        name="worker",
        # No --limit: the deployment's own limit keeps a second study waiting, and says so in the UI.
        command=python("prefect", "worker", "start", "--pool", POOL, "--type", "process", "--name", "local"),
        address=f"work pool {POOL}",
        healthy=lambda started: heartbeat_since(started, settings),
    )
    return (prefect, worker) if serves_mlflow_elsewhere(settings) else (prefect, mlflow(settings), worker)


def mlflow(settings: Settings) -> Service:
    """MLflow on the database that studies write to directly; one process instead of its ten."""
    port = settings.mlflow_port
    command = python(
        "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1",
        "--backend-store-uri", settings.mlflow_uri,
        "--artifacts-destination", str(settings.mlflow_artifacts),
        "--allowed-hosts", f"localhost:{port},{HOST}:{port}",
    )  # fmt: skip
    return Service(
        name="mlflow",
        command=command,
        address=settings.mlflow_url,
        healthy=lambda _: is_up(settings.mlflow_url),
        port=port,
        port_variable="AUTOGLM_MLFLOW_PORT",
    )


def serves_mlflow_elsewhere(settings: Settings) -> bool:
    return settings.mlflow_uri.startswith(("http://", "https://"))


def python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", *arguments)


def environment(settings: Settings) -> Mapping[str, str]:
    """What servers, worker and flows share, whatever directory they are started from."""
    return os.environ | {
        "AUTOGLM_HOME": str(settings.home),
        "AUTOGLM_TRACKING_URI": settings.tracking_uri,
        "AUTOGLM_PREFECT_PORT": str(settings.prefect_port),
        "AUTOGLM_MLFLOW_PORT": str(settings.mlflow_port),
        "PREFECT_HOME": str(settings.home / "prefect"),
        "PREFECT_API_URL": f"{settings.prefect_url}/api",
        "PREFECT_SERVER_API_HOST": HOST,
        "PREFECT_SERVER_API_PORT": str(settings.prefect_port),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_LOGGING_EXTRA_LOGGERS": LOGGER,  # progress lines are shown among the run's logs
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
    }


def heartbeat_since(started: datetime, settings: Settings) -> bool:
    """Whether the worker has reported to the server since it was started."""
    request = urllib.request.Request(
        f"{settings.prefect_url}/api/work_pools/{POOL}/workers/filter",
        data=b"{}",
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            workers: list[dict[str, Any]] = json.load(response)
    except OSError:  # no server, or no pool yet: the worker creates it
        return False
    beats = [worker["last_heartbeat_time"] for worker in workers if worker["status"] == "ONLINE"]
    return any(datetime.fromisoformat(beat) > started for beat in beats)


# ── processes ────────────────────────────────────────────────────────────────────────────────────


class Processes:
    """Starts, finds and ends services by the pid files and logs under one home."""

    def __init__(self, home: Path, environment: Mapping[str, str]) -> None:
        self._home = home
        self._environment = environment

    def find(self, service: Service) -> Running | None:
        """The service's process, if it runs; otherwise what is left of its pid file is removed.

        The kernel gives the pid of a dead process to another one, so the command line must match too.
        """
        path = self._pid_path(service)
        if not path.exists():
            return None
        record = json.loads(path.read_text())
        with suppress(psutil.Error):
            process = psutil.Process(record["pid"])
            if process.cmdline() == record["command"]:
                return Running(process, datetime.fromisoformat(record["started"]))
        path.unlink()
        return None

    def start(self, service: Service) -> None:
        """Start the service in a process group of its own. Raises UserError if its port is taken."""
        if service.port is not None and is_taken(service.port):
            raise UserError(
                f"{service.name} cannot start: another program listens on port {service.port}; "
                f"stop it, or set {service.port_variable} to a free port"
            )
        started = datetime.now(UTC).isoformat()
        with self._log(service.name).open("ab") as output:
            process = subprocess.Popen(service.command, start_new_session=True, **self._surroundings(output))
        record = {"pid": process.pid, "started": started, "command": service.command}
        write_atomic(self._pid_path(service), json.dumps(record))

    def wait_until_healthy(self, service: Service) -> None:
        """Return once the service works. Raises UserError with the end of its log if it does not."""
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline:
            running = self.find(service)
            if running is None:
                raise UserError(f"{service.name} ended while it started; {self._end_of_log(service.name)}")
            if service.healthy(running.started):
                return
            time.sleep(0.5)
        raise UserError(f"{service.name} is silent after {START_LIMIT_S} s; {self._end_of_log(service.name)}")

    def stop(self, service: Service) -> bool:
        """End the service and all it started, the stubborn with SIGKILL. False if it was down."""
        running = self.find(service)
        if running is None:
            return False
        family = [running.process, *running.process.children(recursive=True)]
        os.killpg(running.process.pid, signal.SIGTERM)
        _, stubborn = psutil.wait_procs(family, timeout=STOP_LIMIT_S)
        for survivor in stubborn:
            with suppress(psutil.NoSuchProcess):
                survivor.kill()
        psutil.wait_procs(stubborn, timeout=5)
        self._pid_path(service).unlink()
        return True

    def run(self, name: str, command: tuple[str, ...]) -> None:
        """Run a command to its end. Raises UserError with the end of its log if it fails."""
        with self._log(name).open("ab") as output:
            done = subprocess.run(command, check=False, **self._surroundings(output))
        if done.returncode != 0:
            raise UserError(f"{name} failed; {self._end_of_log(name)}")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep a second `up` or `down` out. Raises UserError if one is at work."""
        try:
            with file_lock(self._home / "run" / "stack.lock", blocking=False):
                yield
        except BlockingIOError:
            raise UserError("another make up or make down is at work: wait until it has finished") from None

    def _surroundings(self, output: IO[bytes]) -> dict[str, Any]:
        return {
            "cwd": PROJECT,
            "env": self._environment,
            "stdin": subprocess.DEVNULL,
            "stdout": output,
            "stderr": subprocess.STDOUT,
        }

    def _pid_path(self, service: Service) -> Path:
        return self._home / "run" / f"{service.name}.json"

    def _log(self, name: str) -> Path:
        path = self._home / "logs" / f"{name}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _end_of_log(self, name: str) -> str:
        path = self._log(name)
        return f"{path} ends with:\n" + "\n".join(path.read_text(errors="replace").splitlines()[-5:])


def is_taken(port: int) -> bool:
    """Whether somebody listens on the port; the last connections of an ended server do not count."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return True
    return False


# ── commands ─────────────────────────────────────────────────────────────────────────────────────


@click.group()
def cli() -> None:
    """Prefect's server, MLflow's server and one worker, on this machine only."""


@cli.command()
def up() -> None:
    """Start what is down, wait until it works, and deploy prefect.yaml."""
    settings = Settings()
    processes = Processes(settings.home, environment(settings))
    with processes.alone():
        servers = [service for service in services(settings) if service.port is not None]
        others = [service for service in services(settings) if service.port is None]
        for together in (servers, others):
            bring_up(processes, together)
        processes.run("deploy", python("prefect", "--no-prompt", "deploy", "--all"))
    log.info("run a study: %s, or", f"{settings.prefect_url}/deployments")


def bring_up(processes: Processes, wanted: list[Service]) -> None:
    """Start services side by side and wait for all of them."""
    for service in wanted:
        if processes.find(service) is None:
            processes.start(service)
    for service in wanted:
        processes.wait_until_healthy(service)
        log.info("%-8s is up: %s", service.name, service.address)


@cli.command()
def down() -> None:
    """Stop the worker first, so that it can tell the server, then the servers."""
    settings = Settings()
    processes = Processes(settings.home, environment(settings))
    with processes.alone():
        for service in reversed(services(settings)):
            was_up = processes.stop(service)
            log.info("%-8s %s", service.name, "stopped" if was_up else "was not up")


@cli.command()
def status() -> None:
    """Say what runs; exit code 1 unless all of it works."""
    settings = Settings()
    processes = Processes(settings.home, environment(settings))
    works = True
    for service in services(settings):
        running = processes.find(service)
        state = "down"
        if running is not None:
            state = "up" if service.healthy(running.started) else "does not answer"
        works = works and state == "up"
        log.info("%-8s %-16s %s", service.name, state, service.address)
    sys.exit(0 if works else 1)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        cli()
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
