"""The engine contract, held against every engine that can run here, each with all it proposes.

A new engine, built in or third-party, is checked by being installed.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from studies import demo_analysis
from tiny_models import VOCAB_SIZE, build_checkpoint

from open_autoglm import engines
from open_autoglm.checkpoint import load_checkpoint
from open_autoglm.engines.contract import (
    DRAFT_TOKENS,
    ExportContext,
    Session,
    SessionOptions,
    Slotted,
    Tokens,
    Verifier,
)
from open_autoglm.generation import greedy
from open_autoglm.quality.reference import NonFiniteError, continue_greedily, require_finite
from open_autoglm.schemas import Candidate, Checkpoint, Dimension, ExportedModel, Knob, OptimizeSpec

FAMILIES = ("glm", "llama")
"""Held to every check."""
MORE_FAMILIES = ("glm4", "qwen3")
"""Held to the checks marked ``FOR_EVERY_FAMILY``: the norms they add can be wrong there and nowhere else."""
ROWS, PROMPT, LENGTH = 2, 32, 48
CONTEXT = 512
"""The tiny models' ``max_position_embeddings``."""
OPTIONS = SessionOptions(batch_size=ROWS, max_tokens=LENGTH, threads=1)
TOKENS: Tokens = np.random.default_rng(1).integers(4, VOCAB_SIZE, (ROWS, LENGTH))
ONE: Tokens = TOKENS[:1]
OTHER: Tokens = np.random.default_rng(2).integers(4, VOCAB_SIZE, (ROWS, LENGTH))
LONG: Tokens = np.random.default_rng(3).integers(4, VOCAB_SIZE, (1, CONTEXT + 1))

LEAST_CORRELATION = {"fp32": 0.999999, "bf16": 0.999, "fp16": 0.999, "int8": 0.98, "int4": 0.8}
"""With torch's fp32 logits. These random weights are harder to round than trained ones; the answer at a
neighbouring position, or without the cache, correlates by less than 0.4."""

Numbers = NDArray[np.float32]

pytestmark = pytest.mark.usefixtures("traced_once")

SPEC = OptimizeSpec(model_path="tiny", objective="memory")  # the objective with the most knobs


def proposals() -> list[Candidate]:
    """What every engine that is ready here proposes and does not veto."""
    ready = [engine for engine in map(engines.get, engines.names()) if engine.probe("cpu").ready]
    proposed = [c for engine in ready for c in engine.propose(demo_analysis(), SPEC, "cpu")]
    return [candidate for candidate in proposed if candidate.vetoed_because is None]


def dimensions(candidate: Candidate) -> tuple[Dimension, ...]:
    return engines.get(candidate.engine).dimensions(candidate, demo_analysis(), SPEC)


def variant(candidate: Candidate, **knobs: Knob) -> Candidate:
    return engines.get(candidate.engine).variant(candidate, knobs)


def turned(candidate: Candidate) -> list[Candidate]:
    """Every variant that differs in one knob."""
    turns = [(d.knob, value) for d in dimensions(candidate) for value in d.values]
    return [variant(candidate, **{k: v}) for k, v in turns if v != candidate.knobs[k]]


COMPILED = [candidate for candidate in proposals() if candidate.knobs.get("compile")]
OTHERS = [candidate for candidate in proposals() if not candidate.knobs.get("compile")]


@dataclass(frozen=True)
class Served:
    """One candidate's files for one tiny model."""

    family: str
    candidate: Candidate
    exported: ExportedModel

    def open(self, **changes: int) -> Session:
        options = OPTIONS.model_copy(update=changes)
        return engines.get(self.candidate.engine).open(self.candidate, self.exported, options)

    @contextlib.contextmanager
    def opened(self, **changes: int) -> Iterator[Session]:
        session = self.open(**changes)
        yield session
        session.close()


@pytest.fixture(scope="module")
def checkpoints(tiny_glm: Path, tiny_llama: Path, home: Path) -> dict[str, Checkpoint]:
    paths = {"glm": tiny_glm, "llama": tiny_llama}
    paths |= {family: build_checkpoint(home / family, family) for family in MORE_FAMILIES}
    return {family: load_checkpoint(str(path)) for family, path in paths.items()}


Serve = Callable[[Candidate, Checkpoint], Served]


