"""How often the measuring is wrong, where the truth is known: ``python -m benchmarks.trust``.

Every repeat is one final on a simulated host: the incumbent, its challengers and a twin of the first
challenger, under the default rules. Rates come with their 95 % Clopper-Pearson intervals.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from benchmarks.simulated import NOISE_KINDS, NoiseKind, SimulatedHost, e2e_ms
from open_autoglm.measure.comparison import compare, promotes
from open_autoglm.measure.racing import TWIN_SUFFIX, Outcome, Rules, run_race

INCUMBENT_MS = 800.0
INCUMBENT = "incumbent"
TIE = "tie"

SCENARIOS: dict[str, Mapping[str, float]] = {
    "A/A": {"challenger": 1.0},
    "3 %": {"challenger": 0.97},
    "5 %": {"challenger": 0.95},
    "10 %": {"challenger": 0.90},
    "near-equal": {"challenger": 0.995, "second": 1.0, "third": 1.005},
}
"""What the challengers take of the incumbent's time."""


@dataclass(frozen=True)
class Cell:
    """All repeats of one scenario under one kind of noise."""

    noise: NoiseKind
    scenario: str
    champions: tuple[str, ...]
    heats: tuple[int, ...]

    @property
    def promotions(self) -> int:
        return sum(champion != TIE for champion in self.champions)

    @property
    def agreeing(self) -> int:
        """Repeats that name the champion named most often, or declare a tie."""
        counts = Counter(champion for champion in self.champions if champion != TIE)
        return len(self.champions) - self.promotions + max(counts.values(), default=0)


def default_rules(host: SimulatedHost) -> Rules:
    """The final of a study that sets nothing, on the host's virtual clock."""
    return Rules(
        figure=e2e_ms, metric="e2e_ms", least_heats=10, most_heats=200, budget_s=120, clock=host.clock
    )


def run_final(shares: Mapping[str, float], noise: NoiseKind, seed: int) -> Outcome:
    """One final of the incumbent, challengers that take ``shares`` of its time, and the first one's twin."""
    true_ms = {INCUMBENT: INCUMBENT_MS} | {name: INCUMBENT_MS * share for name, share in shares.items()}
    first = next(iter(shares))
    true_ms[first + TWIN_SUFFIX] = true_ms[first]
    host = SimulatedHost(true_ms, noise, seed)
    return run_race("final", tuple(true_ms), host, default_rules(host))


def champion(outcome: Outcome) -> str:
    """The promoted challenger with the greatest gain, or `TIE`: the incumbent stays."""
    figures = {name: [e2e_ms(r) for r in outcome.counted(name)] for name in outcome.rounds}
    challengers = [name for name in figures if name != INCUMBENT and not name.endswith(TWIN_SUFFIX)]
    confidence = 1 - 0.05 / len(challengers)
    comparisons = [
        compare(name, INCUMBENT, "e2e_ms", figures[name], figures[INCUMBENT], confidence)
        for name in challengers
    ]
    promoted = [c for c in comparisons if promotes(c, outcome.race.noise)]
    return min(promoted, key=lambda c: c.change).candidate if promoted else TIE


def run_cell(noise: NoiseKind, scenario: str, repeats: int, seed: int) -> Cell:
    """``repeats`` finals with seeds of their own."""
    first = seed * 1_000_003
    outcomes = (run_final(SCENARIOS[scenario], noise, first + repeat) for repeat in range(repeats))
    results = [(champion(outcome), len(outcome.race.heats)) for outcome in outcomes]
    champions, heats = zip(*results, strict=True)
    return Cell(noise, scenario, champions, heats)


def share(hits: int, repeats: int) -> str:
    """A rate in per cent with its 95 % Clopper-Pearson interval."""
    from scipy.stats import binomtest

    low, high = binomtest(hits, repeats).proportion_ci(0.95, method="exact")
    return f"{100 * hits / repeats:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def table(cells: Sequence[Cell]) -> str:
    """Markdown: a row per kind of noise, rates in per cent."""
    columns = ["false promotions", "finds 3 %", "finds 5 %", "finds 10 %", "same or tie", "rounds each"]
    lines = ["| noise | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for noise in dict.fromkeys(cell.noise for cell in cells):
        row = {cell.scenario: cell for cell in cells if cell.noise == noise}
        rates = [share(row[name].promotions, len(row[name].champions)) for name in SCENARIOS][:-1]
        near = row["near-equal"]
        heats = [count for cell in row.values() for count in cell.heats]
        rates += [share(near.agreeing, len(near.champions)), f"{sum(heats) / len(heats):.1f}"]
        lines.append(f"| {noise.replace('_', ' ')} | " + " | ".join(rates) + " |")
    return "\n".join(lines)


@click.command()
@click.option("--repeats", default=1000, show_default=True, help="Finals per cell of the table")
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "path", type=click.Path(path_type=Path), help="Where to write the raw results")
def main(repeats: int, seed: int, path: Path | None) -> None:
    """Print the table of error rates as Markdown."""
    jobs = [(noise, scenario, repeats, seed) for noise in NOISE_KINDS for scenario in SCENARIOS]
    with ProcessPoolExecutor() as pool:
        cells = list(pool.map(run_cell, *zip(*jobs, strict=True)))
    click.echo(table(cells))
    if path:
        path.write_text(json.dumps([asdict(cell) for cell in cells], indent=1) + "\n")


if __name__ == "__main__":
    main()
