"""Standard ONNX graphs: they answer like transformers in every precision, and TensorRT parses them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from tiny_models import VOCAB_SIZE, build_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from open_autoglm.checkpoint import load_checkpoint
from open_autoglm.export import standard_weights
from open_autoglm.export.decoder_graph import MODEL_TYPES, UnknownModel
from open_autoglm.export.graph import DATA, FIRST_LOGITS, GRAPH, WRITE_INDICES, DecoderFacts
from open_autoglm.export.standard_calibrate import Calibration, calibrate_int8
from open_autoglm.export.standard_graph import EXACT, StandardGraph, load_standard, write_standard
from open_autoglm.export.standard_nodes import Nodes
from open_autoglm.export.standard_recipe import Compute, StandardRecipe, Weights

Numbers = NDArray[np.float32]
Tokens = NDArray[np.int64]

ROWS, PROMPT, LENGTH, PLACES = 2, 20, 24, 32
TOKENS: Tokens = np.random.default_rng(1).integers(4, VOCAB_SIZE, (ROWS, LENGTH))

LEAST_CORRELATION = {
    ("fp16", "same"): 0.99999,
    ("bf16", "same"): 0.9995,
    ("fp16", "int8"): 0.999,
    ("fp16", "w8a8"): 0.99,
    ("fp16", "fp8"): 0.97,
    ("fp16", "int4"): 0.85,
}
"""With torch's fp32 logits. These random weights are harder to round than trained ones; the answer at a
neighbouring position, or without the cache, correlates by less than 0.4."""

FAMILIES = ("glm", "glm4", "llama", "qwen3")
EVERY_RECIPE = [
    (compute, weights)
    for compute in ("fp32", "fp16", "bf16")
    for weights in ("same", "int8", "int4", "fp8", "w8a8")
]


Build = Callable[..., Path]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """A tiny checkpoint by model type and changes to its config, built once."""

    @cache
    def build(model_type: str, **overrides: Any) -> Path:
        return build_checkpoint(tmp_path_factory.mktemp(model_type) / "it", model_type, **overrides)

    return build


def write(checkpoint: Path, output: Path, compute: Compute = "fp32", weights: Weights = "same") -> Path:
    output.mkdir(exist_ok=True)
    recipe = StandardRecipe(compute=compute, weights=weights, block_size=32)
    write_standard(load_checkpoint(str(checkpoint)), recipe, output)
    return output


def by_transformers(checkpoint: Path, tokens: Tokens) -> Numbers:
    """Logits of every position."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: Numbers = model(torch.from_numpy(tokens)).logits.numpy()
    return logits


def correlation(found: Numbers, expected: Numbers) -> float:
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    return float(np.corrcoef(found.ravel(), expected.ravel())[0, 1])


class Runner:
    """A graph with a cache of PLACES for each row, updated in place, as a server would run it."""

    def __init__(self, directory: Path, rows: int = ROWS) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        # Node by node as written: ONNX Runtime would fuse fp8 into kernels that it has for int8 only.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session = ort.InferenceSession(directory / GRAPH, options, providers=["CPUExecutionProvider"])
        types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        self._caches = {
            given.name: ort.OrtValue.ortvalue_from_numpy(
                np.zeros((rows, given.shape[1], PLACES, given.shape[3]), types[given.type])
            )
            for given in self._session.get_inputs()
            if given.name.startswith("past_key_values.")
        }

    def __call__(self, tokens: Tokens, held: int | list[int] = 0, first: int = 0) -> Numbers:
        """Logits from position ``first`` of ``tokens`` on, which follow the ``held`` ones of each row."""
        binding = self._session.io_binding()
        for name, value in _feeds(tokens, held, first).items():
            binding.bind_cpu_input(name, value)
        for name, value in self._caches.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        binding.bind_output("logits")
        self._session.run_with_iobinding(binding)
        logits: Numbers = binding.get_outputs()[-1].numpy()
        return logits


