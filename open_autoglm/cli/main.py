"""Commands and exit codes: 0 champion (or done), 2 user error, 3 nothing feasible or not enough evidence,
1 bug, 130 interrupted."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from open_autoglm.cli.goal import EXAMPLE
from open_autoglm.errors import AutoGLMError, UserError

OBJECTIVES = ("latency", "ttft", "ttft_p95", "tpot", "e2e_p95", "throughput", "goodput", "memory")
SCENARIOS = ("single_stream", "server", "offline")
CRITERIA = ("contribution", "taylor")
"""As in the glossary, which `--help` need not import."""

EXIT_BUG, EXIT_USER_ERROR, EXIT_NOTHING_FEASIBLE, EXIT_INTERRUPTED = 1, 2, 3, 130


class _Group(click.Group):
    """Lists commands in the order a user meets them."""

    def list_commands(self, _context: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(version=version("open-autoglm"), prog_name="open-autoglm")
def cli() -> None:
    """Find the fastest way to serve a GLM, or any causal LM, on this machine, with evidence."""


def _model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that `optimize` and `analyze` share."""
    options = [
        click.option("--model-path", required=True, help="Checkpoint directory, or hub id when online."),
        click.option("--input-shape", default="1,512", show_default=True, help="Batch,prompt tokens."),
        click.option("--output-tokens", default=64, show_default=True, help="New tokens per prompt."),
        click.option(
            "--target-device",
            type=click.Choice(["auto", "cpu", "gpu"]),
            default="auto",
            show_default=True,
            help="Where the model will be served.",
        ),
        click.option("--trust-remote-code", is_flag=True, help="Run Python code of the checkpoint."),
        click.option("--allow-pickle", is_flag=True, help="Load .bin weights, which can run code."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@cli.command()
@_model_options
@click.option("--max-latency", help="Limit on TTFT p95, with its unit: 50ms, 0.05s.")
@click.option("--max-tpot", help="Limit on the time per output token: 20ms.")
@click.option("--max-memory", help="Limit on peak memory: 2GiB, 512MB.")
@click.option("--min-quality", type=float, help="Share of quality to keep.  [default: 0.99]")
@click.option("--max-token-flips", help="Limit on positions with another likeliest token.  [default: 10%]")
@click.option(
    "--objective",
    type=click.Choice(OBJECTIVES),
    help="What to make best within the limits.  [default: latency]",
)
@click.option("--goal", help=f"Objective and limits in one line: {EXAMPLE!r}.")
@click.option(
    "--scenario",
    type=click.Choice(SCENARIOS),
    default="single_stream",
    show_default=True,
    help="One request after the other, Poisson arrivals, or whole batches.",
)
@click.option("--request-rate-per-s", type=float, help="Arrivals per second, for --scenario server.")
@click.option("--length-mix", help="Prompt/output:weight, …, instead of one length: 128/32:3,512/64:1.")
@click.option("--engines", default="", help="Comma-separated; see `open-autoglm engines`. Default: all.")
@click.option("--rounds", type=int, default=10, show_default=True, help="Rounds per finalist, at least.")
@click.option("--target-width", type=float, default=0.05, show_default=True, help="Width of the intervals.")
@click.option("--timing-budget-s", type=float, default=120, show_default=True, help="For the final's rounds.")
@click.option("--search-generations", type=int, default=1, show_default=True, help="0: no search.")
@click.option("--prune/--no-prune", help="Try the best kinds with heads removed, too.  [default: no]")
@click.option("--recover/--no-recover", help="Try the pruned ones distilled again, too.  [default: no]")
@click.option("--quality-tokens", type=int, help="Most tokens scored one at a time.")
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses prompts and texts.")
@click.option("--register-as", help="Name in the MLflow registry.  [default: the checkpoint's]")
@click.option("--promote/--no-promote", default=True, help="Make the winner champion.  [default: yes]")
@click.option("--output", type=click.Path(path_type=Path), help="Directory of the study.")
@click.option("--dry-run", is_flag=True, help="Analyse and plan; run nothing.")
@click.option(
    "--serve",
    "serve_port",
    type=click.IntRange(0, 65535),
    is_flag=False,
    flag_value=8000,
    metavar="[PORT]",
    help="Serve the champion in the end, on this port.  [with no PORT: 8000]",
)
@click.option("--json", "as_json", is_flag=True, help="Put the Study as JSON on the last line of stdout.")
def optimize(**arguments: Any) -> None:
    """Find, check and register the best configuration within the limits."""
    from open_autoglm.cli.commands import run_optimize

    sys.exit(run_optimize(**arguments))


@cli.command()
@_model_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def analyze(**arguments: Any) -> None:
    """Show a model's structure and what binds it on this machine; loads no weights."""
    from open_autoglm.cli.commands import run_analyze

    run_analyze(**arguments)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array instead.")
def engines(as_json: bool) -> None:
    """List engines and whether they can run here."""
    from open_autoglm.cli.commands import run_engines

    run_engines(as_json)


@cli.command()
@click.argument("study", type=click.Path(path_type=Path), required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the Study as one JSON object instead.")
def report(study: Path | None, as_json: bool) -> None:
    """Show a finished study again (the latest, if none is named) and rewrite its HTML page."""
    from open_autoglm.cli.commands import run_report

    run_report(study, as_json)


@cli.command()
@click.argument("study", type=click.Path(path_type=Path))
@click.argument("trial")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def reproduce(study: Path, trial: str, as_json: bool) -> None:
    """Run one TRIAL of a finished STUDY again, and say whether its figures come back.

    Exit code 0 if they do, 3 if they do not; then the reason is told, as far as it can be found.
    """
    from open_autoglm.cli.commands import run_reproduce

    sys.exit(run_reproduce(study, trial, as_json=as_json))


@cli.command()
@click.argument("source")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any free one."
)
@click.option("--name", help="The model's name in requests.  [default: the bundle's]")
@click.option(
    "--slots", type=click.IntRange(1, 256), default=4, show_default=True, help="Answers at one time."
)
@click.option(
    "--max-tokens",
    type=click.IntRange(2),
    help="Prompt and answer together.  [default: 4096, or the context]",
)
@click.option("--threads", type=click.IntRange(1), help="Of the engine.  [default: all cores]")
@click.option(
    "--chunk-tokens",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="Of a prompt, read between two tokens of the others.",
)
@click.option(
    "--reuse-prefixes/--no-reuse-prefixes",
    default=True,
    show_default=True,
    help="Read the beginning of a prompt once if others had it.",
)
@click.option(
    "--queue", type=click.IntRange(0), default=64, show_default=True, help="Requests that may wait."
)
@click.option(
    "--deadline-s", type=float, default=30, show_default=True, help="Refuse who would wait longer than this."
)
@click.option("--slo-ttft", help="Promised p95 of the time to the first token: 300ms.  [default: none]")
@click.option("--slo-tpot", help="Promised p95 of the mean time of a token after it: 50ms.")
@click.option("--slo-e2e", help="Promised p95 of the time to the last token: 5s.")
@click.option("--keys", type=click.Path(path_type=Path), help="File of the callers' keys; see `new-key`.")
@click.option("--no-keys", is_flag=True, help="Let anybody in, from other machines too.")
@click.option("--rate", help="Limit of each key, or of all callers without one: 60/min.  [default: none]")
@click.option("--allow-host", multiple=True, help="Another name that requests may call this server by.")
@click.option(
    "--tls-cert", type=click.Path(path_type=Path), help="Certificate in PEM; the URL is https then."
)
@click.option("--tls-key", type=click.Path(path_type=Path), help="Its key.")
@click.option(
    "--log", type=click.Path(path_type=Path), help="JSON, a line for each request.  [default: standard error]"
)
@click.option("--log-prompts", is_flag=True, help="Write what is asked into the log, too.")
@click.option(
    "--follow/--no-follow",
    default=True,
    show_default=True,
    help="With models:/NAME@champion: change as the registry's aliases do.",
)
def serve(**arguments: Any) -> None:
    """Serve SOURCE as OpenAI's API: a bundle, a study's directory, or models:/NAME@champion."""
    from open_autoglm.cli.serve import ServeArguments, run_serve

    sys.exit(run_serve(ServeArguments(**arguments)))


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def endpoints(as_json: bool) -> None:
    """Show the endpoints that run here, and who answers at each."""
    from open_autoglm.cli.running import run_endpoints

    sys.exit(run_endpoints(as_json=as_json))


@cli.command()
@click.argument("source")
@click.option("--port", type=click.IntRange(1, 65535), help="Of the endpoint, if several run here.")
@click.option("--json", "as_json", is_flag=True, help="Print who answers now as one JSON object instead.")
def swap(source: str, **arguments: Any) -> None:
    """Let a running endpoint serve SOURCE instead, between two tokens, if it passes its checks."""
    from open_autoglm.cli.running import run_swap

    sys.exit(run_swap(source, **arguments))


@cli.command()
@click.option("--by", required=True, help="That each call of the model takes longer: 60%, 0% to end it.")
@click.option("--port", type=click.IntRange(1, 65535), help="Of the endpoint, if several run here.")
@click.option("--json", "as_json", is_flag=True, help="Print who answers now as one JSON object instead.")
def slow(**arguments: Any) -> None:
    """Make the champion of a running endpoint slower, to rehearse; its next engine process is not."""
    from open_autoglm.cli.running import run_slow

    sys.exit(run_slow(**arguments))


@cli.command()
@click.argument("config")
@click.option("--once", is_flag=True, help="One judgement; exit code 0 ok, 3 breached, 4 no data.")
@click.option("--json", "as_json", is_flag=True, help="Print each judgement as one JSON object instead.")
def watch(config: str, **arguments: Any) -> None:
    """Judge what is served by its promise and its own baseline, as CONFIG says: a name, or a file."""
    from open_autoglm.cli.watch import run_watch

    sys.exit(run_watch(config, **arguments))


@cli.command("new-key")
@click.argument("name")
@click.option("--admin", is_flag=True, help="It may administer the server, too.")
@click.option("--rate", help="Its own limit: 60/min.")
def new_key(**arguments: Any) -> None:
    """Make a key for callers of `serve`, and the line that lets it in."""
    from open_autoglm.cli.serve import run_new_key

    run_new_key(**arguments)


def _move_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of the commands that move aliases."""
    options = [
        click.option("--expected", help="Refuse unless the champion is still this version."),
        click.option("--reason", default="", help="Kept with the event."),
        click.option("--by", help="Who moves it.  [default: the user]"),
        click.option("--json", "as_json", is_flag=True, help="Print the event as one JSON object instead."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@cli.command()
@click.argument("name")
@click.option("--version", help="Version to promote.  [default: the challenger]")
@_move_options
def promote(name: str, **arguments: Any) -> None:
    """Make a version of the registered model NAME its champion; the champion becomes `previous`."""
    from open_autoglm.cli.aliases import run_promote

    sys.exit(run_promote(name, **arguments))


@cli.command()
@click.argument("name")
@click.option("--champion", is_flag=True, help="Bring `previous` back even if there is a challenger.")
@_move_options
def rollback(name: str, **arguments: Any) -> None:
    """Take the challenger of NAME away; without one, make `previous` the champion again."""
    from open_autoglm.cli.aliases import run_rollback

    sys.exit(run_rollback(name, **arguments))


@cli.command()
@click.argument("name")
@click.option("--version", help="The challenger.  [default: the one there is]")
@click.option("--weight", type=click.FloatRange(0, 100), help="Percent of the requests it answers.")
@click.option("--shadow", type=click.FloatRange(0, 100), help="Percent of the others it answers unseen.")
@click.option("--stop", is_flag=True, help="Take the challenger away.")
@_move_options
def canary(name: str, **arguments: Any) -> None:
    """Give a version of NAME, its challenger, a share of the requests."""
    from open_autoglm.cli.aliases import run_canary

    sys.exit(run_canary(name, **arguments))


@cli.command()
@click.argument("name")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="Newest first.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def events(name: str, **arguments: Any) -> None:
    """Show which versions of NAME carry which alias, and who moved them when and why."""
    from open_autoglm.cli.aliases import run_events

    sys.exit(run_events(name, **arguments))


@cli.command()
@click.argument("model")
@click.option("--keep-quality", default="99%", show_default=True, help="Share of quality to keep.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Directory of the new checkpoint."
)
@click.option(
    "--criterion",
    type=click.Choice(CRITERIA),
    default=CRITERIA[0],
    show_default=True,
    help="What says which heads matter least: the norm of what they add, or the loss's derivatives.",
)
@click.option(
    "--recover-steps",
    type=click.IntRange(0, 100_000),
    default=0,
    show_default=True,
    help="Steps of distillation from the whole model after each cut, at most.",
)
@click.option(
    "--recover-s",
    type=click.FloatRange(0, min_open=True),
    default=600,
    show_default=True,
    help="Seconds for them, at most.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Chooses the texts.")
@click.option("--json", "as_json", is_flag=True, help="Put the run as JSON on the last line of stdout.")
def prune(**arguments: Any) -> None:
    """Remove as many attention heads of MODEL as the quality allows, the same number in every layer.

    Exit code 0 if a checkpoint was written, 3 if every head is needed; then its price is told.
    """
    from open_autoglm.cli.commands import run_prune

    sys.exit(run_prune(**arguments))


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def doctor(as_json: bool) -> None:
    """Say what works on this machine, and how to get what does not."""
    from open_autoglm.cli.doctor import run_doctor

    sys.exit(run_doctor(as_json))


@cli.command("demo-model")
@click.argument("directory", type=click.Path(path_type=Path))
def demo_model(directory: Path) -> None:
    """Write a small real GLM into DIRECTORY (135 M parameters, about 0.5 GB)."""
    from open_autoglm.cli.commands import run_demo_model

    run_demo_model(directory)


def main() -> None:
    """Entry point: turns expected errors into one sentence and an exit code."""
    try:
        cli(prog_name="open-autoglm", standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt):
        click.echo("interrupted; the same command goes on where it stopped", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(EXIT_USER_ERROR)
    except AutoGLMError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_BUG)
