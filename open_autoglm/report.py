"""The report: one HTML page that needs no network, no script and no other file.

The page is written beside ``study.json``; links to raw samples, logs and Data Docs are relative to it.
Everything a runtime or a user wrote is escaped, and the page's own policy forbids scripts besides.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from open_autoglm import breakeven, evidence, figures, readout
from open_autoglm.files import write_atomic
from open_autoglm.objectives import floor_of
from open_autoglm.schemas import QualityReport, Study, Trial

if TYPE_CHECKING:
    from jinja2 import Environment

_TEMPLATE = "report.html"


def write_report(study: Study, path: Path) -> Path:
    """Write the page of ``study`` to ``path`` (atomically) and return it."""
    write_atomic(path, render_report(study))
    return path


def render_report(study: Study) -> str:
    """The page of ``study`` as HTML."""
    template = _environment().get_template(_TEMPLATE)
    return template.render(
        study=study,
        measured=readout.measured(study),
        timed=readout.timed(study),
        champion=readout.champion(study),
        baseline=readout.baseline(study),
        comparison=comparison(study),
        shares=[(trial, evidence.phase_shares(study, trial)) for trial in readout.timed(study)],
        break_even=breakeven.break_even(readout.measured(study)),
        facts=facts(study),
        settings=settings(study),
    )


class Compared(NamedTuple):
    """One line of the before/after table."""

    label: str
    before: str
    before_interval: str
    after: str
    after_interval: str
    words: str
    interval: str
    better: bool | None


def comparison(study: Study) -> list[Compared]:
    """The hand-tuned baseline and the champion, metric by metric; empty if there are not both."""
    before, after = readout.baseline(study), readout.champion(study)
    if before is None or after is None:
        return []
    shared = [name for name in readout.METRICS if name in before.metrics and name in after.metrics]
    floor = floor_of(study.races)
    return [_compare(name, before, after, floor) for name in shared] + _compare_quality(before, after)


def _compare(name: str, before: Trial, after: Trial, floor: float) -> Compared:
    shown, old, new = readout.METRICS[name], before.metrics[name], after.metrics[name]
    ratio = readout.compare(name, after, before, floor)
    assert ratio is not None  # both have the metric
    return Compared(
        label=shown.long,
        before=readout.quantity(old.median, old.unit),
        before_interval=readout.interval(old),
        after=readout.quantity(new.median, new.unit),
        after_interval=readout.interval(new),
        words=readout.ratio_words(name, ratio),
        interval=_interval_words(ratio) if old.samples > 1 and new.samples > 1 else "one sample each",
        better=ratio.factor > 1 if ratio.clear else None,
    )


def _interval_words(ratio: readout.Ratio) -> str:
    """'3.45–3.62×, 10 pairs', or without pairs that only the medians are compared."""
    return f"{readout.ratio_interval(ratio)}, {f'{ratio.pairs} pairs' if ratio.pairs else 'not paired'}"


def _compare_quality(before: Trial, after: Trial) -> list[Compared]:
    if before.quality is None or after.quality is None:
        return []
    old, old_interval = _quality_cells(before.quality)
    new, new_interval = _quality_cells(after.quality)
    points = (after.quality.ratio - before.quality.ratio) * 100
    label, change = "Quality kept, worse path", f"{points:+.1f} points"
    return [Compared(label, old, old_interval, new, new_interval, change, "", None)]


def _quality_cells(report: QualityReport) -> tuple[str, str]:
    ends = readout.percent_interval(report.worse.ratio_interval)
    return readout.percent(report.ratio), f"{ends}, {report.worse_path}"


def facts(study: Study) -> list[tuple[str, str]]:
    """The environment: what the figures depend on, as label and value."""
    profile, host, checkpoint = study.analysis.profile, study.analysis.hardware, study.checkpoint
    size = readout.quantity(checkpoint.weight_bytes, "bytes")
    memory = readout.quantity(host.memory_bytes, "bytes")
    bandwidth = readout.scaled(host.read_bandwidth_bytes_per_s, "B/s")
    heads = f"{profile.attention_heads} heads over {profile.kv_heads} key/value heads"
    return [
        ("Model", f"{checkpoint.name} ({checkpoint.architecture})"),
        ("Parameters", f"{profile.parameters / 1e6:,.1f} M in {profile.layers} layers"),
        ("Attention", f"{profile.attention.upper()}, {heads}, rotary {profile.rotary}"),
        ("Weights", f"{size}, sha256 {checkpoint.digest[:16]}…"),
        ("CPU", f"{host.cpu_model}, {host.cores} cores, {' '.join(host.isa)}"),
        ("GPU", ", ".join(gpu.name for gpu in host.gpus) or f"none: {host.gpu_reason}"),
        ("Memory", f"{memory}, read at {bandwidth} (measured)"),
        ("System", f"{host.os}, Python {host.python}"),
        ("Host fingerprint", host.fingerprint),
        *((name, value) for name, value in study.environment.items() if name != "python"),
    ]


_UNITS = {"batch_size": "per call", "prompt_tokens": "tokens", "output_tokens": "tokens",
          "quality_tokens": "tokens", "rounds": "rounds", "timing_budget_s": "s"}  # fmt: skip


def settings(study: Study) -> list[tuple[str, str]]:
    """The request, field by field: enough to run the study again."""
    fields = type(study.spec).model_fields
    values = study.spec.model_dump(mode="json")
    return [(fields[name].title or name, _setting(name, value)) for name, value in values.items()]


def _setting(name: str, value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(value) or "all"
    return f"{value} {_UNITS.get(name, '')}".rstrip()


def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("open_autoglm"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        readout=readout,
        evidence=evidence,
        pays_words=breakeven.pays_words,
        pays_sentence=breakeven.sentence,
        href=quote,
        # The only markup that is not escaped: our own drawings.
        draw=lambda figure, study: Markup(getattr(figures, f"{figure}_figure")(study, "svg").decode()),
    )
    return environment
