"""Whether a newcomer can take a running server's place, by what can be read before it takes any memory."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

from open_autoglm.bundle import end_token_ids, evidence_of, open_bundle
from open_autoglm.errors import UserError
from open_autoglm.hardware import read_memory
from open_autoglm.schemas import Manifest
from open_autoglm.serving.exam import Check, Exam
from open_autoglm.serving.messages import EngineOptions
from open_autoglm.units import quantity

_WEIGHTS_TO_PEAK = 1.5
"""Peak memory of a bundle without a figure of its own: the weights, a cache and work space."""

_NO_MEANING = ("version", "truncation", "padding")
"""Sections of ``tokenizer.json`` on which the ids of a prompt do not depend."""


Acceptable = Literal["end_tokens", "context", "chat_template", "memory"]
"""What may be wanted otherwise. Not the tokenizer: the same prompt would be another text to each of the two,
and nothing of what they answer could be compared."""


def compatibility(
    newcomer: EngineOptions, running: EngineOptions | None, accept: Collection[Acceptable] = ()
) -> Exam:
    """What the files say of a ``newcomer`` started with these options, beside what is ``running``.

    ``accept`` names the checks whose difference is wanted. Reads files of a few MiB: call it in a thread.
    Raises UserError if a manifest is damaged.
    """
    manifest, _ = open_bundle(newcomer.bundle, verify=False)
    checks = [] if running is None else [*_same_language(newcomer, running), _context(newcomer, running)]
    checks.append(_memory(manifest, newcomer))
    return Exam(checks=tuple(_accepted(check) if check.name in accept else check for check in checks))


def _accepted(check: Check) -> Check:
    return check if check.ok else check.model_copy(update={"ok": True, "told": f"accepted: {check.told}"})


def _same_language(newcomer: EngineOptions, running: EngineOptions) -> list[Check]:
    """Whether one prompt is the same tokens to both, and ends at the same ones."""
    ours, theirs = newcomer.bundle / "tokenizer", running.bundle / "tokenizer"
    differing = _differing(_tokenizer_content(ours), _tokenizer_content(theirs))
    ends, theirs_ends = end_token_ids(ours), end_token_ids(theirs)
    same_ends, same_template = ends == theirs_ends, _chat_template(ours) == _chat_template(theirs)
    return [
        Check(
            name="tokenizer",
            ok=not differing,
            told=f"its tokenizer differs in {', '.join(differing)}" if differing else "the same tokenizer",
        ),
        Check(
            name="end_tokens",
            ok=same_ends,
            told=f"answers end at {_ids(ends)}" + ("" if same_ends else f", not at {_ids(theirs_ends)}"),
        ),
        Check(
            name="chat_template",
            ok=same_template,
            told="the same chat template" if same_template else "it has another chat template",
        ),
    ]


def _ids(ids: Collection[int] | None) -> str:
    return "the tokenizer's end token" if ids is None else ", ".join(map(str, sorted(ids))) or "no token"


def _tokenizer_content(directory: Path) -> dict[str, Any]:
    """What determines the ids of a prompt, by section: of ``tokenizer.json`` or, where there is none, of all
    files that hold a vocabulary; and the special tokens."""
    content = {k: v for k, v in _json(directory / "tokenizer.json").items() if k not in _NO_MEANING}
    if not content:
        vocabularies = (*directory.glob("*.model"), *directory.glob("vocab*"), *directory.glob("merges*"))
        content = {path.name: path.read_bytes() for path in vocabularies}
    config = _json(directory / "tokenizer_config.json")
    special = {k: _text_of(v) for k, v in config.items() if k.endswith("_token")}
    return {**content, "special tokens": special}


def _text_of(token: Any) -> Any:
    """A special token is written as its text, or as an object that holds it, by version of the library."""
    return token.get("content") if isinstance(token, dict) else token


def _differing(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    return [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]


def _chat_template(directory: Path) -> Any:
    path = directory / "chat_template.jinja"
    if path.exists():
        return path.read_text()
    return _json(directory / "tokenizer_config.json").get("chat_template")


def _json(path: Path) -> dict[str, Any]:
    """Raises UserError: nobody has checked the newcomer's digests yet."""
    try:
        content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return content


def _context(newcomer: EngineOptions, running: EngineOptions) -> Check:
    """Clients were promised so many tokens for prompt and answer."""
    ours, theirs = _room(newcomer), _room(running)
    told = f"room for {ours} tokens; the running server promises {theirs}"
    return Check(name="context", ok=ours >= theirs, told=told)


def _room(options: EngineOptions) -> int:
    manifest, _ = open_bundle(options.bundle, verify=False)
    return min(options.max_tokens, manifest.context_tokens)


def _memory(manifest: Manifest, options: EngineOptions) -> Check:
    """Whether it fits beside what is running, which stays until the newcomer has taken over."""
    needed, how = expected_bytes(manifest, options)
    _, available = read_memory()
    told = f"it needs about {quantity(needed, 'bytes')} ({how}); {quantity(available, 'bytes')} are available"
    if manifest.candidate.device == "gpu":
        told += "; the memory of the GPU was not checked"
    return Check(name="memory", ok=needed <= available, told=told)


def expected_bytes(manifest: Manifest, options: EngineOptions) -> tuple[int, str]:
    """Peak memory of the engine's process, and what it is made of.

    The study's peak was of one request; each slot has room for ``max_tokens``. Mapped files count as far as
    they were touched, though their pages may be shared with a process on the same files: an upper bound.
    """
    evidence = evidence_of(manifest)
    weights = sum(file.size_bytes for file in manifest.files if file.path.startswith("model/"))
    rough = int(_WEIGHTS_TO_PEAK * weights)
    peak, request = evidence.metrics.get("peak_rss_bytes"), evidence.request
    if peak is None or request is None or evidence.kv_bytes_per_token is None:
        known = int(peak.median) if peak else 0
        return max(rough, known), f"{_WEIGHTS_TO_PEAK:g} times its weights, or its peak if that is known"
    measured = request.batch_size * (request.prompt_tokens + request.output_tokens)
    more = max(0, options.slots * min(options.max_tokens, manifest.context_tokens) - measured)
    cache = more * evidence.kv_bytes_per_token
    return int(peak.median) + cache, f"its peak in the study and a cache of {more} tokens more"
