"""Everybody who is asked: started once, warm, and held still while another has its turn."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from benchmarks import serve_bare, serve_load
from benchmarks.serve_bare import AskJob, BareJob
from benchmarks.serve_load import Load, LoadJob
from benchmarks.serve_servers import NotStarted, Server, Spec, cpu_s, pss_bytes
from benchmarks.serve_table import Kind, Round
from open_autoglm.engines.contract import Tokens
from open_autoglm.measure.isolation import Child, Failure
from open_autoglm.measure.jobs import Nothing
from open_autoglm.measure.lease import device_lease
from open_autoglm.measure.workload import draw_prompts
from open_autoglm.quality.texts import TEXTS, encode, load_tokenizer
from open_autoglm.schemas import Checkpoint, Model

Found = TypeVar("Found", bound=Model)

_TIMEOUT_S = 600.0


class Sizes(NamedTuple):
    """How much is asked."""

    prompt_tokens: int = 128
    output_tokens: int = 64
    heats: int = 5
    streams: tuple[int, ...] = (1, 2, 4, 8)
    pairs: int = 480
    """Prompts by which the endpoint and the bare engine are compared, the first of each few not counted."""

    @property
    def slots(self) -> int:
        return max(self.streams)

    @property
    def room(self) -> int:
        """Of one slot, with some tokens to spare for who is given its prompt as text."""
        return self.prompt_tokens + self.output_tokens + 16

    def requests(self, streams: int) -> int:
        """In one round: two for each stream, and four at least."""
        return max(4, 2 * streams)

    @property
    def prompts(self) -> int:
        """Different ones, those of the warm-up included."""
        rounds = sum(self.requests(streams) for streams in self.streams) + self.requests(self.slots)
        return self.slots + self.pairs + self.heats * rounds + 1


class Arm(NamedTuple):
    """One that takes part, or the reason why it cannot."""

    name: str
    label: str
    streams: tuple[int, ...]
    spec: Spec | None = None
    bare: Path | None = None
    """The bundle, where its session is asked without a server."""
    reason: str = ""
    shared: bool = False
    """Whether it is also asked prompts with a beginning in common, at most streams; ``streams`` may be ()."""


class WrongAnswer(Exception):
    """An error, or another number of tokens than was asked for."""


# ── prompts ──────────────────────────────────────────────────────────────────────────────────────


class Prompts:
    """Different prompts, each handed out once."""

    def __init__(self, checkpoint: Checkpoint, sizes: Sizes, seed: int = 0) -> None:
        self._tokenizer: Any = load_tokenizer(checkpoint)
        texts = [encode(self._tokenizer, kind, "eval") for kind in TEXTS]
        self._drawn = draw_prompts(texts, sizes.prompts, sizes.prompt_tokens, seed)
        self._next = 1

    def text(self, prompt: Sequence[int]) -> str:
        """For servers that take no token ids."""
        return str(self._tokenizer.decode(list(prompt)))

    def take(self, count: int, kind: Kind = "unique") -> Tokens:
        """``int64[count, prompt_tokens]``; ``shared`` ones have their first three quarters in common."""
        found = self._drawn[self._next : self._next + count].copy()
        assert len(found) == count, "Sizes.prompts counts too few"
        self._next += count
        if kind == "shared":
            common = self._drawn.shape[1] * 3 // 4
            found[:, :common] = self._drawn[0, :common]
        return found


# ── contestants ──────────────────────────────────────────────────────────────────────────────────


class Bare:
    """The engine without an endpoint, one prompt at a time. Raises WrongAnswer."""

    def __init__(self, bundle: Path, sizes: Sizes, log: Path) -> None:
        self._child = Child(log)
        self.pid = self._child.pid
        self.close = self._child.close
        job = BareJob(bundle=bundle, max_tokens=sizes.room, threads=len(os.sched_getaffinity(0)))
        _told(self._child.ask(f"{serve_bare.PREFIX}:open_bare", job, Nothing, _TIMEOUT_S))

    def load(self, prompts: Tokens, streams: int, output_tokens: int) -> Load:
        assert streams == 1, "without an endpoint there is one prompt at a time"
        job = AskJob(prompts=tuple(map(tuple, prompts.tolist())), output_tokens=output_tokens)
        return _told(self._child.ask(f"{serve_bare.PREFIX}:ask", job, Load, _TIMEOUT_S))

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Let it run inside the block: a runtime's threads spin for a while after their last call."""
        os.kill(self.pid, signal.SIGCONT)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGSTOP)


