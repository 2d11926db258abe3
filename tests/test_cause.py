"""Causes of a breach: arithmetic that leaves nothing over, each verdict, and how often it is right."""

from __future__ import annotations

import json
from typing import Any

import pytest
from windows import golden, host, probe, window

from benchmarks.watch_causes import SCENARIOS, run_row, table
from open_autoglm.measure.statistics import median_ratio
from open_autoglm.monitoring.cause import name_cause
from open_autoglm.monitoring.decomposition import (
    Speed,
    decompose,
    figures_of,
    load_growth,
    log_mean,
    slowness_by_load,
)
from open_autoglm.monitoring.signs import signs_of
from open_autoglm.schemas import Cause, Conditions, EndpointProbe, GpuConditions, LatencyWindow, Stage

BEFORE = window()
SLOWER = {"read_ms": 180.0, "write_ms": 1620.0}
"""1.8 times as long for every token."""
FOREIGN = Conditions(foreign_cores=1.0)


def named(now: LatencyWindow, at: EndpointProbe, **more: Any) -> Cause:
    return name_cause(BEFORE, now, at, **{"baseline": probe(), **more})


# ── the decomposition ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stage", ["e2e", "ttft", "queue"])
def test_nothing_is_left_over(stage: Stage) -> None:
    """However much changes at once, the parts are the change."""
    now = window(queue_ms=400, read_ms=350, write_ms=2000, prompt_tokens=500, output_tokens=41)
    was, is_now = figures_of(BEFORE), figures_of(now)
    assert was is not None
    assert is_now is not None
    parts = decompose(was, is_now, Speed(1.2, 1.5), stage)
    assert parts.change_ms == pytest.approx(is_now.stage_ms(stage) - was.stage_ms(stage))


def test_what_changes_alone_is_all_of_it() -> None:
    """Twice the tokens at the same pace, or the same tokens at half of it."""
    was = figures_of(BEFORE)
    longer = figures_of(window(write_ms=1800, output_tokens=61))
    slower = figures_of(window(read_ms=200, write_ms=1800))
    assert was is not None
    assert longer is not None
    assert slower is not None
    assert decompose(was, longer, Speed()) == pytest.approx((0, 900, 0, 0, 0))
    assert decompose(was, slower, Speed(2, 2)) == pytest.approx((0, 0, 1000, 0, 0))
    assert decompose(was, slower, Speed()).company_ms == pytest.approx(1000)
    assert decompose(was, longer, Speed(), "tpot") == pytest.approx((0, 0, 0, 0, 0))


def test_the_load_is_a_product_of_its_factors() -> None:
    """Arrivals × work × slowness, each by its logarithm."""
    was = figures_of(BEFORE)
    now = figures_of(window(seconds=500, read_ms=400, write_ms=1800, prompt_tokens=400, output_tokens=61))
    assert was is not None
    assert now is not None
    growth = load_growth(was, now, Speed(2, 1))
    assert growth["arrivals"] == pytest.approx(0.693, abs=1e-3)
    assert growth["mix"] == pytest.approx(0.693, abs=1e-3)
    assert growth["speed"] == pytest.approx(0.0953, abs=1e-3)  # reading is a tenth of the work
    assert log_mean(2, 2) == 2
    assert 2 < log_mean(2, 3) < 2.5


def test_a_prompt_from_the_cache_is_not_read() -> None:
    found = figures_of(window(cached_tokens=150_000))
    assert found is not None
    assert found.read_tokens == 50


def test_the_load_of_one_server_tells_its_slowness() -> None:
    """With one request at a time on the mean the load is a half; twice the time for each makes it whole."""
    was = figures_of(window(queue_ms=0))
    now = figures_of(window(queue_ms=98_000, read_ms=100, write_ms=900))
    assert was is not None
    assert now is not None
    assert (was.load, now.load) == pytest.approx((0.5, 0.99))
    assert slowness_by_load(was, now) == pytest.approx(1.98)


