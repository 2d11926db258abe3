"""Which knobs to turn next: coordinate descent around the best candidates screened so far.

One knob at a time is turned around each leader (:func:`neighbours`), then all that helped at once
(:func:`combined`). That costs the sum of the dimensions' sizes, where the full :func:`grid` costs
their product. The price: what pays only jointly, each knob alone being no better, is not found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import product
from statistics import median

from open_autoglm import engines
from open_autoglm.engines.contract import knob_changes
from open_autoglm.limits import flips_miss
from open_autoglm.planning import judge
from open_autoglm.pruning.levels import with_pruning
from open_autoglm.schemas import Analysis, Candidate, Knob, OptimizeSpec, Trial
from open_autoglm.units import quantity

LEADERS = 2
"""Candidates whose neighbourhood is searched in one generation."""

BEHIND = 1.5
"""Nobody this many times worse than the best is looked around: one knob does not make up for that."""

MOST_PER_GENERATION = 16
"""Candidates to screen in one generation; those that are vetoed cost nothing and are not counted."""


def next_generation(
    generations: Sequence[Sequence[Trial]], analysis: Analysis, spec: OptimizeSpec
) -> list[Candidate]:
    """What to screen after ``generations``, which hold every trial so far, failed ones too, the start first.

    ``spec.search_generations`` times the neighbours of the ``LEADERS`` best that are neither reference nor
    baseline nor incumbent, nor far ``BEHIND``; each time, and once more at the end, the combinations of
    what helped. At most ``MOST_PER_GENERATION``, shared among those they start from, vetoed ones on top. The
    same trials give the same list; an empty one means that the search is over.
    """
    found = _proposals(generations, analysis, spec)
    able = [(origin, candidate) for origin, candidate in found if candidate.vetoed_because is None]
    vetoed = [candidate for _, candidate in found if candidate.vetoed_because is not None]
    return [*_shared(able, MOST_PER_GENERATION), *vetoed]


def _shared(found: Sequence[tuple[Trial, Candidate]], places: int) -> list[Candidate]:
    """At most ``places`` of ``found``, in its order: the first of each origin, then the second of each, …"""
    seen: Counter[str] = Counter()
    turns = []
    for position, (origin, _) in enumerate(found):
        turns.append((seen[origin.id], position))
        seen[origin.id] += 1
    return [found[position][1] for position in sorted(position for _, position in sorted(turns)[:places])]


def lessons(
    generations: Sequence[Sequence[Trial]], analysis: Analysis, spec: OptimizeSpec
) -> tuple[str, ...]:
    """What the search tried and learned, a sentence for each candidate that it added."""
    told = []
    for done in range(1, len(generations)):
        origins = {c.id: origin for origin, c in _proposals(generations[:done], analysis, spec)}
        added = (trial for trial in generations[done] if trial.id in origins)
        told += [_lesson(origins[trial.id], trial, spec) for trial in added]
    return tuple(told)


# ── the space ────────────────────────────────────────────────────────────────────────────────────


def grid(start: Sequence[Candidate], analysis: Analysis, spec: OptimizeSpec) -> list[Candidate]:
    """``start`` and every combination of the values its engines declare: the exhaustive search."""
    found = {candidate.id: candidate for candidate in start}
    for candidate in start:
        if candidate.vetoed_because is None:
            for knobs in _combinations(candidate, analysis, spec):
                point = _variant(candidate, knobs, analysis, spec)
                found.setdefault(point.id, point)
    return list(found.values())


def neighbours(
    leader: Candidate, tried: Collection[str], analysis: Analysis, spec: OptimizeSpec
) -> list[Candidate]:
    """Every candidate that differs from ``leader`` in one knob and whose id is not in ``tried``; vetoed
    where it is certain that it does not fit."""
    turned = (
        _variant(leader, {knob: value}, analysis, spec) for knob, value in _turns(leader, analysis, spec)
    )
    return [candidate for candidate in turned if candidate.id not in tried]


def combined(
    leader: Candidate,
    better: Mapping[str, Knob],
    tried: Collection[str],
    analysis: Analysis,
    spec: OptimizeSpec,
) -> Candidate | None:
    """``leader`` with all knobs that helped alone turned at once; None for fewer than two, and if that was
    tried."""
    if len(better) < 2:
        return None
    candidate = _variant(leader, better, analysis, spec)
    return None if candidate.id in tried else candidate


def _combinations(candidate: Candidate, analysis: Analysis, spec: OptimizeSpec) -> Iterator[dict[str, Knob]]:
    """Every combination of values that the engine declares for ``candidate``; none if it declares nothing."""
    dimensions = engines.get(candidate.engine).dimensions(candidate, analysis, spec)
    if dimensions:
        knobs = [dimension.knob for dimension in dimensions]
        for values in product(*(dimension.values for dimension in dimensions)):
            yield dict(zip(knobs, values, strict=True))


def _turns(leader: Candidate, analysis: Analysis, spec: OptimizeSpec) -> Iterator[tuple[str, Knob]]:
    """Every knob with every other value."""
    for dimension in engines.get(leader.engine).dimensions(leader, analysis, spec):
        for value in dimension.values:
            if value != leader.knobs[dimension.knob]:
                yield dimension.knob, value


def _variant(
    candidate: Candidate, knobs: Mapping[str, Knob], analysis: Analysis, spec: OptimizeSpec
) -> Candidate:
    return judge(_turned(candidate, knobs), analysis, spec)


def _turned(candidate: Candidate, knobs: Mapping[str, Knob]) -> Candidate:
    """The engine's variant, on the same checkpoint: engines know nothing of what was done to that."""
    return with_pruning(engines.get(candidate.engine).variant(candidate, knobs), candidate.transform)