@pytest.fixture(scope="module")
def serve(home: Path, shared_ledger: Path) -> Serve:
    """Export as the store would, in this process: the child's start-up is not what is checked here."""

    def export(candidate: Candidate, checkpoint: Checkpoint) -> Served:
        engine, path = engines.get(candidate.engine), checkpoint.path
        if engine.recipe(candidate) is not None:
            path = home / f"{checkpoint.path.name}-{candidate.id}"
            path.mkdir()
            with contextlib.redirect_stdout(io.StringIO()):
                engine.export(candidate, checkpoint, ExportContext(output=path, ledger=shared_ledger))
        exported = ExportedModel(
            candidate_id=candidate.id, path=path, digest="", route="", size_bytes=0, build_s=0
        )
        return Served(checkpoint.model_type, candidate, exported)

    return export


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("contract")


def name_of(param: tuple[str, Candidate]) -> str:
    return f"{param[0]}-{param[1].id}"


EVERY_PAIR = [(family, candidate) for family in FAMILIES + MORE_FAMILIES for candidate in OTHERS]
FOR_EVERY_FAMILY = pytest.mark.parametrize("served", EVERY_PAIR, indirect=True, ids=name_of, scope="module")


@pytest.fixture(scope="module", params=EVERY_PAIR[: len(FAMILIES) * len(OTHERS)], ids=name_of)
def served(request: pytest.FixtureRequest, checkpoints: dict[str, Checkpoint], serve: Serve) -> Served:
    family, candidate = request.param
    return serve(candidate, checkpoints[family])


@pytest.fixture(scope="module")
def session(served: Served) -> Iterator[Session]:
    """One session for most tests, as a server has: none may leave a trace for the next."""
    with served.opened() as session:
        yield session


Truth = Callable[[str], Numbers]
"""By family, from transformers itself in fp32."""


@pytest.fixture(scope="module")
def truth(checkpoints: dict[str, Checkpoint]) -> Truth:
    """Logits of ``TOKENS``."""
    found = {family: by_transformers(checkpoint, TOKENS) for family, checkpoint in checkpoints.items()}
    return found.__getitem__


@pytest.fixture(scope="module")
def long_truth(checkpoints: dict[str, Checkpoint]) -> Truth:
    """Logits of a prompt that fills the model's context."""
    found = {family: by_transformers(checkpoints[family], LONG[:, :CONTEXT]) for family in FAMILIES}
    return found.__getitem__


def by_transformers(checkpoint: Checkpoint, tokens: Tokens) -> Numbers:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: Numbers = model(torch.from_numpy(tokens)).logits.numpy()
    return logits


def decoded(session: Session, tokens: Tokens, prompt: int = PROMPT) -> Numbers:
    """Prefill and then one token per call: logits from the prompt's last position on."""
    steps = [session.prefill(tokens[:, :prompt])]
    steps += [session.decode(tokens[:, position]) for position in range(prompt, tokens.shape[1])]
    return np.stack(steps, axis=1)


def correlation(found: Numbers, expected: Numbers) -> float:
    return float(np.corrcoef(found.ravel(), expected.ravel())[0, 1])


def assert_alike(found: Numbers, expected: Numbers, candidate: Candidate) -> None:
    """Equal for fp32. For the others as near as rounding that may depend on the batch and the length
    allows: one activation scale per call (dynamic int8) reaches 0.993 here, wrong positions or a cache
    that is not read fall below 0.9."""
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    if candidate.precision == "fp32":
        np.testing.assert_allclose(found, expected, atol=1e-3)
        return
    assert correlation(found, expected) > 0.99
    assert np.mean(found.argmax(-1) == expected.argmax(-1)) >= 0.75


def assert_true(found: Numbers, expected: Numbers, candidate: Candidate) -> None:
    """Equal to torch in fp32, as near it as the precision allows otherwise."""
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    if candidate.precision == "fp32":
        np.testing.assert_allclose(found, expected, atol=1e-3)
    assert correlation(found, expected) > LEAST_CORRELATION[candidate.precision]


# ── every candidate ──────────────────────────────────────────────────────────────────────────────


@FOR_EVERY_FAMILY
def test_full_logits_are_the_models(session: Session, served: Served, truth: Truth) -> None:
    """Every position, ``float32[batch, sequence, vocab]``."""
    assert_true(session.full_logits(TOKENS), truth(served.family), served.candidate)


