"""The shared libraries that an ELF file asks for, read from the file itself.

A library that lacks one of them cannot be loaded to be asked, and the loader names only the first.
Format: System V ABI, gABI 4.1, chapter 5 (program header, dynamic section), in its 64-bit little-endian form.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import NamedTuple

_MAGIC = b"\x7fELF\x02\x01"  # 64 bits, little-endian
_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_NULL, _DT_NEEDED, _DT_STRTAB = 0, 1, 5


class _Segment(NamedTuple):
    kind: int
    offset: int
    address: int
    size: int


def needed_libraries(path: Path) -> tuple[str, ...]:
    """Names of the libraries that ``path`` needs (DT_NEEDED), in the file's order.

    Raises ValueError if it is not a whole ELF file of that form.
    """
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
        if data[: len(_MAGIC)] != _MAGIC:
            raise ValueError(f"{path} is no 64-bit little-endian ELF file")
        try:
            return tuple(_needed(data))
        except (struct.error, IndexError) as error:
            raise ValueError(f"{path} is truncated or damaged: {error}") from error


def _needed(data: mmap) -> Iterator[str]:
    segments = list(_segments(data))
    entries = [entry for s in segments if s.kind == _PT_DYNAMIC for entry in _dynamic(data, s)]
    names = [value for tag, value in entries if tag == _DT_NEEDED]
    if not names:
        return
    (table,) = [_offset_of(address, segments) for tag, address in entries if tag == _DT_STRTAB] or [-1]
    for name in names:
        end = data.find(b"\0", table + name) if table >= 0 else -1
        if end < 0:
            raise IndexError("a name lies outside of the file")
        yield data[table + name : end].decode()


def _segments(data: mmap) -> Iterator[_Segment]:
    (start,) = struct.unpack_from("<Q", data, 0x20)
    size, count = struct.unpack_from("<HH", data, 0x36)
    for index in range(count):
        kind, _, offset, address, _, file_size = struct.unpack_from("<IIQQQQ", data, start + index * size)
        yield _Segment(kind, offset, address, file_size)


def _dynamic(data: mmap, segment: _Segment) -> Iterator[tuple[int, int]]:
    """Tag and value of each entry up to the one that ends the section."""
    for position in range(segment.offset, segment.offset + segment.size, 16):
        tag, value = struct.unpack_from("<qQ", data, position)
        if tag == _DT_NULL:
            return
        yield tag, value


def _offset_of(address: int, segments: list[_Segment]) -> int:
    """Where in the file the byte lies that is loaded at ``address``."""
    for segment in segments:
        if segment.kind == _PT_LOAD and segment.address <= address < segment.address + segment.size:
            return address - segment.address + segment.offset
    raise IndexError(f"no segment holds address {address:#x}")
