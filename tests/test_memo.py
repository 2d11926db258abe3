"""Results that are kept: how long, under which key, and what makes them worthless."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from open_autoglm import memo
from open_autoglm.memo import Memo, key_of, source_digest
from open_autoglm.schemas import Comparison, Fall
from open_autoglm.settings import Settings

RESULT = Fall(stage="race", heat=2, reason="slower")


@pytest.fixture
def kept(settings: Settings) -> Memo:
    return Memo(settings, "falls")


def file_of(settings: Settings) -> Path:
    (path,) = (settings.home / "results" / "falls").iterdir()
    return path


def test_what_was_put_is_found_by_its_key_alone(kept: Memo, settings: Settings) -> None:
    """By another study too, but not by another kind of result."""
    kept.put(key_of("a"), RESULT)
    assert Memo(settings, "falls").get(key_of("a"), Fall) == RESULT
    assert kept.get(key_of("b"), Fall) is None
    assert Memo(settings, "others").get(key_of("a"), Fall) is None


def test_a_later_result_replaces_the_earlier(kept: Memo) -> None:
    """One key, one result."""
    kept.put(key_of("a"), RESULT)
    newer = RESULT.model_copy(update={"reason": "still slower"})
    kept.put(key_of("a"), newer)
    assert kept.get(key_of("a"), Fall) == newer


@pytest.mark.parametrize(("hours", "found"), [(1, False), (3, True)])
def test_an_old_result_is_not_used(hours: float, found: bool, kept: Memo, settings: Settings) -> None:
    """Two hours old, it serves who allows three and not who allows one."""
    kept.put(key_of("a"), RESULT)
    two_hours_ago = time.time() - 2 * 3600
    os.utime(file_of(settings), (two_hours_ago, two_hours_ago))
    patience = settings.model_copy(update={"trial_reuse_hours": hours})
    assert (Memo(patience, "falls").get(key_of("a"), Fall) is not None) == found


def test_zero_hours_reuse_nothing(kept: Memo, settings: Settings) -> None:
    """The way to measure everything again."""
    kept.put(key_of("a"), RESULT)
    os.utime(file_of(settings), (time.time() - 1, time.time() - 1))
    assert Memo(settings.model_copy(update={"trial_reuse_hours": 0}), "falls").get(key_of("a"), Fall) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"stage": "race"}'])
def test_a_result_that_cannot_be_read_is_not_used(content: str, kept: Memo, settings: Settings) -> None:
    """Damaged, or of a version that wrote other fields: it is measured again, without a word."""
    kept.put(key_of("a"), RESULT)
    file_of(settings).write_text(content)
    assert kept.get(key_of("a"), Fall) is None


def test_a_result_of_another_type_is_not_used(kept: Memo) -> None:
    """What was stored says itself whether it is what was asked for."""
    kept.put(key_of("a"), RESULT)
    assert kept.get(key_of("a"), Comparison) is None


def test_a_key_depends_on_each_part_and_on_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """On libraries and our own source as well, so nothing outlives what made it."""
    keys = [
        key_of("screening", {"threads": 2}, 1),
        key_of("quality", {"threads": 2}, 1),
        key_of("screening", {"threads": 1}, 1),
        key_of("screening", {"threads": 2}, 2),
        key_of("screening", 1, {"threads": 2}),
    ]
    monkeypatch.setattr(memo, "library_versions", lambda: {"torch": "1.0"})
    keys.append(key_of("screening", {"threads": 2}, 1))
    monkeypatch.setattr(memo, "version", lambda name: f"{name} 9")
    keys.append(key_of("screening", {"threads": 2}, 1))
    monkeypatch.setattr(memo, "source_digest", lambda: "edited")
    keys.append(key_of("screening", {"threads": 2}, 1))
    assert len(set(keys)) == len(keys)
    assert key_of("screening", {"threads": 2}, 1) == keys[-1]


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installation that a test may edit."""
    package = Path(memo.__file__).parent
    edited = Path(shutil.copytree(package, tmp_path / "copy", ignore=shutil.ignore_patterns("__pycache__")))
    monkeypatch.setattr(memo, "__file__", str(edited / "memo.py"))
    source_digest.cache_clear()
    yield edited
    source_digest.cache_clear()


@pytest.mark.parametrize(
    ("name", "matters"),
    [
        ("trials.py", True),
        ("heats.py", True),
        ("bracket.py", True),
        ("measure/racing.py", True),
        ("quality/metrics.py", True),
        ("engines/torch_engine.py", True),
        ("report.py", False),
        ("cli/main.py", False),
    ],
)
def test_editing_what_measures_makes_older_results_worthless(name: str, matters: bool, copy: Path) -> None:
    """Editing what only tells about them does not."""
    before = source_digest()
    (copy / name).write_text((copy / name).read_text() + "\n# edited\n")
    source_digest.cache_clear()
    assert (source_digest() != before) == matters


def test_the_same_source_has_the_same_digest_wherever_it_lies(copy: Path) -> None:
    """Two checkouts of one version share their results."""
    there = source_digest()
    source_digest.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memo, "__file__", str(copy.parent / "moved" / "memo.py"))
        shutil.copytree(copy, copy.parent / "moved")
        assert source_digest() == there
