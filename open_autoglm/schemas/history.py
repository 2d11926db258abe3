"""What an endpoint remembers of itself: its series at the moments it looked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from pydantic import Field, model_validator

from open_autoglm.schemas.base import Model


class HistorySeries(Model):
    """One series of Prometheus' text format, over time."""

    name: str
    labels: Mapping[str, str]
    values: tuple[float | None, ...] = Field(description="at each moment; None: it was not there")


class History(Model):
    """Cumulative counters and gauges of one run of an endpoint, in the order they were read."""

    now_s: float = Field(description="the endpoint's clock as it answers, since the epoch")
    started_s: float = Field(description="when all counters were zero")
    times_s: tuple[float, ...] = Field(description="moments, by the endpoint's clock")
    boot_s: tuple[float, ...] = Field(description="the same moments by the kernel's clock, which nobody sets")
    series: tuple[HistorySeries, ...]

    @model_validator(mode="after")
    def _has_a_value_per_moment(self) -> Self:
        lengths = {len(self.times_s), len(self.boot_s), *(len(one.values) for one in self.series)}
        if len(lengths) > 1:
            raise ValueError("each series has one value per moment")
        return self