class Reference:
    """The same, computed by ONNX's own definition of the operators: ONNX Runtime has no bf16 on the CPU."""

    def __init__(self, directory: Path) -> None:
        self._evaluator = ReferenceEvaluator(str(directory / GRAPH))
        types = dict(zip(self._evaluator.input_names, self._evaluator.input_types, strict=True))
        self._caches = {}
        for name, given in types.items():
            if name.startswith("past_key_values."):
                _, heads, _, size = (dimension.dim_value for dimension in given.tensor_type.shape.dim)
                kind = helper.tensor_dtype_to_np_dtype(given.tensor_type.elem_type)
                self._caches[name] = np.zeros((ROWS, heads, PLACES, size), kind)

    def __call__(self, tokens: Tokens, held: int | list[int] = 0, first: int = 0) -> Numbers:
        logits, *caches = self._evaluator.run(None, {**_feeds(tokens, held, first), **self._caches})
        self._caches = dict(zip(self._caches, caches, strict=True))
        return logits  # type: ignore[no-any-return]


def _feeds(tokens: Tokens, held: int | list[int], first: int) -> dict[str, Tokens]:
    lengths = np.broadcast_to(np.array(held, dtype=np.int64), len(tokens)).copy()
    return {
        "input_ids": np.ascontiguousarray(tokens),
        "position_ids": lengths[:, None] + np.arange(tokens.shape[1]),
        WRITE_INDICES: lengths,
        FIRST_LOGITS: np.array([first]),
    }


def decoded(run: Runner | Reference) -> Numbers:
    """Prefill, then one token per call: logits from the prompt's last position on."""
    steps = [run(TOKENS[:, :PROMPT], first=-1)]
    steps += [run(TOKENS[:, held : held + 1], held) for held in range(PROMPT, LENGTH)]
    return np.concatenate(steps, axis=1)


# ── exact graphs ─────────────────────────────────────────────────────────────────────────────────

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}

VARIETIES: list[tuple[str, dict[str, Any]]] = [
    *((model_type, {}) for model_type in sorted(MODEL_TYPES)),
    ("glm", {"tie_word_embeddings": True}),
    ("glm", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}}),
    ("llama", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
    ("llama", {"rope_parameters": LLAMA3_ROPE}),
    ("qwen3", {"rope_parameters": YARN_ROPE}),  # the one that scales cosines and sines
]


