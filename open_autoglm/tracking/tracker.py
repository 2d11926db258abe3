"""One MLflow server or database, and what Open-AutoGLM keeps there."""

from __future__ import annotations

from open_autoglm.tracking.registry import Registry
from open_autoglm.tracking.runs import Studies
from open_autoglm.tracking.watches import Watches


class Tracker(Studies, Registry, Watches):
    """Studies and watches in runs, champions in the registry, over one connection."""
