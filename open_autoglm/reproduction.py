"""Running one trial again, and the judgement whether the result is the same.

The same requests, the same files by digest, the same configuration; what differs in the host, its speed or
the libraries is found out and named, so that a figure that does not come back has its reason. A finalist is
run beside another one of its final: what both lost or gained is the host's, and what is left is the trial's.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal, NamedTuple

from pydantic import Field

from open_autoglm.capsule import peaks, versions
from open_autoglm.errors import StudyError
from open_autoglm.export.store import export_candidate
from open_autoglm.files import sha256_file, write_atomic
from open_autoglm.hardware import probe_hardware
from open_autoglm.heats import Contest, Residents
from open_autoglm.measure.comparison import LEAST_PAIRS, compare
from open_autoglm.measure.environment import host_environment
from open_autoglm.measure.isolation import Failure
from open_autoglm.measure.racing import Rules, run_race
from open_autoglm.measure.scenarios import figure_of
from open_autoglm.objectives import floor_of
from open_autoglm.schemas import (
    Capsule,
    Comparison,
    Hardware,
    Measurements,
    Metric,
    Model,
    Study,
    Trial,
)
from open_autoglm.settings import Settings
from open_autoglm.study import StudyRef
from open_autoglm.trials import Bench, exported_of

MOST_REPRODUCED = 100
"""Rounds of a reproduction, at most."""

JUDGED = ("ttft_ms", "tpot_ms", "e2e_ms")
PEAK_CHANGE = 0.1
"""A change of a measured peak beyond this share is named: less is the measurement's own spread."""

Outcome = Literal["reproduced", "host_changed", "not_reproduced"]
"""``host_changed``: a figure is not what it was, but another finalist's changed alike in the same heats."""


class Reproduced(Model):
    """One figure then and now."""

    metric: str
    then: Metric
    now: Metric
    paired: Comparison = Field(description="now against then, over the same requests")
    within: bool
    companion: Comparison | None = Field(None, description="the companion's own change, now against then")
    beside: Comparison | None = Field(None, description="change of the ratio of trial to companion")
    within_beside: bool = Field(False, description="beside its companion the trial is as it was")


class Reproduction(Model):
    """The outcome of `reproduce`."""

    study_id: str
    trial_id: str
    created: datetime
    outcome: Outcome
    figures: tuple[Reproduced, ...]
    differences: tuple[str, ...] = Field(description="what is not as it was")
    explanation: str


def reproduce(study: Study, trial_id: str, settings: Settings) -> Reproduction:
    """Run one trial of ``study`` again and compare; kept in ``reproductions/`` of the study.

    A figure is reproduced if the intervals of both medians overlap, or if the paired change is below the
    noise floor of the study. If not, the trial's ratio to its companion is asked: is its change within the
    floor, or not told from none, then the host changed and not the trial. Raises StudyError if the trial was
    not timed or its inputs are gone.
    """
    trial = _timed_trial(study, trial_id)
    bench, trial, differences = _restore(study, trial, settings)
    companion = _companion(study, trial)
    together = _run_again(bench, [trial, companion] if companion else [trial], settings)
    now = together[trial.id]
    sides = [Side.of(t, together[t.id]) for t in (trial, companion) if t is not None and t.id in together]
    noise = floor_of(study.races)
    figures = tuple(_compare_then(sides, name, noise) for name in JUDGED)
    hardware = probe_hardware(settings.home / "cache" / "reproduce", remeasure=True)
    capsule = trial.capsule
    assert capsule is not None
    differences += _host_differences(capsule, hardware) + _disturbances(now)
    outcome = _outcome(figures)
    result = Reproduction(
        study_id=study.id,
        trial_id=trial.id,
        created=datetime.now(UTC),
        outcome=outcome,
        figures=figures,
        differences=tuple(differences),
        explanation=_explanation(outcome, figures, differences),
    )
    name = f"{trial.id}-{result.created:%Y%m%d-%H%M%S}.json"
    write_atomic(study.output_dir / "reproductions" / name, result.model_dump_json(indent=1))
    return result


