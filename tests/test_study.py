"""The study's directory: whose it is, what it keeps, and what a second run finds in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from studies import SHAPES, crashed_trial, demo_checkpoint, demo_hardware, demo_study, measured_trial

from open_autoglm.errors import StudyError
from open_autoglm.schemas import Hardware, Measurements, OptimizeSpec, Trial
from open_autoglm.settings import Settings
from open_autoglm.study import (
    IDENTITY,
    StudyRef,
    check_output,
    latest_study,
    load_study,
    open_study,
    save_study,
    save_trial,
    working_on,
)

SPEC = OptimizeSpec(model_path="here")
HARDWARE = demo_hardware()


def begin(settings: Settings, output: Path | None = None, spec: OptimizeSpec = SPEC) -> StudyRef:
    return open_study(spec, demo_checkpoint(), HARDWARE, settings, output)


@pytest.fixture
def study(settings: Settings) -> StudyRef:
    return begin(settings)


def an_earlier_one(study: StudyRef) -> StudyRef:
    """The same study as if begun earlier: names are told apart by the second they were begun in."""
    root = study.root.rename(study.root.with_name("earlier"))
    return study.model_copy(update={"root": root})


# ── whose directory it is ────────────────────────────────────────────────────────────────────────


def test_a_new_study_lies_under_home_by_name_and_date(settings: Settings, study: StudyRef) -> None:
    """Its directory says which model, when, and which request."""
    assert study.root == settings.studies / study.id
    assert study.id.startswith(f"demo-glm-{study.created:%Y%m%d-%H%M%S}-")
    assert study.id.endswith(study.key[:6])


def test_an_unfinished_study_is_resumed(settings: Settings, study: StudyRef) -> None:
    """The same request on the same model and host goes on where it stopped."""
    assert begin(settings) == study


@pytest.mark.parametrize("change", [{"rounds": 11}, {"objective": "memory"}, {"seed": 1}])
def test_another_request_is_another_study(
    settings: Settings, study: StudyRef, change: dict[str, Any]
) -> None:
    """Whatever changes a figure or the answer changes the key."""
    other = begin(settings, spec=SPEC.model_copy(update=change))
    assert other.key != study.key
    assert other.root != study.root


def test_another_host_is_another_study(settings: Settings, study: StudyRef) -> None:
    """Figures of one host say nothing about another."""
    elsewhere: Hardware = demo_hardware(fingerprint="another")
    assert open_study(SPEC, demo_checkpoint(), elsewhere, settings, None).key != study.key


def test_where_it_is_kept_does_not_make_another_study(settings: Settings, study: StudyRef) -> None:
    """Neither the path of the model nor the name it is registered by changes a figure."""
    moved = SPEC.model_copy(
        update={"model_path": "elsewhere", "register_as": "name", "output": "there", "promote": False}
    )
    assert begin(settings, spec=moved).key == study.key


def test_a_finished_study_is_not_gone_on_with(settings: Settings, study: StudyRef) -> None:
    """Asked again tomorrow, the question is measured again."""
    earlier = an_earlier_one(study)
    save_study(demo_study(output_dir=earlier.root))
    assert begin(settings).root != earlier.root


def test_a_study_someone_works_on_is_left_alone(settings: Settings, study: StudyRef) -> None:
    """A second run of the same request meanwhile gets a directory of its own."""
    earlier = an_earlier_one(study)
    with working_on(earlier):
        assert begin(settings).root != earlier.root


def test_a_study_of_another_version_is_passed_over(settings: Settings, study: StudyRef) -> None:
    """What cannot be read under home must not keep a new study from beginning."""
    (settings.studies / "zzz").mkdir()
    (settings.studies / "zzz" / IDENTITY).write_text('{"format_version": 99}')
    assert begin(settings) == study


def test_an_old_unfinished_study_is_not_resumed(settings: Settings, study: StudyRef) -> None:
    """Half of last week's figures and half of today's would make no study."""
    earlier = an_earlier_one(study)
    impatient = settings.model_copy(update={"trial_reuse_hours": 0})
    assert begin(impatient).root != earlier.root


def test_a_named_directory_is_resumed_even_if_finished(settings: Settings, tmp_path: Path) -> None:
    """Who names the directory means that study."""
    study = begin(settings, tmp_path / "mine")
    save_study(demo_study(output_dir=study.root))
    assert begin(settings, tmp_path / "mine") == study


def test_the_directory_of_another_study_is_refused(settings: Settings, tmp_path: Path) -> None:
    """Nothing of either is touched, and the sentence says what to do."""
    study = begin(settings, tmp_path / "mine")
    before = (study.root / IDENTITY).read_bytes()
    with pytest.raises(StudyError, match=r"belongs to another study .*choose another --output"):
        begin(settings, tmp_path / "mine", SPEC.model_copy(update={"rounds": 50}))
    assert [path.name for path in study.root.iterdir()] == [IDENTITY]
    assert (study.root / IDENTITY).read_bytes() == before


def test_a_directory_with_other_things_is_refused(tmp_path: Path) -> None:
    """Somebody's home is not overwritten by a study."""
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(StudyError, match="is not empty and holds no study"):
        check_output(tmp_path)


