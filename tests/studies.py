"""Studies as `optimize` leaves them, without running one: the figures are those of the 135 M demo GLM.

``demo_study()`` has a champion; `tied_study`, `doubtful_study`, `infeasible_study`, `blocked_study` and
`planned_study` have the other five verdicts. The answer is the product's own: the trials go through `choose`.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from demo_host import SHA, demo_analysis, demo_checkpoint, demo_hardware, demo_profile
from demo_trials import (
    BASELINE,
    CHAMPION,
    FINALISTS,
    RACED,
    RIVAL,
    ROUNDS,
    SHAPES,
    crashed_trial,
    demo_noise,
    demo_quality,
    demo_races,
    demo_trials,
    demo_workload,
    measured_trial,
    vetoed_trials,
    with_incumbent,
)

from open_autoglm.schemas import Bundle, GateResult, Incumbent, OptimizeSpec, Registration, Study, Verdict
from open_autoglm.selection import choose
from open_autoglm.units import ByteSize, Duration

__all__ = [
    "BASELINE",
    "CHAMPION",
    "FINALISTS",
    "RACED",
    "RIVAL",
    "ROUNDS",
    "SHAPES",
    "crashed_trial",
    "demo_analysis",
    "demo_checkpoint",
    "demo_hardware",
    "demo_profile",
    "demo_quality",
    "demo_trials",
    "measured_trial",
    "vetoed_trials",
]


# ── studies ──────────────────────────────────────────────────────────────────────────────────────


def demo_study(spec: OptimizeSpec | None = None, incumbent: str | None = None, **changes: Any) -> Study:
    """A finished study of ``spec`` (by default one with a champion); ``changes`` replace its fields.

    ``incumbent`` names the trial that is the registered champion, measured again.
    """
    spec = spec or OptimizeSpec(
        model_path="demo-glm", max_latency=Duration("1s"), max_memory=ByteSize("800MiB")
    )
    noise = demo_noise()
    trials = demo_trials() if incumbent is None else with_incumbent(demo_trials(), incumbent)
    choice = choose(trials, spec, noise)
    registered = Incumbent(trial_id=incumbent, model_name="demo-glm", version="2") if incumbent else None
    content: dict[str, Any] = {
        "id": "demo-glm-20261122-093000-5d1f09",
        "created": datetime(2026, 11, 22, 9, 30, tzinfo=UTC),
        "finished": datetime(2026, 11, 22, 9, 38, 12, tzinfo=UTC),
        "spec": spec,
        "checkpoint": demo_checkpoint(),
        "analysis": demo_analysis(),
        "workload": demo_workload(),
        "verdict": choice.verdict,
        "champion": choice.champion,
        "incumbent": registered,
        "races": demo_races(noise),
        "comparisons": choice.comparisons,
        "search": (
            f"{CHAMPION} with block_size 16 instead of 32: 0.9% slower in the screening",
            f"{CHAMPION} with threads 1 instead of 2: 57.4% slower in the screening",
        ),
        "pareto": choice.pareto,
        "trials": choice.trials,
        "gate": demo_gate(),
        "bundle": Bundle(path=Path("studies/demo/bundle"), digest=SHA, size_bytes=176_200_000),
        "registration": demo_registration(),
        "not_measured": (
            "Energy was not measured.",
            "Concurrent requests were not measured: --scenario server does.",
            "No GPU engine was measured: no NVIDIA driver is loaded.",
        ),
        "environment": {"torch": "2.13.0", "onnxruntime": "1.31.1", "threads": "2"},
        "output_dir": Path("studies/demo"),
    }
    return Study(**{**content, **changes})


def infeasible_study() -> Study:
    """Nothing has a TTFT of 300 ms in 200 MiB."""
    spec = OptimizeSpec(model_path="demo-glm", max_latency=Duration("300ms"), max_memory=ByteSize("200MiB"))
    return demo_study(spec, bundle=None, registration=None)


def tied_study() -> Study:
    """The registered champion is `RIVAL`, and the best of the others is not told apart from it."""
    return demo_study(incumbent=RIVAL, bundle=None, registration=None)


def doubtful_study() -> Study:
    """The best candidate's TTFT of 738 ms lies on the limit, as far as ten rounds can tell."""
    spec = OptimizeSpec(model_path="demo-glm", max_latency=Duration("741ms"), max_memory=ByteSize("800MiB"))
    return demo_study(spec, bundle=None, registration=None)


def blocked_study() -> Study:
    """A champion was found, and the gate over the results table refused it."""
    failure = "ttft_ms: p50 <= p95 <= p99 fails for torch-bf16"
    return demo_study(
        verdict=Verdict(kind="gate_failed", reasons=(f"gate: {failure}",), nearest=CHAMPION),
        champion=None,
        gate=GateResult(passed=False, evaluated=14, failures=(failure,), warnings=(), data_docs=None),
        bundle=None,
        registration=None,
    )


def planned_study() -> Study:
    """A dry run: no trial."""
    return demo_study(
        verdict=Verdict(kind="dry_run", reasons=("10 candidates would be measured, 2 are vetoed",)),
        champion=None,
        pareto=(),
        trials=(),
        races=(),
        comparisons=(),
        search=(),
        gate=None,
        bundle=None,
        registration=None,
    )


def demo_gate() -> GateResult:
    warning = "at least 90 timed rounds for a p95 that decides: 10 found in ttft_ms"
    return GateResult(
        passed=True, evaluated=14, failures=(), warnings=(warning,), data_docs="data-docs/index.html"
    )


def demo_registration(tracking_uri: str = "http://127.0.0.1:5000") -> Registration:
    return Registration(
        tracking_uri=tracking_uri,
        experiment_id="1",
        run_id="9f2b6c1d0a5e4f7fb1a0c2d3e4f5a6b7",
        model_name="demo-glm",
        model_version="3",
        model_uri="models:/demo-glm@champion",
    )
