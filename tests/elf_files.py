"""The smallest ELF files that have needs: a header, one loaded segment, and the dynamic section."""

from __future__ import annotations

import struct
from pathlib import Path

_BASE = 0x10000
"""The segment's address, so that addresses and offsets differ as in real files."""


def write_elf(path: Path, *needs: str) -> Path:
    """A 64-bit little-endian shared object whose DT_NEEDED entries are ``needs``; it holds no code."""
    names = b"\0" + b"".join(name.encode() + b"\0" for name in needs)
    offsets = [names.index(b"\0" + name.encode() + b"\0") + 1 for name in needs]
    start = 64 + 2 * 56
    table = start + (len(needs) + 2) * 16
    size = table + len(names)
    entries = [*((1, offset) for offset in offsets), (5, _BASE + table), (0, 0)]
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 4, 0, _BASE, _BASE, size, size, 0x1000)
    dynamic = struct.pack("<IIQQQQQQ", 2, 4, start, _BASE + start, 0, table - start, table - start, 8)
    section = b"".join(struct.pack("<qQ", *entry) for entry in entries)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + load + dynamic + section + names)
    return path
