"""Contestants of the GPU benchmark: exported, opened in a child each, and timed in turns.

As many stay open as the GPU holds; those run a heat each, every second one in reverse, so that drift hits all
alike. Who does not fit beside them is timed in a later wave, and its row says so.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pydantic import Field

from open_autoglm import engines
from open_autoglm.engines.contract import RAN_ELSEWHERE, ExportContext, SessionOptions
from open_autoglm.measure import jobs
from open_autoglm.measure.isolation import Answer, Child, Failure, run_isolated
from open_autoglm.measure.scenarios import LEAD_IN_TOKENS
from open_autoglm.schemas import Candidate, Checkpoint, ExportedModel, Footprint, Model, Round, Workload

WARMUPS = 2
"""Untimed rounds after the first request: graphs are recorded in the second and third call of a shape."""

GPU_SHARE = 0.85
"""Of the GPU's memory that open contestants may hold together."""

OPENING_SHARE = 0.5
"""Of the time left that one contestant may take to load, and again to compile: those that are open already
are timed even if another never gets ready."""


class Row(Model):
    """What became of one candidate on one model and batch."""

    model: str
    batch_size: int
    candidate: str
    engine: str
    stage: str = Field(description="how far it came: probe, veto, export, open, first request, timed, …")
    reason: str = Field("", description="why it came no further")
    wave: int = Field(0, description="contestants of one wave ran interleaved")
    export_s: float = 0.0
    load_ms: float = 0.0
    first_request_ms: float = Field(0.0, description="compilation included")
    footprint: Footprint | None = None
    facts: dict[str, str] = Field(default_factory=dict)
    rounds: tuple[Round, ...] = Field((), description="raw, in the order they were run")

    def stopped(self, stage: str, reason: str) -> Row:
        return self.model_copy(update={"stage": stage, "reason": reason})


class ExportJob(Model):
    """Payload of :func:`export_job`."""

    candidate: Candidate
    checkpoint: Checkpoint
    context: ExportContext


class ExportDone(Model):
    """Answer of :func:`export_job`."""

    route: str


def export_job(job: ExportJob) -> ExportDone:
    """Runs in the child."""
    engine = engines.get(job.candidate.engine)
    return ExportDone(route=engine.export(job.candidate, job.checkpoint, job.context))


class Course(Model):
    """What all contestants of one model have in common."""

    checkpoint: Checkpoint
    folder: Path
    threads: int
    gpu_bytes: int = Field(description="0 where there is no GPU, or it tells no size")
    heats: int


class OutOfTime(Exception):
    """The time set for this part of the benchmark is used up."""


Clock = Callable[[], float]
"""Seconds that are left; raises OutOfTime if there are none."""


def export(course: Course, candidate: Candidate, left_s: Clock) -> ExportedModel | Failure:
    """The candidate's files, made in a child of its own, or the checkpoint itself."""
    if engines.get(candidate.engine).recipe(candidate) is None:
        return _exported(candidate, course.checkpoint.path, "checkpoint as it is", 0.0)
    output = course.folder / f"export-{candidate.id}"
    output.mkdir()
    job = ExportJob(
        candidate=candidate,
        checkpoint=course.checkpoint,
        context=ExportContext(output=output, ledger=course.folder / "ledger.json"),
    )
    started = time.monotonic()
    log = course.folder / f"{candidate.id}-export.log"
    name = f"{__name__}:export_job"
    done = run_isolated(name, job, ExportDone, log=log, timeout_s=left_s(), environment=ENVIRONMENT)
    if isinstance(done, Failure):
        shutil.rmtree(output)  # what a failed export leaves behind can be as large as a whole one
        return done
    return _exported(candidate, output, done.route, time.monotonic() - started)


def _exported(candidate: Candidate, path: Path, route: str, build_s: float) -> ExportedModel:
    return ExportedModel(
        candidate_id=candidate.id, path=path, digest="", route=route, size_bytes=0, build_s=build_s
    )


ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


