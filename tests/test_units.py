"""Quantities as people write them, and figures as people read them."""

from __future__ import annotations

import contextlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from open_autoglm.units import ByteSize, Duration, LengthMix, number, percent_as_given, quantity


@pytest.mark.parametrize(
    ("text", "ms"),
    [("50ms", 50), ("0.05s", 50), ("2min", 120_000), ("250us", 0.25), (" 1.5 s ", 1500)],
)
def test_durations_are_read_in_milliseconds(text: str, ms: float) -> None:
    """Every unit of time counts in milliseconds, with or without spaces."""
    assert Duration(text).ms == pytest.approx(ms)


@pytest.mark.parametrize(
    ("text", "count"),
    [("2GiB", 2 * 2**30), ("512MB", 512_000_000), ("1.5KiB", 1536), ("100B", 100), ("1kB", 1000)],
)
def test_sizes_are_read_in_bytes(text: str, count: int) -> None:
    """Binary prefixes are powers of 1024, decimal ones powers of 1000."""
    assert ByteSize(text).bytes == count


@pytest.mark.parametrize(
    ("kind", "text", "problem"),
    [
        (Duration, "50", "has no unit"),
        (Duration, "-50ms", "greater than zero"),
        (Duration, "0s", "greater than zero"),
        (Duration, "50MB", "'MB'"),
        (Duration, "fast", "not a duration"),
        (Duration, "1e3ms", "not a duration"),
        (Duration, "nan", "not a duration"),
        (Duration, "", "not a duration"),
        (ByteSize, "2", "has no unit"),
        (ByteSize, "2gib", "'gib'"),
        (ByteSize, "-1GiB", "greater than zero"),
    ],
)
def test_what_is_no_quantity_is_refused_with_an_example(
    kind: type[Duration | ByteSize], text: str, problem: str
) -> None:
    """The sentence quotes what was written, says what is wrong and shows a right one."""
    with pytest.raises(ValueError, match="write") as caught:
        kind(text)
    assert problem in str(caught.value)
    assert repr(text) in str(caught.value)
    assert kind.example in str(caught.value)


class Limits(BaseModel):
    latency: Duration


def test_a_quantity_survives_json_as_it_was_written() -> None:
    """A model field stores the text, so that a spec replays what was asked for."""
    stored = Limits.model_validate({"latency": "0.05s"}).model_dump_json()
    assert stored == '{"latency":"0.05s"}'
    assert Limits.model_validate_json(stored).latency.ms == 50


def test_a_bare_number_is_no_duration_in_json_either() -> None:
    """50 could be seconds or milliseconds."""
    with pytest.raises(ValidationError):
        Limits.model_validate({"latency": 50})


@given(st.floats(min_value=0.001, max_value=1e6), st.sampled_from(sorted(Duration.units)))
def test_a_duration_is_its_number_times_its_unit(value: float, unit: str) -> None:
    """What is written is what counts, to the digits written."""
    assert Duration(f"{value:.6f}{unit}").ms == pytest.approx(float(f"{value:.6f}") * Duration.units[unit])


@given(st.text(max_size=12))
def test_any_text_is_a_duration_or_a_value_error(text: str) -> None:
    """Nothing a user can type raises anything else."""
    with contextlib.suppress(ValueError):
        assert Duration(text).ms > 0


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("128/32:3,512/64:1", ((128, 32, 0.75), (512, 64, 0.25))),
        (" 128/32 , 512/64:1 ", ((128, 32, 0.5), (512, 64, 0.5))),
        ("8/2:0.5,9/2:1.5", ((8, 2, 0.25), (9, 2, 0.75))),
        ("512/64", ((512, 64, 1.0),)),
    ],
)
def test_a_mix_of_lengths_is_read_as_shares(text: str, shares: tuple[tuple[int, int, float], ...]) -> None:
    """Weights may be any positive numbers, and one that is left out is 1."""
    assert LengthMix(text).shares == shares


@pytest.mark.parametrize(
    "text", ["", "128", "128/32:", "128/1", "0/32", "128/32:0", "128/32,,8/2", "128/32;8/2", "-1/2", "8/2:-1"]
)
def test_what_is_no_mix_is_refused_with_an_example(text: str) -> None:
    """A prompt needs a token, an output needs two, and a weight must count."""
    with pytest.raises(ValueError, match="like 128/32:3,512/64:1"):
        LengthMix(text)


class Lengths(BaseModel):
    mix: LengthMix


def test_a_mix_survives_json_as_it_was_written_but_for_spaces() -> None:
    """A spec replays what was asked for."""
    stored = Lengths.model_validate({"mix": "8/2:3, 9/2"}).model_dump_json()
    assert stored == '{"mix":"8/2:3,9/2"}'
    assert Lengths.model_validate_json(stored).mix == LengthMix("8/2:3,9/2")


_ENTRIES = st.tuples(st.integers(1, 4096), st.integers(2, 512), st.integers(1, 99))


@given(st.lists(_ENTRIES, min_size=1, max_size=6))
def test_shares_of_a_mix_add_up_and_keep_their_proportions(entries: list[tuple[int, int, int]]) -> None:
    """Whatever the weights, the shares are one whole."""
    shares = LengthMix(",".join(f"{p}/{o}:{w}" for p, o, w in entries)).shares
    assert [(p, o) for p, o, _ in shares] == [(p, o) for p, o, _ in entries]
    assert sum(share for *_, share in shares) == pytest.approx(1)
    assert [share * entries[0][2] for *_, share in shares] == pytest.approx(
        [shares[0][2] * weight for *_, weight in entries]
    )


@given(st.text(alphabet="0123456789/:,. ", max_size=14))
def test_any_text_is_a_mix_or_a_value_error(text: str) -> None:
    """Nothing a user can type raises anything else."""
    with contextlib.suppress(ValueError):
        assert LengthMix(text).shares


@pytest.mark.parametrize(
    ("value", "text"),
    [(1245.3, "1,245"), (0.01234, "0.0123"), (12.34, "12.3"), (0, "0"), (math.inf, "inf"), (99.96, "100.0")],
)
def test_numbers_have_three_digits_and_no_exponent(value: float, text: str) -> None:
    """Large numbers keep all digits before the point, small ones three that matter."""
    assert number(value) == text


@pytest.mark.parametrize(
    ("share", "text"), [(0.99, "99%"), (0.995, "99.5%"), (0.001, "0.1%"), (0.07, "7%"), (1.5, "150%")]
)
def test_a_limit_is_told_as_it_was_given(share: float, text: str) -> None:
    assert percent_as_given(share) == text


def test_memory_is_shown_in_mib_until_it_is_large() -> None:
    """Engines of one model compare at a glance."""
    assert quantity(300 * 2**20, "bytes") == "300 MiB"
    assert quantity(2 * 2**30, "bytes") == "2,048 MiB"
    assert quantity(24 * 2**30, "bytes") == "24.0 GiB"
    assert quantity(12.34, "ms") == "12.3 ms"
    assert quantity(0.99, "") == "0.990"
