"""A version's baseline lives in two places: beside the watch's memory, and with the version in MLflow.

The watch reads its own copy, so that no judgement waits for MLflow. What it has learned is registered after
the judgement; where it knows nothing of a version (its memory was lost, or another watch takes over), what is
registered is fetched then, and holds from the next look on.
"""

from __future__ import annotations

import platform
from typing import Protocol
from urllib.parse import urlsplit

from open_autoglm.monitoring.baseline import Baseline
from open_autoglm.monitoring.config import WatchSpec
from open_autoglm.monitoring.watch_store import WatchStore
from open_autoglm.schemas import Judgement, LatencyWindow
from open_autoglm.serving.local import is_loopback


class Registry(Protocol):
    """Who keeps baselines with their versions. Both raise Unreachable."""

    def register_baseline(self, baseline: Baseline, origin: str) -> bool: ...

    def registered_baseline(self, window: LatencyWindow, origin: str) -> Baseline | None: ...


def share_baseline(
    watch: WatchSpec, judgement: Judgement, store: WatchStore, registry: Registry
) -> str | None:
    """Register what was learned, or fetch what is known elsewhere; what was done, in words. Raises
    Unreachable."""
    window, origin = judgement.window, origin_of(watch)
    if window is None:
        return None
    known = store.baseline(window)
    if known is not None:
        new = registry.register_baseline(known, origin)
        return f"the baseline of {known.windows} windows is registered" if new else None
    found = registry.registered_baseline(window, origin)
    if found is None or not found.is_of(window):
        return None
    problem = store.keep_baseline(found)
    return problem or f"its registered baseline of {found.windows} windows holds from the next look on"


def origin_of(watch: WatchSpec) -> str:
    """Where the endpoint serves: on another host, a version has another baseline. Who is asked on loopback is
    on this machine."""
    address = urlsplit(watch.endpoint)
    host = platform.node() if is_loopback(watch.endpoint) else address.hostname
    return f"{host}:{address.port or ''}"
