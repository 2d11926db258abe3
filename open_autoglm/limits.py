"""Which limits a trial meets, and whether beyond doubt.

A limit on TTFT is a limit on its p95. A p95 may decide only with enough samples for it
(:func:`open_autoglm.measure.statistics.least_samples`); with fewer the median decides, and the answer
says so. A limit is met for certain when the whole interval meets it.
"""

from __future__ import annotations

from open_autoglm.schemas import Metric, Miss, OptimizeSpec, QualityReport, Trial
from open_autoglm.units import quantity


def is_complete(trial: Trial) -> bool:
    """Timed to the end and judged: fit to be chosen."""
    return trial.status == "ok" and trial.finalist and bool(trial.metrics) and trial.quality is not None


def misses(trial: Trial, spec: OptimizeSpec) -> tuple[Miss, ...]:
    """The limits that a complete trial does not meet."""
    assert trial.quality is not None
    found = []
    if spec.max_latency is not None:
        value, decided_by = latency_figure(trial.metrics["ttft_ms"])
        found.append(_over("max_latency", spec.max_latency.ms, value, "ms", decided_by))
    if spec.max_tpot is not None:
        tpot_ms = trial.metrics["tpot_ms"].median
        found.append(_over("max_tpot", spec.max_tpot.ms, tpot_ms, "ms", "median TPOT"))
    if spec.max_memory is not None:
        peak_rss = trial.metrics["peak_rss_bytes"].median
        found.append(_over("max_memory", spec.max_memory.bytes, peak_rss, "bytes", "peak RSS"))
    quality = trial.quality
    if quality.ratio < spec.min_quality:
        found.append(
            Miss(
                limit="min_quality",
                allowed=spec.min_quality,
                measured=quality.ratio,
                unit="",
                decided_by=f"{quality.worse_path} path",
            )
        )
    found.append(flips_miss(quality, spec))
    return tuple(miss for miss in found if miss is not None)


def flips_miss(quality: QualityReport, spec: OptimizeSpec) -> Miss | None:
    """By the path whose likeliest tokens differ more often; it says where they first do."""
    path = quality.flipping
    where = f"{quality.flipping_path} path, {path.tokens} tokens, first at {path.first_flip}"
    return _over("max_token_flips", spec.max_token_flips, path.token_flips, "", where)


def keeps_quality(quality: QualityReport, spec: OptimizeSpec) -> bool:
    """By what was scored, both of perplexity and of tokens, whether or not beyond doubt."""
    return quality.ratio >= spec.min_quality and flips_miss(quality, spec) is None


def latency_figure(ttft_ms: Metric) -> tuple[float, str]:
    if "p95" in ttft_ms.indicative:
        return ttft_ms.median, f"median TTFT; {ttft_ms.samples} samples are too few for p95 to decide"
    return ttft_ms.p95, f"p95 TTFT of {ttft_ms.samples} samples"


def _over(limit: str, allowed: float, measured: float, unit: str, decided_by: str) -> Miss | None:
    if measured <= allowed:
        return None
    return Miss(limit=limit, allowed=allowed, measured=measured, unit=unit, decided_by=decided_by)


def unclear(trial: Trial, spec: OptimizeSpec) -> str | None:
    """What keeps a trial that meets every limit from meeting it beyond doubt; None if nothing does."""
    limits = (("ttft_ms", spec.max_latency, "TTFT"), ("tpot_ms", spec.max_tpot, "TPOT"))
    for name, limit, word in limits:
        if limit is None:
            continue
        metric = trial.metrics[name]
        if name == "ttft_ms" and "p95" not in metric.indicative:
            continue  # the binomial count behind `indicative` is the confidence
        if metric.interval[1] > limit.ms:
            low, high = (quantity(end, "ms") for end in metric.interval)
            return f"the interval of its median {word}, {low} to {high}, holds the limit {limit}"
    return None


def excess(miss: Miss) -> float:
    """How far beyond its limit, as a share of the limit."""
    if miss.limit == "min_quality":
        return 1 - miss.measured / miss.allowed
    return miss.measured / miss.allowed - 1
