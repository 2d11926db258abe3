"""Prometheus, Alertmanager and the bridge to Prefect, beside the stack: Debian's binaries, our configuration.

Their ports are not Debian's own, whose services `apt-get install` starts on 9090 and 9093.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import yaml
from processes import HOST, Processes, Service

from open_autoglm.errors import UserError
from open_autoglm.files import write_atomic
from open_autoglm.settings import Settings

_HERE = Path(__file__).resolve().parent
_SOURCES = _HERE / "prometheus"
_PROMETHEUS = ("prometheus",)
_ALERTMANAGER = ("prometheus-alertmanager", "alertmanager")
"""Debian's name, and its authors'."""
_BINARIES = (_PROMETHEUS, _ALERTMANAGER)
_INSTALL = "apt-get install -y --no-install-recommends prometheus prometheus-alertmanager"
_KEPT = "15d"


def services(settings: Settings) -> tuple[Service, ...]:
    """In the order they are started."""
    folder = settings.home / "prometheus"
    bridge = Service(
        name="bridge",
        command=(sys.executable, str(_HERE / "alert_bridge.py"), "--port", str(settings.alert_bridge_port)),
        address=f"http://{HOST}:{settings.alert_bridge_port}",
        healthy=_answers(f"http://{HOST}:{settings.alert_bridge_port}/healthz"),
        port=settings.alert_bridge_port,
        port_variable="AUTOGLM_ALERT_BRIDGE_PORT",
    )
    alertmanager = Service(
        name="alertmanager",
        command=(
            _binary(_ALERTMANAGER),
            f"--config.file={folder / 'alertmanager.yml'}",
            f"--storage.path={folder / 'alerts'}",
            f"--web.listen-address={HOST}:{settings.alertmanager_port}",
            "--cluster.listen-address=",  # alone: no gossip, and no port for it
        ),
        address=f"http://{HOST}:{settings.alertmanager_port}",
        healthy=_answers(f"http://{HOST}:{settings.alertmanager_port}/-/ready"),
        port=settings.alertmanager_port,
        port_variable="AUTOGLM_ALERTMANAGER_PORT",
    )
    prometheus = Service(
        name="prometheus",
        command=(
            _binary(_PROMETHEUS),
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--storage.tsdb.retention.time={_KEPT}",
            f"--web.listen-address={HOST}:{settings.prometheus_port}",
        ),
        address=settings.prometheus_url,
        healthy=_answers(f"{settings.prometheus_url}/-/ready"),
        port=settings.prometheus_port,
        port_variable="AUTOGLM_PROMETHEUS_PORT",
    )
    return bridge, alertmanager, prometheus


def check_installed() -> None:
    """Raises UserError with the line that installs what is missing."""
    missing = [names[0] for names in _BINARIES if not any(map(shutil.which, names))]
    if missing:
        raise UserError(f"{' and '.join(missing)} cannot be found: {_INSTALL}")


def write_configuration(settings: Settings) -> None:
    """Copy what is in ``infra/prometheus`` to the home, with the ports in it."""
    folder = settings.home / "prometheus"
    for name in ("targets", "slo"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "rules.yml", (_SOURCES / "rules.yml").read_text())
    prometheus, alertmanager = (_read(name) for name in ("prometheus.yml", "alertmanager.yml"))
    (addresses,) = prometheus["alerting"]["alertmanagers"][0]["static_configs"]
    addresses["targets"] = [f"{HOST}:{settings.alertmanager_port}"]
    (hook,) = alertmanager["receivers"][0]["webhook_configs"]
    hook["url"] = f"http://{HOST}:{settings.alert_bridge_port}/alerts"
    write_atomic(folder / "prometheus.yml", yaml.safe_dump(prometheus, sort_keys=False))
    write_atomic(folder / "alertmanager.yml", yaml.safe_dump(alertmanager, sort_keys=False))


def read_again(processes: Processes, settings: Settings) -> None:
    """Let those that run take up a new configuration."""
    for service in services(settings):
        running = processes.find(service)
        if running is not None and service.name != "bridge":
            os.kill(running.pid, signal.SIGHUP)


def _read(name: str) -> Any:
    return yaml.safe_load((_SOURCES / name).read_text())


def _binary(names: tuple[str, ...]) -> str:
    """Where it is; the first name if it is nowhere."""
    return next(filter(None, map(shutil.which, names)), names[0])


def _answers(url: str) -> Callable[[datetime], bool]:
    def asked(_started: datetime) -> bool:
        try:
            return httpx.get(url, timeout=1, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    return asked
