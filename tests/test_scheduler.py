"""Requests join and leave between any two tokens, nobody is starved, and nobody gets another's text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from open_autoglm.engines.contract import Logits, Tokens
from open_autoglm.serving.messages import Generation, Token
from open_autoglm.serving.scheduler import Scheduler

VOCAB = 50
LAST = VOCAB - 1


def following(text: Sequence[int]) -> int:
    """The model's one rule: what comes next depends on everything before it."""
    return (3 * sum(text) + len(text)) % (VOCAB - 1)


class RuledSlots:
    """Slots that answer by `following`, and check that they are used as the contract allows."""

    def __init__(self, slots: int, room: int = 200) -> None:
        self.texts: list[list[int]] = [[] for _ in range(slots)]
        self.room = room
        self.calls: list[tuple[str, int]] = []

    def _answer(self, slot: int) -> Logits:
        assert len(self.texts[slot]) <= self.room
        logits = np.zeros(VOCAB, dtype=np.float32)
        logits[following(self.texts[slot])] = 1
        return logits

    def append(self, slot: int, tokens: Tokens, *, every: bool = False) -> Logits:
        assert tokens.dtype == np.int64
        assert len(tokens) > 0
        self.calls.append(("verify" if every else "append", len(tokens)))
        found = []
        for token in tokens.tolist():
            self.texts[slot].append(token)
            found.append(self._answer(slot))
        return np.stack(found if every else found[-1:])

    def advance(self, slots: Sequence[int], tokens: Tokens) -> Logits:
        assert len(set(slots)) == len(slots) == len(tokens)
        for slot, token in zip(slots, tokens.tolist(), strict=True):
            self.texts[slot].append(token)
        self.calls.append(("advance", len(slots)))
        return np.stack([self._answer(slot) for slot in slots])

    def truncate(self, slot: int, length: int) -> None:
        assert length <= len(self.texts[slot])
        del self.texts[slot][length:]


def expected(generation: Generation) -> list[int]:
    """What the rule says, by itself."""
    text = list(generation.prompt)
    answer: list[int] = []
    while len(answer) < generation.max_tokens:
        token = following([*text, *answer])
        if token in generation.stop_tokens:
            break
        answer.append(token)
    return answer


def run(scheduler: Scheduler, most: int = 10_000) -> list[Token]:
    """Step until there is nothing to do."""
    found: list[Token] = []
    for _ in range(most):
        if not scheduler.busy:
            return found
        found += scheduler.step()
    raise AssertionError("it never ends")


def answers(tokens: Sequence[Token]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for token in tokens:
        found.setdefault(token.id, [])
        if token.token is not None:
            found[token.id].append(token.token)
    return found


def generation(name: str, prompt: Sequence[int], count: int = 8, **changes: object) -> Generation:
    return Generation.model_validate({"id": name, "prompt": tuple(prompt), "max_tokens": count, **changes})


GENERATIONS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 3), min_size=1, max_size=30),  # few values, so that prompts share beginnings
        st.integers(1, 12),
        st.sets(st.integers(0, VOCAB - 2), max_size=5),
        st.integers(0, 20),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=200, deadline=None)
@given(
    asked=GENERATIONS,
    slots=st.integers(1, 4),
    chunk=st.none() | st.integers(1, 9),
    reuse=st.booleans(),
    drafts=st.sampled_from([0, 1, 7]),
)
def test_everyone_gets_what_the_model_says(
    asked: list[tuple[list[int], int, set[int], int]],
    slots: int,
    chunk: int | None,
    reuse: bool,
    drafts: int,
) -> None:
    """Whatever else is served, in whichever pieces and slots: each answer is the model's own, to its end."""
    session = RuledSlots(slots)
    scheduler = Scheduler(session, slots, chunk, reuse_prefixes=reuse, draft_tokens=drafts)
    wanted, found = {}, []
    for number, (prompt, count, stops, pause) in enumerate(asked):
        one = generation(str(number), prompt, count, stop_tokens=tuple(stops))
        wanted[one.id] = expected(one)
        scheduler.add(one)
        for _ in range(pause):
            found += scheduler.step()
    found += run(scheduler)
    assert answers(found) == wanted
    ends = [token for token in found if token.finish is not None]
    assert sorted(token.id for token in ends) == sorted(wanted)
    assert scheduler.load.running == scheduler.load.waiting == 0


