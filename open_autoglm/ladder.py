"""What may be given up, step by step, while nothing meets the limits; and what a climb comes to.

The quality that must be kept is the same on every rung: a higher one tries more and is judged as
strictly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from open_autoglm.schemas import OptimizeSpec, Outcome, OutcomeKind, Reoptimization, Rung, Study
from open_autoglm.tracking import registered_name

RUNGS: tuple[Rung, ...] = get_args(Rung)


def rungs(request: Reoptimization) -> list[tuple[Rung, OptimizeSpec]]:
    """The requests to study, one after the other, until one has an answer. None of them promotes."""
    base = request.spec.model_copy(update={"promote": False})
    changes: dict[Rung, dict[str, bool]] = {
        "quantise": {},
        "prune": {"prune": True},
        "recover": {"prune": True, "recover": True},
    }
    climb = RUNGS[: RUNGS.index(request.highest_rung) + 1]
    specs = [(rung, base.model_copy(update=changes[rung])) for rung in climb]
    # A request that prunes anyway has fewer rungs: the same study twice would find the same.
    return [one for number, one in enumerate(specs) if number == 0 or one[1] != specs[number - 1][1]]


def goes_on(study: Study) -> bool:
    """Whether a higher rung could help: nothing met the limits."""
    return study.verdict.kind == "nothing_feasible"


def outcome_of(studies: Sequence[Study], champion: str | None) -> Outcome:
    """What the last rung says, where ``champion`` is the version that has the alias by now."""
    kind, told, challenger = _conclusion(studies, champion)
    last = studies[-1]
    because = "; ".join(last.verdict.reasons)
    return Outcome(
        kind=kind,
        told=f"{told} {because}." if because else told,
        model_name=registered_name(last.spec, last.checkpoint.name),
        challenger=challenger,
        champion=champion,
        studies=tuple(study.id for study in studies),
    )


def _conclusion(studies: Sequence[Study], champion: str | None) -> tuple[OutcomeKind, str, str | None]:
    verdict, registration = studies[-1].verdict.kind, studies[-1].registration
    version = registration.model_version if registration else None
    if verdict == "nothing_feasible":
        return "nothing_feasible", f"Nothing meets the limits, on {len(studies)} of {len(RUNGS)} rungs.", None
    if verdict == "tie":
        return "kept", "A tie: the champion is kept.", None
    if verdict != "champion" or version is None:
        return "undecided", f"The study ended in {verdict}: the champion is kept.", None
    if version == champion:
        return "kept", f"The champion, version {version}, won again.", None
    return "challenger", f"Version {version} is to be tried beside version {champion}.", version
