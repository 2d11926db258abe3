"""Who is let in: an ASGI middleware that knows callers by their keys and counts how often they come.

What a server on the loopback interface must fear are web pages: a page that somebody has open may send
requests to ``localhost``, and by giving its own name this machine's address (DNS rebinding) even read the
answers. So unknown ``Host`` headers are refused, and so is a POST that a page could send without asking
first, which one of type ``application/json`` is not (fetch.spec.whatwg.org, "CORS-safelisted").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from pydantic import Field

from open_autoglm.schemas import Model
from open_autoglm.serving.asgi import (
    ANONYMOUS,
    App,
    Message,
    Receive,
    Refused,
    Send,
    header,
    refuse,
    state_of,
)
from open_autoglm.serving.keys import Bucket, Key, find

_OPEN = frozenset({"/healthz", "/readyz"})
_OPEN_ON_LOOPBACK = _OPEN | {"/metrics", "/docs", "/openapi.json"}
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


class AccessOptions(Model):
    """What is asked of callers."""

    keys: tuple[Key, ...] = Field((), description="none: whoever reaches the server may use its /v1")
    exposed: bool = Field(False, description="no keys, and yet not on the loopback interface alone")
    rate_per_min: int | None = Field(
        None, gt=0, description="requests of each key that has no rate of its own"
    )
    hosts: tuple[str, ...] = Field((), description="names in Host headers besides those of loopback")


def known_hosts(host: str, more: Iterable[str], *, loopback: bool) -> frozenset[str] | None:
    """Names that a request may call the server by; None: any."""
    named = frozenset(name.lower() for name in more)
    if loopback:
        return _LOOPBACK_NAMES | {host.lower()} | named
    return named or None


class Access:
    """Refuses strangers (401), what a key does not allow (403), and who comes too often (429)."""

    def __init__(
        self,
        app: App,
        options: AccessOptions,
        *,
        admin: Key,
        hosts: frozenset[str] | None,
        loopback: bool,
        refused: Callable[[str], None],
    ) -> None:
        """``admin`` is the server's own key; ``refused`` counts a reason."""
        self._app = app
        self._keys = (*options.keys, admin)
        self._needs_key = bool(options.keys)
        self._hosts = hosts
        self._open = _OPEN_ON_LOOPBACK if loopback else _OPEN
        self._refused = refused
        rates = {key.name: key.rate_per_min or options.rate_per_min for key in options.keys}
        rates[ANONYMOUS] = options.rate_per_min
        self._buckets = {name: Bucket(rate) for name, rate in rates.items() if rate is not None}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._admit(scope)
            except Refused as refused:
                await refuse(send, refused)
                return
        await self._app(scope, receive, send)

    def _admit(self, scope: Message) -> None:
        """Note the caller. Raises Refused."""
        self._check_page(scope)
        key = self._key(scope)
        state_of(scope)["caller"] = caller = key.name if key else ANONYMOUS
        path = scope["path"]
        if path == "/admin" or path.startswith("/admin/"):
            self._check_admin(key)
        elif self._needs_key and key is None and path not in self._open:
            raise _stranger(scope)
        if path.startswith("/v1/"):
            self._check_rate(caller)

    def _check_page(self, scope: Message) -> None:
        host = header(scope, b"host")  # absent from HTTP/1.0 only, which no browser speaks
        if self._hosts is not None and host is not None and _name(host) not in self._hosts:
            raise Refused(
                403,
                f"this server is not known as {_name(host)!r}: start it with --allow-host to let it be",
                code="unknown_host",
            )
        if scope["method"] == "POST" and not _is_json(header(scope, b"content-type")):
            raise Refused(415, "send JSON, and say so: Content-Type: application/json")

    def _key(self, scope: Message) -> Key | None:
        scheme, _, secret = (header(scope, b"authorization") or "").partition(" ")
        return find(self._keys, secret.strip()) if scheme.lower() == "bearer" else None

    def _check_admin(self, key: Key | None) -> None:
        if key is None:
            raise _unauthorized("administration needs an admin key: send Authorization: Bearer KEY")
        if not key.admin:
            raise Refused(
                403, f"the key {key.name} is no admin key", "permission_error", code="admin_key_needed"
            )

    def _check_rate(self, caller: str) -> None:
        bucket = self._buckets.get(caller)
        if bucket is None or (wait_s := bucket.take()) == 0:
            return
        self._refused("rate_limited")
        retry_s = math.ceil(wait_s)
        raise Refused(
            429,
            f"{caller} has sent more requests than its rate allows: wait {retry_s} s",
            "rate_limit_error",
            code="rate_limit_exceeded",
            headers=[(b"retry-after", str(retry_s).encode())],
        )


def _stranger(scope: Message) -> Refused:
    if header(scope, b"authorization") is None:
        return _unauthorized("this server needs a key: send Authorization: Bearer KEY")
    return _unauthorized("this key is not known here")


def _unauthorized(message: str) -> Refused:
    """As RFC 9110, section 15.5.2, wants it."""
    return Refused(401, message, code="invalid_api_key", headers=[(b"www-authenticate", b"Bearer")])


def _name(host: str) -> str:
    """``Host`` without its port."""
    name, _, port = host.rpartition(":")
    return (name if name and port.isdigit() else host).strip("[]").lower()


def _is_json(content_type: str | None) -> bool:
    kind = (content_type or "").partition(";")[0].strip().lower()
    return kind == "application/json"
