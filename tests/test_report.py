"""The report page, its figures, and the words they share with the terminal."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from studies import (
    BASELINE,
    CHAMPION,
    blocked_study,
    demo_registration,
    demo_study,
    infeasible_study,
    planned_study,
)

from open_autoglm import figures, readout
from open_autoglm.measure.statistics import P95_SAMPLES, summarise
from open_autoglm.report import comparison, render_report, write_report
from open_autoglm.schemas import Miss, Study, Trial

STUDIES = [demo_study, infeasible_study, blocked_study, planned_study]
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """What a browser would see: elements with attributes, the visible text, and whether tags match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def attributes(self, name: str) -> list[str]:
        return [value for _, attrs in self.elements if (value := attrs.get(name)) is not None]


def page(study: Study) -> Page:
    return Page(render_report(study))


@cache
def html_of(build: Callable[[], Study]) -> str:
    """The page of an unchanged study, drawn once for all tests."""
    return render_report(build())


def with_trial(study: Study, trial_id: str, **changes: Any) -> Study:
    trials = tuple(t.model_copy(update=changes) if t.id == trial_id else t for t in study.trials)
    return study.model_copy(update={"trials": trials})


# ── the page ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("build", STUDIES)
def test_the_page_is_one_valid_file_that_needs_no_network(build: Callable[[], Study]) -> None:
    """Every verdict gives balanced tags, unique ids, and nothing a browser would fetch."""
    html = html_of(build)
    seen = Page(html)
    assert seen.open == []
    assert [name for name, count in Counter(seen.attributes("id")).items() if count > 1] == []
    assert not {"script", "link", "iframe", "img", "object"} & {tag for tag, _ in seen.elements}
    assert not re.search(r"@import|url\((?!#)", html)
    assert seen.attributes("src") == []


def test_the_answer_comes_first() -> None:
    """The champion, why, and how to load it stand before anything else."""
    text = Page(html_of(demo_study)).text
    answer, rest = text.split("Before and after", maxsplit=1)
    assert f"Champion: {CHAMPION}" in answer
    assert "best time to the last token of 2 candidates" in answer
    assert 'mlflow.pyfunc.load_model("models:/demo-glm@champion")' in answer
    assert BASELINE in rest


def test_every_candidate_is_listed_with_its_reason() -> None:
    """Losers, crashes and vetoes are shown with why, and in the order of the study."""
    study = demo_study()
    table = Page(html_of(demo_study)).text.split("Every candidate")[1].split("Quality against")[0]
    places = [table.index(trial.id) for trial in study.trials]
    assert places == sorted(places)
    for words in ("quality kept 62.6 %", "ended with SIGSEGV", "/dev/nvidia0 does not exist", "1.46× more"):
        assert words in table


def test_hostile_text_stays_text() -> None:
    """Markup in a reason, a knob or a path is shown, not run."""
    attack = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    study = demo_study()
    candidate = study.trials[0].candidate.model_copy(
        update={"knobs": {attack: attack}, "proposed_because": attack}
    )
    study = with_trial(
        study,
        CHAMPION,
        reason=attack,
        candidate=candidate,
        samples_path="javascript:alert(3)",
        log_path=attack,
    )
    seen = page(study.model_copy(update={"environment": {attack: attack}, "not_measured": (attack,)}))
    assert not {"script", "img"} & {tag for tag, _ in seen.elements}
    assert not any(name.startswith("on") for _, attrs in seen.elements for name in attrs)
    assert not any(href.startswith("javascript:") for href in seen.attributes("href"))
    assert seen.text.count(attack) == 7


def test_tables_have_headings_and_drawings_have_words() -> None:
    """A reader who cannot see the page gets column headings and a description of every drawing."""
    seen = Page(html_of(demo_study))
    tags = Counter(tag for tag, _ in seen.elements)
    assert tags["table"] == tags["thead"] == 4
    assert all(attrs.get("scope") for tag, attrs in seen.elements if tag == "th")
    drawings = [attrs for tag, attrs in seen.elements if tag == "div" and attrs.get("role") == "img"]
    assert len(drawings) == tags["svg"] == 4
    assert all(attrs.get("aria-label") for attrs in drawings)


