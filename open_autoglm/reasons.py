"""Why: the answer's reasons, and what became of each of the others, in sentences."""

from __future__ import annotations

from collections.abc import Sequence

from open_autoglm.limits import is_complete, latency_figure
from open_autoglm.objectives import Goal, change_words, duel
from open_autoglm.schemas import Comparison, NoiseFloor, OptimizeSpec, Trial
from open_autoglm.units import percent_as_given, quantity


def explain(
    trial: Trial, champion: Trial, goal: Goal, verdict: str, comparisons: Sequence[Comparison]
) -> Trial:
    """The trial with what became of it; only those that meet every limit have anything left to explain."""
    if not trial.feasible:
        return trial
    if trial.id == champion.id:
        told = {
            "tie": "stays champion",
            "insufficient_evidence": f"best {goal.phrase}, but not shown to beat the registered champion",
        }.get(verdict, f"best {goal.phrase} of those that meet every limit")
        return trial.model_copy(update={"reason": told})
    ours, best = trial.metrics[goal.metric], champion.metrics[goal.metric]
    reason = f"meets every limit; {goal.phrase} {quantity(goal.value(trial), ours.unit)}"
    paired = next((c for c in comparisons if c.candidate == trial.id), None)
    if paired is not None and not paired.clear:
        reason += f", not told apart from {champion.id}: {change_words(paired)}"
    elif paired is not None:
        reason += f": {change_words(paired)}"
    else:
        reason += f", the champion's is {quantity(goal.value(champion), best.unit)}"
    return trial.model_copy(update={"reason": reason})


def why(
    champion: Trial,
    clear: Sequence[Trial],
    judged: Sequence[Trial],
    goal: Goal,
    spec: OptimizeSpec,
    comparisons: Sequence[Comparison],
    noise: NoiseFloor | None,
) -> tuple[str, ...]:
    """What speaks for ``champion``, and how sure that is."""
    reasons = [_figure_reason(champion, clear, goal), *_quality_reasons(champion, spec)]
    baseline = next((t for t in judged if t.candidate.baseline and is_complete(t)), None)
    if baseline is not None and baseline.id != champion.id:
        reasons.append(_against(champion, baseline, noise.floor if noise else 0.0))
    if spec.max_latency is not None:
        value, decided_by = latency_figure(champion.metrics["ttft_ms"])
        reasons.append(f"TTFT {quantity(value, 'ms')} is within {spec.max_latency} ({decided_by})")
    tied = [c.candidate for c in comparisons if not c.clear and c.candidate in {t.id for t in clear}]
    if tied:
        reasons.append(f"not told apart from it: {', '.join(tied)}")
    if noise is not None:
        reasons.append(
            f"noise floor of this host: {noise.floor:.1%} between two processes of the same candidate "
            f"({noise.comparison.pairs} paired rounds); a difference of {noise.detectable:.1%} would be found"
        )
    return tuple(reasons)


def _figure_reason(champion: Trial, clear: Sequence[Trial], goal: Goal) -> str:
    metric = champion.metrics[goal.metric]
    low, high = (quantity(bound, metric.unit) for bound in metric.interval)
    decided = "p95" if goal.value(champion) != metric.median else "median"
    best = "best " if champion.id == clear[0].id else ""
    field = f"{len(clear)} finalists that meet" if len(clear) > 1 else "the only finalist that meets"
    return (
        f"{best}{goal.phrase} of {field} every limit: {decided} "
        f"{quantity(goal.value(champion), metric.unit)}, 95 % interval of the median {low} to {high}, "
        f"{metric.samples} samples"
    )


def _quality_reasons(champion: Trial, spec: OptimizeSpec) -> list[str]:
    quality = champion.quality
    assert quality is not None
    reasons = [
        f"keeps {quality.ratio:.2%} of the reference's quality on the worse path "
        f"({quality.worse_path}); {percent_as_given(spec.min_quality)} was asked for",
        f"its likeliest token is not the reference's at {quality.flipping.token_flips:.1%} of positions "
        f"({quality.flipping_path}); {percent_as_given(spec.max_token_flips)} is allowed",
    ]
    worse = quality.worse
    if not worse.clear_of_limit:
        least, most = worse.ratio_interval
        reasons.append(
            f"its quality is not clear of the limit: {least:.2%} to {most:.2%} after {worse.tokens} tokens; "
            "more quality tokens would tell"
        )
    return reasons


def _against(champion: Trial, baseline: Trial, floor: float) -> str:
    """Time by paired rounds; memory as it is."""

    def gain(metric: str) -> str:
        compared = duel(champion, baseline, Goal(metric, False, "", metric), floor=floor)
        if compared is None or not compared.clear:
            return "no clear difference"
        ratio = 1 / (1 + compared.change)
        return f"{ratio:.2f}× faster" if ratio >= 1 else f"{1 / ratio:.2f}× slower"

    memory = baseline.metrics["peak_rss_bytes"].median / champion.metrics["peak_rss_bytes"].median
    less = f"{memory:.2f}× less" if memory >= 1 else f"{1 / memory:.2f}× more"
    return (
        f"against hand-tuned torch ({baseline.id}), paired: TTFT {gain('ttft_ms')}; "
        f"decode {gain('tpot_ms')}; memory {less}"
    )
