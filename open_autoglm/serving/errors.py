"""What may go wrong with a newcomer, and with the name of who is asked."""

from __future__ import annotations

from collections.abc import Sequence

from open_autoglm.errors import UserError
from open_autoglm.schemas import Model


class Rejected(Exception):
    """A newcomer that may not answer; what answered before goes on."""

    def __init__(self, reason: str, checks: Sequence[Model] = ()) -> None:
        super().__init__(reason)
        self.reason = reason
        self.checks = tuple(checks)
        """What was looked at, the good with the bad."""


class UnknownModel(UserError):
    """Another model than the one that is served."""
