"""What may be served: a bundle, a study's champion, or a version in the registry."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from open_autoglm.bundle import MANIFEST
from open_autoglm.errors import UserError
from open_autoglm.schemas import without_password
from open_autoglm.serving.last_good import recall
from open_autoglm.settings import Settings
from open_autoglm.study import load_study

if TYPE_CHECKING:
    from open_autoglm.tracking import Tracker

_REGISTRY = re.compile(r"models:/(?P<name>[^/@]+)@(?P<alias>[\w.-]+)")


_LONGEST_SILENCE_S = "20"


class Source(NamedTuple):
    """A bundle's directory, and its version in the registry ('' if it was not taken from there)."""

    bundle: Path
    version: str = ""
    model: str = ""
    """Its name in the registry."""
    alias: str = ""
    """By which it was found there."""
    warning: str = ""
    """Why it may not be what the alias names now."""


def find_source(text: str, settings: Settings) -> Source:
    """Raises UserError if there is nothing to serve there."""
    if text.startswith("models:/"):
        return _registered(text, settings)
    try:
        path = Path(text).expanduser()
        is_bundle, is_study = ((path / name).is_file() for name in (MANIFEST, "study.json"))
    except (OSError, RuntimeError) as error:  # a name too long, a folder of somebody else's, ~nobody
        raise UserError(f"{text} cannot be read: {error}") from error
    if is_bundle:
        return Source(path.resolve())
    if is_study:
        bundle = load_study(path).bundle
        if bundle is None:
            raise UserError(f"the study {path} has no champion: there is nothing to serve")
        return Source(bundle.path.resolve())
    raise UserError(
        f"{text} is neither a bundle (it has no {MANIFEST}) nor a study (no study.json): "
        "name the directory of one, or models:/NAME@champion"
    )


def connect(settings: Settings) -> Tracker:
    """The registry as an endpoint asks it: it uploads nothing large, and must not wait for minutes.

    Raises Unreachable.
    """
    from open_autoglm.tracking import Tracker

    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", _LONGEST_SILENCE_S)
    return Tracker(settings.mlflow_uri, settings.mlflow_artifacts)


def cache_of(settings: Settings) -> Path:
    """Where bundles from a registry are kept."""
    return settings.home / "cache" / "served"


def _registered(text: str, settings: Settings) -> Source:
    match = _REGISTRY.fullmatch(text)
    if match is None:
        raise UserError(f"{text} is no registered model: write models:/NAME@champion")
    name, alias = match["name"], match["alias"]
    try:
        found = connect(settings).registered(name, alias, cache_of(settings))
    except UserError as error:
        return _last_good(name, alias, settings, error)
    if found is None:
        raise UserError(
            f"no version of {name} has the alias {alias} in {without_password(settings.mlflow_uri)}: "
            "run a study, or name another alias"
        )
    return Source(found.bundle, found.version, name, alias)


def _last_good(name: str, alias: str, settings: Settings, error: UserError) -> Source:
    """What answered here before, if what should answer cannot be had. Raises ``error`` if nothing did."""
    good = recall(settings.home, name, alias)
    if good is None:
        raise error
    warning = f"version {good.version} of {name} is served because it was the last that was good: {error}"
    return Source(good.bundle, good.version, name, alias, warning)
