"""The search: what it tries next, in what order, what it leaves alone, and what it says it learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from studies import demo_analysis

from open_autoglm.planning import plan
from open_autoglm.schemas import (
    Candidate,
    Conditions,
    Footprint,
    Knob,
    OptimizeSpec,
    PathQuality,
    QualityReport,
    Round,
    Screening,
    Trial,
)
from open_autoglm.search import (
    LEADERS,
    MOST_PER_GENERATION,
    combined,
    grid,
    lessons,
    neighbours,
    next_generation,
    rank_figure,
    why_out,
)
from open_autoglm.units import ByteSize

ANALYSIS = demo_analysis()
SPEC = OptimizeSpec(model_path="here", batch_size=2)  # for a batch there are no drafts to list
START = {candidate.id: candidate for candidate in plan(ANALYSIS, SPEC, "cpu")}
W8, W4 = START["onnxruntime-w8-b32"], START["onnxruntime-w4-b32"]
FP32, TORCH = START["onnxruntime-fp32"], START["torch-bf16"]

AROUND_W8 = ["w8-b16", "w8-b64", "w8-b128", "w8-b32-t1", "w8-b32-g-basic", "w8-b32-nospin", "w8-b32-noflash"]
AROUND_FP32 = ["fp32-t1", "fp32-g-basic", "fp32-nospin", "fp32-noflash"]


def turn(ttft_ms: float, tpot_ms: float, *, repeated: bool = False) -> Round:
    return Round(
        index=0,
        ttft_ms=(ttft_ms,),
        tpot_ms=(tpot_ms,),
        e2e_ms=(ttft_ms + 15 * tpot_ms,),
        token_ms=((tpot_ms,) * 15,),
        output_tokens=(16,),
        duration_ms=ttft_ms + 15 * tpot_ms,
        conditions=Conditions(foreign_cores=0),
        repeated=repeated,
    )


def quality(ratio: float, *, clear: bool = True, flips: float = 0.05) -> QualityReport:
    path = PathQuality(
        tokens=512,
        perplexity=25 / ratio,
        reference_perplexity=25,
        ratio=ratio,
        ratio_interval=(ratio - 0.002, ratio + 0.002),
        clear_of_limit=clear,
        kl_divergence=0.01,
        top1_agreement=1 - flips,
        clear_of_flips=clear,
        by_text={},
    )
    return QualityReport(
        prefill=path,
        decode=path,
        worse_path="prefill",
        ratio=ratio,
        greedy_same_tokens=(64,),
        greedy_tokens=64,
        finite=True,
        seconds=1,
    )


def screened(
    candidate: Candidate,
    e2e_ms: float = 1000,
    *,
    kept: QualityReport | None = None,
    peak_rss_bytes: int = 300 * 2**20,
    rounds: Sequence[Round] = (turn(100, 10),),
    **fields: Any,
) -> Trial:
    """A trial as the screening leaves it."""
    screening = Screening(
        footprint=Footprint(
            peak_rss_bytes=peak_rss_bytes, peak_pss_bytes=peak_rss_bytes, mapped_file_bytes=0
        ),
        load_ms=1,
        first_request_ms=1,
        prompt_tokens=128,
        output_tokens=16,
        rounds=tuple(rounds),
        estimated_e2e_ms=e2e_ms,
        facts={},
    )
    content = {"status": "ok", "reason": "screened", "screening": screening, "quality": kept or quality(1)}
    return Trial(id=candidate.id, engine=candidate.engine, candidate=candidate, **{**content, **fields})


def failed(candidate: Candidate) -> Trial:
    return screened(candidate, screening=None, quality=None, status="crashed", reason="screening: SIGSEGV")


def short(candidates: Sequence[Candidate]) -> list[str]:
    return [candidate.id.removeprefix("onnxruntime-") for candidate in candidates]


def by_name(names: Sequence[str]) -> list[Candidate]:
    """Points of the grid."""
    points = {point.id: point for point in grid(list(START.values()), ANALYSIS, SPEC)}
    return [points[f"onnxruntime-{name}"] for name in names]


# ── the space ────────────────────────────────────────────────────────────────────────────────────


def test_the_grid_is_the_full_product() -> None:
    """Four block sizes, two thread counts, two graph levels, spinning and flash attention or not; the start
    is part of it, once, and keeps its flags."""
    found = grid([W8, FP32, START["torch-fp32"]], ANALYSIS, SPEC)
    assert found[:3] == [W8, FP32, START["torch-fp32"]]
    assert len({candidate.id for candidate in found}) == len(found) == 64 + 16 + 1


def test_the_grid_spares_engines_that_cannot_run() -> None:
    """A vetoed start candidate is listed and has no neighbourhood."""
    vetoed = W8.vetoed("onnxruntime is not installed")
    assert grid([vetoed], ANALYSIS, SPEC) == [vetoed]


def test_neighbours_differ_in_one_knob() -> None:
    """Every other value of every knob, alone, unless it was tried."""
    found = neighbours(W8, {W8.id, "onnxruntime-w8-b64"}, ANALYSIS, SPEC)
    assert short(found) == [name for name in AROUND_W8 if name != "w8-b64"]
    for candidate in found:
        assert sum(candidate.knobs[knob] != value for knob, value in W8.knobs.items()) == 1


def test_a_neighbour_that_cannot_fit_is_vetoed_and_listed() -> None:
    """Smaller blocks have more scales: 10 bits do not fit where 9 do."""
    tight = OptimizeSpec(model_path="here", batch_size=2, max_memory="236MiB")
    found = {c.id: c.vetoed_because for c in neighbours(W8, {W8.id}, ANALYSIS, tight)}
    assert "cannot meet max_memory" in (found["onnxruntime-w8-b16"] or "")
    assert found["onnxruntime-w8-b64"] is None


def test_what_helped_alone_is_tried_together() -> None:
    """One candidate with both changes; nothing if it was tried, or if fewer than two knobs helped."""
    better: dict[str, Knob] = {"block_size": 64, "allow_spinning": False}
    joint = combined(W8, better, {W8.id}, ANALYSIS, SPEC)
    assert joint is not None
    assert joint.id == "onnxruntime-w8-b64-nospin"
    assert combined(W8, better, {joint.id}, ANALYSIS, SPEC) is None
    assert combined(W8, {"block_size": 64}, {W8.id}, ANALYSIS, SPEC) is None


# ── the policy ───────────────────────────────────────────────────────────────────────────────────


def refine(*generations: Sequence[Trial], **fields: Any) -> list[Candidate]:
    return next_generation(generations, ANALYSIS, SPEC.model_copy(update=fields))


def test_the_leaders_neighbours_come_first() -> None:
    """Of the start candidates the two fastest that keep the quality are looked around, the faster first."""
    start = [
        screened(W8, 600),
        screened(W4, 400, kept=quality(0.76)),
        screened(FP32, 900),
        screened(TORCH, 3000),
    ]
    assert LEADERS == 2
    assert short(refine(start)) == AROUND_W8 + AROUND_FP32
    assert refine(start) == refine(start[::-1])


def test_who_is_far_behind_is_not_looked_around() -> None:
    """Turning one knob would not bring it to the front."""
    for behind, around in ((900, AROUND_W8 + AROUND_FP32), (901, AROUND_W8)):
        assert short(refine([screened(W8, 600), screened(FP32, behind)])) == around


def test_yardsticks_do_not_lead() -> None:
    """Reference, baseline and incumbent are measured whatever happens and are no place to start from."""
    start = [
        screened(START["torch-fp32"], 10),
        screened(START["torch-bf16-compile"], 20),
        screened(W4.model_copy(update={"incumbent": True}), 30),
        screened(FP32, 900),
    ]
    assert short(refine(start)) == AROUND_FP32


def test_a_knob_that_flips_tokens_is_out_of_the_search() -> None:
    """Beyond doubt only; its speed then recommends nothing."""
    flipping = screened(W8, 100, kept=quality(1, flips=0.2))
    assert why_out(flipping, SPEC) == (
        "has another likeliest token than the reference at 20.0% of positions, clearly more than 10.0%"
    )
    unsure = screened(W8, 100, kept=quality(1, flips=0.2, clear=False))
    assert why_out(unsure, SPEC) is None


def test_quality_in_doubt_does_not_end_a_search() -> None:
    """A slice that is not clear of the limit is no evidence against a candidate."""
    assert short(refine([screened(W8, 600, kept=quality(0.985, clear=False))])) == AROUND_W8


def test_a_generation_is_limited_and_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than so many are screened at once, half of them around each leader, each one's first knobs."""
    start = [screened(W8, 400), screened(W4, 500)]
    assert len(refine(start, objective="memory")) == MOST_PER_GENERATION
    monkeypatch.setattr("open_autoglm.search.MOST_PER_GENERATION", 8)
    around_w4 = short(neighbours(W4, {W4.id}, ANALYSIS, SPEC))
    assert short(refine(start)) == AROUND_W8[:4] + around_w4[:4]


