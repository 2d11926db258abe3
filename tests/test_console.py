"""What people see in the terminal, and in the file when they pipe it."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from rich.console import Console
from studies import (
    CHAMPION,
    RIVAL,
    blocked_study,
    demo_analysis,
    demo_study,
    doubtful_study,
    infeasible_study,
    planned_study,
    tied_study,
)

from open_autoglm import readout
from open_autoglm.cli.console import (
    PIPED_WIDTH,
    make_console,
    print_analysis,
    print_engines,
    print_plan,
    print_study,
)
from open_autoglm.schemas import OptimizeSpec, Probe, Study


def printed(show: Callable[[Console], None], width: int | None = None) -> str:
    file = io.StringIO()
    console = make_console(file)
    if width:
        console.width = width
    show(console)
    return file.getvalue()


def study_text(study: Study, width: int | None = None) -> str:
    return printed(lambda console: print_study(study, console, {"Prefect": "http://127.0.0.1:4200"}), width)


def row_of(text: str, candidate: str) -> list[str]:
    return next(line.split() for line in text.splitlines() if line.split()[:1] == [candidate])


def test_the_table_has_one_row_per_candidate_with_its_figures() -> None:
    """The figure the study is about with its interval, the others, and the verdict stand in one line."""
    text = study_text(demo_study())
    assert " ".join(row_of(text, CHAMPION)) == (f"{CHAMPION} 1,515 ±2.1 % 738 12.3 81.0 298 99.4 % champion")
    assert row_of(text, "onnxruntime-fp32")[-2:] == ["1.50×", "slower"]
    assert "tensorrt-fp16" not in text.partition("How sure is this")[0]  # it has no figures


def test_who_left_early_has_estimates_that_are_marked() -> None:
    """Rough figures carry their mark, and the mark is explained."""
    text = study_text(demo_study())
    assert row_of(text, "onnxruntime-int4-b32")[1:6] == ["~1,384", "–", "–", "–", "242"]
    assert row_of(text, "~")[:3] == ["~", "an", "estimate"]


def test_the_objective_decides_which_figure_has_the_interval() -> None:
    """Asked for decode speed, the interval is that of the decode speed."""
    spec = OptimizeSpec(model_path="demo-glm", objective="throughput")
    row = row_of(study_text(demo_study(spec)), CHAMPION)
    assert row[1:4] == ["81.0", "±1.2", "%"]


def test_it_says_how_sure_the_answer_is() -> None:
    """The noise floor, how the stages ended, and what was not measured anew."""
    study = demo_study()
    trials = tuple(t.model_copy(update={"reused": ("export",)}) for t in study.trials[:2])
    text = study_text(study.model_copy(update={"trials": (*trials, *study.trials[2:])}))
    told = " ".join(text.partition("How sure is this")[2].partition("Why not")[0].split())
    assert "Noise floor 1.3 %" in told
    assert "Final 4 entered, 10 heats in 105 s" in told
    assert f"Reused export: 2 of 12 ({CHAMPION}, {RIVAL})" in told


@pytest.mark.parametrize(
    "build", [demo_study, tied_study, doubtful_study, infeasible_study, blocked_study, planned_study]
)
def test_it_fits_a_hundred_columns(build: Callable[[], Study]) -> None:
    """Nothing but what is there to be copied is wider, and no candidate's name is broken."""
    study = build()
    text = study_text(study, width=100)
    told, _, _ = text.partition("Where to look")
    assert max(map(len, told.splitlines())) <= 100
    for trial in study.trials:
        assert trial.id in text.split() if trial.status != "vetoed" else f"{trial.id}:" in text


def test_a_pipe_gets_plain_text_of_fixed_width() -> None:
    """No colours and whole rows, whatever the terminal was."""
    text = study_text(demo_study())
    assert "\x1b" not in text
    assert max(map(len, text.partition("Where to look")[0].splitlines())) == PIPED_WIDTH


def test_a_terminal_gets_colours() -> None:
    """The champion stands out where colours are shown."""
    file = io.StringIO()
    print_study(demo_study(), Console(file=file, force_terminal=True, color_system="standard", width=110))
    row = next(line for line in file.getvalue().splitlines() if CHAMPION in line)
    assert "\x1b[1;32m" in row


def test_every_loser_has_its_reason_and_the_champion_has_his() -> None:
    """Why not the others, then why this one."""
    text = study_text(demo_study())
    losers, _, answer = text.partition("Why not the others")[2].partition(f"Champion: {CHAMPION}")
    assert "quality kept 62.6 %, limit 99.0 %, 36.7 % beyond" in losers
    assert "ended with SIGSEGV" in losers
    vetoed = losers.partition("Vetoed before the start")[2]
    assert " ".join(vetoed.split()).startswith("onnxruntime-cuda onnxruntime-cuda-fp16: this machine has no")
    assert "pip install tensorrt" in vetoed
    assert "best time to the last token" in answer


def test_vetoes_with_one_reason_are_told_together() -> None:
    """Twenty candidates that all need a GPU are one sentence for each engine."""
    study = demo_study()
    veto = study.trial("tensorrt-fp16")
    more = [
        veto.model_copy(update={"id": name, "candidate": veto.candidate.model_copy(update={"id": name})})
        for name in ("tensorrt-w8", "tensorrt-fp8")
    ]
    text = study_text(study.model_copy(update={"trials": (*study.trials, *more)}), width=150)
    assert "tensorrt-fp16, tensorrt-w8, tensorrt-fp8: not installed" in text


