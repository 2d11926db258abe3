"""A study in words: the sentences and figures that the page, the plots and the terminal share.

Every figure is shown with its unit. A comparison carries an interval, and where the interval
holds 1 the words are "no clear difference".
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

from open_autoglm.limits import excess
from open_autoglm.objectives import Goal, duel, floor_of, goal_of
from open_autoglm.schemas import Metric, Miss, Study, Trial, beyond
from open_autoglm.tracking import mlflow_link
from open_autoglm.units import number as number
from open_autoglm.units import quantity as quantity


class Shown(NamedTuple):
    """How a metric is named, and which direction is better."""

    short: str
    long: str
    unit: str
    lower_is_better: bool = True


METRICS: dict[str, Shown] = {
    "ttft_ms": Shown("TTFT", "Time to first token", "ms"),
    "tpot_ms": Shown("TPOT", "Time per output token", "ms"),
    "tokens_per_s": Shown("Decode", "Decode speed", "tokens/s", lower_is_better=False),
    "e2e_ms": Shown("To last token", "Time to last token", "ms"),
    "throughput_tokens_per_s": Shown(
        "Throughput", "Throughput with prefill", "tokens/s", lower_is_better=False
    ),
    "goodput_rps": Shown("Goodput", "Requests within the limits", "requests/s", lower_is_better=False),
    "peak_rss_bytes": Shown("Peak RSS", "Peak resident memory", "bytes"),
    "peak_device_bytes": Shown("Peak on GPU", "Peak memory on the GPU", "bytes"),
    "load_ms": Shown("Load", "Load time", "ms"),
}

STATUS_WORDS = {
    "ok": "measured",
    "vetoed": "vetoed",
    "failed": "failed",
    "crashed": "crashed",
    "out_of_memory": "out of memory",
    "timed_out": "timed out",
    "incorrect": "incorrect",
    "stopped": "left early",
}

PAIRED = {"ttft_ms", "tpot_ms", "e2e_ms", "tokens_per_s", "throughput_tokens_per_s"}
"""Metrics whose every round is one time, so that two candidates' rounds pair up."""

LIMIT_WORDS = {
    "max_latency": "TTFT",
    "max_tpot": "TPOT",
    "max_memory": "peak memory",
    "min_quality": "quality kept",
    "max_token_flips": "token flips",
}


# ── figures ──────────────────────────────────────────────────────────────────────────────────────


