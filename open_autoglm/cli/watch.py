"""``open-autoglm watch``: judge what is served, from the shell."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from functools import partial

import click

from open_autoglm.monitoring.anchor import trial_anchor
from open_autoglm.monitoring.config import WatchSpec, find_watch
from open_autoglm.monitoring.diagnosis import diagnose, remember_good_times
from open_autoglm.monitoring.sources import fetch
from open_autoglm.monitoring.watch import look
from open_autoglm.monitoring.watch_store import WatchStore
from open_autoglm.schemas import Judgement
from open_autoglm.settings import Settings

EXIT_CODES = {"ok": 0, "breached": 3, "no_data": 4}


def run_watch(config: str, *, once: bool, as_json: bool) -> int:
    """Judge the last window, or one after the other until interrupted. Starts nothing: that is the flow's.

    Returns 0 if all is well, 3 at a breach, 4 where there is nothing to judge by.
    """
    watch = find_watch(config, Settings().home)
    while True:
        judgement = _look(watch)
        click.echo(judgement.model_dump_json() if as_json else _words(judgement))
        if once:
            return EXIT_CODES[judgement.state]
        time.sleep(_pause_s(judgement, watch))


def _look(watch: WatchSpec) -> Judgement:
    home, now = Settings().home, datetime.now(UTC)
    store = WatchStore(home, watch.service)
    judgement = look(
        watch, lambda begin: fetch(watch, home, begin, now), store, now, partial(trial_anchor, home)
    )
    if judgement.act:
        return judgement.model_copy(update={"cause": diagnose(watch, judgement, store, home)})
    remember_good_times(watch, judgement, store, home)
    return judgement


def _pause_s(judgement: Judgement, watch: WatchSpec) -> float:
    """Until the next look: a window, or less where that tells more."""
    window_s = watch.policy.window_s
    if judgement.again is None:
        return window_s
    return min(window_s, max(0.0, (judgement.again - datetime.now(UTC)).total_seconds()))


def _words(judgement: Judgement) -> str:
    lines = [f"{judgement.service} at {judgement.at:%H:%M:%S} UTC: {judgement.state.replace('_', ' ')}"]
    lines += [f"  {reason}" for reason in judgement.reasons]
    if (cause := judgement.cause) is not None:
        lines.append(f"  cause: {cause.kind}: {cause.told}")
    return "\n".join(lines)
