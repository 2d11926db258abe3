"""What the engines for NVIDIA GPUs share: what a GPU of some generation cannot do."""

from __future__ import annotations

from open_autoglm.schemas import Candidate, Hardware

BF16_SINCE = (8, 0)
"""Ampere; before it there are no tensor cores for bf16."""
FP8_SINCE = (8, 9)
"""Ada; Hopper is (9, 0)."""


def older_than(hardware: Hardware, needed: tuple[int, int], for_what: str) -> str | None:
    """Why the first GPU cannot do it: its compute capability is below ``needed``. None if it can, or if
    there is no GPU or it does not tell, since then something else says so."""
    told = hardware.gpus[0].compute_capability if hardware.gpus else None
    if told is None:
        return None
    major, _, minor = told.partition(".")
    if (int(major), int(minor or 0)) >= needed:
        return None
    return f"{for_what} needs compute capability {needed[0]}.{needed[1]}; {hardware.gpus[0].name} has {told}"


def vetoed_if_too_old(candidate: Candidate, hardware: Hardware) -> Candidate:
    """``candidate``, vetoed on a GPU without the arithmetic of its precision or its knob ``compute``."""
    needed = {"bf16": BF16_SINCE, "fp8": FP8_SINCE}
    wanted = dict.fromkeys((str(candidate.precision), str(candidate.knobs.get("compute", ""))))
    reasons = [older_than(hardware, needed[name], name) for name in wanted if name in needed]
    reason = next((reason for reason in reasons if reason is not None), None)
    return candidate if reason is None else candidate.vetoed(reason)
