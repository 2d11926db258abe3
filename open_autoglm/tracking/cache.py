"""Bundles that were downloaded from MLflow: whole or not there, and only so many."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

from open_autoglm.bundle import MANIFEST, open_bundle
from open_autoglm.errors import UserError
from open_autoglm.files import directory_atomic, file_lock, is_full
from open_autoglm.units import quantity

KEPT = 3
"""Versions of one model that stay beside those in use: a rollback downloads nothing."""

_SPARE_BYTES = 16 << 20
"""Left free, so that logs and databases on the same disk can go on."""

_MORE_ROOM = "make room there, or set AUTOGLM_HOME to a larger disk"
_BUNDLE = "bundle"

Download = Callable[[str, Path], Path]
"""Fetch a part of a bundle ('' for all of it) into a directory, and say where it is."""


class NotFetched(UserError):
    """A bundle could not be had; the same may succeed later."""


class NoRoom(NotFetched):
    """The disk is full."""


class RegisteredVersion(NamedTuple):
    """A version in the registry, and where MLflow keeps its bundle."""

    name: str
    version: str
    source: str
    digest: str
    """Of the bundle; empty if there is none."""

    def __str__(self) -> str:
        return f"version {self.version} of {self.name}"


class BundleCache:
    """A directory of bundles that processes share: each version has a lock, which its users hold together."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def get(self, wanted: RegisteredVersion, download: Download) -> Path:
        """The bundle, from here if it is whole, else downloaded; one that does not come whole is not kept.

        Raises UserError, NotFetched (NoRoom) if it may come another time.
        """
        entry = self._root / f"{wanted.name}-{wanted.version}-{wanted.digest[:12]}"
        try:
            with file_lock(_lock_of(entry)):
                if not _holds(entry / _BUNDLE, wanted.digest):
                    self._download(wanted, entry, download)
                entry.touch()
        except OSError as error:
            if not is_full(error):
                raise NotFetched(f"{wanted} cannot be kept in {self._root}: {error}") from error
            raise NoRoom(
                f"the disk of {self._root} became full while {wanted} was fetched; nothing of it was kept: "
                f"{_MORE_ROOM}"
            ) from error
        self._prune(wanted.name)
        return entry / _BUNDLE

    def _download(self, wanted: RegisteredVersion, entry: Path, download: Download) -> None:
        with directory_atomic(entry) as temporary:
            arriving = temporary / "arriving"
            self._check_manifest(wanted, download(MANIFEST, arriving))
            download("", arriving).rename(temporary / _BUNDLE)
            shutil.rmtree(arriving)
            _check(wanted, temporary / _BUNDLE)

    def _check_manifest(self, wanted: RegisteredVersion, path: Path) -> None:
        """The manifest comes first: it is small, and says whether the rest is wanted, and how large it is."""
        _, found = open_bundle(path.parent, verify=False)
        if found.digest != wanted.digest:
            raise UserError(f"{wanted} is not what was registered: its files have been exchanged in MLflow")
        free = shutil.disk_usage(self._root).free
        if free < found.size_bytes + _SPARE_BYTES:
            raise NoRoom(
                f"{wanted} takes {quantity(found.size_bytes, 'bytes')} and the disk of {self._root} has "
                f"{quantity(free, 'bytes')} left: {_MORE_ROOM}"
            )

    def _prune(self, name: str) -> None:
        """Remove all but the newest and those in use, and what a process that was killed had begun."""
        begun = re.compile(rf"\.({re.escape(name)}-\d+-[0-9a-f]{{12}})\..+")
        whole = re.compile(rf"{re.escape(name)}-\d+-[0-9a-f]{{12}}")
        folders = [path for path in self._root.iterdir() if path.is_dir()]
        entries = sorted((p for p in folders if whole.fullmatch(p.name)), key=_age_ns, reverse=True)
        for entry in entries[KEPT:]:
            _remove_unless_used(entry, _lock_of(entry))
        for folder in folders:
            if match := begun.fullmatch(folder.name):
                _remove_unless_used(folder, _lock_of(self._root / match[1]))


def in_use(bundle: Path) -> AbstractContextManager[None]:
    """For the length of the block (or the process) nobody removes ``bundle``, if it lies in a cache."""
    lock = _lock_of(bundle.parent)
    return file_lock(lock, shared=True) if bundle.name == _BUNDLE and lock.exists() else nullcontext()


def _lock_of(entry: Path) -> Path:
    return entry.with_name(f"{entry.name}.lock")


def _age_ns(entry: Path) -> int:
    try:
        return entry.stat().st_mtime_ns
    except FileNotFoundError:  # another process has removed it
        return 0


def _remove_unless_used(folder: Path, lock: Path) -> None:
    try:
        with file_lock(lock, blocking=False):
            shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        return


def _holds(bundle: Path, digest: str) -> bool:
    """Whether all files are there and as they were."""
    try:
        return open_bundle(bundle)[1].digest == digest
    except UserError:
        return False


def _check(wanted: RegisteredVersion, bundle: Path) -> None:
    """Raise UserError naming the file that is not what it should be."""
    try:
        open_bundle(bundle)
    except UserError as error:
        told = str(error).replace(f"{bundle}/", "")  # where it was is gone with this sentence
        raise UserError(f"{wanted} did not come whole from MLflow: {told}") from error