def test_links_and_commands_are_never_wrapped() -> None:
    """They are there to be copied."""
    lines = study_text(demo_study(), width=60).splitlines()
    assert any(line.endswith("?workflowType=machine_learning") for line in lines)
    assert any('load_model("models:/demo-glm@champion")' in line for line in lines)
    assert any("studies/demo/report.html" in line for line in lines)
    assert any(line.split() == ["Prefect", "http://127.0.0.1:4200"] for line in lines)


def test_nothing_feasible_tells_the_nearest_and_every_gap() -> None:
    """The answer is what came nearest and by how much it misses each limit."""
    answer = study_text(infeasible_study()).partition("No candidate meets every limit")[2]
    study = infeasible_study()
    nearest = study.trial(study.verdict.nearest or "")
    assert f"nearest is {nearest.id}" in answer
    assert all(readout.miss_words(miss) in answer for miss in nearest.misses)
    assert "load_model" not in answer


def test_a_failed_gate_is_told_once() -> None:
    """The expectation that failed is named, and the best candidate is not called the champion."""
    text = study_text(blocked_study())
    assert text.count("p50 <= p95 <= p99 fails for torch-bf16") == 1
    assert row_of(text, CHAMPION)[-3:] == ["best,", "not", "registered"]


def test_a_tie_and_a_doubt_are_told() -> None:
    """The headline is the verdict, and what the verdict is about is not listed among the losers."""
    assert f"Tie, keep the incumbent: {RIVAL}" in study_text(tied_study())
    losers, _, answer = (
        study_text(doubtful_study()).partition("Why not")[2].partition("Insufficient evidence")
    )
    assert f"{CHAMPION} may be best" in answer
    assert not any(line.split()[:1] == [CHAMPION] for line in losers.splitlines())


def test_what_a_runtime_printed_is_shown_as_it_is() -> None:
    """Brackets are no markup, and escape sequences do not reach the terminal."""
    study = demo_study()
    reason = "RuntimeError: [/red] bad [bold]shape[/] \x1b[31m\x07"
    trials = tuple(t.model_copy(update={"reason": reason, "misses": ()}) for t in study.trials)
    text = study_text(study.model_copy(update={"trials": trials}))
    assert "RuntimeError: [/red] bad [bold]shape[/] [31m" in text
    assert "\x1b" not in text


def test_the_analysis_names_what_binds_each_phase() -> None:
    """Structure, host and the roofline of every phase and precision, with units."""
    text = printed(lambda console: print_analysis(demo_analysis(), console))
    assert "GQA: 9 heads of 64 over 3 key/value heads" in text
    assert "29.0 GB/s, measured" in text
    assert row_of(text, "prefill") == ["prefill", "fp32", "595", "19.4", "536", "MiB", "compute", "595"]
    assert row_of(text, "decode")[-2:] == ["bandwidth", "19.4"]


def test_a_model_too_large_for_the_host_has_no_least_time() -> None:
    """Where capacity binds, the table says that it does not fit."""
    analysis = demo_analysis()
    too_large = tuple(bound.model_copy(update={"binds": "capacity"}) for bound in analysis.roofline)
    analysis = analysis.model_copy(update={"roofline": too_large})
    text = printed(lambda console: print_analysis(analysis, console))
    assert row_of(text, "decode")[-4:] == ["capacity", "does", "not", "fit"]


def test_experts_are_shown_only_where_there_are_some() -> None:
    """A mixture of experts says how many of them a token uses."""
    analysis = demo_analysis()
    mixture = analysis.profile.model_copy(
        update={"experts": 64, "experts_per_token": 4, "shared_experts": 1, "active_parameters": 30_000_000}
    )
    text = printed(lambda c: print_analysis(analysis.model_copy(update={"profile": mixture}), c))
    assert "4 of 64 per token, 1 shared" in text
    assert "30.0 M active per token" in text
    assert "Experts" not in printed(lambda c: print_analysis(analysis, c))


def test_engines_that_are_missing_say_how_to_get_them() -> None:
    """The install command is shown for what cannot run, and only for that."""
    probes = [
        Probe(engine="torch", stage="ready", version="2.13.0", reason="found", install="pip install torch"),
        Probe(engine="tensorrt", stage="missing", reason="not found", install="pip install tensorrt"),
    ]
    text = printed(lambda console: print_engines(probes, console))
    assert row_of(text, "torch") == ["torch", "ready", "2.13.0", "found"]
    assert "pip install tensorrt" in text
    assert "pip install torch\n" not in text


def test_a_plan_separates_what_would_run_from_what_is_vetoed() -> None:
    """Each candidate has its reason, on the side it belongs to."""
    candidates = [trial.candidate for trial in demo_study().trials]
    chosen, _, vetoed = printed(lambda console: print_plan(candidates, console)).partition("Vetoed")
    assert "10 of 12 candidates would be measured" in chosen
    assert "fewer scales than blocks of 32 have" in chosen
    assert "tensorrt-fp16" not in chosen
    assert "pip install tensorrt" in vetoed
