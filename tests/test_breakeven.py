"""When an engine that takes longer to get ready has paid for it."""

from __future__ import annotations

from typing import Any

import pytest
from studies import BASELINE, CHAMPION, RIVAL, demo_study

from open_autoglm.breakeven import BreakEven, break_even, pays_words, preparation, sentence
from open_autoglm.schemas import Trial


def finalist(name: str, **exported: Any) -> Trial:
    trial = demo_study().trial(name)
    assert trial.exported is not None
    return trial.model_copy(update={"exported": trial.exported.model_copy(update=exported)})


def entry(entries: list[BreakEven], name: str) -> BreakEven:
    return next(e for e in entries if e.trial_id == name)


def test_preparation_is_building_loading_and_compiling() -> None:
    """The baseline builds nothing and compiles for 38 s at its first request."""
    before = preparation(finalist(BASELINE))
    assert before.build_s == 0
    assert before.load_s == pytest.approx(1.54)
    assert before.compile_s == pytest.approx(38, abs=0.1)
    assert before.total_s == pytest.approx(39.5, abs=0.1)


def test_a_longer_preparation_is_paid_by_faster_requests() -> None:
    """10.6 s more, and about 0.75 s saved by each request."""
    entries = break_even([finalist(name) for name in (CHAMPION, "onnxruntime-fp32")])
    champion = entry(entries, CHAMPION)
    assert champion.against == "onnxruntime-fp32"
    assert champion.requests == 15
    assert champion.between is not None
    assert champion.between[0] <= 15 <= champion.between[1]
    assert pays_words(champion) == "after 15 requests"
    assert "10.6 s more than onnxruntime-fp32: it pays after 15 requests" in sentence(champion, entries)
    assert pays_words(entry(entries, "onnxruntime-fp32")) == "ready first"


def test_what_is_slower_never_pays() -> None:
    """It takes longer to get ready, and no number of requests makes up for that."""
    entries = break_even([finalist(name) for name in (BASELINE, CHAMPION)])
    assert entry(entries, BASELINE).requests is None
    assert "it never pays" in sentence(entry(entries, BASELINE), entries)
    assert "pays from the start" in sentence(entry(entries, CHAMPION), entries)


def test_a_gain_that_is_not_shown_pays_nothing() -> None:
    """The champion is 0.5 % faster than its rival as far as one can see, which is not far enough."""
    slow_to_build = finalist(CHAMPION, build_s=60)
    entries = break_even([slow_to_build, finalist(RIVAL)])
    assert entry(entries, CHAMPION).requests is None


def test_nothing_is_said_without_a_finalist() -> None:
    """A study in which nothing was timed has no break-even."""
    assert break_even([]) == []
    (only,) = break_even([finalist(CHAMPION)])
    assert "is the only finalist" in sentence(only, [only])
