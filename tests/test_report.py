"""The report page and its figures."""

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
    RIVAL,
    blocked_study,
    demo_registration,
    demo_study,
    doubtful_study,
    infeasible_study,
    planned_study,
    tied_study,
)

from open_autoglm import figures, readout
from open_autoglm.measure.statistics import P95_SAMPLES, summarise
from open_autoglm.report import comparison, render_report, write_report
from open_autoglm.schemas import Incumbent, Study
from open_autoglm.study import load_study, save_study

STUDIES = [demo_study, tied_study, doubtful_study, infeasible_study, blocked_study, planned_study]
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
    assert all(reason in answer for reason in demo_study().verdict.reasons)
    assert 'mlflow.pyfunc.load_model("models:/demo-glm@champion")' in answer
    assert BASELINE in rest


def test_every_candidate_is_listed_with_its_reason() -> None:
    """Losers, crashes and vetoes are shown with why, and in the order of the study."""
    study = demo_study()
    table = Page(html_of(demo_study)).text.split("Every candidate")[1].split("Trade-offs")[0]
    places = [table.index(f"{trial.id} {trial.engine}, ") for trial in study.trials]
    assert places == sorted(places)
    for words in (
        "quality kept 62.6 %",
        "ended with SIGSEGV",
        "/dev/nvidia0 does not exist",
        "meets every limit; ",
    ):
        assert words in table


def test_who_left_early_is_shown_with_what_is_known() -> None:
    """A rough estimate carries its mark, a fall says in which stage, and no finalist's figure is marked."""
    text = Page(html_of(demo_study)).text
    table = text.split("Every candidate")[1].split("Trade-offs")[0]
    screened = table[table.index("torch-fp32") : table.index("the reference.")]
    assert "~6,782 ms estimate" in screened
    assert "left: screening" in screened
    assert "left: race 4" in table
    assert "~" not in table[table.index(CHAMPION) : table.index("onnxruntime-int8-b32-t1")]


def test_the_page_shows_how_sure_the_answer_is() -> None:
    """Noise floor, pairs, rounds that were run again, how each stage ended, and how to run a trial again."""
    text = Page(html_of(demo_study)).text
    for words in (
        "ran in two processes, which differ by",
        "+49.7 % +48.7 % to +50.7 % 95 % 10 49.7 % slower",
        "not told apart below the noise floor",
        f"{BASELINE} final 10 2 2 4 found",
        "10 heats in 105 s, compared by time to last token. It ended: after 10 heats every interval",
        "threads 1 instead of 2",
        "decode reaches 46 % of the bandwidth bound",
        "it pays after 15 requests",
        f"open-autoglm reproduce studies/demo {CHAMPION}",
        "governor not told",
    ):
        assert words in text


def test_a_tie_keeps_the_incumbent_and_says_so() -> None:
    """The headline names what stays, and the reason has the interval."""
    answer = Page(html_of(tied_study)).text.split("Before and after")[0]
    assert f"Tie, keep the incumbent: {RIVAL}" in answer
    assert all(reason in answer for reason in tied_study().verdict.reasons)


def test_insufficient_evidence_says_what_it_would_take() -> None:
    """Who may be best, why that is not shown, and what to do about it."""
    answer = Page(html_of(doubtful_study)).text.split("Every candidate")[0]
    assert f"Insufficient evidence: {CHAMPION} may be best" in answer
    assert "--rounds" in answer


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
    changes = {"environment": {attack: attack}, "not_measured": (attack,), "search": (attack,)}
    race = study.races[0].model_copy(update={"stopped_because": attack})
    seen = page(study.model_copy(update={**changes, "races": (race,)}))
    assert not {"script", "img"} & {tag for tag, _ in seen.elements}
    assert not any(name.startswith("on") for _, attrs in seen.elements for name in attrs)
    assert not any(href.startswith("javascript:") for href in seen.attributes("href"))
    assert seen.text.count(attack) == 9


def test_tables_have_headings_and_drawings_have_words() -> None:
    """A reader who cannot see the page gets column headings and a description of every drawing."""
    seen = Page(html_of(demo_study))
    tags = Counter(tag for tag, _ in seen.elements)
    assert tags["table"] == tags["thead"] == 11
    assert all(attrs.get("scope") for tag, attrs in seen.elements if tag == "th")
    drawings = [attrs for tag, attrs in seen.elements if tag == "div" and attrs.get("role") == "img"]
    assert len(drawings) == tags["svg"] == 5
    assert all(attrs.get("aria-label") for attrs in drawings)


