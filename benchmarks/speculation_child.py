"""What runs in the child of ``benchmarks.speculation``: each prompt answered with drafts and without."""

from __future__ import annotations

import numpy as np

from open_autoglm import engines
from open_autoglm.engines.contract import Session, SessionOptions, Tokens
from open_autoglm.generation import greedy
from open_autoglm.measure.scenarios import run_round
from open_autoglm.measure.workload import Request
from open_autoglm.quality.texts import TEXTS, encode, load_tokenizer
from open_autoglm.schemas import Candidate, Checkpoint, ExportedModel, Model, Round

KINDS = ("continue", "summarise", "repeat")
PROMPT_TOKENS, OUTPUT_TOKENS, REPEATED_TOKENS = 512, 64, 32


# ── prompts ──────────────────────────────────────────────────────────────────────────────────────


def draw_prompts(checkpoint: Checkpoint, kind: str, count: int, seed: int = 0) -> list[Tokens]:
    """``count`` prompts ``int64[1, PROMPT_TOKENS]``, from each of the evaluation texts in turn."""
    tokenizer = load_tokenizer(checkpoint)
    generator = np.random.default_rng(seed)
    texts = [encode(tokenizer, text, "eval") for text in TEXTS]
    asked = np.asarray(tokenizer.encode("\n\nSummary: ", add_special_tokens=False, verbose=False))
    prompts = []
    for number in range(count):
        text = texts[number % len(texts)]
        start = int(generator.integers(len(text) - PROMPT_TOKENS))
        passage = text[start : start + PROMPT_TOKENS]
        end = {"continue": passage[:0], "summarise": asked, "repeat": passage[:REPEATED_TOKENS]}[kind]
        prompts.append(np.concatenate([passage[: PROMPT_TOKENS - len(end)], end])[None])
    return prompts


# ── answers ─────────────────────────────────────────────────────────────────────────────────────────────────


class SpeculationJob(Model):
    """Payload of :func:`measure`."""

    candidate: Candidate
    exported: ExportedModel
    checkpoint: Checkpoint
    prompts: int
    draft_tokens: int
    threads: int


class Pair(Model):
    """One prompt, answered twice."""

    plain: Round
    drafted: Round
    same_tokens: int


class Measured(Model):
    """Answer of :func:`measure`."""

    pairs: dict[str, tuple[Pair, ...]]
    facts: dict[str, str]


def measure(job: SpeculationJob) -> Measured:
    """Answer all prompts of all kinds."""
    room = SessionOptions(batch_size=1, max_tokens=PROMPT_TOKENS + OUTPUT_TOKENS, threads=job.threads)
    session = engines.get(job.candidate.engine).open(job.candidate, job.exported, room)
    pairs = {}
    for kind in KINDS:
        warm, *prompts = draw_prompts(job.checkpoint, kind, job.prompts + 1)
        _pair(session, warm, 0, job.draft_tokens)
        pairs[kind] = tuple(
            _pair(session, prompt, number, job.draft_tokens) for number, prompt in enumerate(prompts)
        )
    return Measured(pairs=pairs, facts=session.facts())


def _pair(session: Session, prompt: Tokens, number: int, draft_tokens: int) -> Pair:
    request = Request(tokens=prompt, output_tokens=OUTPUT_TOKENS)
    order = (0, draft_tokens) if number % 2 == 0 else (draft_tokens, 0)
    rounds = {drafts: run_round(session, [request], number, draft_tokens=drafts) for drafts in order}
    answers = [
        np.concatenate([step.tokens[0] for step in greedy(session, prompt, OUTPUT_TOKENS, drafts)])
        for drafts in (0, draft_tokens)
    ]
    same = int(np.logical_and.accumulate(answers[0] == answers[1]).sum())
    return Pair(plain=rounds[0], drafted=rounds[draft_tokens], same_tokens=same)
