"""Breaches of a service that nobody serves, to see what is done about them."""

from __future__ import annotations

from pathlib import Path

from watched import window

from open_autoglm.monitoring.config import WatchSpec, read_watch_spec
from open_autoglm.schemas import Cause, Judgement, LatencyWindow

WATCH = """
service: {service}
endpoint: http://127.0.0.1:9
prometheus: http://127.0.0.1:9
slo: {{ttft_p95: 500ms}}
optimize: {{model_path: demo}}
"""
SLOWER = Cause(kind="engine", told="it is slower alone", evidence={"probe_s": 30.0})
NOT_ASKED = Cause(kind="unknown", told="no endpoint has the bundle", evidence={})


def watch_of(home: Path, service: str) -> WatchSpec:
    """Its file, where the flow looks for it."""
    path = home / "watches" / f"{service}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(WATCH.format(service=service))
    return read_watch_spec(path)


def bad(number: int, service: str) -> LatencyWindow:
    """Half of its answers are over the promise: two of them are a breach."""
    return window(number, bad=200, service=service)


def breached(service: str, number: int = 1) -> Judgement:
    """That is to be acted on."""
    one = bad(number, service)
    return Judgement(
        service=service, at=one.end, state="breached", act=True, due=one.end, reasons=("slow",), window=one
    )
