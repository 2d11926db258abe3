"""From a checkpoint to ONNX files, by the first route that preflight finds right."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Protocol

from open_autoglm.engines.contract import ExportContext
from open_autoglm.export import genai_route, transformers_route
from open_autoglm.export.graph import DecoderFacts, choose_logits
from open_autoglm.export.int8 import int8_export
from open_autoglm.export.ledger import Ledger
from open_autoglm.export.preflight import check_route, decoder_facts, small_config, traits
from open_autoglm.export.quantize import dynamic_int8_export, exact_export, weight_only_export
from open_autoglm.export.recipe import OnnxRecipe
from open_autoglm.measure.isolation import Failure, run_isolated
from open_autoglm.packages import version_of
from open_autoglm.schemas import Checkpoint, Model


class Route(Protocol):
    """One way to write a decoder as an fp32 ONNX graph: the modules here that end in ``_route``."""

    @property
    def NAME(self) -> str: ...  # noqa: N802
    @property
    def KV_CACHE(self) -> str: ...  # noqa: N802

    def supports(self, model_type: str) -> str | None: ...
    def installed(self) -> str | None: ...
    def export(self, checkpoint: Checkpoint, output: Path, scratch: Path) -> None: ...


ROUTES: tuple[Route, ...] = (genai_route, transformers_route)
"""In order of preference."""

CUDA_ROUTES: tuple[Route, ...] = (genai_route,)
"""Those that write graphs in 16 bits."""

PREFLIGHT_TIMEOUT_S = 600.0


class NoRoute(RuntimeError):
    """No export route is right for the model; the message says why for each."""


@cache
def library_versions() -> dict[str, str]:
    """The libraries that decide what an export contains; part of every cache and ledger key."""
    builds_for_gpus = {"onnxruntime": "onnxruntime-gpu", "onnxruntime-genai": "onnxruntime-genai-cuda"}
    names = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "onnxruntime-genai")
    return {name: version_of(name, builds_for_gpus.get(name, name)) or "absent" for name in names}


def export_onnx(checkpoint: Checkpoint, recipe: OnnxRecipe, context: ExportContext) -> str:
    """Write GRAPH, its data and the decoder facts into ``context.output``; return the route's name.

    A route is found right in fp32 on the CPU; what ``recipe.compute`` changes is judged with the trial.
    Raises NoRoute, or what the route raises.
    """
    # Inside the output, so that it goes with it if the exporter ends the process.
    with tempfile.TemporaryDirectory(dir=context.output) as scratch:
        routes = ROUTES if recipe.compute == "fp32" else CUDA_ROUTES
        route = choose_route(checkpoint, context.ledger, Path(scratch), routes)
        work, exact = Path(scratch) / "work", Path(scratch) / "exact"
        work.mkdir()
        exact.mkdir()
        if recipe.compute == "fp32":
            route.export(checkpoint, exact, work)
        else:
            genai_route.export_for_cuda(checkpoint, exact, work, recipe.compute)
        choose_logits(exact)
        facts = _facts(checkpoint, route)
        _apply(recipe, exact, context.output, checkpoint, facts)
    facts.write(context.output)
    return route.NAME


def _apply(
    recipe: OnnxRecipe, exact: Path, output: Path, checkpoint: Checkpoint, facts: DecoderFacts
) -> None:
    match recipe.scheme:
        case "fp32" | "half":
            exact_export(exact, output)
        case "dynamic_int8":
            dynamic_int8_export(exact, output)
        case "weight_only":
            weight_only_export(exact, output, recipe)
        case "int8":
            int8_export(exact, output, checkpoint, recipe, facts)


def refusal(model_type: str, routes: Sequence[Route] = ROUTES) -> str | None:
    """Why none of ``routes`` takes the model type, known before anything is exported; None if one does,
    installed or not."""
    reasons = {route.NAME: route.supports(model_type) for route in routes}
    if None in reasons.values():
        return None
    return "no export route; " + "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def choose_route(
    checkpoint: Checkpoint, ledger_path: Path, scratch: Path, routes: Sequence[Route] = ROUTES
) -> Route:
    """The first of ``routes`` that works for this model, by the ledger or by a preflight entered into it."""
    ledger = Ledger(ledger_path)
    reasons = []
    with ledger.locked():
        for route in routes:
            problem = route.supports(checkpoint.model_type) or route.installed()
            problem = problem or _preflight(route, checkpoint, ledger, scratch)
            if problem is None:
                return route
            reasons.append(f"{route.NAME}: {problem}")
    raise NoRoute("no export route is right for this model; " + "; ".join(reasons))


def _preflight(route: Route, checkpoint: Checkpoint, ledger: Ledger, scratch: Path) -> str | None:
    """None if the route is right, else why not; found out at most once."""
    key = (checkpoint.model_type, route.NAME, traits(small_config(checkpoint)), library_versions())
    known = ledger.get(*key)
    if known is None:
        failure = try_route(route, checkpoint, scratch)
        if failure is None:
            known = ledger.put(*key, "works", "equals torch in prefill and decode on a two-layer copy")
        else:
            known = ledger.put(*key, "fails", failure.reason)
    return None if known.outcome == "works" else known.reason


class PreflightJob(Model):
    """Payload of the preflight child."""

    route: str
    checkpoint: Checkpoint
    scratch: Path


class PreflightPassed(Model):
    """Answer of the preflight child."""


def try_route(route: Route, checkpoint: Checkpoint, scratch: Path) -> Failure | None:
    """Preflight in a child of its own: exporters raise anything, and some end the process."""
    directory = scratch / f"preflight-{route.NAME}"
    directory.mkdir()
    job = PreflightJob(route=route.NAME, checkpoint=checkpoint, scratch=directory)
    log = directory / "preflight.log"
    done = run_isolated(
        "open_autoglm.export.routes:preflight_job",
        job,
        PreflightPassed,
        log=log,
        timeout_s=PREFLIGHT_TIMEOUT_S,
    )
    return done if isinstance(done, Failure) else None


def preflight_job(job: PreflightJob) -> PreflightPassed:
    """Runs in the child."""
    route = next(route for route in ROUTES if job.route == route.NAME)
    check_route(route, job.checkpoint, small_config(job.checkpoint), job.scratch)
    return PreflightPassed()


def _facts(checkpoint: Checkpoint, route: Route) -> DecoderFacts:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=checkpoint.trust_remote_code)
    return decoder_facts(config, route.KV_CACHE)
