"""The plots of a study, as PNG for Prefect and MLflow or as SVG that follows the page's colours.

Figures are made with ``matplotlib.figure.Figure``: pyplot keeps global state and is not for threads.
Blue keeps the quality asked for, orange does not, grey was not judged; hollow misses a limit, and a small
hollow grey mark is a rough estimate.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from open_autoglm.evidence import noise_of, phase_shares
from open_autoglm.readout import METRICS, baseline, champion, measured, number, role
from open_autoglm.schemas import Comparison, Study, Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Form = Literal["png", "svg"]

INK = "#1b2430"
PAPER = "#fefefe"
MUTED = "#808b99"
GOOD, POOR, UNJUDGED = "#2f74e0", "#d9730d", "#808b99"


def pareto_figure(study: Study, form: Form = "png") -> bytes:
    """Time to the last token against peak memory; a halo marks the Pareto front, a dashed line a limit."""
    figure, [axes] = canvas(7.6, 4.3, form)
    placed = [(trial, point) for trial in study.trials if (point := _time_and_memory(trial)) is not None]
    if not placed:
        return render(_say_empty(figure, [axes]), "pareto", form)
    shown = _within_reach(placed)
    for trial, (x, y) in shown:
        axes.plot(x, y, **_mark(study, trial), linestyle="none", zorder=3)
        if trial.id in study.pareto:
            axes.plot(x, y, **_HALO)
    if study.spec.max_memory:
        limit = study.spec.max_memory.bytes / 2**20
        axes.axhline(limit, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.text(0.995, limit, f"limit {study.spec.max_memory}", transform=axes.get_yaxis_transform(),
                  ha="right", va="bottom", fontsize=8, color=MUTED)  # fmt: skip
    axes.set_xlabel(f"time to the last of {study.spec.output_tokens} tokens, ms (less is better)")
    axes.set_ylabel("peak memory, MiB (less is better)")
    points = [point for _, point in shown]
    axes.set_xlim(0, max(x for x, _ in points) * 1.1)
    axes.set_ylim(0, max(y for _, y in points) * 1.12)
    _name_points(figure, axes, points, [f"{'' if trial.metrics else '~ '}{trial.id}" for trial, _ in shown])
    _legend(axes)
    return render(figure, "pareto", form)


def _time_and_memory(trial: Trial) -> Point | None:
    """(ms to the last token, peak MiB): as timed, or as the screening estimates it."""
    if trial.status not in ("ok", "stopped") or trial.screening is None:
        return None
    timed_e2e = trial.metrics.get("e2e_ms")
    e2e_ms = timed_e2e.median if timed_e2e else trial.screening.estimated_e2e_ms
    return e2e_ms, trial.screening.footprint.peak_rss_bytes / 2**20


def _within_reach(placed: list[tuple[Trial, Point]]) -> list[tuple[Trial, Point]]:
    """Without what was only screened and lies so far off that all others would lie on one spot."""
    times = [x for trial, (x, _) in placed if trial.metrics]
    reach = 2 * max(times) if times else float("inf")
    return [(trial, point) for trial, point in placed if trial.metrics or point[0] <= reach]


def latency_figure(study: Study, form: Form = "png") -> bytes:
    """Medians of TTFT and TPOT with their 95 % intervals, one row per engine."""
    return _rows(study, form, "latency", _draw_interval)


def samples_figure(study: Study, form: Form = "png") -> bytes:
    """Every raw sample of TTFT and TPOT, one row per engine.

    Orange: disturbed. Hollow: run again, so it counts in no figure.
    """
    return _rows(study, form, "samples", _draw_samples)


def roofline_figure(study: Study, form: Form = "png") -> bytes:
    """What the champion and the baseline attain in each phase, under the host's measured roofs."""
    figure, [axes] = canvas(7.6, 3.9, form)
    shown = [t for t in (champion(study), baseline(study)) if t and t.metrics] or measured(study)[:2]
    points = [(t, share) for t in shown for share in phase_shares(study, t)]
    if not points:
        return render(_say_empty(figure, [axes]), "roofline", form)
    at = [(share.bound.flops / share.bound.bytes_moved, share.flops_per_s / 1e9) for _, share in points]
    _draw_roofs(study, axes, reach=max(x for x, _ in at) * 25, start=min(x for x, _ in at) / 3)
    for (trial, share), (x, y) in zip(points, at, strict=True):
        marker = "o" if share.bound.phase == "prefill" else "v"
        color = GOOD if trial.id == study.champion else MUTED
        axes.plot(x, y, marker=marker, markersize=8, color=color, linestyle="none", zorder=3)
    axes.set_xlabel("arithmetic intensity, FLOP per byte moved")
    axes.set_ylabel("attained, GFLOP/s")
    _name_points(figure, axes, at, [f"{t.id}, {share.bound.phase}" for t, share in points])
    return render(figure, "roofline", form)


