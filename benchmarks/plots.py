"""Plots of the benchmarks that compare, as PNG or SVG, without pyplot: it keeps global state."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from benchmarks.peer_table import Row

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
        label = f"{row.name}\n{row.memory_bytes / 1e6:.0f} MB"
        at = (ttft.median, speed.median)
        axes.annotate(label, at, xytext=(8, 6), textcoords="offset points", fontsize=8, color=INK)
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
