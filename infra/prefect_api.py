"""Questions to Prefect's REST API, of the server that `make up` starts."""

from __future__ import annotations

import time
from http import HTTPStatus
from typing import Any

import httpx

from open_autoglm.settings import Settings

_ANSWER_S = 30.0
_PATIENCE_S = 30.0
"""With a database that others write to."""


def ask_prefect(settings: Settings, path: str, body: Any = None, *, method: str = "POST") -> Any:
    """The answer's JSON, if there is any; asked again while the database is busy (503), as Prefect's own
    clients do. Raises httpx.HTTPError if it refuses or does not answer."""
    patient_until = time.monotonic() + _PATIENCE_S
    with httpx.Client(base_url=f"{settings.prefect_url}/api", timeout=_ANSWER_S, trust_env=False) as prefect:
        while True:
            answer = prefect.request(method, path, json=body)
            if answer.status_code != HTTPStatus.SERVICE_UNAVAILABLE or time.monotonic() > patient_until:
                break
            time.sleep(0.5)
    answer.raise_for_status()
    return answer.json() if answer.content else None
