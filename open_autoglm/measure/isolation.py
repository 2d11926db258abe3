"""Run jobs in a fresh process that cannot hurt anyone else.

A job is a function ``module:name`` that takes one glossary model and returns another. The child
reads requests from stdin, one per line, and answers on a pipe of its own (so nothing a runtime prints can
corrupt an answer). It dies with its parent. Whatever goes wrong is returned as a :class:`Failure`.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from open_autoglm.schemas import Model, TrialStatus

Answer = TypeVar("Answer", bound=Model)

_OUT_OF_MEMORY = (
    "MemoryError",
    "bad_alloc",
    "can't allocate memory",
    "not enough memory",
    "CUDA out of memory",  # torch, where it is wrapped in another error
    "out of memory (2)",  # cudaErrorMemoryAllocation, as TensorRT prints it
    "CUDA failure 2:",  # the same, as ONNX Runtime does
    "CUDA_ERROR_OUT_OF_MEMORY",
    "cudaErrorMemoryAllocation",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "Failed to allocate memory for requested buffer of size",  # ONNX Runtime's arena, on any device
    "is smaller than requested bytes of",  # the same, at its limit
    "OutOfMemory",  # the type of torch's error, and a word of TensorRT's builder
)
"""What runtimes say, in an exception or in the log of a process that died, when there is no more memory."""


@dataclass(frozen=True)
class Failure:
    """What became of a job that gave no answer."""

    status: TrialStatus
    reason: str


class Interrupted(Exception):
    """Raised instead of starting a child once `stop_children` was called."""


class _Children:
    """The live children of this process, so that an interrupt can end them all."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._alive: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def add(self, child: subprocess.Popen[bytes]) -> None:
        with self._lock:
            self._alive.add(child)
        if self._stopped:
            kill_group(child)

    def remove(self, child: subprocess.Popen[bytes]) -> None:
        with self._lock:
            self._alive.discard(child)

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            for child in self._alive:
                kill_group(child)

    @property
    def stopped(self) -> bool:
        return self._stopped


_children = _Children()
stop_children = _children.stop


def kill_group(child: subprocess.Popen[bytes]) -> None:
    """SIGKILL the child and everything it started (compilers, say); silent if all are gone already."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


class Child:
    """A process of its own that runs one job after another until it fails or is closed.

    ``log`` receives its stdout and stderr. ``memory_limit_bytes`` caps its data segment, ``cpus`` are the
    cores it may run on. It dies with the *thread* that made it: keep that alive as long as the child.
    Raises Interrupted, here and in `ask`, once `stop_children` was called.
    """

    def __init__(
        self,
        log: Path,
        *,
        environment: Mapping[str, str] | None = None,
        memory_limit_bytes: int | None = None,
        cpus: tuple[int, ...] = (),
    ) -> None:
        if _children.stopped:
            raise Interrupted("interrupted")
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        self._failure: Failure | None = None
        self._closed = False
        self._answers, writer = os.pipe()
        try:
            with log.open("wb") as output:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "open_autoglm.measure.child", str(writer)],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    pass_fds=(writer,),
                    start_new_session=True,
                    env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
                )
        except OSError:
            os.close(self._answers)
            raise
        finally:
            os.close(writer)
        _children.add(self._process)
        self._send({"parent": os.getpid(), "memory_limit_bytes": memory_limit_bytes, "cpus": cpus})

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, job: str, payload: Model, answer_type: type[Answer], timeout_s: float) -> Answer | Failure:
        """Run ``job(payload)`` there; its answer, or why there is none. A child that failed stays failed."""
        if self._failure is not None:
            return self._failure
        kind = type(payload)
        payload_type = f"{kind.__module__}:{kind.__qualname__}"
        self._send({"job": job, "payload_type": payload_type, "payload": payload.model_dump(mode="json")})
        try:
            line = self._receive(time.monotonic() + timeout_s)
        except TimeoutError:
            self.close()
            self._failure = Failure("timed_out", f"gave no answer within {timeout_s:g} s and was killed")
            return self._failure
        said = _parse(line)
        if "result" in said:
            return answer_type.model_validate(said["result"])
        self.close(grace_s=5)
        if _children.stopped:
            raise Interrupted("interrupted")
        self._failure = _explain(said, self._process.returncode, self._log)
        return self._failure

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is gone: its answers will end, and that says why
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def _receive(self, deadline: float) -> bytes:
        """One line, or what came before the pipe's end. Raises TimeoutError."""
        received = b""
        while not received.endswith(b"\n"):
            ready, _, _ = select.select([self._answers], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            part = os.read(self._answers, 1 << 20)
            if not part:
                break
            received += part
        return received

    def close(self, grace_s: float = 0.0) -> None:
        """End the process and everything it started; ``grace_s`` lets a dying one tell its exit code."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(grace_s)
        kill_group(self._process)
        self._process.wait()
        _children.remove(self._process)
        os.close(self._answers)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._failure = self._failure or Failure("failed", "was closed")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()


def run_isolated(
    job: str,
    payload: Model,
    answer_type: type[Answer],
    *,
    log: Path,
    timeout_s: float,
    environment: dict[str, str] | None = None,
    memory_limit_bytes: int | None = None,
) -> Answer | Failure:
    """Run one ``job(payload)`` in a child of its own; return its answer or why there is none."""
    with Child(log, environment=environment, memory_limit_bytes=memory_limit_bytes) as child:
        return child.ask(job, payload, answer_type, timeout_s)


def _parse(line: bytes) -> dict[str, Any]:
    try:
        said: dict[str, Any] = json.loads(line)
    except ValueError:  # none, or cut off in the middle
        return {}
    return said


def _explain(said: Mapping[str, Any], code: int, log: Path) -> Failure:
    """What became of a child that gave no result."""
    tail = log.read_text(errors="replace")[-4000:]
    if error := said.get("error"):
        kind, message = error["type"], error["message"]
        if kind == "IncorrectOutput":
            return Failure("incorrect", message)
        if any(sign in f"{kind}: {message}" for sign in _OUT_OF_MEMORY):
            return Failure("out_of_memory", f"ran out of memory ({kind}: {_first_line(message)})")
        return Failure("failed", f"{kind}: {_first_line(message)}")
    if any(sign in tail for sign in _OUT_OF_MEMORY):
        return Failure("out_of_memory", f"ran out of memory and ended with {_describe_exit(code)}")
    if code == -signal.SIGKILL:
        return Failure("out_of_memory", "was killed by SIGKILL, most likely by the kernel for lack of memory")
    if code == 0:
        return Failure("crashed", "ended without an answer")
    return Failure("crashed", f"ended with {_describe_exit(code)}")


def _describe_exit(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _first_line(message: str) -> str:
    line = message.strip().split("\n")[0]
    return line if len(line) <= 300 else line[:297] + "..."
