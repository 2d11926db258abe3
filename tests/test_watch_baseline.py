"""A baseline knows what a window should take from what was asked of it, and how sure that is."""

from __future__ import annotations

import math

import numpy as np
import pytest
from watched import WINDOW, baseline, histogram, judged, traffic, window

from open_autoglm.monitoring.baseline import Anchor, Baseline, Observation, beside_trial, learn, observe
from open_autoglm.monitoring.lesson import Lesson, attend, next_baseline
from open_autoglm.monitoring.noise import LEAST_WINDOWS
from open_autoglm.monitoring.shift import Point, ShiftPolicy, Track, follow, level_limit

DAY = 24
"""Windows of a first lesson here."""


def observed(count: int, **changes: float) -> list[Observation]:
    found = [observe(traffic(number, **changes)) for number in range(count)]
    return [one for one in found if one is not None]


def learned(observations: list[Observation]) -> Baseline:
    found = learn("demo", "1", "0123456789ab", observations)
    assert found is not None
    return found


def test_it_learns_what_a_token_takes() -> None:
    """Of the prompt 0.9 ms, of an answer 9 ms, on an idle endpoint, from windows of every hour."""
    stages = learned(observed(384)).stages
    _, read_ms, _ = stages["ttft"].coefficients
    token_ms, _, _ = stages["tpot"].coefficients
    assert read_ms == pytest.approx(0.9, rel=0.15)
    assert token_ms == pytest.approx(9, rel=0.1)
    assert stages["tpot"].expected_ms((1, 144, 400 / 900 * 48)) == pytest.approx(9 * 1.044, rel=0.01)


def test_it_knows_its_noise() -> None:
    """Of each window by itself, so that there is no memory in it."""
    noise = learned(observed(384, noise=0.04)).stages["tpot"].noise
    assert noise.between == pytest.approx(0.04, rel=0.2)
    assert noise.memory < 0.1
    assert noise.long_run == pytest.approx(0.04, rel=0.2)
    assert noise.long_run < noise.long_run_at_most < 1.2 * noise.long_run


def test_noise_that_lasts_has_a_memory() -> None:
    """An AR(1) process: the long run is noisier than a window shows."""
    random, drift, found = np.random.default_rng(3), 0.0, []
    for number in range(384):
        drift = 0.9 * drift + random.normal(0, 0.04 * math.sqrt(1 - 0.81))
        found.append(observe(traffic(number, slower=math.exp(drift), noise=0.0)))
    noise = learned([one for one in found if one is not None]).stages["tpot"].noise
    assert 0.6 < noise.memory < 0.9
    assert noise.long_run > 2.5 * noise.between


def test_a_few_bad_windows_do_not_move_it() -> None:
    """One in twelve beside a noisy neighbour."""
    clean = learned(observed(384)).stages["tpot"]
    found = [observe(traffic(n, slower=1.6 if n % 12 == 5 else 1.0)) for n in range(384)]
    dirty = learned([one for one in found if one is not None]).stages["tpot"]
    features = (1.0, 144.0, 20.0)
    assert dirty.expected_ms(features) == pytest.approx(clean.expected_ms(features), rel=0.01)


def test_it_is_less_sure_of_what_it_saw_less_of() -> None:
    short, long = learned(observed(96)).stages["ttft"], learned(observed(384)).stages["ttft"]
    usual, rare = (1.0, 120.0, 21.0), (1.0, 138.0, 34.0)
    assert long.uncertainty(usual) < short.uncertainty(usual)
    assert long.uncertainty(usual) < long.uncertainty(rare)
    assert long.covers(rare)
    assert not long.covers((1.0, 300.0, 21.0))


def test_what_is_in_the_cache_is_not_read() -> None:
    found = observe(window(cached_tokens=400 * 100))
    assert found is not None
    assert found.read_tokens == pytest.approx(20)


def test_a_window_without_answers_teaches_nothing() -> None:
    assert observe(window(requests=0)) is None
    sums = {"sum": math.nan}
    times = {stage: times.model_copy(update=sums) for stage, times in window().times_ms.items()}
    assert observe(window(times_ms=times)) is None
    assert learn("demo", "1", "0", observed(LEAST_WINDOWS - 1)) is None


def test_lengths_that_never_change_are_no_trouble() -> None:
    """What they would do is unknown, so other lengths are not covered."""
    found = [observe(window(number)) for number in range(96)]
    stage = learned([one for one in found if one is not None]).stages["tpot"]
    assert stage.covers((1.0, 144.0, 400 / 900 * 48))
    assert not stage.covers((1.0, 288.0, 400 / 900 * 48))


def test_it_says_how_it_compares_with_the_study() -> None:
    """Learned on a host twice as slow."""
    anchor = Anchor(prompt_tokens=120, output_tokens=48, median_ms={"ttft": 128.0, "tpot": 9.0})
    slow = beside_trial(learned(observed(384, slower=2.0)), anchor)
    assert slow.slower_than_trial["ttft"] == pytest.approx(2, rel=0.1)
    assert Baseline.model_validate_json(slow.model_dump_json()) == slow


