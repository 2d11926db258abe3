"""When the deployment `regression` looks at which service: prefect.yaml has no schedule but the demo's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

import httpx
from prefect_api import ask_prefect

from open_autoglm.errors import UserError
from open_autoglm.settings import Settings

_DEPLOYMENT = "regression/regression"


def look_every(settings: Settings, service: str, seconds: float) -> None:
    """Look at ``service`` so often, from now on and whatever was said before. `make up` leaves it as it is,
    since the schedule has a slug. Raises UserError."""
    stop_looking(settings, service)
    asked = {"slug": _slug(service), "schedule": {"interval": seconds}, "parameters": {"config": service}}
    with _told(settings):
        ask_prefect(settings, f"deployments/{_deployment(settings)['id']}/schedules", [asked])


def stop_looking(settings: Settings, service: str) -> bool:
    """Whether there was anything to stop. What prefect.yaml says is not touched. Raises UserError."""
    with _told(settings):
        deployment = _deployment(settings)
        ours = [found["id"] for found in deployment["schedules"] if found["slug"] == _slug(service)]
        for schedule in ours:
            ask_prefect(settings, f"deployments/{deployment['id']}/schedules/{schedule}", method="DELETE")
    return bool(ours)


def _slug(service: str) -> str:
    return f"watch-{service}"


def _deployment(settings: Settings) -> Any:
    return ask_prefect(settings, f"deployments/name/{_DEPLOYMENT}", method="GET")


@contextmanager
def _told(settings: Settings) -> Iterator[None]:
    """What goes wrong, as a UserError."""
    try:
        yield
    except httpx.TransportError as error:
        raise UserError(f"Prefect does not answer at {settings.prefect_url}: {error}: make up") from None
    except httpx.HTTPStatusError as error:
        if error.response.status_code == HTTPStatus.NOT_FOUND:
            raise UserError(
                f"Prefect at {settings.prefect_url} has no deployment {_DEPLOYMENT}: make up deploys it"
            ) from None
        raise UserError(f"Prefect refused: {error}: {error.response.text[:200]}") from None
