"""From evidence to an answer: which limits each trial meets, the Pareto front, the champion, and why.

A limit on TTFT is a limit on its p95. A p95 may decide only with enough samples for it
(:data:`open_autoglm.measure.statistics.P95_SAMPLES`); with fewer the median decides, and the answer
says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from open_autoglm.schemas import Metric, Miss, Objective, OptimizeSpec, Trial, Verdict
from open_autoglm.units import quantity


@dataclass(frozen=True)
class Goal:
    """The figure an objective is about."""

    metric: str
    larger_is_better: bool
    phrase: str

    def badness(self, trial: Trial) -> float:
        value = trial.metrics[self.metric].median
        return -value if self.larger_is_better else value


GOALS: dict[Objective, Goal] = {
    "latency": Goal("e2e_ms", False, "time to the last token"),
    "throughput": Goal("tokens_per_s", True, "decoded tokens per second"),
    "memory": Goal("peak_rss_bytes", False, "peak memory"),
}


@dataclass(frozen=True)
class Choice:
    """The outcome of :func:`choose`."""

    trials: tuple[Trial, ...]
    verdict: Verdict
    champion: str | None
    pareto: tuple[str, ...]


def choose(trials: Sequence[Trial], spec: OptimizeSpec) -> Choice:
    """Judge all trials against the spec's limits and objective; ranked, with a reason for each."""
    judged = [_judge(trial, spec) for trial in trials]
    goal = GOALS[spec.objective]
    complete = [trial for trial in judged if is_complete(trial)]
    feasible = sorted((trial for trial in complete if trial.feasible), key=goal.badness)
    front = pareto_front(complete)
    if not feasible:
        verdict = _nothing_feasible(complete, judged)
        return Choice(_ranked(judged, goal), verdict, None, front)
    champion = feasible[0]
    explained = [_explain(trial, champion, goal) for trial in judged]
    verdict = Verdict(kind="champion", reasons=_why(champion, feasible[1:], complete, goal, spec))
    return Choice(_ranked(explained, goal), verdict, champion.id, front)


def is_complete(trial: Trial) -> bool:
    """Timed and judged: fit to be compared."""
    return trial.status == "ok" and bool(trial.metrics) and trial.quality is not None


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
    if ttft_ms.p95_indicative:
        return ttft_ms.median, f"median TTFT; {ttft_ms.samples} samples are too few for p95 to decide"
    return ttft_ms.p95, f"p95 TTFT of {ttft_ms.samples} samples"


def _over(limit: str, allowed: float, measured: float, unit: str, decided_by: str) -> Miss | None:
    if measured <= allowed:
        return None
    return Miss(limit=limit, allowed=allowed, measured=measured, unit=unit, decided_by=decided_by)


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


def pareto_front(trials: Sequence[Trial]) -> tuple[str, ...]:
    """Ids of the complete trials that none beats in latency, memory and quality at once."""

    def costs(trial: Trial) -> tuple[float, float, float]:
        assert trial.quality is not None
        metrics = trial.metrics
        return metrics["e2e_ms"].median, metrics["peak_rss_bytes"].median, -trial.quality.ratio

    def dominated(trial: Trial) -> bool:
        own = costs(trial)
        return any(
            other != own and all(a <= b for a, b in zip(other, own, strict=True))
            for other in map(costs, trials)
        )

    return tuple(trial.id for trial in trials if not dominated(trial))


def _explain(trial: Trial, champion: Trial, goal: Goal) -> Trial:
    if not trial.feasible:
        return trial
    if trial.id == champion.id:
        return trial.model_copy(update={"reason": f"best {goal.phrase} of those that meet every limit"})
    ours, best = trial.metrics[goal.metric], champion.metrics[goal.metric]
    ratio = best.median / ours.median if goal.larger_is_better else ours.median / best.median
    worse = "less" if goal.larger_is_better else "more"
    reason = (
        f"meets every limit, but {goal.phrase} is {quantity(ours.median, ours.unit)}, {ratio:.2f}× {worse} "
        "than the champion's"
    )
    if _overlap(ours, best):
        reason += " (the intervals overlap: not told apart by these samples)"
    return trial.model_copy(update={"reason": reason})


def _overlap(a: Metric, b: Metric) -> bool:
    return a.interval[0] <= b.interval[1] and b.interval[0] <= a.interval[1]


def _why(
    champion: Trial, others: Sequence[Trial], complete: Sequence[Trial], goal: Goal, spec: OptimizeSpec
) -> tuple[str, ...]:
    assert champion.quality is not None
    metric = champion.metrics[goal.metric]
    low, high = (quantity(bound, metric.unit) for bound in metric.interval)
    figure = quantity(metric.median, metric.unit)
    reasons = [
        f"best {goal.phrase} of {len(others) + 1} candidates that meet every limit: median {figure}, "
        f"95 % interval {low} to {high}, {metric.samples} samples",
        f"keeps {champion.quality.ratio:.2%} of the reference's quality on the worse path "
        f"({champion.quality.worse_path}); {spec.min_quality:.0%} was asked for",
    ]
    worse = champion.quality.worse
    if not worse.clear_of_limit:
        least, most = worse.ratio_interval
        reasons.append(
            f"its quality is not clear of the limit: {least:.2%} to {most:.2%} after {worse.tokens} tokens; "
            "more quality tokens would tell"
        )
    baseline = next((trial for trial in complete if trial.candidate.baseline), None)
    if baseline is not None and baseline.id != champion.id:
        reasons.append(_against(champion, baseline))
    if spec.max_latency is not None:
        value, decided_by = _latency_figure(champion.metrics["ttft_ms"])
        reasons.append(f"TTFT {quantity(value, 'ms')} is within {spec.max_latency} ({decided_by})")
    if others and _overlap(metric, others[0].metrics[goal.metric]):
        reasons.append(f"{others[0].id} is so close that these samples do not tell the two apart")
    return tuple(reasons)


def _against(champion: Trial, baseline: Trial) -> str:
    def gain(name: str, better: str, worse: str, *, larger_is_better: bool = False) -> str:
        before, after = baseline.metrics[name], champion.metrics[name]
        if _overlap(before, after):
            return "no clear difference"
        ratio = before.median / after.median
        ratio = 1 / ratio if larger_is_better else ratio
        return f"{ratio:.2f}× {better}" if ratio >= 1 else f"{1 / ratio:.2f}× {worse}"

    return (
        f"against hand-tuned torch ({baseline.id}): TTFT {gain('ttft_ms', 'faster', 'slower')}; "
        f"decode {gain('tokens_per_s', 'faster', 'slower', larger_is_better=True)}; "
        f"memory {gain('peak_rss_bytes', 'less', 'more')}"
    )


def _nothing_feasible(complete: Sequence[Trial], judged: Sequence[Trial]) -> Verdict:
    if complete:
        nearest = min(complete, key=lambda trial: max(excess(miss) for miss in trial.misses))
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


def _ranked(trials: Sequence[Trial], goal: Goal) -> tuple[Trial, ...]:
    """Feasible first and best first; then the infeasible, the failed, the vetoed."""

    def rank(trial: Trial) -> tuple[int, float]:
        if is_complete(trial):
            return (0 if trial.feasible else 1, goal.badness(trial))
        return (3, 0.0) if trial.status == "vetoed" else (2, 0.0)

    return tuple(sorted(trials, key=rank))
