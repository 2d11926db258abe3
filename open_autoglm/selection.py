"""From evidence to an answer: the verdict, the champion, the Pareto front, and the ranking.

A registered champion is only replaced by a candidate that is better by more than the noise of this host, with
95 % confidence over all challengers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from open_autoglm.limits import excess, is_complete, misses, unclear
from open_autoglm.measure.comparison import promotes, rounds_needed
from open_autoglm.objectives import Goal, change_words, duel, goal_of
from open_autoglm.reasons import explain, why
from open_autoglm.schemas import Comparison, NoiseFloor, OptimizeSpec, Trial, Verdict, beyond
from open_autoglm.units import percent_as_given

MEMORY_MARGIN = 0.02
"""Peak memory differs by less than this between runs of the same process; a gain must be larger."""


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
    incumbent = next((trial for trial in judged if trial.candidate.incumbent), None)
    verdict, champion, shown = _decide(clear, incumbent, goal, spec, noise)
    others = [t for t in judged if is_complete(t) and t.id != shown.id]
    floor = noise.floor if noise else 0.0
    comparisons = tuple(c for t in others if (c := duel(t, shown, goal, floor=floor)) is not None)
    explained = [explain(trial, shown, goal, verdict.kind, comparisons) for trial in judged]
    reasons = (*verdict.reasons, *why(shown, clear, judged, goal, spec, comparisons, noise))
    verdict = verdict.model_copy(update={"reasons": reasons})
    return Choice(_ranked(explained, goal), verdict, champion, front, comparisons)


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
    if not is_complete(incumbent):
        told = f"the registered champion {incumbent.id} could not be measured again ({incumbent.reason})"
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
    within_noise = (
        noise is not None
        and noise.floor <= spec.target_width
        and not beyond(min(duelled.change, 0.0), noise.floor)
    )
    if duelled.interval[0] > -spec.target_width or (duelled.clear and within_noise):
        least = percent_as_given(spec.target_width)
        keep = f"{told}: no improvement of {least} or beyond noise, so the champion stays"
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
