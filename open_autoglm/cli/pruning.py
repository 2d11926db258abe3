"""A pruning run in the terminal: each level that was tried, and what came of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from open_autoglm.pruning.loop import PruningRun, PruningStep

_HEADINGS = ("Heads", "KV groups", "Parameters removed", "Quality kept", "95 %", "Path", "Tokens", "Verdict")


def print_pruning(run: PruningRun, console: Console) -> None:
    """The steps in the order they were tried, and the answer."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for heading in _HEADINGS:
        table.add_column(heading)
    for step in run.steps:
        table.add_row(*map(Text, _cells(step, run.parameters)))
    least = f"at least {run.keep_quality:.1%} of the quality is to be kept"
    console.print(Text(f"{run.checkpoint}: {run.parameters / 1e6:.1f} M parameters; {least}", style="bold"))
    console.print(table)
    console.print(Text(run.conclusion), soft_wrap=True)
    if run.pruned is not None:
        console.print(Text(f"Written to {run.pruned.path}"), soft_wrap=True)


def _cells(step: PruningStep, parameters: int) -> tuple[str, ...]:
    level, removed = step.level, step.parameters_removed
    kept, interval, path = "–", "–", "–"
    if step.ratio is not None and step.ratio_interval is not None and step.path is not None:
        low, high = step.ratio_interval
        kept, interval, path = f"{step.ratio:.2%}", f"{low:.2%} to {high:.2%}", step.path
    return (
        f"{level.heads} of {level.of_heads}",
        f"{level.kv_groups} of {level.of_kv_groups}",
        f"{removed / 1e6:.2f} M ({removed / parameters:.1%})",
        kept,
        interval,
        path,
        str(step.tokens),
        step.verdict,
    )
