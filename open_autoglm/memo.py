"""Results that are kept: what was measured once from the same inputs is, for a while, not measured again.

A key is a digest of everything a result depends on: the candidate's configuration, the digests of its
files and of the requests, the host's fingerprint, the versions of the libraries, and our own source.
Change one and only what depends on it is run again.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from open_autoglm.export.routes import library_versions
from open_autoglm.files import digest_of, digest_sources, file_lock, write_atomic
from open_autoglm.schemas import Model
from open_autoglm.settings import Settings

Kept = TypeVar("Kept", bound=Model)

_MEASURING = (
    *("engines", "measure", "pruning", "quality", "recovery", "schemas"),
    *("bracket.py", "generation.py", "heats.py", "trials.py"),
)
"""What of our own source a result, or a pruned checkpoint, depends on."""

_SESSION_LIBRARIES = ("torchao",)
"""They decide what a session computes and write no files, so that no recipe of an export names them."""


class Memo:
    """Results of one kind under ``settings.home``; those older than ``trial_reuse_hours`` are not used."""

    def __init__(self, settings: Settings, kind: str) -> None:
        self._folder = settings.home / "results" / kind
        self._longest_s = settings.trial_reuse_hours * 3600

    def get(self, key: str, kind: type[Kept]) -> Kept | None:
        """The result kept under ``key``; None if there is none, it is too old, or it cannot be read."""
        path = self._path(key)
        if not path.exists() or time.time() - path.stat().st_mtime > self._longest_s:
            return None
        try:
            return kind.model_validate_json(path.read_bytes())
        except ValueError:  # another version's: it is measured again
            return None

    def lock(self, key: str) -> AbstractContextManager[None]:
        """Held while a result is looked up and made, so that nobody makes it twice."""
        return file_lock(self._path(key).with_suffix(".lock"))

    def put(self, key: str, result: Model) -> None:
        write_atomic(self._path(key), result.model_dump_json())

    def _path(self, key: str) -> Path:
        return self._folder / f"{key[:32]}.json"


def key_of(*parts: Any) -> str:
    """The key of a result that depends on ``parts`` and on the software that makes it."""
    return digest_of([parts, library_versions(), _session_versions(), source_digest()])


def _session_versions() -> list[str]:
    found = []
    for name in _SESSION_LIBRARIES:
        try:
            found.append(version(name))
        except PackageNotFoundError:
            found.append("absent")
    return found


@cache
def source_digest() -> str:
    """Of the source that measures and judges: an edited installation does not trust its older figures."""
    return digest_sources(Path(__file__).parent, _MEASURING)
