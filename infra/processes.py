"""Services on this machine: each is started, found again and ended through a pid file and a log.

Only a process that a pid file names, and that was born when the file says, is ever signalled.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import psutil

from open_autoglm.errors import UserError
from open_autoglm.files import file_lock, write_atomic

HOST = "127.0.0.1"
START_LIMIT_S = 120
"""The first start creates databases: 20 s on two idle cores."""
STOP_LIMIT_S = 45
"""Prefect gives a flow 30 s to end before it kills it."""


@dataclass(frozen=True)
class Service:
    """One process to keep, and how to ask it whether it works (given when it was started)."""

    name: str
    command: tuple[str, ...]
    address: str
    healthy: Callable[[datetime], bool]
    port: int | None = None
    port_variable: str = ""


@dataclass(frozen=True)
class Running:
    """A service's process, as its pid file describes it."""

    pid: int
    command: tuple[str, ...]
    started: datetime


class Processes:
    """Services by their pid files (``home/run``) and logs (``home/logs``), and what they have in common."""

    def __init__(self, home: Path, directory: Path, environment: Mapping[str, str]) -> None:
        self._home = home
        self._directory = directory
        self._environment = environment

    def find(self, service: Service) -> Running | None:
        """The service's process if it runs; a pid file whose process is gone is removed."""
        path = self._pid_path(service)
        if not path.exists():
            return None
        record = json.loads(path.read_text())
        if record["birth"] is None or record["birth"] != birth(record["pid"]):
            path.unlink()
            return None
        return Running(record["pid"], tuple(record["command"]), datetime.fromisoformat(record["started"]))

    def state(self, service: Service) -> str:
        """``up``, ``down`` or ``does not answer``."""
        running = self.find(service)
        if running is None:
            return "down"
        return "up" if service.healthy(running.started) else "does not answer"

    def start(self, service: Service) -> None:
        """Start the service, in a process group of its own, unless it runs.

        Raises UserError if its port is taken, or if it runs with another command line.
        """
        running = self.find(service)
        if running is not None:
            if running.command != service.command:
                raise UserError(f"{service.name} runs already, with other settings: make down first")
            return
        if service.port is not None and is_taken(service.port):
            raise UserError(
                f"{service.name} cannot start: another program listens on port {service.port}; "
                f"stop it, or set {service.port_variable} to a free port"
            )
        started = datetime.now(UTC).isoformat()
        with self._log(service.name).open("ab") as output:
            process = subprocess.Popen(service.command, start_new_session=True, **self._surroundings(output))
        record = {
            "pid": process.pid,
            "birth": birth(process.pid),
            "started": started,
            "command": service.command,
        }
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
        process = psutil.Process(running.pid)
        family = [process, *process.children(recursive=True)]
        os.killpg(running.pid, signal.SIGTERM)
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
        """Keep others from starting and stopping services. Raises UserError if somebody does."""
        try:
            with file_lock(self._home / "run" / "stack.lock", blocking=False):
                yield
        except BlockingIOError:
            raise UserError("another make up or make down is at work: wait until it has finished") from None

    def _surroundings(self, output: IO[bytes]) -> dict[str, Any]:
        return {
            "cwd": self._directory,
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


def birth(pid: int) -> str | None:
    """When a live process was started, in the kernel's ticks since boot; None if it is gone.

    Pids are used again. Together with its birth a pid means one process, whatever the clock does.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # proc(5), from field 3 on
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]


def is_taken(port: int) -> bool:
    """Whether somebody listens on the port; the last connections of an ended server do not count."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return True
    return False
