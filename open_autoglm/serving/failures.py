"""What went wrong, as OpenAI's clients expect to be told."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import orjson
from starlette.responses import Response

from open_autoglm.errors import UserError
from open_autoglm.serving.engine import EngineLost, NotFinite
from open_autoglm.serving.errors import Rejected, UnknownModel
from open_autoglm.serving.openai_answers import Json, error_body
from open_autoglm.serving.service import Overloaded

_LOST_RETRY_S = 2

EXPECTED = (UserError, Rejected, Overloaded, EngineLost)
"""What `failure` has an answer to; anything else is a bug."""


def failure(error: Exception) -> Response:
    """The answer to one of EXPECTED."""
    match error:
        case UnknownModel():
            return told(404, "invalid_request_error", str(error), param="model", code="model_not_found")
        case UserError():
            return told(400, "invalid_request_error", str(error))
        case Rejected():
            body = error_body(error.reason, "invalid_request_error", code="bundle_rejected")
            return json_response(body | {"checks": [check.model_dump() for check in error.checks]}, 409)
        case Overloaded():
            return _overloaded(error)
        case NotFinite():
            return told(500, "engine_error", lost_words(error), code=error.code)
        case EngineLost():
            retry = {"Retry-After": str(_LOST_RETRY_S)}
            return told(503, "engine_error", lost_words(error), code=error.code, headers=retry)
    raise error


def invalid(place: Iterable[str | int], problem: str) -> Response:
    """What was sent is not what was asked for, at ``place`` in it."""
    name = ".".join(map(str, place))
    message = f"{name}: {problem}" if name else problem
    return told(400, "invalid_request_error", message, param=name or None)


def bug(request_id: str) -> Response:
    return told(500, "server_error", f"the server failed on request {request_id}; its log says why")


def _overloaded(error: Overloaded) -> Response:
    retry = {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
    if error.full:
        return told(429, "rate_limit_error", str(error), code="queue_full", headers=retry)
    return told(503, "overloaded_error", str(error), code="deadline", headers=retry)


def lost_words(error: EngineLost) -> str:
    """Of an answer that will not come."""
    return str(error) if isinstance(error, NotFinite) else f"{error}: send the request again"


def told(
    status: int, kind: str, message: str, *, headers: dict[str, str] | None = None, **more: Any
) -> Response:
    """An error in OpenAI's shape."""
    return json_response(error_body(message, kind, **more), status, headers)


def json_response(content: Json, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(content), status, headers, media_type="application/json")
