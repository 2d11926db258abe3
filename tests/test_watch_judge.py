"""A breach is a broken promise or a shift, twice running; everything that is not known is no health."""

from __future__ import annotations

import math
from datetime import timedelta
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from watched import POLICY, WINDOW, baseline, histogram, judged, traffic, window

from open_autoglm.monitoring.judge import JudgeState, judge
from open_autoglm.monitoring.promises import check_promises
from open_autoglm.schemas.watch import Histogram, Judgement, LatencyWindow, Slo

KNOWN = baseline()
"""Of 384 windows; those judged beside it come after."""
FIRST = 384
SECOND = timedelta(seconds=1)


def states(found: list[Judgement]) -> list[str]:
    return [one.state for one in found]


# ── what says nothing ────────────────────────────────────────────────────────────────────────────


def not_a_number() -> LatencyWindow:
    times = dict(window().times_ms)
    times["ttft"] = times["ttft"].model_copy(update={"sum": math.nan})
    return window(times_ms=times)


EMPTY = histogram(1, 0)
HUNG = window(times_ms=dict.fromkeys(("queue", "ttft", "tpot", "e2e"), EMPTY), output_tokens=0)


@pytest.mark.parametrize(
    ("given_window", "said"),
    [
        (window(requests=49), "49 requests in the window; 50 are needed"),
        (window(requests=0), "0 requests in the window"),
        (not_a_number(), "the sum of ttft is not finite"),
        (HUNG, "400 requests in the window, and no ttft of any"),
        (window(end=window().begin), "ends before it begins"),
        (window(end=window().begin + WINDOW / 3), "300 s long; 900 s are judged"),
    ],
)
def test_what_is_not_known_is_not_healthy(given_window: LatencyWindow, said: str) -> None:
    """Nor is it a breach."""
    (found,), _ = judged([given_window])
    assert found.state == "no_data"
    assert said in found.reasons[0]


@pytest.mark.parametrize(
    ("later", "said"),
    [(-timedelta(minutes=1), "60 s from now: the clocks differ"), (3 * WINDOW, "ended 2700 s ago")],
)
def test_a_window_of_another_time_is_refused(later: timedelta, said: str) -> None:
    found, state = judge(window(), JudgeState(), None, POLICY, window().end + later)
    assert found.state == "no_data"
    assert said in found.reasons[0]
    assert state == JudgeState()


@pytest.mark.parametrize("again", [window(5), window(4), window(5, end=window(5).end - SECOND)])
def test_no_window_counts_twice(again: LatencyWindow) -> None:
    """Neither the same one, nor an older one, nor one that overlaps."""
    _, state = judged([window(5)])
    found, after = judge(again, state, None, POLICY, window(5).end + SECOND)
    assert found.state == "no_data"
    assert "overlaps one that was judged" in found.reasons[0]
    assert after == state


def test_silence_neither_confirms_nor_ends() -> None:
    """Two windows over the promise with a silent one between are two running."""
    found, _ = judged([window(0, bad=200), window(1, requests=3), window(2, bad=200), window(3, requests=3)])
    assert states(found) == ["ok", "no_data", "breached", "no_data"]


# ── promises ─────────────────────────────────────────────────────────────────────────────────────


def test_a_promise_must_be_broken_twice_running() -> None:
    found, _ = judged([window(0, bad=200), window(1), window(2, bad=200), window(3, bad=200)])
    assert states(found) == ["ok", "ok", "ok", "breached"]
    assert "in a first window" in found[0].reasons[0]
    said = "ttft: 200 of 400 answers were over 500 ms; 5 % may be, in 2 windows running"
    assert found[-1].reasons == (said,)
    assert [one.act for one in found] == [False, False, False, True]


def test_a_share_that_chance_explains_is_not_broken() -> None:
    """28 of 400 are 7 %: of a promise that is just kept, one window in twenty is like that. 40 are not."""
    assert states(judged([window(n, bad=28) for n in range(4)])[0]) == ["ok"] * 4
    assert states(judged([window(n, bad=40) for n in range(2)])[0]) == ["ok", "breached"]


def test_a_bound_between_buckets_counts_what_surely_is_above() -> None:
    """And says so; a bound beyond the last bucket is never broken for certain."""
    (kept,) = check_promises(window(bad=200, failed=1), Slo(ttft_p95_ms=600))[:1]
    assert kept.bad == 200
    assert "counted from 1,000 ms: no bucket ends at 600 ms" in kept.told
    (kept,) = check_promises(window(bad=200), Slo(ttft_p95_ms=1100))[:1]
    assert kept.bad == 0
    (kept,) = check_promises(window(bad=200), Slo(ttft_p95_ms=30_000))[:1]
    assert kept.bad == 0


def test_what_lies_beyond_the_last_bucket_keeps_no_promise() -> None:
    """Nobody knows how far beyond. A few there may be: so many may break it."""
    policy = POLICY.model_copy(update={"slo": Slo(ttft_p95_ms=30_000)})
    for late, state in ((20, "ok"), (200, "no_data")):
        times = histogram(100, 400).model_copy(update={"counts": (0, 0, 400 - late, 0, 0, 0, 0, 0, late)})
        (found,), _ = judged([window(times_ms={"ttft": times})], policy=policy)
        assert found.state == state
    assert found.reasons[0] == (
        "ttft: 200 of 400 answers were over 20,000 ms, where the last bucket ends, so it is not known how "
        "many were over 30,000 ms: serve it with --slo-ttft 30000ms"
    )