def test_the_interval_of_a_ratio_holds_both_medians() -> None:
    ratio, (low, high) = median_ratio([20, 22, 21], [10, 11, 10.5])
    assert ratio == pytest.approx(2)
    assert (low, high) == pytest.approx((20 / 11, 2.2))
    assert median_ratio([30.0], [10.0]) == (3, (3, 3))
    with pytest.raises(ValueError, match="at least one of each"):
        median_ratio([1.0], [])


# ── verdicts ─────────────────────────────────────────────────────────────────────────────────────


def test_more_requests_are_load() -> None:
    cause = named(window(seconds=500, queue_ms=500, write_ms=1400), probe())
    assert cause.kind == "load"
    assert "2 requests a second instead of 1" in cause.told
    assert cause.evidence["load_ms"] == pytest.approx(990)
    assert cause.evidence["unexplained_ms"] == pytest.approx(0)


def test_requests_that_wait_though_no_more_came_are_load() -> None:
    cause = named(window(queue_ms=700), probe())
    assert cause.kind == "load"
    assert "closer together" in cause.told


def test_larger_requests_are_mix() -> None:
    cause = named(window(read_ms=1000, prompt_tokens=2000, queue_ms=60), probe())
    assert cause.kind == "mix"
    assert "2000 tokens to read instead of 200" in cause.told


def test_a_queue_is_the_mixes_if_only_the_requests_grew() -> None:
    """Twice as many tokens to write, and a wait that is longer than the answer."""
    cause = named(window(write_ms=1800, output_tokens=61, queue_ms=5000), probe())
    assert cause.kind == "mix"
    assert cause.evidence["mix_ms"] == pytest.approx(5890)


def test_a_slower_engine_on_a_quiet_host_is_the_engine() -> None:
    cause = named(window(**SLOWER), probe(golden(1.8)))
    assert cause.kind == "engine"
    assert "1.80 times as long for the golden requests (1.73 to 1.87)" in cause.told
    assert cause.evidence["speed_known_by"] == "golden requests"


def test_a_rehearsal_is_told_and_judged_all_the_same() -> None:
    """Whoever made the engine slower on purpose reads so, and nobody takes it for a fault of its own."""
    at = probe(golden(1.8))
    true, rehearsed = (
        named(window(**SLOWER), one) for one in (at, at.model_copy(update={"slowed_share": 0.8}))
    )
    told = f"{true.told}; it is a rehearsal: `open-autoglm slow` made the engine 80% slower"
    assert (true.kind, rehearsed.kind, rehearsed.told) == ("engine", "engine", told)
    assert rehearsed.evidence == {**true.evidence, "slowed_on_purpose_share": 0.8}


def test_a_slower_engine_with_a_neighbour_is_the_environment() -> None:
    busy = host(FOREIGN, busiest="backup (812)", busiest_cores=0.97)
    cause = named(window(**SLOWER), probe(golden(1.8), busy))
    assert cause.kind == "environment"
    assert "other processes took 0.99 cores, most of it backup (812) (0.97)" in cause.told


def test_a_neighbour_that_takes_little_does_not_excuse_the_engine() -> None:
    """A tenth of a core can make it 1.1 times as slow, and not 1.8 times."""
    cause = named(window(**SLOWER), probe(golden(1.8), host(Conditions(foreign_cores=0.11))))
    assert cause.kind == "engine"
    assert 0 < cause.evidence["environment_ms"] < cause.evidence["engine_ms"]  # type: ignore[operator]


def test_a_neighbour_that_was_always_there_is_no_cause() -> None:
    cause = named(
        window(**SLOWER), probe(golden(1.8), host(FOREIGN)), baseline=probe(golden(), host(FOREIGN))
    )
    assert cause.kind == "engine"


def test_a_neighbour_beside_an_engine_that_is_as_fast_as_ever_is_no_cause() -> None:
    """There are cores to spare: twice as many requests are what it is."""
    cause = named(window(seconds=500, queue_ms=500, write_ms=1400), probe(golden(), host(FOREIGN)))
    assert cause.kind == "load"