def scaled(value: float, unit: str) -> str:
    """A large figure with a prefix: ``scaled(1.9e11, 'FLOP/s')`` is '190 GFLOP/s'."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if abs(value) >= size:
            return f"{number(value / size)} {prefix}{unit}"
    return f"{number(value)} {unit}"


def interval(metric: Metric) -> str:
    """The 95 % interval of the median with its unit; one sample has none."""
    if metric.samples < 2:
        return "one sample"
    low, high = (quantity(end, metric.unit) for end in metric.interval)
    return f"{low.rsplit(' ', 1)[0]}–{high}"


def percent(share: float, decimals: int = 1) -> str:
    return f"{share * 100:.{decimals}f} %"


def percent_interval(ends: tuple[float, float]) -> str:
    return f"{ends[0] * 100:.1f}–{percent(ends[1])}"


class Ratio(NamedTuple):
    """How many times better (above 1) or worse a figure is than the baseline's, with a 95 % interval.

    ``pairs`` is how many paired rounds it rests on; 0 where only the medians are compared. ``floor`` is
    the change that noise alone may make.
    """

    factor: float
    low: float
    high: float
    pairs: int = 0
    floor: float = 0.0

    @property
    def clear(self) -> bool:
        return not self.low <= 1 <= self.high and beyond(1 / self.factor - 1, self.floor)


def compare(name: str, trial: Trial, baseline: Trial, floor: float = 0.0) -> Ratio | None:
    """``trial`` against ``baseline`` in one metric; None where either lacks it. ``floor`` is the noise floor
    of paired rounds.

    Finalists are compared by the rounds they ran side by side. Where there are none, the interval joins
    those of both medians on the log scale (MOVER: Zou & Donner, *Statistics in Medicine* 27, 2008).
    """
    if name not in trial.metrics or name not in baseline.metrics:
        return None
    if (paired := _paired(name, trial, baseline)) is not None:
        return paired._replace(floor=floor)
    ours, theirs = _logs(trial.metrics[name]), _logs(baseline.metrics[name])
    if METRICS[name].lower_is_better:
        ours, theirs = theirs, ours
    (low, middle, high), (other_low, other_middle, other_high) = ours, theirs
    gain = middle - other_middle
    down = math.hypot(middle - low, other_high - other_middle)
    up = math.hypot(high - middle, other_middle - other_low)
    return Ratio(math.exp(gain), math.exp(gain - down), math.exp(gain + up))


def _paired(name: str, trial: Trial, baseline: Trial) -> Ratio | None:
    if name not in PAIRED or not (trial.finalist and baseline.finalist):
        return None
    compared = duel(trial, baseline, Goal(name, False, "", name))  # of times: a rate's rounds are times too
    if compared is None:
        return None
    low, high = compared.interval
    return Ratio(1 / (1 + compared.change), 1 / (1 + high), 1 / (1 + low), compared.pairs)


def _logs(metric: Metric) -> tuple[float, float, float]:
    low, high = metric.interval
    return math.log(low), math.log(metric.median), math.log(high)


def ratio_words(name: str, ratio: Ratio) -> str:
    """'3.58× faster', '1.10× more' or 'no clear difference'."""
    if not ratio.clear:
        return "no clear difference"
    better, worse = ("less", "more") if METRICS[name].unit == "bytes" else ("faster", "slower")
    return f"{ratio.factor:.2f}× {better}" if ratio.factor > 1 else f"{1 / ratio.factor:.2f}× {worse}"


def ratio_interval(ratio: Ratio) -> str:
    """The interval in the direction that `ratio_words` tells."""
    low, high = (ratio.low, ratio.high) if ratio.factor >= 1 else (1 / ratio.high, 1 / ratio.low)
    return f"{low:.2f}–{high:.2f}×"


# ── trials ───────────────────────────────────────────────────────────────────────────────────────


def measured(study: Study) -> list[Trial]:
    """The finalists: timed to the end, side by side, and correct, so that their figures may be compared."""
    return [trial for trial in study.trials if trial.status == "ok" and trial.finalist and trial.metrics]


def timed(study: Study) -> list[Trial]:
    """The finalists, and those that were timed in the race before they left it."""
    return [trial for trial in study.trials if trial.metrics and trial.status in ("ok", "stopped")]


def champion(study: Study) -> Trial | None:
    return study.trial(study.champion) if study.champion else None


def baseline(study: Study) -> Trial | None:
    """The hand-tuned baseline, if it was measured."""
    return next((trial for trial in measured(study) if trial.candidate.baseline), None)


def role(study: Study, trial: Trial) -> str:
    if trial.id == study.champion:
        return "champion"
    if trial.candidate.incumbent:
        return "incumbent"
    if trial.candidate.baseline:
        return "baseline"
    return "reference" if trial.candidate.reference else ""


def standing(study: Study, trial: Trial) -> str:
    """A trial's place in the study, in a few words: 'misses quality', '1.50× slower', 'left: race 4'."""
    if trial.status != "ok":
        return _exit_words(trial)
    if trial.id == study.champion:
        return "champion"
    if trial.misses:
        limits = (miss.limit.removeprefix("max_").removeprefix("min_") for miss in trial.misses)
        return f"misses {', '.join(limits)}"
    if not trial.finalist:
        return "not in the final"
    best, metric = champion(study), goal_of(study.spec).metric
    if best is None:
        return "best, not registered" if trial.id == study.verdict.nearest else "not ranked"
    ratio = compare(metric, trial, best, floor_of(study.races))
    return ratio_words(metric, ratio) if ratio else "not ranked"


def _exit_words(trial: Trial) -> str:
    if trial.fall is None:
        return STATUS_WORDS[trial.status]
    heat = "" if trial.fall.heat is None else f" {trial.fall.heat + 1}"
    return f"left: {trial.fall.stage}{heat}"


