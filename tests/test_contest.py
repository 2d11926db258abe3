"""A challenger beside the champion until the judge has seen enough: real engines, no HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from services import Loop, event_loop

from open_autoglm.serving.contest import Contest
from open_autoglm.serving.engine import EngineLost
from open_autoglm.serving.judge import Policy, Verdict
from open_autoglm.serving.messages import Sampling
from open_autoglm.serving.service import Asked, Service

PROMPT = tuple(range(10, 30))
POLICY = Policy(looks=(4,), prefer="challenger", floor=10)
"""Four pairs, and no difference counts: what is preferred wins."""


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    with event_loop(tmp_path_factory.mktemp("logs")) as loop:
        yield loop


@pytest.fixture(scope="module")
def pair(loop: Loop, tiny_bundle: Path) -> tuple[Service, Service]:
    return loop.serve(tiny_bundle), loop.serve(tiny_bundle)


async def ask(service: Service, max_tokens: int = 4) -> None:
    """As a client does; a lost answer is the client's grief."""
    with contextlib.suppress(EngineLost):
        async for _ in service.answer(Asked(PROMPT, max_tokens, Sampling(), ignore_end=True)):
            pass


def test_prompts_are_replayed_until_the_judge_has_enough(loop: Loop, pair: tuple[Service, Service]) -> None:
    """Prompts of either's clients; the verdict comes once, and nothing is heard after the end."""
    champion, challenger = pair

    async def contest() -> tuple[list[Verdict], Contest]:
        found: list[Verdict] = []
        done = asyncio.Event()

        async def act(verdict: Verdict) -> None:
            found.append(verdict)
            done.set()

        contest = Contest(champion, challenger, 100, act, policy=POLICY, every_s=0.05)
        for number in range(200):
            await ask(pair[number % 2])
            await asyncio.sleep(0.1)
            if done.is_set():
                break
        contest.close()
        await asyncio.sleep(0.2)
        return found, contest

    found, contest_ = loop.runner.run(contest())
    assert [verdict.kind for verdict in found] == ["promote"]
    assert found[0].evidence.look == 4
    assert contest_.status.quiet_pairs >= 4
    assert contest_.status.answers >= 1
    assert champion.heard is challenger.heard is None


@pytest.mark.parametrize("shadow_percent", [0, 100])
def test_a_shadow_that_finds_nothing_is_given_up(
    loop: Loop, pair: tuple[Service, Service], shadow_percent: float
) -> None:
    """Nobody asks; but a trial without a shadow was not begun to compare anything."""

    async def contest() -> list[Verdict]:
        found: list[Verdict] = []

        async def act(verdict: Verdict) -> None:
            found.append(verdict)

        hasty = Policy(patience_s=0.2)
        contest = Contest(*pair, shadow_percent, act, policy=hasty, every_s=0.05)
        while not found and (contest.status.verdict is None or shadow_percent):
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.5)
        contest.close()
        return found

    found = loop.runner.run(asyncio.wait_for(contest(), 60))
    assert [verdict.kind for verdict in found] == (["rollback"] if shadow_percent else [])
    assert all("could not be compared" in verdict.reason for verdict in found)


def test_lost_answers_end_it_at_once(loop: Loop, pair: tuple[Service, Service]) -> None:
    """Without any shadow: three clients whose engine died are enough."""
    champion, challenger = pair

    async def contest() -> list[Verdict]:
        found: list[Verdict] = []

        async def act(verdict: Verdict) -> None:
            found.append(verdict)

        contest = Contest(champion, challenger, 0, act, policy=POLICY, every_s=0.05)
        asking = [asyncio.create_task(ask(challenger, 150)) for _ in range(3)]
        while challenger.engine.load.running < 2:
            await asyncio.sleep(0.01)
        assert challenger.engine.pid is not None
        os.kill(challenger.engine.pid, signal.SIGKILL)
        await asyncio.gather(*asking)
        while not found:
            await asyncio.sleep(0.05)
        contest.close()
        return found

    found = loop.runner.run(asyncio.wait_for(contest(), 60))
    assert [verdict.kind for verdict in found] == ["rollback"]
    assert found[0].reason == "it lost 3 answers; 2 are allowed"
