"""Plots of the benchmarks that compare, as PNG or SVG, without pyplot: it keeps global state."""

from __future__ import annotations

import io
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

from benchmarks.growth_points import Curve, Figures, Point
from benchmarks.peer_table import Row
from benchmarks.serve_table import Figure as ServeFigure
from benchmarks.serve_table import Row as ServeRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, OURS, THEIRS = "#1b2430", "#2f74e0", "#808b99"
POINTS_PER_MB = 0.5
"""Area of a mark, in square points per megabyte of peak memory."""


def peers_plot(rows: Sequence[Row], champion: str, form: str) -> bytes:
    """TTFT against decode speed with 95 % intervals; a mark's area is the peak memory."""
    figure, axes = canvas(7.6, 4.6)
    for row in rows:
        if row.first is None or not row.counted:
            continue
        color = OURS if row.ours else THEIRS
        ttft, speed = row.ttft_ms, row.tokens_per_s
        axes.errorbar(
            ttft.median,
            speed.median,
            xerr=[[ttft.median - ttft.interval[0]], [ttft.interval[1] - ttft.median]],
            yerr=[[speed.median - speed.interval[0]], [speed.interval[1] - speed.median]],
            color=color,
            linewidth=1.2,
        )
        area = POINTS_PER_MB * row.memory_bytes / 1e6
        marker = "*" if row.name == champion else "o"
        axes.scatter(ttft.median, speed.median, s=area, color=color, alpha=0.45, marker=marker, linewidths=0)
        name = row.name.removeprefix("onnxruntime-") if row.ours else row.name
        below = row.ours and row.name != champion  # close to the champion
        axes.annotate(
            f"{name}, {row.memory_bytes / 1e6:.0f} MB",
            (ttft.median, speed.median),
            xytext=(8, -5 if below else 5),
            va="top" if below else "bottom",
            textcoords="offset points",
            fontsize=8,
            color=INK,
        )
    axes.set_xlabel("time to the first token, ms (less is better)")
    axes.set_ylabel("decode, tokens/s (more is better)")
    axes.margins(0.18)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    return render(figure, form)


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = figure.subplots()
    calm(axes)
    return figure, axes


def calm(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    axes.grid(True, alpha=0.25)
    axes.set_axisbelow(True)


def render(figure: Figure, form: str) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format=form, dpi=110, metadata={"Date": None} if form == "svg" else None)
    return file.getvalue()


# ── growth ───────────────────────────────────────────────────────────────────────────────────────

CURVES: tuple[tuple[Curve, str], ...] = (
    ("prompt", "prompt tokens"),
    ("batch", "prompts per batch"),
    ("layers", "layers"),
)
COLORS = ("#2f74e0", "#d9730d", "#808b99")
SERVERS = (*COLORS, "#2a9d62", "#9b51c4", "#c0392b")


def growth_plot(points: Sequence[Point], form: str) -> bytes:
    """TTFT, TPOT and peak memory along each curve; dashed: the least time the host allows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8), layout="constrained", facecolor="white")
    grid = figure.subplots(3, len(CURVES), squeeze=False, sharey="row")
    for column, (curve, words) in enumerate(CURVES):
        for row, label in enumerate(("TTFT, ms", "TPOT, ms", "peak RSS, MB")):
            axes = grid[row][column]
            calm(axes)
            axes.set(xscale="log", yscale="log")
            _draw_curves(axes, [point for point in points if curve in point.place.curves], curve, row)
            axes.set_xlabel(words)
            if column == 0:
                axes.set_ylabel(label)
    handles, labels = grid[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(
            handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=9
        )
    return render(figure, form)


def _draw_curves(axes: Axes, points: Sequence[Point], curve: Curve, row: int) -> None:
    names = sorted({point.candidate for point in points})
    places = sorted({point.place.along(curve) for point in points})
    axes.set_xticks(places, [f"{place:,}" for place in places])
    axes.xaxis.minorticks_off()
    for color, name in zip(COLORS, names, strict=False):
        own = [(p.place.along(curve), p.figures) for p in points if p.candidate == name and p.figures]
        own.sort(key=lambda point: point[0])
        at = [value for value, _ in own]
        heights = [_heights(figures)[row] for _, figures in own]
        axes.plot(at, [found for found, _ in heights], marker="o", markersize=4, color=color, label=name)
        if row < 2:  # memory has no roofline
            axes.plot(at, [least for _, least in heights], linestyle="--", linewidth=1, color=color)


def _heights(figures: Figures) -> tuple[tuple[float, float], ...]:
    """(found, least) of TTFT, TPOT and memory."""
    return (
        (figures.ttft_ms.median, figures.bounds.ttft_ms),
        (figures.tpot_ms.median, figures.bounds.tpot_ms),
        (figures.footprint.peak_rss_bytes / 1e6, 0.0),
    )


# ── servers ──────────────────────────────────────────────────────────────────────────────────────


def serve_plot(rows: Sequence[ServeRow], form: str) -> bytes:
    """Tokens/s and mean latency over the streams, a line for each server; bars: from least to most heat."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    timed = [row for row in rows if row.kind == "unique" and row.rounds]
    names = list(dict.fromkeys(row.arm for row in timed))
    shown: tuple[tuple[Axes, ServeFigure, str], ...] = (
        (left, "tokens_per_s", "tokens/s"),
        (right, "latency_ms", "mean latency, ms"),
    )
    for axes, name, label in shown:
        calm(axes)
        for color, arm in zip(SERVERS, names, strict=False):
            own = sorted((row for row in timed if row.arm == arm), key=lambda row: row.streams)
            values = [[round_.figures[name] for round_ in row.rounds] for row in own]
            middle = [median(found) for found in values]
            spread = [
                [at - min(found) for at, found in zip(middle, values, strict=True)],
                [max(found) - at for at, found in zip(middle, values, strict=True)],
            ]
            axes.errorbar(
                [row.streams for row in own],
                middle,
                yerr=spread,
                color=color,
                marker="o",
                markersize=4,
                capsize=2,
                label=own[0].label,
            )
        axes.set_xlabel("streams")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
    handles, labels = left.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return render(figure, form)