@FOR_EVERY_FAMILY
def test_prefill_and_decode_are_the_models(session: Session, served: Served, truth: Truth) -> None:
    """What a server would answer, from the prompt's last position on, against the model without a cache."""
    assert_true(decoded(session, TOKENS), truth(served.family)[:, PROMPT - 1 :], served.candidate)


def test_prefill_gives_the_last_position(session: Session, served: Served) -> None:
    """``float32[batch, vocab]``, the same as the last of `full_logits` on the same prompt."""
    everything = session.full_logits(TOKENS[:, :PROMPT])
    assert_alike(session.prefill(TOKENS[:, :PROMPT]), everything[:, -1], served.candidate)


@FOR_EVERY_FAMILY
def test_decoding_with_the_cache_equals_reading_at_once(session: Session, served: Served) -> None:
    """Tokens one by one give what the whole sequence gives without a cache."""
    at_once = session.full_logits(TOKENS)
    assert_alike(decoded(session, TOKENS), at_once[:, PROMPT - 1 :], served.candidate)


@FOR_EVERY_FAMILY
def test_a_batch_equals_its_rows(session: Session, served: Served) -> None:
    """Rows do not see each other, neither in prefill nor in decode."""
    together = decoded(session, TOKENS)
    apart = np.concatenate([decoded(session, TOKENS[row : row + 1]) for row in range(ROWS)])
    assert_alike(together, apart, served.candidate)


def test_a_row_does_not_depend_on_its_neighbour(session: Session, served: Served) -> None:
    """The same row beside two others."""
    beside_one, beside_another = (
        decoded(session, np.stack([TOKENS[0], neighbour]))[:1] for neighbour in (TOKENS[1], OTHER[1])
    )
    assert_alike(beside_one, beside_another, served.candidate)


def test_prefill_empties_the_cache(session: Session, served: Served) -> None:
    """After another, longer conversation a prompt gives to the bit what it gives on a fresh session."""
    with served.opened() as fresh:
        expected = decoded(fresh, TOKENS[:, :12], prompt=8)
    decoded(session, OTHER)
    np.testing.assert_array_equal(decoded(session, TOKENS[:, :12], prompt=8), expected)


def test_full_logits_leave_no_trace(session: Session) -> None:
    """Scoring between two requests does not change the second."""
    expected = decoded(session, TOKENS)
    session.full_logits(OTHER)
    np.testing.assert_array_equal(decoded(session, TOKENS), expected)


def test_logits_stay_what_they_were(session: Session) -> None:
    """What was returned is the caller's: the next call does not write into it."""
    first = session.prefill(TOKENS[:, :PROMPT])
    copy = first.copy()
    session.decode(TOKENS[:, PROMPT])
    np.testing.assert_array_equal(first, copy)


def test_the_same_prompt_gives_the_same_answer(served: Served) -> None:
    """To the bit, with threads that share the work too: a figure can be checked by running it again."""
    with served.opened(threads=2) as session:
        np.testing.assert_array_equal(decoded(session, TOKENS), decoded(session, TOKENS))


def test_greedy_tokens_fill_the_cache(session: Session) -> None:
    """As many as asked for, up to the cache's last place; each the likeliest after those before it."""
    count = LENGTH - PROMPT + 1  # the last one is not read again
    tokens = continue_greedily(session, TOKENS[:, :PROMPT], count)
    assert tokens.shape == (ROWS, count)
    again = decoded(session, np.concatenate([TOKENS[:, :PROMPT], tokens[:, :-1]], axis=1))
    np.testing.assert_array_equal(tokens, again.argmax(axis=-1))


@pytest.fixture
def verifier(session: Session, served: Served) -> Verifier:
    if not isinstance(session, Verifier):
        pytest.skip(f"sessions of {served.candidate.engine} verify no drafts")
    return session


def test_drafts_are_offered_where_sessions_verify_them(session: Session, served: Served) -> None:
    """And nowhere else: a knob that the session cannot heed would be a candidate that fails."""
    spec = OptimizeSpec(model_path="tiny")
    engine, candidate = engines.get(served.candidate.engine), served.candidate
    offered = {dimension.knob for dimension in engine.dimensions(candidate, demo_analysis(), spec)}
    assert (DRAFT_TOKENS in offered) == isinstance(session, Verifier)


