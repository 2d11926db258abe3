"""Services and their fleet without HTTP: what waiting is taken for, and what ends with an engine."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from services import Loop, event_loop, fleet_of

from open_autoglm.bundle import open_bundle
from open_autoglm.errors import UserError
from open_autoglm.schemas import Canary, Manifest
from open_autoglm.serving.engine import EngineLost
from open_autoglm.serving.errors import Rejected
from open_autoglm.serving.exam import Exam
from open_autoglm.serving.fleet import Fleet
from open_autoglm.serving.messages import Sampling
from open_autoglm.serving.service import Asked, Outcome, Service
from open_autoglm.serving.source import Source
from open_autoglm.tracking.cache import KEPT, BundleCache, RegisteredVersion

PROMPT = tuple(range(10, 30))


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    with event_loop(tmp_path) as loop:
        yield loop


@pytest.fixture
def service(loop: Loop, tiny_bundle: Path) -> Service:
    """Of two slots."""
    return loop.serve(tiny_bundle)


async def ask(service: Service, max_tokens: int) -> int:
    """How many tokens came."""
    asked = Asked(PROMPT, max_tokens, Sampling(), ignore_end=True)
    return len([piece async for piece in service.answer(asked)])


def test_waiting_is_not_taken_for_work(loop: Loop, service: Service) -> None:
    """Or a queue would be thought to last for its length squared. Ten answers, of which eight wait: the last
    take five times as long as they hold their slots."""
    outcomes: list[Outcome] = []
    service.heard = lambda _, outcome: outcomes.append(outcome)

    async def ten() -> None:
        await asyncio.gather(*(ask(service, 100) for _ in range(10)))

    loop.runner.run(ten())
    assert len(outcomes) == 10
    assert service._pace.seconds is not None
    assert service._pace.seconds < max(outcome.e2e_ms for outcome in outcomes) / 1e3 / 2.5


def test_more_than_ever_fits_is_a_mistake(service: Service) -> None:
    """Nobody is told to come back."""
    with (
        pytest.raises(UserError, match="11 answers at a time were asked for, and 10 may be"),
        service.places(11),
    ):
        pass
    with service.places(10):
        pass


def test_what_a_closed_engine_was_answering_is_lost(loop: Loop, service: Service) -> None:
    """And its caller hears of it."""

    async def closed_amid_an_answer() -> None:
        answer = asyncio.create_task(ask(service, 170))
        while not service.engine.load.running:
            await asyncio.sleep(0.01)
        await service.close()
        await asyncio.wait_for(answer, 30)

    with pytest.raises(EngineLost, match="the engine ended before the answer did"):
        loop.runner.run(closed_amid_an_answer())


def test_an_engine_that_cannot_be_started_for_now_is_started_later(
    loop: Loop, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No process could be forked, and somebody has moved the log: what was being answered is lost, and said
    to be; until the next one is ready, so is why."""
    fork, failed = asyncio.create_subprocess_exec, []

    async def no_room(*command: Any, **options: Any) -> Any:
        if not failed:
            failed.append(service.engine.last_words)
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return await fork(*command, **options)

    async def killed() -> str:
        answer = asyncio.create_task(ask(service, 170))
        while not service.engine.load.running:
            await asyncio.sleep(0.01)
        service.engine._log.unlink()
        monkeypatch.setattr(asyncio, "create_subprocess_exec", no_room)
        assert service.engine.pid is not None
        os.kill(service.engine.pid, signal.SIGKILL)
        with pytest.raises(EngineLost):
            await asyncio.wait_for(answer, 30)
        while not failed or service.engine.last_words == failed[0]:
            await asyncio.sleep(0.01)
        said = service.engine.last_words
        async with asyncio.timeout(60):
            while service.engine.state != "ready":
                await asyncio.sleep(0.05)
        assert await ask(service, 3) == 3
        return said

    said = loop.runner.run(killed())
    assert failed == ["the engine ended with signal 9: its log cannot be read: No such file or directory"]
    assert said.startswith("the engine could not be started: [Errno 11]")


# ── the fleet ────────────────────────────────────────────────────────────────────────────────────


def fleet(service: Service, during_exam: asyncio.Event, goes_on: asyncio.Event) -> Fleet:
    """Whose exams wait, and let everybody pass."""

    async def examine(_newcomer: Service, _running: Service, _manifest: Manifest) -> Exam:
        during_exam.set()
        await goes_on.wait()
        return Exam(checks=())

    made = fleet_of(service)
    made._examine = examine
    return made


def test_who_is_dropped_while_it_is_loaded_is_not_tried(loop: Loop, service: Service) -> None:
    async def dropped() -> Fleet:
        during, goes_on = asyncio.Event(), asyncio.Event()
        found = fleet(service, during, goes_on)
        trying = asyncio.create_task(found.try_challenger(service.source, Canary(weight_percent=50)))
        await during.wait()
        await found.drop_challenger("somebody said so")
        goes_on.set()
        with pytest.raises(Rejected, match="is not tried: it was dropped while it was loaded"):
            await trying
        assert found.challenger is None
        await found.try_challenger(service.source, Canary(weight_percent=50))  # a later one is
        assert found.challenger is not None
        await found.close()
        return found

    assert [event.kind for event in loop.runner.run(dropped()).events] == [
        "started",
        "rejected",
        "challenger",
    ]


class Shelf:
    """A cache of downloaded bundles, and a registry that hands out the same one as every version."""

    def __init__(self, root: Path, bundle: Path) -> None:
        root.mkdir()
        self._cache = BundleCache(root)
        self._bundle = bundle
        self._digest = open_bundle(bundle)[1].digest

    def get(self, version: int) -> Path:
        return self._cache.get(RegisteredVersion("m", str(version), "", self._digest), self._download)

    def _download(self, part: str, into: Path) -> Path:
        into.mkdir(exist_ok=True)
        if part:
            return Path(shutil.copy(self._bundle / part, into))
        return Path(shutil.copytree(self._bundle, into / "whole"))


def test_no_cache_removes_what_answers(loop: Loop, service: Service, tmp_path: Path) -> None:
    """Its engine may have to be started again. Who was replaced goes when it has answered everybody."""
    shelf = Shelf(tmp_path / "cache", service.source.bundle)
    first = shelf.get(1)

    async def swapped() -> None:
        goes_on = asyncio.Event()
        goes_on.set()
        found = fleet(service, asyncio.Event(), goes_on)
        await found.swap(Source(first))
        for version in range(2, KEPT + 3):
            shelf.get(version)
        assert first.exists()
        await found.swap(service.source)
        await asyncio.gather(*found._leaving)
        shelf.get(KEPT + 3)
        assert not first.exists()
        await found.close()

    loop.runner.run(swapped())
