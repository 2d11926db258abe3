"""The capsule: what it takes to run one trial again, and the judgement whether the result is the same.

The same requests, the same files by digest, the same configuration; what differs in the host, its speed or
the libraries is found out and named, so that a figure that does not come back has its reason.
"""

from __future__ import annotations

import shlex
from datetime import UTC, datetime
from importlib.metadata import version

from pydantic import Field

from open_autoglm.errors import StudyError
from open_autoglm.export.routes import library_versions
from open_autoglm.export.store import export_candidate
from open_autoglm.files import sha256_file, write_atomic
from open_autoglm.hardware import probe_hardware
from open_autoglm.heats import Contest, Residents
from open_autoglm.measure.comparison import LEAST_PAIRS, compare
from open_autoglm.measure.environment import host_environment
from open_autoglm.measure.isolation import Failure
from open_autoglm.measure.racing import Rules, run_race
from open_autoglm.measure.scenarios import figure_of
from open_autoglm.objectives import final_of
from open_autoglm.schemas import (
    Capsule,
    Comparison,
    Hardware,
    Measurements,
    Metric,
    Model,
    Race,
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


def with_capsule(bench: Bench, trial: Trial) -> Trial:
    """The trial with its capsule, if it was timed."""
    if trial.measurements is None or trial.exported is None:
        return trial
    command = f"open-autoglm reproduce {shlex.quote(str(bench.study.root))} {trial.id}"
    capsule = Capsule(
        command=command,
        seed=bench.spec.seed,
        candidate=trial.candidate,
        checkpoint_digest=bench.checkpoint.digest,
        export_digest=trial.exported.digest,
        workload_sha256=bench.workload.sha256,
        fingerprint=bench.hardware.fingerprint,
        host=host_environment() | _peaks(bench.hardware),
        versions=_versions(),
    )
    return trial.model_copy(update={"capsule": capsule})


def _versions() -> dict[str, str]:
    return library_versions() | {"open-autoglm": version("open-autoglm")}


def _peaks(hardware: Hardware) -> dict[str, str]:
    rates = {
        "read_bandwidth_gb_per_s": hardware.read_bandwidth_bytes_per_s,
        "matmul_fp32_gflop_per_s": hardware.matmul_fp32_flops_per_s,
        "matmul_bf16_gflop_per_s": hardware.matmul_bf16_flops_per_s,
        "matmul_int8_gop_per_s": hardware.matmul_int8_ops_per_s,
    }
    return {name: f"{rate / 1e9:.1f}" for name, rate in rates.items() if rate}


# ── running it again ─────────────────────────────────────────────────────────────────────────────


class Reproduced(Model):
    """One figure then and now."""

    metric: str
    then: Metric
    now: Metric
    paired: Comparison = Field(description="now against then, over the same requests")
    within: bool


class Reproduction(Model):
    """The outcome of `reproduce`."""

    study_id: str
    trial_id: str
    created: datetime
    reproduced: bool
    figures: tuple[Reproduced, ...]
    differences: tuple[str, ...] = Field(description="what is not as it was")
    explanation: str


def reproduce(study: Study, trial_id: str, settings: Settings) -> Reproduction:
    """Run one trial of ``study`` again and compare; kept in ``reproductions/`` of the study.

    A figure is reproduced if the intervals of both medians overlap, or if the paired change is below the
    noise floor of the study. Raises StudyError if the trial was not timed or its inputs are gone.
    """
    trial = _timed_trial(study, trial_id)
    bench, trial, differences = _restore(study, trial, settings)
    then, now = trial.measurements, _run_again(bench, trial, settings)
    assert then is not None
    noise = _noise_of(study.races)
    figures = tuple(_compare_then(trial.id, name, then, now, noise) for name in JUDGED)
    hardware = probe_hardware(settings.home / "cache" / "reproduce", remeasure=True)
    capsule = trial.capsule
    assert capsule is not None
    differences += _host_differences(capsule, hardware) + _disturbances(now)
    reproduced = all(figure.within for figure in figures)
    result = Reproduction(
        study_id=study.id,
        trial_id=trial.id,
        created=datetime.now(UTC),
        reproduced=reproduced,
        figures=figures,
        differences=tuple(differences),
        explanation=_explanation(reproduced, figures, differences),
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


def _run_again(bench: Bench, trial: Trial, settings: Settings) -> Measurements:
    """As many rounds as it had, up to a limit, alone."""
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
    with Residents(here, "final", Contest([trial], rules), settings) as residents:
        outcome = run_race("final", [trial.id], residents, rules)
        if failure := outcome.failures.get(trial.id):
            raise StudyError(f"{trial.id} could not be run again: {failure.reason}")
        return residents.measurements(trial.id, outcome.rounds[trial.id])


def _compare_then(name: str, metric: str, then: Measurements, now: Measurements, noise: float) -> Reproduced:
    figure = figure_of(metric)
    pairs = min(len(then.counted), len(now.counted))
    if pairs < LEAST_PAIRS:
        raise StudyError(f"{name} has fewer than {LEAST_PAIRS} rounds to compare")
    before = [figure(r) for r in then.counted[:pairs]]
    after = [figure(r) for r in now.counted[:pairs]]
    paired = compare(f"{name} now", f"{name} then", metric, after, before)
    old, new = then.metrics[metric], now.metrics[metric]
    overlap = old.interval[0] <= new.interval[1] and new.interval[0] <= old.interval[1]
    within = overlap or abs(paired.change) <= noise
    return Reproduced(metric=metric, then=old, now=new, paired=paired, within=within)


def _noise_of(races: tuple[Race, ...]) -> float:
    final = final_of(races)
    return final.noise.floor if final and final.noise else 0.0


def _host_differences(capsule: Capsule, hardware: Hardware) -> list[str]:
    """What of host and libraries is not as it was, in sentences."""
    now = host_environment()
    told = [
        f"{name.replace('_', ' ')} was {capsule.host[name]} and is {value}"
        for name, value in now.items()
        if capsule.host.get(name, value) != value
    ]
    versions = _versions()
    told += [
        f"{name} was {old} and is {versions.get(name, 'absent')}"
        for name, old in capsule.versions.items()
        if versions.get(name) != old
    ]
    for name, rate in _peaks(hardware).items():
        old = float(capsule.host.get(name, rate))
        if abs(float(rate) / old - 1) > PEAK_CHANGE:
            told.append(f"the host's {name.replace('_', ' ')} was {old:g} and is {rate}")
    return told


def _disturbances(now: Measurements) -> list[str]:
    if not now.noisy_rounds:
        return []
    reasons = sorted({reason for r in now.counted for reason in r.conditions.disturbances})
    return [f"{now.noisy_rounds} of {len(now.counted)} rounds were disturbed: {'; '.join(reasons[:3])}"]


def _explanation(reproduced: bool, figures: tuple[Reproduced, ...], differences: list[str]) -> str:
    if reproduced:
        return "every figure is within what the study measured"
    off = ", ".join(f"{f.metric} {f.paired.change:+.1%}" for f in figures if not f.within)
    if differences:
        return f"not as measured ({off}), and these are not as they were: {'; '.join(differences)}"
    return (
        f"not as measured ({off}), though host, libraries, files and requests are as they were: the host's "
        "neighbours or its clock may differ in ways the kernel does not tell"
    )
