"""The export ledger: which route works for which model type and versions, learned by preflight.

One JSON file, readable by people.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import AwareDatetime

from open_autoglm.files import digest_of, file_lock, write_atomic
from open_autoglm.schemas import Model

Outcome = Literal["works", "fails"]


class LedgerEntry(Model):
    """What a preflight found."""

    model_type: str
    route: str
    traits: str
    versions: dict[str, str]
    outcome: Outcome
    reason: str
    checked: AwareDatetime


class Ledger:
    """The entries in ``path``; use inside ``with ledger.locked()`` when reading and writing together."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One preflight at a time; others wait and then read its result."""
        with file_lock(self._path.with_suffix(".lock")):
            yield

    def entries(self) -> dict[str, LedgerEntry]:
        if not self._path.exists():
            return {}
        stored = json.loads(self._path.read_text())
        return {key: LedgerEntry.model_validate(entry) for key, entry in stored.items()}

    def get(self, model_type: str, route: str, traits: str, versions: dict[str, str]) -> LedgerEntry | None:
        return self.entries().get(_key(model_type, route, traits, versions))

    def put(
        self,
        model_type: str,
        route: str,
        traits: str,
        versions: dict[str, str],
        outcome: Outcome,
        reason: str,
    ) -> LedgerEntry:
        entry = LedgerEntry(
            model_type=model_type,
            route=route,
            traits=traits,
            versions=versions,
            outcome=outcome,
            reason=reason,
            checked=datetime.now(UTC),
        )
        entries = self.entries() | {_key(model_type, route, traits, versions): entry}
        stored = {key: value.model_dump(mode="json") for key, value in sorted(entries.items())}
        write_atomic(self._path, json.dumps(stored, indent=2))
        return entry


def _key(model_type: str, route: str, traits: str, versions: dict[str, str]) -> str:
    return f"{model_type}/{route}/{digest_of([traits, versions])[:16]}"
