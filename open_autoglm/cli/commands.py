"""What the commands do; every import that costs time is here or deeper."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError

from open_autoglm import engines
from open_autoglm.cli.goal import parse_goal, parse_share
from open_autoglm.errors import UserError
from open_autoglm.schemas import Analysis, Candidate, Checkpoint, Criterion, OptimizeSpec, Study
from open_autoglm.settings import Settings

EXIT_CODES = {
    "champion": 0, "tie": 0, "dry_run": 0, "nothing_feasible": 3, "insufficient_evidence": 3, "gate_failed": 3
}  # fmt: skip

_FLAGS = {
    "batch_size": "--input-shape",
    "prompt_tokens": "--input-shape",
}
"""Flags that are not called as their fields are."""

_GOAL = ("objective", "max_latency", "max_tpot", "max_memory", "min_quality", "max_token_flips")


def make_spec(arguments: dict[str, Any]) -> OptimizeSpec:
    """An OptimizeSpec from command-line arguments. Raises UserError naming the flag that is wrong."""
    batch_size, prompt_tokens = parse_shape(arguments.pop("input_shape"))
    chosen = tuple(name.strip() for name in arguments.pop("engines", "").split(",") if name.strip())
    for name in chosen:
        engines.get(name)
    output = arguments.pop("output", None)
    goal = arguments.pop("goal", None)
    given = {name: value for name, value in arguments.items() if value is not None}
    if goal is not None:
        given |= _fields_of_goal(goal, given)
    try:
        return OptimizeSpec(
            batch_size=batch_size,
            prompt_tokens=prompt_tokens,
            engines=chosen,
            output=str(Path(output).expanduser().absolute()) if output else None,
            **given,
        )
    except ValidationError as error:
        problem = error.errors()[0]
        name = str(problem["loc"][0]) if problem["loc"] else "length_mix"
        flag = _FLAGS.get(name, "--" + name.replace("_", "-"))
        message = problem["msg"].removeprefix("Value error, ")
        raise UserError(f"{flag}: {message} (got {problem['input']!r})") from None


def _fields_of_goal(goal: str, given: dict[str, Any]) -> dict[str, Any]:
    """What ``goal`` sets. Raises UserError if a flag sets the same."""
    twice = [name for name in _GOAL if name in given]
    if twice:
        flag = "--" + twice[0].replace("_", "-")
        raise UserError(f"--goal sets objective and limits, and so does {flag}: give one of them")
    return parse_goal(goal)


def parse_shape(text: str) -> tuple[int, int]:
    """``"1,512"`` is one prompt of 512 tokens. Raises UserError."""
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UserError(
            f"--input-shape: {text!r} is not a shape; write batch,prompt tokens, both at least 1, like 1,512"
        )
    return int(parts[0]), int(parts[1])


def run_optimize(*, dry_run: bool, as_json: bool, serve_port: int | None, **arguments: Any) -> int:
    """Run the optimize flow and show its study; returns the exit code.

    With ``serve_port``, this process becomes the server of the champion, if there is one.
    """
    from open_autoglm.cli.console import make_console, print_plan, print_study

    if serve_port is not None and dry_run:
        raise UserError("--dry-run finds no champion that --serve could serve: give one of them")
    settings = Settings()
    spec = make_spec(arguments)
    checkpoint, analysis, candidates = _plan(spec, settings)
    # With --json, stdout carries the JSON object and everything for people goes to stderr.
    console = make_console(sys.stderr if as_json else sys.stdout)
    if dry_run:
        study = _planned(spec, settings, checkpoint, analysis, candidates)
        print_plan(candidates, console)
    else:
        study = _run_flow(spec, settings)
        print_study(study, console, _links(study, settings))
    if as_json:
        click.echo(study.model_dump_json())
    if serve_port is not None and study.bundle is not None:
        _become_server(study.output_dir, serve_port)
    return EXIT_CODES[study.verdict.kind]


def _become_server(study: Path, port: int) -> None:
    """Go on as ``open-autoglm serve``, without anything that the study has loaded."""
    sys.stdout.flush()
    sys.stderr.flush()
    command = [sys.executable, "-m", "open_autoglm.cli", "serve", str(study), "--port", str(port)]
    os.execv(sys.executable, command)


def _plan(spec: OptimizeSpec, settings: Settings) -> tuple[Checkpoint, Analysis, list[Candidate]]:
    """What the flow will begin with, so that a wrong request is found before a server is started for it."""
    from open_autoglm.export.store import check_disk
    from open_autoglm.packages import check_packages
    from open_autoglm.planning import plan, resolve_device
    from open_autoglm.study import check_claim, check_output, study_key

    check_packages()
    if spec.output is not None:
        check_output(Path(spec.output))
    checkpoint, analysis = _analyse(spec, settings)
    candidates = plan(analysis, spec, resolve_device(spec.target_device, analysis.hardware))
    check_disk(candidates, analysis.profile, settings.exports)
    if spec.output is not None:
        check_claim(Path(spec.output), study_key(spec, checkpoint, analysis.hardware))
    return checkpoint, analysis, candidates


def _analyse(spec: OptimizeSpec, settings: Settings) -> tuple[Checkpoint, Analysis]:
    from open_autoglm.measure.lease import preparing
    from open_autoglm.planning import load_model

    with preparing():
        checkpoint = load_model(spec, settings)
    return checkpoint, _analysis(checkpoint, spec, settings)


def _analysis(checkpoint: Checkpoint, spec: OptimizeSpec, settings: Settings) -> Analysis:
    from open_autoglm.hardware import probe_hardware
    from open_autoglm.measure.lease import preparing
    from open_autoglm.roofline import analyze

    hardware = probe_hardware(settings.home / "hardware")
    with preparing():
        return analyze(checkpoint, spec, hardware)


def _planned(
    spec: OptimizeSpec,
    settings: Settings,
    checkpoint: Checkpoint,
    analysis: Analysis,
    candidates: Sequence[Candidate],
) -> Study:
    """The study that would be run: analysis and candidates, nothing measured, nothing written."""
    from datetime import UTC, datetime

    from open_autoglm.schemas import Trial, Verdict

    trials = tuple(
        Trial(
            id=candidate.id,
            engine=candidate.engine,
            candidate=candidate,
            status="vetoed" if candidate.vetoed_because else "ok",
            reason=candidate.vetoed_because or candidate.proposed_because,
        )
        for candidate in candidates
    )
    return Study(
        id=f"{checkpoint.name}-dry-run",
        created=datetime.now(UTC),
        spec=spec,
        checkpoint=checkpoint,
        analysis=analysis,
        verdict=Verdict(kind="dry_run", reasons=("nothing was measured: this is the plan",)),
        trials=trials,
        output_dir=settings.studies,
    )


def _run_flow(spec: OptimizeSpec, settings: Settings) -> Study:
    from open_autoglm.cli.prefect_server import prefect_server
    from open_autoglm.measure.isolation import stop_children
    from open_autoglm.measure.lease import preparing
    from open_autoglm.progress import LOGGER

    _show_progress()

    def interrupt(*_: object) -> None:
        logging.disable(logging.CRITICAL)  # what Prefect says of each task that ends now
        stop_children()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    with ExitStack() as running:
        with preparing():
            running.enter_context(prefect_server(settings))
            from flows.optimize import optimize

        try:
            study: Study = optimize(spec)
        finally:
            for handler in logging.getLogger(LOGGER).handlers:
                handler.flush()  # Prefect's sends in batches, and its server ends with this block
    return study


def _show_progress() -> None:
    """Progress lines on stderr, with the time since the start."""
    from rich.console import Console
    from rich.logging import RichHandler

    from open_autoglm.progress import LOGGER

    handler = RichHandler(
        console=Console(stderr=True), show_path=False, show_level=False, log_time_format="[%X]", markup=False
    )
    logger = logging.getLogger(LOGGER)
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    logger.propagate = False


def _links(study: Study, settings: Settings) -> dict[str, str]:
    from open_autoglm.cli.prefect_server import is_up
    from open_autoglm.readout import study_link

    links = {}
    if is_up(settings.prefect_url):
        links["Prefect"] = settings.prefect_url
    if is_up(settings.mlflow_url) and (run := study_link(study, settings.mlflow_url)):
        links["MLflow page"] = run
    return links or {"Servers": "make up starts Prefect and MLflow on this machine"}


def run_analyze(*, as_json: bool, **arguments: Any) -> None:
    from open_autoglm.cli.console import make_console, print_analysis

    _, analysis = _analyse(make_spec(arguments), Settings())
    if as_json:
        click.echo(analysis.model_dump_json())
    else:
        print_analysis(analysis, make_console())


def run_engines(as_json: bool) -> None:
    import json

    from open_autoglm.cli.console import make_console, print_engines

    probes = [engines.probe(name) for name in engines.names()]
    if as_json:
        click.echo(json.dumps([probe.model_dump(mode="json") for probe in probes]))
    else:
        print_engines(probes, make_console())


def run_report(root: Path | None, as_json: bool) -> None:
    from open_autoglm.cli.console import make_console, print_study
    from open_autoglm.report import write_report
    from open_autoglm.study import latest_study, load_study

    settings = Settings()
    study = load_study(root or latest_study(settings))
    write_report(study, study.output_dir / "report.html")
    if as_json:
        click.echo(study.model_dump_json())
    else:
        print_study(study, make_console(), _links(study, settings))


def run_reproduce(root: Path, trial_id: str, *, as_json: bool) -> int:
    """Run one trial again; 0 if its figures come back, else 3."""
    from open_autoglm.cli.console import make_console
    from open_autoglm.cli.reproduction import print_reproduction
    from open_autoglm.reproduction import reproduce
    from open_autoglm.study import load_study

    _show_progress()
    result = reproduce(load_study(root), trial_id, Settings())
    if as_json:
        click.echo(result.model_dump_json())
    else:
        print_reproduction(result, make_console())
    return 3 if result.outcome == "not_reproduced" else 0


def run_prune(
    model: str,
    output: Path,
    *,
    keep_quality: str,
    criterion: Criterion,
    recover_steps: int,
    recover_s: float,
    **options: Any,
) -> int:
    """Search for heads that are not needed and write what is left to ``output``; 3 if all are needed.

    ``options`` are ``seed`` and ``as_json``.
    """
    from open_autoglm.checkpoint import load_checkpoint
    from open_autoglm.cli.console import make_console
    from open_autoglm.cli.pruning import print_pruning
    from open_autoglm.measure.lease import preparing
    from open_autoglm.pruning.loop import deliver, prune, pruning_spec

    share = parse_share(keep_quality, "--keep-quality")
    _check_empty(output)
    settings, as_json = Settings(), options["as_json"]
    with preparing():
        checkpoint = load_checkpoint(model, cache=settings.checkpoints)
    spec = pruning_spec(checkpoint, share, options["seed"])
    analysis = _analysis(checkpoint, spec, settings)
    _show_progress()
    run = prune(
        checkpoint,
        analysis,
        spec,
        settings,
        criterion=criterion,
        recover_steps=recover_steps,
        recover_s=recover_s,
    )
    run = deliver(run, output.expanduser().absolute())
    # With --json, stdout carries the JSON object and everything for people goes to stderr.
    print_pruning(run, make_console(sys.stderr if as_json else sys.stdout))
    if as_json:
        click.echo(run.model_dump_json())
    return 0 if run.pruned is not None else 3


def _check_empty(output: Path) -> None:
    """Refuse early a directory that holds anything."""
    from open_autoglm.study import check_output

    if output.is_dir() and any(output.iterdir()):
        raise UserError(f"{output} is not empty; choose an empty or a new directory")
    check_output(output)


def run_demo_model(directory: Path) -> None:
    from open_autoglm.demo_model import write_demo_model

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

    def tell(line: str) -> None:
        click.echo(line, err=True)

    cache = Settings().home / "cache" / "demo"
    click.echo(write_demo_model(directory, download_cache=cache, progress=tell))
