"""Text comes out as soon as it is certain: whole characters, and nothing of a stop string."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import build_tokenizer

from open_autoglm.serving.text import TextStream

TOKENIZER: Any = build_tokenizer()


def stream(text: str, *stop: str) -> tuple[list[str], TextStream]:
    """``text`` token by token, and then the end."""
    prompt = TOKENIZER("Say: ")["input_ids"]
    found = TextStream(TOKENIZER.backend_tokenizer, prompt, stop)
    parts = [found.push(token) for token in TOKENIZER(text)["input_ids"]]
    return [*parts, found.end()], found


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S", "Zs"]), max_size=40))
def test_the_pieces_are_the_text(text: str) -> None:
    """Characters of several tokens come in one piece."""
    parts, _ = stream(text)
    assert "".join(parts) == text
    assert all("\ufffd" not in part for part in parts if "\ufffd" not in text)


ANY_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=12)


@settings(max_examples=100, deadline=None)
@given(text=ANY_TEXT, cut=st.integers(0))
def test_nothing_of_the_prompt_comes_out(text: str, cut: int) -> None:
    """Also where it ends within a character: then the first token may complete that."""
    tokens = TOKENIZER(text)["input_ids"]
    prompt, answer = tokens[: cut % (len(tokens) + 1)], tokens[cut % (len(tokens) + 1) :]
    found = TextStream(TOKENIZER.backend_tokenizer, prompt, [])
    said = "".join([*(found.push(token) for token in answer), found.end()])
    before = TOKENIZER.decode(prompt).rstrip("\ufffd")
    assert said == text[len(before) :] or not answer


@settings(max_examples=200, deadline=None)
@given(text=st.text("ab", max_size=30), stop=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_nothing_of_a_stop_string_comes_out(text: str, stop: list[str]) -> None:
    """The text ends before the stop string that begins first, of those whose end has been reached."""
    parts, found = stream(text, *stop)
    said = "".join(parts)
    ends = [(text.find(word) + len(word), text.find(word)) for word in stop if word in text]
    assert found.stopped == bool(ends)
    if not ends:
        assert said == text
    else:
        assert text.startswith(said)
        assert not any(word in said for word in stop)
        assert len(said) >= min(place for _, place in ends)


def test_what_may_become_a_stop_string_waits() -> None:
    """And comes out when it does not."""
    found = TextStream(TOKENIZER.backend_tokenizer, [5], ["zz!"])
    parts = [found.push(token) for letter in "azzb" for token in TOKENIZER(letter)["input_ids"]]
    assert parts == ["a", "", "", "zzb"]


def test_half_a_character_at_the_end_is_shown_as_what_it_is() -> None:
    """As a decoder of the whole answer shows it."""
    found = TextStream(TOKENIZER.backend_tokenizer, [5], [])
    half = TOKENIZER("\u65e5")["input_ids"][:-1]
    assert [found.push(token) for token in half] == [""] * len(half)
    assert found.end() == "\ufffd"


def test_special_tokens_are_no_text() -> None:
    found = TextStream(TOKENIZER.backend_tokenizer, [5], [])
    assert found.push(TOKENIZER.eos_token_id) == ""
    assert found.end() == ""


@pytest.mark.parametrize("word", ["", "\n"])
def test_an_empty_stop_string_stops_nothing(word: str) -> None:
    parts, found = stream("one", word)
    assert ("".join(parts), found.stopped) == ("one", False)