def test_a_long_prompt_does_not_stall_the_others() -> None:
    """Between two of its pieces everyone under way gets a token."""
    session = RuledSlots(2)
    scheduler = Scheduler(session, 2, chunk_tokens=10)
    scheduler.add(generation("short", [1], 100))
    scheduler.step()
    scheduler.add(generation("long", range(45), 2))
    session.calls.clear()
    for _ in range(10):
        scheduler.step()
    assert session.calls[:8] == [("advance", 1), ("append", 10)] * 4
    assert session.calls[8:] == [("advance", 1), ("append", 5)]


def test_a_prompt_is_read_at_once_when_nobody_waits() -> None:
    """Pieces cost time, and here they would help nobody."""
    session = RuledSlots(2)
    scheduler = Scheduler(session, 2, chunk_tokens=10)
    scheduler.add(generation("alone", range(45), 1))
    assert [token.token for token in scheduler.step()] == [following(range(45))]


def test_short_prompts_are_read_first_and_long_ones_are_not_forgotten() -> None:
    """A long prompt waits for as many tokens of others as it has itself, and no more."""
    session = RuledSlots(3, room=2000)
    scheduler = Scheduler(session, 3, chunk_tokens=10, reuse_prefixes=False)
    scheduler.add(generation("long", [1] * 100, 1))
    order: list[str] = []
    for number in range(60):
        scheduler.add(generation(f"short{number}", [2] * 10, 1))
        scheduler.add(generation(f"other{number}", [3] * 10, 1))
        order += [token.id for token in scheduler.step()]
    order += [token.id for token in run(scheduler)]
    assert order[0] == "short0"
    assert 5 <= order.index("long") <= 25


def test_a_prompt_that_was_read_is_not_read_again() -> None:
    """The slot whose text begins alike is taken, and the last token is always read: its logits are wanted."""
    session = RuledSlots(2)
    scheduler = Scheduler(session, 2, chunk_tokens=None)
    one, other = list(range(20)), [9] * 20
    scheduler.add(generation("one", one, 3))
    scheduler.add(generation("other", other, 3))
    run(scheduler)
    session.calls.clear()
    scheduler.add(generation("again", [*other[:15], 1, 2], 3))
    scheduler.add(generation("same", one, 3))
    found = run(scheduler)
    assert [size for kind, size in session.calls if kind == "append"] == [1, 2]
    assert {token.id: token.cached_tokens for token in found if token.cached_tokens} == {
        "again": 15,
        "same": 19,
    }


def test_conversations_that_begin_alike_keep_their_slots() -> None:
    """As all of one template do: a few equal tokens are not worth a long text, while other slots are empty.
    When none is, the shortest text goes."""
    session = RuledSlots(2)
    scheduler = Scheduler(session, 2, chunk_tokens=None)
    one, other = [1, 2, 3, *[5] * 50], [1, 2, 3, *[6] * 30]
    for name, prompt in (("one", one), ("other", other)):
        scheduler.add(generation(name, prompt, 2))
        run(scheduler)
    for name, prompt, cached in (("one", one, 52), ("other", other, 32)):
        scheduler.add(generation(name, [*prompt, 7], 2))
        assert max(token.cached_tokens for token in run(scheduler)) >= cached
    scheduler.add(generation("third", [1, 2, 3, 8, 8], 2))
    run(scheduler)
    scheduler.add(generation("one", [*one, 7], 2))
    assert max(token.cached_tokens for token in run(scheduler)) >= 52


class CyclingSlots(RuledSlots):
    """Says 0, 1, 2, 3, 0, 1, …: drafts are right once the cycle has been seen."""

    def _answer(self, slot: int) -> Logits:
        logits = np.zeros(VOCAB, dtype=np.float32)
        logits[(self.texts[slot][-1] + 1) % 4] = 1
        return logits


def test_drafts_save_calls_while_one_greedy_request_is_answered() -> None:
    """With two of them a call reads a row of each; what is sampled is not drafted."""
    session = CyclingSlots(2)
    scheduler = Scheduler(session, 2, None, draft_tokens=7)
    scheduler.add(generation("one", [0, 1, 2, 3, 0, 1], 60))
    found = run(scheduler)
    assert [token.token for token in found] == [(2 + place) % 4 for place in range(60)]
    assert len(session.calls) < 15
    session.calls.clear()
    scheduler.add(generation("one", [0, 1, 2], 20))
    scheduler.add(generation("two", [1, 2, 3], 20))
    run(scheduler)
    assert session.calls.count(("advance", 2)) >= 15
    assert sum(kind == "verify" for kind, _ in session.calls) <= 2  # the last token of who began later
    session.calls.clear()
    scheduler.add(generation("hot", [0, 1, 2], 20, sampling={"temperature": 0.01}))
    run(scheduler)
    assert "verify" not in {kind for kind, _ in session.calls}


