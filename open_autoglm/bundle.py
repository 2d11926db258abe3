"""The bundle: the champion as a directory that can be copied to another machine and opened there.

``manifest.json`` says what it is, the digest of every other file, and the evidence it was chosen by;
``model/`` holds what the engine opens; ``tokenizer/`` the tokenizer, the configs and the chat template.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from collections.abc import Collection, Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

import numpy as np

from open_autoglm import engines
from open_autoglm.engines.contract import Session, SessionOptions, draft_tokens_of, room_of
from open_autoglm.errors import CheckpointError, UserError
from open_autoglm.export.store import RECORD
from open_autoglm.files import digest_files, digest_of, directory_atomic, sha256_file
from open_autoglm.generation import greedy
from open_autoglm.schemas import (
    FORMAT_VERSION,
    Bundle,
    BundleEvidence,
    Candidate,
    Checkpoint,
    FileDigest,
    GoldenPrompt,
    Manifest,
    Study,
    Trial,
)

MANIFEST = "manifest.json"
SERVED_TOKENS = 4096
"""Room for prompt and output in a `BundleModel`, unless the model's context is shorter: a cache for the
131,072 tokens of a GLM-4 would take more memory than its weights."""

_GENERAL_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""The names of one class: before transformers 5, and since."""

_NEEDED_BY_ALL = ("open-autoglm", "numpy", "pydantic", "safetensors", "tokenizers", "transformers")
_RUNTIMES = {
    "torch": "torch",
    "llamacpp": "llama-cpp-python",
    "onnxruntime": "onnxruntime",
    "onnxruntime-cuda": "onnxruntime-gpu",
    "onnxruntime-tensorrt": "onnxruntime-gpu",
    "openvino": "openvino",
    "tensorrt": "tensorrt-cu13-bindings",
    "tensorrt-rtx": "tensorrt-rtx-cu13-bindings",
}


# ── writing ──────────────────────────────────────────────────────────────────────────────────────


def build_bundle(study: Study, trial: Trial, directory: Path, golden: Sequence[GoldenPrompt] = ()) -> Bundle:
    """Write ``trial``'s deployable files to ``directory``, replacing what is there, all or nothing.

    The digest covers the files and the candidate, not dates or studies: the same winner has the same one.
    ``golden`` prompts are evidence of a study too, so they are in the manifest and not among the files.
    Raises CheckpointError if the checkpoint is no longer the one that was measured.
    """
    with directory_atomic(directory) as root:
        files = _place_files(study, trial, root)
        manifest = _manifest(study, trial, files, golden)
        (root / MANIFEST).write_text(manifest.model_dump_json(indent=2))
    return _describe(directory, manifest)


def _place_files(study: Study, trial: Trial, root: Path) -> tuple[FileDigest, ...]:
    """Fill ``model/`` and ``tokenizer/`` and return the digests of all files.

    An export never changes, so its files are linked; a user may change the checkpoint, so it is copied.
    """
    exported, checkpoint = trial.exported, study.checkpoint
    if exported is None:
        raise ValueError(f"trial {trial.id!r} has no exported files to bundle")
    _copy(checkpoint, (f for f in checkpoint.files if not _is_weights(f.path)), root / "tokenizer")
    if exported.path == checkpoint.path:
        _copy(checkpoint, checkpoint.files, root / "model")
    else:
        record = shutil.ignore_patterns(RECORD)  # the store's own notes: they hold a build time
        shutil.copytree(exported.path, root / "model", ignore=record, copy_function=_link_or_copy)
    return digest_files(root, (file for file in root.rglob("*") if file.is_file()))


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".safetensors.index.json"))


def _copy(checkpoint: Checkpoint, files: Iterable[FileDigest], target: Path) -> None:
    for file in files:
        original, copy = checkpoint.path / file.path, target / file.path
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(original, copy)
        if sha256_file(copy) != file.sha256:
            raise CheckpointError(f"{original} has changed since it was measured: run the study again")


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)


def _manifest(
    study: Study, trial: Trial, files: tuple[FileDigest, ...], golden: Sequence[GoldenPrompt]
) -> Manifest:
    assert trial.exported is not None  # _place_files has checked it
    return Manifest(
        name=study.checkpoint.name,
        candidate=trial.candidate,
        exported=trial.exported.model_copy(update={"path": Path("model"), "reused": False}),
        model_type=study.checkpoint.model_type,
        context_tokens=study.checkpoint.context_tokens,
        checkpoint_digest=study.checkpoint.digest,
        trust_remote_code=study.checkpoint.trust_remote_code,
        files=files,
        study_id=study.id,
        created=datetime.now(UTC),
        versions=_installed_versions(trial.candidate),
        evidence=_evidence(study, trial, golden),
    )


