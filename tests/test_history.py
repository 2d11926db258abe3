"""What an endpoint remembers of itself, and windows made of it, with clocks of the test's own."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import pytest

from open_autoglm.monitoring import endpoint
from open_autoglm.monitoring.tape import Series, Tape
from open_autoglm.monitoring.windows import NoWindow, Role, window
from open_autoglm.schemas import LatencyWindow, Slo
from open_autoglm.serving import history
from open_autoglm.serving.history import Recorder
from open_autoglm.serving.local import LocalEndpoint
from open_autoglm.serving.metrics import Board, Metrics, State

NAME = "tiny"
BEGIN_S = 1_000_000.0
DIGEST = "0123456789abcdef"


@dataclass
class Watched:
    """An endpoint without HTTP: its board, its memory, and the time."""

    started_s: float = BEGIN_S - 1000
    slo: Slo | None = None
    set_by_s: float = 0.0
    board: Board = field(init=False)
    recorder: Recorder = field(init=False)

    def __post_init__(self) -> None:
        self.time_s = self.started_s
        self.board = Board(NAME, self.slo)
        self.recorder = Recorder(
            self.board.figures, clock=lambda: self.time_s + self.set_by_s, boot_clock=lambda: self.time_s
        )

    def at(self, second: float) -> None:
        """Remember how things are so long after the window's begin."""
        self.time_s = BEGIN_S + second
        self.recorder.keep()

    def tape(self, begin_s: float, end_s: float) -> Tape | NoWindow:
        here = LocalEndpoint(url="http://here", pid=1, token="")
        return endpoint._tape(here, self.recorder.between(begin_s, end_s).history())


@dataclass(frozen=True)
class Several:
    """All that run."""

    watched: tuple[Watched, ...]

    @property
    def name(self) -> Literal["endpoint"]:
        return "endpoint"

    def read(self, service: str, role: Role, begin: datetime, end: datetime) -> Sequence[Tape] | NoWindow:
        tapes = [one.tape(begin.timestamp(), end.timestamp()) for one in self.watched]
        jumped = [tape for tape in tapes if isinstance(tape, NoWindow)]
        return jumped[0] if jumped else [tape for tape in tapes if isinstance(tape, Tape)]


def look(*watched: Watched, end: float = 120, role: Role = "champion") -> LatencyWindow | NoWindow:
    begin, until = (datetime.fromtimestamp(BEGIN_S + second, UTC) for second in (0, end))
    return window(Several(watched), NAME, begin, until, role)


def counted(*watched: Watched, end: float = 120, role: Role = "champion") -> LatencyWindow:
    found = look(*watched, end=end, role=role)
    assert isinstance(found, LatencyWindow), found
    return found


def show(metrics: Metrics, *, engine_bytes: int = 100, restarts: int = 0) -> None:
    metrics.show(State(0, 0, 0.0, engine_bytes, restarts, slower=0))


def answer(metrics: Metrics, count: int = 1) -> None:
    for _ in range(count):
        metrics.request(prompt_tokens=7).finished("stop")


@pytest.mark.parametrize(("times", "mean_ms"), [(9, None), (10, 2.0)])
def test_the_pace_of_a_host_is_known_from_ten_timings(times: int, mean_ms: float | None) -> None:
    """In the window, and of the version that is judged."""
    one = Watched()
    metrics, other = (one.board.of(version, DIGEST, "champion") for version in ("3", "2"))
    show(metrics)
    metrics.host_pace(9.0)
    one.at(0)
    for number in range(times):
        metrics.host_pace(0.001 if number % 2 else 0.003)
        other.host_pace(7.0)
    show(metrics)
    one.at(60)
    found = counted(one)
    assert found.pace_ms == (None if mean_ms is None else pytest.approx(mean_ms))


