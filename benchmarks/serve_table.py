"""What the rounds of servers add up to: ratios with intervals, targets, tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, median
from typing import Literal

from pydantic import Field
from rich.table import Table

from benchmarks.serve_load import Load
from open_autoglm.measure.comparison import LEAST_PAIRS, compare
from open_autoglm.measure.statistics import summarise
from open_autoglm.schemas import Metric, Model

Kind = Literal["unique", "shared"]
Figure = Literal["tokens_per_s", "requests_per_s", "latency_ms", "ttft_ms", "tpot_ms", "cpu_ms", "pss_bytes"]
Verdict = Literal["met", "missed", "cannot tell", "no figures"]


class Round(Model):
    """One load on one server."""

    heat: int
    load: Load
    cpu_s: float = Field(description="of the server's processes, meanwhile")
    pss_bytes: int = Field(description="of the server's processes, right afterwards")

    @property
    def figures(self) -> Mapping[Figure, float]:
        """Latencies are means over the requests: of a queue the median tells only one half."""
        answers, wall_s = self.load.answers, self.load.wall_ms / 1e3
        return {
            "tokens_per_s": sum(answer.output_tokens for answer in answers) / wall_s,
            "requests_per_s": len(answers) / wall_s,
            "latency_ms": fmean(answer.e2e_ms for answer in answers),
            "ttft_ms": fmean(answer.ttft_ms for answer in answers),
            "tpot_ms": fmean(answer.tpot_ms for answer in answers),
            "cpu_ms": self.cpu_s * 1e3 / len(answers),
            "pss_bytes": float(self.pss_bytes),
        }


class Row(Model):
    """One server at one number of streams."""

    arm: str
    label: str
    streams: int
    kind: Kind = Field("unique", description="whether prompts have a beginning in common")
    reason: str = Field("", description="why there are no figures; empty if there are")
    rounds: tuple[Round, ...] = ()

    def values(self, figure: Figure) -> list[float]:
        return [round_.figures[figure] for round_ in self.rounds]

    @property
    def timed(self) -> bool:
        return len(self.rounds) >= LEAST_PAIRS


class Ratio(Model):
    """One row's figure / another's, by heats: both had the same prompts in the same minute."""

    figure: Figure
    of: str
    against: str
    value: float
    interval: tuple[float, float]
    heats: int


class Target(Model):
    """What is wanted, and what was found."""

    name: str
    bound: str
    found: Ratio | None = None
    added_ms: Metric | None = Field(None, description="where the target is a difference")
    verdict: Verdict


# ── ratios ───────────────────────────────────────────────────────────────────────────────────────


def ratio(of: Row, against: Row, figure: Figure) -> Ratio:
    """Raises ValueError for rows with different heats, or fewer than three."""
    ours, theirs = ({round_.heat: round_ for round_ in row.rounds} for row in (of, against))
    heats = sorted(ours.keys() & theirs.keys())
    above, below = ([found[heat].figures[figure] for heat in heats] for found in (ours, theirs))
    made = compare(of.arm, against.arm, figure, above, below)
    low, high = made.interval
    words = [f"{row.arm} at {row.streams}" for row in (of, against)]
    return Ratio(
        figure=figure,
        of=words[0],
        against=words[1],
        value=1 + made.change,
        interval=(1 + low, 1 + high),
        heats=len(heats),
    )


def verdict(bound: float, interval: tuple[float, float], *, at_most: bool) -> Verdict:
    """Met or missed where the whole interval says so."""
    low, high = interval if at_most else (-interval[1], -interval[0])
    limit = bound if at_most else -bound
    if high <= limit:
        return "met"
    return "missed" if low > limit else "cannot tell"


# ── targets ──────────────────────────────────────────────────────────────────────────────────────

ADDED_MS, SCALES, LLAMA = 2.0, 3.0, 1.1
HEADLINE: tuple[tuple[Figure, float, bool], ...] = (
    ("latency_ms", 0.63, True),
    ("requests_per_s", 1.63, False),
    ("cpu_ms", 0.82, True),
    ("pss_bytes", 0.82, True),
)
"""Against hand-tuned torch; the last member says whether less is better."""


def judge_targets(
    rows: Sequence[Row], added_ms: Sequence[float], ours: str, llama: str, hand_tuned: Sequence[str]
) -> list[Target]:
    """Every target, with ``no figures`` where an arm has none."""
    places = {(row.arm, row.streams): row for row in rows if row.kind == "unique" and row.timed}
    most = max((streams for arm, streams in places if arm == ours), default=0)

    def aim(
        name: str, of: Row | None, against: Row | None, figure: Figure, bound: float, less: bool
    ) -> Target:
        wanted = f"{'≤' if less else '≥'} {bound:g}"
        if of is None or against is None:
            return Target(name=name, bound=wanted, verdict="no figures")
        found = ratio(of, against, figure)
        said = verdict(bound, found.interval, at_most=less)
        return Target(name=name, bound=wanted, found=found, verdict=said)

    best = places.get((ours, most))
    targets = [_added(added_ms)]
    targets.append(aim("streams scale", best, places.get((ours, 1)), "tokens_per_s", SCALES, False))
    for streams in sorted({row.streams for row in rows if row.arm == llama}):
        pair = places.get((ours, streams)), places.get((llama, streams))
        targets.append(aim(f"llama.cpp's server, {streams} streams", *pair, "tokens_per_s", LLAMA, False))
    for streams in sorted({1, most}):
        others = [row for name in hand_tuned if (row := places.get((name, streams)))]
        for figure, bound, less in HEADLINE:
            rival, name = _best(others, figure, less=less), f"hand-tuned torch, {figure}"
            targets.append(aim(name, places.get((ours, streams)), rival, figure, bound, less))
    return targets


def _added(added_ms: Sequence[float]) -> Target:
    name, bound = "added to the first token by the endpoint", f"≤ {ADDED_MS:g} ms"
    if not added_ms:
        return Target(name=name, bound=bound, verdict="no figures")
    found = summarise(added_ms, "ms")
    said = verdict(ADDED_MS, found.interval, at_most=True)
    return Target(name=name, bound=bound, added_ms=found, verdict=said)


def _best(rows: Sequence[Row], figure: Figure, *, less: bool) -> Row | None:
    """The strongest rival by this figure."""
    sign = 1 if less else -1
    return min(rows, key=lambda row: sign * median(row.values(figure)), default=None)


# ── tables ───────────────────────────────────────────────────────────────────────────────────────

COLUMNS: tuple[tuple[str, Callable[[Mapping[Figure, float]], str]], ...] = (
    ("tok/s", lambda f: f"{f['tokens_per_s']:.1f}"),
    ("req/s", lambda f: f"{f['requests_per_s']:.2f}"),
    ("latency ms", lambda f: f"{f['latency_ms']:.0f}"),
    ("TTFT ms", lambda f: f"{f['ttft_ms']:.0f}"),
    ("TPOT ms", lambda f: f"{f['tpot_ms']:.1f}"),
    ("CPU ms/req", lambda f: f"{f['cpu_ms']:.0f}"),
    ("PSS MB", lambda f: f"{f['pss_bytes'] / 1e6:.0f}"),
)


def cells(row: Row) -> list[str]:
    """Medians over the heats, or dashes."""
    if not row.rounds:
        return ["–"] * len(COLUMNS)
    names = row.rounds[0].figures
    medians = {figure: median(row.values(figure)) for figure in names}
    return [shown(medians) for _, shown in COLUMNS]


def serve_table(rows: Sequence[Row]) -> Table:
    table = Table(title="medians over the heats; latencies are means of a heat", title_justify="left")
    table.add_column("server")
    for heading in ("streams", "prompts", *(heading for heading, _ in COLUMNS), "heats"):
        table.add_column(heading, justify="right")
    for row in rows:
        label = f"{row.label}\n  [dim]{row.reason}[/dim]" if row.reason else row.label
        table.add_row(label, str(row.streams), row.kind, *cells(row), str(len(row.rounds)))
    return table


def targets_table(targets: Sequence[Target]) -> Table:
    table = Table(title="targets", title_justify="left")
    for heading in ("target", "of / against", "wanted", "found (95 %)", "verdict"):
        table.add_column(heading)
    for target in targets:
        table.add_row(target.name, _between(target), target.bound, words(target), target.verdict)
    return table


def _between(target: Target) -> str:
    return f"{target.found.of} / {target.found.against}" if target.found else "–"


def words(target: Target) -> str:
    """``1.34 (1.30 – 1.38)``, or the difference in milliseconds."""
    if target.added_ms is not None:
        low, high = target.added_ms.interval
        return f"{target.added_ms.median:.2f} ms ({low:.2f} – {high:.2f})"
    if target.found is None:
        return "–"
    low, high = target.found.interval
    return f"{target.found.value:.2f} ({low:.2f} – {high:.2f})"


def markdown(rows: Sequence[Row], targets: Sequence[Target]) -> str:
    """Both tables, for a page."""
    headings = ("server", "streams", "prompts", *(heading for heading, _ in COLUMNS), "heats")
    lines = [_line(headings), _line(["---"] * len(headings))]
    for row in rows:
        label = f"{row.label} ({row.reason})" if row.reason else row.label
        lines.append(_line([label, str(row.streams), row.kind, *cells(row), str(len(row.rounds))]))
    lines += ["", _line(("target", "of / against", "wanted", "found", "verdict")), _line(["---"] * 5)]
    lines += [_line([t.name, _between(t), t.bound, words(t), t.verdict]) for t in targets]
    return "\n".join(lines) + "\n"


def _line(found: Sequence[str]) -> str:
    return f"| {' | '.join(found)} |"