def test_another_library_is_the_environment() -> None:
    cause = named(window(**SLOWER), probe(golden(1.8), onnxruntime="1.27.0"))
    assert cause.kind == "environment"
    assert "onnxruntime was 1.26.0 and is 1.27.0" in cause.told


def test_the_engine_is_not_blamed_before_the_host_was_looked_at() -> None:
    cause = named(window(**SLOWER), probe(golden(1.8)).model_copy(update={"host": None}))
    assert cause.kind == "unknown"
    assert "nobody looked at the host" in cause.told


def test_slow_writing_alone_is_seen() -> None:
    cause = named(window(write_ms=1500), probe(golden(1.0, writing=1.67)))
    assert cause.kind == "engine"


def test_tokens_that_come_together_hide_the_phase_and_not_the_whole() -> None:
    """Each phase of both probes is anything, and yet every request takes three times as long."""
    then, now = golden(), golden(3.0)
    early, late = 0.02, 1.9
    hidden = [
        one.model_copy(
            update={
                "ttft_ms": tuple(ms * share for ms, share in zip(one.ttft_ms, torn, strict=True)),
                "tpot_ms": tuple(ms * (2 - share) for ms, share in zip(one.tpot_ms, torn, strict=True)),
            }
        )
        for one, torn in ((now, [late, early, late, late, early] * 2), (then, [early, late] * 5))
    ]
    cause = named(window(read_ms=300, write_ms=2700), probe(hidden[0]), baseline=probe(hidden[1]))
    assert cause.kind == "engine"
    assert cause.evidence["golden_e2e_ratio"] == pytest.approx(3)
    assert "alone it takes 3.00 times as long" in cause.told  # and not what some phase may have taken


def test_what_was_over_before_the_probe_has_no_cause() -> None:
    """Tokens took longer, but neither traffic nor the engine alone explains it."""
    cause = named(window(**SLOWER), probe())
    assert cause.kind == "unknown"
    assert cause.evidence["unexplained_ms"] == pytest.approx(800)
    assert "no cause that is seen" in cause.told


def test_a_small_rise_may_be_chance() -> None:
    cause = named(window(write_ms=960), probe(golden(1.8)))
    assert cause.kind == "unknown"
    assert "may be chance" in cause.told


def test_without_answers_there_is_nothing_to_say() -> None:
    cause = named(window(requests=0), probe())
    assert (cause.kind, cause.evidence) == ("unknown", {})


def test_a_first_token_has_causes_of_its_own() -> None:
    """It takes three times as long; of the whole answer that is nothing to speak of."""
    now = window(queue_ms=210, read_ms=110, write_ms=6000)
    before = window(write_ms=6000)
    whole = name_cause(before, now, probe(), probe())
    first = name_cause(before, now, probe(), probe(), stage="ttft")
    assert whole.kind == "unknown"
    assert first.kind == "load"
    assert "a first token takes more" in first.told


def test_refusals_have_a_cause_though_who_was_answered_waited_no_longer() -> None:
    cause = named(window(refused=900), probe())
    assert cause.kind == "load"
    assert "900 requests were refused instead of 0" in cause.told


def test_who_is_never_alone_is_judged_by_the_load() -> None:
    """No golden request had the time, and no more is asked of it."""
    swamped = probe(golden(count=1, busy=0.97))
    now = window(queue_ms=9000, read_ms=250, write_ms=2300)
    cause = named(now, swamped)
    assert cause.kind == "engine"
    assert cause.evidence["speed_known_by"] == "load"
    assert "never alone" in cause.told
    crowded = named(window(seconds=400, queue_ms=9000, read_ms=250, write_ms=2300), swamped)
    assert crowded.kind == "load"


def test_without_a_baseline_only_the_host_can_be_blamed() -> None:
    assert named(window(**SLOWER), probe(golden(1.8)), baseline=None).kind == "unknown"
    busy = probe(golden(1.8), host(FOREIGN))
    cause = named(window(**SLOWER), busy, baseline=None)
    assert cause.kind == "environment"
    assert cause.evidence["speed_known_by"] == "signs on the host"


