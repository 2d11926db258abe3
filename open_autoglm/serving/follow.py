"""The endpoint follows the registry: what its aliases name is served, soon after they are moved.

The registry is asked again and again; it may be away for any time, and what is served goes on meanwhile. A
version that is refused is not tried again until its alias has been moved.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from open_autoglm.errors import UserError
from open_autoglm.schemas import Alias, Aliases, Canary
from open_autoglm.serving.errors import Rejected
from open_autoglm.serving.last_good import remember
from open_autoglm.serving.source import Source
from open_autoglm.tracking import CHAMPION, NotFetched, Tracker, UnderWay, Unreachable

EVERY_S = 15.0
_JITTER = 0.1
"""Of the interval: endpoints that were started together do not ask together."""

_LOGGER = logging.getLogger(__name__)
_Answer = TypeVar("_Answer")
_Role = Literal["champion", "challenger"]


class Fleet(Protocol):
    """Who answers: a champion, and perhaps a challenger that is tried beside it."""

    @property
    def versions(self) -> tuple[str, str | None]:
        """The champion's and the challenger's, in the registry."""

    async def swap(self, source: Source) -> None:
        """Make the bundle the champion. Raises Rejected, and the old one goes on."""

    async def try_challenger(self, source: Source, canary: Canary) -> None:
        """Give the bundle its share, in the place of another challenger. Raises Rejected."""

    async def promote(self) -> None:
        """Make the challenger the champion, as it runs. Raises UserError if it is gone."""

    async def drop_challenger(self, reason: str) -> None:
        """Give its callers back to the champion, if there is one."""

    def set_canary(self, canary: Canary) -> None:
        """Change the challenger's share."""


