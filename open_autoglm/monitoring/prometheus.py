"""Counters as Prometheus keeps them: its raw samples, by its HTTP interface.

A range selector in an instant query gives the samples as they were scraped, which ``/api/v1/query_range``
does not (prometheus.io/docs, "HTTP API").
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import takewhile
from typing import Literal, NamedTuple

import httpx
from pydantic import BaseModel, ValidationError

from open_autoglm.monitoring.http import ask, date_s, other_clock
from open_autoglm.monitoring.tape import Series, Tape
from open_autoglm.monitoring.windows import INFO, SERIES, NoWindow, Role, clock
from open_autoglm.serving.local import is_loopback

_UP = "up"
_STARTED = "process_start_time_seconds"
_LOOK_BACK = timedelta(days=1)
"""Whoever was not seen for so long is not known any more."""


class _Target(NamedTuple):
    """What Prometheus scrapes."""

    job: str
    instance: str


class _Matrix(BaseModel):
    """One series of an answer; numbers that may be infinite are texts in it."""

    metric: Mapping[str, str]
    values: tuple[tuple[float, float], ...]

    @property
    def target(self) -> _Target:
        return _Target(self.metric.get("job", ""), self.metric.get("instance", ""))

    @property
    def name(self) -> str:
        return self.metric["__name__"]


class _Data(BaseModel):
    resultType: Literal["matrix"]  # noqa: N815 - Prometheus' name for it
    result: tuple[_Matrix, ...]


class _Answer(BaseModel):
    status: Literal["success"]
    data: _Data
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prometheus:
    """A Prometheus server, or what speaks like one; user and password may be in its address."""

    url: str

    @property
    def name(self) -> Literal["prometheus"]:
        return "prometheus"

    def read(self, service: str, role: Role, begin: datetime, end: datetime) -> Sequence[Tape] | NoWindow:
        found = self._samples(_selector(SERIES, *_of_role(service, role)), begin, end)
        if isinstance(found, NoWindow):
            return found
        if not found:
            return self._why_nothing(service, role, begin, end)
        targets = {one.target for one in found}
        health = self._samples(_selector((_UP, _STARTED), *_of_targets(targets)), begin, end)
        if isinstance(health, NoWindow):
            return health
        of_target: dict[_Target, list[_Matrix]] = defaultdict(list)
        for one in (*found, *health):
            of_target[one.target].append(one)
        down = {target: since for target in sorted(targets) if (since := _down_since(of_target[target]))}
        if len(down) == len(targets):
            told = ", ".join(f"{instance} since {clock(since)}" for (_, instance), since in down.items())
            return NoWindow(f"no endpoint of {service} answers Prometheus: {told}")
        return [_tape(target, of_target[target]) for target in sorted(targets)]

    # ── questions ────────────────────────────────────────────────────────────────────────────────

    @property
    def _who(self) -> str:
        """Without the password."""
        return f"Prometheus at {httpx.URL(self.url).copy_with(userinfo=b'')}"

    def _samples(self, selector: str, begin: datetime, end: datetime) -> Sequence[_Matrix] | NoWindow:
        """Of all series that are selected, what was scraped from ``begin`` to ``end``."""
        # Prometheus 3 leaves the first moment of a range out.
        range_ms = math.ceil((end - begin).total_seconds() * 1e3) + 1
        parameters = {"query": f"{selector}[{range_ms}ms]", "time": f"{end.timestamp():.3f}"}
        answer = ask(
            self._who,
            f"{self.url.rstrip('/')}/api/v1/query",
            parameters=parameters,
            local=is_loopback(self.url),
        )
        if isinstance(answer, NoWindow):
            return answer
        theirs_s = date_s(answer)
        if theirs_s is not None and (differs := other_clock(self._who, theirs_s, answer)):
            return differs
        try:
            found = _Answer.model_validate_json(answer.body)
        except ValidationError as error:
            problem = error.errors()[0]
            return NoWindow(f"{self._who} answered with something else than samples: {problem['msg']}")
        if found.warnings:
            return NoWindow(f"{self._who} answered only in part: {found.warnings[0]}")
        begin_s = begin.timestamp()
        within = (
            _Matrix(metric=one.metric, values=tuple(value for value in one.values if value[0] >= begin_s))
            for one in found.data.result
        )
        return [one for one in within if one.values]

    def _why_nothing(self, service: str, role: Role, begin: datetime, end: datetime) -> NoWindow:
        """Whether its endpoint is down, is not scraped any more, or never was."""
        seen = self._samples(_selector((INFO,), *_of_role(service, role)), end - _LOOK_BACK, end)
        if isinstance(seen, NoWindow):
            return seen
        if not seen:
            return NoWindow(f"{self._who} knows no {role} of {service}: is its endpoint scraped?")
        last = max(seen, key=lambda one: one.values[-1])
        when = clock(_moment(last.values[-1][0]))
        health = self._samples(_selector((_UP,), *_of_targets({last.target})), begin, end)
        if isinstance(health, NoWindow):
            return health
        why = "does not answer Prometheus" if health else "is not scraped any more"
        return NoWindow(f"{last.target.instance}, which had the {role} of {service} until {when}, {why}")


# ── selectors ────────────────────────────────────────────────────────────────────────────────────


def _selector(names: Iterable[str], *matchers: str) -> str:
    return "{" + ",".join((_any_of("__name__", names), *matchers)) + "}"


def _of_role(service: str, role: Role) -> tuple[str, ...]:
    return f"model_name={_text(service)}", f"role={_text(role)}"


def _of_targets(targets: Collection[_Target]) -> tuple[str, ...]:
    """More than these, if two jobs have targets of the same address."""
    return (
        _any_of("job", {re.escape(target.job) for target in targets}),
        _any_of("instance", {re.escape(target.instance) for target in targets}),
    )


def _any_of(label: str, patterns: Iterable[str]) -> str:
    return f"{label}=~{_text('|'.join(sorted(patterns)))}"


def _text(value: str) -> str:
    """PromQL's strings are Go's, and those of JSON are among them."""
    return json.dumps(value, ensure_ascii=False)


# ── samples ──────────────────────────────────────────────────────────────────────────────────────


def _moment(time_s: float) -> datetime:
    return datetime.fromtimestamp(time_s, UTC)


def _down_since(found: Iterable[_Matrix]) -> datetime | None:
    """Since when the target has not answered; None if it did when it was scraped last."""
    (up, *_) = [*(one.values for one in found if one.name == _UP), ()]
    failed = list(takewhile(lambda sample: sample[1] == 0, reversed(up)))
    return _moment(failed[-1][0]) if failed else None


def _tape(target: _Target, found: Sequence[_Matrix]) -> Tape:
    """The scrapes that succeeded, side by side: all samples of one scrape have the same time."""
    shown = [one for one in found if one.name not in (_UP, _STARTED)]
    samples = [dict(one.values) for one in shown]
    newest_s = max(time_s for one in samples for time_s in one)
    answered = {time_s for one in found if one.name == _UP for time_s, up in one.values if up == 1}
    # A scrape may have come between our two questions: then its other samples are not here.
    times = sorted({time_s for time_s in answered if time_s <= newest_s}.union(*samples))
    started = dict(next((one.values for one in found if one.name == _STARTED), ()))
    return Tape(
        endpoint=target.instance,
        times_s=tuple(times),
        lives=tuple(started.get(time_s, 0.0) for time_s in times),
        series=tuple(
            Series(one.name, one.metric, tuple(values.get(time_s) for time_s in times))
            for one, values in zip(shown, samples, strict=True)
        ),
    )
