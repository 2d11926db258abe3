"""When the deployment `regression` looks at which service: prefect.yaml has no schedule but the demo's."""

from __future__ import annotations

import time
from http import HTTPStatus
from typing import Any

import httpx

from open_autoglm.errors import UserError
from open_autoglm.settings import Settings

_DEPLOYMENT = "regression/regression"
_ANSWER_S = 30.0
_PATIENCE_S = 30.0
"""With a database that others write to: Prefect says 503 then, and its own clients ask again."""


def look_every(settings: Settings, service: str, seconds: float) -> None:
    """Look at ``service`` so often, from now on and whatever was said before. `make up` leaves it as it is,
    since the schedule has a slug. Raises UserError."""
    stop_looking(settings, service)
    asked = {"slug": _slug(service), "schedule": {"interval": seconds}, "parameters": {"config": service}}
    with _prefect(settings) as prefect:
        _answer(prefect, "POST", f"deployments/{_deployment(prefect)['id']}/schedules", [asked])


def stop_looking(settings: Settings, service: str) -> bool:
    """Whether there was anything to stop. What prefect.yaml says is not touched. Raises UserError."""
    with _prefect(settings) as prefect:
        deployment = _deployment(prefect)
        ours = [found["id"] for found in deployment["schedules"] if found["slug"] == _slug(service)]
        for schedule in ours:
            _answer(prefect, "DELETE", f"deployments/{deployment['id']}/schedules/{schedule}")
    return bool(ours)


def _slug(service: str) -> str:
    return f"watch-{service}"


def _prefect(settings: Settings) -> httpx.Client:
    return httpx.Client(base_url=f"{settings.prefect_url}/api", timeout=_ANSWER_S, trust_env=False)


def _deployment(prefect: httpx.Client) -> Any:
    return _answer(prefect, "GET", f"deployments/name/{_DEPLOYMENT}").json()


def _answer(prefect: httpx.Client, method: str, path: str, body: Any = None) -> httpx.Response:
    patient_until = time.monotonic() + _PATIENCE_S
    while True:
        try:
            answer = prefect.request(method, path, json=body)
        except httpx.TransportError as error:
            raise UserError(f"Prefect does not answer at {prefect.base_url}: {error}: make up") from None
        if answer.status_code != HTTPStatus.SERVICE_UNAVAILABLE or time.monotonic() > patient_until:
            break
        time.sleep(0.5)
    if answer.status_code == HTTPStatus.NOT_FOUND:
        raise UserError(f"Prefect at {prefect.base_url} has no deployment {_DEPLOYMENT}: make up deploys it")
    if answer.is_error:
        raise UserError(f"Prefect refused {method} {path}: {answer.status_code} {answer.text[:200]}")
    return answer
