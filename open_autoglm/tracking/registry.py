"""Champions in MLflow's registry: a version per bundle, aliases that say what it is for."""

from __future__ import annotations

import re
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from open_autoglm.bundle import SERVED_TOKENS, open_bundle
from open_autoglm.records import trial_metrics
from open_autoglm.schemas import Bundle, Manifest, OptimizeSpec, Registration, Study
from open_autoglm.tracking.aliases import Moves, promoted
from open_autoglm.tracking.bundles import BUNDLE_DIGEST, CHAMPION
from open_autoglm.tracking.connection import asking
from open_autoglm.tracking.runs import STUDY

_CONFIRMED = "autoglm.last_confirmed_study"
_TEMPORARY = ".mlflow-"


def registered_name(spec: OptimizeSpec, checkpoint_name: str) -> str:
    """The name in the registry: the one asked for, or the checkpoint's with only characters MLflow allows."""
    return spec.register_as or re.sub(r"[^A-Za-z0-9._-]+", "-", checkpoint_name)


class Registry(Moves):
    """What studies register."""

    @asking
    def register_champion(self, study: Study, bundle: Bundle, parent_run_id: str) -> Registration:
        """Make ``bundle`` a version of its registered model and, unless its spec says otherwise, the
        ``champion``; the one before becomes ``previous``.

        A version with the same bundle digest is used again, never written twice. Wherever it is cut off, the
        champion stays one that is whole, and the same again goes on. Raises Unreachable, UnderWay.
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
        champion = self.aliases(name).champion
        if version != champion and (champion is None or study.spec.promote):
            self._crown(name, version, study)
            champion = version
        return Registration(
            tracking_uri=self.uri,
            experiment_id=experiment_id,
            run_id=parent_run_id,
            model_name=name,
            model_version=version,
            model_uri=f"models:/{name}@{CHAMPION}" if version == champion else f"models:/{name}/{version}",
            note=f"version {version} is the same bundle and was confirmed" if known else "",
        )

    def _crown(self, name: str, version: str, study: Study) -> None:
        """A challenger under test stays one."""
        reason = "; ".join(study.verdict.reasons)
        decide = partial(promoted, name, version=version)
        self._move(name, "register", decide, f"study {study.id}", reason, None, None)

    def _version_of(self, name: str, bundle: Bundle) -> str | None:
        same = f"name = '{name}' and tags.`{BUNDLE_DIGEST}` = '{bundle.digest}'"
        versions = self._client.search_model_versions(same, max_results=1)
        return str(versions[0].version) if versions else None

    def _upload_model(self, experiment_id: str, run_id: str, name: str, bundle: Bundle) -> Any:
        """Log the bundle as a pyfunc model of the run: what ``mlflow.pyfunc.log_model`` does, with ids."""
        import mlflow.pyfunc
        from mlflow.entities import LoggedModelOutput
        from mlflow.models import Model

        manifest, _ = open_bundle(bundle.path, verify=False)
        for left in bundle.path.parent.glob(f"{_TEMPORARY}*"):  # by a process that was killed here
            shutil.rmtree(left, ignore_errors=True)
        model = self._client.create_logged_model(
            experiment_id, name=name, source_run_id=run_id, model_type="pyfunc"
        )
        description = Model(
            artifact_path=model.artifact_location,
            model_uuid=model.model_id,
            model_id=model.model_id,
            run_id=run_id,
        )
        with tempfile.TemporaryDirectory(dir=bundle.path.parent, prefix=_TEMPORARY) as temporary:
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
        return str(version.version)


def _version_tags(study: Study, bundle: Bundle) -> dict[str, str]:
    trial = study.trial(study.champion or "")
    figures = trial_metrics(trial)
    tags = {
        BUNDLE_DIGEST: bundle.digest,
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
