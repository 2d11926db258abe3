"""The local stack: Prefect's server, MLflow's server and one worker, all on loopback.

    python infra/stack.py up | down | status

Each service has a pid file in ``$AUTOGLM_HOME/run`` and a log in ``$AUTOGLM_HOME/logs``.
Only processes named there, and only while they still run the command written there, are ever signalled.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

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
STOP_LIMIT_S = 30

log = logging.getLogger("stack")


@dataclass(frozen=True)
class Running:
    """A service's process and when it was started."""

    process: psutil.Process
    started: datetime


@dataclass(frozen=True)
class Service:
    """One process of the stack. ``healthy`` asks it whether it works, given when it was started."""

    name: str
    command: tuple[str, ...]
    healthy: Callable[[datetime], bool]
    port: int | None = None
    port_variable: str = ""

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.port}" if self.port else f"pool {POOL}"


class Stack:
    """The services, where they keep their pid files and logs, and their common environment."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.services = services(settings)
        self.environment = os.environ | environment(settings)

    def pid_path(self, service: Service) -> Path:
        return self.settings.home / "run" / f"{service.name}.json"

    def log_path(self, name: str) -> Path:
        return self.settings.home / "logs" / f"{name}.log"

    def find(self, service: Service) -> Running | None:
        """The service's process, if the one that was started still runs; a stale pid file is removed.

        A pid is used again after its owner has gone, so the command line must be ours too.
        """
        path = self.pid_path(service)
        if not path.exists():
            return None
        record = json.loads(path.read_text())
        try:
            process = psutil.Process(record["pid"])
            if process.cmdline() == record["command"]:
                return Running(process, datetime.fromisoformat(record["started"]))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            pass
        path.unlink()
        return None

    def start(self, service: Service) -> bool:
        """Start the service unless it runs. Raises UserError if its port is taken."""
        if self.find(service) is not None:
            log.info("%s is already up", service.name)
            return False
        if service.port is not None and port_taken(service.port):
            raise UserError(
                f"{service.name} cannot start: another program listens on port {service.port}; "
                f"stop it, or set {service.port_variable} to a free port"
            )
        path = self.log_path(service.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        started = datetime.now(UTC)
        with path.open("ab") as output:
            process = subprocess.Popen(
                service.command,
                cwd=PROJECT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        record = {"pid": process.pid, "command": service.command, "started": started.isoformat()}
        write_atomic(self.pid_path(service), json.dumps(record))
        return True

    def wait_until_healthy(self, service: Service) -> None:
        """Return once the service answers. Raises UserError, with the end of its log, if it does not."""
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline:
            running = self.find(service)
            if running is None:
                raise UserError(f"{service.name} ended while starting; {self._end_of_log(service.name)}")
            if service.healthy(running.started):
                log.info("%s is up: %s", service.name, service.address)
                return
            time.sleep(0.5)
        raise UserError(
            f"{service.name} gave no answer within {START_LIMIT_S} s; {self._end_of_log(service.name)}"
        )

    def stop(self, service: Service) -> None:
        """End the service and what it started: SIGTERM, and SIGKILL for what is left after a while."""
        running = self.find(service)
        if running is None:
            return
        family = [running.process, *running.process.children(recursive=True)]
        os.killpg(running.process.pid, signal.SIGTERM)
        _, stubborn = psutil.wait_procs(family, timeout=STOP_LIMIT_S)
        for process in stubborn:
            process.kill()
        psutil.wait_procs(stubborn, timeout=5)
        self.pid_path(service).unlink(missing_ok=True)
        log.info("%s is down", service.name)

    def deploy(self) -> None:
        """Register what prefect.yaml describes; doing it again updates it."""
        path = self.log_path("deploy")
        with path.open("wb") as output:
            done = subprocess.run(
                prefect("--no-prompt", "deploy", "--all"),
                cwd=PROJECT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if done.returncode != 0:
            raise UserError(f"prefect.yaml could not be deployed; {self._end_of_log('deploy')}")

    def _end_of_log(self, name: str) -> str:
        path = self.log_path(name)
        return f"{path} ends with:\n" + "\n".join(path.read_text(errors="replace").splitlines()[-5:])