def test_nothing_is_kept_if_that_is_asked_for() -> None:
    """For those who must not learn from times what others asked."""
    session = RuledSlots(1)
    scheduler = Scheduler(session, 1, None, reuse_prefixes=False)
    for name in ("one", "two"):
        scheduler.add(generation(name, range(20), 3))
        assert all(token.cached_tokens == 0 for token in run(scheduler))
    assert scheduler.load.cached_tokens == 0


def test_a_fresh_request_reads_all_of_its_prompt() -> None:
    """What is in the cache favours nobody who is timed, and the slot that holds most is left to others."""
    session = RuledSlots(2)
    scheduler = Scheduler(session, 2, chunk_tokens=None)
    prompt = list(range(20))
    scheduler.add(generation("one", prompt, 3))
    run(scheduler)
    session.calls.clear()
    scheduler.add(generation("again", prompt, 3, fresh=True))
    assert all(token.cached_tokens == 0 for token in run(scheduler))
    assert session.calls[0] == ("append", 20)
    assert [len(text) for text in session.texts] == [22, 22]


class BrokenSlots(RuledSlots):
    """Computes NaN for every text that holds a certain token."""

    BAD = 7

    def _answer(self, slot: int) -> Logits:
        logits = super()._answer(slot)
        if self.BAD in self.texts[slot]:
            logits[3] = np.nan
        return logits


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}, {"logprobs": 2}], ids=str)
@pytest.mark.parametrize("drafts", [0, 3])
def test_what_is_not_finite_is_no_token(sampling: dict[str, float], drafts: int) -> None:
    """NaN wins every argmax: it would be answered as if it were text. Nothing of its cache is used again,
    and the others are answered."""
    session = BrokenSlots(2)
    scheduler = Scheduler(session, 2, None, draft_tokens=drafts)
    scheduler.add(generation("bad", [1, 2, BrokenSlots.BAD], 8, sampling=sampling))
    scheduler.add(generation("good", [1, 2], 1))
    found = run(scheduler)
    bad = [token for token in found if token.id == "bad"]
    assert [(token.token, token.not_finite, token.finish) for token in bad] == [(None, True, None)]
    assert answers(found)["good"] == expected(generation("good", [1, 2], 1))
    assert scheduler.load.running == 0
    assert scheduler.load.cached_tokens == 2


def test_an_answer_may_break_in_its_middle() -> None:
    """Its tokens so far were right; then it ends, with drafts as without."""
    for drafts in (0, 3):
        start = next(n for n in range(VOCAB) if BrokenSlots.BAD in expected(generation("", [n], 9))[1:-2])
        answer = expected(generation("", [start], 9))
        scheduler = Scheduler(BrokenSlots(1), 1, None, draft_tokens=drafts)
        scheduler.add(generation("one", [start], 9))
        found = run(scheduler)
        until = answer.index(BrokenSlots.BAD) + 1
        assert [token.token for token in found] == [*answer[:until], None]
        assert found[-1].not_finite


@pytest.mark.parametrize("steps", range(6))
def test_a_cancelled_request_makes_room(steps: int) -> None:
    """Waiting, reading or writing: its slot is free, and the others never notice."""
    scheduler = Scheduler(RuledSlots(1), 1, chunk_tokens=4)
    scheduler.add(generation("gone", range(10), 50))
    scheduler.add(generation("next", [5, 6], 4))
    for _ in range(steps):
        scheduler.step()
    scheduler.cancel("gone")
    scheduler.cancel("never there")
    found = run(scheduler)
    assert answers(found)["next"] == expected(generation("next", [5, 6], 4))
    assert "gone" not in answers(found)


def test_load_is_what_there_is_to_do() -> None:
    scheduler = Scheduler(RuledSlots(2), 2, None)
    for name in "abc":
        scheduler.add(generation(name, [1, 2, 3], 5))
    scheduler.step()
    assert (scheduler.load.running, scheduler.load.waiting, scheduler.load.cached_tokens) == (2, 1, 3)


def test_who_gets_a_slot_is_told_when() -> None:
    """With the first token only; by the clock, which is looked at once for each slot that is given."""
    steps = iter(range(100))
    scheduler = Scheduler(RuledSlots(1), 1, None, clock=lambda: float(next(steps)))
    scheduler.add(generation("one", [1, 2], 3))
    scheduler.add(generation("two", [1, 2], 2))
    found = run(scheduler)
    assert [(token.id, token.slot_s) for token in found] == [
        ("one", 0.0), ("one", None), ("one", None), ("two", 1.0), ("two", None),
    ]  # fmt: skip