def comparisons_figure(study: Study, form: Form = "png") -> bytes:
    """Each finalist's paired change against the champion, with its interval; the band is the noise floor."""
    comparisons = study.comparisons
    figure, [axes] = canvas(7.6, 1.1 + 0.4 * max(len(comparisons), 2), form)
    if not comparisons:
        return render(_say_empty(figure, [axes], "nothing was compared"), "comparisons", form)
    if (noise := noise_of(study)) is not None:
        quicker = 1 / (1 + noise.floor) - 1
        axes.axvspan(100 * quicker, 100 * noise.floor, color=MUTED, alpha=0.25, linewidth=0)
    axes.axvline(0, color=INK, linewidth=1)
    for row, comparison in enumerate(comparisons):
        _draw_comparison(axes, row, comparison)
    metric = METRICS[comparisons[0].metric]
    axes.set_xlabel(f"{metric.long.lower()} against {comparisons[0].against}, % (right is slower)")
    axes.set_yticks(range(len(comparisons)), [c.candidate for c in comparisons])
    axes.set_ylim(len(comparisons) - 0.5, -0.5)
    _scale_changes(axes, [100 * end for c in comparisons for end in c.interval])
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    return render(figure, "comparisons", form)


def _scale_changes(axes: Axes, ends: Sequence[float]) -> None:
    """Linear up to 5 %, where it is decided who is told apart, and logarithmic beyond."""
    axes.set_xscale("symlog", linthresh=5)
    left, right = 1.4 * min(-5, *ends), 1.4 * max(5, *ends)
    axes.set_xlim(left, right)
    steps = (0, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
    axes.set_xticks([tick for step in steps for tick in {step, -step} if left <= tick <= right])
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:+g}" if x else "0")
    axes.minorticks_off()


def _draw_comparison(axes: Axes, row: int, comparison: Comparison) -> None:
    low, high = (100 * end for end in comparison.interval)
    color = MUTED if not comparison.clear else POOR if comparison.change > 0 else GOOD
    axes.hlines(row, low, high, color=color, linewidth=5, alpha=0.45)
    axes.plot(100 * comparison.change, row, marker="o", markersize=6, color=color, linestyle="none")
    axes.annotate(f"{100 * comparison.change:+.1f} %", (100 * comparison.change, row), xytext=(0, 8),
                  textcoords="offset points", ha="center", fontsize=8, color=INK)  # fmt: skip


# ── drawing ──────────────────────────────────────────────────────────────────────────────────────

_HALO: dict[str, Any] = {"marker": "o", "markersize": 20, "color": GOOD, "alpha": 0.2, "markeredgewidth": 0}
_MARKERS = {
    "champion": ("*", 15), "incumbent": ("P", 9), "baseline": ("s", 8), "reference": ("D", 7), "": ("o", 8),
}  # fmt: skip


def canvas(
    width: float, height: float, form: Form, columns: int = 1, *, one_scale: bool = True
) -> tuple[Figure, list[Axes]]:
    """An empty figure, and its panels from left to right."""
    from matplotlib.figure import Figure

    paper = "none" if form == "svg" else "white"
    figure = Figure(figsize=(width, height), layout="constrained", facecolor=paper)
    panels = list(figure.subplots(1, columns, sharey=one_scale, squeeze=False)[0])
    for axes in panels:
        _calm(axes)
    return figure, panels


def _calm(axes: Axes) -> None:
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=INK, labelsize=9, color=MUTED)
    axes.xaxis.label.set(color=INK, fontsize=9)
    axes.yaxis.label.set(color=INK, fontsize=9)
    axes.grid(True, color=MUTED, alpha=0.18, linewidth=0.8)
    axes.set_axisbelow(True)


