"""The gate stops figures that cannot be true, and says which expectation they broke."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from studies import BASELINE, CHAMPION, FINALISTS, ROUNDS, demo_trials

from open_autoglm.quality.gates import check_results, results_frame
from open_autoglm.schemas import GateResult, Trial

NAN, INFINITY = float("nan"), float("inf")


def gate(trials: tuple[Trial, ...], docs: Path, **changes: Any) -> GateResult:
    asked: dict[str, Any] = {
        "rounds": ROUNDS,
        "min_quality": 0.99,
        "max_token_flips": 0.1,
        "champion_id": CHAMPION,
    }
    return check_results(trials, **{**asked, **changes}, docs_dir=docs / "gate")


def with_metric(name: str, trial_id: str = BASELINE, **changes: Any) -> tuple[Trial, ...]:
    """The demo trials, with ``changes`` to one metric of one trial."""
    return tuple(
        t.model_copy(update={"metrics": {**t.metrics, name: t.metrics[name].model_copy(update=changes)}})
        if t.id == trial_id
        else t
        for t in demo_trials()
    )


def with_changes(trial_id: str = BASELINE, **changes: Any) -> tuple[Trial, ...]:
    return tuple(t.model_copy(update=changes) if t.id == trial_id else t for t in demo_trials())


def with_quality(path: str, ratio: float, trial_id: str = BASELINE) -> tuple[Trial, ...]:
    report = next(t.quality for t in demo_trials() if t.id == trial_id)
    scores = getattr(report, path).model_copy(update={"ratio": ratio})
    assert report is not None
    return with_changes(trial_id, quality=report.model_copy(update={path: scores}))


def with_measurements(**changes: Any) -> tuple[Trial, ...]:
    taken = next(t.measurements for t in demo_trials() if t.id == BASELINE)
    assert taken is not None
    return with_changes(measurements=taken.model_copy(update=changes))


def test_table_holds_the_measured_trials() -> None:
    """Who left early, crashed or was vetoed has no row; each finalist has its figures."""
    frame = results_frame(demo_trials()).set_index("trial")
    measured = {t.id: t for t in demo_trials() if t.status == "ok"}
    assert set(measured) == set(FINALISTS)
    assert list(frame.index) == list(measured)
    assert frame.loc[CHAMPION, "ttft_ms_p95"] == measured[CHAMPION].metrics["ttft_ms"].p95
    assert frame.loc[CHAMPION, "quality_decode"] == 0.9965
    assert frame.loc[BASELINE, "noisy_rounds"] == 2


def test_sound_study_passes_and_leaves_data_docs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Good figures pass; a disturbed round is a warning, which does not block; stdout stays free for JSON."""
    result = gate(demo_trials(), tmp_path)
    assert result.passed
    assert result.failures == ()
    assert len(result.warnings) == 1
    assert f"{BASELINE} has noisy_rounds = 2" in result.warnings[0]
    assert result.evaluated >= 20
    assert result.data_docs == "gate/index.html"
    assert "results" in (tmp_path / result.data_docs).read_text()
    assert list((tmp_path / "gate/validations").rglob("*.html"))
    assert capfd.readouterr().out == ""


def test_data_docs_are_those_of_the_last_check(tmp_path: Path) -> None:
    """A resumed study's docs hold one validation, not a history of them."""
    gate(demo_trials(), tmp_path)
    gate(demo_trials(), tmp_path)
    assert len(list((tmp_path / "gate/validations").rglob("*.html"))) == 1


@pytest.mark.parametrize(
    ("trials", "expected"),
    [
        (with_metric("ttft_ms", median=NAN), f"ttft_ms is known; but {BASELINE} has ttft_ms = nan"),
        (with_metric("tpot_ms", median=-1.0), "tpot_ms is positive and finite; but"),
        (with_metric("tokens_per_s", median=INFINITY), f"{BASELINE} has tokens_per_s = inf"),
        (with_metric("ttft_ms", p50=2.0, p95=1.0, p99=3.0),
         f"ttft_ms has p50 <= p95; but {BASELINE} has ttft_ms_p95 = 1, ttft_ms_p50 = 2"),
        (with_metric("tpot_ms", p99=0.5), "tpot_ms has p95 <= p99"),
        (with_metric("ttft_ms", samples=9), "ttft_ms has at least 10 samples; but"),
        (with_quality("decode", NAN), f"quality_decode is known; but {BASELINE} has quality_decode = nan"),
        (with_quality("prefill", 1.6), "quality_prefill lies between 0 and 1.5"),
        (with_changes(measurements=None), "output_tokens_ratio is known"),
        (with_measurements(output_tokens_ratio=0.9), f"{BASELINE} has output_tokens_ratio = 0.9"),
        (with_quality("decode", 0.98, CHAMPION), f"quality_decode is at least 0.99; but {CHAMPION} has"),
        (with_changes(CHAMPION, status="crashed"), f"the champion {CHAMPION} was measured"),
        ((), "at least one candidate was measured; but found 0"),
        (tuple(t.model_copy(update={"quality": None}) for t in demo_trials()), "quality_decode is known"),
    ],
)  # fmt: skip
def test_impossible_figures_block(trials: tuple[Trial, ...], expected: str, tmp_path: Path) -> None:
    """Each broken figure fails, and the failure names the expectation, the trial and the value."""
    result = gate(trials, tmp_path)
    assert not result.passed
    assert any(expected in failure for failure in result.failures), result.failures


def test_a_losing_candidates_quality_does_not_block(tmp_path: Path) -> None:
    """Only the champion must keep the quality that was asked for; others lose by it."""
    assert gate(with_quality("decode", 0.76), tmp_path, min_quality=0.99).passed
    assert not gate(demo_trials(), tmp_path, min_quality=0.995).passed
    assert not gate(demo_trials(), tmp_path, max_token_flips=0.01).passed


def test_a_judged_trial_that_was_not_in_the_final_has_no_row(tmp_path: Path) -> None:
    """Its figures are of another stage, or missing, and no champion rests on them."""
    trials = with_changes("onnxruntime-fp32", finalist=False, metrics={}, measurements=None)
    assert gate(trials, tmp_path).passed
    assert "onnxruntime-fp32" not in set(results_frame(trials)["trial"])


def test_without_a_champion_the_table_is_still_checked(tmp_path: Path) -> None:
    """When nothing is feasible, the figures that say so must be sound as well."""
    assert gate(demo_trials(), tmp_path, champion_id=None).passed
    assert not gate(with_metric("ttft_ms", median=NAN), tmp_path, champion_id=None).passed