def test_the_study_says_nothing_of_lengths_that_nobody_asks() -> None:
    """It read prompts four times as long."""
    anchor = Anchor(prompt_tokens=512, output_tokens=48, median_ms={"ttft": 480.0, "tpot": 9.0})
    assert beside_trial(learned(observed(384)), anchor).slower_than_trial == {}


def test_bursts_do_not_hide_how_long_a_host_drifts() -> None:
    """One window in fifty is half as slow again, and says nothing of the next: the long run is not taken for
    less noisy than that of the drift alone."""
    random, drift, found = np.random.default_rng(4), 0.0, []
    for number in range(672):
        drift = 0.95 * drift + random.normal(0, 0.03 * math.sqrt(1 - 0.95**2))
        burst = 1.5 if number % 50 == 7 else 1.0
        found.append(observe(traffic(number, slower=burst * math.exp(drift), noise=0.0)))
    noise = learned([one for one in found if one is not None]).stages["tpot"].noise
    assert noise.long_run_at_most > 0.03 * math.sqrt(1.95 / 0.05)
    assert noise.long_run_at_most > 1.2 * noise.long_run


# ── lessons ──────────────────────────────────────────────────────────────────────────────────────


def taught(count: int, **changes: float) -> tuple[Lesson, list[int]]:
    """The lesson of so many windows, and after which of them there was a new baseline."""
    lesson, known, when = Lesson(), None, []
    for number in range(count):
        (judgement,), _ = judged([traffic(number, **changes)])
        before, lesson = lesson, attend(lesson, judgement, known, DAY)
        new = next_baseline(before, lesson, "demo", DAY)
        if new is not None:
            known = new
            when.append(number + 1)
    return lesson, when


def test_lessons_double_up_to_a_week() -> None:
    """After which nothing more is learned of what is known."""
    lesson, when = taught(9 * DAY)
    assert when == [DAY, 2 * DAY, 4 * DAY, 7 * DAY]
    assert len(lesson.observations) == 7 * DAY


def test_what_was_never_seen_is_learned_later() -> None:
    """A day of longer prompts is added to what is known."""
    lesson, _ = taught(7 * DAY)
    known = learned(list(lesson.observations))
    when = None
    for number in range(7 * DAY, 9 * DAY):
        (judgement,), _ = judged([traffic(number, prompt_tokens=300.0 + number % 7)])
        before, lesson = lesson, attend(lesson, judgement, known, DAY)
        if (new := next_baseline(before, lesson, "demo", DAY)) is not None:
            known, when = new, number + 1
    assert when == 8 * DAY
    assert known.stages["ttft"].covers((1.0, 300.0, 20.0))


def test_only_health_is_learned_and_only_of_one_version() -> None:
    (fine,), _ = judged([traffic(0)])
    lesson = attend(Lesson(), fine, None, DAY)
    breached = fine.model_copy(update={"state": "breached"})
    assert attend(lesson, breached, None, DAY) == lesson
    assert attend(lesson, fine.model_copy(update={"window": None}), None, DAY) == lesson
    (newer,), _ = judged([traffic(1, version="2")])
    assert [attend(lesson, newer, None, DAY).version, len(attend(lesson, newer, None, DAY).observations)] == [
        "2",
        1,
    ]


# ── the sequential tests ─────────────────────────────────────────────────────────────────────────


def test_windows_at_odd_moments_are_no_jump() -> None:
    """Two that end almost together are still a window apart in what the host may have done."""
    stage = baseline().stages["tpot"]
    track = Track()
    for at, ratio in ((100.4, 0.02), (100.6, 0.07), (101.4, 0.07)):
        point = Point(at=at, log_ratio=ratio, uncertainty=0.01, answers=400)
        track, found = follow(track, point, stage, ShiftPolicy(jump_sigmas=30))
    assert math.isfinite(found.sigmas)
    assert not found.jump


def test_a_noisier_host_needs_more_to_be_called_slow() -> None:
    quiet, noisy = baseline(noise=0.01), baseline(noise=0.05)
    policy = ShiftPolicy()
    limits = [level_limit(known.stages["tpot"].noise, policy) for known in (quiet, noisy)]
    assert limits[1] > 4 * limits[0]


def test_a_short_lesson_judges_no_level() -> None:
    """Its own level is not known to 10 %."""
    stage = baseline(96).stages["tpot"]
    point = Point(at=1, log_ratio=0.3, uncertainty=0.01, answers=400)
    track, found = follow(Track(), point, stage, ShiftPolicy())
    assert (track.sum, found.level) == (0, False)
    assert follow(Track(), point, baseline(384).stages["tpot"], ShiftPolicy())[0].sum > 0.1


def test_a_histogram_may_have_no_count_of_a_stage() -> None:
    """Answers of one token have no time per token."""
    times = {**window().times_ms, "tpot": histogram(1, 0)}
    found = observe(window(times_ms=times))
    assert found is not None
    assert set(found.engine_ms) == {"ttft"}
    assert found.end == window().begin + WINDOW
