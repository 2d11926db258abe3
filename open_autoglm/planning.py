"""Which candidates are worth measuring: what engines propose, less what cannot work here, with reasons.

A veto is only for what is certain before the first run. Measuring a hopeless candidate costs a
minute; vetoing a good one costs the study its champion.
"""

from __future__ import annotations

from open_autoglm import engines
from open_autoglm.checkpoint import load_checkpoint
from open_autoglm.engines.contract import Engine
from open_autoglm.errors import AutoGLMError, UserError
from open_autoglm.pruning.levels import pruned_profile, pruned_variants, why_not
from open_autoglm.quality.reference import plan_layout
from open_autoglm.roofline import bound, capacity_bytes
from open_autoglm.schemas import (
    Analysis,
    Candidate,
    Checkpoint,
    Device,
    Hardware,
    OptimizeSpec,
    Phase,
    TargetDevice,
)
from open_autoglm.settings import Settings
from open_autoglm.units import Duration, quantity

RUNTIME_BYTES = 64 * 2**20
"""Memory of a process before its first weight: 50 MB for Python with ONNX Runtime, more for torch."""

PEAK_MARGIN = 2.0
"""How much faster than measured this host may be. On a shared host the same read loop ran at 50 and at
85 GB/s within a minute, so a bound is trusted to decide only with this factor to spare."""


def load_model(spec: OptimizeSpec, settings: Settings) -> Checkpoint:
    """The validated checkpoint of ``spec``, which its workload fits. Raises UserError."""
    checkpoint = load_checkpoint(
        spec.model_path,
        trust_remote_code=spec.trust_remote_code,
        allow_pickle=spec.allow_pickle,
        cache=settings.checkpoints,
    )
    check_workload(spec, checkpoint)
    return checkpoint


def check_workload(spec: OptimizeSpec, checkpoint: Checkpoint) -> None:
    """Raise UserError if the request contradicts itself, or if the context has no room for prompt and output
    or for judging the quality."""
    _check_arrivals(spec)
    _check_goal(spec)
    if spec.recover and not spec.prune:
        raise UserError("there is nothing to recover unless heads are removed: add --prune to --recover")
    _check_context(spec, checkpoint)
    plan_layout(checkpoint.context_tokens, spec)


def _check_context(spec: OptimizeSpec, checkpoint: Checkpoint) -> None:
    """Beyond its context a model has no positions: what a runtime answers there is undefined."""
    lengths, flags = [(spec.prompt_tokens, spec.output_tokens)], "--input-shape, --output-tokens"
    if spec.length_mix is not None:
        lengths, flags = [(prompt, output) for prompt, output, _ in spec.length_mix.shares], "--length-mix"
    prompt, output = max(lengths, key=sum)
    if prompt + output > checkpoint.context_tokens:
        raise UserError(
            f"a prompt of {prompt} tokens and {output} new ones make {prompt + output}, but "
            f"{checkpoint.name} has a context of {checkpoint.context_tokens}: ask for shorter ones ({flags})"
        )


def _check_arrivals(spec: OptimizeSpec) -> None:
    """The server scenario is single requests at a rate, and no other scenario has one."""
    if spec.scenario != "server":
        if spec.request_rate_per_s is not None:
            raise UserError(
                f"a request rate means nothing in the {spec.scenario} scenario: "
                "add --scenario server, or leave --request-rate-per-s out"
            )
        return
    if spec.request_rate_per_s is None:
        raise UserError("the server scenario needs a mean arrival rate: add --request-rate-per-s, such as 2")
    if spec.batch_size > 1:
        raise UserError(
            f"requests arrive one by one in the server scenario, not in batches of {spec.batch_size}: "
            f"write --input-shape 1,{spec.prompt_tokens}, or choose --scenario offline"
        )


def _check_goal(spec: OptimizeSpec) -> None:
    """Goodput counts the requests that arrived and were answered within a limit."""
    if spec.objective != "goodput":
        return
    if spec.scenario != "server":
        raise UserError(
            "the objective goodput needs requests that arrive: add --scenario server and --request-rate-per-s"
        )
    if spec.max_latency is None and spec.max_tpot is None:
        raise UserError(
            "the objective goodput counts requests within a limit: add --max-latency, --max-tpot or both"
        )


def resolve_device(target_device: TargetDevice, hardware: Hardware) -> Device:
    """The device that ``auto`` means here. Raises UserError if a GPU is asked for and there is none."""
    if target_device == "auto":
        return "gpu" if hardware.gpus else "cpu"
    if target_device == "gpu" and not hardware.gpus:
        raise UserError(f"the target device gpu is not here: {hardware.gpu_reason}; choose cpu or auto")
    return target_device


def plan(analysis: Analysis, spec: OptimizeSpec, device: Device) -> list[Candidate]:
    """All candidates of the engines asked for, the reference first, each vetoed or worth measuring; with
    ``spec.prune`` also the best kinds with heads removed, with ``spec.recover`` also distilled after that.

    Raises UserError if an engine of ``spec.engines`` does not exist, or if heads cannot be removed.
    """
    chosen = dict.fromkeys(spec.engines or engines.names())
    candidates = [c for name in chosen for c in _proposals(engines.get(name), analysis, spec, device)]
    if spec.prune:
        candidates += _pruned(candidates, analysis, spec)
    _refuse_twins(candidates)
    return sorted(candidates, key=lambda candidate: not candidate.reference)