@pytest.mark.parametrize(
    ("model_type", "overrides"), VARIETIES, ids=[f"{t}-{'-'.join(o) or 'plain'}" for t, o in VARIETIES]
)
def test_a_graph_answers_like_transformers(
    model_type: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    """Every position at once, and a prompt with single tokens after it, in a batch of two."""
    checkpoint = build_checkpoint(tmp_path / "checkpoint", model_type, **overrides)
    expected = by_transformers(checkpoint, TOKENS)
    directory = write(checkpoint, tmp_path / "graph")
    np.testing.assert_allclose(Runner(directory)(TOKENS), expected, atol=1e-3)
    np.testing.assert_allclose(decoded(Runner(directory)), expected[:, PROMPT - 1 :], atol=1e-3)


@pytest.mark.parametrize("compute", ["fp32", "fp16"])  # which spell attention differently
def test_rows_may_differ_in_length(compute: Compute, build: Build, tmp_path: Path) -> None:
    """Prompts of 20 and 13 tokens, then a token each: as if each row were alone. The padding of the shorter
    one is not seen, and its places are taken by the next tokens."""
    directory = write(build("glm"), tmp_path / "graph", compute)
    together, lengths = Runner(directory), [PROMPT, 13]
    prompts = np.where(np.arange(PROMPT) < np.array(lengths)[:, None], TOKENS[:, :PROMPT], 0)
    found = [together(prompts)]
    for step in range(3):
        held = [length + step for length in lengths]
        found.append(together(TOKENS[np.arange(ROWS), held][:, None], held))
    for row, length in enumerate(lengths):
        expected = Runner(directory, rows=1)(TOKENS[row : row + 1, : length + 3])[0]
        tail = np.concatenate([step[row] for step in found[1:]])
        np.testing.assert_allclose(found[0][row, :length], expected[:length], atol=0.02)
        np.testing.assert_allclose(tail, expected[length:], atol=0.02)


def test_the_caller_says_which_logits(build: Build, tmp_path: Path) -> None:
    """All, the last, or those from a position on; the same numbers whichever are asked for."""
    run = Runner(write(build("glm"), tmp_path / "graph"))
    everything = run(TOKENS)
    for first in (-1, -3, 5):
        np.testing.assert_allclose(run(TOKENS, first=first), everything[:, first:], atol=1e-5)


# ── every precision ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize(("compute", "weights"), LEAST_CORRELATION)
def test_a_rounded_graph_answers_nearly_like_transformers(
    compute: Compute, weights: Weights, model_type: str, build: Build, tmp_path: Path
) -> None:
    """Prompt and single tokens against torch in fp32, and against the same graph read at once."""
    directory = write(build(model_type), tmp_path / "graph", compute, weights)
    run: type[Runner | Reference] = Reference if compute == "bf16" else Runner
    at_once, steps = run(directory)(TOKENS), decoded(run(directory))
    expected = by_transformers(build(model_type), TOKENS)
    assert correlation(at_once, expected) > LEAST_CORRELATION[compute, weights]
    assert correlation(steps, expected[:, PROMPT - 1 :]) > LEAST_CORRELATION[compute, weights]
    assert correlation(steps, at_once[:, PROMPT - 1 :]) > 0.999


@pytest.fixture(scope="module")
def written(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The tiny GLM in any precision, written once."""

    @cache
    def written(compute: Compute, weights: Weights) -> Path:
        return write(build("glm"), tmp_path_factory.mktemp("glm") / "graph", compute, weights)

    return written


@pytest.mark.parametrize(("compute", "weights"), EVERY_RECIPE)
def test_a_graph_is_sound(compute: Compute, weights: Weights, written: Callable[..., Path]) -> None:
    """The checker agrees, shapes included; all operators are ONNX's; what is large is in the data file."""
    directory = written(compute, weights)
    onnx.checker.check_model(directory / GRAPH, full_check=True)
    model = onnx.load(directory / GRAPH, load_external_data=False)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 24)]
    assert {node.domain for node in model.graph.node} == {""}
    known = {value.name for value in (*model.graph.value_info, *model.graph.output)}
    assert {name for node in model.graph.node for name in node.output} <= known
    large = [tensor for tensor in model.graph.initializer if np.prod(tensor.dims) > 1024]
    assert {tensor.data_location for tensor in large} == {TensorProto.EXTERNAL}
    assert DecoderFacts.read(directory) == DecoderFacts(kv_heads=2, head_dim=32, kv_cache="in_place")
    assert sorted(path.name for path in directory.iterdir()) == ["decoder.json", GRAPH, DATA]


@pytest.mark.parametrize(("compute", "weights"), EVERY_RECIPE)
def test_tensorrt_parses_it(compute: Compute, weights: Weights, written: Callable[..., Path]) -> None:
    """By TensorRT for RTX, whose parser needs no GPU."""
    trt = pytest.importorskip("tensorrt_rtx_bindings")
    directory = written(compute, weights)
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(0)
    parser = trt.OnnxParser(network, logger)
    model = load_standard(directory, PLACES).SerializeToString()
    problems = parser.parse(model, str(directory / GRAPH)) or [
        parser.get_error(index).desc() for index in range(parser.num_errors)
    ]
    assert problems is True
    cache_type = {"fp32": trt.float32, "fp16": trt.float16, "bf16": trt.bfloat16}[compute]
    given = {tensor.name: tensor for tensor in map(network.get_input, range(network.num_inputs))}
    made = {tensor.name: tensor for tensor in map(network.get_output, range(network.num_outputs))}
    for tensor in (given["past_key_values.1.value"], made["present.1.value"]):
        assert (tuple(tensor.shape), tensor.dtype) == ((-1, 2, PLACES, 32), cache_type)
    assert made["logits"].dtype == trt.float32


@pytest.mark.parametrize(
    ("weights", "kinds"),
    [
        ("same", {"FLOAT16": 15}),
        ("int8", {"INT8": 15}),
        ("int4", {"INT4": 14, "INT8": 1}),
        ("w8a8", {"INT8": 15}),
        ("fp8", {"FLOAT8E4M3FN": 14, "FLOAT16": 1}),
    ],
)
def test_matrices_are_stored_in_their_bits(
    weights: Weights, kinds: dict[str, int], written: Callable[..., Path]
) -> None:
    """Seven of each layer and the head, besides the embedding."""
    model = onnx.load(written("fp16", weights) / GRAPH, load_external_data=False)
    matrices = [
        tensor
        for tensor in model.graph.initializer
        if tensor.name.endswith(("proj.weight", "lm_head.weight")) and len(tensor.dims) == 2
    ]
    assert Counter(TensorProto.DataType.Name(tensor.data_type) for tensor in matrices) == kinds


