"""A GGUF of ours with its tokenizer, which ``llama-server`` needs; our sessions take token ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from open_autoglm.errors import UserError

_NORMAL, _CONTROL = 1, 3
"""GGUF's token types."""

_NO_WORDS = "no_vocab"


def add_words(gguf: Path, tokenizer: Path, target: Path) -> None:
    """Copy ``gguf`` to ``target`` with the byte-level BPE of ``tokenizer``, a ``tokenizer.json``.

    Weights stay as they are. Words are enough to turn tokens into text; prompts come as token ids, so how
    llama.cpp would split a text does not matter. Raises UserError for another kind of tokenizer.
    """
    from gguf import GGUFReader, GGUFWriter

    content = json.loads(tokenizer.read_text())
    if content["model"]["type"] != "BPE":
        raise UserError(f"{tokenizer} is a {content['model']['type']}: only a byte-level BPE is written here")
    reader = GGUFReader(gguf)
    writer = GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture", "tokenizer.")) and "vocab_size" not in name:
            writer.add_key_value(name, field.contents(), field.types[0])
    size = next(int(f.contents()) for name, f in reader.fields.items() if name.endswith(".vocab_size"))
    _add_tokenizer(writer, content, size)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: Any, content: dict[str, Any], size: int) -> None:
    """``size`` words: the model may have rows that no word uses."""
    words = [f"<unused{index}>" for index in range(size)]
    types = [_CONTROL] * size
    for word, index in content["model"]["vocab"].items():
        words[index], types[index] = word, _NORMAL
    for added in content.get("added_tokens", []):
        words[added["id"]], types[added["id"]] = added["content"], _CONTROL
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_add_bos_token(False)
