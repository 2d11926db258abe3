"""What the endpoint's ASGI middleware has in common (asgi.readthedocs.io, version 3.0).

``scope["state"]`` carries what is known of a request from one layer to the next: ``request_id``, ``caller``
(the name of the key, or `ANONYMOUS`) from outside inwards; ``asked`` (the parsed body),
``usage``, ``role`` and ``version`` from inside outwards, for the log.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

import orjson

from open_autoglm.serving.openai_answers import error_body

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
Header = tuple[bytes, bytes]

ANONYMOUS = "anonymous"


class Refused(Exception):
    """A request that is answered with an error before it reaches the application."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        *,
        code: str | None = None,
        headers: Sequence[Header] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.code = code
        self.headers = headers


async def refuse(send: Send, refused: Refused) -> None:
    """Answer in OpenAI's shape."""
    body = orjson.dumps(error_body(str(refused), refused.kind, code=refused.code))
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *refused.headers,
    ]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def header(scope: Message, name: bytes) -> str | None:
    """The first value of a header; ``name`` in lower case."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


def state_of(scope: Message) -> dict[str, Any]:
    """What the layers tell each other of this request."""
    state: dict[str, Any] = scope.setdefault("state", {})
    return state
