"""The engine's process: ``python -m open_autoglm.serving.engine_main FD``.

Reads commands from the socket FD and writes reports to it, a JSON object a line. It ends with the socket, or
with its parent. Between two calls of the model it takes whatever has arrived.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator

from open_autoglm.bundle import open_bundle, open_session
from open_autoglm.engines.contract import Session, SessionOptions, Slotted, draft_tokens_of
from open_autoglm.measure.child import die_with, volunteer_for_the_oom_killer
from open_autoglm.schemas import Manifest
from open_autoglm.serving.messages import Command, EngineOptions, Load, Ready, Report
from open_autoglm.serving.one_by_one import OneByOne
from open_autoglm.serving.scheduler import Scheduler, Slots

_AT_ONCE = 1 << 20

_PAUSE_S = 0.0005
"""Measured on two cores: with it a first token reached its reader 0.3 to 0.8 ms sooner."""


class _Line:
    """The socket, with whole lines in and out."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._rest = b""
        self.closed = False

    def write(self, report: Report) -> None:
        self._socket.setblocking(True)
        self._socket.sendall(report.model_dump_json(exclude_defaults=True).encode() + b"\n")

    def read(self, wait_s: float | None) -> Iterator[bytes]:
        """What has arrived, or arrives within ``wait_s``; None: at least one line unless the other side has
        gone."""
        lines: list[bytes] = []
        while not self.closed:
            self._socket.settimeout(0 if lines else wait_s)
            try:
                received = self._socket.recv(_AT_ONCE)
            except (BlockingIOError, TimeoutError):
                break
            self.closed = not received
            *whole, self._rest = (self._rest + received).split(b"\n")
            lines += whole
        return iter(lines)


def open_slots(options: EngineOptions, manifest: Manifest) -> tuple[Session, Slots, int]:
    """The session of the bundle, how its slots are used, and how many there are. Raises UserError."""
    asked = SessionOptions(batch_size=options.slots, max_tokens=options.max_tokens, threads=options.threads)
    session = open_session(options.bundle, manifest, asked)
    if isinstance(session, Slotted):
        return session, session, options.slots
    if options.slots > 1:
        session.close()
        session = open_session(options.bundle, manifest, asked.model_copy(update={"batch_size": 1}))
    return session, OneByOne(session), 1


def serve(line: _Line, scheduler: Scheduler, pause_s: float) -> None:
    """Until the other side has gone. After an answer's first token nothing is computed for ``pause_s``."""
    told, first, slower = Load(), False, 0.0
    while not line.closed:
        for text in line.read((pause_s if first else 0) if scheduler.busy else None):
            command = Command.model_validate_json(text)
            if command.generate is not None:
                scheduler.add(command.generate)
            if command.cancel is not None:
                scheduler.cancel(command.cancel)
            if command.slower is not None:
                slower = command.slower
        begin_s = time.perf_counter()
        tokens = tuple(scheduler.step())
        if slower:
            time.sleep(slower * (time.perf_counter() - begin_s))
        first = any(token.slot_s is not None for token in tokens)
        load = scheduler.load
        if tokens or load != told:
            line.write(Report(tokens=tokens, load=load))
            told = load


def takes_all_cores(options: EngineOptions, manifest: Manifest) -> bool:
    """Whether server and client have no core to themselves while a model is computed."""
    return manifest.candidate.device == "cpu" and options.threads >= len(os.sched_getaffinity(0))


def outlive_signals() -> None:
    """A terminal and systemd send them to every process at once, but the server has answers to finish."""
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, signal.SIG_IGN)


def main() -> None:
    outlive_signals()
    line = _Line(socket.socket(fileno=int(sys.argv[1])))
    die_with(int(sys.argv[2]))
    volunteer_for_the_oom_killer()
    options = EngineOptions.model_validate_json(next(line.read(None)))
    manifest, _ = open_bundle(options.bundle, verify=False)  # by the parent, once for all restarts
    session, slots, count = open_slots(options, manifest)
    chunk = options.chunk_tokens if isinstance(session, Slotted) else None
    reuse = options.reuse_prefixes and isinstance(session, Slotted)
    drafts = draft_tokens_of(manifest.candidate) if isinstance(session, Slotted) else 0
    scheduler = Scheduler(slots, count, chunk, reuse_prefixes=reuse, draft_tokens=drafts)
    line.write(Report(ready=Ready(slots=count, max_tokens=options.max_tokens, facts=session.facts())))
    serve(line, scheduler, _PAUSE_S if takes_all_cores(options, manifest) else 0)
    os._exit(0)  # a runtime that crashes while it is torn down has given its answers already


if __name__ == "__main__":
    main()
