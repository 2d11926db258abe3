"""Watches in MLflow: a run for each bundle that is watched, its figures over time, its breaches as files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from open_autoglm.schemas import Judgement
from open_autoglm.tracking.connection import LONGEST_TAG, Connection

_WATCH = "autoglm.watch"


class Watches(Connection):
    """What was judged of the versions of a served model."""

    def log_judgement(self, judgement: Judgement) -> str | None:
        """Add it to the run of its version's bundle; the run's id. None without a window: there is nothing to
        draw. Raises Unreachable."""
        window = judgement.window
        if window is None:
            return None
        with self._asking(), self._writing():
            called = f"version {window.version}" if window.version else window.bundle_digest
            key = f"{judgement.service}/{window.version}/{window.bundle_digest}"
            experiment_id = self._experiment(f"open-autoglm/{judgement.service}")
            run_id = self._run(experiment_id, _WATCH, key, name=f"watch of {called}", parent=None)
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
