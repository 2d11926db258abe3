"""What works on this machine, and how to get what does not."""

from __future__ import annotations

import json
import shutil
from typing import Literal

import click

from open_autoglm import engines
from open_autoglm.cli.prefect_server import is_up
from open_autoglm.engines import nvidia
from open_autoglm.packages import find_clash, version_of
from open_autoglm.schemas import Hardware, Model, Probe
from open_autoglm.settings import Settings
from open_autoglm.units import quantity

State = Literal["ok", "note", "problem"]
_MARKS: dict[State, str] = {"ok": "✓", "note": "–", "problem": "✗"}


class Finding(Model):
    """One thing that was looked at."""

    subject: str
    state: State
    found: str
    mend: str | None = None


def run_doctor(as_json: bool) -> int:
    """Print the findings; exit code 0 if a study can run here, else 2."""
    from open_autoglm.hardware import probe_hardware

    settings = Settings()
    hardware = probe_hardware(settings.home / "hardware")
    findings = [*_host(hardware), *_engines(), *_packages(), *_tools(), *_servers(settings)]
    if as_json:
        click.echo(json.dumps([finding.model_dump() for finding in findings]))
    else:
        width = max(len(finding.subject) for finding in findings)
        for finding in findings:
            click.echo(f"{_MARKS[finding.state]} {finding.subject:<{width}} {finding.found}")
            if finding.mend:
                click.echo(f"  {'':<{width}} → {finding.mend}")
    return 2 if any(finding.state == "problem" for finding in findings) else 0


def _host(hardware: Hardware) -> list[Finding]:
    fast = sorted({"avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16"} & set(hardware.isa))
    cpu = f"{hardware.cpu_model}, {hardware.cores} cores, {', '.join(fast) or 'no VNNI, BF16 or AMX'}"
    bandwidth = hardware.read_bandwidth_bytes_per_s / 1e9
    memory = f"{quantity(hardware.available_memory_bytes, 'bytes')} available, {bandwidth:.0f} GB/s read"
    gpu = ", ".join(f"{gpu.name}, driver {gpu.driver}" for gpu in hardware.gpus)
    return [
        Finding(subject="CPU", state="ok", found=cpu),
        Finding(subject="memory", state="ok", found=memory),
        Finding(subject="GPU", state="ok" if gpu else "note", found=gpu or hardware.gpu_reason),
    ]


def _engines() -> list[Finding]:
    findings = []
    for name in engines.names():
        if name in nvidia.NAMES and name != "torch":
            continue  # they are among the GPU's
        probe = engines.probe(name)
        state: State = "ok" if probe.ready else "problem" if name == "torch" else "note"
        findings.append(_finding(f"engine {name}", probe, state))
    for name in nvidia.NAMES:
        probe = nvidia.probe_nvidia(name)
        findings.append(_finding(f"GPU engine {name}", probe, "ok" if probe.ready else "note"))
    return findings


def _finding(subject: str, probe: Probe, state: State) -> Finding:
    """How far the engine came, in its probe's words."""
    stage = "" if probe.ready else f" ({probe.stage.replace('_', ' ')})"
    found = f"{probe.version}{stage}: {probe.reason}" if probe.version else probe.reason
    return Finding(subject=subject, state=state, found=found, mend=probe.install)


def _packages() -> list[Finding]:
    """Pairs that must not be together, and pins whose violation shows only much later."""
    both = Finding(subject="onnxruntime", state="ok", found="one wheel, as it should be")
    if (clash := find_clash()) is not None:
        both = Finding(subject="onnxruntime", state="problem", found=clash.sentence, mend=clash.mend)
    sqlalchemy = version_of("sqlalchemy") or "0"
    scheduled = tuple(int(part) for part in sqlalchemy.split(".")[:2]) < (2, 1)
    schedules = Finding(
        subject="schedules",
        state="ok" if scheduled else "problem",
        found=f"SQLAlchemy {sqlalchemy}" + ("" if scheduled else ": Prefect's cron schedules never fire"),
        mend=None if scheduled else "pip install 'sqlalchemy<2.1'",
    )
    return [both, schedules]


def _tools() -> list[Finding]:
    compiler = shutil.which("g++") or shutil.which("clang++")
    return [
        Finding(
            subject="C++ compiler",
            state="ok" if compiler else "note",
            found=compiler or "none: torch.compile candidates are vetoed",
            mend=None if compiler else "apt-get install g++",
        )
    ]


def _servers(settings: Settings) -> list[Finding]:
    findings = []
    for name, url in (("Prefect", settings.prefect_url), ("MLflow", settings.mlflow_url)):
        up = is_up(url)
        finding = Finding(subject=f"{name} server", state="ok", found=url)
        if not up:
            told = {
                "state": "note",
                "found": f"not running at {url}; studies run without it",
                "mend": "make up",
            }
            finding = finding.model_copy(update=told)
        findings.append(finding)
    return findings
