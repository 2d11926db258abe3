"""Resolve the checkpoint, probe the host, and open the study's directory."""

from __future__ import annotations

from pathlib import Path

from prefect import task

from open_autoglm.hardware import probe_hardware
from open_autoglm.measure.lease import preparing
from open_autoglm.packages import check_packages
from open_autoglm.planning import load_model
from open_autoglm.progress import announce
from open_autoglm.schemas import Checkpoint, Hardware, OptimizeSpec
from open_autoglm.settings import Settings
from open_autoglm.study import StudyRef, open_study


@task
def load(spec: OptimizeSpec) -> Checkpoint:
    """Validate the environment and the checkpoint: config, safetensors, tokenizer, digest."""
    check_packages()
    announce(f"load: {spec.model_path}")
    with preparing():
        return load_model(spec, Settings())


@task
def probe() -> Hardware:
    """Measure the host, or read what was measured before on the same host."""
    return probe_hardware(Settings().home / "hardware")


@task
def open_directory(spec: OptimizeSpec, checkpoint: Checkpoint, hardware: Hardware) -> StudyRef:
    """Begin the study or find the one that was interrupted."""
    output = Path(spec.output).expanduser() if spec.output else None
    study = open_study(spec, checkpoint, hardware, Settings(), output)
    announce(f"study {study.id} in {Settings().shown(study.root)}")
    return study
