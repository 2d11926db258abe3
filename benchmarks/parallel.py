"""Are figures taken while another study is at work the figures taken alone?

``python -m benchmarks.parallel MODEL``: a second study (its own home, so it exports, loads, scores and times
everything anew) runs in another process; both share the device lease and nothing else. Each time this one
gets the device it runs a round, the other going on with whatever needs no device; then the other's processes
are stopped (SIGSTOP) and the same round runs again, alone. The two are a second apart, so drift of the host
cannot tell them apart. Reported is the paired change with its interval; promised is that it lies within 3 %.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, Self

import psutil

from benchmarks.laboratory import Laboratory, open_laboratory, save, unscreened
from open_autoglm.measure.comparison import compare
from open_autoglm.measure.jobs import RoundJob
from open_autoglm.measure.lease import device_lease
from open_autoglm.measure.racing import REPEATS_PER_HEAT
from open_autoglm.measure.scenarios import figure_of, warm_up
from open_autoglm.schemas import Comparison, Round
from open_autoglm.trials import Conversation

PROMISE = 0.03
METRICS = ("ttft_ms", "tpot_ms", "e2e_ms")
RESULT = Path(__file__).parent / "results" / "parallel.json"
STARTING_S = 8
"""Until another study has begun to work."""


class Pair(NamedTuple):
    """The same requests, twice, a second apart."""

    beside: Round
    alone: Round


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.parallel", description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--candidate", default="onnxruntime-w8-b32")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--json", type=Path, default=RESULT)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="autoglm-parallel-") as folder:
        laboratory = open_laboratory(asked.model, Path(folder) / "study", rounds=3)
        pairs = measure(laboratory, asked.candidate, asked.pairs, Path(folder))
    found = [_change(metric, pairs) for metric in METRICS]
    sys.stdout.write(_table(found, pairs))
    raw = [{side: _dump(taken) for side, taken in pair._asdict().items()} for pair in pairs]
    save(asked.json, {"candidate": asked.candidate, "changes": [c.model_dump() for c in found], "pairs": raw})


def measure(laboratory: Laboratory, candidate_id: str, count: int, folder: Path) -> list[Pair]:
    """So many pairs; another study is begun whenever one ends."""
    with _warm_child(laboratory, candidate_id) as talk:
        pairs: list[Pair] = []
        while len(pairs) < count:
            with OtherStudy(laboratory, folder / f"home-{len(pairs)}") as other:
                while len(pairs) < count and other.at_work:
                    pairs.append(_pair(talk, other, index=len(pairs)))
                    sys.stderr.write(f"\r{len(pairs)} of {count} pairs")
        sys.stderr.write("\n")
        return pairs


@contextmanager
def _warm_child(laboratory: Laboratory, candidate_id: str) -> Iterator[Conversation]:
    """The candidate in a process of its own, as in a final."""
    candidate = next(c for c in laboratory.candidates() if c.id == candidate_id)
    trial = laboratory.exported(candidate).model_copy(update={"screening": unscreened()})
    bench = laboratory.bench
    with Conversation(bench, trial, bench.study.log_path(trial.id), laboratory.settings) as talk:
        talk.first_request()
        warm_up(lambda turn: talk.ask("timed_round", RoundJob(index=turn, warming=True), Round))
        yield talk


def _pair(talk: Conversation, other: OtherStudy, index: int) -> Pair:
    """A disturbed round is run again, as in a final: each with a hold of its own on the device."""
    for attempts_left in reversed(range(REPEATS_PER_HEAT + 1)):
        with device_lease("cpu", alone=True):
            beside = _round(talk, index)
            if not (beside.conditions.disturbances and attempts_left):
                with other.stopped():
                    return Pair(beside, _round(talk, index))
    raise AssertionError("the last attempt counts, disturbed or not")


def _round(talk: Conversation, index: int) -> Round:
    return talk.ask("timed_round", RoundJob(index=index), Round)


class OtherStudy:
    """A whole study in processes of its own, from nothing, that can be stopped for a while."""

    def __init__(self, laboratory: Laboratory, home: Path) -> None:
        model = f"--model-path={laboratory.bench.checkpoint.path}"
        with home.with_suffix(".log").open("wb") as log:
            self._process = psutil.Popen(
                [sys.executable, "-m", "open_autoglm.cli", "optimize", model, f"--output={home}-study",
                 "--engines=onnxruntime"],
                env={**os.environ, "AUTOGLM_HOME": str(home)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )  # fmt: skip

    @property
    def at_work(self) -> bool:
        return self._process.poll() is None

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Parents before children, so that nobody starts another meanwhile."""
        held: list[psutil.Process] = []
        waiting: list[psutil.Process] = [self._process]
        while waiting:
            process = waiting.pop()
            with suppress(psutil.NoSuchProcess):
                process.suspend()
                held.append(process)
                waiting += process.children()
        try:
            yield
        finally:
            for process in held:
                with suppress(psutil.NoSuchProcess):
                    process.resume()

    def __enter__(self) -> Self:
        time.sleep(STARTING_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()


def _change(metric: str, pairs: list[Pair]) -> Comparison:
    figure = figure_of(metric)
    beside, alone = ([figure(taken) for taken in side] for side in zip(*pairs, strict=True))
    return compare("beside another study", "alone", metric, beside, alone)


def _table(found: list[Comparison], pairs: list[Pair]) -> str:
    lines = [
        "| metric | change beside another study | 95 % interval | pairs | promise kept |",
        "|---|---:|---:|---:|---|",
    ]
    for c in found:
        low, high = c.interval
        lines.append(f"| {c.metric} | {c.change:+.2%} | {low:+.2%} to {high:+.2%} | {c.pairs} | {_kept(c)} |")
    beside, alone = (sum(bool(r.conditions.disturbances) for r in side) for side in zip(*pairs, strict=True))
    lines.append(f"\nRounds that stayed disturbed: {alone} alone, {beside} beside.\n")
    return "\n".join(lines)


def _kept(change: Comparison) -> str:
    """Yes or no where the whole interval says so."""
    low, high = change.interval
    if max(-low, high) <= PROMISE:
        return "yes"
    return "no" if low > PROMISE or high < -PROMISE else "cannot tell"


def _dump(taken: Round) -> dict[str, object]:
    return taken.model_dump(mode="json", exclude={"token_ms"})


if __name__ == "__main__":
    main()
