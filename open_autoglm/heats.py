"""The race and the final: resident children, one round at a time, interleaved.

A child per contestant stays open between its rounds, so that a heat is seconds long and drift of the host
hits all alike. Only one of them runs at any time, with the device held alone. Where memory does not hold all
of them, the one that ran longest ago is closed and opened again for its next round.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from open_autoglm.hardware import read_memory
from open_autoglm.measure import jobs
from open_autoglm.measure.isolation import Failure
from open_autoglm.measure.lease import device_lease
from open_autoglm.measure.racing import TWIN_SUFFIX, Rules, Stage, run_race
from open_autoglm.measure.scenarios import metrics_of, output_tokens_ratio, warm_up
from open_autoglm.measure.statistics import summarise
from open_autoglm.memo import Memo, key_of
from open_autoglm.schemas import Fall, Measurements, Metric, Model, Race, Round, Trial, TrialStatus
from open_autoglm.settings import Settings
from open_autoglm.study import save_trial
from open_autoglm.trials import Bench, Conversation, Stopped, fail_trial, inputs_of, reused

RESIDENT_SHARE = 0.8
"""Resident children may take this share of the memory that is available when the stage begins."""


class StageFailure(Model):
    """Why a contestant gave no figures."""

    status: TrialStatus
    reason: str


class StageResult(Model):
    """What a stage found out; kept for the next study that asks the same."""

    race: Race
    measurements: dict[str, Measurements]
    failures: dict[str, StageFailure]


class Contest(NamedTuple):
    """Who runs, and by which rules."""

    trials: Sequence[Trial]
    rules: Rules
    twin_of: str | None = None

    @property
    def contestants(self) -> list[str]:
        twin = [self.twin_of + TWIN_SUFFIX] if self.twin_of else []
        return [*(trial.id for trial in self.trials), *twin]


def run_stage(bench: Bench, stage: Stage, contest: Contest, settings: Settings) -> tuple[list[Trial], Race]:
    """Run one stage, or take its result if the same was run lately; trials with their figures, and the race.

    Not made for two threads at once: the children die with the thread that opens them.
    """
    memo, key = Memo(settings, stage), _key(bench, stage, contest)
    result = memo.get(key, StageResult)
    fresh = result is None
    if result is None:
        result = _run(bench, stage, contest, settings)
        if not result.failures:  # who failed is tried again
            memo.put(key, result)
    trials = [_with_result(bench, stage, trial, result) for trial in contest.trials]
    return (trials if fresh else [reused(trial, stage) for trial in trials]), result.race


def _key(bench: Bench, stage: Stage, contest: Contest) -> str:
    spec = bench.spec.model_dump(
        mode="json",
        include={"objective", "rounds", "target_width", "timing_budget_s", "max_latency", "max_tpot"},
    )
    inputs = [inputs_of(bench, trial) for trial in contest.trials]
    return key_of(stage, contest.contestants, sorted(contest.rules.leaders), inputs, spec)


def _run(bench: Bench, stage: Stage, contest: Contest, settings: Settings) -> StageResult:
    with Residents(bench, stage, contest, settings) as residents:
        residents.open_all(contest.contestants)  # before the budget's time begins
        outcome = run_race(stage, contest.contestants, residents, contest.rules)
        return StageResult(
            race=outcome.race,
            measurements={
                name: residents.measurements(name, rounds)
                for name, rounds in outcome.rounds.items()
                if name not in outcome.failures and rounds
            },
            failures={
                name: StageFailure(status=failure.status, reason=failure.reason)
                for name, failure in outcome.failures.items()
            },
        )


class _Room(NamedTuple):
    """Bytes in the host's memory and on the GPU."""

    host: int
    device: int


class _Resident(NamedTuple):
    """One open child."""

    talk: Conversation
    takes: _Room


