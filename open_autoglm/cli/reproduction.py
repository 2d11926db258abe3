"""A reproduction in the terminal: then, now, and what is not as it was."""

from __future__ import annotations

from typing import TYPE_CHECKING

from open_autoglm.units import number, quantity

if TYPE_CHECKING:
    from rich.console import Console

    from open_autoglm.capsule import Reproduced, Reproduction


def print_reproduction(result: Reproduction, console: Console) -> None:
    """The figures side by side, the verdict, and the differences."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2))
    for heading in ("", "then", "now", "change, paired", ""):
        table.add_column(heading)
    for figure in result.figures:
        table.add_row(*map(Text, _cells(figure)))
    word = "reproduced" if result.reproduced else "not reproduced"
    console.print(Text(f"{result.trial_id} of {result.study_id}: {word}", style="bold"))
    console.print(table)
    console.print(Text(result.explanation))
    for difference in result.differences:
        console.print(Text(f"  • {difference}"))


def _cells(figure: Reproduced) -> tuple[str, ...]:
    then, now = (
        f"{quantity(m.median, m.unit)} [{number(m.interval[0])} to {number(m.interval[1])}]"
        for m in (figure.then, figure.now)
    )
    low, high = figure.paired.interval
    change = f"{figure.paired.change:+.1%} [{low:+.1%} to {high:+.1%}]"
    return figure.metric, then, now, change, "within" if figure.within else "outside"
