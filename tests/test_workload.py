"""The requests that candidates are timed on."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import VOCAB_SIZE

from open_autoglm.checkpoint import load_checkpoint
from open_autoglm.engines.contract import Tokens
from open_autoglm.errors import UserError
from open_autoglm.files import sha256_file
from open_autoglm.measure import workload as room
from open_autoglm.measure.workload import (
    POOL_ROUNDS,
    SERVER_REQUESTS,
    Request,
    distinct_lengths,
    draw_prompts,
    load_rounds,
    make_workload,
    short,
    warmup_request,
)
from open_autoglm.quality.texts import TEXTS, encode, load_tokenizer
from open_autoglm.schemas import Checkpoint, OptimizeSpec, Workload

MIX = "16/4:3,64/8:1"


@pytest.fixture(scope="module")
def checkpoint(tiny_glm: Path) -> Checkpoint:
    return load_checkpoint(str(tiny_glm))


@pytest.fixture(scope="module")
def texts(checkpoint: Checkpoint) -> list[Tokens]:
    tokenizer = load_tokenizer(checkpoint)
    return [encode(tokenizer, kind, "eval") for kind in TEXTS]


@pytest.fixture
def make(
    checkpoint: Checkpoint, texts: list[Tokens], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Workload]:
    """Draws a workload of short prompts, with anything else in the spec as told.

    The texts are encoded once for all tests, which takes longer than all the rest.
    """
    encoded = {(kind, "eval"): text for kind, text in zip(TEXTS, texts, strict=True)}
    monkeypatch.setattr(room, "encode", lambda _tokenizer, kind, split: encoded[kind, split])

    def drawn(name: str = "workload.npz", **spec: Any) -> Workload:
        asked = {"model_path": "m", "prompt_tokens": 64, "output_tokens": 8, "rounds": 3, **spec}
        return make_workload(checkpoint, OptimizeSpec.model_validate(asked), tmp_path / name)

    return drawn


def distinct(prompts: Tokens) -> int:
    return len(np.unique(prompts.reshape(-1, prompts.shape[-1]), axis=0))


def request(prompt: int, output: int, start: int = 0) -> Request:
    return Request(np.arange(start, start + prompt)[None], output, arrival_ms=7.0)


# ── drawing ──────────────────────────────────────────────────────────────────────────────────────


def test_every_round_and_row_reads_another_prompt(make: Callable[..., Workload]) -> None:
    """A pool of many rounds is drawn however few are asked for, and no two rows of it are alike."""
    workload = make(batch_size=3, scenario="offline")
    rounds = load_rounds(workload)
    assert len(rounds) == workload.rounds == POOL_ROUNDS
    prompts = np.stack([requests[0].tokens for requests in rounds])
    assert prompts.shape == (POOL_ROUNDS, 3, 64)
    assert prompts.dtype == np.int64
    assert distinct(prompts) == POOL_ROUNDS * 3
    assert prompts.max() < VOCAB_SIZE
    assert {(len(r), r[0].output_tokens, r[0].arrival_ms) for r in rounds} == {(1, 8, 0.0)}


def test_more_rounds_than_the_pool_are_drawn_when_asked_for(make: Callable[..., Workload]) -> None:
    """The number of rounds in the spec is a floor."""
    assert make(rounds=POOL_ROUNDS + 6).rounds == POOL_ROUNDS + 6


def test_the_same_spec_gives_the_same_bytes(make: Callable[..., Workload]) -> None:
    """Equal specs give equal files, whose entries bear no date; another seed gives another file."""
    spec = {"scenario": "server", "request_rate_per_s": 5, "length_mix": MIX}
    drawn = [make(f"{index}.npz", seed=seed, **spec) for index, seed in enumerate((0, 0, 1))]
    assert drawn[0].sha256 == drawn[1].sha256 != drawn[2].sha256
    with zipfile.ZipFile(drawn[0].path) as entries:
        assert {entry.date_time for entry in entries.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_lengths_are_drawn_from_the_mix_in_its_proportions(make: Callable[..., Workload]) -> None:
    """Prompt and output lengths come in the pairs that were named, three short ones to a long one."""
    workload = make(length_mix=MIX, scenario="server", request_rate_per_s=5)
    assert (workload.prompt_tokens, workload.output_tokens, workload.length_mix) == (64, 8, MIX)
    lengths = [r.lengths for requests in load_rounds(workload) for r in requests]
    assert set(lengths) == {(16, 4), (64, 8)}
    long_ones = lengths.count((64, 8))  # of 768 a quarter, give or take four standard errors
    assert abs(long_ones - len(lengths) / 4) < 4 * np.sqrt(len(lengths) * 3 / 16)


def test_a_mix_cuts_prompts_and_changes_none(make: Callable[..., Workload]) -> None:
    """A short request reads the first tokens of what a long one in its place would read."""
    plain, mixed = load_rounds(make("plain.npz")), load_rounds(make("mixed.npz", length_mix=MIX))
    for (whole,), (cut,) in zip(plain, mixed, strict=True):
        np.testing.assert_array_equal(whole.tokens[:, : cut.lengths[0]], cut.tokens)
        assert cut.tokens.flags.c_contiguous


def test_server_rounds_hold_poisson_arrivals(make: Callable[..., Workload]) -> None:
    """A round starts with a request; the gaps to the others are exponential with the mean of the rate."""
    workload = make(scenario="server", request_rate_per_s=4)
    arrivals = np.array([[r.arrival_ms for r in requests] for requests in load_rounds(workload)])
    assert arrivals.shape == (POOL_ROUNDS, SERVER_REQUESTS)
    assert not arrivals[:, 0].any()
    gaps = np.diff(arrivals, axis=1).ravel()
    assert (gaps > 0).all()
    error = 250 / np.sqrt(len(gaps))  # an exponential's deviation is its mean
    assert abs(gaps.mean() - 250) < 4 * error
    assert abs(np.mean(gaps > 250) - np.exp(-1)) < 4 * np.sqrt(0.25 / len(gaps))


def test_another_rate_asks_for_the_same_prompts(make: Callable[..., Workload]) -> None:
    """Only the arrivals depend on the rate, and they only stretch."""
    slow, fast = (
        load_rounds(make(f"{rate}.npz", scenario="server", request_rate_per_s=rate)) for rate in (2, 4)
    )
    for before, after in zip(slow[5], fast[5], strict=True):
        np.testing.assert_array_equal(before.tokens, after.tokens)
        assert before.arrival_ms == pytest.approx(2 * after.arrival_ms)


def test_limits_become_the_promise_that_goodput_counts_by(make: Callable[..., Workload]) -> None:
    """In milliseconds, for a server; elsewhere a limit changes no request and is no part of the workload."""
    limits = {"max_latency": "0.5s", "max_tpot": "20ms", "request_rate_per_s": 3}
    serving = make(scenario="server", **limits)
    assert (serving.slo_ttft_ms, serving.slo_tpot_ms, serving.request_rate_per_s) == (500, 20, 3)
    alone = make(**limits)
    assert (alone.slo_ttft_ms, alone.slo_tpot_ms, alone.request_rate_per_s) == (None, None, None)
    assert alone == make()


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [({}, "--request-rate"), ({"request_rate_per_s": 1, "batch_size": 4}, "batch size is 4")],
)
def test_a_server_needs_a_rate_and_no_batch(
    make: Callable[..., Workload], spec: dict[str, Any], sentence: str
) -> None:
    """What cannot be meant is refused before anything is measured."""
    with pytest.raises(UserError, match=sentence):
        make(scenario="server", **spec)


def test_the_pool_shrinks_to_what_the_texts_and_the_memory_allow(
    make: Callable[..., Workload], texts: list[Tokens], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer rounds than the pool's usual number, but never fewer than asked for."""
    rows = 2 * min(map(len, texts)) // 5
    assert room._pool_size(texts, rows, length=1, least=3) == 5
    assert room._pool_size(texts, 10 * rows, length=1, least=3) == 3
    monkeypatch.setattr(room, "POOL_BYTES", 8 * 64 * 10)
    assert make(batch_size=2, scenario="offline").rounds == 5
    assert make(batch_size=2, scenario="offline", rounds=7).rounds == 7