def test_several_tokens_at_once_equal_one_by_one(verifier: Verifier, served: Served, truth: Truth) -> None:
    """``float32[batch, n, vocab]`` after a prompt, in calls of any length."""
    expected = truth(served.family)[:1, PROMPT:]
    for sizes in ((LENGTH - PROMPT,), (2, 7, 1, 6)):
        verifier.prefill(ONE[:, :PROMPT])
        parts = [verifier.extend(part) for part in np.split(ONE[:, PROMPT:], np.cumsum(sizes[:-1]), axis=1)]
        assert [part.shape for part in parts] == [(1, n, VOCAB_SIZE) for n in sizes]
        assert_true(np.concatenate(parts, axis=1), expected, served.candidate)


def test_what_is_rewound_never_was(verifier: Verifier) -> None:
    """After wrong tokens were forgotten the right ones give the same bits; more than was read is refused."""
    verifier.prefill(ONE[:, :PROMPT])
    expected = [verifier.extend(ONE[:, PROMPT : PROMPT + 4]), verifier.decode(ONE[:, PROMPT + 4])]
    verifier.prefill(ONE[:, :PROMPT])
    verifier.extend(OTHER[:1, PROMPT : PROMPT + 6])
    verifier.rewind(6)
    verifier.rewind(0)
    found = [verifier.extend(ONE[:, PROMPT : PROMPT + 4]), verifier.decode(ONE[:, PROMPT + 4])]
    for before, after in zip(expected, found, strict=True):
        np.testing.assert_array_equal(before, after)
    with pytest.raises(ValueError, match=str(PROMPT + 6)):
        verifier.rewind(PROMPT + 6)


def test_too_many_tokens_at_once_are_a_value_error(verifier: Verifier) -> None:
    """As one too many is, and the cache is as it was."""
    verifier.prefill(ONE[:, :PROMPT])
    expected = verifier.extend(ONE[:, PROMPT:])
    verifier.prefill(ONE[:, :PROMPT])
    with pytest.raises(ValueError, match=str(LENGTH)):
        verifier.extend(OTHER[:1, : LENGTH - PROMPT + 1])
    np.testing.assert_array_equal(verifier.extend(ONE[:, PROMPT:]), expected)


@pytest.mark.usefixtures("verifier")
def test_no_token_depends_on_the_drafts(served: Served) -> None:
    """A prompt that says everything twice, to its last place in the cache: however much is guessed, the
    tokens are the same, since no call reads one row only; in fp32 they are those without drafts."""
    prompt = np.tile(ONE[:, :8], 4)
    with served.opened(batch_size=1, max_tokens=prompt.shape[1] + 24) as alone:
        answers = {
            drafts: np.concatenate([step.tokens for step in greedy(alone, prompt, 24, drafts)], axis=1)
            for drafts in (0, 1, 3, 7)
        }
    np.testing.assert_array_equal(answers[3], answers[1])
    np.testing.assert_array_equal(answers[7], answers[1])
    if served.candidate.precision == "fp32":
        np.testing.assert_array_equal(answers[1], answers[0])


# ── slots ────────────────────────────────────────────────────────────────────────────────────────

SLOTS = 4
LENGTHS = (5, 17, 32, 9)
"""Of the prompts in the slots; each takes its tokens from a row of ``TEXTS``."""
TEXTS: Tokens = np.random.default_rng(4).integers(4, VOCAB_SIZE, (SLOTS, LENGTH))


@pytest.fixture(scope="module")
def slotted(served: Served) -> Iterator[Slotted]:
    with served.opened(batch_size=SLOTS) as session:
        if not isinstance(session, Slotted):
            pytest.skip(f"sessions of {served.candidate.engine} have no slots")
        session.prefill(TEXTS[:, :LENGTH])  # what was there before must not show
        yield session


def fill(session: Slotted) -> Numbers:
    """Every slot emptied and given its prompt; the logits of each one's end, ``float32[slots, vocab]``."""
    for slot in range(SLOTS):
        session.truncate(slot, 0)
    return np.concatenate([session.append(slot, TEXTS[slot, :n]) for slot, n in enumerate(LENGTHS)])


def alone(session: Slotted, slot: int, start: int, count: int) -> Numbers:
    """What the same kernels say of a slot's text when nobody else is there, token by token."""
    text = TEXTS[slot : slot + 1]
    return decoded(session, text[:, : start + count - 1], prompt=start)[0]