def _timed_trial(study: Study, trial_id: str) -> Trial:
    trial = next((t for t in study.trials if t.id == trial_id), None)
    timed = [t.id for t in study.trials if t.measurements is not None and t.capsule is not None]
    if trial is None or trial.id not in timed:
        problem = "was not timed" if trial else "is not one of its trials"
        raise StudyError(
            f"{trial_id} {problem} in {study.output_dir}: choose one of {', '.join(timed) or 'none'}"
        )
    return trial


def _restore(study: Study, trial: Trial, settings: Settings) -> tuple[Bench, Trial, list[str]]:
    """The bench as it was, the trial with its files, and what is not as it was."""
    path = study.output_dir / "bench.json"
    try:
        bench = Bench.model_validate_json(path.read_bytes())
        found = sha256_file(bench.workload.path)
    except (OSError, ValueError) as error:
        raise StudyError(f"the study's requests cannot be read ({error}): run the study again") from error
    if found != bench.workload.sha256:
        raise StudyError(f"{bench.workload.path} has changed since the study: run the study again")
    if exported_of(trial).path.is_dir():
        return bench, trial, []
    log = bench.study.log_path(f"{trial.id}-reproduce-export")
    exported = export_candidate(trial.candidate, bench.checkpoint, settings, log)
    if isinstance(exported, Failure):
        raise StudyError(f"the files of {trial.id} are gone and cannot be made again: {exported.reason}")
    same = exported.digest == exported_of(trial).digest
    told = [] if same else ["its files had to be made again, and are not byte for byte what they were"]
    return bench, trial.model_copy(update={"exported": exported}), told


def _companion(study: Study, trial: Trial) -> Trial | None:
    """The quickest other finalist whose files are still there; heats of another stage could not be paired."""
    if not trial.finalist:
        return None
    others = [t for t in study.trials if t.finalist and t.id != trial.id and t.measurements is not None]
    there = [t for t in others if exported_of(t).path.is_dir()]
    return min(there, key=lambda t: t.metrics["e2e_ms"].median, default=None)


def _run_again(bench: Bench, trials: Sequence[Trial], settings: Settings) -> dict[str, Measurements]:
    """As many rounds as the first had, up to a limit; the others may fail."""
    trial = trials[0]
    assert trial.measurements is not None
    heats = min(len(trial.measurements.counted), MOST_REPRODUCED)
    rules = Rules(
        figure=figure_of("e2e_ms"),
        metric="e2e_ms",
        least_heats=heats,
        most_heats=heats,
        budget_s=bench.spec.timing_budget_s,
    )
    study = StudyRef(**{**bench.study.model_dump(), "root": bench.study.root / "reproductions"})
    here = bench.model_copy(update={"study": study})
    contest = Contest(trials, rules)
    with Residents(here, "final", contest, settings) as residents:
        residents.open_all(contest.contestants)
        outcome = run_race("final", contest.contestants, residents, rules)
        if failure := outcome.failures.get(trial.id):
            raise StudyError(f"{trial.id} could not be run again: {failure.reason}")
        return {
            name: residents.measurements(name, rounds)
            for name, rounds in outcome.rounds.items()
            if name not in outcome.failures
        }


class Side(NamedTuple):
    """One trial's rounds in the study and now."""

    name: str
    then: Measurements
    now: Measurements

    @classmethod
    def of(cls, trial: Trial, now: Measurements) -> Side:
        assert trial.measurements is not None
        return cls(trial.id, trial.measurements, now)

    def figures(self, metric: str) -> tuple[list[float], list[float]]:
        """(then, now), one number per heat."""
        figure = figure_of(metric)
        return [figure(r) for r in self.then.counted], [figure(r) for r in self.now.counted]