def _paint(study: Study, trial: Trial) -> dict[str, Any]:
    """Colour by quality, filled if feasible."""
    if trial.quality is None:
        color = UNJUDGED
    else:
        color = GOOD if trial.quality.ratio >= study.spec.min_quality else POOR
    return {"color": color, "markerfacecolor": color if trial.feasible else "none", "markeredgewidth": 1.6}


def _mark(study: Study, trial: Trial) -> dict[str, Any]:
    """A finalist as `_paint` has it; smaller if it left in the race; small, grey, hollow if only screened."""
    marker, size = _MARKERS[role(study, trial)]
    if not trial.metrics:
        return {"marker": marker, "markersize": 5, "color": MUTED, "markerfacecolor": "none"}
    return {"marker": marker, "markersize": size if trial.finalist else 6, **_paint(study, trial)}


def _legend(axes: Axes) -> None:
    from matplotlib.lines import Line2D

    def key(label: str, size: int = 7, **style: Any) -> Line2D:
        return Line2D([], [], linestyle="none", markersize=size, markeredgewidth=1.6, label=label, **style)

    keys = [
        key("keeps the quality", marker="o", color=GOOD),
        key("loses quality", marker="o", color=POOR),
        key("misses a limit", marker="o", color=MUTED, markerfacecolor="none"),
        Line2D([], [], **{**_HALO, "markersize": 11}, linestyle="none", label="Pareto front"),
        key("champion", marker="*", color=GOOD),
        key("baseline", marker="s", color=MUTED, markerfacecolor="none"),
        key("~ estimate", size=5, marker="o", color=MUTED, markerfacecolor="none"),
    ]
    axes.figure.legend(handles=keys, loc="outside upper center", ncols=7, fontsize=8, frameon=False,
                       labelcolor=INK, handletextpad=0.1, columnspacing=0.9)  # fmt: skip


Point = tuple[float, float]


def _name_points(figure: Figure, axes: Axes, points: Sequence[Point], names: Sequence[str]) -> None:
    """Write each name beside its point, on the first side where it hides nothing."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    around = 7 * figure.dpi / 72
    marks = [Bbox.from_bounds(x - around, y - around, 2 * around, 2 * around) for x, y in
             axes.transData.transform(points)]  # fmt: skip
    taken = marks + [text.get_window_extent() for text in axes.texts]
    room = axes.get_window_extent()
    sides = ((12, 0, "left"), (-12, 0, "right"), (0, 14, "center"), (0, -14, "center"),
             (9, 12, "left"), (9, -12, "left"), (-9, 12, "right"), (-9, -12, "right"))  # fmt: skip
    style: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 8, "color": INK}
    behind = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.8, "pad": 1}
    for point, name in zip(points, names, strict=True):
        label = axes.annotate(name, point, xytext=(0, 0), bbox=behind, zorder=4, **style)
        label.set_in_layout(False)
        for dx, dy, align in sides:
            label.set(position=(dx, dy), horizontalalignment=align)
            extent = label.get_window_extent()
            inside = room.x0 <= extent.x0 and extent.x1 <= room.x1
            if inside and not any(extent.overlaps(other) for other in taken):
                break
        taken.append(label.get_window_extent())


Row = Callable[["Axes", int, str, Study, Trial], None]


def _rows(study: Study, form: Form, name: str, draw: Row) -> bytes:
    """TTFT on the left, TPOT on the right, one row per engine, best on top."""
    trials = [t for t in measured(study) if {"ttft_ms", "tpot_ms"} <= t.metrics.keys()]
    figure, panels = canvas(7.6, 1.0 + 0.42 * max(len(trials), 3), form, columns=2)
    if not trials:
        return render(_say_empty(figure, panels), name, form)
    for axes, metric in zip(panels, ("ttft_ms", "tpot_ms"), strict=True):
        for row, trial in enumerate(trials):
            draw(axes, row, metric, study, trial)
        axes.set_xlabel(f"{METRICS[metric].long.lower()}, ms (less is better)")
        axes.set_xlim(0, 1.12 * max(ms for t in trials for ms, _, _ in _dots(t, metric)))
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    panels[0].set_yticks(range(len(trials)), [t.id for t in trials])
    panels[0].set_ylim(len(trials) - 0.5, -0.5)
    return render(figure, name, form)


def _draw_interval(axes: Axes, row: int, name: str, study: Study, trial: Trial) -> None:
    metric, paint = trial.metrics[name], _paint(study, trial)
    low, high = metric.interval
    axes.hlines(row, 0, metric.median, color=MUTED, linewidth=1, alpha=0.35)
    axes.hlines(row, low, high, color=paint["color"], linewidth=5, alpha=0.35)
    axes.plot(metric.median, row, marker="o", markersize=7, linestyle="none", **paint)
    axes.annotate(number(metric.median), (high, row), xytext=(7, 0), textcoords="offset points",
                  va="center", fontsize=8, color=INK)  # fmt: skip


def _draw_samples(axes: Axes, row: int, name: str, _study: Study, trial: Trial) -> None:
    """Samples lie in the order they were taken, top to bottom, so a drift shows as a slant."""
    from matplotlib.colors import to_rgba

    dots = _dots(trial, name)
    heights = [row - 0.3 + 0.6 * (index + 0.5) / len(dots) for index in range(len(dots))]
    edges = [to_rgba(color, 0.75) for _, color, _ in dots]
    faces = [to_rgba(color, 0.75 * filled) for _, color, filled in dots]
    axes.scatter([ms for ms, _, _ in dots], heights, s=16, c=faces, edgecolors=edges, linewidths=0.8)
    axes.vlines(trial.metrics[name].median, row - 0.36, row + 0.36, color=INK, linewidth=1.2)


def _dots(trial: Trial, name: str) -> list[tuple[float, str, bool]]:
    """(ms, colour, whether it counts) of every request, or of the metric's values if the rounds are gone."""
    if trial.measurements is None:
        return [(ms, GOOD, True) for ms in trial.metrics[name].values]
    return [
        (ms, POOR if turn.conditions.disturbances else GOOD, not turn.repeated)
        for turn in trial.measurements.rounds
        for ms in getattr(turn, name)
    ]


