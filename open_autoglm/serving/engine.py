"""The server's view of the engine's process: start it, ask it, start it again when it has died."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Literal

from open_autoglm.serving.messages import Command, EngineOptions, Generation, Load, Ready, Report, Token

State = Literal["starting", "ready", "restarting", "closed"]
ErrorCode = Literal["engine_lost", "not_finite"]
"""Why there is no answer, as clients are told."""

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_STEADY_S = 60.0
"""An engine that ran so long had started well: the next pause is the first again."""


class EngineLost(Exception):
    """The engine ended before the answer did, or is not there; the same request may succeed later."""

    code: ErrorCode = "engine_lost"


class NotFinite(EngineLost):
    """The model computed NaN or infinity; the engine lives, but this request has no answer from it."""

    code: ErrorCode = "not_finite"


class Engine:
    """One engine process and its successors."""

    def __init__(self, options: EngineOptions, log: Path, *, first_pause_s: float = _FIRST_PAUSE_S) -> None:
        self._options = options
        self._log = log
        self._first_pause_s = first_pause_s
        self._answers: dict[str, asyncio.Queue[Token | None]] = {}
        self._pipe: asyncio.WriteTransport | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._settled = asyncio.Event()
        """The first process has become ready, or has ended."""
        self.state: State = "starting"
        self.ready: Ready | None = None
        self.load = Load()
        self.restarts = 0
        self.slower = 0.0
        """By what share this process was made slower, to rehearse; the next one is not."""
        self.pid: int | None = None
        self.last_words = ""
        """Why the last process ended; empty if none did."""

    # ── life ─────────────────────────────────────────────────────────────────────────────────────

    async def start(self, timeout_s: float) -> None:
        """Start the process and wait until it is ready. Raises EngineLost with its last words."""
        self._keeper = asyncio.create_task(self._keep())
        try:
            await asyncio.wait_for(self._settled.wait(), timeout_s)
        except TimeoutError as error:
            await self.close()
            raise EngineLost(f"the engine was not ready within {timeout_s:g} s; see {self._log}") from error
        if self.state != "ready":
            await self.close()
            raise EngineLost(self.last_words)

    async def close(self) -> None:
        """End the process; what it was answering is lost."""
        self._become("closed")
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        self._lose_all()

    def _become(self, state: State) -> None:
        self.state = state
        self._settled.set()

    async def _keep(self) -> None:
        """Run one process after the other, with longer and longer pauses while they do not last."""
        pause_s = self._first_pause_s
        while True:
            begin = time.monotonic()
            try:
                await self._run()
            except OSError as error:  # no memory, no process or no file left, for now
                self.last_words = f"the engine could not be started: {error}"
            self._lose_all()
            self._become("restarting")
            pause_s = self._first_pause_s if time.monotonic() - begin > _STEADY_S else pause_s
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            self.restarts += 1

    async def _run(self) -> None:
        """One process, from its start to its end."""
        ours, theirs = socket.socketpair()
        with contextlib.ExitStack() as unless_started, theirs, self._log.open("ab") as log:
            unless_started.enter_context(ours)
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "open_autoglm.serving.engine_main", str(theirs.fileno()), str(os.getpid())),
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
            unless_started.pop_all()
        self.pid, self.slower = process.pid, 0.0
        loop = asyncio.get_running_loop()
        pipe, lines = await loop.create_connection(lambda: _Lines(self._take), sock=ours)
        self._pipe = pipe
        try:
            pipe.write(self._options.model_dump_json().encode() + b"\n")
            await lines.ended.wait()
        finally:
            self._pipe = None
            pipe.close()
            if process.returncode is None:
                # Not process.kill(): it may reap the child before the loop does, and its exit code is lost.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            code = await process.wait()
            self.last_words = f"the engine ended with {_exit_words(code)}: {self._last_line()}"

    def _take(self, line: bytes) -> None:
        report = Report.model_validate_json(line)
        if report.ready is not None:
            self.ready = report.ready
            self._become("ready")
        if report.load is not None:
            self.load = report.load
        for token in report.tokens:
            if (queue := self._answers.get(token.id)) is not None:
                queue.put_nowait(token)

    def _lose_all(self) -> None:
        self.load = Load()
        self.pid, self.slower = None, 0.0
        for queue in self._answers.values():
            queue.put_nowait(None)

    def _last_line(self) -> str:
        try:
            with self._log.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - 4096))
                lines = log.read().decode(errors="replace").strip().splitlines()
        except OSError as error:  # somebody has moved it
            return f"its log cannot be read: {error.strerror}"
        return lines[-1] if lines else "it said nothing"

    # ── work ─────────────────────────────────────────────────────────────────────────────────────

    async def generate(self, generation: Generation) -> AsyncGenerator[Token]:
        """The tokens of one answer, each as soon as it is known. Raises EngineLost, NotFinite.

        Leaving the iterator early cancels the generation and frees its slot.
        """
        if self.state != "ready" or self._pipe is None:
            raise EngineLost("the engine is being started again")
        queue = self._answers[generation.id] = asyncio.Queue()
        ended = False
        try:
            self._send(Command(generate=generation))
            while not ended:
                token = await queue.get()
                if token is None:
                    ended = True
                    raise EngineLost("the engine ended before the answer did")
                ended = token.ends
                if token.not_finite:
                    raise NotFinite("the model computed NaN or infinity instead of a token")
                yield token
        finally:
            del self._answers[generation.id]
            if not ended:
                self._send(Command(cancel=generation.id))

    def slow_down(self, share: float) -> None:
        """Let each call of the model take that share longer while this process lives. Raises EngineLost."""
        if self.state != "ready":
            raise EngineLost("the engine is being started again")
        self._send(Command(slower=share))
        self.slower = share

    def _send(self, command: Command) -> None:
        if self._pipe is not None:
            self._pipe.write(command.model_dump_json(exclude_defaults=True).encode() + b"\n")


class _Lines(asyncio.Protocol):
    """What the process says, a line at a time, without a task between that would wake for every token."""

    def __init__(self, take: Callable[[bytes], None]) -> None:
        self._take = take
        self._rest = b""
        self.ended = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        *whole, self._rest = (self._rest + data).split(b"\n")
        for line in whole:
            self._take(line)

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set()


def _exit_words(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
