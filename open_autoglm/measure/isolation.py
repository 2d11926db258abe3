"""Run one job in a fresh process that cannot hurt anyone else.

A job is a function ``module:name`` that takes one glossary model and returns another. The child
reads it from stdin, answers on a pipe of its own (so nothing a runtime prints can corrupt the
answer), and dies with its parent. Whatever goes wrong is returned as a :class:`Failure`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from open_autoglm.schemas import Model, TrialStatus

Answer = TypeVar("Answer", bound=Model)

_OUT_OF_MEMORY = (
    "MemoryError",
    "bad_alloc",
    "can't allocate memory",
    "not enough memory",
    "OutOfMemoryError",
)


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
    """Run ``job(payload)`` in a child; return its answer or why there is none.

    ``log`` receives the child's stdout and stderr. ``memory_limit_bytes`` caps its data segment.
    """
    if _children.stopped:
        raise Interrupted("interrupted")
    request = json.dumps(
        {
            "job": job,
            "payload_type": f"{type(payload).__module__}:{type(payload).__qualname__}",
            "payload": payload.model_dump(mode="json"),
            "parent": os.getpid(),
            "memory_limit_bytes": memory_limit_bytes,
        }
    )
    log.parent.mkdir(parents=True, exist_ok=True)
    reader, writer = os.pipe()
    with log.open("wb") as output, os.fdopen(reader, "rb") as answer_pipe:
        try:
            child = subprocess.Popen(
                [sys.executable, "-m", "open_autoglm.measure.child", str(writer)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(writer,),
                start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
            )
        finally:
            os.close(writer)
        answer, timed_out = _converse(child, request.encode(), answer_pipe, timeout_s)
    if _children.stopped:
        raise Interrupted("interrupted")
    if timed_out:
        return Failure("timed_out", f"gave no answer within {timeout_s:g} s and was killed")
    return _interpret(answer, child.returncode, log, answer_type)


def _converse(
    child: subprocess.Popen[bytes], request: bytes, answer_pipe: IO[bytes], timeout_s: float
) -> tuple[bytes, bool]:
    """Send the request, collect the answer, wait for the end; (answer, timed out)."""
    answer: list[bytes] = []
    reader = threading.Thread(target=lambda: answer.append(answer_pipe.read()), daemon=True)
    reader.start()
    _children.add(child)
    timed_out = False
    try:
        child.communicate(request, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        timed_out = True
    finally:
        kill_group(child)
        child.wait()
        _children.remove(child)
    reader.join(timeout=5)
    return (answer[0] if answer else b""), timed_out


def _interpret(answer: bytes, code: int, log: Path, answer_type: type[Answer]) -> Answer | Failure:
    """Turn the child's answer and exit code into a model or a failure with its reason."""
    try:
        said = json.loads(answer)
    except ValueError:  # none, or cut off in the middle
        said = {}
    if code == 0 and "result" in said:
        return answer_type.model_validate(said["result"])
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
