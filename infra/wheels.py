"""Wheels for a machine without a network: packed where there is one, carried, checked and installed.

    python infra/wheels.py pack   --extras gpu,dev --output carry [--part-mib 1900] [--wheels DIR]
    python infra/wheels.py unpack --source carry --wheels wheels
    python infra/wheels.py unpack --source carry --wheels wheels --venv .venv

``pack`` has pip fetch, or build, a wheel of every package that the checkout with these extras needs, in the
versions of constraints.txt, and writes to ``--output``: the wheels, large ones in parts; ``pack.json``, which
says what they are for; and ``SHA256SUMS`` of all of these, as ``sha256sum -c`` reads it. ``unpack`` refuses
by name what is damaged or missing before anything is installed, and installs with ``pip --no-index``.

It runs before anything is installed, so it needs Python's own library only. Pack with the Python version
and on the kind of machine that the wheels are for.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

PROJECT = Path(__file__).resolve().parent.parent
SUMS, ABOUT = "SHA256SUMS", "pack.json"
FORMAT_VERSION = 1

_BLOCK = 1 << 20
_NAME = r"[A-Za-z0-9][A-Za-z0-9._+-]*"
_PART = ".part"
_BUILD = "setuptools>=77"
"""What builds the checkout itself; pyproject.toml asks for it where pip cannot fetch it."""


class About(NamedTuple):
    """What ``pack.json`` says."""

    format_version: int
    extras: str
    python: str
    platform: str
    wheels: Mapping[str, list[str]]
    """Each wheel's files, in the order in which they are joined."""


