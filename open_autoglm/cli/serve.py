"""``open-autoglm serve``."""

from __future__ import annotations

import json
import os

import click

from open_autoglm.bundle import SERVED_TOKENS, open_bundle
from open_autoglm.serving.last_good import remember
from open_autoglm.serving.messages import EngineOptions
from open_autoglm.serving.server import ServerOptions, run
from open_autoglm.serving.service import ServiceOptions
from open_autoglm.serving.source import find_source
from open_autoglm.settings import Settings
from open_autoglm.tracking import in_use


def run_serve(
    source: str,
    host: str,
    port: int,
    name: str | None,
    slots: int,
    max_tokens: int | None,
    threads: int | None,
    chunk_tokens: int,
    reuse_prefixes: bool,
    queue: int,
    deadline_s: float,
) -> int:
    """Serve until interrupted; 0."""
    settings = Settings()
    found = find_source(source, settings)
    manifest, bundle = open_bundle(found.bundle)
    log = settings.home / "logs" / f"engine-{os.getpid()}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    options = ServerOptions(
        host=host,
        port=port,
        name=name or manifest.name,
        version=found.version,
        digest=bundle.digest,
        engine=EngineOptions(
            bundle=found.bundle,
            slots=slots,
            max_tokens=min(max_tokens or SERVED_TOKENS, manifest.context_tokens),
            threads=threads or len(os.sched_getaffinity(0)),
            chunk_tokens=chunk_tokens,
            reuse_prefixes=reuse_prefixes,
        ),
        service=ServiceOptions(queue=queue, deadline_s=deadline_s),
        log=log,
        warning=found.warning,
    )
    if found.warning:
        click.echo(f"warning: {found.warning}", err=True)
    click.echo(f"loading {options.name} ({manifest.candidate.id})", err=True)

    def ready(url: str) -> None:
        if found.model:
            remember(settings.home, found.model, found.alias, found.version, found.bundle)
        _tell(url, options.name)

    with in_use(found.bundle):
        run(options, ready)
    return 0


def _tell(url: str, name: str) -> None:
    """The URL, and a request to try."""
    body = json.dumps(
        {"model": name, "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
    )
    click.echo(f"serving {name} at {url}/v1 (docs at {url}/docs)")
    click.echo(f"try: curl {url}/v1/completions -H 'Content-Type: application/json' -d '{body}'")