def test_everything_that_a_window_has_is_counted() -> None:
    """And nothing of before it."""
    one = Watched()
    metrics = one.board.of("3", DIGEST, "champion")
    show(metrics, restarts=1)
    answer(metrics, 5)
    metrics.refused("queue_full")
    one.at(0)
    answer(metrics, 2)
    request = metrics.request(prompt_tokens=30)
    request.token(cached_tokens=20, now=time.monotonic())
    request.token(cached_tokens=0, now=time.monotonic())
    request.finished("length")
    metrics.request(4).failed()
    metrics.request(4).not_finite()
    metrics.refused("queue_full")
    metrics.refused("deadline")
    show(metrics, engine_bytes=900, restarts=3)
    one.at(60)
    show(metrics, engine_bytes=500, restarts=3)
    one.at(120)
    found = counted(one)
    assert (found.version, found.bundle_digest) == ("3", DIGEST[:12])
    assert (found.requests, found.refused, found.failed, found.restarts) == (5, 2, 2, 2)
    assert (found.cached_tokens, found.memory_bytes) == (20, 900)
    assert {stage: times.count for stage, times in found.times_ms.items()} == {
        "ttft": 1,
        "tpot": 1,
        "e2e": 3,
        "queue": 0,
    }
    assert (found.prompt_tokens.sum, found.output_tokens.sum) == (2 * 7 + 30 + 2 * 4, 2)
    assert found.error_fraction == 4 / 7
    assert (found.begin.timestamp(), found.seconds) == (BEGIN_S, 120)


def test_who_left_is_counted_by_how_long_they_waited() -> None:
    """Before the first token, and before the last one: whoever has no token has no last one."""
    one = Watched(slo=Slo(ttft_p95_ms=137))
    metrics = one.board.of("3", DIGEST, "champion")
    show(metrics)
    one.at(0)
    now = [0.0]
    metrics._clock = lambda: now[0]
    for waited_s, begun in ((0.1, False), (0.2, False), (9.0, True)):
        request = metrics.request(7)
        if begun:
            request.token(0, now[0])
        now[0] += waited_s
        request.finished("abort")
    one.at(120)
    left = counted(one).left_ms
    assert (left["ttft"].count, left["ttft"].above(137.0)) == (2, 1)
    assert (left["e2e"].count, left["e2e"].sum) == (3, pytest.approx(9300))
    assert (counted(one).requests, counted(one).times_ms["e2e"].count) == (3, 0)


@pytest.mark.parametrize("odd", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["vllm:request_prompt_tokens_bucket", "autoglm_engine_memory_bytes"])
def test_a_counter_that_counts_nothing_is_a_reason(name: str, odd: float) -> None:
    (one,) = champions("1")
    tape = one.tape(BEGIN_S, BEGIN_S + 120)
    assert isinstance(tape, Tape)
    series = tuple(
        Series(each.name, each.labels, (0.0,) * (len(each.values) - 1) + (odd,))
        if each.name == name
        else each
        for each in tape.series
    )

    class Odd(Several):
        def read(self, *_: Any) -> Sequence[Tape]:
            return [Tape(tape.endpoint, tape.times_s, tape.lives, series)]

    begin, end = (datetime.fromtimestamp(BEGIN_S + second, UTC) for second in (0, 120))
    found = window(Odd(()), NAME, begin, end)
    assert found == NoWindow(f"{name} is {odd}, which counts nothing")


def test_times_are_in_their_buckets_in_milliseconds() -> None:
    """The SLO's limit is a bound, so what is above it is exact."""
    one = Watched(slo=Slo(ttft_p95_ms=137))
    metrics = one.board.of("3", DIGEST, "champion")
    show(metrics)
    one.at(0)
    for seconds in (0.005, 0.137, 0.138, 100.0):
        metrics.ttft.observe(seconds)
    one.at(120)
    times = counted(one).times_ms["ttft"]
    assert 137.0 in times.bounds
    assert times.above(137.0) == 2
    assert times.counts[0] == times.counts[-1] == 1
    assert times.sum == pytest.approx(1e3 * 100.28)


def test_a_champion_is_counted_from_when_it_took_over() -> None:
    """The one before had the role for half of the window; the newcomer was tried in it before."""
    one = Watched()
    first = one.board.of("1", DIGEST, "champion")
    tried = one.board.of("2", "other", "challenger")
    show(first)
    show(tried)
    one.at(0)
    answer(first, 10)
    answer(tried, 4)
    one.at(60)
    assert counted(one, end=60).requests == 10
    assert counted(one, end=60, role="challenger").requests == 4
    first.hide()
    tried.hide()
    second = one.board.of("2", "other", "champion")
    show(second)
    answer(second, 3)
    answer(first)  # ends what it has begun
    one.at(90)
    answer(second, 2)
    one.at(120)
    found = counted(one)
    assert (found.version, found.requests) == ("2", 5)
    assert (found.begin.timestamp() - BEGIN_S, found.seconds) == (60, 60)
    nobody = look(one, role="challenger")
    assert nobody == NoWindow("tiny has no challenger")