def test_places_that_one_leader_does_not_need_are_the_others() -> None:
    """As long as there is room, nobody's neighbour is left out."""
    start = [screened(FP32, 400), screened(W8, 500)]
    assert len(AROUND_FP32) + len(AROUND_W8) < MOST_PER_GENERATION
    assert short(refine(start)) == AROUND_FP32 + AROUND_W8
    start = [screened(FP32, 400), screened(W8, 500), *map(failed, by_name(AROUND_FP32[:2]))]
    assert short(refine(start)) == AROUND_FP32[2:] + AROUND_W8


def test_vetoed_ones_come_on_top() -> None:
    """They cost nothing and are listed, so that nobody wonders."""
    start = [screened(c, peak_rss_bytes=1) for c in (W8, W4)]
    found = refine(start, max_memory=ByteSize("236MiB"))
    assert len(found) == MOST_PER_GENERATION + 1
    assert [c.id for c in found if c.vetoed_because] == [found[-1].id] == ["onnxruntime-w8-b16"]


def test_what_helped_is_joined_at_the_end() -> None:
    """The best value of each knob that was better alone, and no more neighbours; what was out for its quality
    or failed helps nothing. After that the search is over."""
    single, blocks, basic, nospin, wide = by_name(
        ["w8-b32-t1", "w8-b64", "w8-b32-g-basic", "w8-b32-nospin", "w8-b128"]
    )
    start = [screened(W8, 600)]
    first = [
        screened(single, 800),
        screened(blocks, 550),
        screened(wide, 500, kept=quality(0.97)),
        screened(basic, 580),
        failed(nospin),
    ]
    (joint,) = refine(start, first)
    assert joint.id == "onnxruntime-w8-b64-g-basic"
    assert refine(start, first, [screened(joint, 530)]) == []


