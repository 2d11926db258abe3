"""Requests to an ASGI application without a server: what the layers of the endpoint see of one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from open_autoglm.serving.asgi import App, Message


@dataclass
class Answer:
    """What was sent back."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Client:
    """Sends whole requests to ``app``, as a server would."""

    app: App

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        return self.request("GET", path, headers=headers)

    def request(
        self, method: str, path: str, *, headers: Mapping[str, str] | None = None, body: bytes = b""
    ) -> Answer:
        """Raises what the application raises."""
        answer = Answer()
        scope: Message = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(errors="surrogateescape"),
            "query_string": b"",
            "headers": [(k.lower().encode(), v.encode("latin-1")) for k, v in (headers or {}).items()],
            "client": ("192.0.2.7", 1234),
            "state": {},
        }

        async def receive() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer.status = message["status"]
                answer.headers = {k.decode(): v.decode() for k, v in message["headers"]}
            else:
                answer.body += message.get("body", b"")

        asyncio.run(self._call(scope, receive, send))
        return answer

    async def _call(self, scope: Message, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)