@pytest.mark.parametrize("weights", ["fp8", "w8a8"])
def test_what_is_multiplied_is_rounded(weights: Weights, written: Callable[..., Path]) -> None:
    """In fp8 all four values of a layer, in int8 those that one scale fits; each once, with zero point 0."""
    graph = onnx.load(written("fp16", weights) / GRAPH).graph
    rounded = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert len(rounded) == 2 * 4 if weights == "fp8" else 2 <= len(rounded) < 2 * 4
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in rounded:
        _, scale, zero_point = (constants.get(name) for name in node.input)
        assert scale is not None
        assert 0 < scale < 1
        assert zero_point is not None
        assert zero_point.astype(np.float32) == 0


# ── passes ───────────────────────────────────────────────────────────────────────────────────────


def test_a_norm_in_fp16_keeps_a_small_stream(build: Build, tmp_path: Path) -> None:
    """Numbers whose squares are as small as GLM's epsilon. In fp16 both would be off or vanish."""
    model = AutoModelForCausalLM.from_pretrained(build("glm"), dtype=torch.float32).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(2.5e-3)
        model.save_pretrained(tmp_path / "checkpoint")
        stream = model.model.embed_tokens(torch.from_numpy(TOKENS))
        expected = model.model.layers[0].input_layernorm(stream).numpy()
    for file in build("glm").glob("*token*"):
        (tmp_path / "checkpoint" / file.name).write_bytes(file.read_bytes())
    directory = write(tmp_path / "checkpoint", tmp_path / "graph", "fp16")
    graph = onnx.load(directory / GRAPH)
    name = "model.layers.0.input_layernorm"
    graph.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT16, None))
    (tmp_path / "probed").mkdir()
    onnx.save(graph, tmp_path / "probed" / GRAPH)
    session = ort.InferenceSession(tmp_path / "probed" / GRAPH, providers=["CPUExecutionProvider"])
    empty = np.zeros((ROWS, 2, PLACES, 32), np.float16)
    feeds: dict[str, Any] = {given.name: empty for given in session.get_inputs()}
    (found,) = session.run([name], feeds | _feeds(TOKENS, 0, 0))
    half, epsilon = stream.numpy().astype(np.float16), np.float16(model.config.rms_norm_eps)
    weight = model.model.layers[0].input_layernorm.weight.detach().numpy()
    naive = half / np.sqrt(np.mean(half * half, axis=-1, keepdims=True, dtype=np.float16) + epsilon) * weight
    assert _relative_error(found, expected) < 2e-3
    assert _relative_error(naive, expected) > 2e-2


def _relative_error(found: NDArray[Any], expected: Numbers) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_smoothing_changes_no_product(build: Build, tmp_path: Path) -> None:
    """What a value is divided by, its weights are multiplied by: without rounding all is as it was."""
    checkpoint, exact = load_checkpoint(str(build("glm"))), write(build("glm"), tmp_path / "exact")
    found = calibrate_int8(checkpoint, exact)
    assert max(smoothing.std() for smoothing in found.smoothing.values()) > 0.01
    smooth = tmp_path / "smooth"
    smooth.mkdir()
    only = Calibration(smoothing=found.smoothing, divided=found.divided)
    StandardGraph(checkpoint, EXACT, smooth, only).write()
    np.testing.assert_allclose(Runner(smooth)(TOKENS), Runner(exact)(TOKENS), atol=1e-3)
    assert (smooth / DATA).read_bytes() != (exact / DATA).read_bytes()


MATRIX: Numbers = np.random.default_rng(0).normal(0.1, 1, (6, 160)).astype(np.float32)
MATRIX[1] = 0
MATRIX[2] *= 1e-3


