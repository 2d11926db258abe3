"""Real prompts once more, to champion and challenger alike, off the path of the answers.

A pair of answers is evidence only if both had the same chance. So both read the whole prompt, which the
champion has just read for its client; who goes first alternates; both write the same number of tokens; and
times count only where no client was being answered meanwhile. Clients come first: nothing begins while they
wait for a slot, and what is under way gives way to them.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np
from pydantic import Field

from open_autoglm.schemas import Model
from open_autoglm.serving.engine import EngineLost, ErrorCode
from open_autoglm.serving.replay import GaveWay, Replay, replay
from open_autoglm.serving.service import Service

_BUSY_PAUSE_S = 0.05


class ShadowOptions(Model):
    """How much is replayed."""

    share: float = Field(1.0, gt=0, le=1, description="of the prompts that are offered")
    seed: int = Field(0, description="chooses them")
    queue: int = Field(8, ge=1, description="prompts that may wait; more are dropped")
    output_tokens: int = Field(64, ge=1, description="of an answer, at most")
    pairs: int = Field(
        1000, ge=1, description="kept of each kind, the first: looks at numbers of pairs are at the same ones"
    )
    quiet_wait_s: float = Field(5, ge=0, description="for nobody to be answered, before a pair begins anyway")


class Side(Model):
    """What one of the two did with a prompt."""

    ttft_ms: float | None = None
    tpot_ms: float | None = Field(None, description="of the tokens after the first")
    e2e_ms: float | None = None
    error: ErrorCode | None = Field(None, description="why there is no answer, and no times")


class Pair(Model):
    """One prompt, answered by both. Of the text only its lengths are kept."""

    prompt_tokens: int
    output_tokens: int = Field(description="of each answer")
    champion_first: bool
    quiet: bool = Field(description="nobody else was answered meanwhile: the times can be compared")
    champion: Side
    challenger: Side
    same_tokens: int | None = Field(description="equal leading tokens; None if an answer is missing")

    @property
    def complete(self) -> bool:
        return self.same_tokens is not None


class ShadowEvidence(Model):
    """What was replayed, and what was not."""

    pairs: tuple[Pair, ...]
    offered: int = 0
    taken: int = Field(0, description="of those, drawn for the sample")
    dropped: int = Field(0, description="of those, because the queue was full or there was no room")
    gave_way: int = Field(0, description="begun, but given up because clients waited")


class Shadow:
    """Replays a sample of what it is offered, one prompt at a time."""

    def __init__(self, champion: Service, challenger: Service, options: ShadowOptions) -> None:
        self._champion = champion
        self._challenger = challenger
        self._options = options
        self._random = np.random.default_rng(options.seed)
        self._queue: asyncio.Queue[tuple[tuple[int, ...], int]] = asyncio.Queue(options.queue)
        self._pairs: list[Pair] = []
        self._kept: Counter[tuple[bool, bool]] = Counter()
        self._quiet_pairs = 0
        self._offered = self._taken = self._dropped = self._gave_way = 0

    def offer(self, prompt: Sequence[int], max_tokens: int) -> None:
        """A prompt that a client has had its answer to, and how long that might have been. Never waits."""
        self._offered += 1
        if self._random.random() >= self._options.share:
            return
        self._taken += 1
        room = min(self._champion.max_tokens, self._challenger.max_tokens) - len(prompt)
        output_tokens = min(max_tokens, self._options.output_tokens, room)
        if output_tokens < 1 or self._queue.full():
            self._dropped += 1
            return
        self._queue.put_nowait((tuple(prompt), output_tokens))

    async def run(self) -> None:
        """Replay until cancelled."""
        while True:
            prompt, output_tokens = await self._queue.get()
            await self._until_quiet()
            while self._clients_wait() or not self._both_ready():
                await asyncio.sleep(_BUSY_PAUSE_S)
            try:
                pair = await self._pair(prompt, output_tokens)
            except GaveWay:
                self._gave_way += 1
                continue
            self._quiet_pairs += pair.quiet
            kind = (pair.quiet, pair.complete)
            if self._kept[kind] < self._options.pairs:
                self._kept[kind] += 1
                self._pairs.append(pair)

    def evidence(self) -> ShadowEvidence:
        """All so far; it holds no text and can be stored as it is."""
        return ShadowEvidence(
            pairs=tuple(self._pairs),
            offered=self._offered,
            taken=self._taken,
            dropped=self._dropped,
            gave_way=self._gave_way,
        )

    async def _until_quiet(self) -> None:
        """For a while: who is never quiet still says something, though its times say nothing."""
        deadline = time.monotonic() + self._options.quiet_wait_s
        while self._clients_answered() and time.monotonic() < deadline:
            await asyncio.sleep(_BUSY_PAUSE_S)

    # ── one pair ─────────────────────────────────────────────────────────────────────────────────

    def _clients_answered(self) -> bool:
        services = (self._champion, self._challenger)
        return any(service.begun > service.ended for service in services)

    def _clients_wait(self) -> bool:
        return self._champion.engine.load.waiting > 0 or self._challenger.engine.load.waiting > 0

    def _both_ready(self) -> bool:
        return self._champion.engine.state == self._challenger.engine.state == "ready"

    async def _pair(self, prompt: tuple[int, ...], output_tokens: int) -> Pair:
        """Raises GaveWay."""
        services = (self._champion, self._challenger)
        begun, idle = sum(service.begun for service in services), not self._clients_answered()
        # By the pairs whose times count, or the order of those would not be balanced.
        champion_first = self._quiet_pairs % 2 == 0
        found: dict[int, Replay | ErrorCode] = {}
        for which in (0, 1) if champion_first else (1, 0):
            found[which] = await self._try(services[which], prompt, output_tokens)
        return Pair(
            prompt_tokens=len(prompt),
            output_tokens=output_tokens,
            champion_first=champion_first,
            quiet=idle and begun == sum(service.begun for service in services),
            champion=_side(found[0]),
            challenger=_side(found[1]),
            same_tokens=_same_tokens(found[0], found[1]),
        )

    async def _try(self, service: Service, prompt: tuple[int, ...], output_tokens: int) -> Replay | ErrorCode:
        try:
            return await replay(service, prompt, output_tokens, unless=self._clients_wait)
        except EngineLost as error:
            return error.code


def _side(found: Replay | ErrorCode) -> Side:
    if not isinstance(found, Replay):
        return Side(error=found)
    return Side(ttft_ms=found.ttft_ms, tpot_ms=found.tpot_ms, e2e_ms=found.e2e_ms)


def _same_tokens(one: Replay | ErrorCode, other: Replay | ErrorCode) -> int | None:
    if not isinstance(one, Replay) or not isinstance(other, Replay):
        return None
    same = [left == right for left, right in zip(one.tokens, other.tokens, strict=True)]
    return same.index(False) if False in same else len(same)