class _Aside:
    """A thread for what blocks. It does not keep the process from ending, as the registry may hang."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="registry", daemon=True).start()

    async def do(self, work: Callable[[], _Answer]) -> _Answer:
        async def call() -> _Answer:
            return work()

        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(call(), self._loop))


class Follower:
    """Keeps a fleet at what the aliases of one registered model say."""

    def __init__(
        self,
        fleet: Fleet,
        model: str,
        connect: Callable[[], Tracker],
        *,
        home: Path,
        cache: Path,
        by: str = "endpoint",
        every_s: float = EVERY_S,
        warning: str = "",
    ) -> None:
        """Follow `champion` and `challenger` of ``model`` in the registry that ``connect`` reaches.

        ``home`` is where the last good version is noted, ``cache`` where bundles are downloaded to; ``by``
        signs what this endpoint writes into the registry's events. ``warning`` is what was wrong
        at the start, until the registry has answered.
        """
        self._fleet = fleet
        self._model = model
        self._connect = connect
        self._home = home
        self._cache = cache
        self._by = by
        self._every_s = every_s
        self._tracker: Tracker | None = None
        self._aside = _Aside()
        self._sooner = asyncio.Event()
        self._unsent: list[Callable[[Tracker], object]] = []
        """What the registry has to be told, in this order."""
        self._sending = asyncio.Lock()
        self._rejected: dict[_Role, str] = {}
        self._followed = ""
        """The champion that answered here as the registry wanted: who took its place since was put there."""
        self._wrong: dict[str, str] = {"registry": warning} if warning else {}
        self._answering: dict[str, Path] = {}
        """The bundles that were let in, by version."""

    @property
    def warning(self) -> str:
        """What is not as it should be; empty if nothing is."""
        return "; ".join(self._wrong.values())

    async def run(self) -> None:
        """Until cancelled. What is raised is a bug, of which `warning` tells as well."""
        try:
            while True:
                await self.look()
                with suppress(TimeoutError):
                    pause_s = self._every_s * random.uniform(1 - _JITTER, 1 + _JITTER)
                    await asyncio.wait_for(self._sooner.wait(), pause_s)
                self._sooner.clear()
        finally:
            self._wrong["follower"] = "the registry is not followed any more: the log says why"

    async def verdict(
        self, kind: Literal["promote", "rollback"], reason: str, evidence: Mapping[str, Any]
    ) -> None:
        """Do as the judge says of the challenger, and write it into the registry.

        A challenger that is to go is gone at once, registry or not. A registry that is away is told later; if
        somebody has moved champion or challenger there since, that counts and the verdict does not.
        """
        champion, challenger = self._fleet.versions
        if challenger is None:
            return
        judged: dict[Alias, str] = {"champion": champion, "challenger": challenger}
        if kind == "rollback":
            self._rejected["challenger"] = challenger
            await self._fleet.drop_challenger(reason)

        def move(tracker: Tracker) -> object:
            told: dict[str, Any] = {"reason": reason, "evidence": evidence, "expected": judged}
            if kind == "promote":
                return tracker.promote(self._model, challenger, by="judge", **told)
            return tracker.rollback(self._model, by="judge", **told)

        self._unsent.append(move)
        await self._send()
        self._sooner.set()

    async def look(self) -> None:
        """Ask the registry once, and bring the fleet to what it says."""
        await self._send()
        try:
            aliases = await self._ask(lambda tracker: tracker.aliases(self._model))
        except UserError as error:
            self._tell("registry", f"{self._going_on()}: {error}")
            return
        self._well("registry")
        for role, version in list(self._rejected.items()):
            if getattr(aliases, role) != version:
                del self._rejected[role]
        before, _ = self._fleet.versions
        await self._follow_champion(aliases)
        if self._fleet.versions[0] == before:
            await self._follow_challenger(aliases)
        else:
            self._sooner.set()  # loading took its time, and aliases may have moved again

    # ── what the aliases say ─────────────────────────────────────────────────────────────────────

    async def _follow_champion(self, aliases: Aliases) -> None:
        running, tried = self._fleet.versions
        wanted = aliases.champion
        if wanted is None:
            self._tell("champion", f"{self._model} has no champion in the registry: {self._going_on()}")
        elif wanted == running:
            self._well("champion")
        elif wanted == self._followed:
            who = f"version {running}" if running else "a bundle"
            told = f"{who} that was swapped in by hand answers until the champion's alias moves"
            self._tell("champion", told)
        elif wanted == tried:
            await self._promote(wanted)
        else:
            await self._admit("champion", wanted, aliases, self._fleet.swap)
        if wanted is not None and wanted == self._fleet.versions[0]:
            self._followed = wanted
        self._let_go()

    async def _promote(self, version: str) -> None:
        """The challenger is loaded already, and becomes champion as it runs."""
        try:
            await self._fleet.promote()
        except UserError:  # it was dropped in this moment; the next look fetches it
            return
        self._well("champion")
        if (bundle := self._answering.get(version)) is not None:
            remember(self._home, self._model, CHAMPION, version, bundle)

    async def _follow_challenger(self, aliases: Aliases) -> None:
        running, tried = self._fleet.versions
        wanted, canary = aliases.challenger, aliases.canary
        if wanted is None or canary is None or wanted == aliases.champion:
            if tried is not None:
                await self._fleet.drop_challenger("the registry names no challenger any more")
            self._well("challenger")
        elif wanted == tried:
            self._fleet.set_canary(canary)
            self._well("challenger")
        elif wanted != running:

            async def try_it(source: Source) -> None:
                await self._fleet.try_challenger(source, canary)

            await self._admit("challenger", wanted, aliases, try_it)
        self._let_go()

    def _let_go(self) -> None:
        """Of bundles that do not answer any more."""
        for version in self._answering.keys() - set(self._fleet.versions):
            del self._answering[version]

    async def _admit(
        self, role: _Role, version: str, aliases: Aliases, admit: Callable[[Source], Awaitable[None]]
    ) -> None:
        """Fetch ``version`` and let it in, or say why not."""
        if self._rejected.get(role) == version:
            return
        try:
            source = await self._ask(lambda tracker: self._fetch(tracker, version))
            await admit(source)
        except (NotFetched, Unreachable) as error:  # it will be tried again
            self._tell(role, f"{self._going_on()}: {error}")
        except UserError as error:
            await self._reject(role, version, aliases, str(error), {})
        except Rejected as error:
            checks = [check.model_dump(mode="json") for check in error.checks]
            await self._reject(role, version, aliases, error.reason, {"checks": checks})
        else:
            self._well(role)
            self._answering[version] = source.bundle
            if role == CHAMPION:
                remember(self._home, self._model, role, version, source.bundle)

    def _fetch(self, tracker: Tracker, version: str) -> Source:
        bundle = tracker.fetch(tracker.version(self._model, version), self._cache)
        return Source(bundle, version, self._model, CHAMPION)

    async def _reject(
        self, role: _Role, version: str, aliases: Aliases, reason: str, evidence: Mapping[str, Any]
    ) -> None:
        told = f"version {version} may not answer as {role}: {reason}"
        self._rejected[role] = version
        self._tell(role, f"{self._going_on()}: {told}")
        self._unsent.append(
            lambda tracker: tracker.record_rejection(
                self._model, aliases, by=self._by, reason=told, evidence=evidence
            )
        )
        await self._send()

    # ── the registry ─────────────────────────────────────────────────────────────────────────────

    async def _ask(self, question: Callable[[Tracker], _Answer]) -> _Answer:
        def work() -> _Answer:
            if self._tracker is None:
                self._tracker = self._connect()
            return question(self._tracker)

        return await self._aside.do(work)

    async def _send(self) -> None:
        """Tell the registry what it has not been told yet."""
        async with self._sending:
            while self._unsent:
                try:
                    await self._ask(self._unsent[0])
                except (Unreachable, UnderWay) as error:
                    self._tell("registry", f"{self._going_on()}: {error}")
                    return
                except UserError as error:
                    _LOGGER.warning("the registry did not do what it was asked: %s", error)
                del self._unsent[0]

    # ── words ────────────────────────────────────────────────────────────────────────────────────

    def _going_on(self) -> str:
        return f"version {self._fleet.versions[0] or '(unregistered)'} of {self._model} goes on"

    def _tell(self, subject: str, sentence: str) -> None:
        """Once, however often it is found."""
        if subject not in self._wrong:
            _LOGGER.warning(sentence)
        self._wrong[subject] = sentence

    def _well(self, subject: str) -> None:
        if self._wrong.pop(subject, None) is not None:
            _LOGGER.info("%s: all is well again with the %s", self._model, subject)
