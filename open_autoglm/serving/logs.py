"""The server's log: JSON, one object a line, and a line for each request.

What people ask and are answered is theirs, and keys are secret: neither is written. Prompts are, if the
operator asks for them.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import re
import time
import uuid
from contextvars import ContextVar
from datetime import UTC, datetime
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from open_autoglm.schemas import Model
from open_autoglm.serving.asgi import App, Message, Receive, Send, header, state_of

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_log = logging.getLogger(__name__)
_request_id: ContextVar[str | None] = ContextVar("request_id", default=None)


class LogOptions(Model):
    """Where the log goes, and what it tells."""

    file: Path | None = None
    """None: standard error."""
    prompts: bool = False


def start_log(options: LogOptions) -> None:
    """Send this process's log records to one place. Raises OSError if the file cannot be opened."""
    handler: logging.Handler
    if options.file is None:
        handler = logging.StreamHandler()
    else:
        options.file.parent.mkdir(parents=True, exist_ok=True)
        handler = _OwnFile(options.file)
    handler.setFormatter(JsonLines())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    _log.setLevel(logging.INFO)


class _OwnFile(logging.handlers.WatchedFileHandler):
    """Others may rotate it; the next one, too, is for its owner alone: prompts may be in it."""

    def _open(self) -> TextIOWrapper:
        path = Path(self.baseFilename)
        path.touch(mode=0o600)
        return path.open("a", encoding="utf-8")


class JsonLines(logging.Formatter):
    """A record as a JSON object; what it has in ``fields`` becomes fields of the object."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage().strip(),
            "request_id": _request_id.get(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        # The standard library's JSON, since it can write half a surrogate pair, which a prompt may hold.
        return json.dumps({key: value for key, value in line.items() if value is not None})


class Logged:
    """ASGI middleware: names each request, and writes its line when its answer has ended."""

    def __init__(self, app: App, *, prompts: bool = False) -> None:
        self._app = app
        self._prompts = prompts

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin = time.monotonic()
        request_id = _id_of(scope)
        state_of(scope)["request_id"] = request_id
        _request_id.set(request_id)
        status, complete = 0, False

        async def send_named(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message["headers"], (b"x-request-id", request_id.encode())]
                message = {**message, "headers": headers}
            await send(message)
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            await self._app(scope, receive, send_named)
        finally:
            end = time.monotonic()
            fields = _about(scope) | {"status": status, "complete": complete}
            fields |= self._counted(scope, begin) | {"e2e_ms": _ms(end - begin)}
            _log.log(logging.ERROR if status >= 500 else logging.INFO, "request", extra={"fields": fields})

    def _counted(self, scope: Message, begin: float) -> dict[str, Any]:
        """What the application has noted."""
        state = state_of(scope)
        fields = {name: state.get(name) for name in ("role", "version")}
        if (usage := state.get("usage")) is not None:
            fields["prompt_tokens"] = usage.prompt_tokens
            fields["completion_tokens"] = usage.completion_tokens
            fields["ttft_ms"] = None if usage.first_s is None else _ms(usage.first_s - begin)
        if self._prompts and (asked := state.get("asked")) is not None:
            fields |= asked.model_dump(include={"prompt", "messages"}, mode="python")
        return fields


def _about(scope: Message) -> dict[str, Any]:
    client = scope.get("client")
    return {
        "method": scope["method"],
        "path": scope["path"],
        "caller": state_of(scope).get("caller"),
        "client": client[0] if client else None,
    }


def _id_of(scope: Message) -> str:
    """The one the client sent, if it is fit to be shown; else a new one."""
    given = header(scope, b"x-request-id")
    return given if given and _ID.fullmatch(given) else uuid.uuid4().hex


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
