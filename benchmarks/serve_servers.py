"""Servers under test: how each is started, asked, held still while another is asked, and what it uses."""

from __future__ import annotations

import contextlib
import http.client
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from open_autoglm.measure.child import die_with
from open_autoglm.measure.interference import kernel_text

Body = Callable[[Sequence[int], int], dict[str, Any]]
"""From a prompt's token ids and the tokens to generate to the JSON of a request."""

_START_S = 180


class NotStarted(Exception):
    """It did not; the message says why."""


class Spec(NamedTuple):
    """How a server is started and asked. ``{port}`` in the command is replaced."""

    command: tuple[str, ...]
    health: str
    body: Body
    environment: Mapping[str, str] = {}


class Server:
    """One server and all its processes. Raises NotStarted."""

    def __init__(self, spec: Spec, log: Path) -> None:
        self.spec = spec
        self.port = _free_port()
        self._log = log
        command = [part.replace("{port}", str(self.port)) for part in spec.command]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=partial(die_with, os.getpid()),  # however this process ends
                env={**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", **spec.environment},
            )
        try:
            self._wait()
        except NotStarted:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def _wait(self) -> None:
        deadline = time.monotonic() + _START_S
        while not self.answers():
            if self._process.poll() is not None:
                raise NotStarted(f"ended with exit code {self._process.returncode}: {self.last_words()}")
            if time.monotonic() > deadline:
                raise NotStarted(f"was not ready within {_START_S} s: {self.last_words()}")
            time.sleep(0.2)

    def answers(self) -> bool:
        """Whether its health page says that it is well."""
        return self.get(self.spec.health)[0] == 200

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body of a page; 0 if nobody answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        with contextlib.closing(connection), contextlib.suppress(OSError):
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        return 0, b""

    def last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Let it run inside the block; otherwise it is stopped, so that an idle loop costs others nothing."""
        os.killpg(self.pid, signal.SIGCONT)
        try:
            yield
        finally:
            self.freeze()

    def freeze(self) -> None:
        os.killpg(self.pid, signal.SIGSTOP)

    def close(self) -> None:
        """End all its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()


def cpu_s(pid: int) -> float:
    """Processor time of a process and its descendants so far."""
    times = [process.cpu_times() for process in _tree(pid)]
    return float(sum(spent.user + spent.system for spent in times))


def pss_bytes(pid: int) -> int:
    """Their memory, shared pages divided among those who share them. Walks page tables: not while timing."""
    return int(sum(process.memory_full_info().pss for process in _tree(pid)))


def own_bytes(pid: int) -> tuple[int, ...]:
    """RssAnon of the process and of each descendant: what it allocated, whoever else maps the same files."""
    texts = [kernel_text(Path(f"/proc/{process.pid}/status")) for process in _tree(pid)]
    found = [re.search(r"^RssAnon:\s+(\d+) kB$", text, re.MULTILINE) for text in texts]
    return tuple(int(match[1]) * 1024 for match in found if match)


def _tree(pid: int) -> list[psutil.Process]:
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ── how each is started ──────────────────────────────────────────────────────────────────────────

NAME = "served"
_BLOCK_TOKENS = 256
"""Of a block in transformers' cache, by its default."""
_GREEDY = {"temperature": 0, "stream": True}


def ours(bundle: Path, slots: int, max_tokens: int, *options: str) -> Spec:
    """``open-autoglm serve``; nobody is refused for waiting."""
    limits = ("--queue", "100000", "--deadline-s", "100000")
    size = ("--slots", str(slots), "--max-tokens", str(max_tokens))
    command = (sys.executable, "-m", "open_autoglm.cli", "serve", str(bundle), "--port", "{port}")
    return Spec((*command, "--name", NAME, *size, *limits, *options), "/readyz", openai_body)


def llama_server(binary: Path, gguf: Path, slots: int, max_tokens: int, threads: int) -> Spec:
    """llama.cpp's own server: as many slots, each with the same room (``-c`` is for all together)."""
    size = ("-np", str(slots), "-c", str(slots * max_tokens), "-t", str(threads), "-tb", str(threads))
    where = ("--host", "127.0.0.1", "--port", "{port}")
    return Spec((str(binary), "-m", str(gguf), *size, *where), "/health", openai_body)


def transformers_serve(
    checkpoint: Path, slots: int, max_tokens: int, decode: Callable[[Sequence[int]], str]
) -> Spec:
    """torch as transformers documents it for a server: bf16 and continuous batching (huggingface.co/docs,
    "Serving"). Its ``--compile`` compiles on GPUs only. Its cache has twice the blocks that the slots need;
    left to itself it takes 60 % of the host's memory. Prompts are text, so their lengths may differ by a
    token; nothing ends an answer but its length.
    """
    blocks = 2 * slots * math.ceil(max_tokens / _BLOCK_TOKENS)

    def body(prompt: Sequence[int], output_tokens: int) -> dict[str, Any]:
        settings = '{"do_sample": false, "eos_token_id": null}'
        asked = {"prompt": decode(prompt), "max_tokens": output_tokens, "generation_config": settings}
        return {"model": str(checkpoint), **asked, **_GREEDY}

    command = (sys.executable, "-m", "transformers.cli.transformers", "serve", str(checkpoint))
    cache = ("--cb-num-blocks", str(blocks))
    how = ("--continuous-batching", "--dtype", "bfloat16", "--device", "cpu", *cache)
    where = ("--host", "127.0.0.1", "--port", "{port}")
    return Spec((*command, *how, *where), "/health", body)


def openai_body(prompt: Sequence[int], output_tokens: int) -> dict[str, Any]:
    """A completion of token ids that goes on to its length, as vLLM and llama.cpp understand it too."""
    told = {"stream_options": {"include_usage": True}, "ignore_eos": True}
    return {"model": NAME, "prompt": list(prompt), "max_tokens": output_tokens, **_GREEDY, **told}
