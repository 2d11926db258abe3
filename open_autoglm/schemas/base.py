"""What all models have in common, and the words that have few values."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

FORMAT_VERSION = 1
"""Raised when a stored model changes in a way that an older reader would misunderstand."""

STUDY_FORMAT_VERSION = 2

TargetDevice = Literal["auto", "cpu", "gpu"]
Device = Literal["cpu", "gpu"]
Objective = Literal["latency", "ttft", "ttft_p95", "tpot", "e2e_p95", "throughput", "goodput", "memory"]
Scenario = Literal["single_stream", "server", "offline"]
Precision = Literal["fp32", "bf16", "fp16", "fp8", "int8", "int4"]
AttentionKind = Literal["mha", "gqa", "mqa", "mla", "mla+dsa"]
RotaryStyle = Literal["interleaved", "half", "none"]
Phase = Literal["prefill", "decode"]
Bound = Literal["compute", "bandwidth", "capacity"]


class Model(BaseModel):
    """Base of all glossary models."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
