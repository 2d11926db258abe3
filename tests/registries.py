"""A registry with versions that hold real bundles, and MLflow's server in front of it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

from bundles import openable_study

from open_autoglm.bundle import build_bundle
from open_autoglm.schemas import Bundle
from open_autoglm.tracking import Tracker

_START_S = 120


def build_variants(checkpoint: Path, directory: Path, count: int) -> list[Bundle]:
    """Bundles of the same weights whose candidates differ, and with them their digests."""
    study = openable_study(checkpoint)
    winner = study.trial(study.champion or "")
    variants = []
    for number in range(count):
        candidate = winner.candidate.model_copy(
            update={"knobs": {**winner.candidate.knobs, "variant": number}}
        )
        trial = winner.model_copy(update={"candidate": candidate})
        variants.append(build_bundle(study, trial, directory / str(number) / "bundle"))
    return variants


class Shelf(NamedTuple):
    """A database with a registry, and bundles to put into it."""

    home: Path
    tracker: Tracker
    client: Any
    bundles: list[Bundle]

    def register(self, name: str, count: int, champion: str | None = "1") -> str:
        """``name`` with that many versions, each a bundle where a study would have put it."""
        if not self.client.search_registered_models(f"name = '{name}'"):
            self.client.create_registered_model(name)
        for bundle in self.bundles[:count]:
            place = self.home / "models" / f"{name}-{bundle.digest[:8]}"
            shutil.copytree(bundle.path, place / "artifacts" / "bundle")
            tags = {"autoglm.bundle_digest": bundle.digest}
            self.client.create_model_version(name, source=place.as_uri(), tags=tags)
        if champion is not None:
            self.client.set_registered_model_alias(name, "champion", champion)
        return name

    def upload(self, server: str, name: str, bundle: Bundle) -> str:
        """One more version of ``name``, its files kept by the server; its number."""
        from mlflow import MlflowClient

        remote = MlflowClient(server, registry_uri=server)
        experiment = remote.get_experiment_by_name("uploads")
        experiment_id = experiment.experiment_id if experiment else remote.create_experiment("uploads")
        run = remote.create_run(experiment_id)
        remote.log_artifacts(run.info.run_id, str(bundle.path), "model/artifacts/bundle")
        self.register(name, 0, champion=None)
        source = f"{run.info.artifact_uri}/model"
        tags = {"autoglm.bundle_digest": bundle.digest}
        made = remote.create_model_version(name, source=source, run_id=run.info.run_id, tags=tags)
        return str(made.version)

    def aliases(self, name: str) -> dict[str, str]:
        found = self.client.get_registered_model(name).aliases
        return {alias: str(version) for alias, version in found.items()}


class MlflowServer:
    """``mlflow server`` on a port that stays the same when it is started again."""

    def __init__(self, home: Path) -> None:
        self._home = home
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """And wait until it answers."""
        environment = os.environ | {
            "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{self._home}/mlflow.db",
            "MLFLOW_ARTIFACTS_DESTINATION": str(self._home / "server-artifacts"),
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        with (self._home / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", "--port", str(self._port), "--workers", "1"],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_S
        while not self._answers():
            assert self._process.poll() is None, (self._home / "server.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def kill(self) -> None:
        """Its workers too."""
        if self._process is not None:
            os.killpg(self._process.pid, 9)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=1):
                return True
        except OSError:
            return False


def make_shelf(home: Path, checkpoint: Path) -> Shelf:
    from mlflow import MlflowClient

    tracker = Tracker(f"sqlite:///{home}/mlflow.db", home / "artifacts")
    bundles = build_variants(checkpoint, home / "bundles", 5)
    return Shelf(home, tracker, MlflowClient(tracker.uri, registry_uri=tracker.uri), bundles)
