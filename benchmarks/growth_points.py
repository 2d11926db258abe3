"""Where the growth benchmark looks, and what it notes there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from rich.table import Table

from open_autoglm.schemas import Footprint, Metric, Model

Curve = Literal["prompt", "batch", "layers"]

MIDDLE_PROMPT_TOKENS = 512


class Place(Model):
    """One model at one workload, and the curves it is a point of."""

    model: str = Field(description="its number of layers, or its name")
    prompt_tokens: int
    batch_size: int
    curves: tuple[Curve, ...]

    @property
    def name(self) -> str:
        return f"{self.model}-layers-{self.batch_size}x{self.prompt_tokens}"

    @property
    def work(self) -> int | None:
        """Layers × tokens of the prompts, which time grows with; None for a model of another shape."""
        return int(self.model) * self.prompt_tokens * self.batch_size if self.model.isdigit() else None

    def along(self, curve: Curve) -> int:
        """What varies along ``curve``."""
        varying = {"prompt": self.prompt_tokens, "batch": self.batch_size, "layers": int(self.model)}
        return varying[curve]


def places(
    prompts: Sequence[int], batches: Sequence[int], layers: Sequence[int], longest_prompt: int
) -> list[Place]:
    """One of the three varied at a time, the cheap ones first; the others are at the middle prompt, the
    least batch and all layers. What is longer than the context is as long as the context allows."""
    prompts = sorted({min(prompt, longest_prompt) for prompt in prompts})
    middle = min(prompts, key=lambda prompt: abs(prompt - MIDDLE_PROMPT_TOKENS))
    most, least = max(layers), min(batches)
    found: dict[tuple[int, int, int], list[Curve]] = {}
    for count in layers:
        found.setdefault((count, middle, least), []).append("layers")
    for prompt in prompts:
        found.setdefault((most, prompt, least), []).append("prompt")
    for batch in batches:
        found.setdefault((most, middle, batch), []).append("batch")
    cheap_first = sorted(found, key=lambda at: at[0] * at[1] * at[2])
    return [
        Place(
            model=str(count),
            prompt_tokens=prompt,
            batch_size=batch,
            curves=tuple(found[count, prompt, batch]),
        )
        for count, prompt, batch in cheap_first
    ]


class Bounds(Model):
    """The least times the host's measured peaks allow, in milliseconds."""

    ttft_ms: float
    tpot_ms: float


class Figures(Model):
    """What was found in a fresh process."""

    ttft_ms: Metric
    tpot_ms: Metric
    footprint: Footprint
    bounds: Bounds
    disturbed_rounds: int


class Point(Model):
    """One candidate at one place; without figures it has a reason."""

    place: Place
    candidate: str
    figures: Figures | None = None
    reason: str = ""
    seconds: float = Field(0.0, description="from opening the model to the last round")


class Export(Model):
    """What writing a candidate's files took."""

    model: str
    candidate: str
    reason: str = ""
    seconds: float = 0.0
    checkpoint_bytes: int = Field(ge=1)
    peak_rss_bytes: int = 0

    @property
    def share(self) -> float:
        """Peak memory of the exporting process / bytes of the checkpoint."""
        return self.peak_rss_bytes / self.checkpoint_bytes


def expected_s(
    place: Place, candidate: str, requests: int, points: Sequence[Point], exports: Sequence[Export]
) -> float:
    """About what so many ``requests`` at ``place`` will take, by the candidate's last point and last export.

    As long as that point, but the prompts in proportion to their work; and an export in proportion to the
    layers, where there is none yet. What nothing tells of counts nothing.
    """
    return _rounds_s(place, candidate, requests, points) + _export_s(place, candidate, exports)


def _rounds_s(place: Place, candidate: str, requests: int, points: Sequence[Point]) -> float:
    for before in reversed(points):
        work, figures = before.place.work, before.figures
        if before.candidate == candidate and figures and work and place.work:
            more = max(0.0, place.work / work - 1)
            return before.seconds + requests * figures.ttft_ms.median / 1000 * more
    return 0.0


def _export_s(place: Place, candidate: str, exports: Sequence[Export]) -> float:
    made = [export for export in exports if export.candidate == candidate and not export.reason]
    if not made or any(export.model == place.model for export in made):
        return 0.0
    if not (place.model.isdigit() and made[-1].model.isdigit()):
        return 0.0
    return made[-1].seconds * int(place.model) / int(made[-1].model)


def growth_table(points: Sequence[Point], exports: Sequence[Export]) -> Table:
    """Every point, with its roofline in brackets; then every export."""
    table = Table(title="medians, and the least the host allows in brackets", title_justify="left")
    for heading in ("layers", "batch", "prompt", "candidate", "TTFT ms", "TPOT ms", "peak RSS MB"):
        table.add_column(heading, justify="left" if heading == "candidate" else "right")
    for point in points:
        place = point.place
        table.add_row(
            place.model, str(place.batch_size), str(place.prompt_tokens), point.candidate, *_cells(point)
        )
    table.add_section()
    for export in exports:
        said = export.reason or f"{export.peak_rss_bytes / 1e6:.0f} ({export.share:.1f} × the checkpoint)"
        table.add_row(
            export.model, "", "", f"export of {export.candidate}", f"{export.seconds:.0f} s", "", said
        )
    return table


def _cells(point: Point) -> list[str]:
    figures = point.figures
    if figures is None:
        return [point.reason, "–", "–"]
    return [
        f"{figures.ttft_ms.median:.0f} ({figures.bounds.ttft_ms:.0f})",
        f"{figures.tpot_ms.median:.1f} ({figures.bounds.tpot_ms:.1f})",
        f"{figures.footprint.peak_rss_bytes / 1e6:.0f}",
    ]
