"""After how many requests an engine that takes longer to get ready has paid for it.

Getting ready is what happens once: building the files, loading them, compiling. It is set against the time
that each request saves, and only where the paired rounds show that it saves any.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from open_autoglm.objectives import Goal, duel
from open_autoglm.schemas import Trial

_E2E = Goal("e2e_ms", False, "time to the last token", "e2e_ms")


class Preparation(NamedTuple):
    """Seconds from the checkpoint to the first steady request."""

    build_s: float
    load_s: float
    compile_s: float

    @property
    def total_s(self) -> float:
        return self.build_s + self.load_s + self.compile_s


class BreakEven(NamedTuple):
    """One engine beside the one that is ready first."""

    trial_id: str
    preparation: Preparation
    against: str | None
    """The engine that is ready first; None for that one itself."""
    requests: int | None = None
    """So many requests make up for the longer preparation; None if they never do."""
    between: tuple[int, int] | None = None
    """The same at both ends of the 95 % interval of what a request saves."""


def preparation(trial: Trial) -> Preparation:
    """What it takes to get ``trial`` ready; it must have been screened and timed.

    Compilation is what the first request of the full length took beyond a steady one, so it includes the
    first touch of mapped weights. Files that were reused count what they took when they were built.
    """
    assert trial.screening is not None, "only what was screened has a first request"
    load_ms = trial.metrics["load_ms"].median if "load_ms" in trial.metrics else trial.screening.load_ms
    compile_ms = trial.screening.first_request_ms - trial.metrics["e2e_ms"].median
    return Preparation(
        build_s=trial.exported.build_s if trial.exported else 0.0,
        load_s=load_ms / 1e3,
        compile_s=max(0.0, compile_ms) / 1e3,
    )


def break_even(finalists: Sequence[Trial]) -> list[BreakEven]:
    """Each of ``finalists`` against the one that is ready first, in the order given.

    A request is one call of the whole batch. Those without a first look are left out.
    """
    able = [trial for trial in finalists if trial.screening is not None and "e2e_ms" in trial.metrics]
    if not able:
        return []
    first = min(able, key=lambda trial: preparation(trial).total_s)
    return [_against(trial, first) for trial in able]


def _against(trial: Trial, first: Trial) -> BreakEven:
    ours = preparation(trial)
    if trial.id == first.id:
        return BreakEven(trial.id, ours, None, 0)
    compared = duel(trial, first, _E2E)
    if compared is None or compared.interval[1] >= 0:
        return BreakEven(trial.id, ours, first.id)
    extra_ms = 1e3 * (ours.total_s - preparation(first).total_s)
    request_ms = first.metrics["e2e_ms"].median
    most, least = (math.ceil(extra_ms / (-end * request_ms)) for end in reversed(compared.interval))
    requests = math.ceil(extra_ms / (-compared.change * request_ms))
    return BreakEven(trial.id, ours, first.id, requests, (least, most))


def pays_words(entry: BreakEven) -> str:
    """'after 11 requests', 'ready first' or 'never: …'."""
    if entry.against is None:
        return "ready first"
    if entry.requests is None:
        return "never: no request is shown to be faster"
    if entry.requests <= 1:
        return "with the first request"
    return f"after {entry.requests:,} requests"


def sentence(entry: BreakEven, entries: Sequence[BreakEven]) -> str:
    """What ``entry`` costs before its first request, and when that is made up for."""
    seconds = f"{entry.preparation.total_s:.1f} s"
    if entry.against is None:
        others = "of all finalists" if len(entries) > 1 else "and is the only finalist"
        return f"{entry.trial_id} is ready first {others}, after {seconds}: it pays from the start."
    first = next(e for e in entries if e.trial_id == entry.against)
    extra = f"{entry.preparation.total_s - first.preparation.total_s:.1f} s more than {entry.against}"
    begin = f"{entry.trial_id} takes {seconds} to build, load and compile, {extra}"
    if entry.requests is None or entry.between is None:
        return f"{begin}, and no request is shown to be faster: it never pays for that."
    least, most = entry.between
    between = f" (between {least:,} and {most:,}, by the 95 % interval)" if most > least else ""
    return f"{begin}: it pays {pays_words(entry)}{between}."
