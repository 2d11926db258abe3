"""A study whose champion can really be opened: fp32 on a tiny checkpoint, the figures made up."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

from studies import SHAPES, demo_study, measured_trial

from open_autoglm import engines
from open_autoglm.bundle import build_bundle
from open_autoglm.checkpoint import load_checkpoint
from open_autoglm.engines.contract import ExportContext
from open_autoglm.schemas import ExportedModel, Study


def openable_study(checkpoint_path: Path, **changes: Any) -> Study:
    """A study of ``checkpoint_path`` with one trial, its champion; ``changes`` replace its fields."""
    checkpoint = load_checkpoint(str(checkpoint_path))
    study = demo_study(checkpoint=checkpoint, **{"bundle": None, "registration": None, **changes})
    candidate = engines.get("torch").propose(study.analysis, study.spec, "cpu")[0]
    exported = ExportedModel(
        candidate_id=candidate.id,
        path=checkpoint.path,
        digest=checkpoint.digest,
        route="checkpoint as it is",
        size_bytes=checkpoint.weight_bytes,
        build_s=0,
    )
    trial = measured_trial(SHAPES[0]).model_copy(
        update={"id": candidate.id, "candidate": candidate, "exported": exported}
    )
    return study.model_copy(update={"trials": (trial,), "champion": trial.id, "pareto": (trial.id,)})


def onnxruntime_bundle(checkpoint_path: Path, directory: Path, number: int = 0) -> Path:
    """A bundle whose sessions have slots, under ``directory``: of ONNX Runtime's exact graph or, with another
    ``number``, of another candidate."""
    study = openable_study(checkpoint_path)
    engine = engines.get("onnxruntime")
    candidate = engine.propose(study.analysis, study.spec, "cpu")[number]
    output = directory / "export"
    output.mkdir(parents=True)
    with contextlib.redirect_stdout(io.StringIO()):
        context = ExportContext(output=output, ledger=directory / "ledger.json")
        route = engine.export(candidate, study.checkpoint, context)
    exported = ExportedModel(
        candidate_id=candidate.id, path=output, digest="d", route=route, size_bytes=1, build_s=0
    )
    trial = study.trials[0].model_copy(
        update={"id": candidate.id, "candidate": candidate, "exported": exported}
    )
    return build_bundle(study, trial, directory / "bundle").path
