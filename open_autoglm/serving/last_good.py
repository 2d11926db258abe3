"""The last bundle of a registered model that answered here: what is served while the registry is away."""

from __future__ import annotations

import logging
from pathlib import Path

from pydantic import ValidationError

from open_autoglm.bundle import open_bundle
from open_autoglm.errors import UserError
from open_autoglm.files import write_atomic
from open_autoglm.schemas import FORMAT_VERSION, Model

_LOGGER = logging.getLogger(__name__)


class LastGood(Model):
    """Stored as ``endpoints/last-good/NAME@ALIAS.json``."""

    format_version: int = FORMAT_VERSION
    model: str
    alias: str
    version: str
    bundle: Path
    digest: str


def remember(home: Path, model: str, alias: str, version: str, bundle: Path) -> None:
    """That this version answers now. A disk that is full costs a warning, not the endpoint."""
    try:
        digest = open_bundle(bundle, verify=False)[1].digest
        good = LastGood(model=model, alias=alias, version=version, bundle=bundle, digest=digest)
        write_atomic(_path(home, model, alias), good.model_dump_json(indent=2))
    except OSError as error:
        _LOGGER.warning("it cannot be noted that version %s of %s is good: %s", version, model, error)


def recall(home: Path, model: str, alias: str) -> LastGood | None:
    """What answered last; None if nothing did, or it is no longer here as it was."""
    try:
        good = LastGood.model_validate_json(_path(home, model, alias).read_bytes())
        same = open_bundle(good.bundle)[1].digest == good.digest
    except (OSError, ValidationError, UserError):
        return None
    return good if same and good.format_version == FORMAT_VERSION else None


def _path(home: Path, model: str, alias: str) -> Path:
    return home / "endpoints" / "last-good" / f"{model}@{alias}.json"