def _compare_then(sides: Sequence[Side], metric: str, noise: float) -> Reproduced:
    """The first of ``sides``, beside the second if there is one."""
    ours, *others = sides
    old, new = ours.then.metrics[metric], ours.now.metrics[metric]
    paired = _paired(ours.name, metric, *ours.figures(metric))
    overlap = old.interval[0] <= new.interval[1] and new.interval[0] <= old.interval[1]
    alone = Reproduced(
        metric=metric, then=old, now=new, paired=paired, within=overlap or abs(paired.change) <= noise
    )
    if not others:
        return alone
    theirs = others[0].figures(metric)
    ratios = (
        [a / b for a, b in zip(mine, other, strict=False)]
        for mine, other in zip(ours.figures(metric), theirs, strict=True)
    )
    beside = _paired(f"{ours.name} / {others[0].name}", metric, *ratios)
    return alone.model_copy(
        update={
            "companion": _paired(others[0].name, metric, *theirs),
            "beside": beside,
            "within_beside": not beside.clear or abs(beside.change) <= noise,
        }
    )


def _paired(name: str, metric: str, then: Sequence[float], now: Sequence[float]) -> Comparison:
    pairs = min(len(then), len(now))
    if pairs < LEAST_PAIRS:
        raise StudyError(f"{name} has fewer than {LEAST_PAIRS} rounds to compare")
    return compare(f"{name} now", f"{name} then", metric, now[:pairs], then[:pairs])


def _outcome(figures: Sequence[Reproduced]) -> Outcome:
    if all(figure.within for figure in figures):
        return "reproduced"
    if all(figure.within or figure.within_beside for figure in figures):
        return "host_changed"
    return "not_reproduced"


def _beside_words(figure: Reproduced) -> str:
    assert figure.companion is not None, "only beside another can the host be told from the trial"
    assert figure.beside is not None
    name = figure.companion.candidate.removesuffix(" now")
    (low, high), change = figure.beside.interval, figure.companion.change
    return f"{name} changed by {change:+.1%} in the same heats (left: {low:+.1%} to {high:+.1%})"


def _host_differences(capsule: Capsule, hardware: Hardware) -> list[str]:
    """What of host and libraries is not as it was, in sentences."""
    now = host_environment()
    told = [
        f"{name.replace('_', ' ')} was {capsule.host[name]} and is {value}"
        for name, value in now.items()
        if capsule.host.get(name, value) != value
    ]
    found = versions()
    told += [
        f"{name} was {old} and is {found.get(name, 'absent')}"
        for name, old in capsule.versions.items()
        if found.get(name) != old
    ]
    for name, rate in peaks(hardware).items():
        old = float(capsule.host.get(name, rate))
        if abs(float(rate) / old - 1) > PEAK_CHANGE:
            told.append(f"the host's {name.replace('_', ' ')} was {old:g} and is {rate}")
    return told


def _disturbances(now: Measurements) -> list[str]:
    if not now.noisy_rounds:
        return []
    reasons = sorted({reason for r in now.counted for reason in r.conditions.disturbances})
    return [f"{now.noisy_rounds} of {len(now.counted)} rounds were disturbed: {'; '.join(reasons[:3])}"]


def _explanation(outcome: Outcome, figures: Sequence[Reproduced], differences: Sequence[str]) -> str:
    if outcome == "reproduced":
        return "every figure is within what the study measured"
    outside = [figure for figure in figures if not figure.within]
    off = ", ".join(f"{f.metric} {f.paired.change:+.1%}" for f in outside)
    if outcome == "host_changed":
        return f"not as measured ({off}), but {'; '.join(map(_beside_words, outside))}: it is the host"
    if differences:
        return f"not as measured ({off}), and these are not as they were: {'; '.join(differences)}"
    return (
        f"not as measured ({off}), though host, libraries, files and requests are as they were: the host's "
        "neighbours or its clock may differ in ways the kernel does not tell"
    )
