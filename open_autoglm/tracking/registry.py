"""Champions in MLflow's registry: a version per bundle, aliases that say what it is for."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from open_autoglm.bundle import SERVED_TOKENS, open_bundle
from open_autoglm.records import trial_metrics
from open_autoglm.schemas import Bundle, Manifest, OptimizeSpec, Registration, Study
from open_autoglm.tracking.connection import Connection, is_http
from open_autoglm.tracking.runs import STUDY

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
_DIGEST, _CONFIRMED = "autoglm.bundle_digest", "autoglm.last_confirmed_study"


def registered_name(spec: OptimizeSpec, checkpoint_name: str) -> str:
    """The name in the registry: the one asked for, or the checkpoint's with only characters MLflow allows."""
    return spec.register_as or re.sub(r"[^A-Za-z0-9._-]+", "-", checkpoint_name)


class RegisteredChampion(NamedTuple):
    """A version in the registry and its bundle."""

    version: str
    bundle: Path


class Registry(Connection):
    """Versions and aliases of registered models."""

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
        place = None if not is_http(self.uri) else str(cache / f"{name}-{version.version}")
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
                python_model=str(Path(__file__).parents[1] / "pyfunc_model.py"),
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


def _version_tags(study: Study, bundle: Bundle) -> dict[str, str]:
    trial = study.trial(study.champion or "")
    figures = trial_metrics(trial)
    tags = {
        _DIGEST: bundle.digest,
        STUDY: study.id,
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