# ── who does not wait for an answer ──────────────────────────────────────────────────────────────


def leaving(number: int, after_ms: float, count: int = 300) -> LatencyWindow:
    """Of 400 clients, ``count`` leave without a token."""
    left = histogram(after_ms, count)
    return window(number, requests=400 - count, left_ms={"ttft": left, "e2e": left}).model_copy(
        update={"requests": 400}
    )


def test_clients_who_waited_for_longer_than_was_promised_break_the_promise() -> None:
    """Those who were answered were all in time; everybody else had left."""
    found, _ = judged([leaving(n, 20_000) for n in range(2)])
    assert states(found) == ["ok", "breached"]
    said = (
        "ttft: 300 of 400 answers were over 500 ms; 5 % may be (300 clients had left by then, after as long)"
    )
    assert found[1].reasons[0] == f"{said}, in 2 windows running"
    assert states(judged([leaving(n, 20_000, 400) for n in range(2)])[0]) == ["ok", "breached"]


def test_clients_who_left_before_that_say_nothing() -> None:
    """Whoever changes their mind; an answer might have come in time."""
    assert states(judged([leaving(n, 100) for n in range(2)])[0]) == ["ok", "ok"]
    (found,), _ = judged([leaving(0, 100, 400)])
    assert found.state == "no_data"


def test_without_any_promise_nobody_answering_is_no_health() -> None:
    (found,), _ = judged([HUNG], policy=POLICY.model_copy(update={"slo": Slo()}))
    assert (found.state, found.reasons) == ("no_data", ("400 requests in the window, and none was answered",))


def test_a_service_that_answers_nobody_is_breached() -> None:
    """It has no times at all, and that is no excuse."""
    refusing = {"requests": 0, "refused": 400, "times_ms": {}, "output_tokens": 0}
    found, _ = judged([window(n, **refusing) for n in range(2)])
    assert states(found) == ["ok", "breached"]
    assert "errors: 400 of 400 requests were lost or refused; 1.00% may be" in found[1].reasons[0]


# ── shifts ───────────────────────────────────────────────────────────────────────────────────────


def test_a_shift_is_found_in_its_second_window() -> None:
    """By a fifth, while every promise is kept."""
    healthy = [traffic(FIRST + n) for n in range(5)]
    slow = [traffic(FIRST + 5 + n, slower=1.2) for n in range(3)]
    found, _ = judged([*healthy, *slow], KNOWN)
    assert states(found) == ["ok"] * 6 + ["breached"] * 2
    assert [one.act for one in found].index(True) == 6
    assert "slower in 2 windows running" in found[6].reasons[0]
    assert found[6].figures["ttft_engine_ms"] > 1.15 * found[6].figures["ttft_expected_ms"]


def test_a_smaller_shift_is_found_by_its_sum() -> None:
    """By 7 % on a noisy host: each window might be chance, all of them are not."""
    known = baseline(384, noise=0.03)
    found, _ = judged([traffic(FIRST + n, slower=1.09, noise=0.03) for n in range(96)], known)
    first = states(found).index("breached")
    assert 2 < first < 96
    assert "slower for long" in found[first].reasons[0]


def test_one_slow_window_is_none() -> None:
    """However slow: a neighbour that came and went."""
    slow = [traffic(FIRST + n, slower=1.8 if n % 8 == 3 else 1.0) for n in range(40)]
    assert set(states(judged(slow, KNOWN)[0])) == {"ok"}


def test_being_faster_is_no_breach_and_neither_is_coming_back() -> None:
    quick = [traffic(FIRST + n, slower=0.7 if n < 20 else 1.0) for n in range(40)]
    assert set(states(judged(quick, KNOWN)[0])) == {"ok"}


@pytest.mark.parametrize("changes", [{"prompt_tokens": 300.0}, {"requests": 1500}, {"output_tokens": 400.0}])
def test_another_mix_or_load_is_not_taken_for_the_engine(changes: dict[str, Any]) -> None:
    """Within what the baseline has seen it is allowed for; beyond, nothing is said of the engine."""
    found, _ = judged([traffic(FIRST + n, **changes) for n in range(4)], KNOWN)
    assert set(states(found)) == {"ok"}
    assert any("has not seen such lengths or such a load" in reason for reason in found[0].reasons)


def test_a_stage_is_compared_only_with_its_own_versions_baseline() -> None:
    """The promises hold for everybody."""
    slow = [traffic(FIRST + n, slower=1.5, version="2") for n in range(4)]
    found, _ = judged(slow, KNOWN)
    assert set(states(found)) == {"ok"}
    assert "no baseline of this version yet: only the promises count" in found[0].reasons


