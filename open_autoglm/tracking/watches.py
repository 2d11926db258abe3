"""Watches in MLflow: a run for each bundle that is watched, its figures over time, its breaches and baselines
as files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from open_autoglm.files import digest_of
from open_autoglm.monitoring.baseline import Baseline
from open_autoglm.schemas import Judgement, LatencyWindow
from open_autoglm.tracking.connection import LONGEST_TAG, Connection

_WATCH = "autoglm.watch"
_BASELINE = "autoglm.baseline"
_ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


class Watches(Connection):
    """What was judged of the versions of a served model."""

    def log_judgement(self, judgement: Judgement) -> str | None:
        """Add it to the run of its version's bundle; the run's id. None without a window: there is nothing to
        draw. Raises Unreachable."""
        window = judgement.window
        if window is None:
            return None
        with self._asking(), self._writing():
            run_id = self._watch_run(window.service, window.version, window.bundle_digest)
            self._draw(run_id, judgement)
            if judgement.state == "breached":
                path = f"breaches/{judgement.at:%Y%m%dT%H%M%SZ}.json"
                self._client.log_text(run_id, judgement.model_dump_json(indent=2), path)
            return run_id

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Files, too, where MLflow keeps them on this machine: its disk may be full."""
        try:
            yield
        except OSError as error:
            raise self._unreachable(error) from error

    # ── baselines ────────────────────────────────────────────────────────────────────────────────

    def register_baseline(self, baseline: Baseline, origin: str) -> bool:
        """Keep it with its version, which then names it in a tag; False if it is there already.

        ``origin`` says whose it is: a version that is served on two hosts has a baseline of each. Raises
        Unreachable.
        """
        path = f"baselines/{digest_of(origin)[:12]}-{baseline.end:%Y%m%dT%H%M%SZ}.json"
        with self._asking(), self._writing():
            run_id = self._watch_run(baseline.service, baseline.version, baseline.bundle_digest)
            if self._client.get_run(run_id).data.tags.get(_tag_of(origin)) == path:
                return False
            self._client.log_text(run_id, baseline.model_dump_json(indent=1), path)
            self._client.set_tag(run_id, _tag_of(origin), path)
            if baseline.version:
                self._tag_version(baseline.service, baseline.version, origin, f"runs:/{run_id}/{path}")
            return True

    def registered_baseline(self, window: LatencyWindow, origin: str) -> Baseline | None:
        """Of the version and the bundle that ``window`` is of, learned there; None if none can be read.

        Raises Unreachable.
        """
        with self._asking():
            experiment = self._client.get_experiment_by_name(_experiment_of(window.service))
            if experiment is None:
                return None
            key = _key(window.service, window.version, window.bundle_digest)
            runs = self._client.search_runs(
                [experiment.experiment_id], f"tags.`{_WATCH}` = '{key}'", max_results=1
            )
            path = runs[0].data.tags.get(_tag_of(origin)) if runs else None
            return self._read_baseline(str(runs[0].info.run_id), path) if path else None

    def _read_baseline(self, run_id: str, path: str) -> Baseline | None:
        """None if somebody removed it, or it is of another format: it is learned again."""
        from mlflow.exceptions import MlflowException

        with tempfile.TemporaryDirectory() as folder:
            try:
                file = self._client.download_artifacts(run_id, path, folder)
                return Baseline.model_validate_json(Path(file).read_bytes())
            except MlflowException as error:
                if error.error_code not in _ABSENT:
                    raise
            except (OSError, ValueError):
                pass
            return None

    def _tag_version(self, name: str, version: str, origin: str, address: str) -> None:
        """Where the registry knows it: who serves a bundle's directory may call it as they like."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.set_model_version_tag(name, version, _tag_of(origin), address)
        except MlflowException as error:
            if error.error_code not in _ABSENT:
                raise

    # ── runs ─────────────────────────────────────────────────────────────────────────────────────

    def _watch_run(self, service: str, version: str, digest: str) -> str:
        called = f"version {version}" if version else digest
        experiment_id = self._experiment(_experiment_of(service))
        key = _key(service, version, digest)
        return self._run(experiment_id, _WATCH, key, name=f"watch of {called}", parent=None)

    def _draw(self, run_id: str, judgement: Judgement) -> None:
        from mlflow.entities import Metric, RunTag

        time_ms = round(judgement.at.timestamp() * 1e3)
        minute = time_ms // 60_000  # steps are what MLflow draws by; a look that is logged twice has one
        figures = dict(judgement.figures)
        if judgement.state != "no_data":
            figures["breached"] = float(judgement.state == "breached")
        tags = {
            "autoglm.watch_state": judgement.state,
            "mlflow.note.content": "\n\n".join(judgement.reasons)[:LONGEST_TAG],
        }
        self._client.log_batch(
            run_id,
            metrics=[Metric(name, value, time_ms, minute) for name, value in figures.items()],
            tags=[RunTag(name, value) for name, value in tags.items()],
        )


def _experiment_of(service: str) -> str:
    return f"open-autoglm/{service}"


def _key(service: str, version: str, digest: str) -> str:
    return f"{service}/{version}/{digest}"


def _tag_of(origin: str) -> str:
    return f"{_BASELINE}.{digest_of(origin)[:12]}"