def test_the_studys_figures_show_a_gross_slowdown_only() -> None:
    study = probe(study=True)
    assert named(window(**SLOWER), probe(golden(1.8)), baseline=study).kind == "unknown"
    gross = window(read_ms=400, write_ms=3600)
    assert named(gross, probe(golden(4.0)), baseline=study).kind == "engine"


def test_golden_requests_of_another_shape_are_not_compared() -> None:
    other = golden(1.8).model_copy(update={"prompt_tokens": 64})
    assert named(window(**SLOWER), probe(other)).kind == "unknown"
    stranger = probe().model_copy(update={"bundle_digest": "f" * 12})
    assert named(window(**SLOWER), probe(golden(1.8)), baseline=stranger).kind == "unknown"


def test_that_nothing_could_be_timed_is_told() -> None:
    """A starved engine answers no golden request in its time; then the host's signs are all there is."""
    starved = golden(count=0).model_copy(update={"ended": "not two golden requests were answered in 30 s"})
    cause = named(window(**SLOWER), probe(starved, host(FOREIGN)))
    assert cause.kind == "environment"
    assert cause.evidence["golden_ended"] == starved.ended
    assert named(window(**SLOWER), probe(starved)).kind == "unknown"


def test_evidence_can_be_stored() -> None:
    """No infinity, which JSON has not, although a sign may be of unknown size."""
    cause = named(window(**SLOWER), probe(golden(1.8), onnxruntime="1.27.0"))
    json.dumps(dict(cause.evidence), allow_nan=False)
    assert cause.evidence["sign_1"] == "onnxruntime was 1.26.0 and is 1.27.0"


# ── signs on the host ────────────────────────────────────────────────────────────────────────────

GPU = GpuConditions(name="H100", clock_mhz=1980)


@pytest.mark.parametrize(
    ("changes", "told", "factor"),
    [
        ({"conditions": Conditions(foreign_cores=0.51, steal_cores=0.5)}, "the hypervisor took 0.50", 2.0),
        ({"throttled_share": 0.5}, "its CPU quota was used up in 50% of the periods", 2.0),
        ({"memory_pressure_share": 0.5}, "somebody waited for memory in 50%", 2.0),
        (
            {"conditions": Conditions(foreign_cores=0.0, swapped_pages=150_000)},
            "waited for memory in 50%",
            2.0,
        ),
        ({"clock_mhz": 2000.0}, "the clock fell to 67%", 1.5),
        ({"clock_mhz": None, "thermal_events": 3}, "heat slowed its cores 3 times", float("inf")),
        ({"gpus": (GPU.model_copy(update={"clock_mhz": 990}),)}, "runs at 990 MHz instead of 1980", 2.0),
        (
            {"gpus": (GPU.model_copy(update={"foreign_processes": ("process 7",)}),)},
            "H100 also computes for process 7",
            float("inf"),
        ),
    ],
)
def test_a_sign_says_what_and_how_much(changes: dict[str, Any], told: str, factor: float) -> None:
    (sign,) = signs_of(probe(at=host(**changes)), probe(at=host(gpus=(GPU,))))
    assert told in sign.told
    assert sign.factor == pytest.approx(factor, rel=0.03)


def test_a_host_as_it_was_shows_no_sign() -> None:
    assert signs_of(probe(), probe()) == ()
    assert signs_of(probe(), None) == ()


# ── how often it is right ────────────────────────────────────────────────────────────────────────


def test_nine_in_ten_causes_are_named_right() -> None:
    """On a simulated endpoint; of those that the windows can tell, no scenario is a matter of luck."""
    rows = [run_row(name, repeats=6, seed=1) for name in SCENARIOS]
    right, breaches = sum(row.right for row in rows), sum(row.breaches for row in rows)
    assert breaches > 90
    assert right / breaches >= 0.9, table(rows)
    assert all(row.right / row.breaches > 0.5 for row in rows if row.cause != "unknown"), table(rows)
