"""What is done about a breach, once its cause is known."""

from __future__ import annotations

from datetime import datetime

from open_autoglm.monitoring.config import WatchSpec
from open_autoglm.schemas import Canary, Cause, LatencyWindow, OptimizeSpec, Reoptimization

CURABLE = ("mix", "engine")
"""Another configuration may help. More callers or a busy host want more machines, or less beside them."""

_HOUR_S = 3600

LOOK_AGAIN_S = 3600.0
"""After a cause that was only told. By then it may be another one, and a probe costs half a minute."""


def is_curable(cause: Cause) -> bool:
    return cause.kind in CURABLE


def is_final(cause: Cause) -> bool:
    """Whether asking again tells no more: an endpoint that was just starting may answer the next time."""
    return cause.kind != "unknown" or bool(cause.evidence)


def reoptimization(spec: WatchSpec, window: LatencyWindow, cause: Cause, now: datetime) -> Reoptimization:
    """The request that is made anew, with what callers ask for now."""
    return Reoptimization(
        spec=observed(spec.optimize, window, now).model_copy(update={"register_as": spec.service}),
        highest_rung=spec.action.highest_rung,
        canary=Canary(weight_percent=spec.action.canary_weight, shadow_percent=spec.action.shadow_weight),
        require_approval=spec.action.require_approval,
        renew=cause.kind == "engine",
        reason=f"{cause.kind}: {cause.told}",
    )


def observed(spec: OptimizeSpec, window: LatencyWindow, now: datetime) -> OptimizeSpec:
    """``spec`` with the lengths, and the rate if it has one, of the window's requests.

    Its seed is the hour: what was exported is used again, but what was measured before the breach is not.
    """
    changes: dict[str, object] = {"seed": int(now.timestamp()) // _HOUR_S, "length_mix": None}
    if (prompt := window.prompt_tokens.mean) is not None:
        changes["prompt_tokens"] = max(1, round(prompt))
    if (output := window.output_tokens.mean) is not None:
        changes["output_tokens"] = max(2, round(output))
    if spec.scenario == "server" and window.requests:
        changes["request_rate_per_s"] = window.requests / window.seconds
    return spec.model_copy(update=changes)


def once_key(service: str, now: datetime) -> str:
    """The same for whoever finds the same breach within the hour: a poll, an event, an alert."""
    return f"reoptimize-{service}-{now:%Y%m%d%H}"
