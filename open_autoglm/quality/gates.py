"""The gate over the results table: no champion is registered on figures that cannot be true.

Great Expectations checks the table and keeps its Data Docs. Whether a failure blocks is decided
here, by severity, because its own verdict also counts warnings.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_autoglm.files import directory_atomic
from open_autoglm.schemas import GateResult, Trial

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
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    logging.getLogger("great_expectations").setLevel(logging.WARNING)
    import great_expectations as gx

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    table = context.data_sources.add_pandas("study").add_dataframe_asset("results")
    champion = _champion_expectations(champion_id, min_quality, max_token_flips) if champion_id else []
    suite = gx.ExpectationSuite(
        name="results", expectations=[*_completeness(rounds), *_plausibility(), *champion]
    )
    validation = gx.ValidationDefinition(
        name="results",
        data=table.add_batch_definition_whole_dataframe("all"),
        suite=context.suites.add(suite),
    )
    checkpoint = gx.Checkpoint(
        name="gate",
        validation_definitions=[context.validation_definitions.add(validation)],
        result_format={"result_format": "COMPLETE", "unexpected_index_column_names": ["trial"]},
    )
    outcome = context.checkpoints.add(checkpoint).run(batch_parameters={"dataframe": results_frame(trials)})
    (validated,) = outcome.run_results.values()
    _write_data_docs(context, docs_dir)
    return _judge(validated.results, f"{docs_dir.name}/index.html")


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


def _judge(results: Sequence[Any], data_docs: str) -> GateResult:
    sentences: dict[str, list[str]] = {"critical": [], "warning": []}
    for result in results:
        if not result.success:
            sentences[result.expectation_config.severity.value].append(_sentence(result))
    return GateResult(
        passed=not sentences["critical"],
        evaluated=len(results),
        failures=tuple(sentences["critical"]),
        warnings=tuple(sentences["warning"]),
        data_docs=data_docs,
    )


def _sentence(result: Any) -> str:
    """The expectation in words, then each trial that breaks it with its values."""
    expected = f"expected: {result.expectation_config.description}"
    if rows := result.result.get("unexpected_index_list"):
        found = "; ".join(
            f"{row['trial']} has "
            + ", ".join(f"{key} = {value:g}" for key, value in row.items() if key != "trial")
            for row in rows
        )
        return f"{expected}; but {found}"
    if (observed := result.result.get("observed_value")) is not None:
        return f"{expected}; but found {observed}"
    return expected
