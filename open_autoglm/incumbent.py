"""The registered champion as a contestant: a challenger has to beat what is served now, measured again in
the same heats."""

from __future__ import annotations

from collections.abc import Sequence

from open_autoglm.bundle import open_bundle
from open_autoglm.errors import UserError
from open_autoglm.progress import announce
from open_autoglm.schemas import Incumbent, Manifest, Trial
from open_autoglm.settings import Settings
from open_autoglm.tracking import CHAMPION, Tracker, registered_name
from open_autoglm.trials import Bench, begin_trial, configuration

_REGISTERED = "registered-v"


def find_incumbent(
    bench: Bench, tracker: Tracker, trials: Sequence[Trial], settings: Settings
) -> tuple[Incumbent | None, list[Trial]]:
    """What is registered now, and the trials with the one that measures it marked, or added at the end.

    A champion that cannot be compared (damaged, or of another checkpoint) is named with the reason.
    """
    name = registered_name(bench.spec, bench.checkpoint.name)
    registered = tracker.version_with(name, CHAMPION)
    if registered is None:
        return None, list(trials)
    found = Incumbent(model_name=name, version=registered.version)
    try:
        manifest, bundle = open_bundle(tracker.fetch(registered, settings.home / "cache" / "incumbents"))
    except UserError as error:
        return _not_compared(found, f"its bundle cannot be opened: {error}"), list(trials)
    if manifest.checkpoint_digest != bench.checkpoint.digest:
        return _not_compared(found, "it was made from another checkpoint"), list(trials)
    same = next((trial for trial in trials if _is(trial, manifest)), None)
    if same is None:
        exported = manifest.exported.model_copy(update={"path": bundle.path / "model"})
        marks = {"id": f"{_REGISTERED}{registered.version}", "incumbent": True, "baseline": False}
        candidate = manifest.candidate.model_copy(update={**marks, "reference": False})
        same = begin_trial(bench.study, candidate).model_copy(update={"exported": exported})
        marked = [*trials, same]
    else:
        kept = same.candidate.model_copy(update={"incumbent": True})
        marked = [t if t.id != same.id else t.model_copy(update={"candidate": kept}) for t in trials]
    announce(f"incumbent: version {registered.version} of {name} is {same.id}, and is measured again")
    return found.model_copy(update={"trial_id": same.id}), marked


def is_registered_bundle(trial: Trial) -> bool:
    """Whether the trial was added for the incumbent's sake, being none of the engines' candidates."""
    return trial.candidate.incumbent and trial.id.startswith(_REGISTERED)


def _is(trial: Trial, manifest: Manifest) -> bool:
    return (
        trial.exported is not None
        and trial.exported.digest == manifest.exported.digest
        and configuration(trial.candidate) == configuration(manifest.candidate)
    )


def _not_compared(incumbent: Incumbent, why: str) -> Incumbent:
    announce(f"incumbent: version {incumbent.version} of {incumbent.model_name} is not compared: {why}")
    return incumbent.model_copy(update={"note": why})
