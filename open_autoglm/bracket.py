"""Who races, who is in the final, and why the others are not: policy over what the screening found.

The hand-tuned baseline and the registered champion are never dropped: every claim is made against them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from open_autoglm.heats import Contest, fallen
from open_autoglm.incumbent import is_registered_bundle
from open_autoglm.limits import flips_miss, keeps_quality
from open_autoglm.measure.racing import HeatReport, Rules
from open_autoglm.measure.scenarios import figure_of
from open_autoglm.objectives import goal_of
from open_autoglm.progress import announce
from open_autoglm.schemas import Fall, Miss, OptimizeSpec, QualityReport, Round, Trial
from open_autoglm.search import rank_figure
from open_autoglm.units import number, quantity

HOPELESS = 2.0
"""Short rounds of one process rank candidates roughly: only who is this many times slower is dropped."""

MOST_ENTRANTS = 6
FINALISTS = 3

MOST_WAVES = 3
"""Entrants are evaluated in waves, a minute or so for each of them: after so many, one sound entrant is
enough to begin with."""

RACE_HEATS = 12
MOST_HEATS = 200


def after_screening(trials: Sequence[Trial], spec: OptimizeSpec) -> list[Trial]:
    """The trials, those stopped that lose too much quality or too many tokens, need too much memory, or are
    hopelessly slow."""
    judged = [_within_limits(trial, spec) for trial in trials]
    ranked = sorted((t for t in judged if _may_fall(t)), key=lambda trial: rank_figure(trial, spec))
    falls = dict(_too_slow(ranked, spec))
    return [_drop(trial, falls[trial.id]) if trial.id in falls else trial for trial in judged]


def _may_fall(trial: Trial) -> bool:
    """An incumbent that is one of the candidates races like any other, so that a study repeated after a
    promotion is the same race; :func:`recall` brings it back for the final."""
    able = trial.status == "ok" and trial.screening is not None
    return able and not trial.candidate.baseline and not is_registered_bundle(trial)


def after_evaluation(trials: Sequence[Trial], spec: OptimizeSpec) -> list[Trial]:
    """The trials, those stopped that lose too much quality or too many tokens by all that was scored."""
    judged = []
    for trial in trials:
        quality = trial.quality
        miss = (_ratio_miss(quality, spec) or flips_miss(quality, spec)) if quality else None
        if not _may_fall(trial) or miss is None:
            judged.append(trial)
            continue
        fall = Fall(stage="evaluation", reason=f"misses {miss.sentence()}")
        judged.append(trial.model_copy(update={**fallen(fall), "misses": (miss,)}))
    return judged


def called_up(trials: Sequence[Trial], spec: OptimizeSpec, waves: int) -> list[Trial]:
    """Who takes the places of entrants that fell in the evaluation, ready to be evaluated, after so many
    ``waves`` of it.

    The screening's own ranking without those that fell: the next in line, also if it was hopeless only beside
    one of them. Nobody once all places are taken, or after ``MOST_WAVES`` if anybody sound is there.
    """
    sound = [trial for trial in trials if _may_fall(trial)]
    if waves >= MOST_WAVES and sound:
        return []
    back = {"status": "ok", "fall": None, "reason": "screened"}
    waiting = [trial.model_copy(update=back) for trial in trials if _waits(trial)]
    ranked = sorted((*sound, *waiting), key=lambda trial: rank_figure(trial, spec))
    still_out = dict(_too_slow(ranked, spec))
    return [trial for trial in waiting if trial.id not in still_out]


def _waits(trial: Trial) -> bool:
    """Stopped by the screening for others' sake: it misses no limit itself."""
    return trial.fall is not None and trial.fall.stage == "screening" and not trial.misses


def best_go_on(trials: Sequence[Trial], spec: OptimizeSpec) -> list[Trial]:
    """The trials, those stopped that are too many for the final, where no race has chosen."""
    ranked = sorted((t for t in trials if _may_fall(t)), key=lambda trial: _standing(trial, spec))
    falls = {
        trial.id: Fall(stage="race", reason=f"place {place} of {len(ranked)}, and {FINALISTS} go on")
        for place, trial in enumerate(ranked, start=1)
        if place > FINALISTS and not trial.candidate.incumbent
    }
    return [t.model_copy(update=fallen(falls[t.id])) if t.id in falls else t for t in trials]


def recall(trials: Sequence[Trial]) -> list[Trial]:
    """The trials, the incumbent back in if it fell: whatever beats it has to do so in the final."""
    back = {"status": "ok", "fall": None, "misses": (), "reason": "the registered champion, for comparison"}
    return [
        t.model_copy(update=back) if t.candidate.incumbent and t.status == "stopped" else t for t in trials
    ]


def _within_limits(trial: Trial, spec: OptimizeSpec) -> Trial:
    if not _may_fall(trial):
        return trial
    miss = _quality_miss(trial, spec) or _memory_miss(trial, spec)
    if miss is None:
        return trial
    return _drop(trial, f"misses {miss.sentence()}").model_copy(update={"misses": (miss,)})


def _quality_miss(trial: Trial, spec: OptimizeSpec) -> Miss | None:
    """Only what the slice leaves no doubt about."""
    quality = trial.quality
    assert quality is not None
    if quality.worse.clear_of_limit and quality.ratio < spec.min_quality:
        return _ratio_miss(quality, spec)
    return flips_miss(quality, spec) if quality.flipping.clear_of_flips else None


