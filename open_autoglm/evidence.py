"""The evidence behind the answer, as rows and sentences: heats, pairs, noise, roofline, memory, reuse."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from open_autoglm import readout
from open_autoglm.engines.contract import draft_tokens_of
from open_autoglm.measure.racing import TWIN_SUFFIX
from open_autoglm.objectives import final_of
from open_autoglm.pruning.levels import pruned_profile
from open_autoglm.roofline import bound
from open_autoglm.schemas import (
    Comparison,
    Fall,
    Metric,
    NoiseFloor,
    Phase,
    Race,
    RooflineBound,
    Study,
    Trial,
    beyond,
)

# ── noise and paired comparisons ─────────────────────────────────────────────────────────────────


def noise_of(study: Study) -> NoiseFloor | None:
    """What the A/A run of the final says of this host, if there was one."""
    final = final_of(study.races)
    return final.noise if final else None


def noise_words(study: Study) -> str:
    """The noise floor in one sentence, or why there is none."""
    noise = noise_of(study)
    if noise is None:
        return "No candidate ran in two processes, so the noise floor of this host is not known."
    twin = noise.comparison
    return (
        f"Noise floor {readout.percent(noise.floor)}: {twin.against} ran in two processes, which differ by "
        f"{signed(twin.change)} ({signed_interval(twin.interval)}, {twin.pairs} pairs of rounds). "
        f"A change of {readout.percent(noise.detectable)} would be found 9 times in 10."
    )


def signed(share: float) -> str:
    """'+1.2 %', with a minus as wide as the plus."""
    return f"{share * 100:+.1f} %".replace("-", "−")


def signed_interval(ends: tuple[float, float]) -> str:
    low, high = map(signed, ends)
    return f"{low} to {high}"


def change_words(comparison: Comparison) -> str:
    """'45.0 % slower', '3.1 % faster' or 'not told apart': times only, so less is faster."""
    if not comparison.clear:
        return "not told apart"
    return f"{readout.percent(abs(comparison.change))} {'slower' if comparison.change > 0 else 'faster'}"


def within_noise(comparison: Comparison, noise: NoiseFloor | None) -> bool:
    return noise is not None and not beyond(comparison.change, noise.floor)


# ── the heats ────────────────────────────────────────────────────────────────────────────────────


class Strip(NamedTuple):
    """One contestant's way through the heats: it ran the first ``heats`` of ``of``."""

    name: str
    heats: int
    of: int
    fall: Fall | None
    twin: bool


def strips(race: Race) -> list[Strip]:
    """Everybody who entered, who stayed longest first."""
    entered = dict.fromkeys(name for heat in race.heats for name in heat)
    found = [
        Strip(
            name.removesuffix(TWIN_SUFFIX),
            sum(name in heat for heat in race.heats),
            len(race.heats),
            race.fallen.get(name),
            name.endswith(TWIN_SUFFIX),
        )
        for name in entered
    ]
    return sorted(found, key=lambda strip: (strip.fall is not None, -strip.heats))


def race_words(race: Race) -> str:
    """'4 entered, 4 heats in 39 s, compared by time to last token. It ended: …'."""
    entered = {name for heat in race.heats for name in heat if not name.endswith(TWIN_SUFFIX)}
    by = readout.METRICS[race.metric].long.lower()
    return (
        f"{len(entered)} entered, {len(race.heats)} heats in {race.seconds:.0f} s, "
        f"compared by {by}. It ended: {race.stopped_because}."
    )


class RoundsBehind(NamedTuple):
    """How many rounds a trial's figures rest on."""

    trial: Trial
    stage: str
    counted: int
    repeated: int
    disturbed: int
    warmups: int
    steady: bool


def rounds_behind(study: Study) -> list[RoundsBehind]:
    """For each trial whose raw rounds are at hand."""
    return [
        RoundsBehind(
            trial,
            "final" if trial.finalist else "race",
            len(taken.counted),
            taken.repeated_rounds,
            taken.noisy_rounds,
            len(taken.warmups),
            taken.steady,
        )
        for trial in study.trials
        if (taken := trial.measurements) is not None
    ]


# ── percentiles ──────────────────────────────────────────────────────────────────────────────────


def percentile_words(metric: Metric, name: str) -> str:
    """A percentile with its unit, marked where too few samples stand behind it."""
    value = readout.quantity(getattr(metric, name), metric.unit)
    return f"{value} (indicative)" if name in metric.indicative else value


# ── roofline ─────────────────────────────────────────────────────────────────────────────────────


class PhaseShare(NamedTuple):
    """One phase of one trial beside the least time the roofline allows."""

    bound: RooflineBound
    measured_ms: float

    @property
    def share(self) -> float:
        return self.bound.bound_ms / self.measured_ms

    @property
    def flops_per_s(self) -> float:
        return self.bound.flops / self.measured_ms * 1e3

    def sentence(self) -> str:
        """'decode reaches 71 % of the bandwidth bound'."""
        # Where capacity binds, the bound is still what time it would take with enough memory.
        slower = "compute" if self.bound.compute_ms >= self.bound.bandwidth_ms else "bandwidth"
        return f"{self.bound.phase} reaches {readout.percent(self.share, 0)} of the {slower} bound"


def phase_shares(study: Study, trial: Trial) -> list[PhaseShare]:
    """Prefill (TTFT) and decode (TPOT) against the bound at the trial's own bits per weight.

    Only where the figure is of one call of the length that the bound is for: not on a GPU, whose peaks are
    not the host's, not with a mix of lengths, and no prefill whose TTFT holds a queue.
    """
    spec, analysis, candidate = study.spec, study.analysis, trial.candidate
    if candidate.device != "cpu" or spec.length_mix is not None:
        return []
    profile = pruned_profile(analysis.profile, candidate.transform)
    phases: dict[Phase, str] = {"prefill": "ttft_ms", "decode": "tpot_ms"}
    if spec.scenario == "server":
        del phases["prefill"]
    if draft_tokens_of(candidate):
        del phases["decode"]  # its bound is of one token per call
    return [
        PhaseShare(
            bound(profile, analysis.hardware, spec, phase, candidate.precision, candidate.weight_bits),
            trial.metrics[metric].median,
        )
        for phase, metric in phases.items()
        if metric in trial.metrics
    ]


# ── reuse and capsules ───────────────────────────────────────────────────────────────────────────


def reuse_words(study: Study) -> list[str]:
    """What was taken from earlier runs, a sentence for each stage."""
    return list(_reuse(study))


def _reuse(study: Study) -> Iterator[str]:
    stages = dict.fromkeys(stage for trial in study.trials for stage in trial.reused)
    for stage in stages:
        names = [trial.id for trial in study.trials if stage in trial.reused]
        yield f"{stage}: {len(names)} of {len(study.trials)} ({', '.join(names)})"


def host_settings(study: Study) -> list[tuple[str, str]]:
    """What timing depends on besides the candidate, as the first capsule keeps it."""
    capsule = next((trial.capsule for trial in study.trials if trial.capsule), None)
    if capsule is None:
        return []
    return [(name.replace("_", " "), value) for name, value in capsule.host.items()]
