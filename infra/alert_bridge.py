"""From Alertmanager to Prefect, which has no webhooks: each alert becomes an event that may start a run.

    python infra/alert_bridge.py --port 9195

An alert that is told again is the same event again, of which Prefect starts nothing twice. Where Prefect is
comes from its own variables: PREFECT_API_URL, and PREFECT_API_KEY or PREFECT_API_AUTH_STRING
(``user:password``).
"""

from __future__ import annotations

import base64
import logging
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, Literal
from uuid import NAMESPACE_URL, uuid5

import click
import httpx
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import AwareDatetime, BaseModel, Field
from starlette.middleware.trustedhost import TrustedHostMiddleware

from open_autoglm.serving.limits import Limits

HOST = "127.0.0.1"
EVENT = "autoglm.slo.breached"
_PREFECT_S = 5.0
_BODY_BYTES = 1 << 20

log = logging.getLogger("alert_bridge")


class Alert(BaseModel):
    """One of Alertmanager's; what is not used here is passed over."""

    status: Literal["firing", "resolved"]
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    startsAt: AwareDatetime  # noqa: N815 - Alertmanager's name for it
    fingerprint: str = Field(min_length=1)


class Notification(BaseModel):
    """What Alertmanager posts to a webhook (prometheus.io/docs, "webhook_config")."""

    version: Literal["4"]
    alerts: tuple[Alert, ...] = Field(max_length=1000)


def event_of(alert: Alert) -> dict[str, Any]:
    """Prefect's. Its id is the alert's, as long as that lasts."""
    service = alert.labels["model_name"]
    begun = alert.startsAt.astimezone(UTC).isoformat()
    return {
        "id": str(uuid5(NAMESPACE_URL, f"{alert.fingerprint}{begun}")),
        "occurred": datetime.now(UTC).isoformat(),  # Prefect does not act on what it hears of too late
        "event": EVENT,
        "resource": {"prefect.resource.id": f"autoglm.service.{service}", "prefect.resource.name": service},
        "payload": {
            "service": service,
            "alert": alert.labels.get("alertname", ""),
            "stage": alert.labels.get("stage", ""),
            "summary": alert.annotations.get("summary", ""),
            "since": begun,
        },
    }


def authorization(environment: Mapping[str, str]) -> dict[str, str]:
    """The header that Prefect's own client would send."""
    if key := environment.get("PREFECT_API_KEY"):
        return {"Authorization": f"Bearer {key}"}
    if secret := environment.get("PREFECT_API_AUTH_STRING"):
        return {"Authorization": f"Basic {base64.b64encode(secret.encode()).decode()}"}
    return {}


def create_app(prefect_url: str, headers: Mapping[str, str]) -> FastAPI:
    """``prefect_url`` ends with ``/api``."""

    @asynccontextmanager
    async def with_client(app: FastAPI) -> AsyncIterator[None]:
        async with httpx.AsyncClient(headers=headers, timeout=_PREFECT_S) as client:
            app.state.client = client
            yield

    app = FastAPI(lifespan=with_client, docs_url=None, redoc_url=None, openapi_url=None)
    # A web page that calls this machine by a name of its own is not Alertmanager.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    app.add_middleware(Limits, body_bytes=_BODY_BYTES, bodies_bytes=8 * _BODY_BYTES, read_s=_PREFECT_S)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/alerts")
    async def alerts(body: Notification, request: Request) -> JSONResponse:
        """503 if Prefect did not take them: Alertmanager then tells them again."""
        firing = [alert for alert in body.alerts if alert.status == "firing"]
        events = [event_of(alert) for alert in firing if alert.labels.get("model_name")]
        for alert in firing:
            log.info("%s: %s", alert.labels.get("alertname"), alert.annotations.get("summary"))
        reason = await _tell(request.app.state.client, f"{prefect_url}/events", events) if events else None
        if reason is not None:
            log.warning(reason)
            return JSONResponse({"reason": reason}, 503)
        return JSONResponse({"events": len(events)})

    return app


async def _tell(client: httpx.AsyncClient, url: str, events: list[dict[str, Any]]) -> str | None:
    """Why Prefect has not taken them, if it has not."""
    try:
        response = await client.post(url, json=events)
    except httpx.HTTPError as error:
        return f"Prefect does not answer at {url}: {str(error) or type(error).__name__}"
    if response.is_success:
        return None
    return f"Prefect refused the events with status {response.status_code}: {response.text[:200]}"


@click.command()
@click.option("--port", type=click.IntRange(1, 65535), required=True)
def main(port: int) -> None:
    """Listen on the loopback interface until interrupted."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    url = os.environ.get("PREFECT_API_URL", "http://127.0.0.1:4200/api").rstrip("/")
    uvicorn.run(create_app(url, authorization(os.environ)), host=HOST, port=port, log_level="warning")


if __name__ == "__main__":
    main()
