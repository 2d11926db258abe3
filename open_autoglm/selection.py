"""From evidence to an answer: which limits each trial meets, the Pareto front, the champion, and why.

A limit on TTFT is a limit on its p95. A p95 may decide only with enough samples for it
(:func:`open_autoglm.measure.statistics.least_samples`); with fewer the median decides, and the answer
says so. A limit is met when the whole interval meets it. A registered champion is only replaced by a
candidate that is better by more than the noise of this host, with 95 % confidence over all challengers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from open_autoglm.measure.comparison import compare, compare_percentile, promotes, rounds_needed
from open_autoglm.measure.scenarios import figure_of
from open_autoglm.schemas import (
    Comparison,
    Metric,
    Miss,
    NoiseFloor,
    Objective,
    OptimizeSpec,
    Race,
    Trial,
    Verdict,
)
from open_autoglm.units import quantity

MEMORY_MARGIN = 0.02
"""Peak memory differs by less than this between runs of the same process; a gain must be larger."""

LEAST_PAIRS = 3


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


@dataclass(frozen=True)
class Choice:
    """The outcome of :func:`choose`."""

    trials: tuple[Trial, ...]
    verdict: Verdict
    champion: str | None
    pareto: tuple[str, ...]
    comparisons: tuple[Comparison, ...] = ()
    """The champion (or the best challenger) against each other finalist."""


def choose(trials: Sequence[Trial], spec: OptimizeSpec, noise: NoiseFloor | None = None) -> Choice:
    """Judge all trials against the spec's limits and objective; ranked, with a reason for each.

    The incumbent, if one was measured, is the trial whose candidate says so.
    """
    judged = [_judge(trial, spec) for trial in trials]
    goal = goal_of(spec)
    front = pareto_front(judged)
    feasible = sorted((t for t in judged if t.feasible), key=goal.badness)
    clear = [trial for trial in feasible if not unclear(trial, spec)]
    if not clear:
        verdict = _insufficient(feasible, spec) if feasible else _nothing_feasible(judged)
        return Choice(_ranked(judged, goal), verdict, None, front)
    incumbent = next((t for t in judged if t.candidate.incumbent and is_complete(t)), None)
    verdict, champion, shown = _decide(clear, incumbent, goal, spec, noise)
    others = [t for t in judged if is_complete(t) and t.id != shown.id]
    comparisons = tuple(c for t in others if (c := duel(t, shown, goal)) is not None)
    explained = [_explain(trial, shown, goal, verdict.kind, comparisons) for trial in judged]
    reasons = (*verdict.reasons, *_why(shown, clear, judged, goal, spec, comparisons, noise))
    verdict = verdict.model_copy(update={"reasons": reasons})
    return Choice(_ranked(explained, goal), verdict, champion, front, comparisons)


def is_complete(trial: Trial) -> bool:
    """Timed to the end and judged: fit to be chosen."""
    return trial.status == "ok" and trial.finalist and bool(trial.metrics) and trial.quality is not None


# ── limits ───────────────────────────────────────────────────────────────────────────────────────


def misses(trial: Trial, spec: OptimizeSpec) -> tuple[Miss, ...]:
    """The limits that a complete trial does not meet."""
    assert trial.quality is not None
    found = []
    if spec.max_latency is not None:
        value, decided_by = _latency_figure(trial.metrics["ttft_ms"])
        found.append(_over("max_latency", spec.max_latency.ms, value, "ms", decided_by))
    if spec.max_tpot is not None:
        tpot_ms = trial.metrics["tpot_ms"].median
        found.append(_over("max_tpot", spec.max_tpot.ms, tpot_ms, "ms", "median TPOT"))
    if spec.max_memory is not None:
        peak_rss = trial.metrics["peak_rss_bytes"].median
        found.append(_over("max_memory", spec.max_memory.bytes, peak_rss, "bytes", "peak RSS"))
    quality = trial.quality
    if quality.ratio < spec.min_quality:
        found.append(
            Miss(
                limit="min_quality",
                allowed=spec.min_quality,
                measured=quality.ratio,
                unit="",
                decided_by=f"{quality.worse_path} path",
            )
        )
    return tuple(miss for miss in found if miss is not None)


def _latency_figure(ttft_ms: Metric) -> tuple[float, str]:
    if "p95" in ttft_ms.indicative:
        return ttft_ms.median, f"median TTFT; {ttft_ms.samples} samples are too few for p95 to decide"
    return ttft_ms.p95, f"p95 TTFT of {ttft_ms.samples} samples"


def _over(limit: str, allowed: float, measured: float, unit: str, decided_by: str) -> Miss | None:
    if measured <= allowed:
        return None
    return Miss(limit=limit, allowed=allowed, measured=measured, unit=unit, decided_by=decided_by)


def unclear(trial: Trial, spec: OptimizeSpec) -> str | None:
    """What keeps a trial that meets every limit from meeting it beyond doubt; None if nothing does."""
    limits = (("ttft_ms", spec.max_latency, "TTFT"), ("tpot_ms", spec.max_tpot, "TPOT"))
    for name, limit, word in limits:
        if limit is None:
            continue
        metric = trial.metrics[name]
        if name == "ttft_ms" and "p95" not in metric.indicative:
            continue  # the binomial count behind `indicative` is the confidence
        if metric.interval[1] > limit.ms:
            low, high = (quantity(end, "ms") for end in metric.interval)
            return f"the interval of its median {word}, {low} to {high}, holds the limit {limit}"
    return None


def excess(miss: Miss) -> float:
    """How far beyond its limit, as a share of the limit."""
    if miss.limit == "min_quality":
        return 1 - miss.measured / miss.allowed
    return miss.measured / miss.allowed - 1


def _judge(trial: Trial, spec: OptimizeSpec) -> Trial:
    if not is_complete(trial):
        return trial
    missed = misses(trial, spec)
    reason = "misses " + "; ".join(miss.sentence() for miss in missed) if missed else trial.reason
    return trial.model_copy(update={"misses": missed, "feasible": not missed, "reason": reason})


# ── the decision ─────────────────────────────────────────────────────────────────────────────────


def _decide(
    clear: Sequence[Trial], incumbent: Trial | None, goal: Goal, spec: OptimizeSpec, noise: NoiseFloor | None
) -> tuple[Verdict, str | None, Trial]:
    """(verdict with its first reasons, the champion's id, the trial to tell about)."""
    best = clear[0]
    if incumbent is None:
        return Verdict(kind="champion", reasons=()), best.id, best
    if best.id == incumbent.id:
        told = "it is the registered champion, measured again beside its challengers, and none is better"
        return Verdict(kind="champion", reasons=(told,)), best.id, best
    if not incumbent.feasible:
        told = f"the registered champion {incumbent.id} no longer will do: it {incumbent.reason}"
        return Verdict(kind="champion", reasons=(told,)), best.id, best
    return _challenge(best, incumbent, len(clear) - (incumbent in clear), goal, spec, noise)


def _challenge(
    best: Trial,
    incumbent: Trial,
    challengers: int,
    goal: Goal,
    spec: OptimizeSpec,
    noise: NoiseFloor | None,
) -> tuple[Verdict, str | None, Trial]:
    if goal.race_metric is None:
        return _challenge_by_memory(best, incumbent)
    duelled = duel(best, incumbent, goal, confidence=1 - 0.05 / max(1, challengers))
    if duelled is None:
        told = f"{best.id} and the registered champion {incumbent.id} have no rounds in common"
        return Verdict(kind="insufficient_evidence", reasons=(told,), nearest=best.id), None, best
    told = f"against the registered champion {incumbent.id}: {change_words(duelled)}"
    if promotes(duelled, noise):
        return Verdict(kind="champion", reasons=(told,)), best.id, best
    # Less than the target width is no improvement anyone would notice, and so is what noise can do.
    within_noise = noise is not None and noise.floor <= spec.target_width and -duelled.change <= noise.floor
    if duelled.interval[0] > -spec.target_width or (duelled.clear and within_noise):
        keep = f"{told}: no improvement of {spec.target_width:.0%} or beyond noise, so the champion stays"
        return Verdict(kind="tie", reasons=(keep,), nearest=best.id), incumbent.id, incumbent
    if duelled.clear and noise is not None:
        quiet = f"two processes of one candidate differ by up to {noise.floor:.1%}: a quieter host would tell"
        return Verdict(kind="insufficient_evidence", reasons=(told, quiet), nearest=best.id), None, best
    more = (
        f"about {rounds_needed(duelled, spec.target_width)} rounds would tell (--rounds, --timing-budget-s)"
    )
    reasons = (f"{told}: that does not tell whether it is better; {more}",)
    return Verdict(kind="insufficient_evidence", reasons=reasons, nearest=best.id), None, best


def _challenge_by_memory(best: Trial, incumbent: Trial) -> tuple[Verdict, str | None, Trial]:
    ours, theirs = (t.metrics["peak_rss_bytes"].median for t in (best, incumbent))
    told = f"peak memory {ours / theirs - 1:+.1%} against the registered champion {incumbent.id}"
    if ours < theirs * (1 - MEMORY_MARGIN):
        return Verdict(kind="champion", reasons=(told,)), best.id, best
    keep = f"{told}: less than {MEMORY_MARGIN:.0%} is no improvement, so the champion stays"
    return Verdict(kind="tie", reasons=(keep,), nearest=best.id), incumbent.id, incumbent


def duel(ours: Trial, theirs: Trial, goal: Goal, confidence: float = 0.95) -> Comparison | None:
    """The paired comparison of two finalists by the rounds they ran side by side; None if those are few."""
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


def _insufficient(feasible: Sequence[Trial], spec: OptimizeSpec) -> Verdict:
    best = feasible[0]
    doubt = unclear(best, spec)
    more = "more rounds (--rounds, --timing-budget-s) would narrow it, or relax the limit a little"
    return Verdict(
        kind="insufficient_evidence",
        reasons=(f"{best.id} is best of those that meet every limit, but {doubt}: {more}",),
        nearest=best.id,
    )


def _nothing_feasible(judged: Sequence[Trial]) -> Verdict:
    # Who left early has only its first miss on record, so those that ran to the end come first.
    missing = [t for t in judged if t.misses and is_complete(t)] or [t for t in judged if t.misses]
    if missing:
        nearest = min(missing, key=lambda trial: max(excess(miss) for miss in trial.misses))
        by = "; ".join(f"{miss.sentence()}, {excess(miss):.1%} beyond" for miss in nearest.misses)
        return Verdict(
            kind="nothing_feasible",
            reasons=("no candidate meets every limit", f"nearest is {nearest.id}, which misses {by}"),
            nearest=nearest.id,
        )
    counts = {
        status: sum(t.status == status for t in judged) for status in sorted({t.status for t in judged})
    }
    told = ", ".join(f"{count} {status}" for status, count in counts.items())
    return Verdict(
        kind="nothing_feasible",
        reasons=(f"no candidate could be timed and judged: {told or 'none proposed'}",),
    )


# ── the Pareto front and the ranking ─────────────────────────────────────────────────────────────


def pareto_front(trials: Sequence[Trial]) -> tuple[str, ...]:
    """Ids of the trials that none beats in latency, memory and quality at once.

    Who left early counts with what was found out until then.
    """
    known = [(trial.id, costs) for trial in trials if (costs := _costs(trial)) is not None]

    def dominated(own: tuple[float, float, float]) -> bool:
        return any(
            other != own and all(a <= b for a, b in zip(other, own, strict=True)) for _, other in known
        )

    return tuple(name for name, costs in known if not dominated(costs))


def _costs(trial: Trial) -> tuple[float, float, float] | None:
    """(milliseconds to the last token, bytes, quality lost)."""
    if trial.status not in ("ok", "stopped") or trial.quality is None or trial.screening is None:
        return None
    timed = trial.metrics.get("e2e_ms")
    e2e_ms = timed.median if timed else trial.screening.estimated_e2e_ms
    return e2e_ms, float(trial.screening.footprint.peak_rss_bytes), -trial.quality.ratio


def _ranked(trials: Sequence[Trial], goal: Goal) -> tuple[Trial, ...]:
    """Feasible first and best first; then the infeasible, those out of the race, the failed, the vetoed."""

    def rank(trial: Trial) -> tuple[int, float]:
        if is_complete(trial):
            return (0 if trial.feasible else 1, goal.badness(trial))
        if trial.status == "stopped" and trial.screening is not None:
            return (2, -_last_heat(trial))
        return (4, 0.0) if trial.status == "vetoed" else (3, 0.0)

    return tuple(sorted(trials, key=rank))


def _last_heat(trial: Trial) -> float:
    return -1 if trial.fall is None or trial.fall.heat is None else trial.fall.heat


# ── words ────────────────────────────────────────────────────────────────────────────────────────


def _explain(
    trial: Trial, champion: Trial, goal: Goal, verdict: str, comparisons: Sequence[Comparison]
) -> Trial:
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


def _why(
    champion: Trial,
    clear: Sequence[Trial],
    judged: Sequence[Trial],
    goal: Goal,
    spec: OptimizeSpec,
    comparisons: Sequence[Comparison],
    noise: NoiseFloor | None,
) -> tuple[str, ...]:
    reasons = [_figure_reason(champion, clear, goal), *_quality_reasons(champion, spec)]
    baseline = next((t for t in judged if t.candidate.baseline and is_complete(t)), None)
    if baseline is not None and baseline.id != champion.id:
        reasons.append(_against(champion, baseline))
    if spec.max_latency is not None:
        value, decided_by = _latency_figure(champion.metrics["ttft_ms"])
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
        f"({quality.worse_path}); {spec.min_quality:.0%} was asked for"
    ]
    worse = quality.worse
    if not worse.clear_of_limit:
        least, most = worse.ratio_interval
        reasons.append(
            f"its quality is not clear of the limit: {least:.2%} to {most:.2%} after {worse.tokens} tokens; "
            "more quality tokens would tell"
        )
    return reasons


def _against(champion: Trial, baseline: Trial) -> str:
    """Time by paired rounds; memory as it is."""

    def gain(metric: str) -> str:
        compared = duel(champion, baseline, Goal(metric, False, "", metric))
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


def final_of(races: Sequence[Race]) -> Race | None:
    return next((race for race in races if race.stage == "final"), None)
