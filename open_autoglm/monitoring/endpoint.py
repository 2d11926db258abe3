"""Counters as the endpoints of this user on this machine remember them: no Prometheus is needed."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from open_autoglm.monitoring.http import ask, other_clock
from open_autoglm.monitoring.tape import Series, Tape
from open_autoglm.monitoring.windows import NoWindow, Role
from open_autoglm.schemas import History
from open_autoglm.serving.local import LocalEndpoint, local_endpoints

_SET_S = 5.0
"""A clock that is disciplined, and not set, goes astray by milliseconds in a minute."""


@dataclass(frozen=True)
class LocalEndpoints:
    """The server at ``address``, or all, of those that leave their files under ``home``."""

    home: Path
    address: str | None = None

    @property
    def name(self) -> Literal["endpoint"]:
        return "endpoint"

    def read(self, service: str, role: Role, begin: datetime, end: datetime) -> Sequence[Tape] | NoWindow:
        """Of those that serve it. A server that does not answer is passed over if another one does."""
        here = local_endpoints(self.home)
        if not here:
            return NoWindow(f"no endpoint runs here: none left its file under {self.home / 'endpoints'}")
        if self.address is not None:
            here = tuple(endpoint for endpoint in here if endpoint.is_at(self.address))
        if not here:
            return NoWindow(self._nobody_there())
        found = [_history(endpoint, begin, end) for endpoint in here]
        tapes = [
            _tape(endpoint, history)
            for endpoint, history in zip(here, found, strict=True)
            if isinstance(history, History) and _serves(history, service)
        ]
        if not tapes:
            reasons = [history.reason for history in found if isinstance(history, NoWindow)]
            return NoWindow("; ".join(reasons) or f"no endpoint here serves {service}")
        jumped = next((tape for tape in tapes if isinstance(tape, NoWindow)), None)
        return jumped or [tape for tape in tapes if isinstance(tape, Tape)]

    def _nobody_there(self) -> str:
        urls = ", ".join(endpoint.url for endpoint in local_endpoints(self.home))
        return (
            f"no endpoint of this user on this machine serves at {self.address}, but at {urls}: write that "
            "as `endpoint`, or name a `prometheus` that reads the other one"
        )


def _history(endpoint: LocalEndpoint, begin: datetime, end: datetime) -> History | NoWindow:
    who = f"the endpoint at {endpoint.url}"
    try:
        trusted = ssl.create_default_context(cafile=endpoint.certificate) if endpoint.certificate else None
    except OSError as error:
        return NoWindow(f"the certificate of {who}, {endpoint.certificate}, cannot be read: {error.strerror}")
    answer = ask(
        who,
        f"{endpoint.url}/admin/history",
        parameters={"begin": begin.isoformat(), "end": end.isoformat()},
        headers={"Authorization": f"Bearer {endpoint.token}"},
        trusted=trusted,
        local=True,
    )
    if isinstance(answer, NoWindow):
        return answer
    try:
        history = History.model_validate_json(answer.body)
    except ValidationError as error:
        return NoWindow(f"{who} answered with something else than its history: {error.errors()[0]['msg']}")
    return other_clock(who, history.now_s, answer) or history


def _serves(history: History, service: str) -> bool:
    return any(one.labels.get("model_name") == service for one in history.series)


def _tape(endpoint: LocalEndpoint, history: History) -> Tape | NoWindow:
    """NoWindow if the endpoint's clock was set meanwhile: nobody knows which moments those were."""
    ahead = [time_s - boot_s for time_s, boot_s in zip(history.times_s, history.boot_s, strict=True)]
    set_by_s = max((after - before for before, after in pairwise(ahead)), key=abs, default=0.0)
    if abs(set_by_s) > _SET_S:
        return NoWindow(f"the clock of the endpoint at {endpoint.url} was set by {set_by_s:.0f} s meanwhile")
    return Tape(
        endpoint=endpoint.url,
        times_s=history.times_s,
        lives=(history.started_s,) * len(history.times_s),
        series=tuple(Series(one.name, one.labels, one.values) for one in history.series),
    )
