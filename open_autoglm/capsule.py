"""The capsule: what a timed trial depends on, kept so that it can be run again."""

from __future__ import annotations

import shlex
from importlib.metadata import version

from open_autoglm.export.routes import library_versions
from open_autoglm.measure.environment import host_environment
from open_autoglm.schemas import Capsule, Hardware, Trial
from open_autoglm.trials import Bench


def with_capsule(bench: Bench, trial: Trial) -> Trial:
    """The trial with its capsule, if it was timed."""
    if trial.measurements is None or trial.exported is None:
        return trial
    command = f"open-autoglm reproduce {shlex.quote(str(bench.study.root))} {trial.id}"
    capsule = Capsule(
        command=command,
        seed=bench.spec.seed,
        candidate=trial.candidate,
        checkpoint_digest=bench.checkpoint.digest,
        export_digest=trial.exported.digest,
        workload_sha256=bench.workload.sha256,
        fingerprint=bench.hardware.fingerprint,
        host=host_environment() | peaks(bench.hardware),
        versions=versions(),
    )
    return trial.model_copy(update={"capsule": capsule})


def versions() -> dict[str, str]:
    """Of the libraries that decide what an export contains, and our own."""
    return library_versions() | {"open-autoglm": version("open-autoglm")}


def peaks(hardware: Hardware) -> dict[str, str]:
    """What was measured of the host, as words."""
    rates = {
        "read_bandwidth_gb_per_s": hardware.read_bandwidth_bytes_per_s,
        "matmul_fp32_gflop_per_s": hardware.matmul_fp32_flops_per_s,
        "matmul_bf16_gflop_per_s": hardware.matmul_bf16_flops_per_s,
        "matmul_int8_gop_per_s": hardware.matmul_int8_ops_per_s,
    }
    return {name: f"{rate / 1e9:.1f}" for name, rate in rates.items() if rate}