def figure_words(trial: Trial, name: str, scale: float = 1) -> str:
    """The median of a metric as a bare number, a rough one from the screening with '~', or a dash.

    Memory is read in the screening alone, so it is as good there as anywhere.
    """
    if name in trial.metrics:
        return number(trial.metrics[name].median / scale)
    if trial.screening is None:
        return "–"
    if name == "e2e_ms":
        return f"~{number(trial.screening.estimated_e2e_ms / scale)}"
    if name == "peak_rss_bytes":
        return number(trial.screening.footprint.peak_rss_bytes / scale)
    return "–"


def quality_words(trial: Trial) -> str:
    """The share kept on the worse path; '~' where only a slice of the texts was scored."""
    if trial.quality is None:
        return "–"
    return f"{'' if trial.finalist else '~'}{percent(trial.quality.ratio)}"


def miss_words(miss: Miss) -> str:
    """'peak memory 341 MiB, limit 200 MiB, 70.7 % beyond'."""
    name, beyond = LIMIT_WORDS.get(miss.limit, miss.limit), excess(miss)
    decimals = next((d for d in (1, 2, 3) if round(abs(beyond) * 100, d) > 0), 4)  # never "0.0 % beyond"
    if miss.limit in ("min_quality", "max_token_flips"):
        found, allowed = percent(miss.measured, decimals), percent(miss.allowed, decimals)
    else:
        found, allowed = quantity(miss.measured, miss.unit), quantity(miss.allowed, miss.unit)
    return f"{name} {found}, limit {allowed}, {percent(beyond, decimals)} beyond"


def why(trial: Trial) -> list[str]:
    """Why a trial is where it is: each limit it misses, or its reason."""
    return [miss_words(miss) for miss in trial.misses] or [trial.reason]


# ── the study ────────────────────────────────────────────────────────────────────────────────────


def reasons(study: Study) -> list[str]:
    """Why the answer is what it is; if nothing is feasible, by how much the nearest misses each limit."""
    if study.verdict.kind != "nothing_feasible" or study.verdict.nearest is None:
        return list(study.verdict.reasons)
    nearest = study.trial(study.verdict.nearest)
    misses = [f"{miss_words(miss)} ({miss.decided_by})" for miss in nearest.misses]
    return [f"nearest is {nearest.id}", *misses]


def headline(study: Study) -> str:
    """The answer in one line."""
    best = study.verdict.nearest
    return {
        "champion": f"Champion: {study.champion}",
        "tie": f"Tie, keep the incumbent: {study.champion}",
        "insufficient_evidence": f"Insufficient evidence: {best} may be best, but it is not shown to be",
        "nothing_feasible": "No candidate meets every limit",
        "gate_failed": f"Not registered: the gate refused the results; best was {best}",
        "dry_run": "Plan only: nothing was measured",
    }[study.verdict.kind]


def workload_words(study: Study) -> str:
    """'single_stream: 1 prompt of 512 tokens in, 64 tokens out', with the mix and the rate if there are."""
    spec = study.spec
    prompts = "prompt" if spec.batch_size == 1 else "prompts"
    lengths = f"of {spec.prompt_tokens} tokens in, {spec.output_tokens} tokens out"
    if spec.length_mix is not None:
        lengths = f"of mixed lengths {spec.length_mix} (in/out:weight)"
    rate = f", {number(spec.request_rate_per_s)} requests/s" if spec.request_rate_per_s else ""
    return f"{spec.scenario}: {spec.batch_size} {prompts} {lengths}{rate}"


def limit_words(study: Study) -> list[str]:
    """Every limit of the spec, as it was asked for."""
    spec = study.spec
    limits = [("TTFT p95", spec.max_latency), ("TPOT", spec.max_tpot), ("peak memory", spec.max_memory)]
    quality = f"quality kept ≥ {percent(spec.min_quality)}"
    flips = f"token flips ≤ {percent(spec.max_token_flips)}"
    return [*(f"{name} ≤ {limit}" for name, limit in limits if limit), quality, flips]


def how_to_load(study: Study) -> list[str]:
    """Python that loads the winner from the registry and lets it speak; empty if it is not registered."""
    registration = study.registration
    if registration is None or registration.model_uri is None:
        return []
    return [
        "import mlflow",
        f'mlflow.set_tracking_uri("{registration.tracking_uri}")',
        f'model = mlflow.pyfunc.load_model("{registration.model_uri}")',
        'print(model.predict(["The capital of France is"]))',
    ]