# ── the policy ───────────────────────────────────────────────────────────────────────────────────


def _proposals(
    generations: Sequence[Sequence[Trial]], analysis: Analysis, spec: OptimizeSpec
) -> list[tuple[Trial, Candidate]]:
    """What to try next, each with the trial it starts from. Told from the trials alone, so that a study
    that was cut off goes on where it was."""
    searched = len(generations) - 1
    if spec.search_generations == 0 or searched > spec.search_generations:
        return []
    screened = [trial for generation in generations for trial in generation]
    leaders = _leaders(screened, spec)
    tried = {trial.id for trial in screened}
    found: list[tuple[Trial, Candidate]] = []
    for trial in leaders:
        better = _improvements(trial, leaders, analysis, spec)
        joint = combined(trial.candidate, better, tried, analysis, spec)
        if joint is not None:
            found.append((trial, joint))
            tried.add(joint.id)
    for trial in _worth_searching(leaders, spec) if searched < spec.search_generations else ():
        fresh = neighbours(trial.candidate, tried, analysis, spec)
        found += [(trial, candidate) for candidate in fresh]
        tried.update(candidate.id for candidate in fresh)
    return found


def _leaders(screened: Sequence[Trial], spec: OptimizeSpec) -> list[Trial]:
    """Those a search may start from, the best first."""
    able = [
        trial for trial in screened if why_out(trial, spec) is None and not _is_yardstick(trial.candidate)
    ]
    return sorted(able, key=lambda trial: (rank_figure(trial, spec), trial.id))


def _worth_searching(leaders: Sequence[Trial], spec: OptimizeSpec) -> list[Trial]:
    """Those whose neighbours may beat the best."""
    return [t for t in leaders[:LEADERS] if rank_figure(t, spec) <= BEHIND * rank_figure(leaders[0], spec)]


def _improvements(
    leader: Trial, others: Sequence[Trial], analysis: Analysis, spec: OptimizeSpec
) -> dict[str, Knob]:
    """The best value of each knob that, turned alone, was better than ``leader``; as far as it was tried."""
    figures = {trial.id: rank_figure(trial, spec) for trial in others}
    best: dict[str, tuple[float, Knob]] = {}
    for knob, value in _turns(leader.candidate, analysis, spec):
        turned = _turned(leader.candidate, {knob: value})
        figure = figures.get(turned.id)
        so_far = best[knob][0] if knob in best else figures[leader.id]
        if figure is not None and figure < so_far:
            best[knob] = figure, value
    return {knob: value for knob, (_, value) in best.items()}


def _is_yardstick(candidate: Candidate) -> bool:
    return candidate.reference or candidate.baseline or candidate.incumbent


# ── what the screening says ──────────────────────────────────────────────────────────────────────


def why_out(trial: Trial, spec: OptimizeSpec) -> str | None:
    """Why a trial is out of the search: it gave no figures, or it misses a limit beyond doubt; else None."""
    if trial.status != "ok" or trial.screening is None:
        return trial.reason
    quality = trial.quality
    if quality is not None and quality.worse.clear_of_limit and quality.ratio < spec.min_quality:
        return f"keeps {quality.ratio:.1%} of the quality, clearly less than {spec.min_quality:.1%}"
    if quality is not None and quality.flipping.clear_of_flips and flips_miss(quality, spec):
        return (
            f"has another likeliest token than the reference at {quality.flipping.token_flips:.1%} of "
            f"positions, clearly more than {spec.max_token_flips:.1%}"
        )
    peak_rss_bytes = trial.screening.footprint.peak_rss_bytes
    if spec.max_memory is not None and peak_rss_bytes > spec.max_memory.bytes:
        return f"took {quantity(peak_rss_bytes, 'bytes')}, more than the {spec.max_memory} allowed"
    return None


def rank_figure(trial: Trial, spec: OptimizeSpec) -> float:
    """What the screening ranks by, less being better: bytes for the objective memory, else milliseconds.

    Short rounds stand for the workload here, so this chooses what to try and never who wins.
    """
    assert trial.screening is not None, "only what was screened can be ranked"
    counted = [turn for turn in trial.screening.rounds if not turn.repeated]
    decode_counts = spec.objective == "throughput" and spec.scenario != "offline"
    if spec.objective == "memory":
        return trial.screening.footprint.peak_rss_bytes
    if spec.objective in ("ttft", "ttft_p95"):
        return median(ms for turn in counted for ms in turn.ttft_ms)
    if spec.objective == "tpot" or decode_counts:
        return median(ms for turn in counted for ms in turn.tpot_ms)
    return trial.screening.estimated_e2e_ms


def _lesson(origin: Trial, trial: Trial, spec: OptimizeSpec) -> str:
    """``onnxruntime-w8-b32 with block_size 16 instead of 32: 4 % slower in the screening``."""
    tried = f"{origin.id} with {knob_changes(origin.candidate.knobs, trial.candidate.knobs)}"
    out = why_out(trial, spec)
    if trial.screening is None:
        return f"{tried}: {trial.status}, {out}"
    change = rank_figure(trial, spec) / rank_figure(origin, spec) - 1
    less, more = ("less memory", "more memory") if spec.objective == "memory" else ("faster", "slower")
    found = f"{tried}: {abs(change):.1%} {less if change < 0 else more} in the screening"
    return found if out is None else f"{found}, but {out}"
