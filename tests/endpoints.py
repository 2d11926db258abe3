"""A server as a user starts it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil

from open_autoglm.serving.local import local_endpoints

_URL = re.compile(r"at (https?://\S+)/v1")
_START_S = 120


class Endpoint:
    """One ``open-autoglm serve``."""

    def __init__(
        self,
        bundle: Path,
        home: Path,
        *options: str,
        environment: Mapping[str, str] | None = None,
        program: Sequence[str] = ("-m", "open_autoglm.cli"),
    ) -> None:
        self.home = home
        command = [sys.executable, *program, "serve", str(bundle), "--port", "0", *options]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "AUTOGLM_HOME": str(home),
                "PYTHONUNBUFFERED": "1",
                **(environment or {}),
            },
        )
        self.said: list[str] = []
        # What it says must be read, or it stops when the pipe is full.
        self._reader = threading.Thread(target=self._read_errors, daemon=True)
        self._reader.start()
        self.url = self._wait()

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        self.said += self.process.stderr

    def _wait(self) -> str:
        assert self.process.stdout is not None
        timer = threading.Timer(_START_S, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        match = _URL.search(line)
        if match is None:
            self.process.wait()
            self._reader.join()
            raise AssertionError(f"it did not start: {line}{''.join(self.said)}")
        return match[1]

    @property
    def engine_pid(self) -> int:
        """The child of the server that is the engine."""
        children = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        pids = [int(pid) for path in children for pid in path.read_text().split()]
        return next(pid for pid in pids if "engine_main" in Path(f"/proc/{pid}/cmdline").read_text())

    def stop(self, sign: int = signal.SIGTERM) -> int:
        """Its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(sign)
        return self.process.wait(60)


def metric(exposition: str, name: str, **labels: str) -> float:
    """The sum of the series of that name, of those with these labels."""
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    found = [
        line
        for line in exposition.splitlines()
        if re.match(rf"{name}[{{ ]", line) and all(pair in line for pair in wanted)
    ]
    assert found, f"no {name} with {labels}"
    return sum(float(line.split()[-1]) for line in found)


@contextlib.contextmanager
def endpoint(bundle: Path, home: Path, *options: str, **more: Any) -> Iterator[Endpoint]:
    """Serve ``bundle`` for the length of the block."""
    server = Endpoint(bundle, home, *options, **more)
    try:
        yield server
    finally:
        server.stop(signal.SIGKILL)


@contextlib.contextmanager
def administration(served: Endpoint) -> Iterator[httpx.Client]:
    """A client with the server's own key."""
    (here,) = local_endpoints(served.home)
    headers = {"Authorization": f"Bearer {here.token}"}
    with httpx.Client(base_url=served.url, headers=headers, timeout=60) as client:
        yield client


def engine_of(served: Endpoint) -> psutil.Process:
    (found,) = [
        process
        for process in psutil.Process(served.process.pid).children(recursive=True)
        if "open_autoglm.serving.engine_main" in process.cmdline()
    ]
    return found


@contextlib.contextmanager
def slowed(process: psutil.Process, *, stopped_s: float, running_s: float) -> Iterator[None]:
    """Stop and continue the process in turn: its work is the same, and takes longer."""
    ended = threading.Event()

    def pace() -> None:
        while not ended.is_set():
            os.kill(process.pid, signal.SIGSTOP)
            time.sleep(stopped_s)
            os.kill(process.pid, signal.SIGCONT)
            time.sleep(running_s)

    thread = threading.Thread(target=pace)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
