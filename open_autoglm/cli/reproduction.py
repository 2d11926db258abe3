"""A reproduction in the terminal: then, now, and what is not as it was."""

from __future__ import annotations

from typing import TYPE_CHECKING

from open_autoglm.units import number, quantity

if TYPE_CHECKING:
    from rich.console import Console

    from open_autoglm.reproduction import Reproduced, Reproduction
    from open_autoglm.schemas import Comparison


def print_reproduction(result: Reproduction, console: Console) -> None:
    """The figures side by side, the verdict, and the differences."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for heading in ("", "then", "now", "change, paired", "", "beside another"):
        table.add_column(heading)
    for figure in result.figures:
        table.add_row(*map(Text, _cells(figure)))
    word = {"reproduced": "reproduced", "host_changed": "reproduced beside another finalist"}
    said = word.get(result.outcome, "not reproduced")
    console.print(Text(f"{result.trial_id} of {result.study_id}: {said}", style="bold"))
    console.print(table)
    console.print(Text(result.explanation))
    for difference in result.differences:
        console.print(Text(f"  • {difference}"))


def _cells(figure: Reproduced) -> tuple[str, ...]:
    then, now = (
        f"{quantity(m.median, m.unit)} [{number(m.interval[0])}–{number(m.interval[1])}]"
        for m in (figure.then, figure.now)
    )
    within = "within" if figure.within else "outside"
    beside = _change(figure.beside) if figure.beside else "–"
    return figure.metric, then, now, _change(figure.paired), within, beside


def _change(paired: Comparison) -> str:
    low, high = paired.interval
    return f"{paired.change:+.1%} [{100 * low:+.1f} to {100 * high:+.1f}]"
