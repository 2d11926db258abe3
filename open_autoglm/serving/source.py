"""What may be served: a bundle, a study's champion, or a version in the registry."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from open_autoglm.bundle import MANIFEST
from open_autoglm.errors import UserError
from open_autoglm.settings import Settings
from open_autoglm.study import load_study

_REGISTRY = re.compile(r"models:/(?P<name>[^/@]+)@(?P<alias>[\w.-]+)")


class Source(NamedTuple):
    """A bundle's directory, and its version in the registry ('' if it was not taken from there)."""

    bundle: Path
    version: str = ""


def find_source(text: str, settings: Settings) -> Source:
    """Raises UserError if there is nothing to serve there."""
    if text.startswith("models:/"):
        return _registered(text, settings)
    path = Path(text).expanduser()
    if (path / MANIFEST).is_file():
        return Source(path.resolve())
    if (path / "study.json").is_file():
        bundle = load_study(path).bundle
        if bundle is None:
            raise UserError(f"the study {path} has no champion: there is nothing to serve")
        return Source(bundle.path.resolve())
    raise UserError(
        f"{text} is neither a bundle (it has no {MANIFEST}) nor a study (no study.json): "
        "name the directory of one, or models:/NAME@champion"
    )


def _registered(text: str, settings: Settings) -> Source:
    from open_autoglm.tracking import Tracker

    match = _REGISTRY.fullmatch(text)
    if match is None:
        raise UserError(f"{text} is no registered model: write models:/NAME@champion")
    tracker = Tracker(settings.mlflow_uri, settings.mlflow_artifacts)
    found = tracker.registered(match["name"], match["alias"], settings.home / "cache" / "served")
    if found is None:
        raise UserError(
            f"no version of {match['name']} has the alias {match['alias']} in {settings.mlflow_uri}: "
            "run a study, or name another alias"
        )
    return Source(found.bundle, found.version)
