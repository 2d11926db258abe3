"""Studies in MLflow: a parent run per study, a child run per trial, a registered version per champion.

Everything goes through one ``MlflowClient`` with explicit run ids; MLflow's fluent API orphans runs
in threads. Everything can be repeated: runs are found again by tag, versions by bundle digest.
"""

from __future__ import annotations

import logging
import os
import re
import sqlite3
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from open_autoglm.bundle import SERVED_TOKENS, open_bundle
from open_autoglm.errors import UserError
from open_autoglm.records import trial_metrics, trial_params, trial_tags
from open_autoglm.schemas import Bundle, Manifest, OptimizeSpec, Registration, Study, Trial, without_password

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
_STUDY, _TRIAL, _DIGEST = "autoglm.study_id", "autoglm.trial_key", "autoglm.bundle_digest"
_CONFIRMED = "autoglm.last_confirmed_study"
_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # Its defaults keep trying a server that is down for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}
_LONGEST_TAG = 5000
_ENDED_WELL = ("ok", "stopped", "vetoed")


def registered_name(spec: OptimizeSpec, checkpoint_name: str) -> str:
    """The name in the registry: the one asked for, or the checkpoint's with only characters MLflow allows."""
    return spec.register_as or re.sub(r"[^A-Za-z0-9._-]+", "-", checkpoint_name)


def mlflow_link(tracking_uri: str, experiment_id: str, run_id: str | None = None) -> str | None:
    """Where the MLflow UI shows the experiment or run; None unless there is a server.

    The UI opens in its GenAI mode, without runs, unless the link says otherwise.
    """
    if not _is_http(tracking_uri):
        return None
    run = f"/{run_id}" if run_id else ""
    return f"{tracking_uri.rstrip('/')}/#/experiments/{experiment_id}/runs{run}?workflowType=machine_learning"


class RegisteredChampion(NamedTuple):
    """A version in the registry and its bundle."""

    version: str
    bundle: Path


