"""How much do processes of the same candidate differ on this host?

``python -m benchmarks.processes MODEL``: one candidate in several processes, interleaved as in a final. More
rounds cannot average out what differs between processes, so the verdict rests on its being small; here it is
measured: the standard deviation between processes (one-way variance components), that of a round, and how
many of the pairs would have been called a promotion.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from itertools import permutations
from pathlib import Path

import numpy as np

from benchmarks.laboratory import Laboratory, open_laboratory, save, unscreened
from open_autoglm.heats import Contest, Residents
from open_autoglm.measure.comparison import compare, noise_floor, promotes
from open_autoglm.measure.racing import Rules, run_race
from open_autoglm.measure.scenarios import figure_of
from open_autoglm.schemas import Trial

RESULT = Path(__file__).parent / "results" / "processes.json"
METRICS = ("ttft_ms", "tpot_ms", "e2e_ms")


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.processes", description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--candidate", default="onnxruntime-w8-b32")
    parser.add_argument("--processes", type=int, default=6)
    parser.add_argument("--heats", type=int, default=20)
    parser.add_argument("--json", type=Path, default=RESULT)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="autoglm-processes-") as folder:
        laboratory = open_laboratory(asked.model, Path(folder) / "study")
        figures = measure(laboratory, asked.candidate, asked.processes, asked.heats)
    lines = [
        "| metric | sd between processes | sd of a round | promotions among equal pairs |",
        "|---|---:|---:|---:|",
    ]
    for metric, logs in figures.items():
        between, within = components(logs)
        wrong, pairs = promotions(metric, np.exp(logs))
        lines.append(f"| {metric} | {between:.2%} | {within:.2%} | {wrong} of {pairs} |")
    sys.stdout.write("\n".join(lines) + "\n")
    save(
        asked.json,
        {"candidate": asked.candidate, "log_ms": {m: logs.tolist() for m, logs in figures.items()}},
    )


def measure(
    laboratory: Laboratory, candidate_id: str, processes: int, heats: int
) -> dict[str, np.ndarray[tuple[int, int], np.dtype[np.float64]]]:
    """Logs of each metric's milliseconds, ``[processes, heats]``."""
    candidate = next(c for c in laboratory.candidates() if c.id == candidate_id)
    trial = laboratory.exported(candidate).model_copy(update={"screening": unscreened()})
    copies = [_copy(trial, number) for number in range(processes)]
    rules = Rules(figure_of("e2e_ms"), "e2e_ms", heats, heats, math.inf)
    names = [copy.id for copy in copies]
    contest = Contest(copies, rules)
    with Residents(laboratory.bench, "final", contest, laboratory.settings) as residents:
        residents.open_all(names)
        outcome = run_race("final", names, residents, rules)
    return {
        metric: np.log([[figure_of(metric)(r) for r in outcome.counted(name)] for name in names])
        for metric in METRICS
    }


def _copy(trial: Trial, number: int) -> Trial:
    return trial.model_copy(update={"id": f"{trial.id}-process{number}"})


def components(logs: np.ndarray[tuple[int, int], np.dtype[np.float64]]) -> tuple[float, float]:
    """(sd between processes, sd of a round) of ``logs[processes, heats]``; a heat's own mean is removed."""
    relative = logs - logs.mean(axis=0)
    within = relative.var(axis=1, ddof=1).mean()
    between = relative.mean(axis=1).var(ddof=1) - within / logs.shape[1]
    return math.sqrt(max(0.0, float(between))), math.sqrt(float(within))


def promotions(metric: str, ms: np.ndarray[tuple[int, int], np.dtype[np.float64]]) -> tuple[int, int]:
    """How many ordered pairs of equal processes would be promoted, with a third one as the twin."""
    wrong = pairs = 0
    for ours, theirs, twin in permutations(range(len(ms)), 3):
        noise = noise_floor(compare("twin", "ours", metric, list(ms[twin]), list(ms[ours])))
        wrong += promotes(compare("ours", "theirs", metric, list(ms[ours]), list(ms[theirs])), noise)
        pairs += 1
    return wrong, pairs


if __name__ == "__main__":
    main()
