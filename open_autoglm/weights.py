"""Weight files on disk: which there are, whether they are whole, fit the model and hold finite numbers.

A safetensors file is 8 bytes of header length, a JSON header that names each tensor's dtype, shape
and byte range, then the bytes. That is enough to check a checkpoint without loading it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from open_autoglm.errors import CheckpointError

SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"

_DTYPE_NAMES = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}
_NON_FINITE_BITS = {  # these bits are all set in infinities and NaNs, and only there
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F8_E5M2": ("u1", 0x7C),
    "F8_E4M3": ("u1", 0x7F),
}
_CHUNK_BYTES = 2**21  # fits a second-level cache, so the scan runs at the speed of reading the file


class StoredTensor(NamedTuple):
    """One tensor of a safetensors file; ``begin`` and ``end`` are byte offsets in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``. Raises CheckpointError if it holds anything else."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): fetch the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object: fetch the file again")
    return value


def find_weights(directory: Path, single: str, index: str) -> tuple[Path, ...]:
    """The weight files of ``directory``: ``single``, or the shards that ``index`` names, or none.

    Raises CheckpointError if a shard is missing.
    """
    if (directory / single).is_file():
        return (directory / single,)
    if not (directory / index).is_file():
        return ()
    shards = sorted(set(_weight_map(directory / index).values()))
    for shard in shards:
        if not (directory / shard).is_file():
            raise CheckpointError(
                f"the shard {shard} that {directory / index} names is missing: fetch the checkpoint again"
            )
    return tuple(directory / shard for shard in shards)


def read_headers(directory: Path, files: Iterable[Path]) -> dict[Path, dict[str, StoredTensor]]:
    """The tensors of each safetensors file, by name.

    Raises CheckpointError if a file is truncated or its header damaged, or if a shard lacks a
    tensor that the index places in it.
    """
    headers = {file: _read_header(file) for file in files}
    index = directory / SAFETENSORS_INDEX
    if directory / SAFETENSORS not in headers:
        for tensor, shard in _weight_map(index).items():
            if tensor not in headers[directory / shard]:
                raise CheckpointError(
                    f"{directory / shard} lacks the tensor {tensor} that {index.name} places in it: "
                    "fetch the checkpoint again"
                )
    return headers


def refuse_misfit(model: Any, headers: Mapping[Path, Mapping[str, StoredTensor]]) -> None:
    """Raise CheckpointError if a parameter of ``model`` is not stored, or is stored in another shape.

    transformers only warns about the first and serves random numbers in its place. ``model`` may lie
    on the meta device. Families whose names transformers rewrites on loading (experts) are not judged.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    if get_model_conversion_mapping(model, add_legacy=False):
        return
    prefix = f"{model.base_model_prefix}."  # some old checkpoints leave it out
    stored = {name.removeprefix(prefix): t.shape for header in headers.values() for name, t in header.items()}
    directory = next(iter(headers)).parent
    for name, parameter in model.named_parameters():
        shape = stored.get(name.removeprefix(prefix))
        if shape is None and name not in model.all_tied_weights_keys:
            raise CheckpointError(
                f"the weights in {directory} lack the tensor {name} that config.json calls for: "
                "fetch the checkpoint again, or correct config.json"
            )
        if shape is not None and shape != tuple(parameter.shape):
            raise CheckpointError(
                f"the tensor {name} in {directory} has the shape {list(shape)}, but config.json calls for "
                f"{list(parameter.shape)}: fetch the checkpoint again, or correct config.json"
            )


def refuse_non_finite(file: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Raise CheckpointError if a floating-point tensor of ``file`` holds a NaN or an infinity."""
    with file.open("rb") as stream:
        for name, tensor in tensors.items():
            if tensor.dtype in _NON_FINITE_BITS and not _all_finite(stream, tensor):
                raise CheckpointError(
                    f"the tensor {name} in {file} holds NaN or infinite numbers: "
                    "fetch the file again, or repair the training run that wrote it"
                )


def main_dtype(headers: Iterable[Mapping[str, StoredTensor]]) -> str:
    """The dtype that most bytes are stored in: ``fp32``, ``bf16``, ``fp16``, or safetensors' own name."""
    sizes: Counter[str] = Counter()
    for header in headers:
        for tensor in header.values():
            sizes[tensor.dtype] += tensor.end - tensor.begin
    dtype = sizes.most_common(1)[0][0]
    return _DTYPE_NAMES.get(dtype, dtype.lower())


def convert_pickles(files: Iterable[Path], output: Path) -> None:
    """Write the tensors of PyTorch pickles into ``output`` as safetensors shards, one pickle at a time.

    Only tensors are unpickled (``weights_only``), so no code in the file runs.
    Raises CheckpointError if a file holds anything else.
    """
    from safetensors.torch import save_file

    weight_map: dict[str, str] = {}
    for number, file in enumerate(files, start=1):
        shard = f"model-{number:05d}.safetensors"
        tensors = _load_pickle(file)
        # A pickle may store tied tensors once; safetensors wants each to own its memory.
        save_file(
            {name: t.contiguous().clone() for name, t in tensors.items()}, output / shard, {"format": "pt"}
        )
        weight_map |= dict.fromkeys(tensors, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (output / SAFETENSORS_INDEX).write_text(json.dumps(index, indent=1))


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name to shard name. A shard outside the directory is as wrong as no map at all."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map: fetch the file again")
    for shard in weight_map.values():
        if not isinstance(shard, str) or shard != Path(shard).name:
            raise CheckpointError(
                f"{index} names {shard!r}, which is not a file beside it: fetch the file again"
            )
    return weight_map


def _read_header(file: Path) -> dict[str, StoredTensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):  # checks lengths, names, dtypes, shapes and ranges
            pass
    except SafetensorError as error:
        size = file.stat().st_size
        raise CheckpointError(
            f"{file} ({size} bytes) is truncated or damaged ({error}): fetch the file again"
        ) from error
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    if not header:
        raise CheckpointError(f"{file} holds no tensors: fetch the file again")
    return {
        name: StoredTensor(
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            begin=8 + length + entry["data_offsets"][0],
            end=8 + length + entry["data_offsets"][1],
        )
        for name, entry in header.items()
    }


def _all_finite(stream: Any, tensor: StoredTensor) -> bool:
    dtype, bits = _NON_FINITE_BITS[tensor.dtype]
    stream.seek(tensor.begin)
    for start in range(tensor.begin, tensor.end, _CHUNK_BYTES):
        chunk = np.frombuffer(stream.read(min(_CHUNK_BYTES, tensor.end - start)), dtype)
        if np.any((chunk & chunk.dtype.type(bits)) == bits):
            return False
    return True


def _load_pickle(file: Path) -> dict[str, Any]:
    import pickle

    import torch

    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{file} is damaged or holds more than tensors ({reason}): "
            "ask for a safetensors checkpoint, or convert it where you trust its author"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise CheckpointError(f"{file} is not a dictionary of tensors: ask for a safetensors checkpoint")
    return tensors