def test_slots_of_different_lengths_do_not_see_each_other(
    slotted: Slotted, served: Served, checkpoints: dict[str, Checkpoint]
) -> None:
    """Prompts of different lengths, then tokens for all of them at once: each slot answers its own text."""
    expected = by_transformers(checkpoints[served.family], TEXTS)
    found = [fill(slotted)]
    for step in range(6):
        tokens = np.array([TEXTS[slot, n + step] for slot, n in enumerate(LENGTHS)])
        found.append(slotted.advance(range(SLOTS), tokens))
    for slot, start in enumerate(LENGTHS):
        answers = np.stack(found)[:, slot]
        assert_true(answers, expected[slot, start - 1 : start + 6], served.candidate)
        assert_alike(answers, alone(slotted, slot, start, 7), served.candidate)


def test_slots_join_and_leave(slotted: Slotted, served: Served) -> None:
    """Some advance, in any order, while others wait, begin anew or read a prompt: nobody loses his place."""
    fill(slotted)
    places = list(LENGTHS)

    def advance(*slots: int) -> Numbers:
        logits = slotted.advance(slots, np.array([TEXTS[slot, places[slot]] for slot in slots]))
        for slot in slots:
            places[slot] += 1
        return logits

    advance(3, 0)  # 1 and 2 wait in between
    slotted.truncate(1, 0)
    advance(0, 2)
    slotted.append(1, TEXTS[1, :4])
    places[1] = 4
    found = advance(2, 1, 0, 3)
    expected = np.stack([alone(slotted, slot, places[slot], 1)[0] for slot in (2, 1, 0, 3)])
    assert_alike(found, expected, served.candidate)


def test_a_prompt_can_be_read_in_pieces(slotted: Slotted, served: Served) -> None:
    """Between which other slots advance; and what is cut off can be said otherwise."""
    fill(slotted)
    slotted.truncate(2, 0)
    slotted.append(2, TEXTS[2, :10])
    slotted.advance([0, 1], TEXTS[:2, 40])
    slotted.append(2, TEXTS[3, 10:30])
    slotted.truncate(2, 10)
    found = slotted.append(2, TEXTS[2, 10:32])
    assert_alike(found, alone(slotted, 2, 32, 1), served.candidate)


def test_drafts_can_be_verified_in_a_slot(slotted: Slotted, served: Served) -> None:
    """Every position's logits, in the middle of the cache, and the others have not noticed."""
    fill(slotted)
    found = slotted.append(1, TEXTS[1, 17:23], every=True)
    assert found.shape == (6, VOCAB_SIZE)
    slotted.truncate(1, 20)
    last = slotted.advance([0, 1], np.array([TEXTS[0, 5], TEXTS[1, 20]]))
    expected = alone(slotted, 1, 18, 6)
    assert_alike(found, expected, served.candidate)
    assert correlation(last[1], expected[3]) > 0.9  # a single position: its likeliest may differ by rounding


def test_a_full_slot_is_a_value_error(slotted: Slotted, served: Served) -> None:
    """It waits where it is, whatever the others do, and can be shortened; so much is left of every slot."""
    fill(slotted)
    slotted.append(1, TEXTS[1, LENGTHS[1] :])
    with pytest.raises(ValueError, match=str(LENGTH)):
        slotted.advance([0, 1], TEXTS[:2, 0])
    with pytest.raises(ValueError, match=str(LENGTH)):
        slotted.append(1, TEXTS[1, :1])
    with pytest.raises(ValueError, match=r"holds 5 tokens, not 6"):
        slotted.truncate(0, 6)
    found = slotted.advance([0, 2], np.array([TEXTS[0, 5], TEXTS[2, 32]]))  # 1 is full and in between
    slotted.truncate(1, LENGTH - 1)
    last = slotted.append(1, TEXTS[1, LENGTH - 1 :])
    expected = [alone(slotted, slot, n, 1)[0] for slot, n in ((0, 6), (2, 33), (1, LENGTH))]
    assert_alike(np.concatenate([found, last]), np.stack(expected), served.candidate)


def test_a_full_cache_is_a_value_error(served: Served) -> None:
    """Never a wrong answer: the last token that fits is decoded, the next is refused, as is a long prompt.
    The session answers the next prompt as if nothing had been."""
    with served.opened(max_tokens=PROMPT + 1) as session:
        expected = decoded(session, TOKENS[:, : PROMPT + 1])
        for call in (
            lambda: session.decode(TOKENS[:, PROMPT + 1]),
            lambda: session.prefill(TOKENS[:, : PROMPT + 2]),
            lambda: session.full_logits(TOKENS[:, : PROMPT + 2]),
        ):
            with pytest.raises(ValueError, match=str(PROMPT + 1)):
                call()
        np.testing.assert_array_equal(decoded(session, TOKENS[:, : PROMPT + 1]), expected)


