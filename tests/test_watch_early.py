"""A look amid a window tells what its end will tell, if that is certain, and else when; no breach comes of it
that would not have come."""

from __future__ import annotations

import errno
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from watched import BEGIN, POLICY, judged, window

from open_autoglm.cli.watch import run_watch
from open_autoglm.monitoring.config import WatchSpec
from open_autoglm.monitoring.early import judge_early, next_look, under_way
from open_autoglm.monitoring.judge import JudgeState, judge
from open_autoglm.monitoring.watch import look
from open_autoglm.monitoring.watch_store import WatchStore
from open_autoglm.schemas.watch import Judgement, LatencyWindow

SECOND, MINUTE = timedelta(seconds=1), timedelta(minutes=1)
WATCH = {
    "service": "demo",
    "endpoint": "http://127.0.0.1:8000",
    "slo": {"ttft_p95": "500ms", "e2e_p95": "5s"},
    "optimize": {"model_path": "demo"},
}
SPEC = WatchSpec.model_validate(WATCH)


def part(number: int, minutes: int, **changes: Any) -> LatencyWindow:
    """The first minutes of the ``number``-th window."""
    begin = window(number).begin
    return window(number, **{"begin": begin, "end": begin + minutes * MINUTE, **changes})


def after_bad_window() -> JudgeState:
    """One more of them is a breach."""
    return judged([window(0), window(1, bad=200)])[1]


def looked(one: LatencyWindow, state: JudgeState) -> tuple[Judgement, JudgeState]:
    return judge_early(one, state, POLICY, one.end + SECOND)


# ── what is certain ──────────────────────────────────────────────────────────────────────────────


def test_a_breach_begins_as_soon_as_it_is_certain() -> None:
    """Of 400 answers 32 over the promise are too many, and in four minutes there were 60. What the window's
    end then finds is no second breach, and nothing was counted twice."""
    before = after_bad_window()
    found, state = looked(part(2, 4, requests=100, bad=60), before)
    assert (found.state, found.act, found.again) == ("breached", True, None)
    told = "ttft: 60 of 100 answers were over 500 ms; 5 % may be; too many however the window ends"
    assert found.reasons == (f"{told}, in 2 windows running",)
    remembered = {"breach", "cool_until"}
    assert state.model_dump(exclude=remembered) == before.model_dump(exclude=remembered)
    (whole,), after = judged([window(2, bad=60)], state=state)
    assert (whole.state, whole.act, after.broken["ttft"]) == ("breached", False, 2)
    assert after.breach is not None
    assert after.breach.since == found.at


@pytest.mark.parametrize(
    ("bad", "minutes", "requests"),
    [(20, 4, 100), (32, 14, 380)],
)
def test_what_the_rest_may_mend_is_no_breach_yet(bad: int, minutes: int, requests: int) -> None:
    """Of 400 answers 32 are too many, but by the window's end there may be 423."""
    before = after_bad_window()
    found, state = looked(part(2, minutes, requests=requests, bad=bad), before)
    assert (found.state, state) == ("no_data", before)
    assert found.reasons[-1] == "the window from 00:30:00 UTC on is judged when it ends, at 00:45:00 UTC"
    assert found.again == window(2).end


def test_a_first_window_is_told_and_not_counted() -> None:
    """However bad: the second one has to come, and only whole windows are first ones."""
    state = judged([window(0)])[1]
    for minutes in (4, 8, 12):
        found, after = looked(part(1, minutes, requests=200, bad=200), state)
        assert (found.state, after) == ("no_data", state)
        assert "too many however the window ends, in a first window" in found.reasons[0]


def test_who_calls_less_while_it_is_slow_may_call_again() -> None:
    """Ten a minute, of which most are late; but the window before had 27 a minute, and if so many come in
    time for the rest of this one, its promise is kept."""
    before = after_bad_window()
    found, _ = looked(part(2, 6, requests=60, bad=22), before)
    assert found.state == "no_data"
    found, _ = looked(part(2, 6, requests=60, bad=22), before.model_copy(update={"asked_per_s": 0.0}))
    assert found.state == "breached"


