"""From a version in the registry to its bundle on this machine."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlparse

from open_autoglm.errors import UserError
from open_autoglm.tracking.cache import BundleCache, NotFetched, RegisteredVersion
from open_autoglm.tracking.connection import Connection

CHAMPION = "champion"
BUNDLE_DIGEST = "autoglm.bundle_digest"

_SHA256 = re.compile("[0-9a-f]{64}")
_ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


class RegisteredChampion(NamedTuple):
    """A version in the registry and its bundle."""

    version: str
    bundle: Path
    digest: str


class Bundles(Connection):
    """Versions of registered models, and their files."""

    def champion(self, name: str, cache: Path) -> RegisteredChampion | None:
        """The version that carries the champion's alias; see `registered`."""
        return self.registered(name, CHAMPION, cache)

    def registered(self, name: str, alias: str, cache: Path) -> RegisteredChampion | None:
        """The version that carries ``alias``, with its bundle on this machine; None without one.

        Raises Unreachable, and UserError if its files cannot be had; see `fetch`.
        """
        found = self.version_with(name, alias)
        return found and RegisteredChampion(found.version, self.fetch(found, cache), found.digest)

    def version_with(self, name: str, alias: str) -> RegisteredVersion | None:
        """The version that carries ``alias``; None without one. Raises Unreachable."""
        from mlflow.exceptions import MlflowException

        with self._asking():
            try:
                return _described(self._client.get_model_version_by_alias(name, alias))
            except MlflowException as error:
                if error.error_code not in _ABSENT:
                    raise
                return None

    def version(self, name: str, version: str) -> RegisteredVersion:
        """That version. Raises Unreachable, and UserError if it is not there."""
        from mlflow.exceptions import MlflowException

        with self._asking():
            try:
                return _described(self._client.get_model_version(name, version))
            except MlflowException as error:
                if error.error_code not in _ABSENT:
                    raise
                raise UserError(f"{name} has no version {version}") from error

    def fetch(self, wanted: RegisteredVersion, cache: Path) -> Path:
        """Its bundle's directory: where MLflow keeps it if that is on this machine, else in ``cache``.

        What is downloaded is checked; what lies here is checked by who opens it.
        Raises Unreachable, and UserError: NotFetched (NoRoom) if it may come another time.
        """
        require_bundle(wanted)
        if (here := _on_this_machine(wanted.source)) is not None:
            return here / "artifacts" / "bundle"

        def download(part: str, into: Path) -> Path:
            return self._download(f"{wanted.source}/artifacts/bundle/{part}".rstrip("/"), into)

        return BundleCache(cache).get(wanted, download)

    def _download(self, uri: str, into: Path) -> Path:
        from mlflow.artifacts import download_artifacts
        from mlflow.exceptions import MlflowException

        into.mkdir(exist_ok=True)
        with self._asking():
            try:
                return Path(download_artifacts(artifact_uri=uri, dst_path=str(into), tracking_uri=self.uri))
            except MlflowException as error:  # it downloads in threads, and only quotes what they raise
                if os.strerror(errno.ENOSPC) in str(error):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
                self._client.search_experiments(max_results=1)  # if it is away, that is the reason
                why = str(error).strip().splitlines()[-1]
                raise NotFetched(f"MLflow does not hand out {uri}: {why}") from error


def require_bundle(found: RegisteredVersion) -> None:
    """Raise UserError if somebody else registered ``found``."""
    if not found.digest:
        raise UserError(f"{found} holds no bundle: only what a study registered does")


def _described(version: Any) -> RegisteredVersion:
    digest = version.tags.get(BUNDLE_DIGEST, "")
    digest = digest if _SHA256.fullmatch(digest) else ""
    return RegisteredVersion(version.name, str(version.version), version.source, digest)


def _on_this_machine(source: str) -> Path | None:
    """The directory, if ``source`` names one here."""
    address = urlparse(source)
    path = Path(unquote(address.path))
    return path if address.scheme in ("", "file") and path.is_dir() else None
