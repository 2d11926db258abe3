"""The gates: no champion is registered, and nobody is woken, on figures that cannot be true.

Great Expectations checks the results table of a study and keeps its Data Docs; it checks a production window
in the same way, without them. Whether a failure blocks is decided here, by severity, because its own verdict
also counts warnings.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_autoglm.files import directory_atomic
from open_autoglm.schemas import GateResult, Trial
from open_autoglm.schemas.watch import Histogram, LatencyWindow

if TYPE_CHECKING:
    import pandas as pd

_TIMES = ("ttft_ms", "tpot_ms")
_METRICS = (*_TIMES, "tokens_per_s", "peak_rss_bytes")
_QUALITY = ("quality_prefill", "quality_decode")
_FLIPS = ("flips_prefill", "flips_decode")
_LARGEST = {"ttft_ms": 86_400_000, "tpot_ms": 86_400_000, "tokens_per_s": 1e7, "peak_rss_bytes": 2**50}
"""A day, ten million tokens per second, a pebibyte: beyond these a figure is a mistake, infinity included."""


def results_frame(trials: Iterable[Trial]) -> pd.DataFrame:
    """One row per finalist that ran to the end; what it does not have is NaN.

    Times are in ms, memory in bytes, quality is the share of the reference kept on each path,
    flips are the share of positions with another likeliest token.
    """
    import pandas as pd

    columns = [
        "trial",
        *_METRICS,
        *(f"{name}_{p}" for name in _TIMES for p in ("p50", "p95", "p99", "samples")),
    ]
    columns += [*_QUALITY, *_FLIPS, "output_tokens_ratio", "noisy_rounds"]
    return pd.DataFrame([_row(t) for t in trials if t.status == "ok" and t.finalist], columns=columns)


def _row(trial: Trial) -> dict[str, Any]:
    row: dict[str, Any] = {"trial": trial.id}
    row |= {name: metric.median for name, metric in trial.metrics.items() if name in _METRICS}
    for name in _TIMES:
        if metric := trial.metrics.get(name):
            row |= {f"{name}_{p}": getattr(metric, p) for p in ("p50", "p95", "p99", "samples")}
    if quality := trial.quality:
        row |= {"quality_prefill": quality.prefill.ratio, "quality_decode": quality.decode.ratio}
        row |= {"flips_prefill": quality.prefill.token_flips, "flips_decode": quality.decode.token_flips}
    if taken := trial.measurements:
        row |= {"output_tokens_ratio": taken.output_tokens_ratio, "noisy_rounds": taken.noisy_rounds}
    return row


def check_results(
    trials: Sequence[Trial],
    *,
    rounds: int,
    min_quality: float,
    max_token_flips: float,
    champion_id: str | None,
    docs_dir: Path,
) -> GateResult:
    """Check the measured ``trials``, and the champion among them, if there is one, more strictly.

    Trials must carry their ``measurements``, also those read back from disk. Data Docs replace
    ``docs_dir``; ``GateResult.data_docs`` names their index relative to the directory above it.
    """
    champion = _champion_expectations(champion_id, min_quality, max_token_flips) if champion_id else []
    expectations = [*_completeness(rounds), *_plausibility(), *champion]
    context, results = _run("results", results_frame(trials), expectations, row_name="trial")
    _write_data_docs(context, docs_dir)
    return _judge(results, f"{docs_dir.name}/index.html", row_name="trial")


def _run(name: str, frame: pd.DataFrame, expectations: list[Any], row_name: str) -> tuple[Any, Sequence[Any]]:
    """The context, for its docs, and the outcome of each expectation."""
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    logging.getLogger("great_expectations").setLevel(logging.WARNING)
    import great_expectations as gx

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    table = context.data_sources.add_pandas("figures").add_dataframe_asset(name)
    suite = gx.ExpectationSuite(name=name, expectations=expectations)
    validation = gx.ValidationDefinition(
        name=name, data=table.add_batch_definition_whole_dataframe("all"), suite=context.suites.add(suite)
    )
    checkpoint = gx.Checkpoint(
        name="gate",
        validation_definitions=[context.validation_definitions.add(validation)],
        result_format={"result_format": "COMPLETE", "unexpected_index_column_names": [row_name]},
    )
    outcome = context.checkpoints.add(checkpoint).run(batch_parameters={"dataframe": frame})
    (validated,) = outcome.run_results.values()
    return context, validated.results


def _completeness(rounds: int) -> list[Any]:
    """NaN passes every range check and an empty table passes every column check, so these come first."""
    import great_expectations.expectations as gxe

    needed = (*_METRICS, *_QUALITY, *_FLIPS, "output_tokens_ratio")
    return [
        gxe.ExpectTableRowCountToBeBetween(min_value=1, description="at least one candidate was measured"),
        *(gxe.ExpectColumnValuesToNotBeNull(column=name, description=f"{name} is known") for name in needed),
        *(
            gxe.ExpectColumnValuesToBeBetween(
                column=f"{name}_samples",
                min_value=rounds,
                description=f"{name} has at least {rounds} samples",
            )
            for name in _TIMES
        ),
    ]


def _plausibility() -> list[Any]:
    import great_expectations.expectations as gxe

    return [
        *(
            gxe.ExpectColumnValuesToBeBetween(
                column=name,
                min_value=0,
                strict_min=True,
                max_value=_LARGEST[name],
                description=f"{name} is positive and finite",
            )
            for name in _METRICS
        ),
        *(
            gxe.ExpectColumnValuesToBeBetween(
                column=name, min_value=0, max_value=1.5, description=f"{name} lies between 0 and 1.5"
            )
            for name in _QUALITY
        ),
        *(
            gxe.ExpectColumnPairValuesAToBeGreaterThanB(
                column_A=f"{name}_{higher}",
                column_B=f"{name}_{lower}",
                or_equal=True,
                description=f"{name} has {lower} <= {higher}",
            )
            for name in _TIMES
            for lower, higher in (("p50", "p95"), ("p95", "p99"))
        ),
        gxe.ExpectColumnValuesToBeInSet(
            column="output_tokens_ratio", value_set=[1.0], description="every requested token was generated"
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="noisy_rounds",
            max_value=0,
            severity="warning",
            description="no round that counts was disturbed by processes, hypervisor, swapping or clock",
        ),
    ]


def _champion_expectations(champion_id: str, min_quality: float, max_token_flips: float) -> list[Any]:
    """A row condition that matches nothing passes, so the champion's presence is an expectation too."""
    import great_expectations.expectations as gxe
    from great_expectations.expectations.row_conditions import Column

    return [
        gxe.ExpectColumnDistinctValuesToContainSet(
            column="trial", value_set=[champion_id], description=f"the champion {champion_id} was measured"
        ),
        *(
            gxe.ExpectColumnValuesToBeBetween(
                column=name,
                min_value=min_quality,
                row_condition=Column("trial") == champion_id,
                description=f"the champion's {name} is at least {min_quality:g}",
            )
            for name in _QUALITY
        ),
        *(
            gxe.ExpectColumnValuesToBeBetween(
                column=name,
                max_value=max_token_flips,
                row_condition=Column("trial") == champion_id,
                description=f"the champion's {name} is at most {max_token_flips:g}",
            )
            for name in _FLIPS
        ),
    ]


