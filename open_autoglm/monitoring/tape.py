"""What one endpoint has shown, read by read, and how much its counters grew meanwhile.

Prometheus' own ``increase`` extrapolates to the borders of its range, so its counts are no integers, and it
does not see what a counter held when it was read for the first time. Here a counter that was not there yet
stood at nothing, and the time a process was started says when all of its counters did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

Values = Sequence[float | None]
"""Of a series, at each read; None where it was not among those that were read."""


@dataclass(frozen=True)
class Series:
    """One series of an endpoint."""

    name: str
    labels: Mapping[str, str]
    values: Values

    def label(self, name: str) -> str:
        """To Prometheus, an empty label and none are the same, and it keeps none."""
        return self.labels.get(name, "")

    def has(self, labels: Mapping[str, str]) -> bool:
        return all(self.label(name) == value for name, value in labels.items())


@dataclass(frozen=True)
class Tape:
    """The reads of one endpoint in a window."""

    endpoint: str
    """Its address, for people."""
    times_s: tuple[float, ...]
    """Since the epoch, ascending."""
    lives: tuple[float, ...]
    """At each read, when the process that answered had been started, since the epoch; 0: unknown."""
    series: tuple[Series, ...]

    def __post_init__(self) -> None:
        assert {len(self.lives), *(len(one.values) for one in self.series)} <= {len(self.times_s)}

    def find(self, name: str, labels: Mapping[str, str]) -> list[Series]:
        return [one for one in self.series if one.name == name and one.has(labels)]

    def since(self, read: int) -> Tape:
        """Without what came before the ``read``-th."""
        series = tuple(Series(one.name, one.labels, one.values[read:]) for one in self.series)
        return Tape(self.endpoint, self.times_s[read:], self.lives[read:], series)

    def with_birth(self, begin_s: float) -> Tape:
        """If its process was started after ``begin_s``: with a first read at that moment, of nothing."""
        if not self.lives or not begin_s <= self.lives[0] < self.times_s[0]:
            return self
        born = self.lives[0]
        series = tuple(Series(one.name, one.labels, (None, *one.values)) for one in self.series)
        return Tape(self.endpoint, (born, *self.times_s), (born, *self.lives), series)


def increase(values: Values, lives: Sequence[float]) -> float:
    """How much a counter grew from the first read to the last one.

    With each new life of its process, or where it fell, it began again from nothing.
    """
    total, before = 0.0, (values[0] or 0.0) if values else 0.0
    for (life_before, life), value in zip(pairwise(lives), values[1:], strict=True):
        if life != life_before:
            before = 0.0
        if value is not None:
            total += value - before if value >= before else value
            before = value
    return total
