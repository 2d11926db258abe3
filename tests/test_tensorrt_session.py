"""Sessions over standard graphs: what they ask of an executor, and what the plan's executor does with memory.

There is no GPU in the tests. The graph is computed by ONNX Runtime from the very addresses that TensorRT
would be told (``host_plan.py``), so positions, cache places, profiles and bindings are put to the test.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from host_plan import HostContext, HostTensors, open_on_host
from numpy.typing import NDArray
from tiny_models import VOCAB_SIZE

from open_autoglm.checkpoint import load_checkpoint
from open_autoglm.engines.contract import SessionOptions, Tokens, Verifier
from open_autoglm.engines.tensorrt_executor import CudaTensors, PlanExecutor
from open_autoglm.engines.tensorrt_session import StandardSession
from open_autoglm.export.standard_graph import write_standard
from open_autoglm.export.standard_recipe import StandardRecipe
from open_autoglm.export.tensorrt_plan import PlanSizes
from open_autoglm.generation import greedy

ROWS, PROMPT, LENGTH = 2, 11, 16
SIZES = PlanSizes(batch_size=ROWS, prompt_tokens=PROMPT, cache_tokens=LENGTH + 4)
OPTIONS = SessionOptions(batch_size=ROWS, max_tokens=LENGTH, threads=1)
TOKENS: Tokens = np.random.default_rng(1).integers(4, VOCAB_SIZE, (ROWS, LENGTH))
OTHER: Tokens = np.random.default_rng(2).integers(4, VOCAB_SIZE, (ROWS, LENGTH))
Open = Callable[..., tuple[StandardSession, PlanExecutor]]


@pytest.fixture(scope="module")
def graph(tiny_glm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("standard")
    write_standard(load_checkpoint(str(tiny_glm)), StandardRecipe(compute="fp32"), directory)
    return directory


@pytest.fixture(scope="module")
def truth(tiny_glm: Path) -> NDArray[np.float32]:
    """Logits of ``TOKENS`` by transformers, without a cache."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_glm, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: NDArray[np.float32] = model(torch.from_numpy(TOKENS)).logits.numpy()
    return logits


@pytest.fixture
def opened(graph: Path) -> Open:
    def open_session(*, cuda_graph: bool = False, **sizes: str) -> tuple[StandardSession, PlanExecutor]:
        executor = open_on_host(graph, SIZES.model_copy(update=sizes), cuda_graph=cuda_graph)
        return StandardSession(executor, OPTIONS), executor

    return open_session


