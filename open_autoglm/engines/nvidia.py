"""Whether the engines that need an NVIDIA GPU can run here, found out by trying.

Each engine is climbed rung by rung in a child process: import it, load its libraries, find a device, multiply
two matrices and compare with numpy. The highest rung reached and what stopped it make the probe; a child that
crashes or hangs is a result like any other. An engine whose package is not installed starts no child.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

from open_autoglm.engines.capability import Asked, Reached
from open_autoglm.engines.capability_driver import find_device, missing_driver
from open_autoglm.engines.capability_packages import INSTALL, TENSORRT, TENSORRT_RTX
from open_autoglm.engines.contract import ExportContext, Session, SessionOptions
from open_autoglm.measure.isolation import Child, Failure
from open_autoglm.packages import version_of
from open_autoglm.schemas import (
    Analysis,
    Candidate,
    Checkpoint,
    Device,
    ExportedModel,
    Knob,
    OptimizeSpec,
    Probe,
    ProbeStage,
)

RUNG_TIMEOUT_S = 120.0
"""The first program on a GPU may be compiled for it, which takes tens of seconds."""

_PLAN, _DEVICE = "reach_plan", "reach_device"

_DOING = MappingProxyType(
    {
        "reach_import": "importing it",
        "reach_libraries": "loading its libraries",
        _DEVICE: "looking for a GPU",
        _PLAN: "building a small network",
        "reach_product": "multiplying two matrices",
    }
)
"""Every rung is a function of the engine's module."""


class _Climb(NamedTuple):
    packages: tuple[str, ...]
    module: str
    rungs: Mapping[str, ProbeStage]
    """In their order, each with the stage that it completes."""


_ONNXRUNTIME = _Climb(
    ("onnxruntime-gpu",),
    "open_autoglm.engines.capability_onnxruntime",
    {
        "reach_import": "importable",
        "reach_libraries": "loadable",
        _DEVICE: "device",
        "reach_product": "ready",
    },
)
_CLIMBS: Mapping[str, _Climb] = MappingProxyType(
    {
        "torch": _Climb(
            ("torch",),
            "open_autoglm.engines.capability_torch",
            {"reach_import": "loadable", _DEVICE: "device", "reach_product": "ready"},
        ),
        "onnxruntime-cuda": _ONNXRUNTIME,
        "onnxruntime-tensorrt": _ONNXRUNTIME,
        "tensorrt": _Climb(
            TENSORRT,
            "open_autoglm.engines.capability_tensorrt",
            {"reach_import": "loadable", _DEVICE: "device", _PLAN: "device", "reach_product": "ready"},
        ),
        "tensorrt-rtx": _Climb(
            TENSORRT_RTX,
            "open_autoglm.engines.capability_tensorrt",
            {"reach_import": "loadable", _PLAN: "loadable", _DEVICE: "device", "reach_product": "ready"},
        ),
    }
)

NAMES = tuple(_CLIMBS)
"""The engines that :func:`probe_nvidia` knows; `torch` means torch on CUDA."""


@cache
def probe_nvidia(engine: str) -> Probe:
    """What ``engine``, one of `NAMES`, can do on an NVIDIA GPU here; tried once per process.

    Without its package this starts nothing, else it takes a second, and several where there is a GPU.
    """
    climb = _CLIMBS[engine]
    version = version_of(*climb.packages)
    if version is None:
        missing = missing_driver()
        reason = f"{climb.packages[0]} is not installed" + (f", and {missing}" if missing else "")
        return Probe(engine=engine, stage="missing", reason=reason, install=INSTALL[engine])
    if engine == "torch" and (known := _known_of_torch(version)) is not None:
        return known
    with tempfile.TemporaryDirectory() as scratch, Child(Path(scratch) / "probe.log") as child:
        return _try(child, engine, version, climb)


