"""Trials with the figures that a test asks for, as the limits, duels and choices of a study see them."""

from __future__ import annotations

from typing import Any

import numpy as np
from demo_trials import demo_round, demo_workload
from studies import (
    SHAPES,
    measured_trial,
)

from open_autoglm.limits import misses
from open_autoglm.measure.comparison import compare, noise_floor
from open_autoglm.measure.racing import TWIN_SUFFIX
from open_autoglm.measure.scenarios import metrics_of
from open_autoglm.measure.statistics import summarise
from open_autoglm.schemas import Fall, NoiseFloor, OptimizeSpec, Trial


def spec(**limits: Any) -> OptimizeSpec:
    return OptimizeSpec(model_path="here", **{"min_quality": 0.9, **limits})


def trial(
    name: str,
    *,
    ttft_ms: float = 100,
    tpot_ms: float = 10,
    rss: float = 2**30,
    kept: tuple[float, float] = (1, 1),
    rounds: int = 10,
    slowest_ttft_ms: float | None = None,
    own_noise: float = 0.0,
    baseline: bool = False,
    incumbent: bool = False,
) -> Trial:
    """A finalist: rounds within 1 % of the medians, the host's part the same for all candidates.

    One prefill in ten may be slow; ``own_noise`` is by how much only this one is now slower, now quicker.
    """
    measured = measured_trial(SHAPES[0]._replace(id=name, kept=kept))
    assert measured.measurements is not None
    assert measured.screening is not None
    around = np.linspace(0.99, 1.01, rounds) * np.exp(own_noise * np.resize([1, -1], rounds))
    ttft = around * ttft_ms
    if slowest_ttft_ms is not None:
        ttft[::10] = slowest_ttft_ms
    pairs = zip(ttft.tolist(), (around * tpot_ms).tolist(), strict=True)
    taken = tuple(demo_round(index, *times) for index, times in enumerate(pairs))
    metrics = {**metrics_of(demo_workload(), taken), "peak_rss_bytes": summarise([rss], "bytes")}
    footprint = measured.screening.footprint.model_copy(update={"peak_rss_bytes": int(rss)})
    marks = {"reference": False, "baseline": baseline, "incumbent": incumbent}
    return measured.model_copy(
        update={
            "metrics": metrics,
            "measurements": measured.measurements.model_copy(update={"metrics": metrics, "rounds": taken}),
            "screening": measured.screening.model_copy(update={"footprint": footprint}),
            "candidate": measured.candidate.model_copy(update=marks),
        }
    )


def screened_only(name: str, *, e2e_ms: float = 700, **figures: Any) -> Trial:
    """One that left after the screening, with what was found out until then."""
    timed = trial(name, **figures)
    assert timed.screening is not None
    left = {"status": "stopped", "fall": Fall(stage="screening", reason="too slow"), "finalist": False}
    screening = timed.screening.model_copy(update={"estimated_e2e_ms": e2e_ms})
    rough = {"screening": screening, "metrics": {}, "measurements": None, "reason": "screening: too slow"}
    return timed.model_copy(update=left | rough)


def noise_of(floor: float) -> NoiseFloor:
    """An A/A run that found this host to differ from itself by so much."""
    exact = compare("a" + TWIN_SUFFIX, "a", "e2e_ms", [100.0, 101.0, 102.0], [100.0, 101.0, 102.0])
    return noise_floor(exact).model_copy(update={"floor": floor})


def limits_missed(of: Trial, request: OptimizeSpec) -> list[str]:
    return [miss.limit for miss in misses(of, request)]