def _write_data_docs(context: Any, docs_dir: Path) -> None:
    with directory_atomic(docs_dir) as output:
        site = {
            "class_name": "SiteBuilder",
            "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
            "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(output)},
        }
        context.add_data_docs_site("docs", site)
        context.build_data_docs(site_names=["docs"])


def _judge(results: Sequence[Any], data_docs: str | None, row_name: str) -> GateResult:
    sentences: dict[str, list[str]] = {"critical": [], "warning": []}
    for result in results:
        if not result.success:
            sentences[result.expectation_config.severity.value].append(_sentence(result, row_name))
    return GateResult(
        passed=not sentences["critical"],
        evaluated=len(results),
        failures=tuple(sentences["critical"]),
        warnings=tuple(sentences["warning"]),
        data_docs=data_docs,
    )


def _sentence(result: Any, row_name: str) -> str:
    """The expectation in words, then each row that breaks it with its values."""
    expected = f"expected: {result.expectation_config.description}"
    if rows := result.result.get("unexpected_index_list"):
        found = "; ".join(
            f"{row[row_name]} has "
            + ", ".join(f"{key} = {value:g}" for key, value in row.items() if key != row_name)
            for row in rows
        )
        return f"{expected}; but {found}"
    if (observed := result.result.get("observed_value")) is not None:
        return f"{expected}; but found {observed}"
    return expected


