"""What the host does to everybody is told apart from the engine, as far as its pace was seen to tell."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from services import Loop, event_loop, fleet_of
from watched import judged, traffic

from open_autoglm.monitoring.baseline import Baseline, learn, observe
from open_autoglm.monitoring.host_pace import host_effect
from open_autoglm.monitoring.shift import Point, ShiftPolicy, Track, follow
from open_autoglm.schemas.watch import LatencyWindow
from open_autoglm.serving import pace
from open_autoglm.serving.pace import HostPace

WEEK = 672
DRIFT, MEMORY = 0.05, 0.97

Floats = NDArray[np.float64]


def wandering(count: int, seed: int, drift: float = DRIFT) -> Floats:
    random, found = np.random.default_rng(seed), np.zeros(count)
    for number in range(1, count):
        found[number] = MEMORY * found[number - 1] + random.normal(0, drift * math.sqrt(1 - MEMORY**2))
    return found


HOST = wandering(WEEK + 400, 5)
"""As a logarithm: slower by several per cent for hours."""


def seen(number: int, *, engine: float = 1.0, host: float = 1.0, timed: bool = True) -> LatencyWindow:
    """The ``number``-th window on that host, whose pace tells nearly all."""
    slow = host * math.exp(HOST[number])
    error = float(np.random.default_rng((2, number)).normal(0, 0.005))
    pace_ms = {"pace_ms": 1.3 * slow * math.exp(error)} if timed else {}
    return traffic(number, slower=engine * slow, **pace_ms)


def taught(windows: list[LatencyWindow]) -> Baseline:
    observations = [one for one in map(observe, windows) if one is not None]
    found = learn("demo", "1", "0123456789ab", observations)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def known() -> Baseline:
    return taught([seen(number) for number in range(WEEK)])


def states(windows: list[LatencyWindow], baseline: Baseline) -> list[str]:
    return [one.state for one in judged(windows, baseline)[0]]


# ── what is learned ──────────────────────────────────────────────────────────────────────────────


def test_it_learns_how_far_the_engine_follows_its_host(known: Baseline) -> None:
    """What then remains is a fraction of what was there before."""
    for watched, paced in known.paced.items():
        assert paced.host.slope == pytest.approx(1, abs=0.15)
        assert paced.expectation.noise.between < 0.5 * known.stages[watched].noise.between
    assert set(known.paced) == {"ttft", "tpot"}
    assert Baseline.model_validate_json(known.model_dump_json()) == known


def test_two_that_wander_by_themselves_are_not_related() -> None:
    """Their levels seem so: over a week they correlate by more than 0.2 in most cases."""
    ends, levels, slopes = np.arange(WEEK, dtype=float), [], []
    for seed in range(40):
        one, other = wandering(WEEK, seed), wandering(WEEK, 100 + seed)
        levels.append(abs(float(np.corrcoef(one, other)[0, 1])))
        slopes.append(host_effect(one, np.exp(other), ends))
    assert np.median(levels) > 0.15
    assert sum(slope is not None for slope in slopes) <= 1


def test_a_pace_that_says_nothing_changes_nothing() -> None:
    """As of a processor beside a GPU."""
    other = wandering(WEEK, 9)
    windows = [traffic(n, slower=math.exp(HOST[n]), pace_ms=math.exp(other[n])) for n in range(WEEK)]
    assert taught(windows).paced == {}


def test_a_pace_that_is_seldom_timed_is_left_out() -> None:
    assert taught([seen(number, timed=number % 2 == 0) for number in range(WEEK)]).paced == {}


# ── what is judged by it ─────────────────────────────────────────────────────────────────────────


def test_a_host_that_drifts_is_no_shift_and_a_slower_engine_is(known: Baseline) -> None:
    assert set(states([seen(WEEK + n) for n in range(200)], known)) == {"ok"}
    found, _ = judged([seen(WEEK + n, engine=1.0 if n < 4 else 1.15) for n in range(16)], known)
    first = [one.state for one in found].index("breached")
    assert 5 <= first < 16
    assert any("of a host whose pace makes it" in reason for one in found for reason in one.reasons)
    assert "ttft_host_share" in found[0].figures


def test_a_neighbour_that_is_worse_than_any_before_is_a_breach(known: Baseline) -> None:
    """Its pace is as much slower, and is believed only as far as it was seen to go."""
    assert "breached" in states([seen(WEEK + n, host=1.0 if n < 4 else 1.5) for n in range(8)], known)


def test_without_a_pace_the_host_is_part_of_the_noise(known: Baseline) -> None:
    """A busy endpoint times none; ratios of either kind are not compared with each other."""
    found, _ = judged([seen(WEEK, timed=True), seen(WEEK + 1, timed=False)], known)
    assert ["ttft_host_share" in one.figures for one in found] == [True, False]
    point = Point(at=1, log_ratio=0.2, uncertainty=0.01, answers=400, beside_host=True)
    by = known.stages["tpot"]
    track, _ = follow(Track(), point, by, ShiftPolicy())
    other, _ = follow(track, point.model_copy(update={"at": 2, "beside_host": False}), by, ShiftPolicy())
    assert (len(track.recent), len(other.recent)) == (1, 1)


# ── how it is timed ──────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    with event_loop(tmp_path_factory.mktemp("logs")) as running:
        yield running


def test_it_is_timed_while_nobody_is_answered(loop: Loop, tiny_bundle: Path) -> None:
    """Not while a client holds a place, nor if one came meanwhile."""
    service = loop.serve(tiny_bundle)
    fleet = fleet_of(service)

    def timed() -> float:
        return sum(f.value for f in fleet.history._look() if f.name == "autoglm_host_pace_seconds_count")

    def seconds() -> float:
        return sum(f.value for f in fleet.history._look() if f.name == "autoglm_host_pace_seconds_sum")

    async def scenes() -> list[float]:
        found, work = [], HostPace()
        await pace._time_once(fleet, work)
        found.append(timed())
        with service.places(1):
            await pace._time_once(fleet, work)
        found.append(timed())
        timing = asyncio.create_task(pace._time_once(fleet, work))
        await asyncio.sleep(0)  # it has seen that all is quiet
        service.begun += 1
        await timing
        found.append(timed())
        service.ended += 1
        await pace._time_once(fleet, work)
        return [*found, timed()]

    assert loop.runner.run(scenes()) == [1, 1, 1, 2]
    assert 0 < seconds() < 10


def test_it_is_timed_again_and_again(loop: Loop, tiny_bundle: Path) -> None:
    fleet = fleet_of(loop.serve(tiny_bundle))

    async def until_three() -> None:
        task = asyncio.create_task(pace.keep_pace(fleet, every_s=0.01))
        async with asyncio.timeout(60):
            while "pace_seconds_count{" not in (told := fleet.exposition().decode()) or "} 3.0" not in told:
                await asyncio.sleep(0.01)
        task.cancel()

    loop.runner.run(until_three())
