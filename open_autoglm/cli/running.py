"""``open-autoglm endpoints`` and ``swap``: the servers of this user that run on this machine."""

from __future__ import annotations

import json
import re
import ssl
from pathlib import Path
from typing import Any

import click
import httpx

from open_autoglm.errors import UserError
from open_autoglm.serving.local import LocalEndpoint, local_endpoints
from open_autoglm.settings import Settings

_READ_S = 10.0
_SWAP_S = 1800.0
"""A bundle may have to be downloaded, its engine built, and both checked."""

_TOLD_EVENTS = 5
_PER_CENT = re.compile(r"(\d+(?:\.\d+)?)%")

Json = dict[str, Any]


def run_endpoints(*, as_json: bool) -> int:
    """Say who answers at each server; 0."""
    found = {here.url: _ask(here, "GET", "/admin/fleet") for here in local_endpoints(Settings().home)}
    if as_json:
        click.echo(json.dumps(found))
    elif not found:
        click.echo("no endpoint runs here: start one with open-autoglm serve")
    else:
        for url, fleet in found.items():
            _tell(url, fleet)
    return 0


def run_swap(source: str, *, port: int | None, as_json: bool) -> int:
    """Let a running server serve another bundle; 0."""
    here = _choose(local_endpoints(Settings().home), port)
    # The server may run in another directory.
    named = str(Path(source).absolute()) if Path(source).exists() else source
    fleet = _ask(here, "POST", "/admin/swap", {"source": named})
    click.echo(json.dumps(fleet) if as_json else fleet["events"][-1]["told"])
    return 0


def run_slow(by: str, *, port: int | None, as_json: bool) -> int:
    """Make a running server's champion slower; 0."""
    found = _PER_CENT.fullmatch(by)
    if found is None:
        raise UserError(f"--by: {by!r} is no share of the time; write it like 60%")
    here = _choose(local_endpoints(Settings().home), port)
    fleet = _ask(here, "POST", "/admin/slow", {"share": float(found[1]) / 100})
    click.echo(json.dumps(fleet) if as_json else fleet["events"][-1]["told"])
    return 0


def _choose(running: tuple[LocalEndpoint, ...], port: int | None) -> LocalEndpoint:
    """The only server, or the one at ``port``. Raises UserError."""
    if not running:
        raise UserError("no endpoint runs here: start one with open-autoglm serve")
    ports = {httpx.URL(here.url).port: here for here in running}
    if port is None and len(running) > 1:
        raise UserError(f"several endpoints run here: choose one by --port: {', '.join(map(str, ports))}")
    if port is not None and port not in ports:
        raise UserError(f"--port: no endpoint runs at {port}; there is one at {', '.join(map(str, ports))}")
    return running[0] if port is None else ports[port]


def _ask(here: LocalEndpoint, method: str, path: str, body: Json | None = None) -> Json:
    """The answer. Raises UserError with the server's own words."""
    timeout = httpx.Timeout(_SWAP_S if body else _READ_S, connect=_READ_S)
    verify = ssl.create_default_context(cafile=here.certificate) if here.certificate else True
    headers = {"Authorization": f"Bearer {here.token}"}
    try:
        # Through no proxy that the environment names: it would hear the key, and cannot reach a loopback.
        with httpx.Client(headers=headers, timeout=timeout, verify=verify, trust_env=False) as client:
            response = client.request(method, f"{here.url}{path}", json=body)
    except httpx.HTTPError as error:
        raise UserError(f"{here.url} does not answer: {error}; is its process {here.pid} alive?") from error
    try:
        answer: Json = response.json()
        if not response.is_error:
            return answer
        told = str(answer["error"]["message"])
    except (ValueError, KeyError, TypeError):
        told = f"{here.url} answered with status {response.status_code} and not as an endpoint does"
    raise UserError(told)


def _tell(url: str, fleet: Json) -> None:
    click.echo(url)
    for role in ("champion", "challenger"):
        if (service := fleet[role]) is not None:
            version = f"version {service['version']}, " if service["version"] else ""
            state = f"engine {service['engine']}, {service['restarts']} restarts"
            state += f", {service['slower']:.0%} slower on purpose" if service["slower"] else ""
            called = f"{service['candidate']} ({version}{service['bundle_digest'][:12]})"
            click.echo(f"  {role:<10} {called}: {state}")
    if (contest := fleet["contest"]) is not None:
        verdict = contest["verdict"]["reason"] if contest["verdict"] else "not judged yet"
        seen = f"{contest['pairs']} pairs, {contest['answers']} answers to clients"
        click.echo(f"  {'trial':<10} {seen}: {verdict}")
    for event in fleet["events"][-_TOLD_EVENTS:]:
        click.echo(f"  {event['time'][:19].replace('T', ' ')} UTC  {event['told']}")
