"""The benchmark against other runtimes: ratios, targets, the table, the JSON, and a real runtime's rounds."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import tiny_models
from rich.console import Console

from benchmarks import peer_child
from benchmarks.peer_child import FirstAnswer, PeerJob
from benchmarks.peer_table import (
    HAND_TUNED,
    TARGETS,
    Report,
    Row,
    best_peer,
    judge_targets,
    make_report,
    peers_table,
    ratio,
    shared_prefix,
    targets_table,
    verdict,
)
from benchmarks.peers import PEERS
from benchmarks.plots import peers_plot
from benchmarks.runtimes import RUNTIMES, Source, Told
from open_autoglm.checkpoint import load_checkpoint
from open_autoglm.engines.contract import SessionOptions, Tokens
from open_autoglm.measure.jobs import Nothing, RoundJob
from open_autoglm.measure.scenarios import IncorrectOutput
from open_autoglm.measure.workload import make_workload
from open_autoglm.schemas import Candidate, Conditions, ExportedModel, Footprint, OptimizeSpec, Round

HEATS = 8


def make_row(name: str, ttft_ms: float, tpot_ms: float, megabytes: int, *, ours: bool = False) -> Row:
    """Rounds that a drift of the host makes slower and slower, for everybody alike, with a little noise."""
    noise = np.random.default_rng(sum(map(ord, name))).normal(1, 0.01, size=(HEATS, 2))
    rounds = [
        make_round(heat, ttft_ms * (1 + heat / 4) * a, tpot_ms * (1 + heat / 4) * b)
        for heat, (a, b) in enumerate(noise.tolist())
    ]
    memory = Footprint(
        peak_rss_bytes=megabytes * 10**6, peak_pss_bytes=megabytes * 10**6, mapped_file_bytes=0
    )
    first = FirstAnswer(footprint=memory, first_request_ms=1.0, tokens=(1, 2, 3), facts={"threads": "2"})
    return Row(name=name, label=name, ours=ours, first=first, rounds=tuple(rounds))


def make_round(index: int, ttft_ms: float, tpot_ms: float, *, repeated: bool = False) -> Round:
    e2e_ms = ttft_ms + 3 * tpot_ms
    return Round(
        index=index,
        ttft_ms=(ttft_ms,),
        tpot_ms=(tpot_ms,),
        e2e_ms=(e2e_ms,),
        token_ms=((tpot_ms,) * 3,),
        output_tokens=(4,),
        duration_ms=e2e_ms,
        conditions=Conditions(foreign_cores=0.5 if repeated else 0.0),
        repeated=repeated,
    )


@pytest.fixture
def rows() -> list[Row]:
    """Ours is at half the TTFT of the best, decodes 6 times as fast as torch, and is large."""
    return [
        make_row("ours", 100, 10, 300, ours=True),
        make_row(HAND_TUNED, 400, 60, 1000),
        make_row("lean", 200, 10.5, 200),
        Row(name="absent", label="absent", reason="not installed: pip install absent"),
    ]


# ── ratios ───────────────────────────────────────────────────────────────────────────────────────


def test_a_ratio_is_paired_so_that_drift_cancels(rows: list[Row]) -> None:
    """The host became three times slower meanwhile, and the interval is still narrow."""
    found = ratio(rows[0], rows[1], "ttft")
    assert found.interval is not None
    low, high = found.interval
    assert low < 0.25 < high
    assert high - low < 0.02
    assert found.pairs == HEATS


def test_a_ratio_of_speeds_is_that_of_the_times_turned_over(rows: list[Row]) -> None:
    found = ratio(rows[0], rows[1], "decode")
    assert found.value == pytest.approx(6, rel=0.03)
    assert found.interval is not None
    assert found.interval[0] < found.value < found.interval[1]


def test_a_repeated_round_counts_in_no_figure(rows: list[Row]) -> None:
    spoilt = make_round(0, 9999, 999, repeated=True)
    spoilt_row = rows[0].model_copy(update={"rounds": (spoilt, *rows[0].rounds)})
    assert ratio(spoilt_row, rows[1], "ttft") == ratio(rows[0], rows[1], "ttft")
    assert spoilt_row.ttft_ms == rows[0].ttft_ms


# ── targets ──────────────────────────────────────────────────────────────────────────────────────


def test_targets_are_held_against_the_right_rows(rows: list[Row]) -> None:
    results = judge_targets(rows, "ours", least_quality=0.99)
    found = {
        (r.target.column, r.target.against): (r.ratio.against if r.ratio else "", r.verdict) for r in results
    }
    assert found == {
        ("ttft", "hand-tuned torch"): (HAND_TUNED, "met"),  # 0.25 of 0.60
        ("decode", "hand-tuned torch"): (HAND_TUNED, "met"),  # 6 of 5
        ("memory", "hand-tuned torch"): (HAND_TUNED, "met"),  # 0.30 of 0.35
        ("ttft", "best peer"): ("lean", "met"),  # 0.5 of 0.9
        ("decode", "best peer"): ("lean", "missed"),  # 1.05 of 1.15
        ("memory", "best peer"): ("lean", "missed"),  # 1.5 of 1.3
    }


@pytest.mark.parametrize(
    ("column", "interval", "said"),
    [
        ("ttft", (0.40, 0.59), "met"),
        ("ttft", (0.55, 0.65), "cannot tell"),
        ("ttft", (0.61, 0.65), "missed"),
        ("decode", (5.1, 6.0), "met"),
        ("decode", (4.0, 6.0), "cannot tell"),
        ("decode", (4.0, 4.9), "missed"),
    ],
)
def test_a_verdict_needs_the_whole_interval(
    rows: list[Row], column: str, interval: tuple[float, float], said: str
) -> None:
    target = next(t for t in TARGETS if (t.column, t.against) == (column, "hand-tuned torch"))
    found = ratio(rows[0], rows[1], target.column).model_copy(update={"interval": interval})
    assert verdict(target, found) == said


def test_without_figures_nothing_is_met(rows: list[Row]) -> None:
    results = judge_targets([rows[0], rows[3]], "ours", least_quality=0.99)
    assert {r.verdict for r in results} == {"no figures"}


def test_the_best_of_each_column_is_a_peer_with_figures(rows: list[Row]) -> None:
    timed = [row for row in rows if row.counted]
    assert best_peer(timed, "memory", 0.99) == rows[2]
    assert best_peer([rows[0]], "ttft", 0.99) is None


def test_the_shared_prefix_ends_at_the_first_difference() -> None:
    assert shared_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert shared_prefix([1, 2], [1, 2]) == 2
    assert shared_prefix([5], [1]) == 0


# ── what is written ──────────────────────────────────────────────────────────────────────────────


def test_every_row_is_in_the_table_with_its_reason(rows: list[Row]) -> None:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(peers_table(rows, "ours"))
    console.print(targets_table(judge_targets(rows, "ours", 0.99)))
    text = console.export_text()
    for row in rows:
        assert row.label in text
    assert "not installed: pip install absent" in text
    assert "missed" in text
    assert f"{rows[1].ttft_ms.median:.0f}" in text


def test_the_report_keeps_the_raw_samples(rows: list[Row]) -> None:
    orders = (("ours", "lean"), ("lean", "ours"))
    made = make_report(rows, "ours", 0.99, orders, {"seed": 0})
    read = Report.model_validate_json(made.model_dump_json())
    assert read == made
    assert read.rows[1].rounds == rows[1].rounds
    assert {r.against for r in read.ratios} == {HAND_TUNED, "lean"}
    assert len(read.targets) == len(TARGETS)


@pytest.mark.parametrize(("form", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_the_plot_shows_who_has_figures(rows: list[Row], form: str, start: bytes) -> None:
    drawn = peers_plot(rows, "ours", form)
    assert drawn.startswith(start)
    assert drawn != peers_plot(rows[:2], "ours", form)


def test_every_peer_has_a_runtime_and_a_name_of_its_own() -> None:
    assert {peer.runtime for peer in PEERS} <= RUNTIMES.keys()
    assert len({peer.name for peer in PEERS}) == len(PEERS)
    assert HAND_TUNED in {peer.name for peer in PEERS}


# ── a real runtime ───────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> PeerJob:
    """A tiny GLM, for the runtimes that load the checkpoint itself."""
    folder = tmp_path_factory.mktemp("peer")
    checkpoint = load_checkpoint(str(tiny_models.build_checkpoint(folder / "glm")))
    spec = OptimizeSpec(model_path=str(checkpoint.path), prompt_tokens=24, output_tokens=6)
    candidate = _fp32_candidate()
    exported = ExportedModel(
        candidate_id=candidate.id, path=checkpoint.path, digest=checkpoint.digest, route="as it is",
        size_bytes=checkpoint.weight_bytes, build_s=0.0, reused=True,
    )  # fmt: skip
    source = Source(
        checkpoint=checkpoint,
        candidate=candidate,
        exported=exported,
        options=SessionOptions(batch_size=1, max_tokens=64, threads=1),
        prepared=folder,
    )
    workload = make_workload(checkpoint, spec, folder / "workload.npz")
    return PeerJob(runtime="contract", source=source, workload=workload)


def _fp32_candidate() -> Candidate:
    return Candidate(
        id="torch-fp32", engine="torch", device="cpu", precision="fp32", weight_bits=32,
        knobs={"compile": False, "threads": "all"}, proposed_because="a yardstick",
    )  # fmt: skip


def test_runtimes_of_others_and_ours_write_the_same_tokens(job: PeerJob) -> None:
    """Both in fp32 on the same weights; and each tells as many tokens as it writes."""
    prompt = np.arange(24, dtype=np.int64) % tiny_models.VOCAB_SIZE
    told: list[str] = []
    answers = [
        RUNTIMES[name](job.source).generate(prompt, 6, lambda name=name: told.append(name))
        for name in ("contract", "transformers")
    ]
    assert answers[0] == answers[1]
    assert told == ["contract"] * 6 + ["transformers"] * 6


def test_a_child_never_reads_the_same_prompt_twice(job: PeerJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runtimes that keep the KV cache of a prompt would answer the second time from memory."""
    asked: list[bytes] = []
    runtime = RUNTIMES["contract"](job.source)
    inner = runtime.generate

    def generate(prompt: Tokens, count: int, tell: Told) -> list[int]:
        asked.append(prompt.tobytes())
        return inner(prompt, count, tell)

    monkeypatch.setattr(peer_child, "_opened", None)
    peer_child.open_peer(job)
    opened = peer_child._the_peer()
    monkeypatch.setattr(opened.runtime, "generate", generate)
    first = peer_child.first_answer(Nothing())
    rounds = [
        peer_child.timed_round(RoundJob(index=index, warming=warming))
        for index, warming in ((0, True), (1, True), (0, False), (0, False), (1, False))
    ]
    assert len(set(asked)) == len(asked) == 1 + 2 * len(rounds)
    assert len(first.tokens) == 6
    assert all(len(taken.token_ms[0]) == 5 for taken in rounds)
    assert all(math.isclose(r.ttft_ms[0] + 5 * r.tpot_ms[0], r.e2e_ms[0]) for r in rounds)


def test_too_few_tokens_are_no_figure(job: PeerJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_child, "_opened", None)
    peer_child.open_peer(job)
    opened = peer_child._the_peer()
    inner = opened.runtime.generate
    monkeypatch.setattr(
        opened.runtime, "generate", lambda prompt, count, told: inner(prompt, count - 1, told)
    )
    with pytest.raises(IncorrectOutput, match="gave 5 tokens"):
        peer_child.timed_round(RoundJob(index=0))
