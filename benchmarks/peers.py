"""Our champion against other people's runtimes: same checkpoint, prompts, threads and greedy tokens.

``python -m benchmarks.peers MODEL``: each contestant is a process of its own, driven as its documentation
shows, and stays open; exactly one runs at a time, round by round, in a balanced order, and a round that
other processes disturbed is run again (see docs/measurement.md). Memory is read before, in a process that
runs alone. Quality is that of a candidate of ours on the same weights, on both paths, since few of these
interfaces give logits; the last column counts how many greedy tokens are those of torch in fp32. Who is not
installed or fails is a row with its reason.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from rich.console import Console

from benchmarks import peer_child
from benchmarks.laboratory import Laboratory, open_laboratory, save
from benchmarks.peer_child import FirstAnswer, PeerJob
from benchmarks.peer_table import Row, judge_targets, make_report, peers_table, shared_prefix, targets_table
from benchmarks.plots import peers_plot
from benchmarks.runtimes import PREPARATIONS, Source
from open_autoglm import engines
from open_autoglm.engines.contract import NO_DRAFTS, draft_tokens_of, threads_of
from open_autoglm.errors import StudyError
from open_autoglm.files import digest_of, directory_atomic, write_atomic
from open_autoglm.measure.isolation import Answer, Child, Failure
from open_autoglm.measure.jobs import Nothing, RoundJob
from open_autoglm.measure.lease import device_lease
from open_autoglm.measure.racing import Outcome, Rules, run_race
from open_autoglm.measure.scenarios import figure_of, warm_up
from open_autoglm.planning import plan
from open_autoglm.pruning.levels import with_pruning
from open_autoglm.schemas import Candidate, Knob, Model, QualityReport, Round, Trial
from open_autoglm.study import RESULT, load_study
from open_autoglm.trials import (
    Conversation,
    Stopped,
    begin_trial,
    child_environment,
    cores_for,
    export_trial,
    exported_of,
    score_job,
)

RESULTS = Path(__file__).parent / "results"
PROMPT_TOKENS, OUTPUT_TOKENS, HEATS = 512, 64, 24
REFERENCE_ROW = "transformers-fp32"


class Peer(NamedTuple):
    """A runtime of others, and which candidate of ours has the weights it loads."""

    name: str
    label: str
    runtime: str
    package: str
    engine: str
    precision: str
    knobs: Mapping[str, Knob] = MappingProxyType({})
    same_weights: bool = True


_WEIGHT_ONLY = MappingProxyType({"scheme": "weight_only"})

PEERS = (
    Peer(REFERENCE_ROW, "transformers generate, fp32", "transformers", "transformers", "torch", "fp32"),
    Peer("transformers-bf16-compile", "transformers generate, bf16, static cache, compiled",
         "transformers-compiled", "transformers", "torch", "bf16"),
    Peer("llama-cpp-python-q8_0", "llama-cpp-python, Q8_0", "llamacpp",
         "llama-cpp-python", "llamacpp", "int8"),
    Peer("openvino-genai-int8", "OpenVINO GenAI LLMPipeline, int8, on our graph", "openvino-genai",
         "openvino-genai", "openvino", "int8"),
    Peer("onnxruntime-genai-int8", "onnxruntime-genai, its builder's int8", "onnxruntime-genai",
         "onnxruntime-genai", "onnxruntime", "int8", _WEIGHT_ONLY),
    Peer("olive-int8", "Olive optimize, int8, run by onnxruntime-genai", "olive",
         "olive-ai", "onnxruntime", "int8", _WEIGHT_ONLY, same_weights=False),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.peers", description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--study", type=Path, help="whose champion runs; default: the model's newest")
    parser.add_argument("--candidates", help="comma-separated ids instead of a study; the first is compared")
    parser.add_argument("--heats", type=int, default=HEATS)
    parser.add_argument("--windows", type=int, help="of each text, at most, to judge quality by")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=RESULTS / "peers.json")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="autoglm-peers-") as folder:
        laboratory = open_laboratory(
            asked.model,
            Path(folder) / "study",
            prompt_tokens=PROMPT_TOKENS,
            output_tokens=OUTPUT_TOKENS,
            seed=asked.seed,
        )
        ours = our_candidates(laboratory, asked.study, asked.candidates)
        contestants = gather(laboratory, ours)
        contestants = judge(laboratory, contestants, asked.windows)
        rows, outcome = measure(laboratory, contestants, asked.heats)
    report(laboratory, rows, outcome, ours[0].id, asked.json)


def report(laboratory: Laboratory, rows: Sequence[Row], outcome: Outcome, champion: str, path: Path) -> None:
    bench = laboratory.bench
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 150)
    console.print(peers_table(rows, champion))
    console.print(targets_table(judge_targets(rows, champion, bench.spec.min_quality)))
    about = {
        "checkpoint": bench.checkpoint.model_dump(mode="json", include={"name", "digest"}),
        "workload": bench.workload.model_dump(mode="json", exclude={"path"}),
        "hardware": bench.hardware.model_dump(mode="json"),
        "heats": outcome.race.stopped_because,
    }
    made = make_report(rows, champion, bench.spec.min_quality, outcome.race.heats, about)
    save(path, made.model_dump(mode="json"))
    for form in ("png", "svg"):
        write_atomic(path.with_suffix(f".{form}"), peers_plot(rows, champion, form))


# ── who takes part ───────────────────────────────────────────────────────────────────────────────


class Contestant(NamedTuple):
    """A row in the making; with a job it can run."""

    row: Row
    job: PeerJob | None = None
    trial: Trial | None = None
    """Our candidate with the same weights, exported."""


def our_candidates(laboratory: Laboratory, study: Path | None, ids: str | None) -> list[Candidate]:
    """Those named, or the champion of a study: the one named, or the newest of this checkpoint.

    A champion that drafts runs without drafts as well, since none of the others drafts here.
    """
    if ids is None:
        champion = _champion_of(laboratory, study)
        return [champion] if draft_tokens_of(champion) == 0 else [champion, _without_drafts(champion)]
    proposed = {candidate.id: candidate for candidate in laboratory.candidates()}
    if missing := [name for name in ids.split(",") if name not in proposed]:
        raise SystemExit(f"no candidate {', '.join(missing)}: there are {', '.join(proposed)}")
    return [proposed[name] for name in ids.split(",")]


def _without_drafts(candidate: Candidate) -> Candidate:
    plain = engines.get(candidate.engine).variant(candidate, NO_DRAFTS)
    return with_pruning(plain, candidate.transform)


def _champion_of(laboratory: Laboratory, root: Path | None) -> Candidate:
    finished = laboratory.settings.studies.glob(f"*/{RESULT}")
    newest_first = sorted(finished, key=lambda path: path.stat().st_mtime, reverse=True)
    for path in [root] if root else newest_first:
        try:
            study = load_study(path)
        except StudyError:
            if root:
                raise
            continue  # of another version
        if study.champion and study.checkpoint.digest == laboratory.bench.checkpoint.digest:
            return next(trial.candidate for trial in study.trials if trial.id == study.champion)
    raise SystemExit("no finished study of this checkpoint has a champion: name --study or --candidates")


def gather(laboratory: Laboratory, ours: Sequence[Candidate]) -> list[Contestant]:
    """Everybody with files to run on, or with the reason why not."""
    proposed = plan(laboratory.analysis, laboratory.bench.spec, "cpu")
    found = [_ours(laboratory, candidate) for candidate in ours]
    for peer in PEERS:
        found.append(_theirs(laboratory, peer, proposed))
        tell(f"{peer.name}: {found[-1].row.reason or 'ready'}")
    return found


def _ours(laboratory: Laboratory, candidate: Candidate) -> Contestant:
    trial = laboratory.exported(candidate)
    row = Row(name=candidate.id, label=f"Open-AutoGLM: {candidate.id}", ours=True, judged_as=candidate.id)
    return Contestant(row, _job(laboratory, "contract", trial), trial)


def _theirs(laboratory: Laboratory, peer: Peer, proposed: Sequence[Candidate]) -> Contestant:
    row = Row(name=peer.name, label=peer.label)
    try:
        version(peer.package)
    except PackageNotFoundError:
        reason = f"not installed: pip install {peer.package}"
        return Contestant(row.model_copy(update={"reason": reason}))
    candidate = next(c for c in proposed if _has_weights_of(peer, c))
    trial = begin_trial(laboratory.bench.study, candidate)
    trial = export_trial(laboratory.bench.study, laboratory.bench.checkpoint, trial, laboratory.settings)
    if trial.status != "ok":
        return Contestant(row.model_copy(update={"reason": trial.reason}))
    job = _prepared(laboratory, _job(laboratory, peer.runtime, trial))
    if isinstance(job, Failure):
        return Contestant(row.model_copy(update={"reason": f"{job.status}: {job.reason}"}))
    if not peer.same_weights:
        return Contestant(row, job)
    return Contestant(row.model_copy(update={"judged_as": candidate.id}), job, trial)


def _has_weights_of(peer: Peer, candidate: Candidate) -> bool:
    same_kind = (candidate.engine, candidate.precision) == (peer.engine, peer.precision)
    return same_kind and candidate.transform is None and peer.knobs.items() <= candidate.knobs.items()


def _job(laboratory: Laboratory, runtime: str, trial: Trial) -> PeerJob:
    bench, exported = laboratory.bench, exported_of(trial)
    source = Source(
        checkpoint=bench.checkpoint,
        candidate=trial.candidate,
        exported=exported,
        options=bench.options(),
        prepared=exported.path,
    )
    return PeerJob(runtime=runtime, source=source, workload=bench.workload)


def _prepared(laboratory: Laboratory, job: PeerJob) -> PeerJob | Failure:
    """The job with the files its runtime wants, from an earlier run or written now in a child."""
    if job.runtime not in PREPARATIONS:
        return job
    libraries = {peer.package: version(peer.package) for peer in PEERS if peer.runtime == job.runtime}
    key = digest_of([job.runtime, job.source.checkpoint.digest, job.source.exported.digest, libraries])
    directory = laboratory.settings.home / "peers" / key[:32]
    try:
        if not directory.exists():
            with directory_atomic(directory) as output:
                _ask_alone(laboratory, job, output)
    except Stopped as stopped:
        return stopped.failure
    return _at(job, directory)


def _ask_alone(laboratory: Laboratory, job: PeerJob, output: Path) -> None:
    """Let a child write into ``output``. Raises Stopped, so that nothing half-written stays."""
    log = laboratory.bench.study.log_path(f"{job.runtime}-prepare")
    with PeerTalk(laboratory, _at(job, output), log) as talk:
        talk.ask("prepare", _at(job, output), Nothing)


def _at(job: PeerJob, directory: Path) -> PeerJob:
    return job.model_copy(update={"source": job.source.model_copy(update={"prepared": directory})})


# ── quality ──────────────────────────────────────────────────────────────────────────────────────


def judge(laboratory: Laboratory, contestants: Sequence[Contestant], windows: int | None) -> list[Contestant]:
    """Quality of the weights, once for all contestants that have the same."""
    reference = laboratory.reference()
    known: dict[str, QualityReport | Failure] = {}
    judged = []
    for contestant in contestants:
        row, trial = contestant.row, contestant.trial
        if trial is not None and trial.id not in known:
            known[trial.id] = _score(laboratory, trial, reference, windows)
        report = known[trial.id] if trial else None
        if isinstance(report, QualityReport):
            tell(f"{row.name}: keeps {report.ratio:.2%} of the quality")
            row = row.model_copy(update={"quality": report})
        judged.append(contestant._replace(row=row))
    return judged


def _score(
    laboratory: Laboratory, trial: Trial, reference: Path, windows: int | None
) -> QualityReport | Failure:
    bench = laboratory.bench
    try:
        with (
            Conversation(
                bench, trial, bench.study.log_path(f"{trial.id}-quality"), laboratory.settings
            ) as talk,
            device_lease("cpu", alone=True),
        ):
            return talk.ask("score_session", score_job(bench, reference, windows), QualityReport)
    except Stopped as stopped:
        tell(f"{trial.id}: not judged: {stopped.failure.reason}")
        return stopped.failure


# ── rounds ───────────────────────────────────────────────────────────────────────────────────────


class PeerTalk:
    """A child of one contestant. Raises Stopped where it gives no answer."""

    def __init__(self, laboratory: Laboratory, job: PeerJob, log: Path) -> None:
        self._timeout_s = laboratory.settings.trial_timeout_s
        threads = threads_of(job.source.candidate, job.source.options)
        self._child = Child(
            log, environment=child_environment(laboratory.settings, threads), cpus=cores_for(threads)
        )

    def ask(self, name: str, payload: Model, answer_type: type[Answer]) -> Answer:
        answer = self._child.ask(f"{peer_child.PREFIX}:{name}", payload, answer_type, self._timeout_s)
        if isinstance(answer, Failure):
            raise Stopped(answer)
        return answer

    def round(self, index: int, *, warming: bool = False) -> Round:
        with device_lease("cpu", alone=True):
            return self.ask("timed_round", RoundJob(index=index, warming=warming), Round)

    def __enter__(self) -> PeerTalk:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.close()


class PeerResidents:
    """Open children of all contestants. Calling it runs one round: `racing.Runner`."""

    def __init__(self, laboratory: Laboratory) -> None:
        self._laboratory = laboratory
        self._stack = ExitStack()
        self._talks: dict[str, PeerTalk] = {}

    def open(self, contestant: Contestant) -> Row:
        """Look at its memory in a process that ends, then open one that stays, and warm it up."""
        assert contestant.job is not None, "without files there is nothing to open"
        row = contestant.row
        try:
            first = self._look(row.name, contestant.job)
            talk = self._stack.enter_context(self._open(row.name, contestant.job))
            talk.ask("first_answer", Nothing(), FirstAnswer)
            warmups, steady = warm_up(lambda turn: talk.round(turn, warming=True))
        except Stopped as stopped:
            return row.model_copy(update={"reason": f"{stopped.failure.status}: {stopped.failure.reason}"})
        self._talks[row.name] = talk
        return row.model_copy(update={"first": first, "warmups": tuple(warmups), "steady": steady})

    def _look(self, name: str, job: PeerJob) -> FirstAnswer:
        with self._open(name, job) as talk, device_lease("cpu", alone=True):
            return talk.ask("first_answer", Nothing(), FirstAnswer)

    def _open(self, name: str, job: PeerJob) -> PeerTalk:
        talk = PeerTalk(self._laboratory, job, self._laboratory.bench.study.log_path(name))
        with device_lease("cpu", alone=False):
            talk.ask("open_peer", job, Nothing)
        return talk

    def __call__(self, contestant: str, index: int) -> Round | Failure:
        try:
            return self._talks[contestant].round(index)
        except Stopped as stopped:
            return stopped.failure

    def __enter__(self) -> PeerResidents:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def measure(
    laboratory: Laboratory, contestants: Sequence[Contestant], heats: int
) -> tuple[list[Row], Outcome]:
    """Everybody's rounds, side by side; rows in the order of ``contestants``."""
    with PeerResidents(laboratory) as residents:
        rows = []
        for contestant in contestants:
            rows.append(residents.open(contestant) if contestant.job else contestant.row)
            tell(f"{rows[-1].name}: {rows[-1].reason or 'open and warm'}")
        able = [row.name for row in rows if not row.reason]
        rules = Rules(
            figure_of("e2e_ms"),
            "e2e_ms",
            heats,
            heats,
            math.inf,
            on_heat=lambda heat: tell(f"heat {heat.heat + 1}"),
        )
        outcome = run_race("final", able, residents, rules)
    return [_with_rounds(row, outcome, rows) for row in rows], outcome


def _with_rounds(row: Row, outcome: Outcome, rows: Sequence[Row]) -> Row:
    """The row with what it ran, or with why it stopped, and its tokens held against fp32 torch's."""
    if (failure := outcome.failures.get(row.name)) is not None:
        return row.model_copy(update={"reason": f"{failure.status}: {failure.reason}"})
    exact = next((other.first for other in rows if other.name == REFERENCE_ROW), None)
    same = shared_prefix(row.first.tokens, exact.tokens) if row.first and exact else None
    return row.model_copy(update={"rounds": outcome.rounds.get(row.name, ()), "same_greedy_tokens": same})


def tell(line: str) -> None:
    sys.stderr.write(line + "\n")


if __name__ == "__main__":
    main()
