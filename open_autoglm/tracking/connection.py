"""The connection to MLflow, and what every part of the tracking does through it."""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar
from urllib.parse import urlsplit

from open_autoglm.errors import UserError
from open_autoglm.schemas import without_password

_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # Its defaults keep trying a server that is down for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}
LONGEST_TAG = 5000

_Connection = TypeVar("_Connection", bound="Connection")
_Arguments = ParamSpec("_Arguments")
_Answer = TypeVar("_Answer")


def mlflow_link(tracking_uri: str, experiment_id: str, run_id: str | None = None) -> str | None:
    """Where the MLflow UI shows the experiment or run; None unless there is a server.

    The UI opens in its GenAI mode, without runs, unless the link says otherwise.
    """
    if not is_http(tracking_uri):
        return None
    run = f"/{run_id}" if run_id else ""
    return f"{tracking_uri.rstrip('/')}/#/experiments/{experiment_id}/runs{run}?workflowType=machine_learning"


class Unreachable(UserError):
    """MLflow could not be asked, or did not answer; asking again later may help."""


def asking(
    method: Callable[Concatenate[_Connection, _Arguments], _Answer],
) -> Callable[Concatenate[_Connection, _Arguments], _Answer]:
    """What MLflow refuses while ``method`` runs, and nobody expects, is `Unreachable`: one sentence."""

    @wraps(method)
    def asked(self: _Connection, /, *arguments: _Arguments.args, **named: _Arguments.kwargs) -> _Answer:
        with self._asking():
            return method(self, *arguments, **named)

    return asked


class Connection:
    """One MLflow server or database."""

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
            raise self._unreachable(error) from error

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """What MLflow refuses inside, and nobody expects, is `Unreachable`: one sentence."""
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> Unreachable:
        sentence = f"MLflow at {self.uri} cannot be used ({_root_cause(error)}): start it, or correct "
        return Unreachable(without_password(sentence) + "AUTOGLM_TRACKING_URI")

    def _run(self, experiment_id: str, tag: str, value: str, *, name: str, parent: str | None) -> str:
        """The run whose ``tag`` is ``value``, created if there is none."""
        for run in self._client.search_runs([experiment_id], f"tags.`{tag}` = '{value}'", max_results=1):
            return str(run.info.run_id)
        tags = {tag: value} | ({"mlflow.parentRunId": parent} if parent else {})
        return str(self._client.create_run(experiment_id, run_name=name, tags=tags).info.run_id)

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(name)
        if found is None:
            folder = self._artifact_root / name.replace("/", "-")
            location = None if is_http(self.uri) else folder.absolute().as_uri()
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
            tags=[RunTag(name, value[:LONGEST_TAG]) for name, value in (tags or {}).items()],
        )

    def _log_files(self, run_id: str, files: Iterable[Path]) -> None:
        for path in files:
            if path.is_dir():
                self._client.log_artifacts(run_id, str(path), path.name)
            else:
                self._client.log_artifact(run_id, str(path))


def is_http(uri: str) -> bool:
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
    elif is_http(uri):
        _check_address(uri)


def _check_address(uri: str) -> None:
    try:
        complete = bool(urlsplit(uri).hostname) and urlsplit(uri).port != 0
    except ValueError:
        complete = False
    if not complete:
        told = without_password(uri)
        raise UserError(f"{told} is no address of an MLflow server: give one like http://127.0.0.1:5000")


def _root_cause(error: BaseException) -> str:
    """One line: what network or database said, below the layers of clients, or else the error's own words."""
    cause, deeper = error, error.__cause__ or error.__context__
    while deeper is not None:
        cause = deeper if isinstance(deeper, OSError | sqlite3.Error) else cause
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
