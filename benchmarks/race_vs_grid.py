"""Does the race find what the exhaustive grid finds, and in what share of its time?

``python -m benchmarks.race_vs_grid MODEL``: the search and race of a study, stage by stage, and then every
point of the engines' grid, each screened, judged in full and timed for as many rounds as a finalist has. The
two winners meet in a last interleaved final. Exports are made beforehand and count for neither. The promise:
the race's choice is within 2 % of the grid's best, in at most 25 % of the grid's time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.laboratory import Laboratory, open_laboratory, save
from open_autoglm.bracket import after_evaluation, after_screening, best_go_on, final_contest, race_contest
from open_autoglm.heats import Contest, run_stage
from open_autoglm.measure.comparison import compare
from open_autoglm.measure.racing import Rules
from open_autoglm.measure.scenarios import figure_of
from open_autoglm.schemas import Candidate, Comparison, Trial
from open_autoglm.search import grid, next_generation
from open_autoglm.trials import evaluate_trial, screen_trial

RESULT = Path(__file__).parent / "results" / "race_vs_grid.json"
PROMISED_LOSS, PROMISED_SHARE = 0.02, 0.25


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.race_vs_grid", description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--start", default="onnxruntime-w8-b32", help="comma-separated; whose grid to try")
    parser.add_argument("--json", type=Path, default=RESULT)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="autoglm-grid-") as folder:
        laboratory = open_laboratory(asked.model, Path(folder) / "study")
        start = [c for c in laboratory.candidates() if c.id in asked.start.split(",")]
        points = grid(start, laboratory.analysis, laboratory.bench.spec)
        points = [point for point in points if point.vetoed_because is None]
        reference = laboratory.reference()
        files = {point.id: laboratory.exported(point) for point in points}
        tell(f"{len(points)} points in the grid, all exported")
        started = time.monotonic()
        raced, tried = run_race_arm(laboratory, start, files, reference)
        race_s = time.monotonic() - started
        tell(f"race: {raced.id} after {race_s:.0f} s, {tried} of {len(points)} points tried")
        started = time.monotonic()
        best = run_grid_arm(laboratory, files, reference)
        grid_s = time.monotonic() - started
        tell(f"grid: {best.id} after {grid_s:.0f} s")
        loss = None if raced.id == best.id else duel(laboratory, raced, best)
    report(raced, best, loss, race_s, grid_s, tried, points, asked.json)


def tell(line: str) -> None:
    sys.stderr.write(line + "\n")


def run_race_arm(
    laboratory: Laboratory, start: Sequence[Candidate], files: dict[str, Trial], reference: Path
) -> tuple[Trial, int]:
    """(the choice, how many points were tried): what `flows.optimize` does, without Prefect and MLflow."""
    bench, analysis, settings = laboratory.bench, laboratory.analysis, laboratory.settings
    generations: list[list[Trial]] = []
    candidates = list(start)
    while candidates:
        able = [c for c in candidates if c.vetoed_because is None]
        generations.append([screen_trial(bench, files[c.id], reference, settings) for c in able])
        candidates = next_generation(generations, analysis, bench.spec)
    trials = after_screening([t for generation in generations for t in generation], bench.spec)
    trials = [evaluate_trial(bench, trial, reference, settings) for trial in trials]
    trials = after_evaluation(trials, bench.spec)
    if (contest := race_contest(trials, bench.spec)) is not None:
        trials = _updated(trials, run_stage(bench, "race", contest, settings)[0])
    contest = final_contest(best_go_on(trials, bench.spec), bench.spec)
    assert contest is not None, "nothing keeps the quality asked for"
    finalists, _ = run_stage(bench, "final", contest, settings)
    return quickest(laboratory, finalists), sum(map(len, generations))


def _updated(trials: Sequence[Trial], run: Sequence[Trial]) -> list[Trial]:
    now = {trial.id: trial for trial in run}
    return [now.get(trial.id, trial) for trial in trials]


def run_grid_arm(laboratory: Laboratory, files: dict[str, Trial], reference: Path) -> Trial:
    """Every point, one after the other, each with all the evidence a finalist gets alone."""
    bench, settings = laboratory.bench, laboratory.settings
    done = []
    for number, trial in enumerate(files.values(), start=1):
        seen = evaluate_trial(bench, screen_trial(bench, trial, reference, settings), reference, settings)
        if seen.status == "ok":
            seen = run_stage(bench, "final", _alone(laboratory, [seen]), settings)[0][0]
        tell(f"  {number}/{len(files)} {seen.id}: {seen.status}")
        done.append(seen)
    return quickest(laboratory, done)


def _alone(laboratory: Laboratory, trials: Sequence[Trial], heats: int | None = None) -> Contest:
    heats = heats or laboratory.bench.spec.rounds
    budget_s = laboratory.bench.spec.timing_budget_s
    return Contest(trials, Rules(figure_of("e2e_ms"), "e2e_ms", heats, heats, budget_s))


def quickest(laboratory: Laboratory, trials: Sequence[Trial]) -> Trial:
    """The least median e2e of those that keep the quality."""
    least = laboratory.bench.spec.min_quality
    able = [t for t in trials if t.metrics and t.quality is not None and t.quality.ratio >= least]
    return min(able, key=lambda trial: trial.metrics["e2e_ms"].median)


def duel(laboratory: Laboratory, raced: Trial, best: Trial) -> Comparison:
    """The race's choice against the grid's best, interleaved: 30 paired rounds."""
    (ours, theirs), _ = run_stage(
        laboratory.bench, "final", _alone(laboratory, [raced, best], heats=30), laboratory.settings
    )
    return compare(raced.id, best.id, "e2e_ms", _e2e_ms(ours), _e2e_ms(theirs))


def _e2e_ms(trial: Trial) -> list[float]:
    assert trial.measurements is not None, f"{trial.id}: {trial.reason}"
    return [figure_of("e2e_ms")(turn) for turn in trial.measurements.counted]


def report(
    raced: Trial, best: Trial, loss: Comparison | None, race_s: float, grid_s: float, tried: int,
    points: Sequence[Candidate], path: Path,
) -> None:  # fmt: skip
    share = race_s / grid_s
    lost = 0.0 if loss is None else loss.change
    interval = "the same candidate" if loss is None else f"{loss.interval[0]:+.2%} to {loss.interval[1]:+.2%}"
    sys.stdout.write(
        "| | race | grid |\n|---|---:|---:|\n"
        f"| choice | {raced.id} | {best.id} |\n"
        f"| candidates tried | {tried} | {len(points)} |\n"
        f"| seconds, exports not counted | {race_s:.0f} | {grid_s:.0f} |\n\n"
        f"The race took {share:.0%} of the grid's time ({PROMISED_SHARE:.0%} promised); its choice is "
        f"{lost:+.2%} from the grid's best ({interval}; {PROMISED_LOSS:.0%} promised).\n"
    )
    sides = ((raced, race_s, tried), (best, grid_s, len(points)))
    race, full = (
        {"choice": t.id, "seconds": seconds, "tried": count, "e2e_ms": t.metrics["e2e_ms"].model_dump()}
        for t, seconds, count in sides
    )
    compared = loss.model_dump() if loss else None
    save(
        path, {"race": race, "grid": full, "share": share, "loss": compared, "points": [p.id for p in points]}
    )


if __name__ == "__main__":
    main()