def test_a_second_generation_looks_around_the_new_leaders() -> None:
    """After what helped combined, the untried neighbours of the two that are now best."""
    single, blocks, basic = by_name(["w8-b32-t1", "w8-b64", "w8-b32-g-basic"])
    first = [screened(single, 800), screened(blocks, 550), screened(basic, 580)]
    found = short(refine([screened(W8, 600)], first, search_generations=2))
    around = ["w8-b16", "w8-b128", "w8-b64-t1", "w8-b64-nospin", "w8-b64-noflash"]
    assert found[:6] == ["w8-b64-g-basic", *around]
    assert found[6:8] == ["w8-b16-g-basic", "w8-b128-g-basic"]
    assert found[8:] == ["w8-b32-t1-g-basic", "w8-b32-g-basic-nospin", "w8-b32-g-basic-noflash"]


def test_no_generation_no_search() -> None:
    """`search_generations` of 0 leaves the start candidates alone."""
    assert refine([screened(W8)], search_generations=0) == []


def test_nothing_able_ends_the_search() -> None:
    """No leader, no neighbour."""
    assert refine([failed(W8), screened(W4, kept=quality(0.5))]) == []


def search(cost: Callable[[Candidate], float], start: Candidate) -> list[Trial]:
    """Every trial of a search in which a candidate takes ``cost`` milliseconds."""
    generations: list[list[Trial]] = []
    candidates = [start]
    while candidates:
        generations.append([screened(candidate, cost(candidate)) for candidate in candidates])
        candidates = next_generation(generations, ANALYSIS, SPEC)
    return [trial for generation in generations for trial in generation]


