"""A bench over a tiny real checkpoint, and trials on it that are ready for the next stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from demo_trials import SHAPES, demo_quality, demo_screening
from studies import demo_analysis, demo_hardware

from open_autoglm import engines
from open_autoglm.checkpoint import load_checkpoint
from open_autoglm.files import write_atomic
from open_autoglm.measure.workload import make_workload
from open_autoglm.quality.reference import make_evaluation_set
from open_autoglm.schemas import Candidate, OptimizeSpec, Trial
from open_autoglm.settings import Settings
from open_autoglm.study import open_study
from open_autoglm.trials import Bench, begin_trial, export_trial

SMALL: dict[str, Any] = {
    "prompt_tokens": 32,
    "output_tokens": 8,
    "quality_tokens": 64,
    "min_quality": 0.5,
    "max_token_flips": 1,
}


def tiny_bench(checkpoint_path: Path, settings: Settings, root: Path, **asked: Any) -> Bench:
    """A new study in ``root`` as the flow begins one: requests drawn, texts chosen, the bench kept.

    Modules that share a home ask for requests of their own, or they would find each other's results.
    """
    spec = OptimizeSpec(model_path=str(checkpoint_path), **{**SMALL, **asked})
    checkpoint, hardware = load_checkpoint(str(checkpoint_path)), demo_hardware()
    bench = Bench(
        study=open_study(spec, checkpoint, hardware, settings, root),
        spec=spec,
        checkpoint=checkpoint,
        hardware=hardware,
        workload=make_workload(checkpoint, spec, root / "workload.npz"),
        evaluation_set=make_evaluation_set(checkpoint, spec, root / "evaluation.npy"),
    )
    write_atomic(root / "bench.json", bench.model_dump_json())
    return bench


def real_candidate(name: str) -> Candidate:
    """What the engine of that name proposes under this id: ``torch-fp32``, ``onnxruntime-fp32`` …"""
    engine = engines.get(name.split("-")[0])
    proposed = engine.propose(demo_analysis(), OptimizeSpec(model_path="here"), "cpu")
    return next(candidate for candidate in proposed if candidate.id == name)


def exported_trial(bench: Bench, settings: Settings, candidate: Candidate) -> Trial:
    """A trial whose files are there, or that says why they are not."""
    return export_trial(bench.study, bench.checkpoint, begin_trial(bench.study, candidate), settings)


def screened_trial(bench: Bench, settings: Settings, candidate: Candidate) -> Trial:
    """The same, ready for the race: what its screening found is made up."""
    found = {"screening": demo_screening(SHAPES[0]), "quality": demo_quality(SHAPES[0]), "reason": "screened"}
    return exported_trial(bench, settings, candidate).model_copy(update=found)
