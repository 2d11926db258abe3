"""Moving aliases: promote, roll back, try a challenger. Versions are never rewritten.

MLflow changes one alias at a time and knows no condition on a write. So every move

1. is written down first, as an event that is begun, with what it will change and why;
2. gives way if another move is under way, or if somebody moved an alias since it was decided. Of two that
   begin at once both may give way, but never neither: each looks for the other after it has written;
3. writes the aliases, the decisive one (champion, if it moves) after what it needs and before what it leaves
   behind: at each moment the champion's alias names a version that can be served;
4. ends its event.

A move whose writer died is found by the next one: finished if its decisive alias had moved, and else undone.
Who moves aliases in MLflow's own pages takes no part in this: a write of his between 2 and 3 is overwritten.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from open_autoglm.errors import UserError
from open_autoglm.schemas import Alias, Aliases, Canary, Event, EventKind, without_password
from open_autoglm.tracking.bundles import CHAMPION, Bundles, require_bundle
from open_autoglm.tracking.events import Events

CHALLENGER, PREVIOUS = "challenger", "previous"
_CANARY = "autoglm.canary"

_LONGEST_MOVE_S = 60.0
"""A move takes about ten requests; who is not done by then is taken for dead."""


class UnderWay(UserError):
    """Somebody else is moving aliases of the same model; asking again soon will help."""


class Moves(Events, Bundles):
    """What may be done to the aliases of a registered model."""

    def aliases(self, name: str) -> Aliases:
        """Who carries which alias now. Raises Unreachable, and UserError if there is no such model."""
        with self._asking():
            return self._aliases(name)

    def promote(
        self,
        name: str,
        version: str | None = None,
        *,
        by: str,
        reason: str = "",
        evidence: Mapping[str, Any] | None = None,
        expected: Mapping[Alias, str | None] | None = None,
    ) -> Event:
        """Make ``version``, or the challenger, the champion; the champion becomes `previous`.

        ``expected`` are versions that must carry their aliases still, such as those a judgement rests on.
        Raises UserError if that cannot be, or somebody else was faster; then nothing was moved.
        """
        return self._move(
            name, "promote", lambda now: promoted(name, now, version), by, reason, evidence, expected
        )

    def rollback(
        self,
        name: str,
        *,
        champion: bool = False,
        by: str,
        reason: str = "",
        evidence: Mapping[str, Any] | None = None,
        expected: Mapping[Alias, str | None] | None = None,
    ) -> Event:
        """Take the challenger away; without one, or if ``champion``, make `previous` the champion again.

        What was champion becomes `previous`, so that the same again goes back. Raises as `promote`.
        """
        return self._move(
            name, "rollback", lambda now: rolled_back(name, now, champion), by, reason, evidence, expected
        )

    def canary(
        self,
        name: str,
        version: str | None,
        canary: Canary,
        *,
        by: str,
        reason: str = "",
        expected: Mapping[Alias, str | None] | None = None,
    ) -> Event:
        """Make ``version`` the challenger, or give the one there is another share. Raises as `promote`."""
        return self._move(
            name, "canary", lambda now: challenged(name, now, version, canary), by, reason, None, expected
        )

    def stop_canary(
        self, name: str, *, by: str, reason: str = "", expected: Mapping[Alias, str | None] | None = None
    ) -> Event:
        """Take the challenger away. Raises as `promote`."""
        return self._move(name, "stop", lambda now: unchallenged(name, now), by, reason, None, expected)

    def _move(
        self,
        name: str,
        kind: EventKind,
        decide: Callable[[Aliases], Aliases],
        by: str,
        reason: str,
        evidence: Mapping[str, Any] | None,
        expected: Mapping[Alias, str | None] | None,
    ) -> Event:
        with self._asking():
            self._give_way(name)
            before = self._aliases(name)
            _check_expected(name, before, expected or {})
            after = decide(before)
            self._check_versions(name, before, after)
            event = self._begin(name, kind, before, after, by=by, reason=reason, evidence=evidence)
            try:
                self._give_way(name, to_others_than=event.id)
                if self._aliases(name) != before:
                    raise UserError(f"somebody else has moved an alias of {name} meanwhile: {_look(name)}")
            except UserError as refusal:
                self._end(event, "failed", str(refusal))
                raise
            self._write(name, before, after)
            return self._end(event, "done")

    # ── order ────────────────────────────────────────────────────────────────────────────────────

    def _give_way(self, name: str, to_others_than: str = "") -> None:
        """Raise UserError while another move is under way; clear up after those that died."""
        for event in self._moves_under_way(name):
            if event.id == to_others_than:
                continue
            if time.time() - event.when.timestamp() < _LONGEST_MOVE_S:
                doing = f"{event.by} is moving aliases of {name} just now ({event.kind})"
                raise UnderWay(f"{doing}: {_look(name)}")
            self._clear_up(event)

    def _clear_up(self, event: Event) -> None:
        """Finish a move whose writer died, or undo it; what somebody changed since then stays."""
        now = self._aliases(event.model)
        if went := getattr(now, decisive(event)) == getattr(event.after, decisive(event)):
            aim, from_ = event.after, event.before
        else:
            aim, from_ = event.before, event.after
        left = {name for name in Aliases.model_fields if getattr(now, name) == getattr(from_, name)}
        self._write(event.model, now, now.model_copy(update={name: getattr(aim, name) for name in left}))
        if went:
            self._end(event, "done", "its writer did not end it; what was left was done by the next move")
        else:
            self._end(event, "failed", "its writer did not end it, and it was undone by the next move")

    def _write(self, name: str, now: Aliases, wanted: Aliases) -> None:
        """In an order that leaves something to serve wherever it is cut off."""
        if wanted.previous != now.previous:
            self._set(name, PREVIOUS, wanted.previous)
        if wanted.canary is not None and wanted.canary != now.canary:
            self._client.set_registered_model_tag(name, _CANARY, wanted.canary.model_dump_json())
        if wanted.champion != now.champion:
            self._set(name, CHAMPION, wanted.champion)
        if wanted.challenger != now.challenger:
            self._set(name, CHALLENGER, wanted.challenger)
        if wanted.canary is None and now.canary is not None:
            self._client.delete_registered_model_tag(name, _CANARY)

    def _set(self, name: str, alias: str, version: str | None) -> None:
        if version is None:
            self._client.delete_registered_model_alias(name, alias)
        else:
            self._client.set_registered_model_alias(name, alias, version)

    # ── reading ──────────────────────────────────────────────────────────────────────────────────

    def _aliases(self, name: str) -> Aliases:
        from mlflow.exceptions import MlflowException

        try:
            model = self._client.get_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            place = without_password(self.uri)
            raise UserError(
                f"there is no registered model {name!r} in {place}: run a study, or correct the name"
            ) from error
        found = {alias: str(version) for alias, version in model.aliases.items()}
        known = {alias: found[alias] for alias in (CHAMPION, CHALLENGER, PREVIOUS) if alias in found}
        return Aliases.model_validate({**known, "canary": _canary(model.tags.get(_CANARY))})

    def _check_versions(self, name: str, before: Aliases, after: Aliases) -> None:
        """Refuse to give champion or challenger a version that is not there, or holds no bundle."""
        for version in {after.champion, after.challenger} - {before.champion, before.challenger, None}:
            require_bundle(self.version(name, str(version)))


def _canary(tag: str | None) -> Canary | None:
    """None if somebody wrote something else there: then the challenger waits."""
    try:
        return None if tag is None else Canary.model_validate_json(tag)
    except ValidationError:
        return None


def _check_expected(name: str, now: Aliases, expected: Mapping[Alias, str | None]) -> None:
    for alias, version in expected.items():
        if (found := getattr(now, alias)) != version:
            is_now, was = _who(found), _who(version)
            raise UserError(f"the {alias} of {name} is {is_now} by now, not {was}: {_look(name)}")


def _who(version: str | None) -> str:
    return "none" if version is None else f"version {version}"


def _look(name: str) -> str:
    return f"see open-autoglm events {name}, then ask again"


# ── decisions ────────────────────────────────────────────────────────────────────────────────────


def promoted(name: str, now: Aliases, version: str | None) -> Aliases:
    """The aliases after ``version``, or the challenger, became champion. Raises UserError."""
    version = version or now.challenger
    if version is None:
        raise UserError(f"{name} has no challenger to promote: say which --version")
    if version == now.champion:
        raise UserError(f"version {version} is the champion of {name} already")
    return _crowned(now, version)


def rolled_back(name: str, now: Aliases, champion: bool) -> Aliases:
    """The aliases without the challenger, or, if ``champion`` or there is none, with `previous` back."""
    if now.challenger is not None and not champion:
        return unchallenged(name, now)
    if now.previous is None:
        raise UserError(f"{name} has no previous champion to go back to: promote a version instead")
    return _crowned(now, now.previous)


def challenged(name: str, now: Aliases, version: str | None, canary: Canary) -> Aliases:
    """The aliases with ``version``, or the challenger there is, under test. Raises UserError."""
    version = version or now.challenger
    if version is None:
        raise UserError(f"{name} has no challenger: say which --version")
    if now.champion is None:
        raise UserError(f"{name} has no champion to challenge: promote a version first")
    if version == now.champion:
        raise UserError(f"version {version} is the champion of {name}: it cannot challenge itself")
    if not canary.weight_percent and not canary.shadow_percent:
        raise UserError("a challenger that is given nothing shows nothing: weight or shadow, above 0 %")
    return now.model_copy(update={"challenger": version, "canary": canary})


def unchallenged(name: str, now: Aliases) -> Aliases:
    """The aliases without the challenger. Raises UserError if there is none."""
    if now.challenger is None:
        raise UserError(f"{name} has no challenger to stop")
    return now.model_copy(update={"challenger": None, "canary": None})


def _crowned(now: Aliases, version: str) -> Aliases:
    tried = now if now.challenger != version else now.model_copy(update={"challenger": None, "canary": None})
    return tried.model_copy(update={"champion": version, "previous": now.champion})


def decisive(event: Event) -> str:
    """The field of `Aliases` that says whether a move has happened whose writer died."""
    changed = [
        alias
        for alias in (CHAMPION, CHALLENGER)
        if getattr(event.before, alias) != getattr(event.after, alias)
    ]
    return changed[0] if changed else "canary"
