"""Who takes part in :mod:`benchmarks.serve`: a study's candidate behind our endpoint, others' servers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.serve_field import Arm, Prompts, Sizes
from benchmarks.serve_gguf import add_words
from benchmarks.serve_servers import llama_server, ours, transformers_serve
from open_autoglm.bundle import build_bundle
from open_autoglm.errors import StudyError, UserError
from open_autoglm.files import digest_of, directory_atomic
from open_autoglm.schemas import Study
from open_autoglm.settings import Settings
from open_autoglm.study import RESULT, load_study

ENDPOINT, BARE, NO_REUSE = "endpoint", "bare", "endpoint-no-reuse"
LLAMA = "llama-server"
COMPILED, BATCHED = "torch-bf16-compile", "transformers-serve"
HAND_TUNED = (COMPILED, BATCHED)
"""torch as a careful person tunes it: compiled, one request at a time, behind our endpoint; or batched."""

_FILE_TYPE = "Q8_0"


def find_study(settings: Settings, model: Path, root: Path | None) -> Study:
    """The study named, or the newest of ``model`` that has a champion. Raises SystemExit."""
    if root is not None:
        return load_study(root)
    finished = settings.studies.glob(f"*/{RESULT}")
    for path in sorted(finished, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            study = load_study(path)
        except StudyError:  # of another version
            continue
        if study.champion and study.checkpoint.path == model.resolve():
            return study
    raise SystemExit(f"no finished study of {model} has a champion: run one, or name --study")


def bundle_of(study: Study, candidate: str, work: Path) -> Path:
    """A bundle of one of the study's trials, made in ``work``. Raises UserError if it has no files."""
    trial = next((trial for trial in study.trials if trial.id == candidate), None)
    if trial is None or trial.exported is None:
        known = ", ".join(trial.id for trial in study.trials if trial.exported)
        raise UserError(f"the study has no files of {candidate}; it has {known}")
    if not trial.exported.path.exists():
        raise UserError(f"the files of {candidate} are gone: {trial.exported.path}")
    return build_bundle(study, trial, work / "bundles" / candidate).path


def our_arms(bundle: Path, candidate: str, sizes: Sizes) -> list[Arm]:
    """The endpoint at every number of streams, the bare engine, and the endpoint without reuse."""
    served = ours(bundle, sizes.slots, sizes.room)
    without = ours(bundle, sizes.slots, sizes.room, "--no-reuse-prefixes")
    return [
        Arm(ENDPOINT, f"Open-AutoGLM: {candidate}", sizes.streams, served, shared=True),
        Arm(BARE, f"{candidate} without an endpoint", (1,), bare=bundle),
        Arm(NO_REUSE, f"Open-AutoGLM: {candidate}, no reuse", (), without, shared=True),
    ]


def other_arms(
    study: Study, prompts: Prompts, sizes: Sizes, binary: Path, home: Path, work: Path
) -> Iterator[Arm]:
    """llama.cpp's server, and torch one at a time (where more streams would only queue) and batched."""
    yield _llama(study, sizes, binary, home)
    label = "torch bf16, compiled, one at a time behind our endpoint"
    try:
        bundle = bundle_of(study, COMPILED, work)
    except UserError as error:
        yield Arm(COMPILED, label, (1,), reason=str(error))
    else:
        yield Arm(COMPILED, label, (1,), ours(bundle, 1, sizes.room))
    yield _transformers(study, prompts, sizes)


def _transformers(study: Study, prompts: Prompts, sizes: Sizes) -> Arm:
    streams = tuple(sorted({1, sizes.slots}))
    label = "transformers serve, bf16, continuous batching"
    if missing := [name for name in ("accelerate", "openai") if _version(name) is None]:
        needs = "transformers[serving]"
        reason = f"{' and '.join(missing)} not installed: pip install '{needs}'"
        return Arm(BATCHED, label, streams, reason=reason)
    spec = transformers_serve(study.checkpoint.path, sizes.slots, sizes.room, prompts.text)
    return Arm(BATCHED, label, streams, spec)


def _llama(study: Study, sizes: Sizes, binary: Path, home: Path) -> Arm:
    label, streams = f"llama.cpp's llama-server, {_FILE_TYPE}", tuple(sorted({1, *sizes.streams[-2:]}))
    reason = ""
    if not binary.is_file():
        reason = f"{binary} is missing: make llama-server"
    elif _version("llama-cpp-python") is None:
        reason = "llama-cpp-python, which rounds the weights, is not installed: make llamacpp"
    if reason:
        return Arm(LLAMA, label, streams, reason=reason)
    gguf = write_words(study, home)
    spec = llama_server(binary, gguf, sizes.slots, sizes.room, len(os.sched_getaffinity(0)))
    return Arm(LLAMA, label, streams, spec)


def write_words(study: Study, home: Path) -> Path:
    """The checkpoint's GGUF with its words, from an earlier run or written now."""
    from open_autoglm.export.gguf_quantize import MODEL, export_gguf, library_versions

    key = digest_of([study.checkpoint.digest, _FILE_TYPE, library_versions(), "words"])
    directory = home / "peers" / key[:32]
    if not directory.exists():
        with directory_atomic(directory) as output:
            export_gguf(study.checkpoint, _FILE_TYPE, output)
            plain = (output / MODEL).rename(output / "plain.gguf")
            add_words(plain, study.checkpoint.path / "tokenizer.json", output / MODEL)
            plain.unlink()
    return directory / MODEL


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions(arms: Sequence[Arm]) -> dict[str, str]:
    """Of the libraries behind the arms."""
    names = ("open-autoglm", "onnxruntime", "openvino", "torch", "transformers", "llama-cpp-python")
    told = {name: _version(name) for name in names}
    return {"arms": ", ".join(arm.name for arm in arms), **{k: v for k, v in told.items() if v is not None}}