def restored(
    pack: Callable[..., str], directory: Path, matrix: Numbers, compute: Compute, *more: int
) -> Numbers:
    """``matrix`` after rounding, computed by ONNX Runtime: ``[outputs, inputs]``."""
    nodes = Nodes(directory)
    value = nodes.cast(pack(nodes, "matrix", matrix, compute, *more), "fp32", "found")
    nodes.output(value, TensorProto.FLOAT, ["inputs", "outputs"])
    nodes.save()
    session = ort.InferenceSession(directory / GRAPH, providers=["CPUExecutionProvider"])
    found: Numbers = session.run(None, {})[0].T
    return found


@pytest.mark.parametrize("compute", ["fp32", "fp16"])
def test_int8_errs_by_half_a_step_of_each_output(compute: Compute, tmp_path: Path) -> None:
    """A row of zeros divides by nothing and stays what it is."""
    step = np.abs(MATRIX).max(axis=1, keepdims=True) / 127
    error = np.abs(restored(standard_weights.per_output, tmp_path, MATRIX, compute) - MATRIX)
    assert (error <= 0.56 * step).all()  # of which 127 times the rounding of a scale to fp16 is 0.06
    assert error.max() > 0


@pytest.mark.parametrize(("asked", "size"), [(32, 32), (64, 32), (16, 16)])
def test_int4_errs_by_half_a_step_of_each_block(asked: int, size: int, tmp_path: Path) -> None:
    """64 does not divide 160, and 32 does. Numbers are packed in ONNX's order, scales meet their blocks."""
    steps = np.abs(MATRIX.reshape(6, -1, size)).max(axis=2, keepdims=True) / 7
    found = restored(standard_weights.per_block, tmp_path, MATRIX, "fp32", asked)
    error = np.abs(found - MATRIX).reshape(6, -1, size)
    assert (error <= 0.501 * steps).all()
    assert np.median(error / np.where(steps > 0, steps, 1)) > 0.1


def test_fp8_errs_by_a_sixteenth_of_each_number(tmp_path: Path) -> None:
    """Three bits behind the point, and next to zero a fixed step: what E4M3 can say."""
    smallest = np.abs(MATRIX).max() / 448 * 2.0**-9
    error = np.abs(restored(standard_weights.per_tensor, tmp_path, MATRIX, "fp32") - MATRIX)
    assert (error <= np.maximum(np.abs(MATRIX) / 15.9, smallest)).all()
    assert error.max() > 0.01


def test_weights_beyond_fp16_are_refused(tmp_path: Path) -> None:
    """Rather than served as infinity."""
    with pytest.raises(ValueError, match="not finite in fp16"):
        standard_weights.plain(Nodes(tmp_path), "matrix", MATRIX * np.float32(1e5), "fp16")


# ── what there is no graph for ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("model_type", "overrides", "reason"),
    [
        ("llama", {"hidden_act": "gelu"}, "gelu"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "length"),
    ],
)
def test_what_the_graph_lacks_is_refused(
    model_type: str, overrides: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    """By name, before anything is written."""
    checkpoint = build_checkpoint(tmp_path / "checkpoint", model_type, **overrides)
    with pytest.raises(UnknownModel, match=reason):
        write(checkpoint, tmp_path / "graph")
    assert not list((tmp_path / "graph").iterdir())


def test_experts_are_refused(build: Build, tmp_path: Path) -> None:
    """A mixture of experts has no standard operator."""
    checkpoint = load_checkpoint(str(build("glm")))
    AutoConfig.for_model("glm4_moe", num_hidden_layers=1).save_pretrained(tmp_path)
    moe = checkpoint.model_copy(update={"path": tmp_path, "model_type": "glm4_moe"})
    with pytest.raises(UnknownModel, match="not verified for model type 'glm4_moe'"):
        write_standard(moe, EXACT, tmp_path)


def test_a_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    """A checkpoint with more than the graph computes would be answered wrongly, without a word."""
    from safetensors.torch import load_file, save_file

    checkpoint = build_checkpoint(tmp_path / "checkpoint", "llama")
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.gate.weight"] = tensors["model.norm.weight"].clone()
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UnknownModel, match=r"layers\.0\.self_attn\.gate"):
        write(checkpoint, tmp_path / "graph")
