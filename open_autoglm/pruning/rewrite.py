"""Write a safetensors file again with some tensors cut or replaced, one tensor in memory at a time.

Rows and columns are cut as bytes, so every dtype passes as it is, whatever NumPy knows of it. The format:
8 bytes of header length, a JSON header padded with spaces, then the tensors without gaps
(https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from open_autoglm.weights import StoredTensor

Bytes = NDArray[np.uint8]

_CHUNK_BYTES = 2**24


class Edit(NamedTuple):
    """What becomes of one tensor."""

    shape: tuple[int, ...]
    apply: Callable[[Bytes], Bytes]


def keep_parts(shape: tuple[int, ...], axis: int, parts: int, kept: Sequence[int]) -> Edit:
    """Cut ``shape`` along ``axis`` into ``parts`` equal parts and keep those in ``kept``."""
    outer = math.prod(shape[:axis])

    def apply(content: Bytes) -> Bytes:
        return np.ascontiguousarray(content.reshape(outer, parts, -1)[:, list(kept)]).reshape(-1)

    left = shape[axis] // parts * len(kept)
    return Edit((*shape[:axis], left, *shape[axis + 1 :]), apply)


def rewrite(
    source: Path, tensors: Mapping[str, StoredTensor], edits: Mapping[str, Edit], target: Path
) -> int:
    """Write ``source``, whose header is ``tensors``, to ``target``; return the bytes of its tensors."""
    header, size = _header(tensors, edits)
    with source.open("rb") as old, target.open("xb") as new:
        new.write(len(header).to_bytes(8, "little") + header)
        for name, tensor in _in_order(tensors):
            old.seek(tensor.begin)
            if name in edits:
                content = np.frombuffer(old.read(tensor.end - tensor.begin), np.uint8)
                new.write(edits[name].apply(content).data)
            else:
                _copy(old, new, tensor.end - tensor.begin)
        if new.tell() != 8 + len(header) + size:
            raise AssertionError(f"an edit of {source} gave other sizes than it said")
    return size


def _header(tensors: Mapping[str, StoredTensor], edits: Mapping[str, Edit]) -> tuple[bytes, int]:
    """The header, and how many bytes of tensors follow it."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in _in_order(tensors):
        begin, shape = end, edits[name].shape if name in edits else tensor.shape
        bytes_each = (tensor.end - tensor.begin) // max(1, math.prod(tensor.shape))
        end = begin + bytes_each * math.prod(shape)
        entries[name] = {"dtype": tensor.dtype, "shape": list(shape), "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    return header + b" " * (-len(header) % 8), end


def _in_order(tensors: Mapping[str, StoredTensor]) -> list[tuple[str, StoredTensor]]:
    return sorted(tensors.items(), key=lambda item: item[1].begin)


def _copy(old: BinaryIO, new: BinaryIO, count: int) -> None:
    while count:
        part = old.read(min(_CHUNK_BYTES, count))
        new.write(part)
        count -= len(part)
