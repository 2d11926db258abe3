"""Where a service's windows come from: its Prometheus if it has one, or the endpoint's own memory."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from open_autoglm.monitoring.config import WatchSpec
from open_autoglm.monitoring.endpoint import LocalEndpoints
from open_autoglm.monitoring.prometheus import Prometheus
from open_autoglm.monitoring.windows import NoWindow, Source, window
from open_autoglm.schemas import LatencyWindow


def fetch(spec: WatchSpec, home: Path, begin: datetime, now: datetime) -> LatencyWindow | NoWindow:
    """What happened from ``begin`` until now."""
    source: Source = (
        LocalEndpoints(home, spec.endpoint) if spec.prometheus is None else Prometheus(spec.prometheus)
    )
    return window(source, spec.service, begin, now)