def test_the_whole_context_can_be_read(served: Served, long_truth: Truth) -> None:
    """The model's last position, by prefill and by decode, and exactly one token more is refused."""
    expected = long_truth(served.family)[:, -2:]
    with served.opened(batch_size=1, max_tokens=CONTEXT) as session:
        found = decoded(session, LONG[:, :CONTEXT], prompt=CONTEXT - 1)
        assert_true(found, expected, served.candidate)
        with pytest.raises(ValueError, match=str(CONTEXT)):
            session.decode(LONG[:, CONTEXT])
        assert_true(session.prefill(LONG[:, :CONTEXT]), expected[:, -1], served.candidate)
        with pytest.raises(ValueError, match=str(CONTEXT)):
            session.prefill(LONG)


def test_too_large_a_batch_is_a_value_error(served: Served) -> None:
    """A session has room for the rows it was opened for, and for fewer."""
    with served.opened(batch_size=1) as session:
        with pytest.raises(ValueError, match="batch"):
            session.prefill(TOKENS[:, :PROMPT])
        assert session.prefill(TOKENS[:1, :PROMPT]).shape == (1, VOCAB_SIZE)


def test_threads_are_the_hosts_or_the_candidates(served: Served) -> None:
    """A number in the knob ``threads`` overrides what the session is offered."""
    if "threads" in {dimension.knob for dimension in dimensions(served.candidate)}:
        alone = replace(served, candidate=variant(served.candidate, threads=1))
        with alone.opened(threads=2) as session:
            assert session.facts()["threads"] == "1"


def test_facts_say_what_runs(served: Served) -> None:
    """Text by name, the threads among it: it is kept with the trial as it is."""
    with served.opened(threads=2) as session:
        session.prefill(TOKENS[:, :PROMPT])
        facts = session.facts()
    assert facts["threads"] == "2"
    assert all(isinstance(name, str) and isinstance(fact, str) for name, fact in facts.items())


@pytest.fixture(scope="module")
def overflowing_glm(tiny_glm: Path, home: Path) -> Checkpoint:
    """A checkpoint of finite weights whose logits are not: the last norm multiplies beyond fp32's range."""
    path = Path(shutil.copytree(tiny_glm, home / "overflowing"))
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"][:] = np.finfo(np.float32).max
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return load_checkpoint(str(path))


@pytest.mark.parametrize("candidate", OTHERS, ids=lambda candidate: candidate.id)
def test_what_is_not_finite_is_not_hidden(
    candidate: Candidate, overflowing_glm: Checkpoint, serve: Serve
) -> None:
    """No engine clips or skips its way to plausible numbers: both paths give what the guard finds."""
    with serve(candidate, overflowing_glm).opened() as session:
        for logits in (session.prefill(TOKENS[:, :PROMPT]), session.decode(TOKENS[:, PROMPT])):
            with pytest.raises(NonFiniteError, match="NaN or infinite"):
                require_finite(logits)


# ── the search space ─────────────────────────────────────────────────────────────────────────────

PROPOSALS = pytest.mark.parametrize("candidate", proposals(), ids=lambda candidate: candidate.id)


@PROPOSALS
def test_a_dimension_is_a_choice_around_the_candidate(candidate: Candidate) -> None:
    """At least two values, all different, the candidate's own among them, and a word on what they trade."""
    found = dimensions(candidate)
    assert len({dimension.knob for dimension in found}) == len(found)
    for dimension in found:
        assert candidate.knobs[dimension.knob] in dimension.values
        assert len(set(dimension.values)) == len(dimension.values) > 1
        assert dimension.because


@PROPOSALS
def test_an_id_is_one_configuration(candidate: Candidate) -> None:
    """Every combination of values has its own id, and its own knobs under it."""
    found = dimensions(candidate)
    combinations = [
        dict(zip([d.knob for d in found], values, strict=True))
        for values in product(*(d.values for d in found))
    ]
    variants = [variant(candidate, **knobs) for knobs in combinations]
    assert len({v.id for v in variants}) == len(variants)
    assert [v.knobs for v in variants] == [{**candidate.knobs, **knobs} for knobs in combinations]


