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

_LONGEST_LINE = 1 << 24


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
        self._writer: asyncio.StreamWriter | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._changed = asyncio.Condition()
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
            await asyncio.wait_for(self._until(lambda: self.state in ("ready", "restarting")), timeout_s)
        except TimeoutError as error:
            await self.close()
            raise EngineLost(f"the engine was not ready within {timeout_s:g} s; see {self._log}") from error
        if self.state != "ready":
            await self.close()
            raise EngineLost(self.last_words)

    async def close(self) -> None:
        """End the process; what it was answering is lost."""
        await self._become("closed")
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper

    async def _until(self, reached: Callable[[], bool]) -> None:
        async with self._changed:
            await self._changed.wait_for(reached)

    async def _become(self, state: State) -> None:
        async with self._changed:
            self.state = state
            self._changed.notify_all()

    async def _keep(self) -> None:
        """Run one process after the other, with longer and longer pauses while they do not last."""
        pause_s = self._first_pause_s
        while True:
            begin = time.monotonic()
            await self._run()
            self._lose_all()
            await self._become("restarting")
            pause_s = self._first_pause_s if time.monotonic() - begin > _STEADY_S else pause_s
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            self.restarts += 1

    async def _run(self) -> None:
        """One process, from its start to its end."""
        ours, theirs = socket.socketpair()
        with theirs, self._log.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "open_autoglm.serving.engine_main", str(theirs.fileno()), str(os.getpid())),
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.pid, self.slower = process.pid, 0.0
        reader, writer = await asyncio.open_connection(sock=ours, limit=_LONGEST_LINE)
        self._writer = writer
        try:
            writer.write(self._options.model_dump_json().encode() + b"\n")
            async for line in reader:
                await self._take(Report.model_validate_json(line))
        except ConnectionError:
            pass  # it died in the middle of a word
        finally:
            self._writer = None
            writer.close()
            if process.returncode is None:
                # Not process.kill(): it may reap the child before the loop does, and its exit code is lost.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            code = await process.wait()
            self.last_words = f"the engine ended with {_exit_words(code)}: {self._last_line()}"

    async def _take(self, report: Report) -> None:
        if report.ready is not None:
            self.ready = report.ready
            await self._become("ready")
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
        with self._log.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 4096))
            lines = log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    # ── work ─────────────────────────────────────────────────────────────────────────────────────

    async def generate(self, generation: Generation) -> AsyncGenerator[Token]:
        """The tokens of one answer, each as soon as it is known. Raises EngineLost, NotFinite.

        Leaving the iterator early cancels the generation and frees its slot.
        """
        if self.state != "ready" or self._writer is None:
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
        if self.state != "ready" or self._writer is None:
            raise EngineLost("the engine is being started again")
        self._send(Command(slower=share))
        self.slower = share

    def _send(self, command: Command) -> None:
        if self._writer is not None:
            self._writer.write(command.model_dump_json(exclude_defaults=True).encode() + b"\n")


def _exit_words(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