def _draw_roofs(study: Study, axes: Axes, *, start: float, reach: float) -> None:
    host = study.analysis.hardware
    bandwidth = host.read_bandwidth_bytes_per_s
    peaks = {"fp32": host.matmul_fp32_flops_per_s, "bf16": host.matmul_bf16_flops_per_s,
             "int8": host.matmul_int8_ops_per_s}  # fmt: skip
    known = {name: peak for name, peak in peaks.items() if peak}
    axes.set(xscale="log", yscale="log")
    ridge = max(known.values()) / bandwidth
    axes.plot([start, ridge], [start * bandwidth / 1e9, ridge * bandwidth / 1e9], color=INK, linewidth=1.4)
    style: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "color": MUTED}
    middle = (start * ridge) ** 0.5
    axes.annotate(f"memory {bandwidth / 1e9:.0f} GB/s", (middle, middle * bandwidth / 1e9), xytext=(-8, 4),
                  ha="right", **style)  # fmt: skip
    for name, peak in known.items():
        left, right, height = peak / bandwidth, max(reach, ridge * 2), peak / 1e9
        axes.plot([left, right], [height, height], color=INK, linewidth=1.4)
        axes.annotate(
            f"{name} matmul {height:,.0f} GFLOP/s", (right, height), xytext=(0, 4), ha="right", **style
        )
    axes.margins(y=0.12)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")


def _say_empty(figure: Figure, panels: Sequence[Axes], words: str = "nothing was measured") -> Figure:
    for axes in panels:
        axes.set_axis_off()
    figure.text(0.5, 0.5, words, ha="center", color=MUTED)
    return figure


def render(figure: Figure, name: str, form: Form) -> bytes:
    """PNG bytes, or the bytes of an SVG element to put into a page."""
    file = io.BytesIO()
    if form == "svg":
        figure.savefig(file, format="svg", metadata={"Date": None})
        return _for_inlining(file.getvalue().decode(), name).encode()
    from PIL import Image

    figure.savefig(file, format="png", dpi=100)
    # Prefect keeps artifacts in its database: a palette makes them three times smaller.
    image = Image.open(file).convert("RGB").quantize(256, method=Image.Quantize.FASTOCTREE)
    small = io.BytesIO()
    image.save(small, format="png", optimize=True)
    return small.getvalue()


def _for_inlining(svg: str, name: str) -> str:
    """The bare ``<svg>`` element: ids of its own, text in the page's colour, scaled by the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.replace(INK, "currentColor").replace(PAPER, "var(--paper)")