def test_a_challenger_that_came_back_has_what_it_did_since() -> None:
    one = Watched()
    tried = one.board.of("2", "other", "challenger")
    show(tried)
    one.at(0)
    answer(tried, 4)
    tried.hide()
    one.at(60)
    show(tried)
    answer(tried, 2)
    one.at(120)
    assert counted(one, role="challenger").requests == 2


def test_a_young_endpoint_is_counted_from_its_start() -> None:
    one = Watched(started_s=BEGIN_S + 30)
    metrics = one.board.of("1", DIGEST, "champion")
    show(metrics)
    answer(metrics, 3)
    one.at(31)
    answer(metrics, 2)
    one.at(120)
    found = counted(one)
    assert (found.requests, found.seconds, found.restarts) == (5, 90, 0)


def champions(*versions: str) -> list[Watched]:
    """Endpoints that have each answered three requests."""
    found = []
    for version in versions:
        one = Watched()
        metrics = one.board.of(version, DIGEST, "champion")
        show(metrics)
        one.at(0)
        answer(metrics, 3)
        one.at(120)
        found.append(one)
    return found


def test_endpoints_are_added_up() -> None:
    assert counted(*champions("1", "1", "1")).requests == 9


def test_endpoints_that_disagree_are_not_mixed() -> None:
    """A roll-out under way: the version that most of them have."""
    found = counted(*champions("2", "1", "2"))
    assert (found.version, found.requests) == ("2", 6)


def test_other_buckets_are_not_mixed() -> None:
    """Two releases side by side may count by other bounds."""
    one, other = champions("1", "1")
    strange = Watched(slo=Slo(ttft_p95_ms=137))
    show(strange.board.of("1", DIGEST, "champion"))
    strange.at(0)
    strange.at(120)
    assert isinstance(look(one, other), LatencyWindow)
    mixed = look(one, strange)
    assert isinstance(mixed, NoWindow)
    assert "the buckets of vllm:request_prompt_tokens" not in mixed.reason  # tokens have no limits
    assert "are not the same in all of the window" in mixed.reason


def test_nothing_read_and_long_ago_are_reasons() -> None:
    (one,) = champions("1")
    assert look(one, end=-5) == NoWindow("nothing was read of tiny between 13:46:40 UTC and 13:46:35 UTC")
    one.time_s = BEGIN_S + 10_000
    late = look(one, end=900)
    assert isinstance(late, NoWindow)
    assert late.reason.startswith("the newest figures of tiny are of 13:48:40 UTC, 780 s before")


def test_one_look_is_no_window() -> None:
    one = Watched()
    show(one.board.of("1", DIGEST, "champion"))
    one.at(0.8)
    one.time_s = BEGIN_S + 10_000
    assert look(one, end=1) == NoWindow("the champion of tiny was read only once in the window")


@pytest.mark.parametrize("set_by_s", [3600.0, -30.0])
def test_a_clock_that_was_set_is_told(set_by_s: float) -> None:
    """Nobody knows which moments the others were; those after it are good again."""
    one = Watched()
    show(one.board.of("1", DIGEST, "champion"))
    one.at(0)
    one.at(40)
    one.set_by_s = set_by_s
    one.at(80 - set_by_s)
    one.at(120 - set_by_s)
    assert look(one) == NoWindow(
        f"the clock of the endpoint at http://here was set by {set_by_s:.0f} s meanwhile"
    )


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """By time, and by the number of values however many versions there are."""
    one = Watched()
    monkeypatch.setattr(history, "_MOST_SNAPSHOTS", 5)
    one.recorder = Recorder(one.board.figures, clock=lambda: one.time_s)
    for second in range(8):
        one.at(second)
    assert one.recorder.between(BEGIN_S, BEGIN_S + 7).history().times_s[0] == BEGIN_S + 3
    monkeypatch.setattr(history, "_MOST_VALUES", 1000)
    for version in range(20):
        show(one.board.of(str(version), DIGEST, "champion"))
        one.at(10 + version)
        assert sum(len(kept.values) for kept in one.recorder._kept) <= max(1000, len(one.recorder._columns))
    assert one.recorder._values == sum(len(kept.values) for kept in one.recorder._kept)
