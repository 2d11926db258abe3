"""Studies in MLflow: a parent run per study, a child run per trial."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from open_autoglm.records import trial_metrics, trial_params, trial_tags
from open_autoglm.schemas import OptimizeSpec, Registration, Study, Trial
from open_autoglm.tracking.connection import Connection, asking

STUDY, _TRIAL = "autoglm.study_id", "autoglm.trial_key"
_WITHOUT_EFFECT = ("model_path", "register_as", "promote")
"""Of a request: no figure of a study depends on them."""
_ENDED_WELL = ("ok", "stopped", "vetoed")


class Studies(Connection):
    """Runs of studies and trials; all raise Unreachable."""

    @asking
    def start_study(self, spec: OptimizeSpec, study_id: str, model_name: str) -> str:
        """The parent run of the study, created or set running again; returns its id."""
        experiment_id = self._experiment(f"open-autoglm/{model_name}")
        run_id = self._run(experiment_id, STUDY, study_id, name=study_id, parent=None)
        # Params cannot change, and the same study may go on under another path or name.
        asked = spec.model_dump(mode="json", exclude_none=True, exclude={"output", *_WITHOUT_EFFECT})
        said = {f"autoglm.{name}": str(getattr(spec, name)) for name in _WITHOUT_EFFECT}
        self._log(run_id, params=asked, tags={"autoglm.model": model_name, **said})
        self._client.update_run(run_id, status="RUNNING")
        self._client.log_text(run_id, spec.model_dump_json(indent=2), "spec.json")
        return run_id

    @asking
    def log_trial(self, parent_run_id: str, trial: Trial, files: Iterable[Path] = ()) -> str:
        """The trial's child run, created or brought up to date; returns its id.

        ``files`` (raw samples, log, figures) become artifacts beside ``trial.json``.
        """
        parent = self._client.get_run(parent_run_id)
        key = f"{parent.data.tags[STUDY]}/{trial.id}"
        run_id = self._run(
            parent.info.experiment_id, _TRIAL, key, name=trial.candidate.id, parent=parent_run_id
        )
        self._log(run_id, params=trial_params(trial), metrics=trial_metrics(trial), tags=trial_tags(trial))
        self._client.log_text(run_id, trial.model_dump_json(indent=2), "trial.json")
        self._log_files(run_id, files)
        self._client.set_terminated(run_id, "FINISHED" if trial.status in _ENDED_WELL else "FAILED")
        return run_id

    @asking
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

    @asking
    def mark_failed(self, parent_run_id: str, reason: str) -> None:
        """End the study's runs that a crashed flow has left running, the parent included."""
        experiment_id = self._client.get_run(parent_run_id).info.experiment_id
        children = self._client.search_runs(
            [experiment_id], f"tags.mlflow.parentRunId = '{parent_run_id}' and attributes.status = 'RUNNING'"
        )
        for run_id in (*(child.info.run_id for child in children), parent_run_id):
            self._log(run_id, tags={"mlflow.note.content": reason})
            self._client.set_terminated(run_id, "FAILED")

    @asking
    def location(self, run_id: str) -> Registration:
        """Where a run can be found, with nothing registered."""
        experiment_id = str(self._client.get_run(run_id).info.experiment_id)
        return Registration(tracking_uri=self.uri, experiment_id=experiment_id, run_id=run_id)
