"""What flows into the linear layers of an exported graph, on the corpus's calibration text.

That text is kept apart from the one that quality is judged on (``open_autoglm.quality.texts``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from open_autoglm.export.graph import FIRST_LOGITS, GRAPH, WRITE_INDICES, DecoderFacts
from open_autoglm.quality import texts
from open_autoglm.schemas import Checkpoint

WINDOWS_PER_TEXT, WINDOW_TOKENS, ROWS_PER_WINDOW = 4, 256, 16
SEED = 20_260

Rows = NDArray[np.float32]


@dataclass(frozen=True)
class Activations:
    """Samples of one value of the graph."""

    largest: NDArray[np.float32]
    """``float32[channels]``: the largest magnitude of each channel over all tokens."""

    rows: Rows
    """``float32[rows, channels]``: tokens evenly spread over the text."""


def calibration_windows(checkpoint: Checkpoint) -> NDArray[np.int64]:
    """``int64[windows, WINDOW_TOKENS]`` of every calibration text; the same for the same tokenizer."""
    tokenizer = texts.load_tokenizer(checkpoint)
    return np.concatenate(
        [
            texts.windows(tokenizer, kind, "calibration", WINDOWS_PER_TEXT, WINDOW_TOKENS, SEED)
            for kind in texts.TEXTS
        ]
    )


def observe(
    directory: Path, values: Sequence[str], windows: NDArray[np.int64], facts: DecoderFacts
) -> dict[str, Activations]:
    """Run GRAPH of ``directory`` over ``windows``; samples of ``values[1, tokens, channels]``."""
    import onnxruntime as ort

    path = directory / "calibration.onnx"  # beside GRAPH: the graph names its data file without a folder
    _write_probed(directory / GRAPH, path, values)
    options = ort.SessionOptions()
    # Weights as they lie in the file are mapped; repacked for speed they would all be in memory once more.
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.log_severity_level = 3  # errors: it warns of every cache that is copied
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [name for value in values for name in (_largest(value), _rows(value))]
    rows = np.linspace(0, windows.shape[1] - 1, ROWS_PER_WINDOW, dtype=np.int64)
    seen = [session.run(names, _feeds(session, window[None], rows, facts)) for window in windows]
    path.unlink()
    by_name = {name: [outputs[position] for outputs in seen] for position, name in enumerate(names)}
    return {
        value: Activations(
            largest=np.max(by_name[_largest(value)], axis=0), rows=np.concatenate(by_name[_rows(value)])
        )
        for value in values
    }


_ROWS = "calibration.rows"


def _largest(value: str) -> str:
    return f"{value}.largest"


def _rows(value: str) -> str:
    return f"{value}.rows"


def _write_probed(source: Path, target: Path, values: Sequence[str]) -> None:
    """Copy the graph with two more outputs per value, small ones, so that no whole tensor is kept."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(source, load_external_data=False)
    graph = model.graph
    axes = numpy_helper.from_array(np.array([0, 1], dtype=np.int64), "calibration.axes")
    graph.initializer.append(axes)
    graph.input.append(helper.make_tensor_value_info(_ROWS, TensorProto.INT64, ["rows"]))
    for value in values:
        picked = f"{value}.picked"
        graph.node.extend(
            [
                helper.make_node("Abs", [value], [f"{value}.abs"]),
                helper.make_node("ReduceMax", [f"{value}.abs", axes.name], [_largest(value)], keepdims=0),
                helper.make_node("Gather", [value, _ROWS], [picked], axis=1),
                helper.make_node("Squeeze", [picked, "calibration.first"], [_rows(value)]),
            ]
        )
        for name in (_largest(value), _rows(value)):
            graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    graph.initializer.append(numpy_helper.from_array(np.array([0], dtype=np.int64), "calibration.first"))
    onnx.save(model, target)


def _feeds(session: Any, tokens: NDArray[np.int64], rows: NDArray[np.int64], facts: DecoderFacts) -> Any:
    length = tokens.shape[1]
    names = {given.name for given in session.get_inputs()}
    # Such a graph needs room for the tokens, and computes the last layer only where logits are wanted.
    writes = WRITE_INDICES in names
    known = {
        "input_ids": tokens,
        "attention_mask": np.ones((1, length), dtype=np.int64),
        "position_ids": np.arange(length, dtype=np.int64)[None],
        _ROWS: rows,
        FIRST_LOGITS: np.array([0 if writes else -1]),
        WRITE_INDICES: np.array([0]),
    }
    empty = np.zeros((1, facts.kv_heads, length if writes else 0, facts.head_dim), dtype=np.float32)
    return {name: known.get(name, empty) for name in names}
