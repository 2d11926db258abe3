"""A model being served: prompts in, pieces of text out, and nobody let in whom it cannot answer in time."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import psutil

from open_autoglm.bundle import end_tokens, open_tokenizer
from open_autoglm.errors import UserError
from open_autoglm.schemas import Manifest, Model
from open_autoglm.serving.engine import Engine, EngineLost, ErrorCode, NotFinite
from open_autoglm.serving.messages import EngineOptions, Finish, Generation, Sampling, Token
from open_autoglm.serving.metrics import Metrics, RequestTimes, State
from open_autoglm.serving.source import Source
from open_autoglm.serving.text import TextStream
from open_autoglm.serving.vocabulary import Vocabulary

T = TypeVar("T")


class Overloaded(Exception):
    """Too much to do; ``retry_after_s`` says when there may be less."""

    def __init__(self, message: str, retry_after_s: float, *, full: bool) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.full = full
        """The queue has no place left; otherwise it has, but the answer would come too late."""


class ServiceOptions(Model):
    """Limits of the service."""

    queue: int
    """Requests that may wait for a slot."""
    deadline_s: float
    """A request that would wait longer for its slot is refused at once."""


@dataclass(frozen=True)
class Asked:
    """One answer that is wanted."""

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    stop: Sequence[str] = ()
    ignore_end: bool = False


@dataclass(frozen=True)
class Piece:
    """What became known by one token."""

    text: str
    token: Token
    finish: Finish | None = None


class Outcome(NamedTuple):
    """How an answer ended, for whoever tries this service beside another."""

    ttft_ms: float | None
    e2e_ms: float
    error: ErrorCode | None = None


Heard = Callable[[Asked, Outcome], None]


@dataclass
class _Pace:
    """How long requests hold their slots, lately."""

    seconds: float | None = None

    def learn(self, seconds: float) -> None:
        self.seconds = seconds if self.seconds is None else 0.8 * self.seconds + 0.2 * seconds


@dataclass
class Service:
    """One bundle and its engine."""

    name: str
    source: Source
    manifest: Manifest
    digest: str
    engine: Engine
    tokenizer: Any
    end_ids: frozenset[int]
    max_tokens: int
    options: ServiceOptions
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))
    begun: int = 0
    """Answers ever begun; of these ``ended`` have ended, well or not."""
    ended: int = 0
    held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    """What keeps its bundle where it is, until it is closed."""
    heard: Heard | None = None
    """Told of every answer that has ended, but of none that nobody wanted any more."""
    _inside: int = 0
    _pace: _Pace = field(default_factory=_Pace)
    _long_texts: asyncio.Semaphore = field(default_factory=asyncio.Semaphore)

    @property
    def version(self) -> str:
        """The registry's; '' if the bundle was not taken from there."""
        return self.source.version

    @property
    def busy(self) -> bool:
        """Whether anybody waits for an answer."""
        return self._inside > 0

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What its tokens are by themselves."""
        return Vocabulary(self.tokenizer)

    @cached_property
    def _vocabulary_size(self) -> int:
        return len(self.tokenizer)

    async def close(self) -> None:
        """End its engine; what that was answering is lost."""
        try:
            await self.engine.close()
        finally:
            self.held.close()

    # ── prompts ──────────────────────────────────────────────────────────────────────────────────

    def encode(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        """Token ids of a prompt. Raises UserError if it is empty or holds ids that the model has not."""
        if isinstance(prompt, str):
            ids = tuple(self.tokenizer(prompt)["input_ids"])
        else:
            ids = tuple(prompt)
            if (largest := max(ids)) >= self._vocabulary_size:
                raise UserError(f"token id {largest} is beyond the vocabulary of {self._vocabulary_size}")
        if not ids:
            raise UserError("the prompt is empty: give it at least one token")
        return ids

    def encode_chat(self, messages: Sequence[dict[str, Any]]) -> tuple[int, ...]:
        """Token ids of a chat by the model's own template. Raises UserError."""
        import jinja2

        if not self.tokenizer.chat_template:
            raise UserError(f"{self.name} has no chat template: use /v1/completions")
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template of {self.name} refuses these messages: {error}") from error
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def room(self, prompt: Sequence[int], max_tokens: int | None) -> int:
        """How many tokens may be generated. Raises UserError if prompt and answer do not fit."""
        left = self.max_tokens - len(prompt)
        wanted = max(left, 1) if max_tokens is None else max_tokens
        if wanted > left:
            raise UserError(
                f"the prompt has {len(prompt)} tokens and {wanted} new ones were asked for, but there is "
                f"room for {self.max_tokens} together: shorten the prompt or lower max_tokens"
            )
        return wanted

    async def aside(self, work: Callable[[], T]) -> T:
        """Do work with a long text in a thread; one at a time, so that they do not take all cores."""
        async with self._long_texts:
            return await asyncio.to_thread(work)

    # ── answers ──────────────────────────────────────────────────────────────────────────────────

    @contextlib.contextmanager
    def places(self, count: int) -> Iterator[None]:
        """Hold places for so many answers. Raises UserError if there are never so many, Overloaded if they
        would wait too long, and EngineLost if there is nobody to answer."""
        if self.engine.state != "ready":
            self.metrics.refused("engine_down")
            raise EngineLost("the engine is being started again")
        if count > (most := self._slots + self.options.queue):
            raise UserError(f"{count} answers at a time were asked for, and {most} may be: ask for fewer")
        ahead = self._inside + count - self._slots
        if ahead > self.options.queue:
            self.metrics.refused("queue_full")
            raise Overloaded(
                f"{self._inside} requests are answered or wait, and the queue holds {self.options.queue}",
                self._wait_s(1),
                full=True,
            )
        if (wait_s := self._wait_s(ahead)) > self.options.deadline_s:
            self.metrics.refused("deadline")
            raise Overloaded(
                f"the answer would begin in about {wait_s:.0f} s, later than {self.options.deadline_s:g} s",
                wait_s - self.options.deadline_s,
                full=False,
            )
        self._inside += count
        try:
            yield
        finally:
            self._inside -= count

    @property
    def _slots(self) -> int:
        return self.engine.ready.slots if self.engine.ready else 1

    def _wait_s(self, ahead: int) -> float:
        """Until a slot is free for the last of ``ahead`` requests, by how long answers took lately."""
        return max(0, ahead) / self._slots * (self._pace.seconds or 0.0)

    def show(self) -> None:
        """Put its state, as it is now, among the metrics."""
        load = self.engine.load
        self.metrics.show(
            State(
                running=load.running,
                waiting=load.waiting,
                cache_use=load.cached_tokens / (self._slots * self.max_tokens),
                engine_bytes=_resident_bytes(self.engine.pid),
                restarts=self.engine.restarts,
                slower=self.engine.slower,
            )
        )

    async def answer(self, asked: Asked) -> AsyncGenerator[Piece]:
        """The answer, piece by piece, to one who holds a place. Raises EngineLost, NotFinite."""
        generation = Generation(
            id=str(self.begun),
            prompt=asked.prompt,
            max_tokens=asked.max_tokens,
            sampling=asked.sampling,
            stop_tokens=() if asked.ignore_end else tuple(self.end_ids),
        )
        seen = self.metrics.request(len(asked.prompt))
        text = TextStream(self.tokenizer.backend_tokenizer, asked.prompt, asked.stop)
        self.begun += 1
        try:
            async with contextlib.aclosing(self.engine.generate(generation)) as tokens:
                async for token in tokens:
                    piece = _piece(token, text)
                    with seen.counted(token):
                        if piece.finish is None:
                            yield piece
                    if piece.finish is not None:
                        seconds = seen.finished(piece.finish)
                        self._pace.learn(seconds - seen.queue_s)
                        self._tell(asked, seen, seconds)
                        yield piece
                        return
        except NotFinite as error:
            seen.not_finite()
            self._tell(asked, seen, 0, error.code)
            raise
        except EngineLost as error:
            seen.failed()
            self._tell(asked, seen, 0, error.code)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            seen.finished("abort")
            raise
        finally:
            self.ended += 1

    def _tell(self, asked: Asked, seen: RequestTimes, seconds: float, error: ErrorCode | None = None) -> None:
        if self.heard is not None:
            ttft_ms = None if seen.ttft_s is None else 1e3 * seen.ttft_s
            self.heard(asked, Outcome(ttft_ms, 1e3 * seconds, error))


