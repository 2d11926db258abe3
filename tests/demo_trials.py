"""The trials of the made-up studies: the product's own figures of made-up rounds."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from demo_host import SHA, demo_hardware

from open_autoglm.measure.comparison import compare, noise_floor
from open_autoglm.measure.racing import TWIN_SUFFIX
from open_autoglm.measure.scenarios import figure_of, metrics_of
from open_autoglm.measure.statistics import summarise
from open_autoglm.schemas import (
    Candidate,
    Capsule,
    Comparison,
    Conditions,
    ExportedModel,
    Fall,
    Footprint,
    Knob,
    Measurements,
    Miss,
    NoiseFloor,
    PathQuality,
    Place,
    Precision,
    QualityReport,
    Race,
    Round,
    Screening,
    Trial,
    Workload,
)

ROUNDS = 10
RACE_HEATS = 4
CHAMPION = "onnxruntime-int8-b32"
RIVAL = "onnxruntime-int8-b16"
BASELINE = "torch-bf16-compiled"
RACED = "onnxruntime-int8-b32-t1"
FINALISTS = (CHAMPION, RIVAL, "onnxruntime-fp32", BASELINE)


class Shape(NamedTuple):
    """What makes one measured engine different from the next."""

    id: str
    precision: Precision
    bits: float
    ttft_ms: float
    tokens_per_s: float
    rss_mb: float
    kept: tuple[float, float]  # quality on prefill, on decode
    top1: float
    kl: float
    same_tokens: int
    because: str

    @property
    def e2e_ms(self) -> float:
        return self.ttft_ms + 63_000 / self.tokens_per_s


SHAPES = (
    Shape("torch-fp32", "fp32", 32, 1245, 11.8, 989, (1, 1), 1, 0, 64, "the reference"),
    Shape("torch-bf16", "bf16", 16, 669, 13.5, 1160, (0.9991, 0.9993), 0.969, 0.0011, 7,
          "half the bytes per weight, and the CPU has avx512_bf16"),
    Shape(BASELINE, "bf16", 16, 573, 22.6, 1160, (0.9991, 0.9993), 0.969, 0.0011, 19,
          "what a careful engineer would write by hand"),
    Shape("onnxruntime-fp32", "fp32", 32, 756, 41.6, 789, (1, 1), 1, 1e-9, 64,
          "fused graph with an in-place cache, full precision"),
    Shape("onnxruntime-int8-dynamic", "int8", 8, 378, 86.4, 358, (0.6262, 0.9852), 0.621, 0.483, 0,
          "prefill is bound by compute, and the CPU has avx512_vnni"),
    Shape(CHAMPION, "int8", 9, 738, 81.0, 312, (0.9937, 0.9965), 0.958, 0.0043, 7,
          "decode is bound by bandwidth: a quarter of the bytes per weight"),
    Shape(RIVAL, "int8", 10, 742, 80.6, 326, (0.9941, 0.9968), 0.961, 0.0039, 9,
          "onnxruntime-int8-b32 with block_size 16 instead of 32"),
    Shape(RACED, "int8", 9, 1402, 64.0, 311, (0.9937, 0.9965), 0.958, 0.0043, 7,
          "onnxruntime-int8-b32 with threads 1 instead of 2"),
    Shape("onnxruntime-int4-b32", "int4", 5, 782, 112.1, 254, (0.757, 0.7569), 0.656, 0.365, 2,
          "decode is bound by bandwidth: an eighth of the bytes per weight"),
)  # fmt: skip


# ── trials ───────────────────────────────────────────────────────────────────────────────────────


def demo_trials() -> tuple[Trial, ...]:
    """Four finalists, not yet held to a limit; one that left in the race and four that left in the
    screening; one that crashed; two engines that cannot run here."""
    return (*map(_as_far_as_it_came, SHAPES), crashed_trial(), *vetoed_trials())


def with_incumbent(trials: tuple[Trial, ...], trial_id: str) -> tuple[Trial, ...]:
    """The trials, one of which is the registered champion."""
    return tuple(
        t.model_copy(update={"candidate": t.candidate.model_copy(update={"incumbent": t.id == trial_id})})
        for t in trials
    )


def _as_far_as_it_came(shape: Shape) -> Trial:
    if shape.id in FINALISTS:
        return measured_trial(shape)
    if shape.id == RACED:
        proof = (
            "57.4% slower than onnxruntime-int8-b32 after 4 heats (99 % sure; 98% interval +55.9% to +58.9%)"
        )
        return stopped_trial(shape, Fall(stage="race", heat=RACE_HEATS - 1, reason=proof), demo_races()[0])
    if min(shape.kept) < 0.99:
        limit, allowed, found, unit, by = "min_quality", 0.99, min(shape.kept), "", "prefill path, 192 tokens"
    else:
        limit, allowed, found, unit, by = "max_memory", 800 * 2**20, shape.rss_mb * 1e6, "bytes", "peak RSS"
    miss = Miss(limit=limit, allowed=allowed, measured=found, unit=unit, decided_by=by)
    fall = Fall(stage="screening", reason=f"misses {miss.sentence()}")
    return stopped_trial(shape, fall).model_copy(update={"misses": (miss,)})


def measured_trial(shape: Shape) -> Trial:
    """A finalist: timed to the end and judged."""
    measurements = demo_measurements(shape)
    return _screened_trial(shape).model_copy(
        update={
            "reason": "timed in the final",
            "metrics": measurements.metrics,
            "measurements": measurements,
            "samples_path": f"samples/{shape.id}.json",
            "finalist": True,
            "capsule": demo_capsule(shape),
        }
    )


def stopped_trial(shape: Shape, fall: Fall, race: Race | None = None) -> Trial:
    """Out before the final; with the rounds of ``race`` if it got that far."""
    trial = _screened_trial(shape).model_copy(
        update={"status": "stopped", "fall": fall, "reason": f"{fall.stage}: {fall.reason}"}
    )
    if race is None:
        return trial
    taken = demo_measurements(shape, rounds=len(race.heats))
    found = {"measurements": taken, "metrics": taken.metrics, "capsule": demo_capsule(shape)}
    return trial.model_copy(update=found)


def _screened_trial(shape: Shape) -> Trial:
    candidate = demo_candidate(shape)
    return Trial(
        id=shape.id,
        engine=candidate.engine,
        candidate=candidate,
        status="ok",
        reason="screened",
        quality=demo_quality(shape),
        screening=demo_screening(shape),
        log_path=f"logs/{shape.id}-screening.log",
        exported=ExportedModel(
            candidate_id=shape.id, path=Path("exports") / shape.id, digest=SHA,
            route="genai" if candidate.engine == "onnxruntime" else "checkpoint as it is",
            size_bytes=int(134_515_008 * shape.bits / 8),
            build_s={"fp32": 3.1, "bf16": 0}.get(shape.precision, 14.2),
        ),
    )  # fmt: skip


def demo_candidate(shape: Shape) -> Candidate:
    knobs: dict[str, Knob] = {}
    if shape.id.startswith("onnxruntime-int8-b"):
        knobs = {"block_size": 16 if shape.id == RIVAL else 32, "threads": 1 if shape.id == RACED else 2}
    return Candidate(
        id=shape.id,
        engine=shape.id.split("-")[0],
        device="cpu",
        precision=shape.precision,
        weight_bits=shape.bits,
        knobs=knobs,
        proposed_because=shape.because,
        reference=shape.id == "torch-fp32",
        baseline=shape.id == BASELINE,
    )


def demo_capsule(shape: Shape) -> Capsule:
    return Capsule(
        command=f"open-autoglm reproduce studies/demo {shape.id}",
        seed=0,
        candidate=demo_candidate(shape),
        checkpoint_digest=SHA,
        export_digest=SHA,
        workload_sha256=SHA,
        fingerprint=demo_hardware().fingerprint,
        host={"cpu": "AMD EPYC (Zen 4)", "governor": "not told", "kernel": "6.1.0", "affinity": "0,1"},
        versions={"torch": "2.13.0", "onnxruntime": "1.31.1", "open-autoglm": "0.3.0"},
    )


def crashed_trial() -> Trial:
    candidate = Candidate(
        id="onnxruntime-int8-b128",
        engine="onnxruntime",
        device="cpu",
        precision="int8",
        weight_bits=8.25,
        knobs={"block_size": 128},
        proposed_because="fewer scales than blocks of 32 have",
    )
    return Trial(
        id=candidate.id,
        engine=candidate.engine,
        candidate=candidate,
        status="crashed",
        reason="benchmark: ended with SIGSEGV",
        log_path=f"logs/{candidate.id}-benchmark.log",
    )


def vetoed_trials() -> tuple[Trial, ...]:
    reasons = {
        "onnxruntime-cuda": "this machine has no NVIDIA GPU: /dev/nvidia0 does not exist",
        "tensorrt": "not installed; install it with: pip install tensorrt",
    }
    return tuple(vetoed_trial(engine, reason) for engine, reason in reasons.items())


def vetoed_trial(engine: str, reason: str) -> Trial:
    candidate = Candidate(
        id=f"{engine}-fp16",
        engine=engine,
        device="gpu",
        precision="fp16",
        weight_bits=16,
        proposed_because="fp16 on tensor cores",
        vetoed_because=reason,
    )
    return Trial(id=candidate.id, engine=engine, candidate=candidate, status="vetoed", reason=reason)


# ── rounds ───────────────────────────────────────────────────────────────────────────────────────


def demo_workload() -> Workload:
    return Workload(
        path=Path("studies/demo/workload.npz"),
        sha256=SHA,
        batch_size=1,
        prompt_tokens=512,
        output_tokens=64,
        rounds=64,
        seed=0,
        corpus="debian-handbook",
    )


def demo_measurements(shape: Shape, rounds: int = ROUNDS) -> Measurements:
    """Rounds around the medians: most of their spread is the host's, so that all candidates share it.

    Two rounds of the baseline were disturbed, were run again and were disturbed once more.
    """
    host = np.random.default_rng(7).normal(0, 0.04, rounds)
    own = np.random.default_rng(sum(shape.id.encode()))

    def around(median: float) -> list[float]:
        samples = np.exp(host + own.normal(0, 0.009, rounds))
        return [float(s) for s in median * samples / np.median(samples)]

    taken: list[Round] = []
    pairs = zip(around(shape.ttft_ms), around(1000 / shape.tokens_per_s), strict=True)
    for index, (ttft_ms, tpot_ms) in enumerate(pairs):
        if shape.id == BASELINE and index in (3, 4):
            taken.append(demo_round(index, ttft_ms * 1.3, tpot_ms * 1.2, foreign_cores=0.4, repeated=True))
            taken.append(demo_round(index, ttft_ms, tpot_ms, foreign_cores=0.31))
        else:
            taken.append(demo_round(index, ttft_ms, tpot_ms))
    counted = [turn for turn in taken if not turn.repeated]
    warming = [
        demo_round(0, shape.ttft_ms * slow, 1000 / shape.tokens_per_s) for slow in (1.6, 1.05, 1.02, 1)
    ]
    return Measurements(
        metrics={
            **metrics_of(demo_workload(), counted),
            "load_ms": summarise([380 + shape.rss_mb], "ms"),
            "peak_rss_bytes": summarise([shape.rss_mb * 1e6], "bytes"),
        },
        rounds=tuple(taken),
        warmups=tuple(warming),
        steady=True,
        output_tokens_ratio=1.0,
        environment={"threads": "2"},
    )


def demo_round(
    index: int, ttft_ms: float, tpot_ms: float, *, foreign_cores: float = 0.02, repeated: bool = False
) -> Round:
    """One request of 64 tokens."""
    e2e_ms = ttft_ms + 63 * tpot_ms
    return Round(
        index=index,
        ttft_ms=(ttft_ms,),
        tpot_ms=(tpot_ms,),
        e2e_ms=(e2e_ms,),
        token_ms=((tpot_ms,) * 63,),
        output_tokens=(64,),
        duration_ms=e2e_ms,
        conditions=Conditions(foreign_cores=foreign_cores),
        repeated=repeated,
    )


def demo_screening(shape: Shape) -> Screening:
    """Memory of a fresh process, and rounds of a sixteenth of the length."""
    rss = int(shape.rss_mb * 1e6)
    compiling_ms = 38_000 if shape.id == BASELINE else 120
    mapped = 210_000_000 if shape.id.startswith("torch") else 96_000_000
    return Screening(
        footprint=Footprint(
            peak_rss_bytes=rss, peak_pss_bytes=rss - 31_000_000, mapped_file_bytes=mapped, device_bytes=None
        ),
        load_ms=420 + shape.rss_mb,
        first_request_ms=shape.e2e_ms + compiling_ms,
        prompt_tokens=32,
        output_tokens=8,
        rounds=tuple(demo_round(i, shape.ttft_ms / 16, 1000 / shape.tokens_per_s) for i in range(4)),
        estimated_e2e_ms=shape.e2e_ms * 1.03,
        facts={"threads": "2"},
    )


def demo_noise() -> NoiseFloor:
    """The champion in two processes, over the same rounds."""
    return noise_floor(_paired(CHAMPION + TWIN_SUFFIX, CHAMPION))


def demo_races(noise: NoiseFloor | None = None) -> tuple[Race, ...]:
    """Four heats that one of four did not survive, and the final of ten."""
    entrants = (CHAMPION, RIVAL, "onnxruntime-fp32", RACED)
    final = (*FINALISTS, CHAMPION + TWIN_SUFFIX)
    fall = Fall(stage="race", heat=RACE_HEATS - 1, reason="57.4% slower than onnxruntime-int8-b32")
    return (
        Race(
            stage="race", metric="e2e_ms", heats=_in_turns(entrants, RACE_HEATS), fallen={RACED: fall},
            comparisons=(), stopped_because="after 4 heats no more than 3 are left to choose from",
            seconds=39.2,
        ),
        Race(
            stage="final", metric="e2e_ms", heats=_in_turns(final, ROUNDS), fallen={},
            comparisons=tuple(_paired(name, CHAMPION) for name in FINALISTS[1:]), noise=noise,
            stopped_because="after 10 heats every interval is narrower than 5.0%, or far from zero",
            seconds=104.8,
        ),
    )  # fmt: skip


def _in_turns(names: tuple[str, ...], heats: int) -> tuple[tuple[str, ...], ...]:
    return tuple(names if heat % 2 == 0 else names[::-1] for heat in range(heats))


def _paired(name: str, against: str) -> Comparison:
    shapes = {shape.id: shape for shape in SHAPES}
    shapes[CHAMPION + TWIN_SUFFIX] = shapes[CHAMPION]._replace(id=CHAMPION + TWIN_SUFFIX)
    figure = figure_of("e2e_ms")
    ours, theirs = ([figure(r) for r in demo_measurements(shapes[n]).counted] for n in (name, against))
    return compare(name, against, "e2e_ms", ours, theirs)


# ── quality ──────────────────────────────────────────────────────────────────────────────────────


def demo_quality(shape: Shape) -> QualityReport:
    on_prefill, on_decode = shape.kept
    return QualityReport(
        prefill=demo_path(on_prefill, shape.kl, shape.top1),
        decode=demo_path(on_decode, shape.kl / 2, (1 + shape.top1) / 2),
        worse_path="prefill" if on_prefill <= on_decode else "decode",
        ratio=min(shape.kept),
        greedy_same_tokens=(shape.same_tokens, min(64, shape.same_tokens + 4)),
        greedy_tokens=64,
        finite=True,
        seconds=41.0,
    )


def demo_path(ratio: float, kl: float, top1: float) -> PathQuality:
    margin = 0.2 * (1 - ratio)
    return PathQuality(
        tokens=768,
        perplexity=25.748 / ratio,
        reference_perplexity=25.748,
        ratio=ratio,
        ratio_interval=(ratio - margin, ratio + margin),
        clear_of_limit=True,
        kl_divergence=kl,
        top1_agreement=top1,
        flips_interval=(0.9 * (1 - top1), 1.1 * (1 - top1)),
        clear_of_flips=True,
        first_flip=Place(text="debian-handbook", window=0, position=17) if top1 < 1 else None,
        by_text={"debian-handbook": ratio, "python-docs": min(1.0, ratio + 0.0004)},
    )