class Tracker:
    """One MLflow server or database, and what Open-AutoGLM keeps there."""

    def __init__(self, uri: str, artifact_root: Path) -> None:
        """Connect to ``uri``; the first use of a database creates its tables (some seconds).

        ``artifact_root`` receives the artifacts unless ``uri`` is a server, which has its own place.
        Raises UserError if the address cannot be used.
        """
        _check_uri(uri)
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        self.uri = uri
        self._artifact_root = artifact_root
        try:
            self._client = MlflowClient(uri, registry_uri=uri)
            self._client.search_experiments(max_results=1)
        except (MlflowException, SQLAlchemyError, ImportError) as error:  # a database driver may be missing
            sentence = f"MLflow at {uri} cannot be used ({_root_cause(error)}): start it, or correct "
            raise UserError(without_password(sentence) + "AUTOGLM_TRACKING_URI") from error

    # ── runs ─────────────────────────────────────────────────────────────────────────────────────

    def start_study(self, spec: OptimizeSpec, study_id: str, model_name: str) -> str:
        """The parent run of the study, created or set running again; returns its id."""
        experiment_id = self._experiment(f"open-autoglm/{model_name}")
        run_id = self._run(experiment_id, _STUDY, study_id, name=study_id, parent=None)
        self._client.update_run(run_id, status="RUNNING")
        asked = spec.model_dump(mode="json", exclude_none=True, exclude={"output"})  # params cannot change
        self._log(run_id, params=asked, tags={"autoglm.model": model_name})
        self._client.log_text(run_id, spec.model_dump_json(indent=2), "spec.json")
        return run_id

    def log_trial(self, parent_run_id: str, trial: Trial, files: Iterable[Path] = ()) -> str:
        """The trial's child run, created or brought up to date; returns its id.

        ``files`` (raw samples, log, figures) become artifacts beside ``trial.json``.
        """
        parent = self._client.get_run(parent_run_id)
        key = f"{parent.data.tags[_STUDY]}/{trial.id}"
        run_id = self._run(
            parent.info.experiment_id, _TRIAL, key, name=trial.candidate.id, parent=parent_run_id
        )
        self._log(run_id, params=trial_params(trial), metrics=trial_metrics(trial), tags=trial_tags(trial))
        self._client.log_text(run_id, trial.model_dump_json(indent=2), "trial.json")
        self._log_files(run_id, files)
        self._client.set_terminated(run_id, "FINISHED" if trial.status in _ENDED_WELL else "FAILED")
        return run_id

    def finish_study(self, parent_run_id: str, study: Study, files: Iterable[Path] = ()) -> None:
        """Log the verdict, ``study.json`` and ``files`` (report, figures, Data Docs); end the parent run.

        A directory among ``files`` is logged under its own name.
        """
        metrics = trial_metrics(study.trial(study.champion)) if study.champion else {}
        tags = {
            "autoglm.verdict": study.verdict.kind,
            "autoglm.champion": study.champion or "",
            "mlflow.note.content": "\n\n".join(study.verdict.reasons),
        }
        self._log(parent_run_id, metrics=metrics, tags=tags)
        self._client.log_text(parent_run_id, study.model_dump_json(indent=2), "study.json")
        self._log_files(parent_run_id, files)
        self._client.set_terminated(parent_run_id, "FINISHED")

    def mark_failed(self, parent_run_id: str, reason: str) -> None:
        """End the study's runs that a crashed flow has left running, the parent included."""
        experiment_id = self._client.get_run(parent_run_id).info.experiment_id
        children = self._client.search_runs(
            [experiment_id], f"tags.mlflow.parentRunId = '{parent_run_id}' and attributes.status = 'RUNNING'"
        )
        for run_id in (*(child.info.run_id for child in children), parent_run_id):
            self._log(run_id, tags={"mlflow.note.content": reason})
            self._client.set_terminated(run_id, "FAILED")

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(name)
        if found is None:
            folder = self._artifact_root / name.replace("/", "-")
            location = None if _is_http(self.uri) else folder.absolute().as_uri()
            try:
                return str(self._client.create_experiment(name, artifact_location=location))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = self._client.get_experiment_by_name(name)  # another study was faster
        if found.lifecycle_stage == "deleted":
            raise UserError(
                f"the MLflow experiment {name!r} was deleted: restore it with "
                f"mlflow experiments restore --experiment-id {found.experiment_id}, or use --register-as"
            )
        return str(found.experiment_id)

    def _run(self, experiment_id: str, tag: str, value: str, *, name: str, parent: str | None) -> str:
        """The run whose ``tag`` is ``value``, created if there is none."""
        for run in self._client.search_runs([experiment_id], f"tags.`{tag}` = '{value}'", max_results=1):
            return str(run.info.run_id)
        tags = {tag: value} | ({"mlflow.parentRunId": parent} if parent else {})
        return str(self._client.create_run(experiment_id, run_name=name, tags=tags).info.run_id)

    def _log(
        self,
        run_id: str,
        *,
        params: dict[str, Any] | None = None,
        metrics: dict[str, float] | None = None,
        tags: dict[str, str] | None = None,
    ) -> None:
        from mlflow.entities import Metric, Param, RunTag

        now = int(time.time() * 1000)
        self._client.log_batch(
            run_id,
            metrics=[Metric(name, value, now, 0) for name, value in (metrics or {}).items()],
            params=[Param(name, str(value)) for name, value in (params or {}).items()],
            tags=[RunTag(name, value[:_LONGEST_TAG]) for name, value in (tags or {}).items()],
        )

    def _log_files(self, run_id: str, files: Iterable[Path]) -> None:
        for path in files:
            if path.is_dir():
                self._client.log_artifacts(run_id, str(path), path.name)
            else:
                self._client.log_artifact(run_id, str(path))

    # ── registry ─────────────────────────────────────────────────────────────────────────────────

    def location(self, run_id: str) -> Registration:
        """Where a run can be found, with nothing registered."""
        experiment_id = str(self._client.get_run(run_id).info.experiment_id)
        return Registration(tracking_uri=self.uri, experiment_id=experiment_id, run_id=run_id)

    def champion(self, name: str, cache: Path) -> RegisteredChampion | None:
        """The version that carries the champion's alias; see `registered`."""
        return self.registered(name, CHAMPION, cache)

    def registered(self, name: str, alias: str, cache: Path) -> RegisteredChampion | None:
        """The version that carries ``alias``, with its bundle on this machine; None without one.

        A server's artifacts are downloaded into ``cache``, once per version.
        """
        from mlflow.artifacts import download_artifacts
        from mlflow.exceptions import MlflowException

        try:
            version = self._client.get_model_version_by_alias(name, alias)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise
        place = None if not _is_http(self.uri) else str(cache / f"{name}-{version.version}")
        if place is not None:
            Path(place).mkdir(parents=True, exist_ok=True)
        path = download_artifacts(
            artifact_uri=f"{version.source}/artifacts/bundle", dst_path=place, tracking_uri=self.uri
        )
        return RegisteredChampion(str(version.version), Path(path))

    def register_champion(self, study: Study, bundle: Bundle, parent_run_id: str) -> Registration:
        """Make ``bundle`` the ``champion`` of its registered model; the one before becomes ``previous``.

        A version with the same bundle digest is used again, never written twice.
        """
        if study.champion is None:
            raise ValueError(f"study {study.id} has no champion to register")
        name = registered_name(study.spec, study.checkpoint.name)
        experiment_id = str(self._client.get_run(parent_run_id).info.experiment_id)
        version = self._version_of(name, bundle)
        if known := version is not None:
            self._client.set_model_version_tag(name, version, _CONFIRMED, study.id)
        else:
            model = self._upload_model(experiment_id, parent_run_id, name, bundle)
            version = self._create_version(name, model, parent_run_id, _version_tags(study, bundle))
        self._promote(name, version)
        return Registration(
            tracking_uri=self.uri,
            experiment_id=experiment_id,
            run_id=parent_run_id,
            model_name=name,
            model_version=version,
            model_uri=f"models:/{name}@{CHAMPION}",
            note=f"version {version} is the same bundle and was confirmed" if known else "",
        )

    def _version_of(self, name: str, bundle: Bundle) -> str | None:
        same = f"name = '{name}' and tags.`{_DIGEST}` = '{bundle.digest}'"
        versions = self._client.search_model_versions(same, max_results=1)
        return str(versions[0].version) if versions else None

    def _upload_model(self, experiment_id: str, run_id: str, name: str, bundle: Bundle) -> Any:
        """Log the bundle as a pyfunc model of the run: what ``mlflow.pyfunc.log_model`` does, with ids."""
        import mlflow.pyfunc
        from mlflow.entities import LoggedModelOutput
        from mlflow.models import Model

        manifest, _ = open_bundle(bundle.path, verify=False)
        model = self._client.create_logged_model(
            experiment_id, name=name, source_run_id=run_id, model_type="pyfunc"
        )
        description = Model(
            artifact_path=model.artifact_location,
            model_uuid=model.model_id,
            model_id=model.model_id,
            run_id=run_id,
        )
        with tempfile.TemporaryDirectory(dir=bundle.path.parent, prefix=".mlflow-") as temporary:
            mlflow.pyfunc.save_model(
                path=f"{temporary}/model",
                mlflow_model=description,
                python_model=str(Path(__file__).with_name("pyfunc_model.py")),
                artifacts={"bundle": str(bundle.path)},
                pip_requirements=_requirements(manifest),
                model_config={"max_tokens": SERVED_TOKENS},
                **_signature(),
            )
            self._client.log_model_artifacts(model.model_id, f"{temporary}/model")
        self._client.finalize_logged_model(model.model_id, "READY")
        self._client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
        return model

    def _create_version(self, name: str, model: Any, run_id: str, tags: dict[str, str]) -> str:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        version = self._client.create_model_version(
            name, source=model.artifact_location, run_id=run_id, model_id=model.model_id, tags=tags
        )
        self._client.set_registered_model_alias(name, CHALLENGER, version.version)
        return str(version.version)

    def _promote(self, name: str, version: str) -> None:
        """Move the aliases. Not atomic, but repeating it after a crash ends in the same state."""
        aliases = self._client.get_registered_model(name).aliases
        champion = aliases.get(CHAMPION)
        if champion is not None and str(champion) != version:
            self._client.set_registered_model_alias(name, PREVIOUS, champion)
        if str(champion) != version:
            self._client.set_registered_model_alias(name, CHAMPION, version)
        if CHALLENGER in aliases:
            self._client.delete_registered_model_alias(name, CHALLENGER)


