"""``open-autoglm promote``, ``rollback``, ``canary``, ``events``: aliases in the registry, who moved them."""

from __future__ import annotations

import getpass
import json
import os

import click

from open_autoglm.errors import UserError
from open_autoglm.schemas import Alias, Canary, Event
from open_autoglm.settings import Settings
from open_autoglm.tracking import Tracker, sentence


def run_promote(
    name: str, *, version: str | None, expected: str | None, by: str | None, reason: str, as_json: bool
) -> int:
    """Make a version the champion; 0."""
    event = _tracker().promote(
        name, version, by=by or _user(), reason=reason, expected=_champion_is(expected)
    )
    return _tell(event, as_json)


def run_rollback(
    name: str, *, champion: bool, expected: str | None, by: str | None, reason: str, as_json: bool
) -> int:
    """Take the challenger away, or bring the champion before back; 0."""
    event = _tracker().rollback(
        name, champion=champion, by=by or _user(), reason=reason, expected=_champion_is(expected)
    )
    if event.before.champion == event.after.champion and not as_json:
        click.echo(f"the challenger was taken away, and version {event.after.champion} stays champion:")
        click.echo("--champion goes back to the champion before")
    return _tell(event, as_json)


def run_canary(
    name: str,
    *,
    stop: bool,
    version: str | None,
    weight: float | None,
    shadow: float | None,
    expected: str | None,
    by: str | None,
    reason: str,
    as_json: bool,
) -> int:
    """Give a challenger its share of the requests, or take it away; 0."""
    who, champion = by or _user(), _champion_is(expected)
    if stop:
        if (version, weight, shadow) != (None, None, None):
            raise UserError("--stop takes the challenger away: it needs no --version, --weight or --shadow")
        event = _tracker().stop_canary(name, by=who, reason=reason, expected=champion)
    else:
        canary = Canary(weight_percent=weight or 0, shadow_percent=shadow or 0)
        event = _tracker().canary(name, version, canary, by=who, reason=reason, expected=champion)
    return _tell(event, as_json)


def run_events(name: str, *, limit: int, as_json: bool) -> int:
    """Print who carries which alias, and the last events, newest first; 0."""
    tracker = _tracker()
    aliases, events = tracker.aliases(name), tracker.events(name, limit)
    if as_json:
        told = {"aliases": aliases.model_dump(), "events": [e.model_dump(mode="json") for e in events]}
        click.echo(json.dumps(told))
        return 0
    for alias in ("champion", "challenger", "previous"):
        click.echo(f"{alias:<10} {getattr(aliases, alias) or '–'}")
    for event in events:
        click.echo(f"{event.when:%Y-%m-%d %H:%M:%S} UTC  {event.kind:<8}  {event.by}: {sentence(event)}")
        if event.reason and event.kind != "rejected":
            click.echo(f"{'':<25}{event.reason}")
    return 0


def _tracker() -> Tracker:
    settings = Settings()
    return Tracker(settings.mlflow_uri, settings.mlflow_artifacts)


def _tell(event: Event, as_json: bool) -> int:
    click.echo(event.model_dump_json() if as_json else sentence(event))
    return 0


def _champion_is(version: str | None) -> dict[Alias, str]:
    return {} if version is None else {"champion": version}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run as a number without a name
        return f"uid {os.getuid()}"
