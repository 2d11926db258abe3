"""Remove as many heads as the quality gate lets pass: a threshold raised until it stops, each step on record.

Each level that is tried is judged like a candidate of a study: in fp32, on both paths, against the whole
model's predictions of the evaluation texts. Levels are not one ladder: the demo model keeps 48 % of its
quality without one of its three groups and 20 % without one head of each group, though that removes less.
So groups and heads are two directions, and the search takes it only that more of either costs more. It need
not, quite: what is accepted has passed the gate itself, but one that would have passed may remain untried.
Which level is accepted is chosen by the texts it is judged by, from a handful; its heads by other texts.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import Field

from open_autoglm.errors import UserError
from open_autoglm.export.store import export_candidate
from open_autoglm.files import digest_of, directory_atomic
from open_autoglm.limits import misses
from open_autoglm.measure.isolation import Failure
from open_autoglm.measure.lease import preparing
from open_autoglm.measure.workload import make_workload
from open_autoglm.memo import Memo, key_of
from open_autoglm.progress import announce
from open_autoglm.pruning.levels import levels, removed_parameters, why_not, with_pruning
from open_autoglm.quality.reference import make_evaluation_set
from open_autoglm.recovery.store import discard, transformed
from open_autoglm.schemas import (
    CRITERION,
    FORMAT_VERSION,
    RECOVER_S,
    Analysis,
    Checkpoint,
    Criterion,
    HeadPruning,
    Model,
    OptimizeSpec,
    QualityReport,
    Recovery,
    Trial,
)
from open_autoglm.settings import Settings
from open_autoglm.study import StudyRef
from open_autoglm.trials import (
    Bench,
    Stopped,
    begin_trial,
    judge_in_full,
    prepare_reference,
    quality_inputs,
    reference_candidate,
)

LONGEST_PROMPT_TOKENS = 512
"""Of the windows a level is judged on: a study's default."""

StepVerdict = Literal["accepted", "rejected", "failed"]


class PruningStep(Model):
    """One level that was tried."""

    level: HeadPruning
    parameters_removed: int
    verdict: StepVerdict
    ratio: float | None = Field(None, description="whole perplexity / pruned perplexity, on the worse path")
    ratio_interval: tuple[float, float] | None = Field(None, description="95 %")
    path: Literal["prefill", "decode"] | None = Field(None, description="the worse one")
    tokens: int = Field(0, description="scored on that path: fewer where the verdict was clear early")
    clear: bool = Field(False, description="the interval does not hold the limit")
    reason: str = Field("", description="why it failed, or was rejected")
    recovery: Recovery | None = Field(None, description="of its weights, if that was asked for")


class PruningRun(Model):
    """The whole search: what was tried in which order, and what came of it."""

    format_version: int = FORMAT_VERSION
    checkpoint: str
    checkpoint_digest: str
    parameters: int
    keep_quality: float
    steps: tuple[PruningStep, ...]
    accepted: HeadPruning | None = Field(None, description="the largest level that passed")
    pruned: Checkpoint | None = Field(None, description="its checkpoint")
    conclusion: str


