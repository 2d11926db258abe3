"""Small file helpers: atomic writes, digests, and locks that the kernel frees when their holder dies."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from open_autoglm.errors import UserError
from open_autoglm.schemas import FileDigest

_FULL = (errno.ENOSPC, errno.EDQUOT)


def write_atomic(path: Path, data: str | bytes, *, mode: int = 0o644) -> None:
    """Write ``data`` so that a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)  # mkstemp makes files that only their owner can read
            file.write(data.encode() if isinstance(data, str) else data)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def directory_atomic(path: Path) -> Iterator[Path]:
    """Yield an empty sibling of ``path`` that becomes ``path`` if the block succeeds and vanishes if not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        temporary.chmod(0o755)
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def room_for(doing: str) -> Iterator[None]:
    """A disk that becomes full inside is a UserError; what it has been written for can be done again."""
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        named = f" ({error.filename})" if error.filename else ""
        raise UserError(
            f"the disk became full while {doing}{named}: make room there, then do the same again"
        ) from error


def is_full(error: OSError) -> bool:
    """Also where a tree was copied, whose errors are only quoted."""
    return error.errno in _FULL or any(os.strerror(number) in str(error) for number in _FULL)


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_files(root: Path, files: Iterable[Path]) -> tuple[FileDigest, ...]:
    """Digests of ``files``, named relative to ``root``, in a stable order."""
    return tuple(
        FileDigest(path=str(file.relative_to(root)), size_bytes=file.stat().st_size, sha256=sha256_file(file))
        for file in sorted(files)
    )


def mismatch(root: Path, files: Iterable[FileDigest], what: str) -> str | None:
    """The first of ``files`` under ``root``, which is ``what``, that is not as it was, in words; or None."""
    for file in files:
        if not (root / file.path).exists():
            return f"{file.path} was missing from {what}"
        if sha256_file(root / file.path) != file.sha256:
            return f"{file.path} of {what} did not match its digest"
    return None


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON-able value in canonical form."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()


def digest_sources(package: Path, names: Iterable[str]) -> str:
    """Of the Python source under ``package`` that lies in the files and folders ``names``."""
    paths = [package / name for name in names]
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*.py")))]
    return digest_of([(str(file.relative_to(package)), sha256_file(file)) for file in files])


@contextmanager
def file_lock(path: Path, *, shared: bool = False, blocking: bool = True) -> Iterator[None]:
    """Hold a kernel file lock. Raises BlockingIOError if it is taken and ``blocking`` is false."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(file, mode if blocking else mode | fcntl.LOCK_NB)
        yield
