"""Are figures taken while another study is at work the figures taken alone?

``python -m benchmarks.parallel MODEL``: blocks of rounds of one candidate alone, then the same rounds while a
second study (its own home, so it exports, loads, scores and times everything anew) runs in another process,
in turn. Both share the device lease and nothing else. Reported is the paired change with its interval; the
promise is that it lies within 3 %.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.laboratory import Laboratory, open_laboratory, save, unscreened
from open_autoglm.heats import Contest, Residents
from open_autoglm.measure.comparison import compare
from open_autoglm.measure.isolation import Failure
from open_autoglm.measure.racing import REPEATS_PER_HEAT, Rules
from open_autoglm.measure.scenarios import figure_of
from open_autoglm.schemas import Comparison, Round, Trial

PROMISE = 0.03
METRICS = ("ttft_ms", "tpot_ms", "e2e_ms")
RESULT = Path(__file__).parent / "results" / "parallel.json"


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.parallel", description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--candidate", default="onnxruntime-w8-b32")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", type=Path, default=RESULT)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="autoglm-parallel-") as folder:
        laboratory = open_laboratory(asked.model, Path(folder) / "study", rounds=3)
        alone, beside = measure(laboratory, asked.candidate, asked.blocks, asked.rounds, Path(folder))
    found = [_change(metric, alone, beside) for metric in METRICS]
    sys.stdout.write(_table(found, alone, beside))
    raw = {"alone": _dump(alone), "beside": _dump(beside)}
    save(asked.json, {"candidate": asked.candidate, "changes": [c.model_dump() for c in found], **raw})


def measure(
    laboratory: Laboratory, candidate_id: str, blocks: int, rounds: int, folder: Path
) -> tuple[list[Round], list[Round]]:
    """(rounds alone, the same rounds beside another study), block by block."""
    candidate = next(c for c in laboratory.candidates() if c.id == candidate_id)
    trial = laboratory.exported(candidate).model_copy(update={"screening": unscreened()})
    alone: list[Round] = []
    beside: list[Round] = []
    contest = Contest([trial], Rules(figure_of("e2e_ms"), "e2e_ms", 1, 1, 1))
    with Residents(laboratory.bench, "final", contest, laboratory.settings) as residents:
        residents.open_all([trial.id])
        for block in range(blocks):
            indexes = range(block * rounds, (block + 1) * rounds)
            alone += [_round(residents, trial, index) for index in indexes]
            other = _other_study(laboratory, folder / f"home-{block}")
            try:
                time.sleep(8)  # let it get to work
                beside += [_round(residents, trial, index) for index in indexes]
                if other.poll() is not None:
                    raise SystemExit("the other study ended before the block did: it proves nothing")
            finally:
                other.terminate()
                other.wait()
    return alone, beside


def _round(residents: Residents, trial: Trial, index: int, attempts: int = REPEATS_PER_HEAT + 1) -> Round:
    """One round, run again if it was disturbed, as in a final."""
    result = residents(trial.id, index)
    if isinstance(result, Failure):
        raise SystemExit(f"{trial.id}: {result.reason}")
    disturbed = result.conditions.disturbances and attempts > 1
    return _round(residents, trial, index, attempts - 1) if disturbed else result


def _other_study(laboratory: Laboratory, home: Path) -> subprocess.Popen[bytes]:
    command = ["-m", "open_autoglm.cli", "optimize", f"--model-path={laboratory.bench.checkpoint.path}"]
    with (home.parent / f"{home.name}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, *command, f"--output={home}-study", "--engines=onnxruntime"],
            env={**os.environ, "AUTOGLM_HOME": str(home)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _change(metric: str, alone: list[Round], beside: list[Round]) -> Comparison:
    figure = figure_of(metric)
    return compare(
        "beside another study", "alone", metric, list(map(figure, beside)), list(map(figure, alone))
    )


def _table(found: list[Comparison], alone: list[Round], beside: list[Round]) -> str:
    lines = [
        "| metric | change beside another study | 95 % interval | pairs | promise kept |",
        "|---|---:|---:|---:|---|",
    ]
    for c in found:
        low, high = c.interval
        kept = "yes" if abs(c.change) <= PROMISE else "no"
        lines.append(f"| {c.metric} | {c.change:+.2%} | {low:+.2%} to {high:+.2%} | {c.pairs} | {kept} |")
    disturbed = [sum(bool(r.conditions.disturbances) for r in rounds) for rounds in (alone, beside)]
    lines.append(f"\nRounds marked as disturbed: {disturbed[0]} alone, {disturbed[1]} beside.\n")
    return "\n".join(lines)


def _dump(rounds: list[Round]) -> list[dict[str, object]]:
    return [r.model_dump(mode="json", exclude={"token_ms"}) for r in rounds]


if __name__ == "__main__":
    main()
