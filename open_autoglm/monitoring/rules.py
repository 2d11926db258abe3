"""What was promised, as recording rules of Prometheus, whose alerts then compare with it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from open_autoglm.files import write_atomic
from open_autoglm.schemas import Slo, Stage


def slo_rules(service: str, slo: Slo) -> str:
    """A rule file, in JSON, which is YAML too."""
    promised: dict[Stage, float | None] = {
        "ttft": slo.ttft_p95_ms,
        "tpot": slo.tpot_p95_ms,
        "e2e": slo.e2e_p95_ms,
    }

    rules = [
        _rule("autoglm:slo_seconds:p95", limit_ms / 1e3, model_name=service, stage=stage)
        for stage, limit_ms in promised.items()
        if limit_ms is not None
    ]
    rules.append(_rule("autoglm:slo_errors:share", slo.error_fraction, model_name=service))
    return json.dumps({"groups": [{"name": f"autoglm-slo-{service}", "rules": rules}]}, indent=1)


def _rule(name: str, value: float, **labels: str) -> dict[str, Any]:
    """A series that always has that value."""
    return {"record": name, "expr": f"vector({value!r})", "labels": labels}


def write_slo(home: Path, service: str, slo: Slo) -> Path:
    """Where a Prometheus of ``make up-monitoring`` reads it when it is told to (SIGHUP)."""
    name = hashlib.sha256(service.encode()).hexdigest()[:16]  # a public name may hold slashes
    path = home / "prometheus" / "slo" / f"{name}.json"
    write_atomic(path, slo_rules(service, slo))
    return path