def test_without_the_wait_the_first_token_is_not_compared() -> None:
    """A queue would look like a slower engine."""
    one = traffic(FIRST)
    times = {stage: times for stage, times in one.times_ms.items() if stage != "queue"}
    (found,), _ = judged([one.model_copy(update={"times_ms": times})], KNOWN)
    assert "tpot_expected_ms" in found.figures
    assert "ttft_expected_ms" not in found.figures


# ── hysteresis and cool-down ─────────────────────────────────────────────────────────────────────


def test_a_breach_ends_after_two_calm_windows_running() -> None:
    bad = [200, 200, 0, 200, 0, 0, 0]
    found, state = judged([window(n, bad=count) for n, count in enumerate(bad)])
    assert states(found) == ["ok", "breached", "breached", "breached", "breached", "ok", "ok"]
    assert state.breach is None
    assert "not over yet" in found[4].reasons[0]


def test_a_promise_that_is_not_made_any_more_holds_no_breach_open() -> None:
    """A mistaken one is mended in the file."""
    _, state = judged([window(n, bad=200) for n in range(3)])
    mended = POLICY.model_copy(update={"slo": Slo(e2e_p95_ms=5000)})
    found, after = judged([window(3 + n, bad=200) for n in range(3)], state=state, policy=mended)
    assert states(found) == ["breached", "ok", "ok"]
    assert after.breach is None
    assert found[1].reasons[-1].endswith("by ttft is over")


@pytest.mark.parametrize("lost", ["baseline", "lengths"])
def test_a_shift_that_cannot_be_compared_any_more_holds_no_breach_open(lost: str) -> None:
    """The baseline is gone, or the traffic is one that it has not seen: no window could ever end it."""
    found, state = judged([traffic(FIRST + 5 + n, slower=1.3) for n in range(3)], KNOWN)
    assert states(found)[-1] == "breached"
    changes = {"prompt_tokens": 300.0} if lost == "lengths" else {}
    later = [traffic(FIRST + 8 + n, **changes) for n in range(3)]
    found, _ = judged(later, None if lost == "baseline" else KNOWN, state)
    assert states(found) == ["breached", "ok", "ok"]


def test_a_shift_ends_only_well_below_where_it_began() -> None:
    """Still 4 % slower is not over, though nobody would have been woken for it."""
    slower = [1.3, 1.3, 1.3, *[1.04] * 6, *[1.0] * 4]
    found, _ = judged([traffic(FIRST + 5 + n, slower=s) for n, s in enumerate(slower)], KNOWN)
    assert states(found)[1:9] == ["breached"] * 8
    assert states(found)[-1] == "ok"


def test_a_breach_is_acted_on_once_in_a_cool_down() -> None:
    """Then once more, if it still goes on; a new version begins anew and inherits the cool-down."""
    found, state = judged([window(n, bad=200) for n in range(30)])
    acts = [n for n, one in enumerate(found) if one.act]
    assert acts == [1, 25]  # six hours later
    assert "nothing is done before" in found[2].reasons[-1]
    newer, after = judged([window(30 + n, bad=200, version="2") for n in range(3)], state=state)
    assert states(newer) == ["ok", "breached", "breached"]
    assert not any(one.act for one in newer)
    assert after.cool_until == state.cool_until


def test_acting_on_what_is_no_breach_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="nothing to act on"):
        Judgement(service="demo", at=window().end, state="ok", act=True, reasons=())


# ── whatever comes ───────────────────────────────────────────────────────────────────────────────

ANY_WINDOW = st.tuples(
    st.integers(0, 40),
    st.sampled_from((1.0, 1.1, 1.5)),
    st.sampled_from((0, 10, 60, 400)),
    st.sampled_from((0, 100, 400)),
    st.sampled_from(("1", "2")),
)


@settings(max_examples=60)
@given(st.lists(ANY_WINDOW, max_size=25))
def test_any_sequence_is_judged_soundly(asked: list[tuple[int, float, int, int, str]]) -> None:
    """Windows late, twice, and of either version: what is refused changes nothing, acts keep their distance,
    and the state survives its file."""
    state, acts = JudgeState(), []
    for number, slower, requests, bad, version in asked:
        one = traffic(
            FIRST + number, slower=slower, requests=requests, bad=min(bad, requests), version=version
        )
        now = one.end + SECOND
        found, after = judge(one, state, KNOWN, POLICY, now)
        assert judge(one, after, KNOWN, POLICY, now)[1] == after
        assert JudgeState.model_validate_json(after.model_dump_json()) == after
        assert found.state == "no_data" or requests >= POLICY.min_requests
        assert found.reasons
        if found.act:
            acts.append(now)
        state = after
    assert all((b - a).total_seconds() >= POLICY.cool_down_s for a, b in pairwise(acts))


@given(st.lists(st.integers(0, 300), min_size=3, max_size=3), st.sampled_from((math.nan, math.inf)))
def test_no_sum_makes_bad_figures_healthy(counts: list[int], total: float) -> None:
    broken = Histogram(bounds=(100.0, 500.0), counts=tuple(counts), sum=total)
    times = {**window().times_ms, "e2e": broken}
    (found,), _ = judged([window(times_ms=times)])
    assert found.state == "no_data"
