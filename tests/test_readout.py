"""The words and figures that the page, the plots and the terminal share."""

from __future__ import annotations

import pytest
from studies import CHAMPION, demo_study

from open_autoglm import readout
from open_autoglm.measure.statistics import summarise
from open_autoglm.schemas import Miss, Trial


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1245.3, "1,245"),
        (81.04, "81.0"),
        (8.919, "8.92"),
        (0.01234, "0.0123"),
        (0, "0"),
        (1e9, "1,000,000,000"),
    ],
)
def test_numbers_have_three_digits_and_no_exponent(value: float, shown: str) -> None:
    """Figures are as precise as the measurement is worth."""
    assert readout.number(value) == shown


def engine(seconds: list[float], name: str = "ttft_ms") -> Trial:
    trial = demo_study().trials[0]
    return trial.model_copy(update={"metrics": {name: summarise(seconds, "ms")}, "measurements": None})


def test_finalists_are_compared_by_their_pairs() -> None:
    """Noise that both share cancels, so the interval is narrower than that of the medians alone."""
    study = demo_study()
    ours, theirs = study.trial("onnxruntime-fp32"), study.trial(CHAMPION)
    paired = readout.compare("tokens_per_s", ours, theirs)
    lost = [trial.model_copy(update={"measurements": None}) for trial in (ours, theirs)]
    medians = readout.compare("tokens_per_s", *lost)
    assert paired is not None
    assert medians is not None
    assert (paired.pairs, medians.pairs) == (10, 0)
    assert paired.high - paired.low < 0.6 * (medians.high - medians.low)
    assert readout.ratio_words("tokens_per_s", paired) == "1.96× slower"


def test_a_comparison_tells_the_direction_and_its_interval() -> None:
    """Half the time is 2× faster; the interval holds the ratio and is wider than either median's alone."""
    fast, slow = engine([48, 49, 50, 50, 51, 52]), engine([97, 99, 100, 100, 101, 103])
    ratio = readout.compare("ttft_ms", fast, slow)
    assert ratio is not None
    assert readout.ratio_words("ttft_ms", ratio) == "2.00× faster"
    assert ratio.low < 100 / 52 < 2 < 100 / 48 < ratio.high
    back = readout.compare("ttft_ms", slow, fast)
    assert back is not None
    assert readout.ratio_words("ttft_ms", back) == "2.00× slower"
    assert readout.ratio_interval(back) == readout.ratio_interval(ratio)


def test_overlapping_engines_are_not_told_apart() -> None:
    """A ratio whose interval holds 1 is no difference."""
    ratio = readout.compare(
        "ttft_ms", engine([90, 95, 100, 105, 110, 99]), engine([92, 96, 103, 104, 111, 98])
    )
    assert ratio is not None
    assert readout.ratio_words("ttft_ms", ratio) == "no clear difference"


def test_a_comparison_needs_the_metric_on_both_sides() -> None:
    """Nothing is compared with what was not measured."""
    assert readout.compare("tpot_ms", engine([1.0, 2.0]), engine([1.0, 2.0])) is None


def test_a_miss_is_told_in_the_units_people_use() -> None:
    """Memory is in MiB, quality in percent."""
    memory = Miss(limit="max_memory", allowed=2**30, measured=1.5 * 2**30, unit="bytes", decided_by="")
    quality = Miss(limit="min_quality", allowed=0.99, measured=0.9801, unit="", decided_by="decode path")
    flips = Miss(limit="max_token_flips", allowed=0.1, measured=0.134, unit="", decided_by="decode path")
    assert readout.miss_words(flips) == "token flips 13.4 %, limit 10.0 %, 34.0 % beyond"
    assert readout.miss_words(memory) == "peak memory 1,536 MiB, limit 1,024 MiB, 50.0 % beyond"
    assert readout.miss_words(quality) == "quality kept 98.0 %, limit 99.0 %, 1.0 % beyond"
    narrowly = quality.model_copy(update={"measured": 0.98979})
    assert readout.miss_words(narrowly) == "quality kept 98.98 %, limit 99.00 %, 0.02 % beyond"


@pytest.mark.parametrize(
    ("floor", "words"), [(0.0, "1.05× slower"), (0.04, "1.05× slower"), (0.06, "no clear difference")]
)
def test_a_ratio_below_the_noise_floor_is_no_clear_difference(floor: float, words: str) -> None:
    """However narrow its interval is."""
    ratio = readout.Ratio(1 / 1.05, 1 / 1.06, 1 / 1.04, pairs=10, floor=floor)
    assert readout.ratio_words("e2e_ms", ratio) == words


def test_the_table_heeds_the_noise_floor() -> None:
    """A finalist that differs by less than two processes of one candidate is not called slower."""
    study = demo_study()
    other = next(t for t in study.trials if readout.standing(study, t).endswith("slower"))
    noisy = [
        race.model_copy(update={"noise": race.noise.model_copy(update={"floor": 100.0})})
        if race.noise
        else race
        for race in study.races
    ]
    deaf = study.model_copy(update={"races": tuple(noisy)})
    assert readout.standing(deaf, other) == "no clear difference"