def how_to_serve(study: Study) -> list[str]:
    """The shell line that serves the champion as OpenAI's API; empty if there is none."""
    if study.bundle is None:
        return []
    return [f"open-autoglm serve {shlex.quote(str(study.output_dir))}"]


def study_link(study: Study, server: str = "") -> str | None:
    """The address of the study's MLflow run; None if MLflow keeps it in a database without a server.

    ``server`` is a server known to show that database, such as the local stack's.
    """
    registration = study.registration
    if registration is None:
        return None
    own = mlflow_link(registration.tracking_uri, registration.experiment_id, registration.run_id)
    return own or mlflow_link(server, registration.experiment_id, registration.run_id)


def caveats(study: Study) -> list[str]:
    """What was not measured, or too weakly to decide: the study's own list and what its figures show."""
    trials = measured(study)
    found = (_weak_figures(trials), _disturbances(trials), _gaps(study), draft_words(study))
    return [*study.not_measured, *chain.from_iterable(found)]


def _weak_figures(trials: Sequence[Trial]) -> Iterator[str]:
    latencies = [t.metrics[name] for t in trials for name in ("ttft_ms", "tpot_ms") if name in t.metrics]
    if weak := [metric.samples for metric in latencies if metric.indicative]:
        fewest, most = min(weak), max(weak)
        count = f"{fewest}" if fewest == most else f"{fewest} to {most}"
        yield f"No percentile marked indicative decides: {count} samples are too few for it."
    single = {name for trial in trials for name, metric in trial.metrics.items() if metric.samples == 1}
    if names := [shown.short for name, shown in METRICS.items() if name in single]:
        yield f"{' and '.join(names)} were taken once per engine, so they have no interval."


def _disturbances(trials: Sequence[Trial]) -> Iterator[str]:
    for trial in trials:
        taken = trial.measurements
        if taken is None:
            continue
        if taken.noisy_rounds:
            found = (reason for turn in taken.counted for reason in turn.conditions.disturbances)
            reasons = "; ".join(list(dict.fromkeys(found))[:2])
            rounds = f"{taken.noisy_rounds} of {len(taken.counted)} rounds"
            yield f"{trial.id} was disturbed in {rounds}, though they were run again: {reasons}."
        if taken.output_tokens_ratio < 1:
            yield f"{trial.id} gave only {percent(taken.output_tokens_ratio)} of the tokens asked for."


def draft_words(study: Study) -> list[str]:
    """How well each finalist that drafts has guessed: its TPOT holds for text that repeats itself as much."""
    told = []
    for trial in measured(study):
        rounds = trial.measurements.counted if trial.measurements else ()
        drafted = sum(sum(turn.drafted_tokens) for turn in rounds)
        accepted = sum(sum(turn.accepted_tokens) for turn in rounds)
        if drafted:
            calls = sum(sum(turn.output_tokens) for turn in rounds) - accepted
            told.append(
                f"{trial.id} guessed {drafted} tokens, {percent(accepted / drafted, 0)} of them right: "
                f"{(calls + accepted) / calls:.2f} tokens per call on these texts, fewer on others."
            )
    return told


def _gaps(study: Study) -> Iterator[str]:
    if measured(study) and baseline(study) is None:
        yield "The hand-tuned baseline has no result, so nothing is compared with it."
    if study.incumbent is not None and study.incumbent.note:
        named = f"{study.incumbent.model_name} version {study.incumbent.version}"
        yield f"The registered champion ({named}) was not measured again: {study.incumbent.note}."
    for trial in measured(study):
        if trial.quality is None:
            yield f"The quality of {trial.id} was not judged."
    if study.spec.length_mix is not None and measured(study):
        yield "No roofline is given: with a mix of lengths there is no one bound."
    if left := [trial.id for trial in study.trials if trial.status == "stopped"]:
        yield f"Left before the final, so known less well: {', '.join(left)}."
    if vetoed := [trial.id for trial in study.trials if trial.status == "vetoed"]:
        yield f"Vetoed before the start, for the reasons given above: {', '.join(vetoed)}."
