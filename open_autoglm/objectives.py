"""What "better" means: the figure of each objective, and the paired comparison of two finalists by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from open_autoglm.measure.comparison import LEAST_PAIRS, compare, compare_percentile
from open_autoglm.measure.scenarios import figure_of
from open_autoglm.schemas import Comparison, Objective, OptimizeSpec, Race, Trial


@dataclass(frozen=True)
class Goal:
    """The figure an objective is about."""

    metric: str
    larger_is_better: bool
    phrase: str
    race_metric: str | None
    """What rounds are compared by, lower being better; None if rounds cannot tell."""
    percentile: float | None = None

    def value(self, trial: Trial) -> float:
        """The deciding figure: the median, or the percentile if there are enough samples for it."""
        metric = trial.metrics[self.metric]
        return metric.p95 if self.percentile and "p95" not in metric.indicative else metric.median

    def badness(self, trial: Trial) -> float:
        return -self.value(trial) if self.larger_is_better else self.value(trial)


GOALS: dict[Objective, Goal] = {
    "latency": Goal("e2e_ms", False, "time to the last token", "e2e_ms"),
    "ttft": Goal("ttft_ms", False, "time to the first token", "ttft_ms"),
    "ttft_p95": Goal("ttft_ms", False, "p95 of the time to the first token", "ttft_ms", 0.95),
    "tpot": Goal("tpot_ms", False, "time per output token", "tpot_ms"),
    "e2e_p95": Goal("e2e_ms", False, "p95 of the time to the last token", "e2e_ms", 0.95),
    "throughput": Goal("tokens_per_s", True, "decoded tokens per second", "tpot_ms"),
    "goodput": Goal("goodput_rps", True, "requests per second within the limits", "e2e_ms"),
    "memory": Goal("peak_rss_bytes", False, "peak memory", None),
}
_OFFLINE = Goal("throughput_tokens_per_s", True, "tokens per second, prefill included", "e2e_ms")


def goal_of(spec: OptimizeSpec) -> Goal:
    """The figure that ``spec`` wants best."""
    offline = spec.scenario == "offline" and spec.objective == "throughput"
    return _OFFLINE if offline else GOALS[spec.objective]


def duel(
    ours: Trial, theirs: Trial, goal: Goal, confidence: float = 0.95, floor: float = 0.0
) -> Comparison | None:
    """The paired comparison of two finalists by the rounds they ran side by side; None if those are few.

    ``floor`` is the noise floor that a clear difference exceeds.
    """
    compared = _paired(ours, theirs, goal, confidence)
    return compared.model_copy(update={"floor": floor}) if compared else None


def _paired(ours: Trial, theirs: Trial, goal: Goal, confidence: float) -> Comparison | None:
    if ours.measurements is None or theirs.measurements is None or goal.race_metric is None:
        return None
    a, b = ours.measurements.counted, theirs.measurements.counted
    if len(a) != len(b) or len(a) < LEAST_PAIRS:
        return None
    named = (ours.id, theirs.id, goal.race_metric)
    if goal.percentile and "p95" not in ours.metrics[goal.metric].indicative:
        requests = [[getattr(r, goal.race_metric) for r in rounds] for rounds in (a, b)]
        return compare_percentile(*named, *requests, percentile=goal.percentile, confidence=confidence)
    figure = figure_of(goal.race_metric)
    return compare(*named, [figure(r) for r in a], [figure(r) for r in b], confidence)


def change_words(comparison: Comparison) -> str:
    """'E2E 12.3% less (95 % interval -13.5% to -11.0%, 20 paired rounds)'."""
    low, high = comparison.interval
    metric = comparison.metric.removesuffix("_ms").upper()
    way = "less" if comparison.change < 0 else "more"
    return (
        f"{metric} {abs(comparison.change):.1%} {way} ({comparison.confidence * 100:.4g} % interval "
        f"{low:+.1%} to {high:+.1%}, {comparison.pairs} paired rounds)"
    )


def final_of(races: Sequence[Race]) -> Race | None:
    return next((race for race in races if race.stage == "final"), None)


def floor_of(races: Sequence[Race]) -> float:
    """The noise floor that the final found; 0 where there was no twin."""
    final = final_of(races)
    return final.noise.floor if final and final.noise else 0.0