# ── prompts ──────────────────────────────────────────────────────────────────────────────────────


def test_prompts_alternate_between_the_kinds_of_text(texts: list[Tokens]) -> None:
    """Even prompts are fiction, odd ones technical."""
    fiction, technical = (np.lib.stride_tricks.sliding_window_view(text, 80) for text in texts)
    for index, prompt in enumerate(draw_prompts(texts, count=4, length=80, seed=5)):
        assert (fiction == prompt).all(axis=1).any() == (index % 2 == 0)
        assert (technical == prompt).all(axis=1).any() == (index % 2 == 1)


def test_prompts_overlap_but_differ_when_the_text_is_short(texts: list[Tokens]) -> None:
    """More prompts than fit side by side, and prompts longer than the text, still all differ."""
    assert distinct(draw_prompts(texts, count=400, length=2048, seed=0)) == 400
    assert distinct(draw_prompts(texts, count=6, length=len(texts[1]) + 1000, seed=0)) == 6


def test_more_prompts_than_tokens_are_refused(texts: list[Tokens]) -> None:
    """When prompts would have to repeat, the sentence says so with the numbers."""
    with pytest.raises(UserError, match="500000 different prompts are needed, but the fiction text has only"):
        draw_prompts(texts, count=500_000, length=8, seed=0)


# ── reading ──────────────────────────────────────────────────────────────────────────────────────


def test_a_changed_file_is_refused(make: Callable[..., Workload]) -> None:
    """Two candidates timed on different prompts would not be comparable."""
    workload = make()
    assert workload.sha256 == sha256_file(workload.path)
    make(workload.path.name, seed=9)
    with pytest.raises(ValueError, match=r"workload\.npz was changed"):
        load_rounds(workload)


def test_warm_up_visits_every_length_once_and_stays_with_the_usual_one() -> None:
    """It reads the pool from its end, another prompt each turn until there are no more, and never waits."""
    rounds = [
        (request(4, 2, start=0), request(2, 2, start=10)),
        (request(2, 2, start=20), request(3, 2, start=30)),
        (request(2, 2, start=40),),
    ]
    assert distinct_lengths(rounds) == [(3, 2), (4, 2), (2, 2)]
    turns = [warmup_request(rounds, turn) for turn in range(6)]
    assert [turn.lengths for turn in turns] == [(3, 2), (4, 2), *[(2, 2)] * 4]
    assert [int(turn.tokens[0, 0]) for turn in turns] == [30, 0, 40, 20, 10, 40]
    assert not any(turn.arrival_ms for turn in turns)


def test_a_short_round_is_one_cut_request_at_once() -> None:
    """The answer is cut where it is longer, and the queue of a server round is left out."""
    (cut,) = short((request(50, 9), request(60, 9)), output_tokens=4)
    (whole,) = short((request(50, 9),), output_tokens=100)
    assert (cut.lengths, whole.lengths) == ((50, 4), (50, 9))
    assert cut.tokens.flags.c_contiguous
    assert cut.arrival_ms == 0
