"""Counters read now and then, of processes that end and begin again: what they counted meanwhile."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from open_autoglm.monitoring.tape import Series, Tape, Values, increase

TOLD: dict[str, tuple[Values, tuple[float, ...], float]] = {
    "it grew": ((3, 3, 7), (1, 1, 1), 4),
    "it was not there yet": ((None, 2, 5), (1, 1, 1), 5),
    "it never was there": ((None, None), (1, 1), 0),
    "it fell": ((5, 2, 3), (0, 0, 0), 3),
    "a new life with less": ((5, 2, 3), (1, 2, 2), 3),
    "a new life with more": ((5, 6), (1, 2), 6),
    "a new life, then counted": ((5, None, 2), (1, 2, 2), 2),
    "two lives": ((5, 1, 4), (1, 2, 3), 5),
    "one read": ((5,), (1,), 0),
    "no read": ((), (), 0),
}


@pytest.mark.parametrize("name", TOLD)
def test_the_growth_of_a_counter(name: str) -> None:
    values, lives, expected = TOLD[name]
    assert increase(values, lives) == expected


counted = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=4)
"""Of each life, what is counted before each read."""


@given(counted)
def test_nothing_that_was_read_is_lost(lives: list[list[int]]) -> None:
    """From the first read on, however often the process ends: all that was counted before a read."""
    values: list[float | None] = []
    started: list[float] = []
    for life, steps in enumerate(lives):
        total = 0
        for step in steps:
            total += step
            values.append(total or None)  # a series with labels is not there before it counts
            started.append(life)
    expected = sum(map(sum, lives)) - lives[0][0]
    assert increase(values, started) == expected


@given(counted, st.integers(0, 20))
def test_windows_side_by_side_add_up(lives: list[list[int]], cut: int) -> None:
    """With a read in common, two windows have what one over both has."""
    values = [float(sum(steps[: read + 1])) for steps in lives for read in range(len(steps))]
    started = [float(life) for life, steps in enumerate(lives) for _ in steps]
    cut = min(cut, len(values) - 1)
    first = increase(values[: cut + 1], started[: cut + 1])
    second = increase(values[cut:], started[cut:])
    assert first + second == increase(values, started)


def tape(lives: tuple[float, ...]) -> Tape:
    return Tape("here", (10.0, 20.0), lives, (Series("count", {}, (3, 5)),))


@pytest.mark.parametrize(
    ("life", "expected"), [(7.0, 5), (4.0, 2), (0.0, 2), (12.0, 2)], ids=["in", "before", "unknown", "clock"]
)
def test_a_process_that_was_born_in_the_window_stood_at_nothing(life: float, expected: float) -> None:
    """The window began at 5. A birth after the first read is a clock that differs."""
    found = tape((life, life)).with_birth(begin_s=5)
    assert increase(found.series[0].values, found.lives) == expected
    assert found.times_s[0] == (7.0 if life == 7 else 10.0)