def test_every_figure_in_a_table_has_its_unit() -> None:
    """No bold figure stands alone: ms, tokens/s, MiB, %, points or a ratio in words."""
    html = html_of(demo_study)
    shown = re.findall(r"<b[^>]*>([^<]*\d[^<]*)</b>", html)
    assert len(shown) > 60
    assert [f for f in shown if not re.search(r"( ms| tokens/s| [MG]iB| %| points|× \w+)$", f)] == []


@pytest.mark.parametrize(("samples", "label"), [(10, True), (P95_SAMPLES, False)])
def test_p95_is_indicative_until_there_are_enough_samples(samples: int, label: bool) -> None:
    """The label is on the champion's p95 exactly while it may not decide."""
    study = demo_study()
    trials = [trial.model_copy(update={"metrics": dict(trial.metrics)}) for trial in study.trials]
    for trial in trials:
        if trial.metrics:
            few = {name: trial.metrics[name].values for name in ("ttft_ms", "tpot_ms")}
            for name, values in few.items():
                trial.metrics[name] = summarise((values * samples)[:samples], "ms")
    text = page(study.model_copy(update={"trials": tuple(trials)})).text
    tile = text[text.index("than the baseline p95") :].split("Decode speed")[0]
    assert ("(indicative)" in tile) is label


def test_nothing_feasible_names_the_nearest_and_its_gaps() -> None:
    """Without a champion the page opens with what came nearest and by how much it misses each limit."""
    text = Page(html_of(infeasible_study)).text
    answer = text.split("Trade-offs")[0]
    assert "No candidate meets every limit" in answer
    study = infeasible_study()
    nearest = study.trial(study.verdict.nearest or "")
    assert f"nearest is {nearest.id}" in answer
    assert nearest.misses
    assert all(readout.miss_words(miss) in answer for miss in nearest.misses)
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
    """`report` on a stored study shows what `optimize` showed."""
    study = demo_study(output_dir=tmp_path)
    (tmp_path / "samples").mkdir()
    for trial in study.trials:
        if trial.samples_path and trial.measurements:
            (tmp_path / trial.samples_path).write_text(trial.measurements.model_dump_json())
    save_study(study)
    stored = load_study(tmp_path)
    assert comparison(stored) == comparison(study)
    assert Page(write_report(stored, tmp_path / "report.html").read_text()).text.count("10 pairs") == 6


def test_without_raw_rounds_the_medians_are_compared() -> None:
    """A study without its samples still has a before and after, and says that it is not of pairs."""
    lost = Study.model_validate_json(demo_study().model_dump_json())
    rows = comparison(lost)
    assert [row.label for row in rows] == [row.label for row in comparison(demo_study())]
    assert {row.interval for row in rows if "pairs" in row.interval} == set()
    assert sum("not paired" in row.interval for row in rows) == 5


# ── what was not measured ────────────────────────────────────────────────────────────────────────


def test_the_page_tells_what_was_not_measured() -> None:
    """The study's own list, and what its figures show: disturbed rounds, single samples, vetoes."""
    told = "\n".join(readout.caveats(demo_study()))
    assert "Energy" in told
    assert (
        f"{BASELINE} was disturbed in 2 of 10 rounds, though they were run again: "
        "other processes took 0.31 cores." in told
    )
    assert "Peak RSS and Load were taken once per engine" in told
    assert "Left before the final, so known less well: onnxruntime-int8-b32-t1, torch-fp32" in told
    assert (
        "Vetoed before the start, for the reasons given above: onnxruntime-cuda-fp16, tensorrt-fp16." in told
    )


def test_an_incumbent_that_was_not_measured_again_is_told() -> None:
    """Which version it is, and why."""
    incumbent = Incumbent(model_name="demo-glm", version="2", note="it was made from another checkpoint")
    (told,) = [line for line in readout.caveats(demo_study().model_copy(update={"incumbent": incumbent}))
               if "registered champion" in line]  # fmt: skip
    assert "demo-glm version 2" in told
    assert "another checkpoint" in told


def test_a_missing_baseline_is_told_and_not_compared() -> None:
    """Without the baseline there is no before and after, and the page says why."""
    study = with_trial(demo_study(), BASELINE, status="crashed", metrics={}, quality=None)
    assert comparison(study) == []
    assert any(line.startswith("The hand-tuned baseline") for line in readout.caveats(study))
    assert "Before and after" not in page(study).text


# ── figures ──────────────────────────────────────────────────────────────────────────────────────

FIGURES = [
    figures.pareto_figure,
    figures.latency_figure,
    figures.samples_figure,
    figures.roofline_figure,
    figures.comparisons_figure,
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