GRID = grid([W4], ANALYSIS, SPEC)


@given(st.data())
def test_independent_knobs_are_found_at_the_price_of_their_sum(data: st.DataObject) -> None:
    """Where each knob has an effect of its own, one generation and the combination of what helped find the
    best of the grid around a candidate in a small part of its trials."""
    effects: dict[tuple[str, Knob], float] = {}

    def cost(candidate: Candidate) -> float:
        ms = 500.0
        for knob in candidate.knobs.items():
            if knob not in effects:
                effects[knob] = data.draw(st.floats(0.8, 1.25), label=f"{knob}")
            ms *= effects[knob]
        return ms

    trials = search(cost, W4)
    best = min(cost(trial.candidate) for trial in trials)
    assert best <= min(map(cost, GRID)) * (1 + 1e-9)
    assert {trial.id for trial in trials} <= {point.id for point in GRID}
    assert len({trial.id for trial in trials}) == len(trials) <= 0.05 * len(GRID)


# ── figures and words ────────────────────────────────────────────────────────────────────────────


def test_each_objective_ranks_by_its_own_figure() -> None:
    """Bytes for memory, the prompt for TTFT, decoding for TPOT and throughput, the whole request else; rounds
    that were run again do not count."""
    rounds = [turn(100, 10), turn(900, 90, repeated=True), turn(120, 12), turn(110, 11)]
    trial = screened(W8, 640, peak_rss_bytes=5000, rounds=rounds)

    def figure(objective: Any, **fields: Any) -> float:
        return rank_figure(trial, OptimizeSpec(model_path="here", objective=objective, **fields))

    assert figure("memory") == 5000
    assert figure("ttft") == figure("ttft_p95") == 110
    assert figure("tpot") == figure("throughput") == 11
    assert figure("latency") == figure("e2e_p95") == figure("goodput") == 640
    assert figure("throughput", scenario="offline") == 640


def test_out_is_what_gave_no_figures_or_clearly_misses_a_limit() -> None:
    """The reason of a trial that failed, the quality kept, the memory taken."""
    limited = OptimizeSpec(model_path="here", batch_size=2, max_memory="256MiB")
    assert why_out(failed(W8), SPEC) == "screening: SIGSEGV"
    assert why_out(screened(W4, kept=quality(0.76)), SPEC) == (
        "keeps 76.0% of the quality, clearly less than 99.0%"
    )
    assert why_out(screened(W8), limited) == "took 300 MiB, more than the 256MiB allowed"
    assert why_out(screened(W8), SPEC) is None


def test_each_try_leaves_a_sentence() -> None:
    """What was turned, where from, and what came of it."""
    start = [screened(W8, 600, peak_rss_bytes=1000)]
    blocks, single, wide, basic, nospin, joint = by_name(
        ["w8-b16", "w8-b32-t1", "w8-b128", "w8-b32-g-basic", "w8-b32-nospin", "w8-b16-g-basic"]
    )
    first = [
        screened(blocks, 576, peak_rss_bytes=1100),
        screened(single, 900),
        screened(wide, 540, kept=quality(0.97)),
        screened(basic, 594),
        failed(nospin),
    ]
    w8 = "onnxruntime-w8-b32 with"
    assert lessons([start, first, [screened(joint, 612)]], ANALYSIS, SPEC) == (
        f"{w8} block_size 16 instead of 32: 4.0% faster in the screening",
        f"{w8} threads 1 instead of all: 50.0% slower in the screening",
        f"{w8} block_size 128 instead of 32: 10.0% faster in the screening, but keeps 97.0% of the quality, "
        "clearly less than 99.0%",
        f"{w8} graph_level basic instead of all: 1.0% faster in the screening",
        f"{w8} allow_spinning False instead of True: crashed, screening: SIGSEGV",
        f"{w8} block_size 16 instead of 32, graph_level basic instead of all: 2.0% slower in the screening",
    )
    memory = OptimizeSpec(model_path="here", objective="memory")
    assert lessons([start, first[:1]], ANALYSIS, memory) == (
        f"{w8} block_size 16 instead of 32: 10.0% more memory in the screening",
    )
