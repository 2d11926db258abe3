"""How far heads can be removed: the levels, what each saves, and what a candidate becomes by it.

A level is a number of key/value groups and of query heads in each, the same in all layers. So config.json
describes the result, and every loader and exporter takes it. Which heads go is each layer's own affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from open_autoglm.schemas import (
    CRITERION,
    RECOVER_S,
    RECOVER_STEPS,
    AttentionKind,
    Candidate,
    Criterion,
    HeadPruning,
    ModelProfile,
)

PRUNABLE = ("glm", "glm4", "llama", "qwen2", "qwen3")
"""Model types whose attention is q, k, v and o projections over uniform heads; tests compare each with its
unpruned model, the removed heads masked."""

_WHOLE_WIDTHS = ("llama",)
"""Model types whose config class wants the hidden size to be a multiple of the number of heads."""

_SIXTEEN_BITS = ("bf16", "fp16")


def why_not(profile: ModelProfile) -> str | None:
    """None if heads can be removed from this model, else why not."""
    if profile.model_type not in PRUNABLE:
        return f"heads of the model type {profile.model_type!r} cannot be removed: {', '.join(PRUNABLE)} can"
    if not levels(profile):
        return f"no level is left between all {profile.attention_heads} heads of a layer and none"
    return None


def levels(
    profile: ModelProfile,
    *,
    criterion: Criterion = CRITERION,
    recover_steps: int = 0,
    recover_s: float = RECOVER_S,
    seed: int = 0,
) -> list[HeadPruning]:
    """Every level short of the whole model, the one that removes the fewest parameters first."""
    groups, per_group = profile.kv_heads, profile.attention_heads // profile.kv_heads
    found = [
        HeadPruning(
            kv_groups=kept,
            heads_per_group=heads,
            of_kv_groups=groups,
            of_heads_per_group=per_group,
            criterion=criterion,
            recover_steps=recover_steps,
            recover_s=recover_s,
            seed=seed,
        )
        for kept, heads in product(range(1, groups + 1), range(1, per_group + 1))
        if kept * heads < profile.attention_heads and _loads(profile, kept * heads)
    ]
    return sorted(found, key=lambda level: (removed_parameters(profile, level), level.kv_groups))


def _loads(profile: ModelProfile, heads: int) -> bool:
    return profile.model_type not in _WHOLE_WIDTHS or profile.hidden_size % heads == 0


def attention_parameters(profile: ModelProfile) -> int:
    """Of the four projections of all layers, with the biases of the first three."""
    return profile.layers * _projections(profile, profile.attention_heads, profile.kv_heads)


def removed_parameters(profile: ModelProfile, pruning: HeadPruning) -> int:
    """Parameters that ``pruning`` removes from all layers together."""
    heads, groups = pruning.of_heads - pruning.heads, pruning.of_kv_groups - pruning.kv_groups
    return profile.layers * _projections(profile, heads, groups)


def _projections(profile: ModelProfile, heads: int, groups: int) -> int:
    """Parameters of one layer that belong to so many query heads and key/value groups."""
    bias = int(profile.attention_bias)
    query_and_output, key_and_value = 2 * profile.hidden_size + bias, 2 * (profile.hidden_size + bias)
    return profile.head_dim * (heads * query_and_output + groups * key_and_value)


def pruned_profile(profile: ModelProfile, pruning: HeadPruning | None) -> ModelProfile:
    """The structure that is left; the same for None."""
    if pruning is None:
        return profile
    removed = removed_parameters(profile, pruning)
    groups = pruning.kv_groups
    kind: AttentionKind = "mha" if pruning.heads_per_group == 1 else "mqa" if groups == 1 else "gqa"
    return profile.model_copy(
        update={
            "attention": kind,
            "attention_heads": pruning.heads,
            "kv_heads": groups,
            "parameters": profile.parameters - removed,
            "active_parameters": profile.active_parameters - removed,
            "kv_elements_per_token": profile.kv_elements_per_token * groups // profile.kv_heads,
        }
    )


# ── candidates ───────────────────────────────────────────────────────────────────────────────────


def with_pruning(candidate: Candidate, pruning: HeadPruning | None) -> Candidate:
    """``candidate`` on the pruned checkpoint, no yardstick any more; the same for None."""
    if pruning is None:
        return candidate
    update = {
        "id": f"{candidate.id}-{pruning.suffix}",
        "transform": pruning,
        "reference": False,
        "baseline": False,
        "incumbent": False,
    }
    return candidate.model_copy(update=update)


def first_steps(profile: ModelProfile, seed: int = 0) -> list[HeadPruning]:
    """The smallest step in each direction: heads out of every group, and whole groups.

    Which costs less is the model's affair: the demo GLM keeps 29 % of its quality without a head of each
    group, and 60 % without one group of its three, though that removes more.
    """
    found = levels(profile, seed=seed)
    heads = [x for x in found if x.kv_groups == x.of_kv_groups]
    groups = [x for x in found if x.heads_per_group == x.of_heads_per_group]
    return heads[:1] + groups[:1] or found[:1]


def pruned_variants(
    candidates: Sequence[Candidate], profile: ModelProfile, seed: int = 0, *, recover: bool = False
) -> list[Candidate]:
    """Of each engine its most promising candidate, with the `first_steps` taken; vetoed ones have none.

    With ``recover`` each of these once more, recovered.

    Raises ValueError if `why_not` has a reason.
    """
    if (reason := why_not(profile)) is not None:
        raise ValueError(reason)
    able = [c for c in candidates if c.vetoed_because is None and not (c.reference or c.baseline)]
    by_engine: dict[str, list[Candidate]] = {}
    for candidate in able:
        by_engine.setdefault(candidate.engine, []).append(candidate)
    steps = first_steps(profile, seed)
    if recover:
        steps += [step.model_copy(update={"recover_steps": RECOVER_STEPS}) for step in steps]
    return [
        with_pruning(_most_promising(group), step).model_copy(
            update={"proposed_because": _saving(profile, step)}
        )
        for group in by_engine.values()
        for step in steps
    ]


def _saving(profile: ModelProfile, step: HeadPruning) -> str:
    share = removed_parameters(profile, step) / attention_parameters(profile)
    heads = f"{step.heads} of {step.of_heads} heads in each layer"
    recovered = "; then distilled from the whole model" if step.recover_steps else ""
    return (
        f"{heads}, {step.kv_groups} of {step.of_kv_groups} groups: {share:.0%} of attention's parameters go"
        f"{recovered}"
    )


def _most_promising(candidates: Sequence[Candidate]) -> Candidate:
    """8-bit weights before 16 and 32, and with the finest scales: fewer bits have no quality to spare."""

    def rank(candidate: Candidate) -> tuple[int, float]:
        eight, sixteen = candidate.precision == "int8", candidate.precision in _SIXTEEN_BITS
        order = 0 if eight else 1 if sixteen else 2 if candidate.precision == "fp32" else 3
        return order, -candidate.weight_bits

    return min(candidates, key=rank)
