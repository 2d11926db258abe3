"""One MLflow server or database, and what Open-AutoGLM keeps there."""

from __future__ import annotations

from open_autoglm.tracking.registry import Registry
from open_autoglm.tracking.runs import Studies


class Tracker(Studies, Registry):
    """Studies in runs, their champions in the registry, over one connection."""
