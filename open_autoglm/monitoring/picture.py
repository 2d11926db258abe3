"""The plot of a service's last windows, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from open_autoglm.figures import GOOD, MUTED, POOR, UNJUDGED, canvas, render
from open_autoglm.schemas import Judgement, Slo, Stage, WatchState

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PAINT: dict[WatchState, str] = {"ok": GOOD, "breached": POOR, "no_data": UNJUDGED}
_STAGES: tuple[Stage, ...] = ("ttft", "tpot")


def watch_figure(judgements: Sequence[Judgement], slo: Slo) -> bytes:
    """TTFT and TPOT of each window: a dot for the p95, blue where all was well and orange at a breach, a bar
    for the mean. A dashed line is the promise, and a gap is a time of which nothing is known."""
    figure, panels = canvas(9.0, 3.2, "png", columns=2, one_scale=False)
    limits = {"ttft": slo.ttft_p95_ms, "tpot": slo.tpot_p95_ms}
    for axes, stage in zip(panels, _STAGES, strict=True):
        _draw(axes, judgements, stage)
        if (limit_ms := limits[stage]) is not None:
            axes.axhline(limit_ms, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_ylim(bottom=0)
        axes.set_ylabel(f"{stage.upper()} ms")
        axes.xaxis_date("UTC")
        axes.tick_params(axis="x", labelrotation=30)
    return render(figure, "windows", "png")


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
