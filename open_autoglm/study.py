"""A study's directory: its identity, its state after each unit of work, and its lock.

identity.json    which spec, checkpoint and host this directory belongs to
trials/ID.json   each trial as far as it got
samples/ID.json  its raw samples
logs/ID-*.log    what its children printed
study.json       the result; present only when the study is finished
report.html, bundle/, data-docs/
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path

from pydantic import AwareDatetime, ValidationError

from open_autoglm.errors import StudyError
from open_autoglm.export.routes import library_versions
from open_autoglm.files import digest_of, file_lock, write_atomic
from open_autoglm.schemas import Checkpoint, Hardware, Measurements, Model, OptimizeSpec, Study, Trial
from open_autoglm.settings import Settings

IDENTITY, RESULT = "identity.json", "study.json"


class StudyIdentity(Model):
    """A study by its name and by what it depends on."""

    id: str
    key: str
    created: AwareDatetime


class StudyRef(StudyIdentity):
    """A study and where it is kept."""

    root: Path

    def trial_path(self, trial_id: str) -> Path:
        return self.root / "trials" / f"{trial_id}.json"

    def samples_path(self, trial_id: str) -> Path:
        return self.root / "samples" / f"{trial_id}.json"

    def log_path(self, name: str) -> Path:
        return self.root / "logs" / f"{name}.log"

    @property
    def result_path(self) -> Path:
        return self.root / RESULT


def study_key(spec: OptimizeSpec, checkpoint: Checkpoint, hardware: Hardware) -> str:
    """Everything a study's figures depend on; two studies with one key may share trials."""
    content = spec.model_dump(mode="json", exclude={"model_path", "output", "register_as", "promote"})
    versions = library_versions() | {"open-autoglm": version("open-autoglm")}
    return digest_of([content, checkpoint.digest, hardware.fingerprint, versions])


def open_study(
    spec: OptimizeSpec, checkpoint: Checkpoint, hardware: Hardware, settings: Settings, output: Path | None
) -> StudyRef:
    """Begin or resume the study of this spec in ``output``, or in a directory of its own under `home`.

    Raises StudyError if ``output`` belongs to another study, holds other things, or cannot be written.
    """
    key = study_key(spec, checkpoint, hardware)
    if output is None:
        unfinished = _unfinished(settings, key)
        if unfinished is not None:
            return unfinished
    created = datetime.now(UTC)
    study_id = f"{checkpoint.name}-{created:%Y%m%d-%H%M%S}-{key[:6]}"
    root = (output or settings.studies / study_id).absolute()
    found = check_claim(root, key)
    if found is not None:
        return found
    identity = StudyIdentity(id=study_id, key=key, created=created)
    try:
        write_atomic(root / IDENTITY, identity.model_dump_json(indent=2))
    except OSError as error:
        raise StudyError(f"cannot write to {root}: {error.strerror}; choose another --output") from None
    return read_identity(root)


def check_output(output: Path) -> None:
    """Refuse early an output directory that can never be used; touches nothing."""
    nearest = output.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise StudyError(f"cannot use {output} for output: {nearest} is a file; choose a directory")
    if not os.access(nearest, os.W_OK):
        raise StudyError(f"cannot write to {output}: no permission on {nearest}; choose another --output")
    if output.is_dir() and any(output.iterdir()) and not (output / IDENTITY).exists():
        raise StudyError(f"{output} is not empty and holds no study; choose an empty or a new directory")


def check_claim(root: Path, key: str) -> StudyRef | None:
    """The study in ``root``, if it is the one of ``key``. Raises StudyError if it is another."""
    check_output(root)
    if not (root / IDENTITY).exists():
        return None
    study = read_identity(root)
    if study.key != key:
        raise StudyError(
            f"{root} belongs to another study ({study.id}: another model, spec, host or library version); "
            "choose another --output"
        )
    return study


def read_identity(root: Path) -> StudyRef:
    """The study that ``root`` belongs to. Raises StudyError if the file is not one this version wrote."""
    try:
        identity = StudyIdentity.model_validate_json((root / IDENTITY).read_bytes())
    except ValueError as error:
        raise StudyError(
            f"{root / IDENTITY} is not of a study this version can read ({_problem(error)}); "
            "choose another --output"
        ) from error
    return StudyRef(root=root, **identity.model_dump())


def _unfinished(settings: Settings, key: str) -> StudyRef | None:
    """The newest recent study with this key that was begun, not finished, and that nobody works on."""
    oldest = datetime.now(UTC) - timedelta(hours=settings.trial_reuse_hours)
    for identity in sorted(settings.studies.glob(f"*/{IDENTITY}"), reverse=True):
        try:
            study = read_identity(identity.parent)
        except StudyError:  # another version's
            continue
        if (
            study.key == key
            and study.created > oldest
            and not study.result_path.exists()
            and not _busy(study)
        ):
            return study
    return None


def _busy(study: StudyRef) -> bool:
    try:
        with working_on(study):
            return False
    except StudyError:
        return True


@contextmanager
def working_on(study: StudyRef) -> Iterator[None]:
    """Hold the study's lock. Raises StudyError if another process holds it."""
    try:
        lock = file_lock(study.root / ".lock", blocking=False)
        lock.__enter__()
    except BlockingIOError:
        raise StudyError(
            f"another run is at work in {study.root}; wait for it or choose another --output"
        ) from None
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


def save_trial(study: StudyRef, trial: Trial) -> Trial:
    """Write a trial as far as it got, and its raw samples if it has any."""
    if trial.measurements is not None:
        path = study.samples_path(trial.id)
        write_atomic(path, trial.measurements.model_dump_json(indent=1))
        trial = trial.model_copy(update={"samples_path": str(path.relative_to(study.root))})
    write_atomic(study.trial_path(trial.id), trial.model_dump_json(indent=1))
    return trial


def _with_samples(root: Path, trial: Trial) -> Trial:
    if trial.samples_path is None:
        return trial
    samples = Measurements.model_validate_json((root / trial.samples_path).read_bytes())
    return trial.model_copy(update={"measurements": samples})


def save_study(study: Study) -> Path:
    """Write ``study.json``; from then on the study counts as finished."""
    path = study.output_dir / RESULT
    write_atomic(path, study.model_dump_json(indent=1))
    return path


def load_study(root: Path) -> Study:
    """Read a finished study. Raises StudyError with the way out if there is none."""
    path = root / RESULT if root.is_dir() else root
    if not path.is_file():
        raise StudyError(
            f"there is no finished study at {root}: {RESULT} is missing; run open-autoglm optimize"
        )
    try:
        study = Study.model_validate_json(path.read_bytes())
        trials = tuple(_with_samples(path.parent, trial) for trial in study.trials)
    except (ValueError, OSError) as error:
        raise StudyError(f"{path} is not a study this version can read ({_problem(error)})") from error
    return study.model_copy(update={"trials": trials, "output_dir": path.parent.absolute()})


def _problem(error: ValueError | OSError) -> str:
    """What is wrong with a file, in one line."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc'])) or 'JSON'}: {first['msg']}"
    return str(error)


def latest_study(settings: Settings) -> Path:
    """The directory of the study finished last under `home`. Raises StudyError if there is none."""
    results = sorted(settings.studies.glob(f"*/{RESULT}"), key=lambda path: path.stat().st_mtime)
    if not results:
        raise StudyError(f"there is no finished study under {settings.studies}; run open-autoglm optimize")
    return results[-1].parent
