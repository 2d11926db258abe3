"""A challenger's trial: prompts in its shadow, its own clients' answers, and the judge who looks at both."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from open_autoglm.bundle import evidence_of
from open_autoglm.schemas import Model
from open_autoglm.serving.judge import CLIENT_LOOKS, Canary, Policy, Samples, Verdict, judge
from open_autoglm.serving.service import Asked, Outcome, Service
from open_autoglm.serving.shadow import Shadow, ShadowOptions

_LOGGER = logging.getLogger(__name__)

_EVERY_S = 5.0


class ContestStatus(Model):
    """How far the trial has come."""

    pairs: int
    quiet_pairs: int
    answers: int
    verdict: Verdict | None


class Contest:
    """Runs from its making to its first verdict, or to `close`."""

    def __init__(
        self,
        champion: Service,
        challenger: Service,
        shadow_percent: float,
        act: Callable[[Verdict], Awaitable[None]],
        *,
        policy: Policy | None = None,
        every_s: float = _EVERY_S,
    ) -> None:
        """``act`` is called with the first verdict that is not to wait. Must be made in a running loop."""
        self._champion, self._challenger = champion, challenger
        self._act = act
        self._policy = policy or Policy()
        self._every_s = every_s
        self._outcomes: list[Outcome] = []
        """Of the challenger's own clients, the first: as many as are ever looked at."""
        self._answers = 0
        self._lost: list[str] = []
        self._begin_s = time.monotonic()
        self._verdict: Verdict | None = None
        self._shadow: Shadow | None = None
        self._tasks = [asyncio.create_task(self._judge())]
        if shadow_percent > 0:
            self._shadow = Shadow(champion, challenger, ShadowOptions(share=shadow_percent / 100))
            self._tasks.append(asyncio.create_task(self._shadow.run()))
        for task in self._tasks:
            task.add_done_callback(_tell_bug)
        champion.heard, challenger.heard = self._of_champion, self._of_challenger

    @property
    def status(self) -> ContestStatus:
        pairs = self._shadow.evidence().pairs if self._shadow else ()
        return ContestStatus(
            pairs=len(pairs),
            quiet_pairs=sum(pair.quiet for pair in pairs),
            answers=self._answers,
            verdict=self._verdict,
        )

    def close(self) -> None:
        """Nothing of it goes on; may be called while it acts."""
        for service in (self._champion, self._challenger):
            service.heard = None
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()

    # ── what is heard ────────────────────────────────────────────────────────────────────────────

    def _of_champion(self, asked: Asked, outcome: Outcome) -> None:
        if self._shadow is not None and outcome.error is None:
            self._shadow.offer(asked.prompt, asked.max_tokens)

    def _of_challenger(self, asked: Asked, outcome: Outcome) -> None:
        if outcome.error is not None:
            self._lost.append(outcome.error)
        else:
            self._answers += 1
            if len(self._outcomes) < CLIENT_LOOKS[-1]:
                self._outcomes.append(outcome)
            self._of_champion(asked, outcome)

    # ── the judge ────────────────────────────────────────────────────────────────────────────────

    async def _judge(self) -> None:
        ours, theirs = (
            evidence_of(service.manifest).quality for service in (self._challenger, self._champion)
        )
        while True:
            await asyncio.sleep(self._every_s)
            # SciPy is imported by the first, and the loop has tokens to send meanwhile.
            found = await asyncio.to_thread(judge, self._samples(), ours, theirs, self._policy)
            self._verdict = found
            if found.kind != "wait":
                await self._act(found)
                return

    def _samples(self) -> Samples:
        outcomes = tuple(self._outcomes)
        canary = Canary(
            answers=self._answers,
            lost=self._lost.count("engine_lost"),
            not_finite=self._lost.count("not_finite"),
            ttft_ms=tuple(one.ttft_ms for one in outcomes if one.ttft_ms is not None),
            e2e_ms=tuple(one.e2e_ms for one in outcomes),
        )
        if self._shadow is None:
            return Samples(canary=canary)
        shadowed_s = time.monotonic() - self._begin_s
        return Samples(pairs=self._shadow.evidence().pairs, shadowed_s=shadowed_s, canary=canary)


def _tell_bug(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _LOGGER.error("the challenger is not judged any more", exc_info=error)
