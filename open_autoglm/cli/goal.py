"""A whole request in one line: ``minimise ttft_p95 subject to quality >= 0.99, rss <= 1GiB``."""

from __future__ import annotations

import re
from typing import Any

from open_autoglm.errors import UserError

EXAMPLE = "minimise ttft_p95 subject to quality >= 0.99, rss <= 1GiB"

_GOAL = re.compile(r"(minimi[sz]e|maximi[sz]e)\s+(\w+)(?:\s+subject\s+to\s+(.+))?", re.IGNORECASE)
_LIMIT = re.compile(r"(\w+)\s*(<=|>=|≤|≥)\s*(\S+)")
_PER_CENT = re.compile(r"(\d+(?:\.\d+)?)%")
_SHARE = re.compile(r"(\d+(?:\.\d+)?)(%?)")
_OBJECTIVES = {
    "minimise": {
        "latency": "latency", "e2e": "latency", "e2e_p95": "e2e_p95", "ttft": "ttft", "ttft_p95": "ttft_p95",
        "tpot": "tpot", "memory": "memory", "rss": "memory",
    },
    "maximise": {"throughput": "throughput", "goodput": "goodput"},
}  # fmt: skip
_LIMITS = {
    "ttft": "max_latency", "ttft_p95": "max_latency", "latency": "max_latency", "tpot": "max_tpot",
    "rss": "max_memory", "memory": "max_memory", "quality": "min_quality",
    "flips": "max_token_flips",
}  # fmt: skip


def parse_goal(text: str) -> dict[str, Any]:
    """The fields of an OptimizeSpec that ``text`` sets. Raises UserError with what is not understood."""
    match = _GOAL.fullmatch(text.strip())
    if match is None:
        raise UserError(f"--goal: {text!r} is not a goal; write it like: {EXAMPLE}")
    verb, name, limits = match[1].lower().replace("z", "s"), match[2].lower(), match[3] or ""
    known = _OBJECTIVES[verb]
    if name not in known:
        raise UserError(f"--goal: cannot {verb} {name!r}; it can {verb} {', '.join(known)}")
    fields: dict[str, Any] = {"objective": known[name]}
    for part in filter(None, (part.strip() for part in limits.split(","))):
        field, value = _parse_limit(part)
        if field in fields:
            raise UserError(f"--goal: {part!r} limits what is limited already; give each limit once")
        fields[field] = value
    return fields


def parse_share(text: str, flag: str) -> float:
    """``99%`` or ``0.99``. Raises UserError naming ``flag`` unless it is above 0 and at most 1."""
    match = _SHARE.fullmatch(text.strip())
    share = float(match[1]) / (100 if match[2] else 1) if match else 0.0
    if not 0 < share <= 1:
        raise UserError(f"{flag}: {text!r} is not a share; write it like 99% or 0.99")
    return share


def _parse_limit(part: str) -> tuple[str, Any]:
    match = _LIMIT.fullmatch(part)
    if match is None or match[1].lower() not in _LIMITS:
        raise UserError(
            f"--goal: {part!r} is not a limit; write name <= value with one of {', '.join(_LIMITS)}"
        )
    field = _LIMITS[match[1].lower()]
    wanted = (">=", "≥") if field == "min_quality" else ("<=", "≤")
    if match[2] not in wanted:
        raise UserError(f"--goal: {part!r} is the wrong way round; {match[1]} takes {wanted[0]}")
    share = _PER_CENT.fullmatch(match[3]) if field == "min_quality" else None
    return field, float(share[1]) / 100 if share else match[3]
