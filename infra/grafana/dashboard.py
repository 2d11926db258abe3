"""The dashboard of served models: ``python infra/grafana/dashboard.py`` writes dashboard.json beside this.

Import that into Grafana and choose the Prometheus of ``make up-monitoring``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).with_name("dashboard.json")

_WIDTH, _HEIGHT, _COLUMNS = 8, 8, 3
_SOURCE = {"type": "prometheus", "uid": "${source}"}
_MODEL = '{model_name="$model"}'


class Line(NamedTuple):
    """A PromQL expression and what its lines are called."""

    expression: str
    legend: str


class Panel(NamedTuple):
    title: str
    unit: str
    lines: Sequence[Line]


def _quantiles(histogram: str) -> list[Line]:
    def line(share: float) -> Line:
        buckets = f"sum by (le, role) (rate({histogram}_bucket{_MODEL}[$__rate_interval]))"
        return Line(f"histogram_quantile({share}, {buckets})", f"p{100 * share:g} {{{{role}}}}")

    return [line(share) for share in (0.5, 0.95, 0.99)]


def _promised(stage: str) -> Line:
    return Line(f'autoglm:slo_seconds:p95{{model_name="$model", stage="{stage}"}}', "promised p95")


def _rate(counter: str, by: str) -> str:
    return f"sum by ({by}) (rate({counter}{_MODEL}[$__rate_interval]))"


PANELS = (
    Panel(
        "Time to first token",
        "s",
        [*_quantiles("vllm:time_to_first_token_seconds"), _promised("ttft")],
    ),
    Panel(
        "Time per token after it",
        "s",
        [*_quantiles("vllm:request_time_per_output_token_seconds"), _promised("tpot")],
    ),
    Panel(
        "Request to last token",
        "s",
        [*_quantiles("vllm:e2e_request_latency_seconds"), _promised("e2e")],
    ),
    Panel(
        "Requests",
        "reqps",
        [
            Line(
                _rate("vllm:request_success_total", "role, finished_reason"), "{{role}} {{finished_reason}}"
            ),
            Line(_rate("autoglm_requests_refused_total", "role, reason"), "{{role}} refused: {{reason}}"),
        ],
    ),
    Panel(
        "Lost or refused",
        "percentunit",
        [
            Line(f"autoglm:errors:share5m{_MODEL}", "{{role}}"),
            Line(f"autoglm:slo_errors:share{_MODEL}", "promised"),
        ],
    ),
    Panel(
        "Tokens",
        "short",
        [
            Line(_rate("vllm:generation_tokens_total", "role"), "generated per s, {{role}}"),
            Line(_rate("vllm:prompt_tokens_total", "role"), "of prompts per s, {{role}}"),
            Line(_rate("vllm:prefix_cache_hits_total", "role"), "of these cached, {{role}}"),
        ],
    ),
    Panel(
        "Slots and queue",
        "short",
        [
            Line(f"vllm:num_requests_running{_MODEL}", "answered, {{role}} at {{instance}}"),
            Line(f"vllm:num_requests_waiting{_MODEL}", "wait, {{role}} at {{instance}}"),
        ],
    ),
    Panel(
        "Cache in use",
        "percentunit",
        [Line(f"vllm:kv_cache_usage_perc{_MODEL}", "{{role}} at {{instance}}")],
    ),
    Panel(
        "Memory",
        "bytes",
        [
            Line(f"autoglm_engine_memory_bytes{_MODEL}", "engine, {{role}} at {{instance}}"),
            Line(f"autoglm_memory_limit_bytes{_MODEL}", "limit of {{instance}}"),
        ],
    ),
    Panel(
        "Who answers",
        "short",
        [Line(f"autoglm_model_info{_MODEL}", "{{role}}: version {{model_version}}, {{bundle_digest}}")],
    ),
    Panel(
        "Engines started again",
        "short",
        [Line(f"autoglm_engine_restarts{_MODEL}", "{{role}} at {{instance}}")],
    ),
    Panel("Endpoints that answer", "short", [Line('up{job="autoglm"}', "{{instance}}")]),
)


def _drawn() -> Iterator[dict[str, Any]]:
    for place, panel in enumerate(PANELS):
        row, column = divmod(place, _COLUMNS)
        yield {
            "id": place + 1,
            "title": panel.title,
            "type": "timeseries",
            "datasource": _SOURCE,
            "gridPos": {"x": column * _WIDTH, "y": row * _HEIGHT, "w": _WIDTH, "h": _HEIGHT},
            "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
            "targets": [
                {
                    "refId": chr(ord("A") + number),
                    "datasource": _SOURCE,
                    "expr": line.expression,
                    "legendFormat": line.legend,
                }
                for number, line in enumerate(panel.lines)
            ],
        }


def dashboard() -> dict[str, Any]:
    source = {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    model = {
        "name": "model",
        "label": "Model",
        "type": "query",
        "datasource": _SOURCE,
        "query": "label_values(autoglm_model_info, model_name)",
        "refresh": 2,  # whenever the range of time is changed
    }
    return {
        "uid": "autoglm-served-models",
        "title": "Served models",
        "tags": ["open-autoglm"],
        "schemaVersion": 39,
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "30s",
        "templating": {"list": [source, model]},
        "panels": list(_drawn()),
    }


def rendered() -> str:
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(rendered())
