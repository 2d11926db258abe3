"""A trial with its outcome, the verdict, and what is kept and delivered of a study."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from open_autoglm.schemas.base import FORMAT_VERSION, STUDY_FORMAT_VERSION, Model
from open_autoglm.schemas.candidates import Candidate, ExportedModel, Workload
from open_autoglm.schemas.evidence import (
    Comparison,
    Fall,
    GoldenPrompt,
    Measurements,
    Metric,
    QualityReport,
    Race,
    Screening,
)
from open_autoglm.schemas.facts import Analysis, Checkpoint, FileDigest
from open_autoglm.schemas.request import OptimizeSpec
from open_autoglm.units import quantity

TrialStatus = Literal[
    "vetoed", "failed", "crashed", "out_of_memory", "timed_out", "incorrect", "stopped", "ok"
]
"""``stopped``: able, but out of the race before its end, with the evidence for it."""


class Miss(Model):
    """One limit that a candidate does not meet, and by how much."""

    limit: str
    allowed: float
    measured: float
    unit: str
    decided_by: str

    def sentence(self) -> str:
        beyond = "<" if self.limit == "min_quality" else ">"
        measured, allowed = quantity(self.measured, self.unit), quantity(self.allowed, self.unit)
        return f"{self.limit}: {measured} {beyond} {allowed} ({self.decided_by})"


class Capsule(Model):
    """What it takes to run one trial again and to judge whether the result is the same."""

    command: str
    seed: int
    candidate: Candidate
    checkpoint_digest: str
    export_digest: str
    workload_sha256: str
    fingerprint: str
    host: dict[str, str] = Field(description="CPU, governor, kernel, peaks and what else timing depends on")
    versions: dict[str, str]


class Trial(Model):
    """One candidate's whole story."""

    format_version: int = STUDY_FORMAT_VERSION
    id: str
    engine: str
    candidate: Candidate
    status: TrialStatus
    reason: str
    metrics: dict[str, Metric] = Field(default_factory=dict)
    quality: QualityReport | None = None
    screening: Screening | None = None
    measurements: Measurements | None = Field(None, exclude=True)
    samples_path: str | None = Field(None, description="raw samples, relative to the study directory")
    exported: ExportedModel | None = None
    log_path: str | None = None
    mlflow_run_id: str | None = None
    feasible: bool = False
    misses: tuple[Miss, ...] = ()
    finalist: bool = False
    fall: Fall | None = None
    capsule: Capsule | None = None
    reused: tuple[str, ...] = Field((), description="stages whose results are from an earlier run")


VerdictKind = Literal[
    "champion", "tie", "nothing_feasible", "insufficient_evidence", "gate_failed", "dry_run"
]


class Verdict(Model):
    """The answer, first as a word, then as sentences."""

    kind: VerdictKind
    reasons: tuple[str, ...]
    nearest: str | None = Field(None, description="when nothing is feasible: the candidate that misses least")


class Incumbent(Model):
    """The registered champion that a challenger has to beat."""

    trial_id: str | None = Field(None, description="the trial that measured it again")
    model_name: str
    version: str
    note: str = Field("", description="why it is not compared, where it is not")


class GateResult(Model):
    """The outcome of one Great Expectations suite over a results table or a window."""

    passed: bool
    evaluated: int
    failures: tuple[str, ...]
    warnings: tuple[str, ...]
    data_docs: str | None


def without_password(text: str) -> str:
    """``text`` without user and password in the addresses it holds: studies and reports are passed on."""
    return re.sub(r"(?<=://)[^/@\s]*@", "", text)


class Registration(Model):
    """Where the study went in MLflow; the address is kept without its password."""

    tracking_uri: Annotated[str, AfterValidator(without_password)]
    experiment_id: str
    run_id: str
    model_name: str | None = None
    model_version: str | None = None
    model_uri: str | None = None
    note: str = ""


class Bundle(Model):
    """A deployable directory: manifest, engine files, tokenizer, evidence."""

    path: Path
    digest: str
    size_bytes: int


class Study(Model):
    """All trials of one spec on one host, ranked, with the verdict. Stored as ``study.json``."""

    format_version: int = STUDY_FORMAT_VERSION
    id: str
    created: datetime
    finished: datetime | None = None
    spec: OptimizeSpec
    checkpoint: Checkpoint
    analysis: Analysis
    workload: Workload | None = None
    verdict: Verdict
    champion: str | None = Field(None, description="trial id; in a tie, the incumbent's")
    incumbent: Incumbent | None = None
    races: tuple[Race, ...] = ()
    comparisons: tuple[Comparison, ...] = Field(
        (), description="the champion, or the best challenger, against each other finalist, paired"
    )
    search: tuple[str, ...] = Field((), description="what the search tried and learned, in sentences")
    pareto: tuple[str, ...] = Field((), description="trial ids on the front of latency, memory and quality")
    trials: tuple[Trial, ...]
    gate: GateResult | None = None
    bundle: Bundle | None = None
    registration: Registration | None = None
    not_measured: tuple[str, ...] = ()
    environment: dict[str, str] = Field(default_factory=dict)
    output_dir: Path

    @model_validator(mode="after")
    def _champion_is_a_trial(self) -> Self:
        if self.champion is not None and all(t.id != self.champion for t in self.trials):
            raise ValueError(f"champion {self.champion!r} is not one of the trials")
        return self

    def trial(self, trial_id: str) -> Trial:
        return next(t for t in self.trials if t.id == trial_id)


class Manifest(Model):
    """``manifest.json`` of a bundle: everything needed to open it again and to check it first."""

    format_version: int = FORMAT_VERSION
    name: str
    candidate: Candidate
    exported: ExportedModel
    model_type: str
    context_tokens: int
    checkpoint_digest: str
    trust_remote_code: bool = False
    files: tuple[FileDigest, ...]
    study_id: str
    created: datetime
    versions: dict[str, str]
    evidence: dict[str, Any]


class RequestShape(Model):
    """The requests a bundle's figures are of."""

    model_config = ConfigDict(extra="ignore")

    batch_size: int = Field(ge=1)
    prompt_tokens: int = Field(ge=1)
    output_tokens: int = Field(ge=1)


class MedianFigure(Model):
    """A bundle's figure, without its raw samples."""

    model_config = ConfigDict(extra="ignore")

    unit: str
    median: float = Field(ge=0, allow_inf_nan=False)


class BundleEvidence(Model):
    """What a manifest's ``evidence`` says to who serves the bundle; the rest of it is for people."""

    model_config = ConfigDict(extra="ignore")

    request: RequestShape | None = None
    metrics: dict[str, MedianFigure] = Field(default_factory=dict)
    quality: QualityReport | None = None
    kv_bytes_per_token: int | None = Field(None, description="in fp32: the most an engine's cache takes")
    golden: tuple[GoldenPrompt, ...] = ()
    host: dict[str, str] = Field(default_factory=dict, description="what it was measured on, as in a capsule")
