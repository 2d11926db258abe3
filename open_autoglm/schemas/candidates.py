"""What may be tried, and what it is tried on."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from open_autoglm.schemas.base import Device, Model, Precision, Scenario

ProbeStage = Literal[
    "missing",  # the package is not installed
    "installed",  # it cannot be imported, or is of a version or a build that will not do
    "importable",  # a library that it needs cannot be loaded
    "loadable",  # it does not work as far as it should without a device
    "no_device",  # all of it is here; the device, or a driver for it, is not, or it serves another kind
    "device",  # the device answers, but computing on it failed
    "crashed",  # the process that tried it died
    "timed_out",  # the process that tried it hung
    "ready",
]
"""How far an engine came: the highest rung reached, and why no further."""


class Probe(Model):
    """Whether an engine can run here, and if not, why and how to change that."""

    engine: str
    stage: ProbeStage
    version: str | None = None
    reason: str = Field(description="one sentence; says what was found when ready")
    install: str | None = Field(None, description="the command that would mend it")
    can_build: bool | None = Field(
        None, description="whether it compiled a plan here, which may need no device; None if not tried"
    )

    @property
    def ready(self) -> bool:
        """Whether it can run here."""
        return self.stage == "ready"


Knob = str | int | float | bool


Criterion = Literal["contribution", "taylor"]
CRITERION: Criterion = "contribution"
"""The default: on the demo GLM it kept more of the quality at both levels that were judged, 60 % against
48 % and 29 % against 20 %."""


class HeadPruning(Model):
    """Attention heads to remove from the checkpoint before an engine sees it: as many in every layer, so
    that what is left is a checkpoint like any other."""

    kv_groups: int = Field(ge=1, description="key/value heads kept in each layer, with their query heads")
    heads_per_group: int = Field(ge=1, description="query heads kept in each of those groups")
    of_kv_groups: int = Field(description="as the checkpoint has them")
    of_heads_per_group: int
    criterion: Criterion = Field(CRITERION, description="by which the least important are found")
    recover_steps: int = Field(0, ge=0, le=100_000, description="of distillation from the whole model")
    seed: int = Field(0, ge=0, description="chooses the calibration windows")

    @model_validator(mode="after")
    def _removes_something(self) -> Self:
        if self.kv_groups > self.of_kv_groups or self.heads_per_group > self.of_heads_per_group:
            raise ValueError(f"{self.heads} heads of {self.of_heads} are more than there are")
        if self.heads == self.of_heads:
            raise ValueError("nothing is removed")
        return self

    @property
    def heads(self) -> int:
        """Query heads kept in each layer."""
        return self.kv_groups * self.heads_per_group

    @property
    def of_heads(self) -> int:
        return self.of_kv_groups * self.of_heads_per_group

    @property
    def suffix(self) -> str:
        """What a candidate's id says of it: ``heads6of9``, and what is not the default."""
        parts = [f"heads{self.heads}of{self.of_heads}"]
        if self.kv_groups < self.of_kv_groups:
            parts.append(f"kv{self.kv_groups}of{self.of_kv_groups}")
        if self.criterion != CRITERION:
            parts.append(self.criterion)
        if self.recover_steps:
            parts.append(f"r{self.recover_steps}")
        if self.seed:
            parts.append(f"s{self.seed}")
        return "-".join(parts)


class Candidate(Model):
    """One way to serve the model: engine × precision × knobs, and why it is (not) on the list."""

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$", description="stable, readable, unique in a study")
    engine: str
    device: Device
    precision: Precision
    weight_bits: float = Field(description="mean stored bits per weight, scales included")
    knobs: dict[str, Knob] = Field(default_factory=dict)
    transform: HeadPruning | None = Field(None, description="what is done to the checkpoint first")
    proposed_because: str
    vetoed_because: str | None = None
    reference: bool = False
    baseline: bool = False
    incumbent: bool = Field(False, description="the registered champion, measured again beside the others")

    def vetoed(self, reason: str) -> Self:
        return self.model_copy(update={"vetoed_because": reason})


class Dimension(Model):
    """One knob of a candidate that an engine lets the search turn, and the values worth trying here."""

    knob: str
    values: tuple[Knob, ...]
    because: str = Field(description="what the knob trades")


class ExportedModel(Model):
    """The files a candidate needs, in a content-addressed directory. `path` equals the checkpoint's when
    the engine loads it as it is."""

    candidate_id: str
    path: Path
    digest: str
    route: str
    size_bytes: int
    build_s: float
    reused: bool = False
    details: dict[str, str | int | float | bool] = Field(default_factory=dict)


class Workload(Model):
    """The requests every candidate is timed on, saved once per study.

    The file at `path` is a ``.npz`` with one entry per round: ``prompts`` is
    ``int64[rounds, requests * batch, longest prompt]``, padded on the right; ``prompt_tokens`` and
    ``output_tokens`` are ``int64[rounds, requests]``; ``arrivals_ms`` is ``float64[rounds, requests]``,
    counted from the start of the round (zero unless the scenario is server).
    """

    path: Path
    sha256: str
    scenario: Scenario = "single_stream"
    batch_size: int
    prompt_tokens: int = Field(description="of the longest request")
    output_tokens: int = Field(description="of the longest request")
    rounds: int = Field(description="different rounds in the file; a longer run begins again")
    requests: int = Field(1, description="per round: 1, or the arrivals of a server round")
    request_rate_per_s: float | None = None
    length_mix: str | None = None
    slo_ttft_ms: float | None = Field(None, description="goodput: a request is good within both")
    slo_tpot_ms: float | None = None
    seed: int
    corpus: str
