"""What the shadow says of two servers is fair to both, and costs no client anything."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from bundles import altered
from services import Loop, counted, event_loop, with_nan

from open_autoglm.serving.messages import Sampling
from open_autoglm.serving.service import Asked, Service
from open_autoglm.serving.shadow import Shadow, ShadowEvidence, ShadowOptions

PROMPT = tuple(range(40, 80))
PATIENCE_S = 60


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    with event_loop(tmp_path_factory.mktemp("logs")) as loop:
        yield loop


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Path:
    return tiny_bundle


@pytest.fixture(scope="module")
def champion(loop: Loop, bundle: Path) -> Service:
    return loop.serve(bundle, "champion")


@pytest.fixture(scope="module")
def challenger(loop: Loop, bundle: Path) -> Service:
    return loop.serve(bundle, "challenger")


@asynccontextmanager
async def running(shadow: Shadow) -> AsyncGenerator[None]:
    """The shadow's task; what goes wrong in it is raised here."""
    task = asyncio.create_task(shadow.run())
    try:
        yield
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def until_done(shadow: Shadow, count: int) -> ShadowEvidence:
    """So many prompts were replayed or given up."""
    async with asyncio.timeout(PATIENCE_S):
        while len((found := shadow.evidence()).pairs) + found.gave_way < count:
            await asyncio.sleep(0.005)
    return found


async def ask(service: Service, prompt: tuple[int, ...], tokens: int) -> None:
    """A client that reads to the end."""
    async for _ in service.answer(Asked(prompt, tokens, Sampling(), ignore_end=True)):
        pass


async def replayed(shadow: Shadow, prompts: int, tokens: int) -> ShadowEvidence:
    async with running(shadow):
        for number in range(prompts):
            shadow.offer((*PROMPT, number + 5), tokens)
        return await until_done(shadow, prompts)


def test_each_prompt_is_answered_by_both(loop: Loop, champion: Service, challenger: Service) -> None:
    """In turns, with times of both; the same bundle says the same. Clients' figures know nothing of it."""
    before = counted(champion), counted(challenger)
    found = loop.runner.run(replayed(Shadow(champion, challenger, ShadowOptions()), 6, 12))
    assert (found.offered, found.taken, found.dropped, found.gave_way) == (6, 6, 0, 0)
    assert [pair.champion_first for pair in found.pairs] == [True, False] * 3
    for pair in found.pairs:
        assert pair.quiet
        assert pair.complete
        assert (pair.prompt_tokens, pair.output_tokens, pair.same_tokens) == (41, 12, 12)
        for side in (pair.champion, pair.challenger):
            assert side.ttft_ms is not None
            assert side.e2e_ms is not None
            assert side.tpot_ms == pytest.approx((side.e2e_ms - side.ttft_ms) / 11)
            assert 0 < side.ttft_ms < side.e2e_ms

    def counts(exposition: str) -> list[str]:
        return [line for line in exposition.splitlines() if "_count{" in line or "_total{" in line]

    after = counted(champion), counted(challenger)
    assert list(map(counts, after)) == list(map(counts, before))


def test_evidence_holds_no_text(loop: Loop, champion: Service, challenger: Service) -> None:
    """It can be stored and sent: lengths, times and counts, and it reads back as it was."""
    found = loop.runner.run(replayed(Shadow(champion, challenger, ShadowOptions()), 2, 4))
    text = found.model_dump_json()
    assert ShadowEvidence.model_validate_json(text) == found
    assert ", ".join(map(str, PROMPT[:4])) not in text.replace(",", ", ")


def test_long_answers_are_cut_and_the_first_pairs_kept(
    loop: Loop, champion: Service, challenger: Service
) -> None:
    """To what fits behind the prompt, or the cap. The judge looks at the same pairs whenever it asks."""
    options = ShadowOptions(output_tokens=8, pairs=2)

    async def three() -> ShadowEvidence:
        shadow = Shadow(champion, challenger, options)
        async with running(shadow):
            for length, tokens in ((195, 100), (10, 100), (11, 3)):
                shadow.offer(tuple(range(5, 5 + length)), tokens)
            async with asyncio.timeout(PATIENCE_S):
                while shadow._quiet_pairs < 3:
                    await asyncio.sleep(0.005)
        shadow.offer(tuple(range(200)), 100)
        return shadow.evidence()

    found = loop.runner.run(three())
    assert [(pair.prompt_tokens, pair.output_tokens) for pair in found.pairs] == [(195, 5), (10, 8)]
    assert found.dropped == 1


