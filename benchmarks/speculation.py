"""What drafts bring, by the kind of text: ``python -m benchmarks.speculation MODEL``.

Each candidate answers every prompt with drafts and without, one right after the other in one process and in
alternating order. TPOT is compared by the ratios of these pairs. Kinds of prompt:

- *continue*: a passage of the evaluation texts, as a study's workload has it;
- *summarise*: a passage, and the beginning of a summary;
- *repeat*: a passage, and its beginning once more: what follows stands in the prompt.

Beside each stand the share of guessed tokens that were right, the tokens per call, and how many leading
tokens are the same with drafts and without (kernels for one row and for several round differently).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.laboratory import Laboratory, open_laboratory, save
from open_autoglm import engines
from open_autoglm.engines.contract import DRAFT_TOKENS, Session, SessionOptions, Tokens
from open_autoglm.generation import greedy
from open_autoglm.measure.comparison import compare
from open_autoglm.measure.isolation import Failure, run_isolated
from open_autoglm.measure.lease import device_lease
from open_autoglm.measure.scenarios import run_round
from open_autoglm.measure.workload import Request
from open_autoglm.quality.texts import TEXTS, encode, load_tokenizer
from open_autoglm.schemas import Candidate, Checkpoint, Comparison, ExportedModel, Model, Round
from open_autoglm.trials import exported_of

RESULT = Path(__file__).parent / "results" / "speculation.json"
CANDIDATES = ("onnxruntime-fp32", "onnxruntime-w8-b32", "onnxruntime-w8a8")
KINDS = ("continue", "summarise", "repeat")
PROMPT_TOKENS, OUTPUT_TOKENS, REPEATED_TOKENS = 512, 64, 32
CHILD_TIMEOUT_S = 900.0


def tell(line: str) -> None:
    sys.stderr.write(line + "\n")


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


# ── in the child ─────────────────────────────────────────────────────────────────────────────────


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


# ── in the parent ────────────────────────────────────────────────────────────────────────────────


class Row(Model):
    """One candidate on one kind of prompt."""

    candidate: str
    kind: str
    comparison: Comparison
    right_share: float
    tokens_per_call: float
    same_tokens: tuple[int, ...]


def rows_of(candidate: str, measured: Measured) -> Iterator[Row]:
    """A row for each kind."""
    for kind, pairs in measured.pairs.items():
        drafted = sum(sum(pair.drafted.drafted_tokens) for pair in pairs)
        accepted = sum(sum(pair.drafted.accepted_tokens) for pair in pairs)
        calls = OUTPUT_TOKENS * len(pairs) - accepted
        times = ([pair.drafted.tpot_ms[0] for pair in pairs], [pair.plain.tpot_ms[0] for pair in pairs])
        yield Row(
            candidate=candidate,
            kind=kind,
            comparison=compare("drafts", "plain", "tpot_ms", *times),
            right_share=accepted / max(1, drafted),
            tokens_per_call=(calls + accepted) / calls,
            same_tokens=tuple(pair.same_tokens for pair in pairs),
        )


def run(laboratory: Laboratory, name: str, prompts: int, draft_tokens: int) -> Measured | Failure:
    """Measure one candidate in a child of its own, with the device alone."""
    bench = laboratory.bench
    candidate = next(c for c in laboratory.candidates() if c.id == name)
    trial = laboratory.exported(candidate)
    job = SpeculationJob(
        candidate=candidate,
        exported=exported_of(trial),
        checkpoint=bench.checkpoint,
        prompts=prompts,
        draft_tokens=draft_tokens,
        threads=len(os.sched_getaffinity(0)),
    )
    log = bench.study.log_path(f"{name}-speculation")
    with device_lease("cpu", alone=True):
        return run_isolated(
            "benchmarks.speculation:measure",
            job,
            Measured,
            log=log,
            timeout_s=CHILD_TIMEOUT_S,
        )


def table_of(rows: list[Row]) -> Table:
    table = Table(box=None, title="TPOT with drafts / without")
    for column in ("candidate", "prompts", "ratio", "95 % interval", "right", "tokens/call", "same tokens"):
        table.add_column(column)
    for row in rows:
        low, high = row.comparison.interval
        table.add_row(
            row.candidate,
            row.kind,
            f"{1 + row.comparison.change:.2f}",
            f"{1 + low:.2f} to {1 + high:.2f}",
            f"{row.right_share:.0%}",
            f"{row.tokens_per_call:.2f}",
            f"median {int(np.median(row.same_tokens))}, least {min(row.same_tokens)} of {OUTPUT_TOKENS}",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--prompts", type=int, default=12, help="per kind and candidate")
    parser.add_argument(f"--{DRAFT_TOKENS.replace('_', '-')}", type=int, default=7)
    parser.add_argument("--json", type=Path, default=RESULT)
    asked = parser.parse_args()
    rows, samples = [], {}
    with tempfile.TemporaryDirectory() as output:
        laboratory = open_laboratory(asked.model, Path(output))
        for name in CANDIDATES:
            found = run(laboratory, name, asked.prompts, asked.draft_tokens)
            if isinstance(found, Failure):
                raise SystemExit(f"{name}: {found.reason}")
            rows += list(rows_of(name, found))
            samples[name] = found.model_dump(mode="json")
            tell(f"{name}: done")
    Console().print(table_of(rows))
    content = {
        "prompt_tokens": PROMPT_TOKENS,
        "output_tokens": OUTPUT_TOKENS,
        "draft_tokens": asked.draft_tokens,
        "rows": [row.model_dump(mode="json") for row in rows],
        "samples": samples,
    }
    save(asked.json, content)


if __name__ == "__main__":
    main()