def test_every_figure_in_a_table_has_its_unit() -> None:
    """No bold figure stands alone: ms, tokens/s, MiB, %, points or a ratio in words."""
    html = html_of(demo_study)
    shown = re.findall(r"<b[^>]*>([^<]*\d[^<]*)</b>", html)
    assert len(shown) > 60
    assert [f for f in shown if not re.search(r"( ms| tokens/s| [MG]iB| %| points|× \w+)$", f)] == []


@pytest.mark.parametrize(("samples", "label"), [(10, True), (P95_SAMPLES, False)])
def test_p95_is_indicative_until_there_are_enough_samples(samples: int, label: bool) -> None:
    """The label is on the page exactly while p95 may not decide."""
    study = demo_study()
    trials = [trial.model_copy(update={"metrics": dict(trial.metrics)}) for trial in study.trials]
    for trial in trials:
        if trial.metrics:
            few = {name: trial.metrics[name].values for name in ("ttft_ms", "tpot_ms")}
            for name, values in few.items():
                trial.metrics[name] = summarise((values * samples)[:samples], "ms")
    text = page(study.model_copy(update={"trials": tuple(trials)})).text
    assert ("(indicative)" in text) is label


def test_nothing_feasible_names_the_nearest_and_its_gaps() -> None:
    """Without a champion the page opens with what came nearest and by how much it misses each limit."""
    text = Page(html_of(infeasible_study)).text
    answer = text.split("Trade-offs")[0]
    assert "No candidate meets every limit" in answer
    assert "nearest is onnxruntime-int8-dynamic" in answer
    assert "TTFT 378 ms, limit 300 ms, 26.0 % beyond" in answer
    assert "peak memory 341 MiB, limit 200 MiB, 70.7 % beyond" in answer
    assert "Before and after" not in text


def test_a_failed_gate_is_told() -> None:
    """A refused study says which expectation failed and gives no way to load what was not registered."""
    text = Page(html_of(blocked_study)).text
    assert "Not registered" in text
    assert "failed: ttft_ms: p50 <= p95 <= p99 fails for torch-bf16" in text
    assert "load_model" not in text


def test_passwords_are_not_passed_on() -> None:
    """An address with a user and password is shown without them."""
    study = demo_study(registration=demo_registration("postgresql://mira:s3cret@db.example:5432/mlflow"))
    html = render_report(study)
    assert "s3cret" not in html
    assert "db.example:5432/mlflow" in html


def test_links_are_relative_to_the_study() -> None:
    """Raw samples, logs and study.json are linked as they lie beside the page."""
    links = Page(html_of(demo_study)).attributes("href")
    assert f"samples/{CHAMPION}.json" in links
    assert {"study.json", "data-docs/index.html"} <= set(links)


def test_a_stored_study_gives_the_same_page(tmp_path: Path) -> None:
    """`report` on a stored study differs only where the raw rounds are not at hand."""
    study = demo_study()
    stored = Study.model_validate_json(study.model_dump_json())
    html = write_report(stored, tmp_path / "report.html").read_text()
    assert comparison(stored) == comparison(study)
    assert f"Champion: {CHAMPION}" in html


# ── what was not measured ────────────────────────────────────────────────────────────────────────


def test_the_page_tells_what_was_not_measured() -> None:
    """The study's own list, and what its figures show: disturbed rounds, single samples, vetoes."""
    told = "\n".join(readout.caveats(demo_study()))
    assert "energy" in told
    assert "torch-bf16 was disturbed: other processes took more than 0.1 cores in 2 of 10 rounds." in told
    assert "Peak RSS and Load were sampled once per engine" in told
    assert (
        "Vetoed before the start, for the reasons given above: onnxruntime-cuda-fp16, tensorrt-fp16." in told
    )


def test_a_missing_baseline_is_told_and_not_compared() -> None:
    """Without the baseline there is no before and after, and the page says why."""
    study = with_trial(demo_study(), BASELINE, status="crashed", metrics={}, quality=None)
    assert comparison(study) == []
    assert any(line.startswith("The hand-tuned baseline") for line in readout.caveats(study))
    assert "Before and after" not in page(study).text


