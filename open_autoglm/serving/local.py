"""How commands of the same user on the same machine find a running server and may administer it.

Each server leaves a file ``endpoints/PORT.json`` under the home directory, which only its owner can read: the
address, the process, and an admin key that was made for this run. Another, ``prometheus/targets/PORT.json``,
lets Prometheus find it (``file_sd_config``). A server that is killed leaves both: Prometheus sees it is down.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import logging
import os
import platform
import stat
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

import psutil
from pydantic import ValidationError

from open_autoglm.files import write_atomic
from open_autoglm.schemas import Model

_LOGGER = logging.getLogger(__name__)


class LocalEndpoint(Model):
    """A server that runs, or ran until it was killed."""

    url: str
    pid: int
    token: str
    certificate: Path | None = None
    """What its TLS certificate is checked with; None: it speaks plain HTTP."""

    def is_at(self, address: str) -> bool:
        """Whether that is this server, by any name or address of this machine."""
        ours, asked = urlsplit(self.url), urlsplit(address)
        names = {ours.hostname, platform.node(), *_own_addresses()}
        return (is_loopback(address) or asked.hostname in names) and _port(asked) == _port(ours)


def is_loopback(url: str) -> bool:
    """Whether its host is this machine, by an address that means so everywhere."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def _own_addresses() -> set[str]:
    return {one.address for found in psutil.net_if_addrs().values() for one in found}


def _port(address: SplitResult) -> int:
    return address.port or (443 if address.scheme == "https" else 80)


def _path(home: Path, port: int) -> Path:
    return home / "endpoints" / f"{port}.json"


@contextlib.contextmanager
def announced(home: Path, port: int, endpoint: LocalEndpoint, *, scraped: bool = False) -> Iterator[None]:
    """Leave the file for the length of the block; the one for Prometheus if it may be ``scraped``.

    A disk that is full costs a warning, not the server.
    """
    path, target = _path(home, port), home / "prometheus" / "targets" / f"{port}.json"
    try:
        write_atomic(path, endpoint.model_dump_json(indent=1), mode=0o600)
        if scraped:
            write_atomic(target, _target(endpoint.url))
    except OSError as error:
        _LOGGER.warning("commands, watches and Prometheus will not find this server: %s", error)
    try:
        yield
    finally:
        if _read(path) == endpoint:  # and not one that took the port meanwhile
            path.unlink()
            target.unlink(missing_ok=True)


def _target(url: str) -> str:
    scheme, _, address = url.partition("://")
    return json.dumps([{"targets": [address], "labels": {"__scheme__": scheme}}])


def local_endpoints(home: Path) -> tuple[LocalEndpoint, ...]:
    """The servers of this user that run, by port. Files of servers that were killed are passed over."""
    paths = sorted((home / "endpoints").glob("[0-9]*.json"), key=lambda path: int(path.stem))
    found = (_read(path) for path in paths)
    return tuple(endpoint for endpoint in found if endpoint is not None and psutil.pid_exists(endpoint.pid))


def _read(path: Path) -> LocalEndpoint | None:
    """None if it is not there, not ours, or not whole: whoever wrote it, its token is not to be trusted."""
    try:
        about = path.stat()
        if about.st_uid != os.getuid() or about.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            return None
        return LocalEndpoint.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None
