"""What the rounds of our champion and its peers add up to: ratios with intervals, targets, one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from pydantic import Field
from rich.table import Table

from benchmarks.peer_child import FirstAnswer
from open_autoglm.measure.comparison import LEAST_PAIRS, compare
from open_autoglm.measure.scenarios import figure_of
from open_autoglm.measure.statistics import summarise
from open_autoglm.schemas import Metric, Model, QualityReport, Round

Column = Literal["ttft", "decode", "memory"]
Verdict = Literal["met", "missed", "cannot tell", "no figures"]

HAND_TUNED = "transformers-bf16-compile"
"""The row that stands for torch as a careful person tunes it."""


class Row(Model):
    """One contestant and all that is known of it."""

    name: str
    label: str
    ours: bool = False
    reason: str = Field("", description="why there are no figures; empty if there are")
    first: FirstAnswer | None = None
    quality: QualityReport | None = None
    judged_as: str = Field("", description="our candidate on the same weights, which was judged")
    rounds: tuple[Round, ...] = Field((), description="in the order they were run, repeated ones included")
    warmups: tuple[Round, ...] = ()
    steady: bool = True
    same_greedy_tokens: int | None = Field(None, description="leading tokens equal to fp32 torch's")

    @property
    def counted(self) -> list[Round]:
        return [r for r in self.rounds if not r.repeated]

    @property
    def ttft_ms(self) -> Metric:
        return summarise([figure_of("ttft_ms")(r) for r in self.counted], "ms")

    @property
    def tokens_per_s(self) -> Metric:
        """From the second token on."""
        return summarise([1e3 / figure_of("tpot_ms")(r) for r in self.counted], "tokens/s")

    @property
    def memory_bytes(self) -> int:
        assert self.first is not None, "who was timed was looked at before"
        return self.first.footprint.peak_rss_bytes


class Ratio(Model):
    """Ours / theirs: below 1 is less. Memory is one reading each, so it has no interval."""

    against: str
    column: Column
    value: float
    interval: tuple[float, float] | None
    pairs: int


class Target(Model):
    """What we want to be: a bound on a ratio."""

    column: Column
    against: Literal["hand-tuned torch", "best peer"]
    bound: float

    @property
    def at_most(self) -> bool:
        """Decode is a speed, where more is better."""
        return self.column != "decode"


TARGETS = (
    Target(column="ttft", against="hand-tuned torch", bound=0.60),
    Target(column="decode", against="hand-tuned torch", bound=5.0),
    Target(column="memory", against="hand-tuned torch", bound=0.35),
    Target(column="ttft", against="best peer", bound=0.90),
    Target(column="decode", against="best peer", bound=1.15),
    Target(column="memory", against="best peer", bound=1.3),
)


class Result(NamedTuple):
    """A target and what became of it."""

    target: Target
    ratio: Ratio | None
    verdict: Verdict


# ── ratios ───────────────────────────────────────────────────────────────────────────────────────


def ratio(ours: Row, theirs: Row, column: Column) -> Ratio:
    """Paired where rounds are: the same prompts, one right after the other.

    Raises ValueError for rows that did not run the same number of rounds, or fewer than three.
    """
    if column == "memory":
        value = ours.memory_bytes / theirs.memory_bytes
        return Ratio(against=theirs.name, column=column, value=value, interval=None, pairs=1)
    # A speed's ratio is that of the times per token, turned over.
    above, below = (theirs, ours) if column == "decode" else (ours, theirs)
    metric = "tpot_ms" if column == "decode" else "ttft_ms"
    figure = figure_of(metric)
    over, under = ([figure(r) for r in row.counted] for row in (above, below))
    found = compare(above.name, below.name, metric, over, under)
    low, high = found.interval
    return Ratio(
        against=theirs.name,
        column=column,
        value=1 + found.change,
        interval=(1 + low, 1 + high),
        pairs=found.pairs,
    )


def verdict(target: Target, found: Ratio) -> Verdict:
    """Met or missed where the whole interval says so."""
    low, high = found.interval or (found.value, found.value)
    if not target.at_most:
        low, high = -high, -low
    bound = target.bound if target.at_most else -target.bound
    if high <= bound:
        return "met"
    return "missed" if low > bound else "cannot tell"


def judge_targets(rows: Sequence[Row], champion: str, least_quality: float) -> list[Result]:
    """Every target against its row; ``no figures`` where that or the champion has none."""
    timed = {row.name: row for row in rows if len(row.counted) >= LEAST_PAIRS}
    results = []
    for target in TARGETS:
        name = HAND_TUNED if target.against == "hand-tuned torch" else None
        against = timed.get(name) if name else best_peer(list(timed.values()), target.column, least_quality)
        if champion not in timed or against is None:
            results.append(Result(target, None, "no figures"))
            continue
        found = ratio(timed[champion], against, target.column)
        results.append(Result(target, found, verdict(target, found)))
    return results


def best_peer(rows: Sequence[Row], column: Column, least_quality: float) -> Row | None:
    """The best of a column among those that keep the quality we ask of ourselves, or were not judged."""
    able = [r for r in rows if not r.ours and (r.quality is None or r.quality.ratio >= least_quality)]
    orders = {
        "ttft": lambda row: row.ttft_ms.median,
        "decode": lambda row: -row.tokens_per_s.median,
        "memory": lambda row: row.memory_bytes,
    }
    return min(able, key=orders[column], default=None)


def shared_prefix(tokens: Sequence[int], reference: Sequence[int]) -> int:
    """How many leading tokens are equal."""
    pairs = list(zip(tokens, reference, strict=False))
    return next((place for place, (ours, theirs) in enumerate(pairs) if ours != theirs), len(pairs))


# ── tables ───────────────────────────────────────────────────────────────────────────────────────


def peers_table(rows: Sequence[Row], champion: str) -> Table:
    """Medians, and the champion's ratio to each row with its 95 % interval."""
    table = Table(title=f"{champion} / row in brackets, with 95 % intervals", title_justify="left")
    table.add_column("runtime")
    for heading in ("TTFT ms", "decode tok/s", "peak RSS MB", "peak PSS MB", "quality", "rounds", "= fp32"):
        table.add_column(heading, justify="right")
    ours = next((row for row in rows if row.name == champion), None)
    for row in rows:
        table.add_row(*_cells(row, ours))
    return table


