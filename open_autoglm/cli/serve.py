"""``open-autoglm serve`` and ``open-autoglm new-key``."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import click

from open_autoglm.bundle import SERVED_TOKENS, open_bundle
from open_autoglm.errors import UserError
from open_autoglm.schemas import Manifest, Slo
from open_autoglm.serving.access import AccessOptions
from open_autoglm.serving.keys import Key, key_line, keys_of, new_secret, parse_rate, read_keys
from open_autoglm.serving.last_good import remember
from open_autoglm.serving.logs import LogOptions
from open_autoglm.serving.messages import EngineOptions
from open_autoglm.serving.server import ServerOptions, run
from open_autoglm.serving.service import ServiceOptions
from open_autoglm.serving.source import find_source
from open_autoglm.serving.tls import TlsOptions
from open_autoglm.settings import Settings
from open_autoglm.tracking import CHAMPION, in_use
from open_autoglm.units import Duration


@dataclass(frozen=True)
class ServeArguments:
    """What the command was given; see its help."""

    source: str
    host: str
    port: int
    name: str | None
    slots: int
    max_tokens: int | None
    threads: int | None
    chunk_tokens: int
    reuse_prefixes: bool
    queue: int
    deadline_s: float
    slo_ttft: str | None
    slo_tpot: str | None
    slo_e2e: str | None
    follow: bool
    keys: Path | None
    no_keys: bool
    rate: str | None
    allow_host: tuple[str, ...]
    tls_cert: Path | None
    tls_key: Path | None
    log: Path | None
    log_prompts: bool


def run_serve(asked: ServeArguments) -> int:
    """Serve until interrupted; 0. Raises UserError."""
    settings = Settings()
    access, tls, slo = _access(asked, settings), _tls(asked), _slo(asked)
    found = find_source(asked.source, settings)
    manifest, _ = open_bundle(found.bundle, verify=False)  # the server verifies it
    engine_log = settings.home / "logs" / f"engine-{os.getpid()}.log"
    engine_log.parent.mkdir(parents=True, exist_ok=True)
    options = ServerOptions(
        host=asked.host,
        port=asked.port,
        name=asked.name or manifest.name,
        source=found,
        follow=asked.follow and found.alias == CHAMPION,
        engine=_engine(asked, found.bundle, manifest),
        service=ServiceOptions(queue=asked.queue, deadline_s=asked.deadline_s),
        slo=slo,
        access=access,
        tls=tls,
        log=LogOptions(file=asked.log, prompts=asked.log_prompts),
        engine_log=engine_log,
        home=settings.home,
    )
    if found.warning:
        click.echo(f"warning: {found.warning}", err=True)
    click.echo(f"loading {options.name} ({manifest.candidate.id})", err=True)

    def ready(url: str) -> None:
        if found.model:
            remember(settings.home, found.model, found.alias, found.version, found.bundle)
        _tell(url, options.name, with_key=bool(access.keys))

    with in_use(found.bundle):
        run(options, ready)
    return 0


def _access(asked: ServeArguments, settings: Settings) -> AccessOptions:
    if asked.no_keys and asked.keys:
        raise UserError("--keys and --no-keys contradict each other: give one of them")
    return AccessOptions(
        keys=() if asked.no_keys else _keys(settings, asked.keys),
        exposed=asked.no_keys,
        rate_per_min=parse_rate(asked.rate) if asked.rate else None,
        hosts=asked.allow_host,
    )


def _keys(settings: Settings, file: Path | None) -> tuple[Key, ...]:
    """From the environment and from a file. Raises UserError."""
    return (
        *keys_of(settings.api_keys.get_secret_value(), "AUTOGLM_API_KEYS", admin=False),
        *keys_of(settings.admin_keys.get_secret_value(), "AUTOGLM_ADMIN_KEYS", admin=True),
        *(read_keys(file) if file else ()),
    )


def _tls(asked: ServeArguments) -> TlsOptions | None:
    if asked.tls_cert is None and asked.tls_key is None:
        return None
    if asked.tls_cert is None or asked.tls_key is None:
        raise UserError("a certificate needs its key: give both --tls-cert and --tls-key")
    return TlsOptions(certificate=asked.tls_cert, key=asked.tls_key)


def _slo(asked: ServeArguments) -> Slo:
    def limit_ms(option: str, text: str | None) -> float | None:
        try:
            return None if text is None else Duration(text).ms
        except ValueError as error:
            raise UserError(f"{option}: {error}") from error

    return Slo(
        ttft_p95_ms=limit_ms("--slo-ttft", asked.slo_ttft),
        tpot_p95_ms=limit_ms("--slo-tpot", asked.slo_tpot),
        e2e_p95_ms=limit_ms("--slo-e2e", asked.slo_e2e),
    )


def _engine(asked: ServeArguments, bundle: Path, manifest: Manifest) -> EngineOptions:
    return EngineOptions(
        bundle=bundle,
        slots=asked.slots,
        max_tokens=min(asked.max_tokens or SERVED_TOKENS, manifest.context_tokens),
        threads=asked.threads or len(os.sched_getaffinity(0)),
        chunk_tokens=asked.chunk_tokens,
        reuse_prefixes=asked.reuse_prefixes,
    )


def _tell(url: str, name: str, *, with_key: bool) -> None:
    """The URL, and a request to try."""
    body = json.dumps(
        {"model": name, "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
    )
    key = " -H 'Authorization: Bearer KEY'" if with_key else ""
    click.echo(f"serving {name} at {url}/v1 (docs at {url}/docs)")
    click.echo(f"try: curl {url}/v1/completions{key} -H 'Content-Type: application/json' -d '{body}'")


def run_new_key(name: str, admin: bool, rate: str | None) -> None:
    """Print a key, this once, and the line that lets it in."""
    secret = new_secret()
    line = key_line(name, secret, admin=admin, rate=rate)
    click.echo(f"the key, shown only now: {secret}")
    click.echo(f"its line for --keys FILE: {line}")
