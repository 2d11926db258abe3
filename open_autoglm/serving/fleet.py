"""Who answers: the champion, and a challenger beside it while it is tried.

A change never fails a request. A newcomer is loaded and examined beside the one that answers; when it takes
over, the old one ends what it has begun and is closed then. One change is made at a time.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from open_autoglm.bundle import open_bundle
from open_autoglm.errors import UserError
from open_autoglm.schemas import Canary, Manifest, Model
from open_autoglm.serving.compatibility import compatibility
from open_autoglm.serving.contest import Contest
from open_autoglm.serving.engine import EngineLost
from open_autoglm.serving.errors import Rejected
from open_autoglm.serving.exam import Check, Exam, examine
from open_autoglm.serving.history import Recorder
from open_autoglm.serving.judge import Policy, Verdict
from open_autoglm.serving.messages import EngineOptions
from open_autoglm.serving.metrics import Board, Figure, Role
from open_autoglm.serving.service import Service, ServiceOptions, start_service
from open_autoglm.serving.source import Source
from open_autoglm.tracking import in_use

_LOGGER = logging.getLogger(__name__)

_LONGEST_ANSWER_S = 600.0
"""After so long, the engine of one who was replaced is closed, whatever it still answers."""
_LOOK_S = 0.2
_LEAST_STAY_S = 1.0
"""Whoever was given a service has begun to ask it by then."""
_EVENTS = 100

EventKind = Literal[
    "started", "swapped", "rejected", "challenger", "dropped", "promoted", "canary", "judged", "slowed"
]


class Event(Model):
    """Something that changed who answers, or was meant to."""

    time: datetime
    kind: EventKind
    told: str
    checks: tuple[Check, ...] = ()


@dataclass(frozen=True)
class Launcher:
    """How a bundle becomes a service of this endpoint."""

    name: str
    engine: EngineOptions
    """For every bundle; the one it names is replaced."""
    service: ServiceOptions
    log: Path

    async def compatibility(self, newcomer: Source, running: Source) -> Exam:
        """What the files say of it. Raises UserError."""
        return await asyncio.to_thread(compatibility, self._options(newcomer), self._options(running))

    async def launch(self, source: Source) -> Service:
        """Check the bundle and start its engine. Nothing it answers is counted before it has a role.

        Raises UserError, EngineLost.
        """
        manifest, bundle = await asyncio.to_thread(open_bundle, source.bundle)
        uncounted = Board(self.name).of(source.version, bundle.digest, "challenger")
        return await start_service(
            self.name,
            source,
            manifest,
            bundle.digest,
            self._options(source),
            self.service,
            uncounted,
            self.log,
        )

    def _options(self, source: Source) -> EngineOptions:
        return self.engine.model_copy(update={"bundle": source.bundle})


OnVerdict = Callable[[Literal["promote", "rollback"], str, Mapping[str, Any]], Awaitable[None]]
Examine = Callable[[Service, Service, Manifest], Awaitable[Exam]]


class Fleet:
    """The services behind one public name."""

    def __init__(
        self,
        launcher: Launcher,
        board: Board,
        champion: Service,
        *,
        policy: Policy | None = None,
        examine: Examine = examine,
    ) -> None:
        """A challenger is judged by ``policy``; None: by the usual one."""
        self.name = launcher.name
        self.champion = champion
        self.challenger: Service | None = None
        self.canary = Canary()
        self.contest: Contest | None = None
        self.on_verdict: OnVerdict | None = None
        """Who moves the aliases by what the judge says; without it the fleet changes by itself."""
        self.events: deque[Event] = deque(maxlen=_EVENTS)
        self._launcher = launcher
        self._board = board
        self._policy = policy or Policy()
        self._examine = examine
        self.history = Recorder(self._figures)
        self._changing = asyncio.Lock()
        self._leaving: set[asyncio.Task[None]] = set()
        self._drops = 0
        """How often a challenger was to go."""
        self._give_role(champion, "champion")
        self._tell("started", f"{called(champion)} answers")

    @property
    def versions(self) -> tuple[str, str | None]:
        """The registry's, of champion and challenger."""
        return self.champion.version, self.challenger.version if self.challenger else None

    @property
    def begun(self) -> int:
        """Answers ever begun by who is here now; another number means that somebody came, or left."""
        return sum(service.begun for service in self._here)

    def is_quiet(self) -> bool:
        """Whether no engine here is known to do anything, for clients or for us."""
        return not any(service.busy or service.engine.load.running for service in self._here)

    @property
    def _here(self) -> tuple[Service, ...]:
        return (self.champion,) if self.challenger is None else (self.champion, self.challenger)

    # ── requests ─────────────────────────────────────────────────────────────────────────────────

    def route(self, caller: str) -> Service:
        """Who answers ``caller``: the same one as long as challenger and weight are the same."""
        challenger = self.challenger
        if challenger is None or challenger.engine.state != "ready":
            return self.champion
        hit = _place(challenger.digest, caller) < self.canary.weight_percent / 100
        return challenger if hit else self.champion

    def exposition(self) -> bytes:
        """What Prometheus reads, as things are now."""
        self._show()
        return self._board.exposition()

    def _figures(self) -> Iterator[Figure]:
        """The same, of versions alone, for the history."""
        self._show()
        return self._board.figures()

    def _show(self) -> None:
        for service in (self.champion, self.challenger):
            if service is not None:
                service.show()

    # ── changes ──────────────────────────────────────────────────────────────────────────────────

    async def swap(self, source: Source) -> None:
        """Make the bundle the champion. Raises Rejected, and the old one goes on."""
        async with self._changing:
            newcomer, checks = await self._admit(source)
            self._drop("the champion was replaced")
            before, self.champion = self.champion, newcomer
            self._give_role(newcomer, "champion")
            self._let_go(before)
            instead = "from a new engine" if source == before.source else f"instead of {called(before)}"
            self._tell("swapped", f"{called(newcomer)} answers {instead}", checks)

    async def renew(self) -> None:
        """Let the champion's bundle answer from another engine process. Raises Rejected."""
        await self.swap(self.champion.source)

    async def try_challenger(self, source: Source, canary: Canary) -> None:
        """Let the bundle answer its share beside the champion. Raises Rejected."""
        async with self._changing:
            self._drop("another challenger takes its place")
            drops = self._drops
            newcomer, checks = await self._admit(source)
            if drops != self._drops:
                await newcomer.close()
                raise self._rejected(f"{called(newcomer)} is not tried: it was dropped while it was loaded")
            self._give_role(newcomer, "challenger")
            self.challenger, self.canary = newcomer, canary
            self._begin_contest()
            self._tell("challenger", f"{called(newcomer)} is tried: {_shares(canary)}", checks)

    async def promote(self) -> None:
        """Make the challenger the champion. Raises UserError if there is none."""
        async with self._changing:
            if self.challenger is None:
                raise UserError("there is no challenger to promote")
            self._end_contest()
            before, self.champion, self.challenger = self.champion, self.challenger, None
            self.canary = Canary()
            self.champion.metrics.hide()
            self._give_role(self.champion, "champion")
            self._let_go(before)
            self._tell("promoted", f"{called(self.champion)} answers instead of {called(before)}")

    async def drop_challenger(self, reason: str) -> None:
        """Its callers are the champion's again, at once; one that is being loaded gets none."""
        self._drops += 1
        self._drop(reason)

    def set_canary(self, canary: Canary) -> None:
        """Change the challenger's share."""
        if canary != self.canary:
            other_shadow = canary.shadow_percent != self.canary.shadow_percent
            self.canary = canary
            if other_shadow and self.challenger is not None:
                self._end_contest()
                self._begin_contest()
            self._tell("canary", _shares(canary))

    def slow_down(self, share: float) -> None:
        """Make the champion's engine slower by that share, to rehearse what follows; 0: as quick as it is.

        It ends with the engine's process: whoever takes over, or is started in its stead, is not slowed.
        Raises EngineLost.
        """
        self.champion.engine.slow_down(share)
        how = f"{share:.0%} slower on purpose" if share else "not slowed any more"
        told = f"{called(self.champion)} is {how}"
        _LOGGER.warning(told)
        self._tell("slowed", told)

    async def close(self) -> None:
        """End all engines; what they were answering is lost."""
        self._end_contest()
        for task in self._leaving:
            task.cancel()
        await asyncio.gather(*self._leaving, return_exceptions=True)
        for service in (self.champion, self.challenger):
            if service is not None:
                await service.close()

    async def _admit(self, source: Source) -> tuple[Service, tuple[Check, ...]]:
        """A service that has passed its exam, and what was asked of it. Raises Rejected.

        No cache removes its bundle before it is closed: its engine may have to be started again.
        """
        with ExitStack() as held:
            await asyncio.to_thread(held.enter_context, in_use(source.bundle))
            newcomer, checks = await self._examined(source)
            newcomer.held = held.pop_all()
            return newcomer, checks

    async def _examined(self, source: Source) -> tuple[Service, tuple[Check, ...]]:
        """Raises Rejected."""
        try:
            files = await self._launcher.compatibility(source, self.champion.source)
            if not files.passed:
                raise self._rejected(
                    f"{source.bundle} was refused: {'; '.join(files.refusals)}", files.checks
                )
            newcomer = await self._launcher.launch(source)
        except (UserError, EngineLost) as error:
            raise self._rejected(str(error)) from error
        try:
            exam = files + await self._examine(newcomer, self.champion, newcomer.manifest)
        except EngineLost as error:
            await newcomer.close()
            raise self._rejected(f"{called(newcomer)} was lost in its exam: {error}") from error
        except BaseException:
            await newcomer.close()
            raise
        if not exam.passed:
            await newcomer.close()
            raise self._rejected(f"{called(newcomer)} was refused: {'; '.join(exam.refusals)}", exam.checks)
        return newcomer, exam.checks

    def _rejected(self, reason: str, checks: Sequence[Check] = ()) -> Rejected:
        self._tell("rejected", reason, checks)
        return Rejected(reason, checks)

    def _drop(self, reason: str) -> None:
        if self.challenger is not None:
            self._end_contest()
            before, self.challenger, self.canary = self.challenger, None, Canary()
            self._let_go(before)
            self._tell("dropped", f"{called(before)} is tried no more: {reason}")

    def _begin_contest(self) -> None:
        assert self.challenger is not None
        shadow_percent = self.canary.shadow_percent
        self.contest = Contest(
            self.champion, self.challenger, shadow_percent, self._act_on, policy=self._policy
        )

    def _end_contest(self) -> None:
        if self.contest is not None:
            self.contest.close()
            self.contest = None

    async def _act_on(self, verdict: Verdict) -> None:
        self._tell("judged", f"{verdict.kind}: {verdict.reason}")
        if self.on_verdict is not None and self.challenger is not None and self.challenger.version:
            kind: Literal["promote", "rollback"] = "promote" if verdict.kind == "promote" else "rollback"
            await self.on_verdict(kind, verdict.reason, verdict.evidence.model_dump(mode="json"))
        elif verdict.kind == "promote":
            await self.promote()
        else:
            await self.drop_challenger(verdict.reason)

    def _give_role(self, service: Service, role: Role) -> None:
        service.metrics = self._board.of(service.version, service.digest, role)

    def _let_go(self, service: Service) -> None:
        """Close its engine once it has answered everybody."""
        service.metrics.hide()
        task = asyncio.create_task(_leave(service))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    def _tell(self, kind: EventKind, told: str, checks: Sequence[Check] = ()) -> None:
        self.events.append(Event(time=datetime.now(UTC), kind=kind, told=told, checks=tuple(checks)))


async def _leave(service: Service) -> None:
    deadline = time.monotonic() + _LONGEST_ANSWER_S
    try:
        await asyncio.sleep(_LEAST_STAY_S)
        while service.busy and time.monotonic() < deadline:
            await asyncio.sleep(_LOOK_S)
    finally:
        await service.close()


def _place(salt: str, caller: str) -> float:
    """Where a caller stands in [0, 1): another place with every challenger, so that not always the same ones
    are the first to meet a fault."""
    digest = hashlib.sha256(f"{salt}\n{caller}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _shares(canary: Canary) -> str:
    callers, prompts = canary.weight_percent, canary.shadow_percent
    return f"{callers:g} % of the callers, {prompts:g} % of the prompts in its shadow"


def called(service: Service) -> str:
    """For people: the registry's version, or the digest where it has none."""
    return f"version {service.version}" if service.version else f"bundle {service.digest[:12]}"
