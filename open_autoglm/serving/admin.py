"""What an administrator may do with a running endpoint: see who answers, and change it."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, HTTPException
from pydantic import BaseModel, ConfigDict, Field

from open_autoglm.schemas import Canary
from open_autoglm.serving.fleet import Fleet
from open_autoglm.serving.probe import probe
from open_autoglm.serving.service import Service
from open_autoglm.serving.source import Source, find_source
from open_autoglm.settings import Settings

Json = dict[str, Any]


class SwapRequest(BaseModel):
    """Body of ``/admin/swap``."""

    model_config = ConfigDict(strict=True, extra="forbid")

    source: str = Field(min_length=1, description="a bundle, a study, or models:/NAME@ALIAS, on the server")


class ChallengerRequest(SwapRequest):
    """Body of ``/admin/challenger``."""

    weight_percent: float = Field(0, ge=0, le=100, description="of the callers, who stay with it")
    shadow_percent: float = Field(0, ge=0, le=100, description="of the prompts, replayed beside the traffic")


class ProbeRequest(BaseModel):
    """Body of ``/admin/probe``."""

    model_config = ConfigDict(strict=True, extra="forbid")

    seconds: float = Field(30, ge=0.1, le=120, description="the answer comes after so long")


def admin_routes(fleet: Fleet) -> APIRouter:
    """Under ``/admin``; whoever may call it is decided in front."""
    router = APIRouter(prefix="/admin", tags=["admin"])
    probing = asyncio.Lock()

    @router.get("/fleet")
    async def show() -> Json:
        """Who answers, and what has changed."""
        return fleet_status(fleet)

    @router.post("/swap")
    async def swap(body: SwapRequest) -> Json:
        """Put another bundle in the champion's place; 409 with the checks if it does not pass them."""
        await fleet.swap(await _find(body.source))
        return fleet_status(fleet)

    @router.post("/challenger")
    async def challenger(body: ChallengerRequest) -> Json:
        """Try a bundle beside the champion."""
        canary = Canary(weight_percent=body.weight_percent, shadow_percent=body.shadow_percent)
        await fleet.try_challenger(await _find(body.source), canary)
        return fleet_status(fleet)

    @router.post("/promote")
    async def promote() -> Json:
        """Put the challenger in the champion's place."""
        await fleet.promote()
        return fleet_status(fleet)

    @router.delete("/challenger")
    async def drop() -> Json:
        """Give the challenger's callers back to the champion."""
        await fleet.drop_challenger("an administrator said so")
        return fleet_status(fleet)

    @router.post("/probe")
    async def examine(body: ProbeRequest) -> Json:
        """What the bundle's own requests take now, while nobody else is answered, and what the host does
        meanwhile; 409 while another probe is under way."""
        if probing.locked():
            raise HTTPException(409, "another probe is under way")
        async with probing:
            found = await probe(fleet, body.seconds)
        return found.model_dump(mode="json")

    return router


async def _find(source: str) -> Source:
    return await asyncio.to_thread(find_source, source, Settings())


def fleet_status(fleet: Fleet) -> Json:
    return {
        "champion": _service_status(fleet.champion),
        "challenger": _service_status(fleet.challenger) if fleet.challenger else None,
        "canary": fleet.canary.model_dump(),
        "contest": fleet.contest.status.model_dump(mode="json") if fleet.contest else None,
        "events": [event.model_dump(mode="json") for event in fleet.events],
    }


def _service_status(service: Service) -> Json:
    return {
        "version": service.version,
        "bundle_digest": service.digest,
        "bundle": str(service.source.bundle),
        "candidate": service.manifest.candidate.id,
        "engine": service.engine.state,
        "restarts": service.engine.restarts,
    }
