"""A bundle's golden workload: requests like those it was chosen by, and what its study says they take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from open_autoglm.bundle import evidence_of
from open_autoglm.quality.texts import read
from open_autoglm.schemas import BundleEvidence, EndpointProbe, GoldenTimes, Manifest, RequestShape

_MOST_PROMPT_TOKENS, _MOST_OUTPUT_TOKENS = 512, 16
_TEXT_CHARACTERS = 40_000


def golden_shape(room_tokens: int, request: RequestShape | None) -> RequestShape:
    """One request as in the study, though not longer than some, and so that it fits."""
    prompt = min(request.prompt_tokens if request else _MOST_PROMPT_TOKENS, _MOST_PROMPT_TOKENS)
    output = min(request.output_tokens if request else _MOST_OUTPUT_TOKENS, _MOST_OUTPUT_TOKENS)
    output = max(1, min(output, room_tokens - 1))
    return RequestShape(batch_size=1, prompt_tokens=min(prompt, room_tokens - output), output_tokens=output)


def golden_prompts(tokenizer: Any, shape: RequestShape, count: int) -> list[tuple[int, ...]]:
    """So many different prompts of that length, from a text of the evaluation."""
    text = tokenizer.encode(
        read("technical", "eval")[:_TEXT_CHARACTERS], add_special_tokens=False, verbose=False
    )
    return [_cut(text, number * shape.prompt_tokens, shape.prompt_tokens) for number in range(count)]


def _cut(text: Sequence[int], start: int, length: int) -> tuple[int, ...]:
    """So many tokens from ``start`` on; the text begins again at its end."""
    return tuple(text[(start + place) % len(text)] for place in range(length))


def study_times(evidence: BundleEvidence, shape: RequestShape) -> GoldenTimes | None:
    """What the study's figures come to for this shape: a prompt's time grows with its length.

    None if the bundle holds none.
    """
    ttft, tpot, request = evidence.metrics.get("ttft_ms"), evidence.metrics.get("tpot_ms"), evidence.request
    if ttft is None or tpot is None or request is None:
        return None
    return golden_times(shape, [(shape.prompt_tokens / request.prompt_tokens * ttft.median, tpot.median)])


def golden_times(
    shape: RequestShape, answers: Iterable[tuple[float, float | None]], **about: Any
) -> GoldenTimes:
    """Of answers' ``ttft_ms`` and ``tpot_ms``, the second None if there was but one token."""
    found = tuple(answers)
    later = shape.output_tokens - 1
    return GoldenTimes(
        prompt_tokens=shape.prompt_tokens,
        output_tokens=shape.output_tokens,
        ttft_ms=tuple(ttft_ms for ttft_ms, _ in found),
        tpot_ms=tuple(tpot_ms for _, tpot_ms in found if tpot_ms is not None),
        e2e_ms=tuple(ttft_ms + later * tpot_ms for ttft_ms, tpot_ms in found if tpot_ms is not None),
        **about,
    )


def study_baseline(manifest: Manifest, digest: str, shape: RequestShape) -> EndpointProbe:
    """What stands in for a probe where none was taken in good times. Raises UserError if the manifest's
    evidence is damaged."""
    evidence = evidence_of(manifest)
    return EndpointProbe(
        source="study",
        bundle_digest=digest[:12],
        golden=study_times(evidence, shape),
        settings=manifest.versions | evidence.host,
    )
