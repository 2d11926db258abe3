"""What an administrator may do with a running endpoint: see who answers, and change it."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, HTTPException, Response
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from open_autoglm.schemas import Canary, EndpointProbe, History, Model
from open_autoglm.serving.contest import ContestStatus
from open_autoglm.serving.engine import State
from open_autoglm.serving.fleet import Event, Fleet
from open_autoglm.serving.openapi import ADMIN_BODY, KEY, RENEWED, refusals
from open_autoglm.serving.probe import probe
from open_autoglm.serving.service import Service
from open_autoglm.serving.source import Source, find_source
from open_autoglm.settings import Settings


class SwapRequest(BaseModel):
    """Body of ``/admin/swap``."""

    model_config = ConfigDict(strict=True, extra="forbid")

    source: str = Field(min_length=1, description="a bundle, a study, or models:/NAME@ALIAS, on the server")


class ChallengerRequest(SwapRequest):
    """Body of ``/admin/challenger``."""

    weight_percent: float = Field(0, ge=0, le=100, description="of the callers, who stay with it")
    shadow_percent: float = Field(0, ge=0, le=100, description="of the prompts, replayed beside the traffic")


class ServiceStatus(Model):
    """One bundle that answers."""

    version: str
    bundle_digest: str
    bundle: str
    candidate: str
    engine: State
    restarts: int
    slower: float = Field(0, description="by what share it was made slower, to rehearse")


class FleetStatus(Model):
    """Who answers, who is tried, and what has changed."""

    champion: ServiceStatus
    challenger: ServiceStatus | None
    canary: Canary
    contest: ContestStatus | None
    events: tuple[Event, ...]


class SlowRequest(BaseModel):
    """Body of ``/admin/slow``."""

    model_config = ConfigDict(strict=True, extra="forbid")

    share: float = Field(ge=0, le=1000, description="that each call of the model takes longer; 0: none")


class ProbeRequest(BaseModel):
    """Body of ``/admin/probe``."""

    model_config = ConfigDict(strict=True, extra="forbid")

    seconds: float = Field(30, ge=0.1, le=120, description="the answer comes after so long")


def admin_routes(fleet: Fleet) -> APIRouter:
    """Under ``/admin``; whoever may call it is decided in front."""
    router = APIRouter(prefix="/admin", tags=["admin"])
    probing = asyncio.Lock()
    _add_engine(router, fleet)

    @router.get("/fleet", responses=KEY)
    async def show() -> FleetStatus:
        """Who answers, and what has changed."""
        return fleet_status(fleet)

    @router.get("/history", responses=refusals(400, 401, 403) | {200: {"model": History}})
    async def history(begin: AwareDatetime, end: AwareDatetime) -> Response:
        """The series from ``begin`` to ``end``: as they were each minute of the last day, and are now."""
        recording = fleet.history.between(begin.timestamp(), end.timestamp())
        body = await asyncio.to_thread(lambda: recording.history().model_dump_json())
        return Response(body, media_type="application/json")

    @router.post("/swap", responses=ADMIN_BODY)
    async def swap(body: SwapRequest) -> FleetStatus:
        """Put another bundle in the champion's place; 409 with the checks if it does not pass them."""
        await fleet.swap(await _find(body.source))
        return fleet_status(fleet)

    @router.post("/challenger", responses=ADMIN_BODY)
    async def challenger(body: ChallengerRequest) -> FleetStatus:
        """Try a bundle beside the champion."""
        canary = Canary(weight_percent=body.weight_percent, shadow_percent=body.shadow_percent)
        await fleet.try_challenger(await _find(body.source), canary)
        return fleet_status(fleet)

    @router.post("/promote", responses=refusals(400, 401, 403, 415))
    async def promote() -> FleetStatus:
        """Put the challenger in the champion's place."""
        await fleet.promote()
        return fleet_status(fleet)

    @router.delete("/challenger", responses=KEY)
    async def drop() -> FleetStatus:
        """Give the challenger's callers back to the champion."""
        await fleet.drop_challenger("an administrator said so")
        return fleet_status(fleet)

    @router.post("/probe", responses=refusals(400, 401, 403, 409, 415))
    async def examine(body: ProbeRequest) -> EndpointProbe:
        """What the bundle's own requests take now, while nobody else is answered, and what the host does
        meanwhile; 409 while another probe is under way."""
        if probing.locked():
            raise HTTPException(409, "another probe is under way")
        async with probing:
            return await probe(fleet, body.seconds)

    return router


def _add_engine(router: APIRouter, fleet: Fleet) -> None:
    """What may be done to the champion's engine itself."""

    @router.post("/renew", responses=RENEWED)
    async def renew() -> FleetStatus:
        """Start the champion's engine anew, beside the one that answers until then; 409 as for ``/swap``."""
        await fleet.renew()
        return fleet_status(fleet)

    @router.post("/slow", responses=refusals(400, 401, 403, 415, 503))
    async def slow(body: SlowRequest) -> FleetStatus:
        """Make the champion's engine slower, to rehearse what follows, until its process is another one."""
        fleet.slow_down(body.share)
        return fleet_status(fleet)


async def _find(source: str) -> Source:
    return await asyncio.to_thread(find_source, source, Settings())


def fleet_status(fleet: Fleet) -> FleetStatus:
    return FleetStatus(
        champion=_service_status(fleet.champion),
        challenger=_service_status(fleet.challenger) if fleet.challenger else None,
        canary=fleet.canary,
        contest=fleet.contest.status if fleet.contest else None,
        events=tuple(fleet.events),
    )


def _service_status(service: Service) -> ServiceStatus:
    return ServiceStatus(
        version=service.version,
        bundle_digest=service.digest,
        bundle=str(service.source.bundle),
        candidate=service.manifest.candidate.id,
        engine=service.engine.state,
        restarts=service.engine.restarts,
        slower=service.engine.slower,
    )
