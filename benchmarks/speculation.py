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
from benchmarks.speculation_child import OUTPUT_TOKENS, PROMPT_TOKENS, Measured, SpeculationJob
from open_autoglm.engines.contract import DRAFT_TOKENS
from open_autoglm.measure.comparison import compare
from open_autoglm.measure.isolation import Failure, run_isolated
from open_autoglm.measure.lease import device_lease
from open_autoglm.schemas import Comparison, Model
from open_autoglm.trials import exported_of

RESULT = Path(__file__).parent / "results" / "speculation.json"
CANDIDATES = ("onnxruntime-fp32", "onnxruntime-w8-b32", "onnxruntime-w8a8")
CHILD_TIMEOUT_S = 900.0


def tell(line: str) -> None:
    sys.stderr.write(line + "\n")


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
            "benchmarks.speculation_child:measure",
            job,
            Measured,
            log=log,
            timeout_s=CHILD_TIMEOUT_S,
        )


def table_of(rows: list[Row]) -> Table:
    """Beside the ratio: how many leading tokens of ``OUTPUT_TOKENS`` are those without drafts."""
    table = Table(box=None, title="TPOT with drafts / without")
    for column in ("Candidate", "Prompts", "Ratio", "95 % interval", "Right", "Tokens/call", "Same tokens"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        low, high = row.comparison.interval
        table.add_row(
            row.candidate.removeprefix("onnxruntime-"),
            row.kind,
            f"{1 + row.comparison.change:.2f}",
            f"{1 + low:.2f} – {1 + high:.2f}",
            f"{row.right_share:.0%}",
            f"{row.tokens_per_call:.2f}",
            f"{np.median(row.same_tokens):.0f} (least {min(row.same_tokens)})",
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
