"""What the engines for NVIDIA GPUs share: what a GPU of some generation cannot do."""

from __future__ import annotations

from open_autoglm.schemas import Hardware

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