def _resident_bytes(pid: int | None) -> int:
    """Of the process and its shared pages; 0 if it is gone."""
    try:
        return psutil.Process(pid).memory_info().rss if pid is not None else 0
    except psutil.NoSuchProcess:
        return 0


def _piece(token: Token, text: TextStream) -> Piece:
    new = "" if token.token is None else text.push(token.token)
    finish: Finish | None = "stop" if text.stopped else token.finish
    return Piece(new + text.end() if finish is not None else new, token, finish)


async def start_service(
    name: str,
    source: Source,
    manifest: Manifest,
    digest: str,
    engine_options: EngineOptions,
    options: ServiceOptions,
    metrics: Metrics,
    log: Path,
    *,
    timeout_s: float = 600,
) -> Service:
    """Start the engine of a bundle that was checked, and wait for it. Raises EngineLost."""
    room = min(engine_options.max_tokens, manifest.context_tokens)
    engine = Engine(engine_options.model_copy(update={"max_tokens": room}), log)
    directory = source.bundle / "tokenizer"
    tokenizer = await asyncio.to_thread(
        open_tokenizer, directory, trust_remote_code=manifest.trust_remote_code
    )
    await engine.start(timeout_s)
    return Service(
        name=name,
        source=source,
        manifest=manifest,
        digest=digest,
        engine=engine,
        tokenizer=tokenizer,
        end_ids=end_tokens(directory, tokenizer),
        max_tokens=room,
        options=options,
        metrics=metrics,
    )