class Refused(Exception):
    """The pack, or the request, cannot be used: one sentence, exit code 2."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - a command's one sentence
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Wheels for a machine without a network.")
    commands = parser.add_subparsers(required=True)
    pack = commands.add_parser("pack", help="fetch the wheels and split them into parts")
    pack.add_argument("--extras", required=True, help="of pyproject.toml, comma-separated")
    pack.add_argument("--output", type=Path, required=True, help="directory to carry; made, must be empty")
    pack.add_argument("--part-mib", type=int, default=1900, help="largest file, in MiB (default: 1900)")
    pack.add_argument("--wheels", type=Path, help="wheels that are here already; nothing is fetched")
    pack.set_defaults(run=_run_pack)
    unpack = commands.add_parser("unpack", help="check the parts, join them, install")
    unpack.add_argument("--source", type=Path, required=True, help="the directory that was carried")
    unpack.add_argument("--wheels", type=Path, required=True, help="where the wheels are put together")
    unpack.add_argument("--venv", type=Path, help="the environment to make; without it nothing is installed")
    unpack.set_defaults(run=_run_unpack)
    return parser


# ── pack ─────────────────────────────────────────────────────────────────────────────────────────


def _run_pack(options: argparse.Namespace) -> None:
    if options.part_mib < 1:
        raise Refused("--part-mib must be at least 1")
    _check_empty(options.output)  # before gigabytes are fetched
    if options.wheels is not None:
        pack(options.wheels, options.output, options.extras, options.part_mib << 20)
        return
    with tempfile.TemporaryDirectory() as fetched:
        fetch(options.extras, Path(fetched))
        pack(Path(fetched), options.output, options.extras, options.part_mib << 20)


def fetch(extras: str, wheels: Path) -> None:
    """A wheel of every package that the checkout with ``extras`` needs, in the locked versions.

    Raises Refused if pip cannot get them all.
    """
    command = [sys.executable, "-m", "pip", "wheel", "--wheel-dir", str(wheels)]
    command += ["-c", "constraints.txt", f".[{extras}]", _BUILD]
    _pip(command, f"pip could not fetch or build every wheel of the extras {extras}")
    for own in wheels.glob("open_autoglm-*.whl"):
        own.unlink()  # the checkout is carried as it is, and installed from there


def pack(wheels: Path, output: Path, extras: str, part_bytes: int) -> None:
    """Write all wheels of the directory ``wheels`` to ``output``, no file larger than ``part_bytes``.

    Raises Refused if there is none, or if ``output`` holds anything.
    """
    found = sorted(wheels.glob("*.whl"))
    if not found:
        raise Refused(f"{wheels} holds no wheel")
    _check_empty(output)
    output.mkdir(parents=True, exist_ok=True)
    parts = {wheel.name: list(_write_parts(wheel, output, part_bytes)) for wheel in found}
    about = About(FORMAT_VERSION, extras, *_here(), parts)
    _write(output / ABOUT, json.dumps(about._asdict(), indent=1) + "\n")
    names = [ABOUT, *(name for names in parts.values() for name in names)]
    _write(output / SUMS, "".join(f"{sha256(output / name)}  {name}\n" for name in names))


def _check_empty(output: Path) -> None:
    if output.is_dir() and any(output.iterdir()):
        raise Refused(f"{output} is not empty: choose a new directory")


def _write_parts(wheel: Path, output: Path, part_bytes: int) -> Iterator[str]:
    """Names of the files made of ``wheel``: its own, or numbered ones."""
    size = wheel.stat().st_size
    if size <= part_bytes:
        shutil.copyfile(wheel, output / wheel.name)
        yield wheel.name
        return
    with wheel.open("rb") as source:
        for number in range(-(-size // part_bytes)):
            name = f"{wheel.name}{_PART}{number:03}"
            with (output / name).open("wb") as target:
                _copy(source, target, part_bytes)
            yield name


def _here() -> tuple[str, str]:
    """Python version and platform, which decide what wheels fit."""
    return f"{sys.version_info.major}.{sys.version_info.minor}", sysconfig.get_platform()


# ── unpack ───────────────────────────────────────────────────────────────────────────────────────


def _run_unpack(options: argparse.Namespace) -> None:
    extras = unpack(options.source, options.wheels)
    if options.venv is not None:
        install(options.wheels, extras, options.venv)


def unpack(source: Path, wheels: Path) -> str:
    """Put the wheels of the pack ``source`` together in the directory ``wheels``; the extras they are for.

    All parts are checked before the first wheel is written. Raises Refused, naming what is wrong.
    """
    sums = _read_sums(source)
    _check(source, sums)
    about = _read_about(source, sums)
    wheels.mkdir(parents=True, exist_ok=True)
    for name, files in about.wheels.items():
        _join([source / file for file in files], wheels / name)
    return about.extras


def _read_sums(source: Path) -> dict[str, str]:
    """Checksum by file name."""
    try:
        lines = (source / SUMS).read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        raise Refused(f"{source} is no pack: it has no readable {SUMS}") from None
    found = [re.fullmatch(rf"([0-9a-f]{{64}})  ({_NAME})", line) for line in lines]
    sums = {match[2]: match[1] for match in found if match}
    if len(sums) != len(lines) or ABOUT not in sums:
        raise Refused(f"{source / SUMS} is damaged: fetch it again")
    return sums


def _check(source: Path, sums: Mapping[str, str]) -> None:
    """All of them, so that one message names all that must be fetched again."""
    missing = [name for name in sums if not (source / name).is_file()]
    damaged = [name for name in sums if name not in missing and sha256(source / name) != sums[name]]
    wrong = [f"{name} is missing" for name in missing] + [f"{name} is damaged" for name in damaged]
    if wrong:
        raise Refused(f"{'; '.join(wrong)}: bring {'it' if len(wrong) == 1 else 'them'} again")


def _read_about(source: Path, sums: Mapping[str, str]) -> About:
    """``pack.json``, if it is for this Python and every file that it names has a checksum."""
    try:
        about = About(**json.loads((source / ABOUT).read_text()))
        named = [*about.wheels, *(name for names in about.wheels.values() for name in names)]
        parts = {name for names in about.wheels.values() for name in names}
    except (ValueError, TypeError, AttributeError):
        raise Refused(f"{source / ABOUT} is not as this version writes it") from None
    unsafe = [name for name in named if not re.fullmatch(_NAME, str(name))]
    if about.format_version != FORMAT_VERSION or unsafe or not parts <= sums.keys():
        raise Refused(f"{source / ABOUT} is not as this version writes it")
    if (about.python, about.platform) != _here():
        here = "Python {} on {}".format(*_here())
        raise Refused(f"the wheels are for Python {about.python} on {about.platform}, and this is {here}")
    return about


def _join(parts: Sequence[Path], wheel: Path) -> None:
    """Put ``wheel`` together; it appears whole or not at all."""
    handle, name = tempfile.mkstemp(dir=wheel.parent)
    try:
        with os.fdopen(handle, "wb") as target:
            for part in parts:
                with part.open("rb") as source:
                    _copy(source, target, part.stat().st_size)
        Path(name).replace(wheel)
    finally:
        Path(name).unlink(missing_ok=True)


def install(wheels: Path, extras: str, venv: Path) -> None:
    """Make ``venv`` anew and install the checkout with ``extras`` into it from ``wheels`` alone.

    Raises Refused if pip does not find all it needs there.
    """
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
    # Absolute, since pip runs in the checkout, wherever this was called.
    command = [str(venv.absolute() / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-index"]
    command += ["--find-links", str(wheels.absolute()), "-c", "constraints.txt", "-e", f".[{extras}]"]
    _pip(command, f"pip could not install the extras {extras} from {wheels} alone")


# ── what both use ────────────────────────────────────────────────────────────────────────────────


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    """At most ``size`` bytes, a block at a time."""
    while size > 0 and (block := source.read(min(size, _BLOCK))):
        target.write(block)
        size -= len(block)


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    scratch = path.with_name(f".{path.name}")
    scratch.write_text(text)
    scratch.replace(path)


def _pip(command: Sequence[str], sentence: str) -> None:
    if subprocess.run(command, cwd=PROJECT, check=False).returncode:
        raise Refused(f"{sentence}; what it said is above")


if __name__ == "__main__":
    sys.exit(main())
