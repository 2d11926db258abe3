"""Does the race find what the exhaustive grid finds, and in what share of its time?

``python -m benchmarks.race_vs_grid MODEL``: the search and race of a study, stage by stage, and then every
point of the engines' grid, each in a process of its own that is judged, warmed up, and timed for as many
rounds as the race's finalists were. As in a study, points that compute the same bits on a slice of the texts
are judged in full but once. The two winners meet in a last interleaved final. Exports and the reference are
made beforehand and count for neither. The promise: the race's choice is within 2 % of the grid's best, in at
most 25 % of the grid's time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.laboratory import Laboratory, open_laboratory, save
from open_autoglm.bracket import after_screening, best_go_on, final_contest, race_contest
from open_autoglm.conclusion import Standings
from open_autoglm.heats import Contest, run_stage
from open_autoglm.measure.comparison import compare
from open_autoglm.measure.jobs import RoundJob
from open_autoglm.measure.lease import device_lease
from open_autoglm.measure.racing import Rules
from open_autoglm.measure.scenarios import figure_of, warm_up
from open_autoglm.measure.statistics import summarise
from open_autoglm.schemas import Candidate, Comparison, Metric, QualityReport, Round, Trial
from open_autoglm.search import grid, next_generation
from open_autoglm.settings import Settings
from open_autoglm.trials import SLICE_WINDOWS, Conversation, evaluate_trial, score_job, screen_trial

RESULT = Path(__file__).parent / "results" / "race_vs_grid.json"
PROMISED_LOSS, PROMISED_SHARE = 0.02, 0.25
E2E_MS = figure_of("e2e_ms")
DUEL_HEATS = 30


class Raced(NamedTuple):
    """What the race arm came to."""

    choice: Trial
    tried: tuple[str, ...]
    rounds: int
    """Of each finalist."""
    seconds: float


class Point(NamedTuple):
    """One point of the grid, fully judged and timed."""

    trial: Trial
    quality: QualityReport
    e2e_ms: Metric
    seconds: float


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
        fresh = Settings(home=Path(folder) / "home")  # within the race a result is reused, as in any study
        raced = run_race_arm(laboratory, start, files, reference, fresh)
        tried = f"{len(raced.tried)} points tried, {raced.rounds} heats in the final"
        tell(f"race: {raced.choice.id} after {raced.seconds:.0f} s, {tried}")
        gridded = run_grid_arm(laboratory, list(files.values()), reference, raced.rounds)
        best = quickest(gridded, laboratory.bench.spec.min_quality)
        tell(f"grid: {best.trial.id} after {sum(p.seconds for p in gridded):.0f} s")
        same = raced.choice.id == best.trial.id
        loss = None if same else duel(laboratory, files[raced.choice.id], best.trial, raced.choice)
    report(raced, gridded, best, loss, asked.json)


def tell(line: str) -> None:
    sys.stderr.write(line + "\n")


def run_race_arm(
    laboratory: Laboratory,
    start: Sequence[Candidate],
    files: dict[str, Trial],
    reference: Path,
    settings: Settings,
) -> Raced:
    """What `flows.optimize` does, without Prefect and MLflow."""
    bench, analysis, began = laboratory.bench, laboratory.analysis, time.monotonic()
    generations: list[list[Trial]] = []
    candidates = list(start)
    while candidates:
        able = [c for c in candidates if c.vetoed_because is None]
        generations.append([screen_trial(bench, files[c.id], reference, settings) for c in able])
        candidates = next_generation(generations, analysis, bench.spec)
    screened = [trial for generation in generations for trial in generation]
    wave = after_screening(screened, bench.spec)
    standings = Standings(trials=tuple(wave))
    while wave:
        judged = [evaluate_trial(bench, trial, reference, settings) for trial in wave]
        standings, wave = standings.refilled(judged, bench.spec)
    if (contest := race_contest(standings.trials, bench.spec)) is not None:
        run, race = run_stage(bench, "race", contest, settings)
        standings = standings.after(race, run)
    contest = final_contest(best_go_on(standings.trials, bench.spec), bench.spec)
    assert contest is not None, "nothing keeps the quality asked for"
    finalists, final = run_stage(bench, "final", contest, settings)
    choice = min((t for t in finalists if t.metrics), key=lambda trial: trial.metrics["e2e_ms"].median)
    return Raced(choice, tuple(t.id for t in screened), len(final.heats), time.monotonic() - began)


def run_grid_arm(
    laboratory: Laboratory, trials: Sequence[Trial], reference: Path, rounds: int
) -> list[Point]:
    """Every point, one after the other, each with all the evidence a finalist gets."""
    done: list[Point] = []
    judge = Judge(laboratory, reference)
    for number, trial in enumerate(trials, start=1):
        done.append(_point(laboratory, trial, judge, rounds))
        told = f"{done[-1].e2e_ms.median:.0f} ms, quality {done[-1].quality.ratio:.1%}"
        tell(f"  {number}/{len(trials)} {trial.id}: {told}, {done[-1].seconds:.0f} s")
    return done


class Judge:
    """Quality in full, once for all that compute the same bits."""

    def __init__(self, laboratory: Laboratory, reference: Path) -> None:
        self._bench, self._reference = laboratory.bench, reference
        self._known: dict[object, QualityReport] = {}

    def __call__(self, talk: Conversation, trial: Trial) -> QualityReport:
        assert trial.exported is not None
        slice_ = talk.ask(
            "score_session", score_job(self._bench, self._reference, SLICE_WINDOWS), QualityReport
        )
        paths = slice_.prefill, slice_.decode
        outputs = trial.exported.digest, *((path.perplexity, path.kl_divergence) for path in paths)
        if outputs not in self._known:
            full = score_job(self._bench, self._reference)
            self._known[outputs] = talk.ask("score_session", full, QualityReport)
        return self._known[outputs]


def _point(laboratory: Laboratory, trial: Trial, judge: Judge, rounds: int) -> Point:
    bench, began = laboratory.bench, time.monotonic()
    log = bench.study.log_path(f"grid-{trial.id}")
    with Conversation(bench, trial, log, laboratory.settings) as talk:
        talk.first_request()
        with device_lease("cpu", alone=True):
            quality = judge(talk, trial)
            warm_up(lambda turn: talk.ask("timed_round", RoundJob(index=turn, warming=True), Round))
            taken = [talk.ask("timed_round", RoundJob(index=index), Round) for index in range(rounds)]
    e2e_ms = summarise([E2E_MS(turn) for turn in taken], "ms")
    return Point(trial, quality, e2e_ms, time.monotonic() - began)


def quickest(points: Sequence[Point], least_quality: float) -> Point:
    """The least median e2e of those that keep the quality."""
    able = [point for point in points if point.quality.ratio >= least_quality]
    return min(able, key=lambda point: point.e2e_ms.median)


def duel(laboratory: Laboratory, raced: Trial, best: Trial, screened: Trial) -> Comparison:
    """The race's choice against the grid's best, interleaved."""
    looked_at = {"screening": screened.screening, "quality": screened.quality}
    pair = [trial.model_copy(update=looked_at) for trial in (raced, best)]
    rules = Rules(E2E_MS, "e2e_ms", DUEL_HEATS, DUEL_HEATS, laboratory.bench.spec.timing_budget_s)
    (ours, theirs), _ = run_stage(laboratory.bench, "final", Contest(pair, rules), laboratory.settings)
    return compare(raced.id, best.id, "e2e_ms", _e2e_ms(ours), _e2e_ms(theirs))


def _e2e_ms(trial: Trial) -> list[float]:
    assert trial.measurements is not None, f"{trial.id}: {trial.reason}"
    return [E2E_MS(turn) for turn in trial.measurements.counted]


def report(raced: Raced, points: Sequence[Point], best: Point, loss: Comparison | None, path: Path) -> None:
    grid_s = sum(point.seconds for point in points)
    share = raced.seconds / grid_s
    lost = 0.0 if loss is None else loss.change
    interval = "the same candidate" if loss is None else f"{loss.interval[0]:+.2%} to {loss.interval[1]:+.2%}"
    ours = raced.choice.metrics["e2e_ms"]
    sys.stdout.write(
        "| | race | grid |\n|---|---:|---:|\n"
        f"| choice | {raced.choice.id} | {best.trial.id} |\n"
        f"| its e2e, median and 95 % interval | {_words(ours)} | {_words(best.e2e_ms)} |\n"
        f"| candidates tried | {len(raced.tried)} | {len(points)} |\n"
        f"| seconds, exports not counted | {raced.seconds:.0f} | {grid_s:.0f} |\n\n"
        f"The race took {share:.0%} of the grid's time ({PROMISED_SHARE:.0%} promised); its "
        f"choice is {lost:+.2%} from the grid's best ({interval}; {PROMISED_LOSS:.0%} promised).\n"
    )
    race = {"choice": raced.choice.id, "seconds": raced.seconds, "tried": raced.tried, "rounds": raced.rounds,
            "e2e_ms": ours.model_dump()}  # fmt: skip
    grid_points = [
        {"id": p.trial.id, "e2e_ms": p.e2e_ms.model_dump(), "quality": p.quality.ratio, "seconds": p.seconds}
        for p in points
    ]  # fmt: skip
    full = {"choice": best.trial.id, "seconds": grid_s, "points": grid_points}
    compared = loss.model_dump() if loss else None
    save(path, {"race": race, "grid": full, "share": share, "loss": compared})


def _words(metric: Metric) -> str:
    return f"{metric.median:.0f} ms ({metric.interval[0]:.0f} to {metric.interval[1]:.0f})"


if __name__ == "__main__":
    main()