def test_a_share_is_drawn_and_a_full_queue_drops(loop: Loop, champion: Service, challenger: Service) -> None:
    """The same seed draws the same prompts; offering never waits."""

    async def offered(seed: int) -> ShadowEvidence:
        shadow = Shadow(champion, challenger, ShadowOptions(share=0.25, seed=seed, queue=8))
        for _ in range(400):
            shadow.offer(PROMPT, 4)
        return shadow.evidence()

    first, again, other = (loop.runner.run(offered(seed)) for seed in (1, 1, 2))
    assert first == again
    assert first.taken != other.taken
    assert 70 <= first.taken <= 130
    assert first.dropped == first.taken - 8


def test_times_beside_a_client_do_not_count(loop: Loop, champion: Service, challenger: Service) -> None:
    """Who shares the engine with a client is slower for it; the tokens are evidence all the same."""

    async def beside(client_of: Service) -> ShadowEvidence:
        shadow = Shadow(champion, challenger, ShadowOptions(quiet_wait_s=0))
        async with running(shadow):
            client = asyncio.create_task(ask(client_of, PROMPT, 150))
            while client_of.engine.load.running == 0:
                await asyncio.sleep(0)
            shadow.offer(PROMPT[::-1], 4)
            await until_done(shadow, 1)
            await client
            shadow.offer(PROMPT[::-1], 4)
            return await until_done(shadow, 2)

    for client_of in (champion, challenger):
        found = loop.runner.run(beside(client_of))
        assert [pair.quiet for pair in found.pairs] == [False, True]
        assert [pair.same_tokens for pair in found.pairs] == [4, 4]
        assert [pair.champion_first for pair in found.pairs] == [True, True]  # the first one's do not count


def test_a_pair_waits_for_a_quiet_moment(loop: Loop, champion: Service, challenger: Service) -> None:
    """Not for ever, but long enough for those who are being answered."""

    async def after_a_client() -> ShadowEvidence:
        shadow = Shadow(champion, challenger, ShadowOptions(quiet_wait_s=PATIENCE_S))
        async with running(shadow):
            client = asyncio.create_task(ask(champion, PROMPT, 150))
            while champion.engine.load.running == 0:
                await asyncio.sleep(0)
            shadow.offer(PROMPT[::-1], 4)
            await client
            return await until_done(shadow, 1)

    assert [pair.quiet for pair in loop.runner.run(after_a_client()).pairs] == [True]


def test_clients_come_first(loop: Loop, champion: Service, challenger: Service) -> None:
    """Nothing begins while they wait for a slot, and what has begun gives its own up."""

    async def crowded() -> tuple[ShadowEvidence, ShadowEvidence]:
        shadow = Shadow(champion, challenger, ShadowOptions(output_tokens=150, quiet_wait_s=0))
        async with running(shadow):
            shadow.offer(PROMPT, 150)
            while champion.engine.load.running == 0:
                await asyncio.sleep(0)
            clients = [asyncio.create_task(ask(champion, (*PROMPT, n + 5), 150)) for n in range(4)]
            during = await until_done(shadow, 1)
            shadow.offer(PROMPT, 4)
            await asyncio.gather(*clients)
            return during, await until_done(shadow, 2)

    during, after = loop.runner.run(crowded())
    assert (during.gave_way, during.pairs) == (1, ())
    assert [pair.output_tokens for pair in after.pairs] == [4]


def test_an_answer_that_fails_is_evidence_too(
    loop: Loop, champion: Service, bundle: Path, tmp_path: Path
) -> None:
    """NaN of the challenger's is on its side of the pair, which has no times to compare."""
    broken = loop.serve(altered(bundle, tmp_path / "bundle", with_nan), "broken")
    (pair,) = loop.runner.run(replayed(Shadow(champion, broken, ShadowOptions()), 1, 4)).pairs
    assert not pair.complete
    assert pair.challenger.error == "not_finite"
    assert pair.challenger.e2e_ms is None
    assert pair.champion.error is None
    assert pair.champion.e2e_ms is not None
