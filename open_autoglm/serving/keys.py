"""API keys: who may ask, who may administer, and how often.

Only SHA-256 digests are kept. They need neither salt nor stretching as passwords do: a key is random and
long, so there is nothing to guess from its digest.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from pydantic import Field

from open_autoglm.errors import UserError
from open_autoglm.schemas import Model
from open_autoglm.serving.asgi import ANONYMOUS

LOCAL_ADMIN = "local-admin"
"""Name of the key that a server makes for commands on its own machine; see `open_autoglm.serving.local`."""

_SHORTEST = 16
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_RATE = re.compile(r"([0-9]{1,9})/min")


class Key(Model):
    """One key, without the key."""

    name: str
    digest: bytes = Field(repr=False, description="SHA-256 of the key")
    admin: bool = False
    rate_per_min: int | None = Field(None, gt=0, description="requests; None: the server's own limit")


def find(keys: Iterable[Key], secret: str) -> Key | None:
    """The key whose secret this is. Takes as long for a wrong one as for a right one."""
    digest, found = digest_of_key(secret), None
    for key in keys:
        if hmac.compare_digest(digest, key.digest):
            found = key
    return found


def digest_of_key(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


# ── where keys come from ─────────────────────────────────────────────────────────────────────────


def new_secret() -> str:
    """A key of 256 random bits; the prefix lets scanners for leaked secrets find it."""
    return f"sk-autoglm-{secrets.token_urlsafe(32)}"


def key_line(name: str, secret: str, *, admin: bool, rate: str | None) -> str:
    """The line that lets ``secret`` in. Raises UserError."""
    words = [name, *(["admin"] if admin else []), f"sha256:{digest_of_key(secret).hex()}"]
    line = " ".join([*words, *([f"rate={rate}"] if rate else [])])
    _parse(line, "new key")
    return line


def parse_rate(text: str) -> int:
    """Requests per minute of ``N/min``. Raises UserError."""
    match = _RATE.fullmatch(text)
    if match is None or int(match[1]) == 0:
        raise UserError(f"{text!r} is no rate: write N/min, for example 60/min")
    return int(match[1])


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys of a file with a line each, ``NAME [admin] sha256:HEX [rate=N/min]``; ``#`` begins a comment.

    Raises UserError with the line's number, and if others than the file's owner may read or change it.
    """
    try:
        mode = path.stat().st_mode
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the keys in {path} cannot be read: {error}") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError(f"others may read or change {path}: protect it with `chmod 600 {path}`")
    keys = tuple(_lines(path, text))
    if not keys:
        raise UserError(f"{path} holds no key: make one with `open-autoglm new-key NAME`")
    return keys


def _lines(path: Path, text: str) -> Iterator[Key]:
    seen: dict[str | bytes, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        content = line.partition("#")[0]
        if not content.strip():
            continue
        where = f"{path}, line {number}"
        key = _parse(content, where)
        for mark, what in ((key.name, f"the name {key.name}"), (key.digest, "this key")):
            if mark in seen:
                raise UserError(f"{where}: {what} is on line {seen[mark]} already")
            seen[mark] = number
        yield key


def _parse(line: str, where: str) -> Key:
    name, *words = line.split()
    if not _NAME.fullmatch(name) or name in (ANONYMOUS, LOCAL_ADMIN):
        raise UserError(f"{where}: {name!r} is no name: use letters, digits, '.', '_' or '-', at most 64")
    admin = words[:1] == ["admin"]
    words = words[admin:]
    digest = _DIGEST.fullmatch(words[0]) if words else None
    rate = words[1].removeprefix("rate=") if len(words) == 2 and words[1].startswith("rate=") else None
    if digest is None or len(words) > 1 + (rate is not None):
        raise UserError(
            f"{where}: write NAME [admin] sha256:HEX [rate=N/min], as `open-autoglm new-key` does"
        )
    per_min = None if rate is None else parse_rate(rate)
    return Key(name=name, digest=bytes.fromhex(digest[1]), admin=admin, rate_per_min=per_min)


def keys_of(text: str, variable: str, *, admin: bool) -> tuple[Key, ...]:
    """The keys that an environment variable holds, separated by commas. Raises UserError.

    Each is named by the beginning of its digest, which stays the same whatever stands beside it.
    """
    found = []
    for secret in filter(None, (part.strip() for part in text.split(","))):
        if len(secret) < _SHORTEST:
            raise UserError(
                f"{variable} holds a key of {len(secret)} characters, and fewer than {_SHORTEST} can be "
                "guessed: make one with `open-autoglm new-key NAME`"
            )
        digest = digest_of_key(secret)
        found.append(Key(name=f"key-{digest.hex()[:8]}", digest=digest, admin=admin))
    return tuple(found)


# ── how often ────────────────────────────────────────────────────────────────────────────────────


class Bucket:
    """A token bucket: a minute's requests at once, then as many as flow in (RFC 2697 has the idea)."""

    def __init__(self, per_min: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = float(per_min)
        self._per_s = per_min / 60
        self._clock = clock
        self._left = self._most
        self._seen = clock()

    def take(self) -> float:
        """0 if one more request is allowed, which it then has used; else seconds until one is."""
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._seen) * self._per_s)
        self._seen = now
        if self._left >= 1:
            self._left -= 1
            return 0.0
        return (1 - self._left) / self._per_s
