"""Results in the terminal: one row per engine, how sure it is, why the others lost, and where to look.

Nothing is parsed as Rich markup, and control characters are dropped: reasons hold whatever a runtime
printed before it died.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, TYPE_CHECKING

from open_autoglm import evidence, readout
from open_autoglm.objectives import goal_of
from open_autoglm.schemas import Analysis, Candidate, Probe, RooflineBound, Study, Trial

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

PIPED_WIDTH = 110
"""Columns when the output is not a terminal, so that a log file holds whole rows."""


def make_console(file: IO[str] | None = None) -> Console:
    """A console for ``file`` (stdout if None): as wide as the terminal, or plain and `PIPED_WIDTH` wide."""
    from rich.console import Console

    console = Console(file=file or sys.stdout, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    return console


# ── a study ──────────────────────────────────────────────────────────────────────────────────────


def print_study(study: Study, console: Console, links: Mapping[str, str] | None = None) -> None:
    """The table of all engines, the verdict with its reasons, and where to look.

    ``links`` are further places to look at, such as the Prefect run, by name.
    """
    console.print()
    console.print(_text(f"{study.checkpoint.name}: {readout.workload_words(study)}", "bold"))
    console.print(_text(f"Objective {study.spec.objective}; {', '.join(readout.limit_words(study))}"))
    if study.trials:
        console.print(_trial_table(study))
        _print_list(console, "How sure is this", _confidence(study))
    _print_list(console, "Why not the others" if study.champion else "Why not", _losers(study))
    vetoed = [trial.candidate for trial in study.trials if trial.status == "vetoed"]
    _print_list(console, "Vetoed before the start", _vetoes(vetoed))
    console.print(_verdict_panel(study))
    if study.verdict.kind != "dry_run":
        _print_places(console, _places(study, links or {}))


def _trial_table(study: Study) -> Table:
    table = _table("Candidate")
    table.columns[0].no_wrap = True
    goal = goal_of(study.spec).metric
    names = list(dict.fromkeys((goal, "ttft_ms", "tpot_ms", "tokens_per_s", "peak_rss_bytes")))
    for heading in (*(_HEADINGS[name] for name in names), "Quality\nkept"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("Verdict", overflow="fold")
    for trial in study.trials:
        if trial.status == "vetoed":
            continue  # no figures, and there are many of them
        role = readout.role(study, trial)
        verdict = readout.standing(study, trial)
        if role not in ("", "champion"):
            verdict = f"{role}, {verdict}"
        style = "bold green" if role == "champion" else "" if trial.feasible else "dim"
        cells = [
            *(_cell(trial, name, with_interval=name == goal) for name in names),
            readout.quality_words(trial),
            verdict,
        ]
        table.add_row(_text(trial.id), *(_text(cell) for cell in cells), style=style)
    return table


_HEADINGS = {
    "e2e_ms": "To last\ntoken ms",
    "ttft_ms": "TTFT\nms",
    "tpot_ms": "TPOT\nms",
    "tokens_per_s": "Decode\ntok/s",
    "throughput_tokens_per_s": "Through-\nput tok/s",
    "goodput_rps": "Goodput\nreq/s",
    "peak_rss_bytes": "Peak RSS\nMiB",
}


def _cell(trial: Trial, name: str, *, with_interval: bool) -> str:
    """A figure; the one that the study is about with half the width of its 95 % interval."""
    figure = readout.figure_words(trial, name, 2**20 if name == "peak_rss_bytes" else 1)
    metric = trial.metrics.get(name)
    if not with_interval or metric is None or metric.samples < 2:
        return figure
    low, high = metric.interval
    return f"{figure} ±{readout.percent((high - low) / 2 / metric.median)}"


def _confidence(study: Study) -> list[tuple[str, str]]:
    """The noise floor, how each stage ended, and what was not measured anew."""
    told = [("Noise", evidence.noise_words(study))] if study.races else []
    told += [(race.stage.capitalize(), evidence.race_words(race)) for race in study.races]
    if drafts := readout.draft_words(study):
        told.append(("Drafts", "\n".join(drafts)))
    if reused := evidence.reuse_words(study):
        told.append(("Reused", "\n".join(reused)))
    if any(trial.screening and not trial.metrics for trial in study.trials):
        told.append(("~", "an estimate from short rounds: good to rank, no more"))
    return told


def _losers(study: Study) -> list[tuple[str, str]]:
    """Every trial but the champion, or the one that the verdict tells about instead, with its reasons."""
    told = study.champion
    if study.verdict.kind in ("gate_failed", "insufficient_evidence"):
        told = study.verdict.nearest
    tried = [trial for trial in study.trials if trial.status != "vetoed" and trial.id != told]
    return [(trial.id, "\n".join(readout.why(trial))) for trial in tried]


def _vetoes(candidates: Iterable[Candidate]) -> list[tuple[str, str]]:
    """By engine: what was vetoed and why, candidates with one reason together."""
    names: dict[tuple[str, str], list[str]] = {}
    for candidate in candidates:
        if candidate.vetoed_because is not None:
            names.setdefault((candidate.engine, candidate.vetoed_because), []).append(candidate.id)
    return [(engine, f"{', '.join(ids)}: {reason}") for (engine, reason), ids in names.items()]


def _verdict_panel(study: Study) -> Table:
    lines = [_text(f"• {reason}") for reason in readout.reasons(study)]
    told = "\n".join(study.verdict.reasons)
    failures = study.gate.failures if study.gate else ()
    lines += [_text(f"• gate: {failure}") for failure in failures if failure not in told]
    color = {"champion": "green", "tie": "blue", "dry_run": "blue"}.get(study.verdict.kind, "yellow")
    return _panel(readout.headline(study), lines, color)


def _places(study: Study, links: Mapping[str, str]) -> list[tuple[str, str]]:
    places = [
        ("Report", str(study.output_dir / "report.html")),
        ("Study", str(study.output_dir / "study.json")),
    ]
    if study.bundle:
        places.append(("Bundle", str(study.bundle.path)))
    if registration := study.registration:
        stored = f"run {registration.run_id} in {registration.tracking_uri}"
        places.append(("MLflow", readout.study_link(study) or stored))
    places += links.items()
    if code := readout.how_to_load(study):
        places.append(("Load it", "\n".join(code)))
        places.append(("Serve it", "\n".join(readout.how_to_serve(study))))
    return places


# ── before a study ───────────────────────────────────────────────────────────────────────────────


def print_analysis(analysis: Analysis, console: Console) -> None:
    """Structure, host, and what binds each phase at each precision."""
    _print_list(console, "Model", _structure(analysis))
    _print_list(console, "Host", _host(analysis))
    table = _table("Phase", "Precision")
    for heading in ("Compute\nms", "Bandwidth\nms", "Memory\nneeded"):
        table.add_column(heading, justify="right")
    table.add_column("Bound by")
    table.add_column("Least time\nms", justify="right")
    for bound in analysis.roofline:
        table.add_row(*(_text(cell) for cell in _bound_cells(bound)))
    console.print(_text("Roofline: the least time each phase can take on this host", "bold"))
    console.print(table)


def _bound_cells(bound: RooflineBound) -> tuple[str, ...]:
    fits = bound.binds != "capacity"
    return (
        bound.phase,
        bound.precision,
        readout.number(bound.compute_ms),
        readout.number(bound.bandwidth_ms),
        readout.quantity(bound.capacity_bytes, "bytes"),
        bound.binds if fits else "capacity",
        readout.number(bound.bound_ms) if fits else "does not fit",
    )


def _structure(analysis: Analysis) -> list[tuple[str, str]]:
    profile = analysis.profile
    tied = "tied to" if profile.tied_embeddings else "apart from"
    facts = [
        ("Architecture", f"{profile.architecture} ({profile.model_type})"),
        ("Parameters", _parameters(analysis)),
        ("Layers", f"{profile.layers} of width {profile.hidden_size}, {profile.norms_per_layer} norms each"),
        (
            "Attention",
            f"{profile.attention.upper()}: {profile.attention_heads} heads of {profile.head_dim} over "
            f"{profile.kv_heads} key/value heads",
        ),
        ("Rotary", f"{profile.rotary}, {profile.rotary_dims} of {profile.head_dim} dimensions"),
        ("MLP", f"{profile.mlp.replace('_', ' ')}, {profile.intermediate_size} wide"),
        ("Vocabulary", f"{profile.vocab_size:,} tokens, output head {tied} the embedding"),
        ("Context", f"{profile.context_tokens:,} tokens"),
        ("KV cache", f"{readout.scaled(profile.kv_bytes_per_token(32), 'B')} per token in fp32"),
    ]
    if profile.experts:
        used = f"{profile.experts_per_token} of {profile.experts} per token, {profile.shared_experts} shared"
        facts.insert(6, ("Experts", f"{used}, {profile.dense_layers} dense layers"))
    return facts


def _parameters(analysis: Analysis) -> str:
    profile = analysis.profile
    size = readout.quantity(profile.weight_bytes(32), "bytes")
    active = ""
    if profile.active_parameters != profile.parameters:
        active = f" ({profile.active_parameters / 1e6:,.1f} M active per token)"
    return f"{profile.parameters / 1e6:,.1f} M{active}, {size} in fp32"


def _host(analysis: Analysis) -> list[tuple[str, str]]:
    host = analysis.hardware
    peaks = [
        ("fp32", host.matmul_fp32_flops_per_s, "FLOP/s"),
        ("bf16", host.matmul_bf16_flops_per_s, "FLOP/s"),
        ("int8", host.matmul_int8_ops_per_s, "OP/s"),
    ]
    matmul = ", ".join(f"{name} {readout.scaled(peak, unit)}" for name, peak, unit in peaks if peak)
    available = readout.quantity(host.available_memory_bytes, "bytes")
    gpus = [f"{gpu.name}, {readout.quantity(gpu.memory_bytes, 'bytes')}" for gpu in host.gpus]
    return [
        ("CPU", f"{host.cpu_model}, {host.cores} cores, {' '.join(host.isa)}"),
        ("Memory", f"{readout.quantity(host.memory_bytes, 'bytes')}, {available} available"),
        ("Read bandwidth", f"{readout.scaled(host.read_bandwidth_bytes_per_s, 'B/s')}, measured"),
        ("Matmul", f"{matmul}, measured"),
        ("GPU", "; ".join(gpus) or f"none: {host.gpu_reason}"),
    ]


def print_engines(probes: Sequence[Probe], console: Console) -> None:
    """Which engines can run here, and how to get the others."""
    table = _table("Engine", "State", "Version", "What was found")
    for probe in probes:
        style = "green" if probe.ready else "dim"
        table.add_row(
            _text(probe.engine),
            _text(probe.stage.replace("_", " "), style),
            _text(probe.version or "–"),
            _text(probe.reason),
        )
    console.print(table)
    wanted = [(probe.engine, probe.install) for probe in probes if probe.install and not probe.ready]
    _print_list(console, "How to get them", wanted)


def print_plan(candidates: Sequence[Candidate], console: Console) -> None:
    """What a study would measure and what it would not, each with its reason."""
    chosen = [candidate for candidate in candidates if candidate.vetoed_because is None]
    table = _table("Candidate", "Device", "Precision")
    table.add_column("Bits per\nweight", justify="right")
    table.add_column("Proposed because", overflow="fold")
    for candidate in chosen:
        bits = readout.number(candidate.weight_bits)
        cells = (candidate.id, candidate.device, candidate.precision, bits, candidate.proposed_because)
        table.add_row(*(_text(cell) for cell in cells))
    console.print(_text(f"{len(chosen)} of {len(candidates)} candidates would be measured", "bold"))
    if chosen:
        console.print(table)
    _print_list(console, "Vetoed", _vetoes(candidates))


# ── pieces ───────────────────────────────────────────────────────────────────────────────────────


def _text(content: str, style: str = "") -> Text:
    """Text that is shown as it is: no markup, no control characters."""
    from rich.text import Text

    return Text("".join(c for c in content if c.isprintable() or c == "\n"), style=style)


def _table(*headings: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", padding=(0, 1))
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _panel(title: str, lines: Iterable[Text], color: str) -> Table:
    """A framed block with its title on the first line."""
    from rich import box
    from rich.table import Table

    panel = Table(box=box.ROUNDED, border_style=color, expand=True, show_header=False, padding=(0, 1))
    panel.add_column()
    panel.add_row(_text(title, f"bold {color}"))
    for line in lines:
        panel.add_row(line)
    return panel


def _print_places(console: Console, places: Iterable[tuple[str, str]]) -> None:
    """Paths, links and commands, one a line and never wrapped: they are there to be copied."""
    console.print(_text("Where to look", "bold"))
    rows = list(places)
    width = max(len(name) for name, _ in rows) + 2
    for name, content in rows:
        for index, line in enumerate(content.splitlines()):
            console.print(_text(f"  {'' if index else name:<{width}}{line}"), soft_wrap=True)
    console.print()


def _print_list(console: Console, title: str, entries: Iterable[tuple[str, str]]) -> None:
    """A title and, below it, names with their texts in two aligned columns; nothing if there are none."""
    from rich.table import Table

    rows = list(entries)
    if not rows:
        return
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, content in rows:
        grid.add_row(_text(f"  {name}"), _text(content))
    console.print(_text(title, "bold"))
    console.print(grid)
    console.print()
