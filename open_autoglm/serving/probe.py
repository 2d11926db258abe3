"""The endpoint looks at itself for half a minute: golden requests on the champion, and the host beside it.

Clients come first. A golden request begins only while nobody is answered, and is given up when somebody
comes; at worst a client waits until the engine has read the golden prompt. What was answered until then
counts. So every time that is reported is of the engine alone.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator

from open_autoglm.bundle import evidence_of
from open_autoglm.monitoring.golden import golden_prompts, golden_shape, golden_times
from open_autoglm.monitoring.probe import LOOK_S, HostMeter, settings_now
from open_autoglm.schemas import EndpointProbe, GoldenTimes, HostProbe, RequestShape
from open_autoglm.serving.engine import EngineLost
from open_autoglm.serving.fleet import Fleet
from open_autoglm.serving.replay import GaveWay, Replay, replay
from open_autoglm.serving.service import Service

_MOST_REQUESTS = 25
"""More would narrow no interval by much."""
_PROMPTS = 8
_BUSY_PAUSE_S = 0.02


async def probe(fleet: Fleet, seconds: float) -> EndpointProbe:
    """Examine champion and host for so long. Raises UserError if the bundle's evidence is damaged."""
    service = fleet.champion
    shape = golden_shape(service.max_tokens, evidence_of(service.manifest).request)
    golden = _Golden(fleet, service, shape, seconds)
    async with asyncio.TaskGroup() as tasks:
        host = tasks.create_task(_watch_host(seconds))
        times = tasks.create_task(golden.run())
    facts = service.engine.ready.facts if service.engine.ready else {}
    settings = await asyncio.to_thread(settings_now, service.manifest.versions, facts)
    return EndpointProbe(
        source="probe",
        bundle_digest=service.digest[:12],
        golden=times.result(),
        host=host.result(),
        settings=settings,
        slowed_share=service.engine.slower,
    )


async def _watch_host(seconds: float) -> HostProbe:
    loop = asyncio.get_running_loop()
    meter = await asyncio.to_thread(HostMeter)
    end = loop.time() + seconds
    while (left := end - loop.time()) > 0:
        await asyncio.sleep(min(left, LOOK_S))
        await asyncio.to_thread(meter.look)
    return await asyncio.to_thread(meter.read)


class _Golden:
    """Asks the golden requests one after the other, while it may."""

    def __init__(self, fleet: Fleet, service: Service, shape: RequestShape, seconds: float) -> None:
        self._fleet, self._service, self._shape = fleet, service, shape
        self._seconds = seconds
        self._answers: list[Replay] = []
        self._waits = self._gave_way = 0
        self._busy_s = 0.0
        self._ended = ""

    async def run(self) -> GoldenTimes:
        prompts = await asyncio.to_thread(golden_prompts, self._service.tokenizer, self._shape, _PROMPTS)
        try:
            async with asyncio.timeout(self._seconds):
                await self._ask(itertools.cycle(prompts))
        except TimeoutError:
            if len(self._answers) < 2 and not self._busy_s:
                self._ended = f"not two golden requests were answered in {self._seconds:g} s"
        except EngineLost as error:
            self._ended = str(error)
        counted = self._answers[1:]  # the first compiles, or reads for the first time
        return golden_times(
            self._shape,
            ((answer.ttft_ms, answer.tpot_ms) for answer in counted),
            waits=self._waits,
            gave_way=self._gave_way,
            busy_share=min(self._busy_s / self._seconds, 1.0),
            ended=self._ended,
        )

    async def _ask(self, prompts: Iterator[tuple[int, ...]]) -> None:
        """Raises EngineLost."""
        while len(self._answers) <= _MOST_REQUESTS:
            await self._until_alone()
            if self._fleet.champion is not self._service:
                self._ended = "the champion was replaced meanwhile"
                return
            await self._ask_one(next(prompts))

    async def _ask_one(self, prompt: tuple[int, ...]) -> None:
        begin_s = time.monotonic()
        output_tokens = self._shape.output_tokens
        try:
            answer = await replay(self._service, prompt, output_tokens, unless=self._in_company)
        except GaveWay as given_up:
            self._gave_way += 1
            self._busy_s += time.monotonic() - begin_s
            if given_up.until_then is None:
                return
            answer = given_up.until_then
        self._answers.append(answer)

    async def _until_alone(self) -> None:
        if not self._in_company(running=0):
            return
        self._waits += 1
        begin_s = time.monotonic()
        try:
            while self._in_company(running=0):
                await asyncio.sleep(_BUSY_PAUSE_S)
        finally:  # the time may be up meanwhile
            self._busy_s += time.monotonic() - begin_s

    def _in_company(self, running: int = 1) -> bool:
        """Whether any engine here does more than the champion's ``running`` requests of ours."""
        champion, challenger = self._service, self._fleet.challenger
        if champion.busy or champion.engine.load.running + champion.engine.load.waiting > running:
            return True
        return challenger is not None and (challenger.busy or challenger.engine.load.running > 0)
