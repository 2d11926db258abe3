"""The engine contract, held against every engine that can run here, each with all it proposes.

A new engine, built in or third-party, is checked by being installed.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from studies import demo_analysis
from tiny_models import VOCAB_SIZE

from open_autoglm import engines
from open_autoglm.checkpoint import load_checkpoint
from open_autoglm.engines.contract import ExportContext, Session, SessionOptions, Tokens
from open_autoglm.schemas import Candidate, Checkpoint, Dimension, ExportedModel, Knob, OptimizeSpec

FAMILIES = ("glm", "llama")
ROWS, PROMPT, LENGTH = 2, 32, 48
OPTIONS = SessionOptions(batch_size=ROWS, max_tokens=LENGTH, threads=1)
TOKENS: Tokens = np.random.default_rng(1).integers(4, VOCAB_SIZE, (ROWS, LENGTH))
OTHER: Tokens = np.random.default_rng(2).integers(4, VOCAB_SIZE, (ROWS, LENGTH))

LEAST_CORRELATION = {"fp32": 0.999999, "bf16": 0.999, "fp16": 0.999, "int8": 0.98, "int4": 0.9}
"""With torch's fp32 logits. These random weights are harder to round than trained ones."""

Numbers = NDArray[np.float32]


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
def checkpoints(tiny_glm: Path, tiny_llama: Path) -> dict[str, Checkpoint]:
    return {"glm": load_checkpoint(str(tiny_glm)), "llama": load_checkpoint(str(tiny_llama))}


def serve(candidate: Candidate, checkpoint: Checkpoint, home: Path) -> Served:
    """Export as the store would, in this process: the child's start-up is not what is checked here."""
    engine, path = engines.get(candidate.engine), checkpoint.path
    if engine.recipe(candidate) is not None:
        path = home / f"{checkpoint.model_type}-{candidate.id}"
        path.mkdir()
        with contextlib.redirect_stdout(io.StringIO()):
            engine.export(candidate, checkpoint, ExportContext(output=path, ledger=home / "ledger.json"))
    exported = ExportedModel(
        candidate_id=candidate.id, path=path, digest="", route="", size_bytes=0, build_s=0
    )
    return Served(checkpoint.model_type, candidate, exported)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("contract")


@pytest.fixture(
    scope="module",
    params=[(family, candidate) for family in FAMILIES for candidate in OTHERS],
    ids=lambda param: f"{param[0]}-{param[1].id}",
)
def served(request: pytest.FixtureRequest, checkpoints: dict[str, Checkpoint], home: Path) -> Served:
    family, candidate = request.param
    return serve(candidate, checkpoints[family], home)


@pytest.fixture(scope="module")
def session(served: Served) -> Iterator[Session]:
    """One session for most tests, as a server has: none may leave a trace for the next."""
    with served.opened() as session:
        yield session


@pytest.fixture(scope="module")
def truth(checkpoints: dict[str, Checkpoint]) -> Callable[[str], Numbers]:
    """Logits of ``TOKENS`` by transformers itself, in fp32, by family."""
    import torch
    from transformers import AutoModelForCausalLM

    found = {}
    for family, checkpoint in checkpoints.items():
        model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).eval()
        with torch.no_grad():
            found[family] = model(torch.from_numpy(TOKENS)).logits.numpy()
    return found.__getitem__


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


# ── every candidate ──────────────────────────────────────────────────────────────────────────────


def test_full_logits_are_the_models(
    session: Session, served: Served, truth: Callable[[str], Numbers]
) -> None:
    """Every position, ``float32[batch, sequence, vocab]``: equal to torch in fp32, near it otherwise."""
    found, expected = session.full_logits(TOKENS), truth(served.family)
    assert found.shape == expected.shape
    if served.candidate.precision == "fp32":
        np.testing.assert_allclose(found, expected, atol=1e-3)
    assert correlation(found, expected) > LEAST_CORRELATION[served.candidate.precision]


def test_prefill_gives_the_last_position(session: Session, served: Served) -> None:
    """``float32[batch, vocab]``, the same as the last of `full_logits` on the same prompt."""
    everything = session.full_logits(TOKENS[:, :PROMPT])
    assert_alike(session.prefill(TOKENS[:, :PROMPT]), everything[:, -1], served.candidate)


def test_decoding_with_the_cache_equals_reading_at_once(session: Session, served: Served) -> None:
    """Tokens one by one give what the whole sequence gives without a cache."""
    at_once = session.full_logits(TOKENS)
    assert_alike(decoded(session, TOKENS), at_once[:, PROMPT - 1 :], served.candidate)


def test_a_batch_equals_its_rows(session: Session, served: Served) -> None:
    """Rows do not see each other, neither in prefill nor in decode."""
    together = decoded(session, TOKENS)
    apart = np.concatenate([decoded(session, TOKENS[row : row + 1]) for row in range(ROWS)])
    assert_alike(together, apart, served.candidate)


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


def test_a_full_cache_is_a_value_error(served: Served) -> None:
    """Never a wrong answer: the last token that fits is decoded, the next is refused, as is a long prompt."""
    with served.opened(max_tokens=PROMPT + 1) as session:
        session.prefill(TOKENS[:, :PROMPT])
        assert np.isfinite(session.decode(TOKENS[:, PROMPT])).all()
        with pytest.raises(ValueError, match=str(PROMPT + 1)):
            session.decode(TOKENS[:, PROMPT + 1])
        with pytest.raises(ValueError, match=str(PROMPT + 1)):
            session.prefill(TOKENS[:, : PROMPT + 2])


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
    candidate: Candidate,
    checkpoints: dict[str, Checkpoint],
    home: Path,
    truth: Callable[[str], Numbers],
) -> None:
    """Every value of a knob that the recipe knows gives a model that answers like torch."""
    with serve(candidate, checkpoints["glm"], home).opened() as session:
        found = session.full_logits(TOKENS)
    assert correlation(found, truth("glm")) > LEAST_CORRELATION[candidate.precision]


# ── the compiled baseline ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("candidate", COMPILED, ids=lambda candidate: candidate.id)
def test_compiling_changes_no_answer(
    candidate: Candidate,
    checkpoints: dict[str, Checkpoint],
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prefill, decode and a second prompt equal the same model uncompiled; one shape each, as compiling
    takes seconds per shape."""
    monkeypatch.setitem(os.environ, "TORCHINDUCTOR_CACHE_DIR", str(home / "inductor"))
    compiled = serve(candidate, checkpoints["glm"], home)
    eager = serve(
        candidate.model_copy(update={"knobs": {**candidate.knobs, "compile": False}}),
        checkpoints["glm"],
        home,
    )
    with compiled.opened(batch_size=1) as quick, eager.opened(batch_size=1) as slow:
        for tokens in (TOKENS[:1, :36], OTHER[:1, :36]):
            assert_alike(decoded(quick, tokens), decoded(slow, tokens), candidate)
        assert_alike(quick.full_logits(TOKENS[:1, :PROMPT]), slow.full_logits(TOKENS[:1, :PROMPT]), candidate)
        with pytest.raises(ValueError, match="batch"):
            quick.prefill(TOKENS[:, :PROMPT])
