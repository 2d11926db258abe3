"""The child's side of :mod:`open_autoglm.measure.isolation`: ``python -m open_autoglm.measure.child FD``.

Standard input carries JSON, one object a line: first the conditions of its life, then requests. Each is
answered on file descriptor FD by one line, ``{"result": …}`` or ``{"error": {"type": …, "message": …}}``; an
error is the last answer. The end of standard input is the end of the child.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import traceback
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

_PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Ask the kernel to kill this process when its parent dies; exit at once if it already has."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def volunteer_for_the_oom_killer() -> None:
    """If memory runs out, the kernel shall take the trial, not the study."""
    Path("/proc/self/oom_score_adj").write_text("1000")


def resolve(reference: str) -> Any:
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)


def accept_conditions(conditions: dict[str, Any]) -> None:
    """Die with the parent, be the first to go when memory runs out, stay within limit and cores."""
    die_with(conditions["parent"])
    volunteer_for_the_oom_killer()
    if limit := conditions["memory_limit_bytes"]:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    if cpus := conditions["cpus"]:
        os.sched_setaffinity(0, cpus)


def main() -> None:
    answers = int(sys.argv[1])

    def answer(content: dict[str, Any]) -> None:
        with os.fdopen(os.dup(answers), "w") as pipe:
            pipe.write(json.dumps(content) + "\n")

    def report_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        traceback.print_exception(kind, error, trace)
        answer({"error": {"type": kind.__name__, "message": str(error)}})

    accept_conditions(json.loads(sys.stdin.readline()))
    sys.excepthook = report_error
    for line in sys.stdin:
        request = json.loads(line)
        payload = resolve(request["payload_type"]).model_validate(request["payload"])
        result = resolve(request["job"])(payload)
        sys.stdout.flush()
        answer({"result": result.model_dump(mode="json")})
    # A runtime that crashes while it is torn down has given its answers already.
    os._exit(0)


if __name__ == "__main__":
    main()
