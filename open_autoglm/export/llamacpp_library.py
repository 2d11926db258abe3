"""llama.cpp's C library, with what it says in hand."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

_WARNING, _ERROR = 3, 4
"""From ggml.h. llama-cpp-python 0.3.36 still has the older numbers, by which errors would be lost."""


class Library(NamedTuple):
    """The functions and structures of llama.h, as llama-cpp-python declares them."""

    c: Any
    errors: deque[str]
    """The last lines that it called errors, the newest last: the first of a failure names the cause."""
    callback: Callable[..., None]
    """Kept, or the library would call into freed memory."""

    def why(self, what: str) -> RuntimeError:
        """``what`` went wrong, with llama.cpp's own reasons if it gave any."""
        reasons = "; ".join(self.errors)
        self.errors.clear()
        return RuntimeError(f"{what}: {reasons}" if reasons else what)


@cache
def llama_cpp() -> Library:
    """Load the library and start its backend, once per process.

    It writes only warnings and errors, to stderr: otherwise it lists every tensor that it reads.
    """
    import llama_cpp as c

    errors: deque[str] = deque(maxlen=5)

    def listen(level: int, text: bytes, _: Any) -> None:
        line = text.decode(errors="replace")
        if level == _ERROR:
            errors.append(line.strip())
        if level in (_WARNING, _ERROR):
            sys.stderr.write(line)

    callback = c.llama_log_callback(listen)
    c.llama_log_set(callback, None)
    c.llama_backend_init()
    return Library(c, errors, callback)
