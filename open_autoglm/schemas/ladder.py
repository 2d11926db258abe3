"""Optimising again what is served: what is asked for, how far it may go, and what came of it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from open_autoglm.schemas.base import Model
from open_autoglm.schemas.registry import Canary
from open_autoglm.schemas.request import OptimizeSpec

Rung = Literal["quantise", "prune", "recover"]
"""From what costs least quality to what costs most; each one includes those before."""

OutcomeKind = Literal["challenger", "kept", "nothing_feasible", "undecided", "declined"]


class Reoptimization(Model):
    """A model that is served, to be optimised again."""

    spec: OptimizeSpec = Field(title="Request", description="What is served: model, workload, limits")
    highest_rung: Rung = Field(
        "quantise",
        title="Highest rung",
        description="How far to go while nothing meets the limits: quantise, then prune attention heads, "
        "then teach pruned models what the whole one says",
    )
    canary: Canary = Field(
        Canary(weight_percent=5, shadow_percent=20),
        title="Trial",
        description="What the winner is given to do beside the champion, until the endpoint's judge decides",
    )
    require_approval: bool = Field(
        False, title="Ask first", description="Wait for a person before the winner is tried"
    )
    renew: bool = Field(
        False,
        title="Renew the engine",
        description="If the champion stays, start its engine anew: it is slow, and its configuration is not",
    )
    reason: str = Field("", title="Reason", description="Kept with the moves of aliases")


class Outcome(Model):
    """What came of optimising again."""

    kind: OutcomeKind
    told: str = Field(description="one sentence")
    model_name: str
    challenger: str | None = Field(None, description="the version that is to be tried")
    champion: str | None = Field(None, description="the version that it is to be tried beside")
    studies: tuple[str, ...] = Field((), description="one for each rung that was climbed")
