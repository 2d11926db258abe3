"""One look: what is found is checked, judged, learned from and written down, whatever the disk does."""

from __future__ import annotations

import math
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from watched import WINDOW, baseline, judged, traffic, window

from open_autoglm.monitoring.config import WatchSpec
from open_autoglm.monitoring.judge import JudgeState
from open_autoglm.monitoring.lesson import Lesson, attend
from open_autoglm.monitoring.watch import look
from open_autoglm.monitoring.watch_store import Memory, WatchStore
from open_autoglm.quality.gates import check_window
from open_autoglm.schemas.watch import Judgement, LatencyWindow

SPEC = WatchSpec.model_validate(
    {
        "service": "demo",
        "endpoint": "http://127.0.0.1:8000",
        "slo": {"ttft_p95": "500ms", "e2e_p95": "5s"},
        "judge": {"baseline_windows": 24},
        "optimize": {"model_path": "demo"},
    }
)


class Nobody(NamedTuple):
    reason: str


def seen(store: WatchStore, one: LatencyWindow) -> Judgement:
    return look(SPEC, lambda _: one, store, one.end + timedelta(seconds=1))


@pytest.fixture
def store(tmp_path: Path) -> WatchStore:
    return WatchStore(tmp_path, SPEC.service)


def breached() -> JudgeState:
    """One window before a breach."""
    return judged([window(0, bad=200)])[1]


# ── looks ────────────────────────────────────────────────────────────────────────────────────────


def test_a_breach_is_found_over_two_looks(store: WatchStore) -> None:
    """Whatever is known between them is on disk."""
    first, second = (seen(store, window(n, bad=200)) for n in range(2))
    assert (first.state, second.state, second.act) == ("ok", "breached", True)
    assert seen(store, window(1, bad=200)).state == "no_data"  # the flow ran twice
    assert [one.state for one in store.history()] == ["ok", "breached", "no_data"]


def test_the_last_window_of_a_lesson_makes_a_baseline(store: WatchStore) -> None:
    """Of its version and bundle; the next window is compared with it."""
    lesson = Lesson()
    found, state = judged([traffic(n) for n in range(23)])
    for judgement in found:
        lesson = attend(lesson, judgement, None, 24)
    assert store.keep(Memory(state=state, lesson=lesson), None) is None
    assert store.baseline(traffic(23)) is None
    seen(store, traffic(23))
    known = store.baseline(traffic(24))
    assert known is not None
    assert {stage.windows for stage in known.stages.values()} == {24}
    assert store.baseline(traffic(24, bundle_digest="ba9876543210")) is None
    assert "tpot_expected_ms" in seen(store, traffic(24)).figures


def test_nobody_there_is_no_health(store: WatchStore) -> None:
    found = look(SPEC, lambda _: Nobody("nobody answers"), store, window().end)
    assert (found.state, found.reasons) == ("no_data", ("nobody answers",))
    assert [one.state for one in store.history()] == ["no_data"]


def test_figures_that_cannot_be_true_are_not_judged(store: WatchStore) -> None:
    times = {**window().times_ms, "ttft": window().times_ms["ttft"].model_copy(update={"sum": 1.0})}
    found = seen(store, window(times_ms=times))
    assert found.state == "no_data"
    assert "the mean of ttft_ms is no less than its buckets allow" in found.reasons[0]
    assert store.memory().memory == Memory()


# ── the gate ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("sound", [window(), window(requests=0), window(requests=0, refused=9, times_ms={})])
def test_a_window_passes_whatever_it_says_if_it_can_be_true(sound: LatencyWindow) -> None:
    """Silence is not the gate's business."""
    found = check_window(sound)
    assert found.passed, found.failures
    assert found.evaluated >= 7


def of_ttft(**changes: Any) -> LatencyWindow:
    return window(
        times_ms={**window().times_ms, "ttft": window().times_ms["ttft"].model_copy(update=changes)}
    )


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (of_ttft(sum=math.nan), "the mean of ttft_ms is known"),
        (of_ttft(sum=math.inf), "the mean of ttft_ms is not negative, and finite"),
        (of_ttft(sum=-1e5), "the mean of ttft_ms is not negative"),
        (of_ttft(sum=1e7), "the mean of ttft_ms is no more than its buckets allow"),
        (window(end=window().begin), "the window ends after it begins"),
        (window().model_copy(update={"refused": -3}), "refused is not negative"),
    ],
)
def test_a_window_that_cannot_be_true_is_named(broken: LatencyWindow, said: str) -> None:
    found = check_window(broken)
    assert not found.passed
    assert any(said in failure for failure in found.failures), found.failures


# ── the disk ─────────────────────────────────────────────────────────────────────────────────────


def test_a_torn_last_line_costs_only_itself(store: WatchStore) -> None:
    store.append(judged([window(0)])[0][0])
    with store.history_file.open("a") as file:
        file.write('{"service": "demo", "at": "2026-01-')
    store.append(judged([window(1)])[0][0])
    assert [one.at for one in store.history()] == [window(n).end + timedelta(seconds=1) for n in range(2)]


def test_what_cannot_be_remembered_is_not_acted_on(store: WatchStore) -> None:
    """Or it would be acted on again at every look, since the cool-down would be forgotten, too."""
    store.keep(Memory(state=breached()), None)
    baselines = store.history_file.parent / "memory.json"
    text = baselines.read_text()
    baselines.unlink()
    baselines.mkdir()
    (baselines / "kept").write_text(text)
    second = seen(store, window(1, bad=200))
    third = seen(store, window(2, bad=200))
    assert (second.state, third.state) == ("ok", "ok")  # nothing of before is known
    assert not any(one.act for one in (second, third))
    assert any("cannot be remembered, so nothing is done" in reason for reason in third.reasons)


def test_a_history_that_cannot_be_written_is_told(store: WatchStore) -> None:
    store.history_file.mkdir(parents=True)
    found = seen(store, window())
    assert found.state == "ok"
    assert "the history cannot be written" in found.reasons[-1]


def test_a_broken_memory_is_begun_anew_and_told(store: WatchStore) -> None:
    store.keep(Memory(state=breached()), None)
    (store.history_file.parent / "memory.json").write_text('{"state": {"version')
    found = seen(store, window(1, bad=200))
    assert found.state == "ok"
    assert "cannot be read and is begun anew" in found.reasons[-1]
    assert seen(store, window(2, bad=200)).act


def test_labels_name_no_path(tmp_path: Path) -> None:
    """They come from whoever answers at the address."""
    store = WatchStore(tmp_path, "../up")
    evil = traffic(0, version="../../up", bundle_digest="/etc/pass")
    known = baseline(24).model_copy(update={"version": evil.version, "bundle_digest": evil.bundle_digest})
    assert store.keep(Memory(), known) is None
    assert store.baseline(evil) == known
    assert all(path.is_relative_to(tmp_path / "watch") for path in tmp_path.rglob("*.json"))
    assert len(list(tmp_path.rglob("*.json"))) == 2


def test_a_long_history_is_turned_over(store: WatchStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("open_autoglm.monitoring.watch_store._MOST_HISTORY_BYTES", 4000)
    found, _ = judged([window(n) for n in range(9)])
    for judgement in found:
        store.append(judgement)
    kept = [one.at for one in store.history()]
    assert kept == [one.at for one in found][-len(kept) :]
    assert 2 <= len(kept) < 9
    assert WINDOW.total_seconds() == 900