def _evidence(study: Study, trial: Trial, golden: Sequence[GoldenPrompt]) -> dict[str, Any]:
    """The figures the bundle was chosen by; the raw samples stay with the study."""
    asked = {"batch_size", "prompt_tokens", "output_tokens", "objective"}
    facts = {"unit", "median", "interval", "samples", "p95", "p95_indicative"}
    return {
        "request": study.spec.model_dump(mode="json", include=asked),
        "hardware": study.analysis.hardware.fingerprint,
        "verdict": list(study.verdict.reasons),
        "metrics": {name: m.model_dump(mode="json", include=facts) for name, m in trial.metrics.items()},
        "quality": trial.quality.model_dump(mode="json") if trial.quality else None,
        "kv_bytes_per_token": study.analysis.profile.kv_bytes_per_token(32),
        "host": trial.capsule.host if trial.capsule else {},
        "golden": [prompt.model_dump(mode="json") for prompt in golden],
    }


def _installed_versions(candidate: Candidate) -> dict[str, str]:
    """Versions of Python and of what serving ``candidate`` needs; a plug-in's package brings its own."""
    engine = candidate.engine
    plugin = [point.dist.name for point in entry_points(group=engines.GROUP, name=engine) if point.dist]
    versions = {"python": sys.version.split()[0]}
    runtime = [_RUNTIMES[engine]] if engine in _RUNTIMES else plugin
    if engine == "torch" and candidate.precision in ("fp8", "int8", "int4"):
        runtime.append("torchao")  # the session rounds the weights
    for name in (*_NEEDED_BY_ALL, *runtime):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # another distribution brings the runtime here
            continue
    return versions


# ── reading ──────────────────────────────────────────────────────────────────────────────────────


def open_bundle(directory: Path, *, verify: bool = True) -> tuple[Manifest, Bundle]:
    """Read the manifest of ``directory`` and, if ``verify``, check every file against it.

    Raises UserError naming the first file that is missing, damaged or not listed.
    """
    manifest = _read_manifest(directory / MANIFEST)
    if verify:
        _check_files(directory, manifest)
    return manifest, _describe(directory, manifest)


def _read_manifest(path: Path) -> Manifest:
    try:
        content = json.loads(path.read_text())
        found = content["format_version"]
        if found != FORMAT_VERSION:
            raise UserError(
                f"{path} has format version {found}, but this open-autoglm reads {FORMAT_VERSION}: "
                "build the bundle again, or use the version that wrote it"
            )
        return Manifest.model_validate(content)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path.parent} is not a bundle: it has no {MANIFEST}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: build the bundle again") from error


def _check_files(directory: Path, manifest: Manifest) -> None:
    expected = {file.path: file for file in manifest.files}
    present = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    mend = "copy or build the bundle again"
    for name in sorted(expected.keys() - present):
        raise UserError(f"{directory / name} is missing: {mend}")
    for name in sorted(present - expected.keys() - {MANIFEST}):
        raise UserError(f"{directory / name} is not listed in {MANIFEST}: remove it, or {mend}")
    for found in digest_files(directory, (directory / name for name in expected)):
        if found != expected[found.path]:
            raise UserError(f"{directory / found.path} is damaged, its SHA-256 is not the listed one: {mend}")


def _describe(directory: Path, manifest: Manifest) -> Bundle:
    identity: set[str] = {"engine", "device", "precision", "weight_bits", "knobs"}
    content = {
        "candidate": manifest.candidate.model_dump(mode="json", include=identity),
        "files": {file.path: file.sha256 for file in manifest.files},
    }
    return Bundle(
        path=directory, digest=digest_of(content), size_bytes=sum(file.size_bytes for file in manifest.files)
    )


def evidence_of(manifest: Manifest) -> BundleEvidence:
    """What the study that built the bundle found; a version that kept less leaves it empty.

    Raises UserError if it is damaged: the manifest vouches for the files, and nothing for itself.
    """
    try:
        return BundleEvidence.model_validate(manifest.evidence)
    except ValueError as error:
        raise UserError(f"the evidence of {manifest.name} is damaged: build the bundle again") from error


def open_session(directory: Path, manifest: Manifest, options: SessionOptions) -> Session:
    """The engine's session of the bundle in ``directory``. Raises UserError if its engine cannot run here."""
    candidate = manifest.candidate
    engine = engines.get(candidate.engine)
    probe = engine.probe(candidate.device)
    if not probe.ready:
        mend = f"; install it with: {probe.install}" if probe.install else ""
        raise UserError(f"{directory} needs the engine {candidate.engine}: {probe.reason}{mend}")
    exported = manifest.exported.model_copy(update={"path": directory / "model"})
    return engine.open(candidate, exported, options)