def _cells(row: Row, champion: Row | None) -> list[str]:
    if row.first is None or not row.counted:
        return [f"{row.label}\n  [dim]{row.reason}[/dim]", *["–"] * 7]
    footprint = row.first.footprint
    disturbed = sum(bool(r.conditions.disturbances) for r in row.counted)
    return [
        row.label,
        f"{row.ttft_ms.median:.0f}{_against(row, champion, 'ttft')}",
        f"{row.tokens_per_s.median:.1f}{_against(row, champion, 'decode')}",
        f"{footprint.peak_rss_bytes / 1e6:.0f}{_against(row, champion, 'memory')}",
        f"{footprint.peak_pss_bytes / 1e6:.0f}",
        f"{row.quality.ratio:.2%}" if row.quality else "–",
        f"{len(row.counted)}" + (f" ({disturbed} disturbed)" if disturbed else ""),
        f"{row.same_greedy_tokens}" if row.same_greedy_tokens is not None else "–",
    ]


def _against(row: Row, champion: Row | None, column: Column) -> str:
    """`` (0.62, 0.60–0.64)``, or nothing for the champion itself and where rounds are too few."""
    few = min(len(r.counted) for r in (row, champion)) < LEAST_PAIRS if champion else True
    if champion is None or row.name == champion.name or (few and column != "memory") or not champion.first:
        return ""
    return f"\n({words(ratio(champion, row, column))})"


def words(found: Ratio) -> str:
    """``0.62, 0.60–0.64``."""
    if found.interval is None:
        return f"{found.value:.2f}"
    low, high = found.interval
    return f"{found.value:.2f}, {low:.2f}–{high:.2f}"


def targets_table(results: Sequence[Result]) -> Table:
    table = Table(title="targets", title_justify="left")
    for heading in ("column", "against", "target", "found", "verdict"):
        table.add_column(heading)
    for target, found, said in results:
        who = found.against if found else "–"
        bound = f"{'≤' if target.at_most else '≥'} {target.bound:.2f}"
        cells = (target.column, f"{target.against}: {who}", bound, words(found) if found else "–", said)
        table.add_row(*cells)
    return table


# ── JSON ─────────────────────────────────────────────────────────────────────────────────────────


class Report(Model):
    """Content of the JSON file: raw samples, what was made of them, and what they depend on."""

    champion: str
    least_quality: float
    rows: tuple[Row, ...]
    ratios: tuple[Ratio, ...]
    targets: tuple[dict[str, object], ...]
    orders: tuple[tuple[str, ...], ...] = Field(description="who ran in which order, heat by heat")
    about: Mapping[str, object] = Field(description="checkpoint, workload, seed, hardware")


def make_report(
    rows: Sequence[Row],
    champion: str,
    least_quality: float,
    orders: Sequence[tuple[str, ...]],
    about: Mapping[str, object],
) -> Report:
    timed = [row for row in rows if len(row.counted) >= LEAST_PAIRS]
    ours = next((row for row in timed if row.name == champion), None)
    columns: tuple[Column, ...] = ("ttft", "decode", "memory")
    others = [row for row in timed if row.name != champion]
    ratios = [ratio(ours, row, column) for row in others for column in columns] if ours else []
    results = judge_targets(rows, champion, least_quality)
    return Report(
        champion=champion,
        least_quality=least_quality,
        rows=tuple(rows),
        ratios=tuple(ratios),
        targets=tuple({**r.target.model_dump(), "verdict": r.verdict} for r in results),
        orders=tuple(orders),
        about=about,
    )
