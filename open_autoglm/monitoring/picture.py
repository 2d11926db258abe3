"""The plot of a service's last windows, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from open_autoglm.figures import GOOD, MUTED, POOR, UNJUDGED, canvas, render
from open_autoglm.schemas import Judgement, Slo, Stage, WatchState

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PAINT: dict[WatchState, str] = {"ok": GOOD, "breached": POOR, "no_data": UNJUDGED}
_STAGES: tuple[Stage, ...] = ("ttft", "tpot", "e2e")
_MARGIN = 0.04
"""Of the time that is drawn, at either end."""


def watch_figure(judgements: Sequence[Judgement], slo: Slo) -> bytes:
    """As `draw_windows` has it."""
    return render(draw_windows(judgements, slo), "windows", "png")


def draw_windows(judgements: Sequence[Judgement], slo: Slo) -> Figure:
    """TTFT, TPOT and the whole answer of each window: a dot for the p95, blue where all was well and orange
    at a breach, a bar for the mean. A dashed line is the promise; a gap is a time of which nothing is known.
    """
    figure, panels = canvas(11.0, 3.2, "png", columns=len(_STAGES), one_scale=False)
    limits = {"ttft": slo.ttft_p95_ms, "tpot": slo.tpot_p95_ms, "e2e": slo.e2e_p95_ms}
    for axes, stage in zip(panels, _STAGES, strict=True):
        _draw(axes, judgements, stage)
        if (limit_ms := limits[stage]) is not None:
            axes.axhline(limit_ms, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_ylim(bottom=0)
        axes.set_ylabel(f"{stage.upper()} ms")
        _show_times(axes, judgements)
    return figure


def _show_times(axes: Axes, judgements: Sequence[Judgement]) -> None:
    """From the first window to the last look, which is hours, or minutes: left to itself, a single window is
    drawn amid years."""
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, date2num

    axes.xaxis_date("UTC")
    locator = AutoDateLocator(tz="UTC", minticks=3, maxticks=8)  # type: ignore[no-untyped-call]
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator, tz="UTC"))  # type: ignore[no-untyped-call]
    begins = [judgement.window.begin for judgement in judgements if judgement.window]
    if begins:
        begin, end = (date2num(moment) for moment in (min(begins), judgements[-1].at))  # type: ignore[no-untyped-call]
        margin = _MARGIN * (end - begin)
        axes.set_xlim(begin - margin, end + margin)


def _draw(axes: Axes, judgements: Sequence[Judgement], stage: Stage) -> None:
    from matplotlib.dates import date2num

    for judgement in judgements:
        times = judgement.window.times_ms.get(stage) if judgement.window else None
        if times is None or (p95 := times.quantile(0.95)) is None or times.mean is None:
            continue
        at = date2num(judgement.at)  # type: ignore[no-untyped-call]
        paint = _PAINT[judgement.state]
        axes.plot(at, p95, "o", color=paint, markersize=5)
        axes.plot(at, times.mean, "_", color=paint, markersize=6)