# ── a production window ──────────────────────────────────────────────────────────────────────────

_COUNTS = ("requests", "refused", "failed", "restarts", "cached_tokens")
_ROUNDING = 0.05
"""Prometheus extrapolates counts and sums of a window to its ends, each by itself."""


def window_frame(window: LatencyWindow) -> pd.DataFrame:
    """One row. Each histogram that has values gives its count, mean, p50, p95, and between what its buckets
    say that the mean lies; one without values gives no columns, since a window need not have answers."""
    import pandas as pd

    row: dict[str, Any] = {"window": window.end.isoformat(), "seconds": window.seconds}
    row |= {name: getattr(window, name) for name in _COUNTS}
    for name, histogram in _filled(window).items():
        least, most = _mean_by_buckets(histogram)
        row |= {f"{name}_count": histogram.count, f"{name}_mean": histogram.mean}
        row |= {f"{name}_p50": histogram.quantile(0.5), f"{name}_p95": histogram.quantile(0.95)}
        row |= {f"{name}_mean_least": least, f"{name}_mean_most": most}
    return pd.DataFrame([row])


def check_window(window: LatencyWindow) -> GateResult:
    """Check that the figures of ``window`` can be true: known, not negative, and in keeping with each other.

    Whether they are good is not asked here. The first call imports Great Expectations: seconds.
    """
    import great_expectations.expectations as gxe

    names = tuple(_filled(window))
    expectations = [
        gxe.ExpectTableRowCountToEqual(value=1, description="there is one window"),
        gxe.ExpectColumnValuesToBeBetween(
            column="seconds", min_value=0, strict_min=True, description="the window ends after it begins"
        ),
        *(
            gxe.ExpectColumnValuesToBeBetween(column=c, min_value=0, description=f"{c} is not negative")
            for c in _COUNTS
        ),
        *(expected for name in names for expected in _histogram_expectations(name)),
    ]
    _, results = _run("window", window_frame(window), expectations, row_name="window")
    return _judge(results, None, row_name="window")


def _filled(window: LatencyWindow) -> dict[str, Histogram]:
    everything = {
        **{f"{stage}_ms": histogram for stage, histogram in window.times_ms.items()},
        **{f"left_{stage}_ms": histogram for stage, histogram in window.left_ms.items()},
        "prompt_tokens": window.prompt_tokens,
        "output_tokens": window.output_tokens,
    }
    return {name: histogram for name, histogram in everything.items() if histogram.count}


def _mean_by_buckets(histogram: Histogram) -> tuple[float, float]:
    """The least and the greatest mean that the counts of the buckets allow."""
    edges = (0.0, *histogram.bounds, float("inf"))
    totals = [
        sum(count * edge for count, edge in zip(histogram.counts, ends, strict=True) if count)
        for ends in (edges[:-1], edges[1:])
    ]
    least, most = (total / histogram.count for total in totals)
    return least * (1 - _ROUNDING), most * (1 + _ROUNDING)


def _histogram_expectations(name: str) -> list[Any]:
    """NaN passes every comparison, so that the mean is known comes first."""
    import great_expectations.expectations as gxe

    def at_least(greater: str, less: str, told: str) -> Any:
        return gxe.ExpectColumnPairValuesAToBeGreaterThanB(
            column_A=f"{name}_{greater}", column_B=f"{name}_{less}", or_equal=True, description=told
        )

    return [
        gxe.ExpectColumnValuesToNotBeNull(column=f"{name}_mean", description=f"the mean of {name} is known"),
        gxe.ExpectColumnValuesToBeBetween(
            column=f"{name}_mean",
            min_value=0,
            max_value=_LARGEST["ttft_ms"],
            description=f"the mean of {name} is not negative, and finite",
        ),
        at_least("p95", "p50", f"{name} has p50 <= p95"),
        at_least("mean", "mean_least", f"the mean of {name} is no less than its buckets allow"),
        at_least("mean_most", "mean", f"the mean of {name} is no more than its buckets allow"),
    ]