# ── speaking ─────────────────────────────────────────────────────────────────────────────────────


def generate(
    session: Session,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int,
    eos_ids: Collection[int],
    *,
    max_tokens: int,
    draft_tokens: int = 0,
) -> list[str]:
    """Continue each prompt greedily, one after the other, until an end token or ``max_new_tokens``.

    ``max_tokens`` is what ``session`` has room for; ``draft_tokens`` are guessed per call, at most. Every
    prompt is checked before the first is run.
    Raises UserError for an empty prompt or one that does not fit.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}: ask for at least 1")
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    for number, ids in enumerate(encoded, start=1):
        if not ids:
            raise UserError(f"prompt {number} is empty: give it at least one token")
        if len(ids) + max_new_tokens > max_tokens:
            raise UserError(
                f"prompt {number} has {len(ids)} tokens and {max_new_tokens} new ones were asked for, "
                f"but there is room for {max_tokens} together: shorten the prompt or ask for fewer"
            )
    answers = [_continue(session, ids, max_new_tokens, eos_ids, draft_tokens) for ids in encoded]
    return [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]


def _continue(
    session: Session, prompt: list[int], limit: int, eos_ids: Collection[int], draft_tokens: int
) -> list[int]:
    """The most likely next tokens, without the end token."""
    answer: list[int] = []
    for step in greedy(session, np.array([prompt], dtype=np.int64), limit, draft_tokens):
        for token in step.tokens[0].tolist():
            if token in eos_ids:
                return answer
            answer.append(token)
    return answer


class BundleModel:
    """An opened bundle that continues prompts; safe to call from several threads, one at a time inside."""

    def __init__(self, directory: Path, *, max_tokens: int = SERVED_TOKENS, verify: bool = True) -> None:
        """Open ``directory`` with room for ``max_tokens``, prompt and output together.

        Raises UserError if the bundle is damaged or its engine is not installed.
        """
        self.manifest, self.bundle = open_bundle(directory, verify=verify)
        room = room_of(self.manifest.candidate) or max_tokens
        self.max_tokens = min(max_tokens, room, self.manifest.context_tokens)
        self._tokenizer = open_tokenizer(
            directory / "tokenizer", trust_remote_code=self.manifest.trust_remote_code
        )
        self._eos_ids = end_tokens(directory / "tokenizer", self._tokenizer)
        self._lock = threading.Lock()
        threads = len(os.sched_getaffinity(0))
        options = SessionOptions(batch_size=1, max_tokens=self.max_tokens, threads=threads)
        self._session = open_session(directory, self.manifest, options)

    def generate(self, prompts: Sequence[str], max_new_tokens: int = 64) -> list[str]:
        """The greedy continuation of each prompt, without the prompt; see :func:`generate`."""
        with self._lock:
            return generate(
                self._session,
                self._tokenizer,
                prompts,
                max_new_tokens,
                self._eos_ids,
                max_tokens=self.max_tokens,
                draft_tokens=draft_tokens_of(self.manifest.candidate),
            )

    def close(self) -> None:
        """Free the engine's memory. The model is not used again."""
        with self._lock:
            self._session.close()


def open_tokenizer(directory: Path, *, trust_remote_code: bool) -> Any:
    """The transformers tokenizer of a bundle, as `AutoTokenizer` would find it.

    GLM's is the general one, which has all it knows from ``tokenizer.json``. It is opened by its own class:
    `AutoTokenizer` imports torch on the way, 1.5 s and 190 MB that a server has no other use for.
    """
    if _is_general(directory):
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(directory)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)


def _is_general(directory: Path) -> bool:
    """Whether config and tokenizer say so. Of other families `AutoTokenizer` may know better than they."""
    paths = [directory / name for name in ("config.json", "tokenizer_config.json", "tokenizer.json")]
    if not all(path.is_file() for path in paths):
        return False
    config, tokenizer = (json.loads(path.read_text(encoding="utf-8")) for path in paths[:2])
    return (
        str(config.get("model_type")).startswith("glm")
        and tokenizer.get("tokenizer_class") in _GENERAL_TOKENIZERS
        and "auto_map" not in tokenizer
    )


def end_tokens(directory: Path, tokenizer: Any) -> frozenset[int]:
    """Where generation ends, by the first to say so: generation config, config, tokenizer."""
    ids = end_token_ids(directory)
    if ids is not None:
        return ids
    return frozenset() if tokenizer.eos_token_id is None else frozenset([tokenizer.eos_token_id])


def end_token_ids(directory: Path) -> frozenset[int] | None:
    """Where the configs say that generation ends; None if they leave it to the tokenizer."""
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        ids = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
        if ids is not None:
            return frozenset(ids if isinstance(ids, list) else [ids])
    return None