def test_lost_answers_count_as_well() -> None:
    refusing = {"requests": 0, "refused": 60, "times_ms": {}, "output_tokens": 0}
    _, state = judged([window(n, **(refusing | {"refused": 400})) for n in range(1)])
    found, _ = looked(part(1, 4, **refusing), state)
    assert (found.state, found.act) == ("breached", True)
    assert "errors: 60 of 60 requests were lost or refused" in found.reasons[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"requests": 49, "bad": 49}, "49 requests in the window; 50 are needed"),
        ({"version": "2", "bad": 60}, "another version, 2, is served since 00:30:00 UTC"),
    ],
)
def test_what_says_nothing_says_so(changes: dict[str, Any], said: str) -> None:
    before = after_bad_window()
    found, state = looked(part(2, 4, **changes), before)
    assert (found.state, state) == ("no_data", before)
    assert said in found.reasons[0]


# ── no more breaches than without ────────────────────────────────────────────────────────────────

BURST = st.tuples(st.integers(0, 14), st.sampled_from((0, 15, 20, 23, 26, 40, 300)))
"""In a window of 300 answers: from which minute on, and how many are bad. 25 are too many."""


def by_minute(bursts: list[tuple[int, int]]) -> list[int]:
    """How many of the twenty answers in each minute are bad: all, from the burst's begin on."""
    bad = [0] * (15 * len(bursts))
    for number, (begin, count) in enumerate(bursts):
        for minute in range(15 * number + begin, 15 * (number + 1)):
            bad[minute] = min(20, count)
            count -= bad[minute]
    return bad


def counted(bad: list[int], begin: int, end: int) -> LatencyWindow:
    """From minute to minute."""
    return window(
        0,
        begin=BEGIN + begin * MINUTE,
        end=BEGIN + end * MINUTE,
        requests=20 * (end - begin),
        bad=sum(bad[begin:end]),
    )


@settings(max_examples=200)
@given(st.lists(BURST, min_size=8, max_size=8), st.sets(st.integers(1, 119), min_size=20))
def test_looks_at_any_moment_begin_no_other_breach(bursts: list[tuple[int, int]], moments: set[int]) -> None:
    """Eight windows, in which breaches begin and end: what their ends find is the same, whoever looks
    meanwhile and why; and what a look finds early, the window's end finds again."""
    undisturbed = state = JudgeState()
    early, bad = False, by_minute(bursts)
    for minute in range(1, 121):
        now = BEGIN + minute * MINUTE
        if minute % 15 == 0:
            one = counted(bad, minute - 15, minute)
            alone, undisturbed = judge(one, undisturbed, None, POLICY, now)
            found, state = judge(one, state, None, POLICY, now)
            assert found.state == alone.state
            assert state.broken == undisturbed.broken
            assert not early or found.state == "breached"
            early = False
        elif minute in moments and (since := under_way(state, POLICY, now)) is not None:
            begun = round((since - BEGIN) / MINUTE)
            found, state = judge_early(counted(bad, begun, minute), state, POLICY, now)
            early |= found.state == "breached"


# ── when to look again ───────────────────────────────────────────────────────────────────────────