def _known_of_torch(version: str) -> Probe | None:
    """What can be told of torch without the seconds that importing it takes; None if it must be tried."""
    missing = missing_driver()
    if version.endswith("+cpu"):
        reason = f"torch {version} is a build without CUDA" + (f", and {missing}" if missing else "")
        return Probe(
            engine="torch", stage="installed", version=version, reason=reason, install=INSTALL["torch"]
        )
    if missing is None:
        return None
    reached = find_device("torch", None)  # ends at the missing driver, and starts nothing
    return Probe(
        engine="torch", stage="no_device", version=version, reason=reached.obstacle, install=reached.install
    )


def _try(child: Child, engine: str, version: str, climb: _Climb) -> Probe:
    """Climb until something stands in the way."""
    probe = Probe(engine=engine, stage="installed", version=version, reason="")
    found = []
    for rung, stage in climb.rungs.items():
        asked = Asked(engine=engine, version=version)
        reached = child.ask(f"{climb.module}:{rung}", asked, Reached, RUNG_TIMEOUT_S)
        if rung == _PLAN:
            built = isinstance(reached, Reached) and not reached.obstacle
            probe = probe.model_copy(update={"can_build": built})
        if isinstance(reached, Failure):
            return _failed(probe, rung, reached)
        if reached.obstacle:
            return _stopped(probe, rung, reached)
        found += [reached.found] if reached.found else []
        probe = probe.model_copy(update={"stage": stage})
    return probe.model_copy(update={"reason": ", ".join(["computes on the GPU what numpy computes", *found])})


def _failed(probe: Probe, rung: str, failure: Failure) -> Probe:
    """The child died, hung, or the runtime raised an error of its own."""
    stages: Mapping[str, ProbeStage] = {"failed": probe.stage, "timed_out": "timed_out"}
    verb = "failed: " if failure.status == "failed" else ""
    reason = f"{_DOING[rung]} {verb}{failure.reason}"
    return probe.model_copy(update={"stage": stages.get(failure.status, "crashed"), "reason": reason})


def _stopped(probe: Probe, rung: str, reached: Reached) -> Probe:
    built = "can build plans and cannot run them: " if probe.can_build and rung == _DEVICE else ""
    told = {"reason": built + reached.obstacle, "install": reached.install}
    return probe.model_copy(update={**told, "stage": "no_device" if rung == _DEVICE else probe.stage})


# ── engines that are listed and not driven ───────────────────────────────────────────────────────

_NOT_YET = "works here, but this release of Open-AutoGLM has no runner for it yet"


class _NvidiaEngine:
    """What the GPU engines share: a probe by package and driver, and one proposed candidate."""

    name: str
    summary: str

    def probe(self, device: Device) -> Probe:
        if device != "gpu":
            return Probe(engine=self.name, stage="no_device", reason="this engine runs on NVIDIA GPUs only")
        probe = probe_nvidia(self.name)
        if probe.ready:
            return probe.model_copy(update={"stage": "device", "reason": _NOT_YET})
        return probe

    def propose(self, analysis: Analysis, spec: OptimizeSpec, device: Device) -> list[Candidate]:
        return [
            Candidate(
                id=f"{self.name}-fp16",
                engine=self.name,
                device="gpu",
                precision="fp16",
                weight_bits=16,
                proposed_because="half the bytes of fp32 on tensor cores",
            )
        ]

    def dimensions(self, candidate: Candidate, analysis: Analysis, spec: OptimizeSpec) -> tuple[()]:
        return ()

    def variant(self, candidate: Candidate, knobs: Mapping[str, Knob]) -> Candidate:
        self._refuse()

    def recipe(self, candidate: Candidate) -> dict[str, Any] | None:
        self._refuse()

    def export(self, candidate: Candidate, checkpoint: Checkpoint, context: ExportContext) -> str:
        self._refuse()

    def open(self, candidate: Candidate, exported: ExportedModel, options: SessionOptions) -> Session:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise RuntimeError(f"{self.name}: {self.probe('gpu').reason}")


class OnnxRuntimeCudaEngine(_NvidiaEngine):
    """ONNX Runtime with the CUDA execution provider."""

    name = "onnxruntime-cuda"
    summary = "ONNX Runtime, CUDA provider: probed, not driven by this release"