def _is_http(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def _check_uri(uri: str) -> None:
    """Refuse what MLflow would refuse late or after many retries."""
    if uri.startswith("sqlite:///"):
        _check_sqlite(Path(uri.removeprefix("sqlite:///").partition("?")[0]))
    elif "://" not in uri or uri.startswith("file:"):
        raise UserError(
            f"MLflow no longer keeps runs in a folder such as {uri!r}: give a database like "
            "sqlite:////absolute/path/mlflow.db, or a server like http://127.0.0.1:5000"
        )


def _root_cause(error: BaseException) -> str:
    """One line: what the network said, below the layers of HTTP clients, or else the error's own words."""
    cause, deeper = error, error.__cause__ or error.__context__
    while deeper is not None:
        cause = deeper if isinstance(deeper, OSError) else cause
        deeper = deeper.__cause__ or deeper.__context__
    return str(cause).strip().split("\n")[0]


def _check_sqlite(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with sqlite3.connect(path, timeout=30) as database:
            database.execute("BEGIN IMMEDIATE")
        database.close()
    except (OSError, sqlite3.Error) as error:
        raise UserError(
            f"the MLflow database {path} cannot be written ({error}): give another path"
        ) from error


def _version_tags(study: Study, bundle: Bundle) -> dict[str, str]:
    trial = study.trial(study.champion or "")
    figures = trial_metrics(trial)
    tags = {
        _DIGEST: bundle.digest,
        _STUDY: study.id,
        _CONFIRMED: study.id,
        "autoglm.engine": trial.engine,
        "autoglm.candidate": trial.candidate.id,
    }
    shown = {"autoglm.quality": "quality_ratio", "autoglm.ttft_ms": "ttft_ms"}
    return tags | {tag: f"{figures[name]:.6g}" for tag, name in shown.items() if name in figures}


def _requirements(manifest: Manifest) -> list[str]:
    """Exact versions; open-autoglm is not on a package index, so it cannot be one of them."""
    installed = {name: v for name, v in manifest.versions.items() if name not in ("python", "open-autoglm")}
    return [f"{name}=={v.partition('+')[0]}" for name, v in installed.items()]


def _signature() -> dict[str, Any]:
    """One text column without a name, so that lists, frames and records are all accepted."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    signature = ModelSignature(
        inputs=Schema([ColSpec("string")]),
        outputs=Schema([ColSpec("string")]),
        params=ParamSchema([ParamSpec("max_new_tokens", "long", 64)]),
    )
    return {"signature": signature, "input_example": (["The capital of France is"], {"max_new_tokens": 16})}
