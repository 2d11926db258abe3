"""What the registry says is to be served, and who moved it there."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import Field

from open_autoglm.schemas.base import Model

Alias = Literal["champion", "challenger", "previous"]
EventKind = Literal["register", "promote", "rollback", "canary", "stop", "rejected"]
EventState = Literal["begun", "done", "failed"]


class Canary(Model):
    """How much a challenger is given to do."""

    weight_percent: float = Field(0, ge=0, le=100, description="of the requests: it answers them")
    shadow_percent: float = Field(0, ge=0, le=100, description="of the others: it answers too, unseen")


class Aliases(Model):
    """Which versions of a registered model carry an alias. Compared whole: equal if nobody moved one."""

    champion: str | None = None
    challenger: str | None = None
    previous: str | None = None
    canary: Canary | None = Field(None, description="None: the challenger, if there is one, waits")


class Event(Model):
    """One move of aliases, or one reason against a version: what MLflow keeps in a run of its own."""

    id: str = Field(description="of the run")
    model: str
    kind: EventKind
    state: EventState = Field(description="begun: under way, or its writer died")
    by: str
    when: datetime
    reason: str = ""
    before: Aliases
    after: Aliases = Field(description="as `before` if no alias was to move")
    note: str = Field("", description="how it ended, if not as it was meant to")