@PROPOSALS
def test_a_variant_is_the_same_however_it_is_reached(candidate: Candidate) -> None:
    """Knob by knob, in any order, or all at once; and turning all back gives the candidate again."""
    knobs = {d.knob: next(v for v in d.values if v != candidate.knobs[d.knob]) for d in dimensions(candidate)}
    at_once = variant(candidate, **knobs)
    for order in (list(knobs), list(knobs)[::-1]):
        step = candidate
        for knob in order:
            step = variant(step, **{knob: knobs[knob]})
        assert configuration(step) == configuration(at_once)
    assert configuration(variant(at_once, **candidate.knobs)) == configuration(candidate)


def configuration(candidate: Candidate) -> dict[str, object]:
    """All but the story of how it came to be proposed and the part it plays."""
    return candidate.model_dump(exclude={"proposed_because", "reference", "baseline", "incumbent"})


@PROPOSALS
def test_a_variant_starts_with_a_clean_slate(candidate: Candidate) -> None:
    """It is no yardstick and not vetoed, whatever it was made of, and says what was turned."""
    flags = {"reference": True, "baseline": True, "incumbent": True, "vetoed_because": "no room"}
    marked = candidate.model_copy(update=flags)
    for start in (marked, *turned(candidate)):
        assert variant(start).model_dump(include=set(flags)) == {
            "reference": False,
            "baseline": False,
            "incumbent": False,
            "vetoed_because": None,
        }
    for found in turned(candidate):
        assert found.proposed_because.startswith(f"{candidate.id} with ")
        assert " instead of " in found.proposed_because


@PROPOSALS
def test_a_knob_that_is_not_there_is_a_key_error(candidate: Candidate) -> None:
    """A misspelt knob is not carried along in silence."""
    with pytest.raises(KeyError, match="blok_size"):
        variant(candidate, blok_size=16)


def test_what_leaves_the_files_alone_leaves_the_answers_alone(session: Session, served: Served) -> None:
    """A knob outside the recipe is for the session only: the same files give the same logits."""
    engine, expected = engines.get(served.candidate.engine), decoded(session, TOKENS)
    recipe = engine.recipe(served.candidate)
    for candidate in turned(served.candidate):
        if engine.recipe(candidate) == recipe:
            with replace(served, candidate=candidate).opened() as other:
                assert_alike(decoded(other, TOKENS), expected, served.candidate)


REWRITTEN = [
    changed
    for candidate in OTHERS
    for changed in turned(candidate)
    if engines.get(candidate.engine).recipe(changed) != engines.get(candidate.engine).recipe(candidate)
]


@pytest.mark.parametrize("candidate", REWRITTEN, ids=lambda candidate: candidate.id)
def test_what_changes_the_files_can_be_exported(
    candidate: Candidate, checkpoints: dict[str, Checkpoint], serve: Serve, truth: Truth
) -> None:
    """Every value of a knob that the recipe knows gives a model that answers like torch."""
    with serve(candidate, checkpoints["glm"]).opened() as session:
        found = session.full_logits(TOKENS)
    assert correlation(found, truth("glm")) > LEAST_CORRELATION[candidate.precision]


# ── the compiled baseline ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("candidate", COMPILED, ids=lambda candidate: candidate.id)
def test_compiling_changes_no_answer(
    candidate: Candidate,
    checkpoints: dict[str, Checkpoint],
    serve: Serve,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prefill, decode and a second prompt equal the same model uncompiled; one shape each, as compiling
    takes seconds per shape."""
    monkeypatch.setitem(os.environ, "TORCHINDUCTOR_CACHE_DIR", str(home / "inductor"))
    compiled = serve(candidate, checkpoints["glm"])
    eager = serve(
        candidate.model_copy(update={"knobs": {**candidate.knobs, "compile": False}}), checkpoints["glm"]
    )
    with compiled.opened(batch_size=1) as quick, eager.opened(batch_size=1) as slow:
        for tokens in (TOKENS[:1, :36], OTHER[:1, :36]):
            assert_alike(decoded(quick, tokens), decoded(slow, tokens), candidate)
        assert_alike(quick.full_logits(TOKENS[:1, :PROMPT]), slow.full_logits(TOKENS[:1, :PROMPT]), candidate)
        with pytest.raises(ValueError, match="batch"):
            quick.prefill(TOKENS[:, :PROMPT])