def pruning_spec(checkpoint: Checkpoint, keep_quality: float, seed: int) -> OptimizeSpec:
    """The request that levels are judged by: what a study takes by default, as far as the context goes."""
    return OptimizeSpec(
        model_path=str(checkpoint.path),
        target_device="cpu",
        prompt_tokens=min(LONGEST_PROMPT_TOKENS, max(1, checkpoint.context_tokens // 2)),
        output_tokens=2,
        min_quality=keep_quality,
        max_token_flips=1,  # the quality that was asked for decides alone
        seed=seed,
    )


def prune(
    checkpoint: Checkpoint,
    analysis: Analysis,
    spec: OptimizeSpec,
    settings: Settings,
    *,
    criterion: Criterion = CRITERION,
    recover_steps: int = 0,
    recover_s: float = RECOVER_S,
) -> PruningRun:
    """Find the level that removes most and keeps ``spec.min_quality``; ``spec`` is `pruning_spec`'s.

    Raises UserError if heads of this model cannot be removed, or if it cannot be judged.
    """
    if (reason := why_not(analysis.profile)) is not None:
        raise UserError(f"{checkpoint.name}: {reason}")
    bench = _bench(checkpoint, analysis, spec, settings)
    reference = prepare_reference(bench, analysis, settings)
    if isinstance(reference, Failure):
        raise UserError(f"the predictions of {checkpoint.name} could not be computed: {reference.reason}")
    judged: list[PruningStep] = []

    def passes(level: HeadPruning) -> bool:
        step = _try(bench, analysis, level, reference, settings)
        announce(f"{level.suffix}: {step_words(step)}: {step.verdict}")
        judged.append(step)
        _discard_others(bench, judged, settings)
        return step.verdict == "accepted"

    ladder = levels(
        analysis.profile,
        criterion=criterion,
        recover_steps=recover_steps,
        recover_s=recover_s,
        seed=spec.seed,
    )
    accepted = search(ladder, passes)
    return PruningRun(
        checkpoint=checkpoint.name,
        checkpoint_digest=checkpoint.digest,
        parameters=analysis.profile.parameters,
        keep_quality=spec.min_quality,
        steps=tuple(judged),
        accepted=accepted,
        pruned=None if accepted is None else _checkpoint_of(accepted, bench, settings),
        conclusion=_conclusion(judged, accepted, spec.min_quality),
    )


def _checkpoint_of(level: HeadPruning, bench: Bench, settings: Settings) -> Checkpoint:
    """From the store, where it was put to be judged; made again if it was damaged meanwhile."""
    found = transformed(bench.checkpoint, level, settings, bench.study.log_path(level.suffix))
    if isinstance(found, Failure):
        raise UserError(f"the pruned checkpoint could not be made again: {found.reason}")
    return found.checkpoint


def deliver(run: PruningRun, directory: Path) -> PruningRun:
    """Copy the accepted checkpoint to ``directory``, all or nothing; ``run`` as it is if there is none."""
    if run.pruned is None:
        return run
    with directory_atomic(directory) as output:
        for file in run.pruned.files:
            shutil.copyfile(run.pruned.path / file.path, output / file.path)
    return run.model_copy(update={"pruned": run.pruned.model_copy(update={"path": directory})})


def search(ladder: Sequence[HeadPruning], passes: Callable[[HeadPruning], bool]) -> HeadPruning | None:
    """The last of ``ladder`` that passes, if whatever passes still does with more groups or more heads.

    First whole groups go; then, for each number of groups that passes, heads from all of them.
    """
    by_groups = sorted(ladder, key=lambda level: (-level.kv_groups, -level.heads_per_group))
    whole_groups = [x for x in by_groups if x.heads_per_group == x.of_heads_per_group]
    fewest = last_passing(whole_groups, passes)
    found = [] if fewest is None else [fewest]
    least_groups = ladder[0].of_kv_groups if fewest is None else fewest.kv_groups
    for groups in sorted({x.kv_groups for x in by_groups if x.kv_groups >= least_groups}, reverse=True):
        chain = [x for x in by_groups if x.kv_groups == groups and x.heads_per_group < x.of_heads_per_group]
        if (fewer_heads := last_passing(chain, passes)) is not None:
            found.append(fewer_heads)
    return max(found, key=ladder.index, default=None)


def last_passing(chain: Sequence[HeadPruning], passes: Callable[[HeadPruning], bool]) -> HeadPruning | None:
    """The last of ``chain`` that passes if all that pass come first; None if the first one does not.

    From the bottom in strides that double, then bisection between the last that passed and the first that
    did not (Bentley and Yao, "An almost optimal algorithm for unbounded searching", 1976): where nothing
    passes, which is common, one look is enough, and no hopeless level is judged before its betters.
    """
    low, high, stride = 0, len(chain), 1  # below low all pass, from high on none does
    while low < high:
        one_failed = high < len(chain)
        look = (low + high) // 2 if one_failed else min(low + stride, high) - 1
        if passes(chain[look]):
            low, stride = look + 1, 2 * stride
        else:
            high = look
    return chain[low - 1] if low else None


# ── one level ────────────────────────────────────────────────────────────────────────────────────


def _bench(checkpoint: Checkpoint, analysis: Analysis, spec: OptimizeSpec, settings: Settings) -> Bench:
    """What the levels have in common, in a directory of its own under `home`."""
    created = datetime.now(UTC)
    key = digest_of([checkpoint.digest, spec.model_dump(mode="json")])
    name = f"{checkpoint.name}-{key[:12]}"
    root = settings.home / "pruning" / name
    with preparing():
        return Bench(
            study=StudyRef(id=name, key=key, created=created, root=root),
            spec=spec,
            checkpoint=checkpoint,
            hardware=analysis.hardware,
            workload=make_workload(checkpoint, spec, root / "workload.npz"),
            evaluation_set=make_evaluation_set(checkpoint, spec, root / "evaluation.npy"),
        )


def _try(
    bench: Bench, analysis: Analysis, level: HeadPruning, reference: Path, settings: Settings
) -> PruningStep:
    candidate = with_pruning(reference_candidate(analysis, bench.spec), level)
    step = PruningStep(
        level=level, parameters_removed=removed_parameters(analysis.profile, level), verdict="failed"
    )
    log = bench.study.log_path(candidate.id)
    exported = export_candidate(candidate, bench.checkpoint, settings, log)
    if isinstance(exported, Failure):
        return step.model_copy(update={"reason": exported.reason})
    step = step.model_copy(update={"recovery": exported.recovery})
    trial = begin_trial(bench.study, candidate).model_copy(update={"exported": exported})
    try:
        report = _report(bench, trial, reference, log, settings)
    except Stopped as stopped:
        return step.model_copy(update={"reason": stopped.failure.reason})
    return _judged(step, trial.model_copy(update={"quality": report}), bench.spec)


def _report(bench: Bench, trial: Trial, reference: Path, log: Path, settings: Settings) -> QualityReport:
    memo, key = Memo(settings, "quality"), key_of("pruning", *quality_inputs(bench, trial))
    known = memo.get(key, QualityReport)
    if known is None:
        known = judge_in_full(bench, trial, reference, log, settings)
        memo.put(key, known)
    return known


def _judged(step: PruningStep, trial: Trial, spec: OptimizeSpec) -> PruningStep:
    quality, missed = trial.quality, misses(trial, spec)
    assert quality is not None
    found = quality.worse
    return step.model_copy(
        update={
            "verdict": "rejected" if missed else "accepted",
            "ratio": found.ratio,
            "ratio_interval": found.ratio_interval,
            "path": quality.worse_path,
            "tokens": found.tokens,
            "clear": found.clear_of_limit,
            "reason": "; ".join(miss.sentence() for miss in missed),
        }
    )


def _discard_others(bench: Bench, judged: Sequence[PruningStep], settings: Settings) -> None:
    """Remove the checkpoints of all levels but the largest accepted: each is as large as a model."""
    accepted = [step for step in judged if step.verdict == "accepted"]
    best = max(accepted, key=lambda step: step.parameters_removed, default=None)
    for step in judged:
        if step is not best:
            discard(bench.checkpoint, step.level, settings)


# ── words ────────────────────────────────────────────────────────────────────────────────────────


def step_words(step: PruningStep) -> str:
    """``keeps 84.1 % (83.0 % to 85.2 %) of the quality with 2.2 M parameters fewer``, or why it failed."""
    if step.ratio is None or step.ratio_interval is None:
        return f"failed, {step.reason}"
    low, high = step.ratio_interval
    fewer = f"{step.parameters_removed / 1e6:.2f} M parameters fewer"
    return f"keeps {step.ratio:.1%} ({low:.1%} to {high:.1%}) of the quality with {fewer}"


def _conclusion(judged: Sequence[PruningStep], accepted: HeadPruning | None, keep_quality: float) -> str:
    if accepted is None:
        best = max(judged, key=lambda step: step.ratio or 0.0)
        heads = f"{best.level.heads} of {best.level.of_heads} heads"
        groups = f"{best.level.kv_groups} of {best.level.of_kv_groups} groups"
        told = f"the best first step, {heads} in {groups}, {step_words(best)}"
        return f"No head can be removed if {keep_quality:.1%} of the quality is to be kept: {told}."
    best = next(step for step in judged if step.level == accepted)
    doubt = "" if best.clear else "; the interval holds the limit, so this is not beyond doubt"
    enough = f"{accepted.heads} of {accepted.of_heads} heads in each layer are enough"
    return f"{enough}: that {step_words(best)}{doubt}."
