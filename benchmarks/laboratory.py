"""What the benchmarks share: a study's parts without a Prefect server, and nothing reused that was timed."""

from __future__ import annotations

import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from open_autoglm.files import write_atomic
from open_autoglm.hardware import probe_hardware
from open_autoglm.measure.environment import host_environment
from open_autoglm.measure.isolation import Failure
from open_autoglm.measure.workload import make_workload
from open_autoglm.planning import load_model, plan
from open_autoglm.quality.reference import make_evaluation_set
from open_autoglm.roofline import analyze
from open_autoglm.schemas import Analysis, Candidate, Footprint, OptimizeSpec, Screening, Trial
from open_autoglm.settings import Settings
from open_autoglm.study import open_study
from open_autoglm.trials import Bench, begin_trial, export_trial, prepare_reference


class Laboratory(NamedTuple):
    """A model on this host, ready to be measured."""

    bench: Bench
    analysis: Analysis
    settings: Settings

    def candidates(self) -> list[Candidate]:
        """What the engines propose, without what cannot run here."""
        proposed = plan(self.analysis, self.bench.spec, "cpu")
        return [candidate for candidate in proposed if candidate.vetoed_because is None]

    def exported(self, candidate: Candidate) -> Trial:
        """The candidate's trial with its files; exports are reused, being the same for every arm."""
        trial = begin_trial(self.bench.study, candidate)
        trial = export_trial(self.bench.study, self.bench.checkpoint, trial, self.settings)
        if trial.status != "ok":
            raise SystemExit(f"{candidate.id}: {trial.reason}")
        return trial

    def reference(self) -> Path:
        found = prepare_reference(self.bench, self.analysis, self.settings)
        if isinstance(found, Failure):
            raise SystemExit(f"no reference: {found.reason}")
        return found


def open_laboratory(model: str, output: Path, **asked: Any) -> Laboratory:
    """A study of ``model`` in ``output``, whose timed results are never taken from an earlier run."""
    settings = Settings(trial_reuse_hours=0)
    spec = OptimizeSpec(model_path=model, output=str(output), **asked)
    checkpoint = load_model(spec, settings)
    hardware = probe_hardware(settings.home / "hardware")
    study = open_study(spec, checkpoint, hardware, settings, output)
    bench = Bench(
        study=study,
        spec=spec,
        checkpoint=checkpoint,
        hardware=hardware,
        workload=make_workload(checkpoint, spec, output / "workload.npz"),
        evaluation_set=make_evaluation_set(checkpoint, spec, output / "evaluation.npy"),
    )
    return Laboratory(bench, analyze(checkpoint, spec, hardware), settings)


def unscreened() -> Screening:
    """What stands in for a screening where only rounds matter: room for a GiB per process."""
    nothing = Footprint(peak_rss_bytes=2**30, peak_pss_bytes=2**30, mapped_file_bytes=0)
    return Screening(
        footprint=nothing, load_ms=0, first_request_ms=0, prompt_tokens=1, output_tokens=2, rounds=(),
        estimated_e2e_ms=0, facts={},
    )  # fmt: skip


def save(path: Path, content: dict[str, Any]) -> None:
    """A result with when and on what it was taken."""
    about = {
        "taken": f"{datetime.now(UTC):%Y-%m-%dT%H:%MZ}",
        "python": platform.python_version(),
        "host": host_environment(),
    }
    write_atomic(path, json.dumps({**about, **content}, indent=1))
