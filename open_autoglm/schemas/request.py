"""The request: what a user asks for."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Any

from pydantic import ConfigDict, Field, field_validator, model_validator

from open_autoglm.schemas.base import Model, Objective, Scenario, TargetDevice
from open_autoglm.units import ByteSize, Duration, LengthMix

_PER_CENT = re.compile(r"(\d+(?:\.\d+)?)%")


def _fit_for_forms(schema: dict[str, Any]) -> None:
    """Fit the JSON schema to forms: an optional text is one box that may stay empty, engines are a choice."""
    from open_autoglm.engines import names  # late: the engines build on this module

    for field in schema["properties"].values():
        if "anyOf" in field:
            del field["default"]
            field.update(field.pop("anyOf")[0])
    schema["properties"]["engines"]["items"] = {"type": "string", "enum": list(names())}


class OptimizeSpec(Model):
    """The whole request. Two equal specs on the same checkpoint and host are the same study."""

    model_config = ConfigDict(json_schema_extra=_fit_for_forms)

    model_path: str = Field(
        title="Model",
        description="Directory of a Hugging Face checkpoint (safetensors), or a hub id when online",
        min_length=1,
    )
    target_device: TargetDevice = Field(
        "auto", title="Device", description="Where the model will be served; auto takes a GPU if there is one"
    )
    batch_size: int = Field(1, ge=1, le=1024, title="Batch size", description="Prompts per call")
    prompt_tokens: int = Field(512, ge=1, title="Prompt length", description="Tokens per prompt")
    output_tokens: int = Field(64, ge=2, title="Output length", description="New tokens per prompt")
    length_mix: LengthMix | None = Field(
        None,
        title="Mix of lengths",
        description="Prompt/output lengths with their weights instead of one length, such as "
        "128/32:3,512/64:1; the prompt and output length then are the longest of it",
    )
    scenario: Scenario = Field(
        "single_stream",
        title="Scenario",
        description="single_stream: the next request starts when the last one ends; server: Poisson "
        "arrivals at the request rate; offline: whole batches, for throughput",
    )
    request_rate_per_s: float | None = Field(
        None, gt=0, title="Request rate", description="Mean arrivals per second; the server scenario needs it"
    )
    objective: Objective = Field(
        "latency",
        title="Objective",
        description="latency: time to the last token; ttft, tpot and the p95s by name; throughput: decoded "
        "tokens/s (offline: all tokens/s); goodput: requests/s within the limits; memory: peak RSS",
    )
    max_latency: Duration | None = Field(
        None, title="Limit on TTFT p95", description="Time to first token, with its unit: 50ms, 0.05s"
    )
    max_tpot: Duration | None = Field(
        None, title="Limit on TPOT", description="Time per output token after the first: 20ms"
    )
    max_memory: ByteSize | None = Field(
        None, title="Limit on memory", description="Peak resident memory of the engine process: 2GiB, 512MB"
    )
    min_quality: float = Field(
        0.99,
        gt=0,
        le=1.5,
        title="Quality to keep",
        description="Reference perplexity / candidate perplexity, on the worse of prefill and decode",
    )
    max_token_flips: float = Field(
        0.1,
        gt=0,
        le=1,
        title="Limit on token flips",
        description="Share of positions whose most likely token is not the reference's, on the worse path: "
        "0.1 or 10%",
    )
    engines: tuple[str, ...] = Field(
        (), title="Engines", description="Engines to try; none chosen means all of them"
    )
    rounds: int = Field(
        10,
        ge=3,
        le=2000,
        title="Timed rounds, at least",
        description="Rounds of each finalist, after warm-up; more follow until the target width is met",
    )
    target_width: float = Field(
        0.05,
        gt=0,
        lt=1,
        title="Target width of intervals",
        description="Rounds are added until the 95 % interval of each comparison is narrower than this share",
    )
    timing_budget_s: float = Field(
        120,
        gt=0,
        title="Timing budget in seconds",
        description="Rounds of the final end when this is spent, though not before five; the race has half",
    )
    search_generations: int = Field(
        1,
        ge=0,
        le=5,
        title="Search generations",
        description="How often the leaders' neighbours in the engines' search spaces are tried; 0: none",
    )
    quality_tokens: int = Field(
        3072,
        ge=64,
        title="Quality tokens, at most",
        description="At most this many tokens are scored one at a time with the cache; "
        "scoring stops earlier once the verdict is clear",
    )
    prune: bool = Field(
        False,
        title="Prune heads",
        description="Try the best kinds of candidates also with the fewest attention heads removed",
    )
    recover: bool = Field(
        False,
        title="Recover pruned models",
        description="Try each pruned candidate also after a short distillation from the whole model on "
        "calibration texts: up to ten minutes for each of the two kinds of cut; needs Prune heads",
    )
    seed: int = Field(0, ge=0, title="Seed", description="Chooses prompts and evaluation windows")
    output: str | None = Field(
        None,
        title="Output directory",
        description="Where the study is kept; a new one under $AUTOGLM_HOME/studies if empty",
    )
    register_as: str | None = Field(
        None,
        title="Registered model",
        description="Name in the MLflow registry; the checkpoint directory's name if empty",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
    )
    promote: bool = Field(
        True,
        title="Promote the winner",
        description="Make it the registered champion at once; off: it becomes a version that may be tried "
        "beside the champion first. A model without a champion gets one in any case",
    )
    trust_remote_code: bool = Field(
        False, title="Trust remote code", description="Run Python code that comes with the checkpoint"
    )
    allow_pickle: bool = Field(
        False, title="Allow pickles", description="Load .bin weights, which can run code when opened"
    )

    @property
    def called(self) -> str:
        """By which people know it: its name in the registry, or the checkpoint's without its path."""
        return self.register_as or PurePath(self.model_path).name or self.model_path

    @field_validator("max_token_flips", mode="before")
    @classmethod
    def _share_of_per_cent(cls, given: Any) -> Any:
        match = _PER_CENT.fullmatch(given) if isinstance(given, str) else None
        return float(match[1]) / 100 if match else given

    @model_validator(mode="before")
    @classmethod
    def _longest_of_the_mix(cls, given: Any) -> Any:
        """With a mix of lengths, prompt and output length are what the cache needs room for."""
        if not isinstance(given, dict) or not (mix := given.get("length_mix")):
            return given
        shares = LengthMix(str(mix)).shares
        longest = {"prompt_tokens": max(s[0] for s in shares), "output_tokens": max(s[1] for s in shares)}
        return given | longest