class Contestant:
    """A candidate in a child of its own, and its row."""

    def __init__(
        self,
        course: Course,
        candidate: Candidate,
        exported: ExportedModel,
        workload: Workload,
        left_s: Clock,
    ) -> None:
        self._course, self._candidate, self._exported, self._workload = course, candidate, exported, workload
        self._left_s = left_s
        self.row = Row(
            model=course.checkpoint.name,
            batch_size=workload.batch_size,
            candidate=candidate.id,
            engine=candidate.engine,
            stage="open",
            export_s=exported.build_s,
        )
        log = course.folder / f"{candidate.id}-b{workload.batch_size}.log"
        self._child = Child(log, environment=ENVIRONMENT)

    def open(self) -> None:
        """Load it, answer a first request, and warm up."""
        workload = self._workload
        options = SessionOptions(
            batch_size=workload.batch_size,
            max_tokens=workload.prompt_tokens + workload.output_tokens + LEAD_IN_TOKENS,
            threads=self._course.threads,
        )
        job = jobs.OpenJob(
            candidate=self._candidate, exported=self._exported, options=options, workload=workload
        )
        opened = self._ask("open_session", job, jobs.Opened, "open", OPENING_SHARE)
        first = self._ask("first_request", jobs.Nothing(), jobs.FirstRequest, "first request", OPENING_SHARE)
        if opened is None or first is None:
            return
        self._tell(
            stage="ready",
            load_ms=opened.load_ms,
            first_request_ms=first.first_request_ms,
            footprint=first.footprint,
            facts=first.facts,
        )
        if elsewhere := first.facts.get(RAN_ELSEWHERE):
            self._stop("ran elsewhere", elsewhere)
        for turn in range(WARMUPS):
            self._ask("timed_round", jobs.RoundJob(index=turn, warming=True), Round, "warm-up")

    @property
    def able(self) -> bool:
        return self.row.stage in ("ready", "timed")

    @property
    def device_bytes(self) -> int:
        return (self.row.footprint.device_bytes or 0) if self.row.footprint else 0

    def run(self, index: int) -> None:
        """One timed round."""
        if self.able and (turn := self._ask("timed_round", jobs.RoundJob(index=index), Round, "timing")):
            self._tell(stage="timed", rounds=(*self.row.rounds, turn))

    def close(self) -> None:
        self._child.close()

    def _ask(
        self, name: str, payload: Model, kind: type[Answer], stage: str, share: float = 1.0
    ) -> Answer | None:
        """The answer, or None where the row says why there is none; ``share`` of the time left is given."""
        if self.row.stage not in ("open", "ready", "timed"):
            return None
        answer = self._child.ask(f"{jobs.PREFIX}:{name}", payload, kind, share * self._left_s())
        if isinstance(answer, Failure):
            self._stop(stage, f"{answer.status}: {answer.reason}")
            return None
        return answer

    def _stop(self, stage: str, reason: str) -> None:
        self.row = self.row.stopped(stage, reason)
        self.close()

    def _tell(self, **facts: object) -> None:
        self.row = self.row.model_copy(update=facts)


Files = Sequence[tuple[Candidate, ExportedModel]]


def run_waves(course: Course, files: Files, workload: Workload, left_s: Clock) -> Iterator[Row]:
    """Rows of all candidates: opened until the next does not fit, timed in turns, closed; then the rest."""
    waiting, wave = list(files), 0
    while waiting:
        opened: list[Contestant] = []
        try:
            while waiting and _fits(course, opened):
                opened.append(Contestant(course, *waiting.pop(0), workload, left_s))
                opened[-1].open()
            for heat in range(course.heats):
                for contestant in opened if heat % 2 == 0 else reversed(opened):
                    contestant.run(heat)
        except OutOfTime as out:
            waiting, reason = [], str(out)
            yield from (_cut_short(contestant.row, reason, wave) for contestant in opened)
            raise
        finally:
            for contestant in opened:
                contestant.close()
        yield from (contestant.row.model_copy(update={"wave": wave}) for contestant in opened)
        wave += 1


def _fits(course: Course, opened: Sequence[Contestant]) -> bool:
    """Whether one more, as large as the largest so far, has room."""
    sizes = [contestant.device_bytes for contestant in opened if contestant.able]
    return not course.gpu_bytes or sum(sizes) + max(sizes, default=0) <= GPU_SHARE * course.gpu_bytes


def _cut_short(row: Row, reason: str, wave: int) -> Row:
    """A row with the rounds it has; one that has none says why."""
    able = row.stage in ("open", "ready")
    return (row.stopped("timed_out", reason) if able else row).model_copy(update={"wave": wave})


def usable_threads() -> int:
    return len(os.sched_getaffinity(0))
