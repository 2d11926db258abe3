"""The simulated traffic is what it says, and the published figures are those that were asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.watch import HOSTS, main, run_faults, run_healthy
from benchmarks.watch_causes import SCENARIOS, totals
from benchmarks.watch_results import FAULTS, FIRST_SEED, SOON, TODAY, TOLD, USUAL, Results, report
from benchmarks.watch_traffic import DAY, Demand, Host, Service, World, bounds, windows

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
STEADY = Host(drift=0.0, bursts_per_day=0)


def test_the_traffic_has_the_rate_and_the_hours_it_says() -> None:
    found = list(windows(World(host=STEADY), 7 * DAY, 1))
    counts = np.array([one.requests for one in found]).reshape(7, DAY)
    assert counts[:5].mean() / 900 == pytest.approx(0.7, rel=0.03)
    assert counts[:5].mean(axis=0).argmax() == pytest.approx(15 * 4, abs=6)
    assert counts[5:].mean() / counts[:5].mean() == pytest.approx(0.75, rel=0.05)


def test_an_idle_endpoint_takes_what_its_service_says() -> None:
    """20 ms and 0.9 ms per token of the prompt, 9 ms per token after it."""
    quiet = World(host=STEADY, demand=Demand(per_s=0.05), service=Service(request_noise=0.0))
    one = list(windows(quiet, 40, 1))[-1]
    tokens, ttft, tpot = one.prompt_tokens.mean, one.times_ms["ttft"].mean, one.times_ms["tpot"].mean
    assert tokens is not None
    assert ttft == pytest.approx(20 + 0.9 * tokens, rel=0.02)
    assert tpot == pytest.approx(9, rel=0.02)
    assert one.times_ms["ttft"].bounds == tuple(
        1000 * bound for bound in bounds()["vllm:time_to_first_token_seconds"]
    )


def test_a_change_begins_when_it_says() -> None:
    """The windows before are the same, and the rest is slower; its load is not."""
    world = replace(World(host=STEADY), service=Service(request_noise=0.0))
    fine, slow = (list(windows(w, 8, 5)) for w in (world, world.changed(at=3.5, engine=2.0)))
    assert fine[:3] == slow[:3]
    means = [one.times_ms["tpot"].mean for one in slow]
    assert all(mean is not None for mean in means)
    assert 11 < (means[3] or 0) < 16
    assert (means[5] or 0) > 17
    assert [one.requests for one in fine] == [one.requests for one in slow]


def test_three_times_the_load_waits() -> None:
    """At the height of the day there are not slots for it."""
    loaded = list(windows(World(host=STEADY).changed(at=0, demand=3.0), 4, 1, first=58))
    assert (loaded[0].times_ms["queue"].quantile(0.95) or 0) > 1000
    assert (
        sum(one.refused for one in windows(World(host=STEADY).changed(at=0, demand=9.0), 4, 1, first=58)) > 0
    )


def test_four_healthy_days_are_quiet_and_a_fifth_slower_is_found() -> None:
    assert run_healthy(USUAL, 1, days=4).breaches == ()
    (found,) = run_faults(USUAL, 7, [("engine", {"engine": 1.2})])
    assert found.after in (0, 1, SOON)


def published() -> Results:
    return Results.model_validate_json((RESULTS / "watch.json").read_text())


def test_the_published_figures_are_as_asked() -> None:
    """Where the host drifts by 3 % for two hours, and no claim is made for worse ones."""
    cell = published().of(USUAL)
    assert len(cell.healthy) >= 20
    assert [month.breaches for month in cell.healthy if month.breaches] == []
    soon, tried = cell.found("engine", 1.2, SOON)
    assert soon >= 0.95 * tried > 0
    today, tried = cell.found("engine", 1.1, TODAY)
    assert today >= 0.8 * tried > 0


def test_a_pace_that_tells_is_of_use() -> None:
    """On the same hosts more is found, and of what was to be found within two windows nearly all."""
    told, alone = (published().of(host) for host in (TOLD, replace(TOLD, told=None)))
    assert told.found("engine", 1.2, SOON)[0] > 2 * alone.found("engine", 1.2, SOON)[0]
    assert told.found("engine", 1.1, TODAY)[0] > alone.found("engine", 1.1, TODAY)[0]


def test_the_published_causes_are_named_right() -> None:
    """Of every scenario, the ones that nobody can tell for certain included."""
    rows = published().causes
    assert {row.scenario for row in rows} == set(SCENARIOS)
    right, breaches = totals(rows)
    assert right >= 0.9 * breaches > 0


def test_what_is_published_was_not_tuned_on() -> None:
    results = published()
    assert results.seeds == "evaluation"
    seeds = {one.seed for cell in results.cells for one in (*cell.healthy, *cell.faults)}
    assert min(seeds) >= FIRST_SEED["evaluation"]


def test_the_published_tables_are_of_the_published_figures() -> None:
    results = published()
    assert (RESULTS / "watch.md").read_text() == report(results)
    assert {fault.kind for fault in results.of(USUAL).faults} == set(FAULTS)


def test_one_command_publishes_all_of_it(tmp_path: Path) -> None:
    """Small, and of the tuning seeds, which is said."""
    few = ["--days", "1", "--healthy", "1", "--faulty", "1", "--repeats", "1", "--workers", "1"]
    main(["--seeds", "tuning", *few, "--output", str(tmp_path)], standalone_mode=False)
    results = Results.model_validate_json((tmp_path / "watch.json").read_text())
    assert {cell.host for cell in results.cells} == set(HOSTS)
    assert all(cell.faults[0].seed == 1000 and cell.healthy[0].seed == 0 for cell in results.cells)
    text = (tmp_path / "watch.md").read_text()
    assert "no rates to rely on" in text
    assert "| all |" in text