def test_an_identity_of_something_else_is_refused(settings: Settings, tmp_path: Path) -> None:
    """A file of that name that no study wrote is a user error, not a bug."""
    (tmp_path / IDENTITY).write_text('{"name": "passport"}')
    with pytest.raises(StudyError, match=IDENTITY):
        begin(settings, tmp_path)


@pytest.mark.parametrize("below", ["file", "file/deeper/still"])
def test_a_file_in_the_way_is_refused(tmp_path: Path, below: str) -> None:
    """An output below a file can never be made."""
    (tmp_path / "file").touch()
    with pytest.raises(StudyError, match=f"{tmp_path / 'file'} is a file"):
        check_output(tmp_path / below)


def test_checking_an_output_makes_nothing(tmp_path: Path) -> None:
    """The check runs before anything is known to work."""
    check_output(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_made_is_refused(settings: Settings) -> None:
    """The kernel's reason is in the sentence."""
    with pytest.raises(StudyError, match="cannot write to /proc/study"):
        begin(settings, Path("/proc/study"))


# ── its lock ─────────────────────────────────────────────────────────────────────────────────────


def test_one_run_at_a_time(study: StudyRef) -> None:
    """A second run in the same directory is refused, and may begin when the first has ended."""
    with working_on(study), pytest.raises(StudyError, match="another run is at work"), working_on(study):
        pass
    with working_on(study):
        pass


def test_a_killed_run_frees_its_study(study: StudyRef) -> None:
    """The kernel releases the lock, however the holder dies."""
    holder = f"""
import sys, time
from pathlib import Path
from open_autoglm.study import read_identity, working_on
with working_on(read_identity(Path({str(study.root)!r}))):
    print("held", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(StudyError), working_on(study):
            pass
        process.kill()
    with working_on(study):
        pass


# ── its trials ───────────────────────────────────────────────────────────────────────────────────


def test_a_trial_is_kept_as_far_as_it_got(study: StudyRef) -> None:
    """What was found out in one file, for whoever looks in; saving it again replaces it."""
    crashed = save_trial(study, crashed_trial())
    assert crashed == crashed_trial()
    assert not study.samples_path(crashed.id).exists()
    told = save_trial(study, crashed.model_copy(update={"reason": "crashed once more"}))
    assert Trial.model_validate_json(study.trial_path(crashed.id).read_bytes()) == told


def test_raw_samples_have_a_file_of_their_own(study: StudyRef) -> None:
    """Every round, repeated ones too, beside the trial that names the file and does not repeat it."""
    trial = save_trial(study, measured_trial(SHAPES[0]).model_copy(update={"samples_path": None}))
    assert trial.samples_path == f"samples/{trial.id}.json"
    stored = Measurements.model_validate_json((study.root / trial.samples_path).read_bytes())
    assert stored == trial.measurements
    assert "measurements" not in json.loads(study.trial_path(trial.id).read_text())


# ── its result ───────────────────────────────────────────────────────────────────────────────────


def test_a_finished_study_reads_back_as_it_was(study: StudyRef) -> None:
    """From its directory or from the file, raw samples included, and wherever it was moved to."""
    finished = demo_study(output_dir=study.root)
    finished = finished.model_copy(update={"trials": tuple(save_trial(study, t) for t in finished.trials)})
    path = save_study(finished)
    assert load_study(study.root) == finished
    assert load_study(path) == finished
    moved = study.root.rename(study.root.with_name("moved"))
    assert load_study(moved) == finished.model_copy(update={"output_dir": moved})


def test_an_unfinished_or_damaged_study_is_refused(study: StudyRef) -> None:
    """In one sentence each that says what to do."""
    with pytest.raises(StudyError, match="no finished study"):
        load_study(study.root)
    with pytest.raises(StudyError, match="no finished study"):
        load_study(study.root / "nowhere")
    (study.root / "study.json").write_text(json.dumps({"format_version": 1}))
    with pytest.raises(StudyError, match="not a study this version can read") as caught:
        load_study(study.root)
    assert "\n" not in str(caught.value)


def test_the_latest_study_is_the_one_finished_last(settings: Settings) -> None:
    """Not the one begun last."""
    with pytest.raises(StudyError, match="no finished study"):
        latest_study(settings)
    for age_s, name in enumerate(["b", "c", "a"]):
        root = settings.studies / name
        path = save_study(demo_study(output_dir=root))
        os.utime(path, (time.time() - age_s, time.time() - age_s))
    assert latest_study(settings).name == "b"
