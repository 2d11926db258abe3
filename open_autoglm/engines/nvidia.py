"""Engines that need an NVIDIA GPU. They are probed and listed everywhere, so that a study on a machine
without one says what was left out and why. Native TensorRT is probed, proposed and vetoed with the reason,
never run on the CPU instead.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn

from open_autoglm.engines.contract import ExportContext, Session, SessionOptions
from open_autoglm.schemas import (
    Analysis,
    Candidate,
    Checkpoint,
    Device,
    ExportedModel,
    Knob,
    OptimizeSpec,
    Probe,
)
from open_autoglm.schemas.candidates import ProbeStage

_NOT_YET = "found, but this release of Open-AutoGLM has no runner for it yet"


def missing_driver() -> str | None:
    """None if the CUDA driver library can be loaded, else the reason why no GPU engine can run."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "needs an NVIDIA GPU and there is no driver here (libcuda.so.1 cannot be loaded)"
    return None


def _probe_torch(torch_version: str) -> Probe:
    """Whether torch can use a GPU here."""
    reason = missing_driver()
    if reason is not None:
        return Probe(
            engine="torch", stage="no_device", version=torch_version, reason=f"torch on CUDA {reason}"
        )
    if "+cpu" in torch_version:
        return Probe(
            engine="torch",
            stage="installed",
            version=torch_version,
            reason=f"torch {torch_version} is the CPU build",
            install="pip install torch==2.13.0  # from an index with CUDA builds",
        )
    return Probe(engine="torch", stage="ready", version=torch_version, reason="CUDA driver found")


_PACKAGES = {
    "onnxruntime-cuda": ("onnxruntime-gpu",),
    "onnxruntime-tensorrt": ("onnxruntime-gpu", "tensorrt-cu13"),
}
"""What each engine runs on, the last being what it runs with."""

_INSTALL = {
    "onnxruntime-gpu": "pip install 'open-autoglm[gpu]'  # in an environment of its own, without onnxruntime",
    "tensorrt-cu13": "pip install 'tensorrt-cu13>=10.15.1,<11'  # libraries from NVIDIA's own index",
}


def probe_nvidia(engine: str) -> Probe:
    """Whether the packages of ``engine`` and a driver are here."""
    if engine == "torch":
        return _probe_torch(version("torch"))
    driver, found = missing_driver(), None
    for package in _PACKAGES[engine]:
        try:
            found = version(package)
        except PackageNotFoundError:
            stage: ProbeStage = "missing" if driver is None else "no_device"
            reason = driver or f"{package} is not installed"
            return Probe(engine=engine, stage=stage, reason=reason, install=_INSTALL[package])
    if driver is not None:
        return Probe(engine=engine, stage="no_device", version=found, reason=driver)
    return Probe(engine=engine, stage="ready", version=found, reason="packages and CUDA driver found")


class _NvidiaEngine:
    """What the GPU engines share: a probe by package and driver, and one proposed candidate."""

    name: str
    summary: str
    package: str
    install: str

    def probe(self, device: Device) -> Probe:
        try:
            found = version(self.package)
        except PackageNotFoundError:
            found = None
        driver = missing_driver()
        if driver is not None:
            return Probe(
                engine=self.name, stage="no_device", version=found, reason=driver, install=self.install
            )
        if found is None:
            reason = f"{self.package} is not installed"
            return Probe(engine=self.name, stage="missing", reason=reason, install=self.install)
        return Probe(
            engine=self.name, stage="installed", version=found, reason=f"{self.package} {found} {_NOT_YET}"
        )

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


class TensorRTEngine(_NvidiaEngine):
    """Native TensorRT."""

    name = "tensorrt"
    summary = "TensorRT: probed, not driven by this release"
    package = "tensorrt"
    install = "pip install tensorrt  # fetches its libraries from NVIDIA's own package index"
