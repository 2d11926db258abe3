"""Who moved which alias, when and why: one MLflow run per event, beside the studies of the same model.

A run is made once and ended once, and never changed afterwards: RUNNING is an event that was begun, FINISHED
one that was done, FAILED one that was refused or undone. Studies are found by a tag that events have not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from open_autoglm.errors import UserError
from open_autoglm.schemas import Aliases, Event, EventKind, EventState
from open_autoglm.tracking.connection import LONGEST_TAG, Connection

REJECTED: EventKind = "rejected"
_EVENT, _BY, _REASON, _NOTE = "autoglm.event", "autoglm.by", "autoglm.reason", "autoglm.note"
_BEFORE, _AFTER = "autoglm.before", "autoglm.after"
_STATES: dict[str, EventState] = {"RUNNING": "begun", "FINISHED": "done"}


class Events(Connection):
    """The log of a registered model: it is added to, and nothing is taken away."""

    def events(self, name: str, limit: int = 100) -> list[Event]:
        """The last ``limit`` events, newest first. Raises Unreachable, UserError if one cannot be read."""
        with self._asking():
            return self._events(name, f"tags.`{_EVENT}` LIKE '%'", limit)

    def record_rejection(
        self, name: str, aliases: Aliases, *, by: str, reason: str, evidence: Mapping[str, Any]
    ) -> Event:
        """That a version which an alias names is not served, and why. Raises Unreachable."""
        with self._asking():
            event = self._begin(name, REJECTED, aliases, aliases, by=by, reason=reason, evidence=evidence)
            return self._end(event, "done")

    def _moves_under_way(self, name: str) -> list[Event]:
        return self._events(
            name, f"tags.`{_EVENT}` != '{REJECTED}' and attributes.status = 'RUNNING'", limit=100
        )

    def _events(self, name: str, which: str, limit: int) -> list[Event]:
        experiment = self._client.get_experiment_by_name(_experiment_of(name))
        if experiment is None:
            return []
        newest_first = ["attributes.start_time DESC"]
        runs = self._client.search_runs(
            [experiment.experiment_id], which, max_results=limit, order_by=newest_first
        )
        return [_read(name, run) for run in runs]

    def _begin(
        self,
        name: str,
        kind: EventKind,
        before: Aliases,
        after: Aliases,
        *,
        by: str,
        reason: str,
        evidence: Mapping[str, Any] | None,
    ) -> Event:
        tags = {
            _EVENT: kind,
            _BY: by,
            _REASON: reason[:LONGEST_TAG],
            _BEFORE: before.model_dump_json(),
            _AFTER: after.model_dump_json(),
            "mlflow.user": by,
        }
        experiment_id = self._experiment(_experiment_of(name))
        run = self._client.create_run(experiment_id, run_name=f"event-{kind}", tags=tags)
        event = _read(name, run)
        if evidence is not None:
            self._client.log_text(event.id, json.dumps(evidence, indent=2), "evidence.json")
        return event

    def _end(self, event: Event, state: EventState, note: str = "") -> Event:
        ended = event.model_copy(update={"state": state, "note": note})
        self._log(event.id, tags={_NOTE: note, "mlflow.note.content": sentence(ended)})
        self._client.set_terminated(event.id, "FINISHED" if state == "done" else "FAILED")
        return ended


def _experiment_of(name: str) -> str:
    """Where the studies of the model are, too."""
    return f"open-autoglm/{name}"


def _read(name: str, run: Any) -> Event:
    tags = run.data.tags
    try:
        return Event(
            id=run.info.run_id,
            model=name,
            kind=tags[_EVENT],
            state=_STATES.get(run.info.status, "failed"),
            by=tags[_BY],
            when=datetime.fromtimestamp(run.info.start_time / 1000, UTC),
            reason=tags.get(_REASON, ""),
            before=Aliases.model_validate_json(tags[_BEFORE]),
            after=Aliases.model_validate_json(tags[_AFTER]),
            note=tags.get(_NOTE, ""),
        )
    except (KeyError, ValidationError) as error:
        raise UserError(
            f"the MLflow run {run.info.run_id} is no event that this open-autoglm can read: delete it if it "
            "is nobody's"
        ) from error


def sentence(event: Event) -> str:
    """What the event did, in words."""
    if event.kind == REJECTED:
        return f"{event.model}: {event.reason}"
    changes = [
        f"{alias} {_was(getattr(event.before, alias))} → {_was(getattr(event.after, alias))}"
        for alias in ("champion", "challenger", "previous")
        if getattr(event.before, alias) != getattr(event.after, alias)
    ]
    if (canary := event.after.canary) is not None and canary != event.before.canary:
        changes.append(f"{canary.weight_percent:g} % of the requests, {canary.shadow_percent:g} % shadowed")
    end = {"begun": " (not finished)", "done": "", "failed": " (not done)"}[event.state]
    note = f": {event.note}" if event.note else ""
    return f"{event.model}: {', '.join(changes) or 'nothing was moved'}{end}{note}"


def _was(version: str | None) -> str:
    return "none" if version is None else f"version {version}"
