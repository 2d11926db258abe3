"""Structure, bottleneck, and the candidates worth trying."""

from __future__ import annotations

from prefect import task

from open_autoglm import search
from open_autoglm.export.store import check_disk
from open_autoglm.measure.lease import preparing
from open_autoglm.planning import plan, resolve_device
from open_autoglm.progress import announce
from open_autoglm.roofline import analyze
from open_autoglm.schemas import Analysis, Candidate, Checkpoint, Hardware, OptimizeSpec, Trial
from open_autoglm.settings import Settings


@task
def analyse(checkpoint: Checkpoint, spec: OptimizeSpec, hardware: Hardware) -> Analysis:
    """Read the structure without loading weights and say what binds each phase."""
    with preparing():
        analysis = analyze(checkpoint, spec, hardware)
    for phase in ("prefill", "decode"):
        bound = analysis.bound(phase, "fp32")
        announce(f"analyze: {phase} is bound by {bound.binds}, {bound.bound_ms:.0f} ms in fp32")
    return analysis


@task
def propose(analysis: Analysis, spec: OptimizeSpec) -> list[Candidate]:
    """Every engine's candidates, each with why it was proposed or vetoed."""
    candidates = plan(analysis, spec, resolve_device(spec.target_device, analysis.hardware))
    check_disk(candidates, analysis.profile, Settings().exports)
    vetoed = sum(candidate.vetoed_because is not None for candidate in candidates)
    announce(f"plan: {len(candidates) - vetoed} candidates to try, {vetoed} vetoed")
    return candidates


@task
def refine(generations: list[list[Trial]], analysis: Analysis, spec: OptimizeSpec) -> list[Candidate]:
    """What to screen after ``generations``: neighbours of the best so far in their engines' search spaces, at
    last what helped combined; none when the search is over."""
    found = search.next_generation(generations, analysis, spec)
    if found:
        announce(f"search: {len(found)} neighbours of the best so far: {', '.join(c.id for c in found)}")
    return found