def assert_equal(found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_prefill_and_decode_are_the_models(
    opened: Open, truth: NDArray[np.float32], cuda_graph: bool
) -> None:
    """Of both rows, after a conversation that left its keys and values in the cache."""
    session, _ = opened(cuda_graph=cuda_graph)
    session.full_logits(OTHER)
    assert_equal(session.prefill(TOKENS[:, :PROMPT]), truth[:, PROMPT - 1])
    for position in range(PROMPT, LENGTH):
        assert_equal(session.decode(TOKENS[:, position]), truth[:, position])


def test_one_profile_serves_prompts_and_tokens(opened: Open, truth: NDArray[np.float32]) -> None:
    """In a context each: what one was told stays when the other runs."""
    session, executor = opened(tuned_for="token")
    assert list(executor._record.profiles) == ["any"]
    for _ in range(2):
        assert_equal(session.prefill(TOKENS[:, :PROMPT]), truth[:, PROMPT - 1])
        for position in range(PROMPT, LENGTH):
            assert_equal(session.decode(TOKENS[:, position]), truth[:, position])
    contexts = executor._plan.contexts
    assert contexts["prefill"] is not contexts["decode"]


def test_full_logits_are_the_models(opened: Open, truth: NDArray[np.float32]) -> None:
    """Of every position, and of fewer rows than there is room for."""
    session, _ = opened()
    assert_equal(session.full_logits(TOKENS), truth)
    assert_equal(session.full_logits(TOKENS[1:]), truth[1:])


def test_several_tokens_at_once_are_the_models(opened: Open, truth: NDArray[np.float32]) -> None:
    """Also after wrong ones were forgotten; a single one too."""
    session, _ = opened()
    assert isinstance(session, Verifier)
    session.prefill(TOKENS[:1, :PROMPT])
    session.extend(OTHER[:1, :4])
    session.rewind(4)
    assert_equal(session.extend(TOKENS[:1, PROMPT : PROMPT + 3]), truth[:1, PROMPT : PROMPT + 3])
    assert_equal(session.extend(TOKENS[:1, PROMPT + 3 : PROMPT + 4]), truth[:1, PROMPT + 3 : PROMPT + 4])


def test_drafts_change_no_token(opened: Open) -> None:
    """A prompt that repeats itself, with and without drafts."""
    session, _ = opened()
    prompt = np.tile(TOKENS[:1, :4], (1, 2))
    plain, drafted = (
        np.concatenate([step.tokens for step in greedy(session, prompt, 8, draft)], axis=1)
        for draft in (0, 3)
    )
    np.testing.assert_array_equal(plain, drafted)


def test_a_full_cache_is_a_value_error(opened: Open) -> None:
    """At what was asked for, though the plan has room for more; and what was read stays."""
    session, _ = opened()
    session.prefill(TOKENS)
    with pytest.raises(ValueError, match=f"holds {LENGTH} tokens, {LENGTH + 1} were asked for"):
        session.decode(TOKENS[:, 0])
    with pytest.raises(ValueError, match="3 in a session opened for 2"):
        session.prefill(np.tile(TOKENS[:1], (3, 1)))
    with pytest.raises(ValueError, match=f"{LENGTH} tokens were read, {LENGTH + 1}"):
        session.rewind(LENGTH + 1)


def test_decoding_tells_shapes_and_addresses_once(opened: Open) -> None:
    """What is told for every token costs every token; a new number of rows is told anew."""
    session, executor = opened()
    session.prefill(TOKENS[:, :PROMPT])
    session.decode(TOKENS[:, PROMPT])
    context = executor._plan.contexts["decode"]
    assert isinstance(context, HostContext)
    told = context.told
    session.decode(TOKENS[:, PROMPT + 1])
    assert context.told == told
    session.prefill(TOKENS[:1, :PROMPT])
    session.decode(TOKENS[:1, PROMPT])
    assert context.told == 2 * told


def test_a_captured_token_is_replayed(opened: Open) -> None:
    """The first token runs and is captured, those after it are replayed; prompts never are."""
    session, executor = opened(cuda_graph=True)
    session.prefill(TOKENS[:, :PROMPT])
    for position in range(PROMPT, LENGTH):
        session.decode(TOKENS[:, position])
    tensors = executor._tensors
    assert isinstance(tensors, HostTensors)
    assert tensors.replayed == LENGTH - PROMPT - 1


def test_past_and_present_share_their_memory(opened: Open) -> None:
    """TensorRT updates a cache in place only then."""
    session, executor = opened()
    session.prefill(TOKENS[:, :PROMPT])
    context = executor._plan.contexts["prefill"]
    assert isinstance(context, HostContext)
    addresses = context._addresses
    past = [name for name in addresses if name.startswith("past_key_values")]
    assert len(past) == 4
    for name in past:
        assert addresses[name] == addresses[name.replace("past_key_values", "present")]
    assert len({addresses[name] for name in past}) == len(past)


def test_what_was_returned_stays(opened: Open) -> None:
    """The next call does not write into it, captured or not."""
    session, _ = opened(cuda_graph=True)
    session.prefill(TOKENS[:, :PROMPT])
    kept = [session.decode(TOKENS[:, PROMPT]), session.decode(TOKENS[:, PROMPT + 1])]
    copies = [logits.copy() for logits in kept]
    session.decode(TOKENS[:, PROMPT + 2])
    for logits, copy in zip(kept, copies, strict=True):
        np.testing.assert_array_equal(logits, copy)


def test_without_a_gpu_there_is_no_session() -> None:
    """Never a silent run on the CPU."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("this host has a GPU")
    with pytest.raises(RuntimeError, match="finds no GPU"):
        CudaTensors()