class Served:
    """A server, asked by the load generator. Raises NotStarted."""

    def __init__(self, spec: Spec, generator: Child, log: Path) -> None:
        self._server = Server(spec, log)
        self._generator = generator
        self._body = spec.body
        self.pid = self._server.pid
        self.awake = self._server.awake
        self.close = self._server.close

    def load(self, prompts: Tokens, streams: int, output_tokens: int) -> Load:
        """Raises WrongAnswer."""
        bodies = tuple(json.dumps(self._body(prompt.tolist(), output_tokens)) for prompt in prompts)
        job = LoadJob(port=self._server.port, bodies=bodies, streams=streams)
        found = _told(self._generator.ask(f"{serve_load.PREFIX}:run", job, Load, _TIMEOUT_S))
        for answer in found.answers:
            if (answer.status, answer.output_tokens) != (200, output_tokens):
                said = answer.error or f"{answer.output_tokens} tokens, not {output_tokens}"
                raise WrongAnswer(f"answered with status {answer.status}: {said}")
        return found


def _told(found: Found | Failure) -> Found:
    """Raises WrongAnswer for a child that failed."""
    if isinstance(found, Failure):
        raise WrongAnswer(f"{found.status}: {found.reason}")
    return found


class Entrants:
    """Everybody who could be started, by name; those who could not, with their reasons."""

    def __init__(self, arms: Sequence[Arm], prompts: Prompts, sizes: Sizes, work: Path) -> None:
        self._sizes, self._work = sizes, work
        self._warm = prompts.take(sizes.slots)
        self._stack = ExitStack()
        self._generator = self._stack.enter_context(Child(work / "load.log"))
        self._open: dict[str, Bare | Served] = {}
        self.reasons: dict[str, str] = {arm.name: arm.reason for arm in arms if arm.reason}
        for arm in arms:
            if not arm.reason:
                self._start(arm)
            tell(f"{arm.name}: {self.reasons.get(arm.name, 'open and warm')}")

    def _start(self, arm: Arm) -> None:
        log = self._work / f"{arm.name}.log"
        try:
            opened = Bare(arm.bare, self._sizes, log) if arm.bare else self._served(arm, log)
            self._stack.callback(opened.close)
            with opened.awake():
                for streams in {1, max(arm.streams, default=self._sizes.slots)}:
                    opened.load(self._warm[:streams], streams, self._sizes.output_tokens)
        except (NotStarted, WrongAnswer) as error:
            self.reasons[arm.name] = str(error)
        else:
            self._open[arm.name] = opened

    def _served(self, arm: Arm, log: Path) -> Served:
        assert arm.spec is not None, "an arm without anything to start has a reason"
        return Served(arm.spec, self._generator, log)

    def __contains__(self, name: str) -> bool:
        return name in self._open

    def ask(self, name: str, prompts: Tokens, streams: int, output_tokens: int) -> Load:
        """With the device alone. Raises WrongAnswer."""
        opened = self._open[name]
        with opened.awake(), device_lease("cpu", alone=True):
            return opened.load(prompts, streams, output_tokens)

    def round(self, name: str, heat: int, prompts: Tokens, streams: int) -> Round | None:
        """A load and what it took; None, and out, for who answers wrongly."""
        opened = self._open[name]
        begin = cpu_s(opened.pid)
        try:
            load = self.ask(name, prompts, streams, self._sizes.output_tokens)
        except WrongAnswer as error:
            self.reasons[name] = str(error)
            self._open.pop(name)
            tell(f"{name}: {error}")
            return None
        return Round(heat=heat, load=load, cpu_s=cpu_s(opened.pid) - begin, pss_bytes=pss_bytes(opened.pid))

    def __enter__(self) -> Entrants:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def tell(line: str) -> None:
    sys.stderr.write(line + "\n")