def test_after_a_first_bad_window_the_second_is_looked_at_early() -> None:
    """As soon as there may be enough requests; with few of them, only at its end."""
    for requests, minutes in ((400, 3.75), (120, 7.5), (60, None)):
        one = window(0, requests=requests, bad=requests // 2)
        _, state = judged([one])
        expected = None if minutes is None else one.end + minutes * MINUTE
        assert next_look(one, state, POLICY) == expected
    for windows in ([window(0)], [window(0, bad=200), window(1, bad=200)]):
        _, state = judged(windows)
        assert next_look(windows[-1], state, POLICY) is None


# ── whole looks ──────────────────────────────────────────────────────────────────────────────────


class Counters(NamedTuple):
    """Somebody who counts: from a minute on, all answers are bad."""

    bad_from: datetime
    asked: list[datetime]

    def since(self, begin: datetime, now: datetime) -> LatencyWindow:
        self.asked.append(begin)
        seconds = (now - begin).total_seconds()
        slow_s = (now - max(begin, self.bad_from)).total_seconds()
        return window(0, begin=begin, end=now, requests=round(seconds / 2), bad=max(0, round(slow_s / 2)))


def test_an_alert_between_two_looks_of_the_schedule(tmp_path: Path) -> None:
    """Slow from 00:37: an alert at 00:41 is told when it is judged, the look at 00:45 finds a first bad
    window and when to come again, and who then comes need not wait for 01:00."""
    store = WatchStore(tmp_path, SPEC.service)
    counters = Counters(BEGIN + 37 * MINUTE, [])

    def at(minute: float) -> Judgement:
        now = BEGIN + minute * MINUTE
        return look(SPEC, lambda begin: counters.since(begin, now), store, now)

    assert at(30).state == "ok"
    alert = at(41)
    assert (alert.state, alert.again) == ("no_data", BEGIN + 45 * MINUTE)
    assert "too many however the window ends, in a first window" in alert.reasons[0]
    first = at(45)
    assert (first.state, first.again) == ("ok", BEGIN + 48.75 * MINUTE)
    assert at(46).reasons[0].startswith("a window was judged just now, until 00:45:00 UTC")
    second = at(48.75)
    assert (second.state, second.act) == ("breached", True)
    assert second.window is not None
    assert second.window.begin == BEGIN + 45 * MINUTE
    assert store.answered() is None
    assert (at(60).state, at(75).act) == ("breached", False)
    begun = [round((moment - BEGIN) / MINUTE) for moment in counters.asked]
    assert begun == [15, 30, 30, 45, 45, 60]


def test_what_an_early_look_found_is_done_by_the_next_if_it_was_not(tmp_path: Path) -> None:
    """As with every other look, though a cool-down has begun."""
    store = WatchStore(tmp_path, SPEC.service)
    counters = Counters(BEGIN, [])
    found = []
    for minute in (15, 20, 30):
        now = BEGIN + minute * MINUTE
        found.append(look(SPEC, lambda begin, now=now: counters.since(begin, now), store, now))
    assert [(one.state, one.act) for one in found] == [("ok", False), ("breached", True), ("breached", True)]
    assert found[2].due == found[1].at
    assert found[2].reasons[-1].endswith("has not been done")


def test_an_early_breach_that_cannot_be_remembered_is_not_acted_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = WatchStore(tmp_path, SPEC.service)
    counters = Counters(BEGIN, [])

    def at(minute: int) -> Judgement:
        now = BEGIN + minute * MINUTE
        return look(SPEC, lambda begin: counters.since(begin, now), store, now)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    at(15)
    with monkeypatch.context() as patch:
        patch.setattr("open_autoglm.monitoring.watch_store.write_atomic", full)
        found = at(20)
    assert (found.state, found.act, found.due) == ("breached", False, None)
    assert "cannot be remembered, so nothing is done about it" in found.reasons[-1]
    assert at(22).act


@pytest.mark.parametrize(("in_s", "at_least", "at_most"), [(60, 30, 60), (9999, 900, 900), (-5, 0, 0)])
def test_the_shell_looks_again_when_that_tells_more(
    in_s: float, at_least: float, at_most: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or after a window."""
    config = tmp_path / "demo.yaml"
    config.write_text(json.dumps(WATCH))  # YAML is a superset of JSON
    slept: list[float] = []

    def found(*_: object) -> Judgement:
        now = datetime.now(UTC)
        again = now + timedelta(seconds=in_s)
        return Judgement(service="demo", at=now, state="no_data", reasons=("soon",), again=again)

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        raise KeyboardInterrupt

    monkeypatch.setattr("open_autoglm.cli.watch.look", found)
    monkeypatch.setattr("time.sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        run_watch(str(config), once=False, as_json=True)
    assert at_least <= slept[0] <= at_most