class Residents:
    """Children of the contestants, opened when first needed. Calling it runs one round: `racing.Runner`."""

    def __init__(self, bench: Bench, stage: Stage, contest: Contest, settings: Settings) -> None:
        self._bench, self._stage, self._settings = bench, stage, settings
        self._trials = {trial.id: trial for trial in contest.trials}
        self._open: OrderedDict[str, _Resident] = OrderedDict()
        gpu = max((gpu.memory_bytes for gpu in bench.hardware.gpus), default=0)
        self._room = _Room(int(read_memory()[1] * RESIDENT_SHARE), int(gpu * RESIDENT_SHARE))
        self._warmups: dict[str, list[Round]] = {}
        self._steady: dict[str, bool] = {}
        self._facts: dict[str, dict[str, str]] = {}
        self._load_ms: dict[str, list[float]] = {}
        self._failures: dict[str, Failure] = {}

    def open_all(self, contestants: Sequence[str]) -> None:
        """Load and warm up everybody; who cannot be opened fails in its first round."""
        for contestant in contestants:
            try:
                self._resident(contestant)
            except Stopped as stopped:
                self._open.pop(contestant, None)
                self._failures[contestant] = stopped.failure

    def __call__(self, contestant: str, index: int) -> Round | Failure:
        if (failure := self._failures.get(contestant)) is not None:
            return failure
        try:
            talk = self._resident(contestant)
            return self._round(talk, contestant, jobs.RoundJob(index=index))
        except Stopped as stopped:
            self._open.pop(contestant, None)  # it holds no memory any more
            return stopped.failure

    def _round(self, talk: Conversation, contestant: str, job: jobs.RoundJob) -> Round:
        with device_lease(self._trial(contestant).candidate.device, alone=True):
            return talk.ask("timed_round", job, Round)

    def _trial(self, contestant: str) -> Trial:
        return self._trials[contestant.removesuffix(TWIN_SUFFIX)]

    def _resident(self, contestant: str) -> Conversation:
        if contestant in self._open:
            self._open.move_to_end(contestant)
            return self._open[contestant].talk
        screening = self._trial(contestant).screening
        assert screening is not None, "only screened candidates race"
        takes = _Room(screening.footprint.peak_rss_bytes, screening.footprint.device_bytes or 0)
        while self._open and not self._holds(takes):
            self._open.popitem(last=False)[1].talk.close()
        log = self._bench.study.log_path(f"{contestant}-{self._stage}")
        talk = Conversation(self._bench, self._trial(contestant), log, self._settings)
        self._open[contestant] = _Resident(talk, takes)
        self._warm(contestant, talk)
        return talk

    def _holds(self, takes: _Room) -> bool:
        """Whether there is room for one more child beside those that are open."""
        host, device = zip(*(child.takes for child in self._open.values()), strict=True)
        if takes.host + sum(host) > self._room.host:
            return False
        # A GPU that shares the host's memory tells no size of its own.
        return not self._room.device or takes.device + sum(device) <= self._room.device

    def _warm(self, contestant: str, talk: Conversation) -> None:
        """Compile, and run rounds until they are steady."""
        self._load_ms.setdefault(contestant, []).append(talk.load_ms)
        self._facts[contestant] = talk.first_request().facts
        mix = self._bench.spec.length_mix
        rounds, steady = warm_up(
            lambda turn: self._round(talk, contestant, jobs.RoundJob(index=turn, warming=True)),
            kinds=len(mix.shares) if mix else 1,
        )
        self._warmups.setdefault(contestant, []).extend(rounds)
        self._steady[contestant] = steady and self._steady.get(contestant, True)

    def measurements(self, contestant: str, rounds: Sequence[Round]) -> Measurements:
        """The figures of one contestant's rounds."""
        workload = self._bench.workload
        counted = [r for r in rounds if not r.repeated]
        metrics = {
            **metrics_of(workload, counted),
            "load_ms": summarise(self._load_ms[contestant], "ms"),
            **_memory(self._trial(contestant)),
        }
        return Measurements(
            metrics=metrics,
            rounds=tuple(rounds),
            warmups=tuple(self._warmups[contestant]),
            steady=self._steady[contestant],
            output_tokens_ratio=output_tokens_ratio(workload, counted),
            environment=self._facts[contestant],
        )

    def __enter__(self) -> Residents:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._open.values():
            child.talk.close()


def _memory(trial: Trial) -> dict[str, Metric]:
    """Of the screening: memory is not read where time is."""
    assert trial.screening is not None
    footprint = trial.screening.footprint
    peaks = {"peak_rss_bytes": footprint.peak_rss_bytes, "peak_device_bytes": footprint.device_bytes}
    return {name: summarise([peak], "bytes") for name, peak in peaks.items() if peak is not None}


def _with_result(bench: Bench, stage: Stage, trial: Trial, result: StageResult) -> Trial:
    """The trial with its figures of this stage, its failure, or its fall."""
    if (failure := result.failures.get(trial.id)) is not None:
        log = bench.study.log_path(f"{trial.id}-{stage}")
        return fail_trial(bench.study, trial, stage, Failure(failure.status, failure.reason), log)
    taken = result.measurements.get(trial.id)
    update: dict[str, object] = {"finalist": stage == "final"}
    if taken is not None:
        update |= {"measurements": taken, "metrics": taken.metrics, "reason": f"timed in the {stage}"}
    if (fall := result.race.fallen.get(trial.id)) is not None:
        update |= fallen(fall)
    return save_trial(bench.study, trial.model_copy(update=update))


def fallen(fall: Fall) -> dict[str, object]:
    """What changes in a trial that leaves the race."""
    return {"status": "stopped", "fall": fall, "reason": f"{fall.stage}: {fall.reason}"}
