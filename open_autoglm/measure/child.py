"""The child's side of :mod:`open_autoglm.measure.isolation`: ``python -m open_autoglm.measure.child FD``.

Standard input carries one request; the answer goes to file descriptor FD as one JSON object,
``{"result": …}`` or ``{"error": {"type": …, "message": …}}``.
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


def main() -> None:
    answer_descriptor = int(sys.argv[1])
    request = json.load(sys.stdin)
    die_with(request["parent"])
    volunteer_for_the_oom_killer()
    if limit := request["memory_limit_bytes"]:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    def answer(content: dict[str, Any]) -> None:
        with os.fdopen(os.dup(answer_descriptor), "w") as pipe:
            json.dump(content, pipe)

    def report_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        traceback.print_exception(kind, error, trace)
        answer({"error": {"type": kind.__name__, "message": str(error)}})

    sys.excepthook = report_error
    payload = resolve(request["payload_type"]).model_validate(request["payload"])
    result = resolve(request["job"])(payload)
    answer({"result": result.model_dump(mode="json")})
    sys.stdout.flush()
    # A runtime that crashes while it is torn down has given its answer already.
    os._exit(0)


if __name__ == "__main__":
    main()