def _proposals(engine: Engine, analysis: Analysis, spec: OptimizeSpec, device: Device) -> list[Candidate]:
    """One engine's candidates; they are listed even where it cannot run, so that nobody wonders."""
    proposed = engine.propose(analysis, spec, device)
    probe = engine.probe(device)
    if probe.stage == "no_device" and not analysis.hardware.gpus and any(c.device == "gpu" for c in proposed):
        probe = engine.probe("gpu")  # what else it lacks is of more use than that it does not serve the CPU
    if not probe.ready:
        how = f"; mend it with: {probe.install}" if probe.install else ""
        return [candidate.vetoed(probe.reason + how) for candidate in proposed]
    return [judge(candidate, analysis, spec) for candidate in proposed]


def _pruned(candidates: list[Candidate], analysis: Analysis, spec: OptimizeSpec) -> list[Candidate]:
    if (reason := why_not(analysis.profile)) is not None:
        raise UserError(f"--prune: {reason}; leave it out")
    variants = pruned_variants(candidates, analysis.profile, spec.seed, recover=spec.recover)
    return [judge(candidate, analysis, spec) for candidate in variants]


def judge(candidate: Candidate, analysis: Analysis, spec: OptimizeSpec) -> Candidate:
    """``candidate``, vetoed if it is certain that it does not fit this host or cannot meet a limit."""
    if candidate.vetoed_because is not None:
        return candidate
    reason = _memory_veto(candidate, analysis, spec) or _recovery_veto(candidate, analysis)
    if reason is None and not candidate.reference:  # the yardstick is measured, whatever the limits
        reason = _limit_veto(candidate, analysis, spec)
    return candidate if reason is None else candidate.vetoed(reason)


def _refuse_twins(candidates: list[Candidate]) -> None:
    """Ids name directories and MLflow runs, so two engines must not use the same one."""
    owners: dict[str, str] = {}
    for candidate in candidates:
        owner = owners.setdefault(candidate.id, candidate.engine)
        if owner != candidate.engine:
            raise AutoGLMError(f"engines {owner} and {candidate.engine} both propose {candidate.id!r}")


# ── vetoes ───────────────────────────────────────────────────────────────────────────────────────


def _memory_veto(candidate: Candidate, analysis: Analysis, spec: OptimizeSpec) -> str | None:
    needed = _least_memory(candidate, analysis, spec)
    available = _available_memory(analysis.hardware, candidate.device)
    if needed <= available:
        return None
    needs = f"weights, KV cache and runtime need at least {quantity(needed, 'bytes')}"
    return f"does not fit in memory: {needs}, and {quantity(available, 'bytes')} are available"


def _recovery_veto(candidate: Candidate, analysis: Analysis) -> str | None:
    """Both models learn and teach in fp32 in the host's memory, whatever device the candidate is for."""
    pruning = candidate.transform
    if pruning is None or not pruning.recover_steps:
        return None
    parameters = analysis.profile.parameters + pruned_profile(analysis.profile, pruning).parameters
    needed, available = 4 * parameters + RUNTIME_BYTES, analysis.hardware.available_memory_bytes
    if needed <= available:
        return None
    needs = f"the whole and the pruned model in fp32 need at least {quantity(needed, 'bytes')}"
    return f"cannot be recovered: {needs}, and {quantity(available, 'bytes')} are available"


def _limit_veto(candidate: Candidate, analysis: Analysis, spec: OptimizeSpec) -> str | None:
    if candidate.device == "gpu":  # the limit is on the host's memory, and the peaks are the CPU's
        return None
    needed = _least_memory(candidate, analysis, spec)
    if spec.max_memory is not None and needed > spec.max_memory.bytes:
        needs = f"weights, KV cache and runtime need at least {quantity(needed, 'bytes')}"
        return f"cannot meet max_memory {spec.max_memory}: {needs}"
    return _time_veto(candidate, analysis, spec, "prefill", spec.max_latency) or _time_veto(
        candidate, analysis, spec, "decode", spec.max_tpot
    )


def _time_veto(
    candidate: Candidate, analysis: Analysis, spec: OptimizeSpec, phase: Phase, limit: Duration | None
) -> str | None:
    if limit is None:
        return None
    precision, bits = candidate.precision, candidate.weight_bits
    profile = pruned_profile(analysis.profile, candidate.transform)
    measured = bound(profile, analysis.hardware, _shortest(spec), phase, precision, bits)
    least_ms = measured.bound_ms / PEAK_MARGIN
    if least_ms <= limit.ms:
        return None
    name, figure = ("max_latency", "TTFT") if phase == "prefill" else ("max_tpot", "TPOT")
    return (
        f"cannot meet {name} {limit}: even at {PEAK_MARGIN:g} times the measured peaks of this host the "
        f"roofline leaves a {figure} of {least_ms:.3g} ms"
    )


def _shortest(spec: OptimizeSpec) -> OptimizeSpec:
    """``spec`` at the shortest lengths of its mix: a median may be made of those alone."""
    if spec.length_mix is None:
        return spec
    prompts, outputs, _ = zip(*spec.length_mix.shares, strict=True)
    return spec.model_copy(update={"prompt_tokens": min(prompts), "output_tokens": min(outputs)})


def _least_memory(candidate: Candidate, analysis: Analysis, spec: OptimizeSpec) -> float:
    """Bytes that no runtime can do without."""
    profile = pruned_profile(analysis.profile, candidate.transform)
    return capacity_bytes(profile, spec, candidate.weight_bits) + RUNTIME_BYTES


def _available_memory(hardware: Hardware, device: Device) -> int:
    """Bytes of the largest GPU, or of the host, whose memory some GPUs share."""
    largest = max((gpu.memory_bytes for gpu in hardware.gpus), default=0)
    return largest if device == "gpu" and largest else hardware.available_memory_bytes
