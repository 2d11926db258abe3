"""From where on a figure speaks, when a cause is to be named."""

from __future__ import annotations

from pydantic import Field

from open_autoglm.schemas import Model


class CausePolicy(Model):
    """Each with its reason; a breach is explained by the same figures for everybody."""

    least_change: float = Field(
        0.1, ge=0, description="of the mean: windows of the same traffic differ by 5 to 10 %"
    )
    least_growth: float = Field(
        0.1,
        ge=0,
        description="of arrivals or lengths, for the same reason; more where there are few requests",
    )
    golden_samples: int = Field(
        3, ge=1, description="fewer have no spread to speak of; a slow endpoint answers few in half a minute"
    )
    golden_tolerance: float = Field(
        0.1, ge=0, description="by so much two probes of a healthy endpoint may differ"
    )
    study_tolerance: float = Field(
        2.0,
        ge=0,
        description="the same against the study's figures, taken at another time and perhaps on another host",
    )
    busy_share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="of the probe: if clients take more, it is they who kept the engine from being timed",
    )
    least_share: float = Field(0.4, ge=0, le=1, description="of the rise, that a cause must explain")