def _ratio_miss(quality: QualityReport, spec: OptimizeSpec) -> Miss | None:
    if quality.ratio >= spec.min_quality:
        return None
    decided = f"{quality.worse_path} path, {quality.worse.tokens} tokens"
    return Miss(
        limit="min_quality", allowed=spec.min_quality, measured=quality.ratio, unit="", decided_by=decided
    )


def _memory_miss(trial: Trial, spec: OptimizeSpec) -> Miss | None:
    assert trial.screening is not None
    peak = trial.screening.footprint.peak_rss_bytes
    if spec.max_memory is None or peak <= spec.max_memory.bytes:
        return None
    return Miss(
        limit="max_memory", allowed=spec.max_memory.bytes, measured=peak, unit="bytes", decided_by="peak RSS"
    )


def _too_slow(ranked: Sequence[Trial], spec: OptimizeSpec) -> list[tuple[str, str]]:
    """(id, reason) of those that cannot win, from the best to the worst."""
    found = []
    best = next((trial for trial in ranked if _keeps_quality(trial, spec)), None)
    for place, trial in enumerate(ranked, start=1):
        factor = rank_figure(trial, spec) / rank_figure(best, spec) if best else 1.0
        if best is not None and factor > HOPELESS:
            found.append((trial.id, f"{number(factor)} times worse than {best.id} in short rounds"))
        elif place > MOST_ENTRANTS:
            found.append((trial.id, f"place {place} in short rounds, for {MOST_ENTRANTS} places"))
    return found


def _drop(trial: Trial, reason: str) -> Trial:
    return trial.model_copy(update=fallen(Fall(stage="screening", reason=reason)))


def race_contest(trials: Sequence[Trial], spec: OptimizeSpec) -> Contest | None:
    """Those that may fall, if they are too many for the final and time is what they are judged by."""
    entrants = [trial for trial in trials if _may_fall(trial)]
    goal = goal_of(spec)
    if len(entrants) <= FINALISTS or goal.race_metric is None:
        return None
    rules = Rules(
        figure=figure_of(goal.race_metric),
        metric=goal.race_metric,
        least_heats=3,
        most_heats=RACE_HEATS,
        budget_s=spec.timing_budget_s / 2,
        keep=FINALISTS,
        fit=_within_time(spec),
        on_heat=_tell,
    )
    return Contest(entrants, rules)


def final_contest(trials: Sequence[Trial], spec: OptimizeSpec) -> Contest | None:
    """The best of the race, the baseline and the incumbent, with a twin of the best; None if none is left."""
    able = [t for t in trials if t.status == "ok" and t.screening is not None and t.quality is not None]
    contenders = sorted((t for t in able if _may_fall(t)), key=lambda trial: _standing(trial, spec))
    always = [t for t in able if t.candidate.baseline or t.candidate.incumbent]
    finalists = list({t.id: t for t in (*contenders[:FINALISTS], *always)}.values())
    finalists = [t for t in finalists if _keeps_quality(t, spec) or t in always]
    if not any(_keeps_quality(trial, spec) for trial in finalists):
        return None
    goal = goal_of(spec)
    metric = goal.race_metric or "e2e_ms"
    rules = Rules(
        figure=figure_of(metric),
        metric=metric,
        least_heats=spec.rounds,
        most_heats=max(spec.rounds, MOST_HEATS),
        budget_s=spec.timing_budget_s,
        target_width=spec.target_width,
        leaders=frozenset(t.id for t in finalists if _keeps_quality(t, spec)),
        fit=_within_time(spec),
        on_heat=_tell,
    )
    return Contest(finalists, rules, twin_of=finalists[0].id)


def _keeps_quality(trial: Trial, spec: OptimizeSpec) -> bool:
    return trial.quality is not None and keeps_quality(trial.quality, spec)


def _standing(trial: Trial, spec: OptimizeSpec) -> tuple[bool, float]:
    """By the race's figures where there was one, else by the screening's; lower is better."""
    goal = goal_of(spec)
    if goal.race_metric is not None and trial.measurements is not None:
        figure = figure_of(goal.race_metric)
        counted = sorted(figure(r) for r in trial.measurements.counted)
        return (False, counted[len(counted) // 2])
    return (True, rank_figure(trial, spec))


def _within_time(spec: OptimizeSpec) -> Callable[[Sequence[Round]], bool]:
    """Whether rounds keep the limits on time, so that who breaks one leads nobody out of the race."""
    limits = {"ttft_ms": spec.max_latency, "tpot_ms": spec.max_tpot}
    allowed = [(figure_of(name), limit.ms) for name, limit in limits.items() if limit is not None]

    def fits(rounds: Sequence[Round]) -> bool:
        return all(sorted(map(figure, rounds))[len(rounds) // 2] <= most for figure, most in allowed)

    return fits


def _tell(report: HeatReport) -> None:
    for name, fall in report.fallen.items():
        announce(f"{report.stage}, heat {report.heat + 1}: {name} is out: {fall.reason}")
    if (report.heat + 1) % 5 == 0:
        left = f"{len(report.left)} in, {report.leader} leads, {quantity(report.seconds, 's')}"
        announce(f"{report.stage}, heat {report.heat + 1}: {left}")