# ── words ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1245.3, "1,245"),
        (81.04, "81.0"),
        (8.919, "8.92"),
        (0.01234, "0.0123"),
        (0, "0"),
        (1e9, "1,000,000,000"),
    ],
)
def test_numbers_have_three_digits_and_no_exponent(value: float, shown: str) -> None:
    """Figures are as precise as the measurement is worth."""
    assert readout.number(value) == shown


def engine(seconds: list[float], name: str = "ttft_ms") -> Trial:
    trial = demo_study().trials[0]
    return trial.model_copy(update={"metrics": {name: summarise(seconds, "ms")}})


def test_a_comparison_tells_the_direction_and_its_interval() -> None:
    """Half the time is 2× faster; the interval holds the ratio and is wider than either median's alone."""
    fast, slow = engine([48, 49, 50, 50, 51, 52]), engine([97, 99, 100, 100, 101, 103])
    ratio = readout.compare("ttft_ms", fast, slow)
    assert ratio is not None
    assert readout.ratio_words("ttft_ms", ratio) == "2.00× faster"
    assert ratio.low < 100 / 52 < 2 < 100 / 48 < ratio.high
    back = readout.compare("ttft_ms", slow, fast)
    assert back is not None
    assert readout.ratio_words("ttft_ms", back) == "2.00× slower"
    assert readout.ratio_interval(back) == readout.ratio_interval(ratio)


def test_overlapping_engines_are_not_told_apart() -> None:
    """A ratio whose interval holds 1 is no difference."""
    ratio = readout.compare(
        "ttft_ms", engine([90, 95, 100, 105, 110, 99]), engine([92, 96, 103, 104, 111, 98])
    )
    assert ratio is not None
    assert readout.ratio_words("ttft_ms", ratio) == "no clear difference"


def test_a_comparison_needs_the_metric_on_both_sides() -> None:
    """Nothing is compared with what was not measured."""
    assert readout.compare("tpot_ms", engine([1.0, 2.0]), engine([1.0, 2.0])) is None


def test_a_miss_is_told_in_the_units_people_use() -> None:
    """Memory is in MiB, quality in percent."""
    memory = Miss(limit="max_memory", allowed=2**30, measured=1.5 * 2**30, unit="bytes", decided_by="")
    quality = Miss(limit="min_quality", allowed=0.99, measured=0.9801, unit="", decided_by="decode path")
    assert readout.miss_words(memory) == "peak memory 1,536 MiB, limit 1,024 MiB, 50.0 % beyond"
    assert readout.miss_words(quality) == "quality kept 98.0 %, limit 99.0 %, 1.0 % beyond"


# ── figures ──────────────────────────────────────────────────────────────────────────────────────

FIGURES = [
    figures.pareto_figure,
    figures.latency_figure,
    figures.samples_figure,
    figures.roofline_figure,
]


@pytest.mark.parametrize("draw", FIGURES)
def test_figures_are_small_pngs(draw: Callable[[Study], bytes]) -> None:
    """They are kept in Prefect's database, so 40 kB is the limit; an empty study has one too."""
    for study in (demo_study(), planned_study()):
        image = draw(study)
        assert image.startswith(b"\x89PNG")
        assert len(image) < 40_000


def test_inlined_figures_follow_the_colours_of_the_page() -> None:
    """Text and axes take the page's colours, so dark mode is readable."""
    svg = figures.pareto_figure(demo_study(), "svg").decode()
    assert svg.startswith("<svg")
    assert "currentColor" in svg
    assert figures.INK not in svg


def test_a_phase_is_compared_with_the_bound_of_its_own_precision() -> None:
    """The champion's decode is held to the int8 bound, and its share is bound over measured."""
    study = demo_study()
    _, decode = figures.phase_shares(study, study.trial(CHAMPION))
    assert decode.bound == study.analysis.bound("decode", "int8")
    assert decode.share == pytest.approx(
        decode.bound.bound_ms / study.trial(CHAMPION).metrics["tpot_ms"].median
    )


def test_figures_never_touch_pyplot() -> None:
    """pyplot keeps global state; tasks draw in threads."""
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from studies import demo_study; from open_autoglm import figures\n"
        "assert 'matplotlib' not in sys.modules\n"
        "figures.pareto_figure(demo_study())\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=120)
