"""A TensorRT plan on disk, with the record that says what it is and for which host.

A plan is compiled code: it is opened only beside a record that knows its digest and only by the flavour and
version, and on the type of GPU, that it was built with.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from open_autoglm.export.tensorrt_api import Flavour
from open_autoglm.files import sha256_file
from open_autoglm.hardware import find_gpus
from open_autoglm.schemas import FileDigest, Model

PLAN = "model.plan"
RECORD = "plan.json"
RUNTIME_CACHE = "runtime.cache"
"""TensorRT-RTX: the kernels it compiled for this GPU when the plan was tried."""

PLAN_FORMAT_VERSION = 1

PAST = "past_key_values."
"""How the names of a plan's caches begin, among its inputs."""

Regime = Literal["prefill", "decode"]
REGIMES: tuple[Regime, ...] = ("prefill", "decode")
"""What a session does with a plan, each in an execution context of its own."""

ProfileKind = Literal["prefill", "decode", "any"]
"""An optimisation profile: for one regime, or for both."""


class PlanGpu(Model):
    """A type of GPU."""

    name: str
    compute_capability: str | None

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.compute_capability or 'unknown'})"


class PlanHost(Model):
    """What a plan is tied to."""

    flavour: Flavour
    version: str
    gpu: PlanGpu | None = Field(description="None: there was none, as only TensorRT-RTX builds")


class PlanSizes(Model):
    """What a plan has room for, and what it is tuned for."""

    batch_size: int = Field(ge=1, description="rows at most; any fewer run too")
    prompt_tokens: int = Field(
        ge=1, description="prefill takes from 1 to all of the cache; this is the usual"
    )
    cache_tokens: int = Field(ge=2, description="of each row, prompt and output together")
    tuned_for: Literal["both", "token", "prompt"] = Field(
        "both", description="with a profile for each regime; or with one for all lengths, best at this one"
    )


def profiles_of(sizes: PlanSizes) -> tuple[ProfileKind, ...]:
    """The profiles of a plan, in their order."""
    return REGIMES if sizes.tuned_for == "both" else ("any",)


class InputRange(Model):
    """Shapes of one input in one profile; for an input that is itself a shape, its values."""

    name: str
    least: tuple[int, ...]
    best: tuple[int, ...]
    most: tuple[int, ...]
    values: bool = False


class PlanRecord(Model):
    """What lies beside a plan."""

    format_version: int = PLAN_FORMAT_VERSION
    host: PlanHost
    sizes: PlanSizes
    profiles: dict[ProfileKind, tuple[InputRange, ...]] = Field(description="in their order in the plan")
    layers: int = Field(description="of the network, before TensorRT fuses any")
    weight_streaming: bool
    graph_digest: str
    plan: FileDigest
    runtime_cache: FileDigest | None = None
    can_run: bool | None = Field(None, description="opened on the host that built it; None: no GPU to try")
    run_reason: str = Field(description="why not, or what was tried")
    warnings: tuple[str, ...] = ()

    def profile_of(self, regime: Regime) -> int:
        """The number of the profile that serves ``regime``."""
        kinds = list(self.profiles)
        return kinds.index(regime) if regime in kinds else kinds.index("any")


class PlanRefused(RuntimeError):
    """The plan is not for this host, or not what its record says."""


@cache
def host_gpu() -> PlanGpu | None:
    """The first GPU that the driver lists; None without one."""
    gpus = find_gpus().gpus
    return PlanGpu(name=gpus[0].name, compute_capability=gpus[0].compute_capability) if gpus else None


def read_record(directory: Path) -> PlanRecord:
    """The record in ``directory``. Raises PlanRefused if it cannot be read."""
    try:
        return PlanRecord.model_validate_json((directory / RECORD).read_bytes())
    except (OSError, ValidationError) as error:
        raise PlanRefused(
            f"{directory / RECORD}, without which no plan is opened, cannot be read: export again"
        ) from error


def check_plan(directory: Path, host: PlanHost, *, batch_size: int, cache_tokens: int) -> PlanRecord:
    """The record of the plan in ``directory``, which is whole and made for ``host`` and these sizes.

    Raises PlanRefused with what does not match: what was found, what is needed, and what to do.
    """
    record = read_record(directory)
    problem = (
        _other_format(record)
        or _other_host(record.host, host)
        or _too_small(record.sizes, batch_size, cache_tokens)
        or _changed(directory, record)
    )
    if problem is not None:
        raise PlanRefused(f"{problem}: export again")
    return record


def _other_format(record: PlanRecord) -> str | None:
    if record.format_version == PLAN_FORMAT_VERSION:
        return None
    return (
        f"the plan's record has format {record.format_version} and this release reads {PLAN_FORMAT_VERSION}"
    )


def _other_host(built: PlanHost, here: PlanHost) -> str | None:
    if built.flavour != here.flavour:
        return f"the plan was built by {built.flavour} and {here.flavour} is to open it"
    if built.version != here.version:
        return f"the plan was built by {built.flavour} {built.version} and {here.version} is installed here"
    if built.gpu is None and built.flavour == "tensorrt-rtx":
        return None  # ahead of time, for every GPU that it serves
    if built.gpu != here.gpu:
        found = "built without a GPU" if built.gpu is None else f"built for {built.gpu}"
        return f"the plan was {found} and here is {here.gpu or 'none'}"
    return None


def _too_small(built: PlanSizes, batch_size: int, cache_tokens: int) -> str | None:
    if batch_size > built.batch_size:
        return f"the plan takes batches of {built.batch_size} at most and {batch_size} were asked for"
    if cache_tokens > built.cache_tokens:
        return f"the plan's cache holds {built.cache_tokens} tokens and {cache_tokens} were asked for"
    return None


def _changed(directory: Path, record: PlanRecord) -> str | None:
    for file in filter(None, (record.plan, record.runtime_cache)):
        path = directory / file.path
        if file.path not in (PLAN, RUNTIME_CACHE) or path.is_symlink() or not path.is_file():
            return f"{file.path}, which the plan's record names, is no file of {directory}"
        if sha256_file(path) != file.sha256:
            return f"{file.path} in {directory} does not match the digest in its record"
    return None
