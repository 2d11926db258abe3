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


RECOVER_STEPS = 100
"""A study's: on the calibration texts, not quite once through them."""
RECOVER_S = 600.0
"""For as long a recovery may work, whatever the machine."""


class HeadPruning(Model):
    """Attention heads to remove from the checkpoint before an engine sees it: as many in every layer, so
    that what is left is a checkpoint like any other."""

    kv_groups: int = Field(ge=1, description="key/value heads kept in each layer, with their query heads")
    heads_per_group: int = Field(ge=1, description="query heads kept in each of those groups")
    of_kv_groups: int = Field(description="as the checkpoint has them")
    of_heads_per_group: int
    criterion: Criterion = Field(CRITERION, description="by which the least important are found")
    recover_steps: int = Field(
        0, ge=0, le=100_000, description="of distillation from the whole model, at most; 0: none"
    )
    recover_s: float = Field(RECOVER_S, gt=0, description="for them, at most: fewer if they take longer")
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
    def unrecovered(self) -> Self:
        """The same cut, and nothing after it."""
        return self.model_copy(update={"recover_steps": 0, "recover_s": RECOVER_S})

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
            parts += [f"t{self.recover_s:g}"] if self.recover_s != RECOVER_S else []
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


class Recovery(Model):
    """What came of distilling a pruned model from the whole one, on calibration texts.

    Divergences are KL(whole‖pruned) in nats per token of texts that were held out from learning.
    """

    helped: bool = Field(description="false: the pruned checkpoint was kept as it was")
    reason: str = Field(description="one sentence: why it was kept, or was not")
    steps: int
    kept_step: int = Field(description="after which the weights were that are kept; 0: before the first")
    seconds: float = Field(description="of work, over all interruptions")
    learning_parameters: int
    tokens: int = Field(description="learned from, repetitions included")
    divergence_before: float | None = Field(None, description="None if it was not finite")
    divergence_after: float | None = Field(None, description="of the checkpoint as it is stored")
    gain_interval: tuple[float, float] | None = Field(
        None, description="95 % interval of before - after, over blocks of tokens"
    )
    record: Path = Field(description="the losses of all steps and looks, with what they were made from")


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
    recovery: Recovery | None = Field(None, description="of a candidate whose transform asks for it")


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
