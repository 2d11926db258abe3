"""What of a trial is kept as params, metrics and tags, so that runs can be searched and compared."""

from __future__ import annotations

from typing import Any

from open_autoglm.schemas import Trial


def trial_params(trial: Trial) -> dict[str, Any]:
    """What the candidate is."""
    candidate = trial.candidate
    facts = {
        name: getattr(candidate, name) for name in ("id", "engine", "device", "precision", "weight_bits")
    }
    if candidate.transform is not None:
        facts |= {f"pruning.{name}": value for name, value in candidate.transform.model_dump().items()}
    return facts | {f"knob.{name}": value for name, value in candidate.knobs.items()}


def trial_metrics(trial: Trial) -> dict[str, float]:
    """Figures by name: the median under the metric's own name, its interval and percentiles beside it."""
    figures: dict[str, float] = {}
    for name, metric in trial.metrics.items():
        low, high = metric.interval
        figures |= {
            name: metric.median,
            **{f"{name}_{p}": getattr(metric, p) for p in ("p90", "p95", "p99")},
            f"{name}_low": low,
            f"{name}_high": high,
            f"{name}_samples": metric.samples,
        }
    if quality := trial.quality:
        figures["quality_ratio"] = quality.ratio
        figures["quality_token_flips"] = quality.flipping.token_flips
        middle, least = quality.first_divergence
        figures |= {"quality_first_divergence_median": middle, "quality_first_divergence_min": least}
        for path in ("prefill", "decode"):
            scores = getattr(quality, path)
            for score in ("ratio", "perplexity", "kl_divergence", "top1_agreement"):
                figures[f"quality_{path}_{score}"] = getattr(scores, score)
    return figures | _recovery_metrics(trial) | _screening_metrics(trial) | _round_counts(trial)


def _recovery_metrics(trial: Trial) -> dict[str, float]:
    """Of the distillation that its checkpoint comes from, if there was one."""
    if trial.exported is None or (recovery := trial.exported.recovery) is None:
        return {}
    names = ("helped", "steps", "kept_step", "seconds", "tokens", "divergence_before", "divergence_after")
    figures = {f"recovery_{name}": getattr(recovery, name) for name in names}
    return {name: float(value) for name, value in figures.items() if value is not None}


def _screening_metrics(trial: Trial) -> dict[str, float]:
    """Rough times under names of their own, so that nobody ranks by them what was timed."""
    if trial.screening is None:
        return {}
    screening, footprint = trial.screening, trial.screening.footprint
    figures = {
        "estimated_e2e_ms": screening.estimated_e2e_ms,
        "load_ms": screening.load_ms,
        "first_request_ms": screening.first_request_ms,
        **footprint.model_dump(exclude_none=True),
    }
    return {f"screening_{name}": float(value) for name, value in figures.items()}


def _round_counts(trial: Trial) -> dict[str, float]:
    taken = trial.measurements
    if taken is None:
        return {}
    return {
        "rounds": len(taken.counted),
        "rounds_repeated": taken.repeated_rounds,
        "rounds_disturbed": taken.noisy_rounds,
    }


def trial_tags(trial: Trial) -> dict[str, str]:
    """How it ended, how far it came, which percentiles are indicative, and how to run it again."""
    weak = [f"{name}: {' '.join(m.indicative)}" for name, m in trial.metrics.items() if m.indicative]
    fall = trial.fall
    return {
        "autoglm.status": trial.status,
        "autoglm.reason": trial.reason,
        "autoglm.engine": trial.engine,
        "autoglm.feasible": str(trial.feasible).lower(),
        "autoglm.stage": _stage(trial),
        "autoglm.fall": f"{fall.stage}: {fall.reason}" if fall else "",
        "autoglm.indicative": "; ".join(weak),
        "autoglm.reused": " ".join(trial.reused),
        "autoglm.reproduce": trial.capsule.command if trial.capsule else "",
        "mlflow.note.content": f"{trial.status}: {trial.reason}",
    }


def _stage(trial: Trial) -> str:
    """The last stage it took part in."""
    if trial.finalist:
        return "final"
    if trial.metrics:
        return "race"
    return "screening" if trial.screening else "export" if trial.exported else "plan"
