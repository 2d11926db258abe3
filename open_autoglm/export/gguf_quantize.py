"""From a checkpoint to the GGUF of a file type: written in fp32, then by llama.cpp's own quantiser."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from open_autoglm.export.gguf_writer import write_gguf
from open_autoglm.export.llamacpp_library import llama_cpp
from open_autoglm.schemas import Checkpoint

MODEL = "model.gguf"
"""The one file of an export."""


def library_versions() -> dict[str, str]:
    """The libraries that decide what an export contains."""
    return {name: version(name) for name in ("gguf", "llama-cpp-python", "transformers")}


def export_gguf(checkpoint: Checkpoint, file_type: str, output: Path) -> str:
    """Write MODEL into ``output`` as ``file_type``, by llama.cpp's name; return the name of the route.

    Raises NoGguf if llama.cpp would not compute this model, RuntimeError if it refuses the file type.
    """
    if file_type == "F32":
        write_gguf(checkpoint, output / MODEL)
        return "gguf"
    whole = output / "fp32.gguf"
    write_gguf(checkpoint, whole)
    quantize(whole, output / MODEL, file_type)
    whole.unlink()
    return "gguf, llama.cpp's quantiser"


def quantize(source: Path, target: Path, file_type: str) -> None:
    """Write the fp32 GGUF ``source`` to ``target`` as ``file_type``.

    llama.cpp chooses per tensor: vectors stay fp32, a 4-bit file has a finer head, and a matrix whose rows
    are no multiple of the block gets a type that fits. Raises RuntimeError if llama.cpp refuses.
    """
    library = llama_cpp()
    parameters = library.c.llama_model_quantize_default_params()
    parameters.ftype = getattr(library.c, f"LLAMA_FTYPE_MOSTLY_{file_type}")
    status = library.c.llama_model_quantize(str(source).encode(), str(target).encode(), parameters)
    if status != 0:
        raise library.why(f"llama.cpp could not quantise the GGUF to {file_type}")
