"""A study whose champion can really be opened: fp32 on a tiny checkpoint, the figures made up."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from studies import SHAPES, demo_study, measured_trial

from open_autoglm import engines
from open_autoglm.bundle import MANIFEST, build_bundle
from open_autoglm.checkpoint import load_checkpoint
from open_autoglm.engines.contract import ExportContext, SessionOptions
from open_autoglm.files import digest_files
from open_autoglm.quality.reference import continue_greedily
from open_autoglm.schemas import ExportedModel, GoldenPrompt, Study


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


def onnxruntime_bundle(
    checkpoint_path: Path,
    directory: Path,
    golden: Sequence[GoldenPrompt] = (),
    *,
    number: int = 0,
    ledger: Path | None = None,
) -> Path:
    """A bundle whose sessions have slots, under ``directory``: of ONNX Runtime's exact graph or, with another
    ``number``, of another candidate. With conftest's ``shared_ledger``, preflight is not run again: 5 s."""
    study = openable_study(checkpoint_path)
    engine = engines.get("onnxruntime")
    candidate = engine.propose(study.analysis, study.spec, "cpu")[number]
    output = directory / "export"
    output.mkdir(parents=True)
    with contextlib.redirect_stdout(io.StringIO()):
        context = ExportContext(output=output, ledger=ledger or directory / "ledger.json")
        route = engine.export(candidate, study.checkpoint, context)
    exported = ExportedModel(
        candidate_id=candidate.id, path=output, digest="d", route=route, size_bytes=1, build_s=0
    )
    trial = study.trials[0].model_copy(
        update={"id": candidate.id, "candidate": candidate, "exported": exported}
    )
    return build_bundle(study, trial, directory / "bundle", golden).path


def golden_prompts(checkpoint_path: Path, prompts: Sequence[Sequence[int]], count: int) -> list[GoldenPrompt]:
    """What the checkpoint itself, in fp32, answers greedily; a candidate that had all of it right."""
    study = openable_study(checkpoint_path)
    trial = study.trials[0]
    assert trial.exported is not None
    longest = max(map(len, prompts)) + count
    options = SessionOptions(batch_size=1, max_tokens=longest, threads=1)
    session = engines.get("torch").open(trial.candidate, trial.exported, options)
    answers = [continue_greedily(session, np.array([prompt]), count)[0].tolist() for prompt in prompts]
    session.close()
    return [
        GoldenPrompt(prompt=tuple(prompt), answer=tuple(answer), same_tokens=count)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def altered(bundle: Path, directory: Path, change: Callable[[Path], object]) -> Path:
    """A copy of ``bundle`` in which ``change`` was made before it was signed: whole, but another one."""
    shutil.copytree(bundle, directory)
    change(directory)
    manifest = json.loads((directory / MANIFEST).read_text())
    files = digest_files(directory, (directory / file["path"] for file in manifest["files"]))
    manifest["files"] = [file.model_dump(mode="json") for file in files]
    (directory / MANIFEST).write_text(json.dumps(manifest))
    return directory
