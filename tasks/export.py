"""Make or reuse the files a candidate needs. Runs in parallel; shares the device with other preparation."""

from __future__ import annotations

from prefect import task

from open_autoglm.schemas import Candidate, Checkpoint, Trial
from open_autoglm.settings import Settings
from open_autoglm.study import StudyRef
from open_autoglm.trials import begin_trial, export_trial
from tasks.progress import unit_done


@task(task_run_name="export-{candidate.id}")
def export(candidate: Candidate, study: StudyRef, checkpoint: Checkpoint) -> Trial:
    """Begin the candidate's trial and export, or reuse the export that was kept."""
    trial = export_trial(study, checkpoint, begin_trial(study, candidate), Settings())
    unit_done(study)
    return trial
