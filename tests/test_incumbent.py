"""The registered champion takes part: found among the candidates, added to them, or named with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
from benches import exported_trial, real_candidate, tiny_bench
from bundles import openable_study
from studies import demo_analysis

from open_autoglm.bundle import build_bundle
from open_autoglm.incumbent import find_incumbent, is_registered_bundle
from open_autoglm.schemas import Trial
from open_autoglm.settings import Settings
from open_autoglm.tracking import Tracker
from open_autoglm.trials import Bench, prepare_reference, screen_trial

SERVED = "torch-fp32"


class Place(NamedTuple):
    """A study at work, and the registry it asks."""

    bench: Bench
    tracker: Tracker
    settings: Settings

    def named(self, name: str) -> Place:
        """The same study, of the registered model of that name."""
        spec = self.bench.spec.model_copy(update={"register_as": name})
        return self._replace(bench=self.bench.model_copy(update={"spec": spec}))

    def trial(self, name: str) -> Trial:
        return exported_trial(self.bench, self.settings, real_candidate(name))


@pytest.fixture(scope="module")
def place(tiny_glm: Path, shared_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("incumbent")
    bench = tiny_bench(tiny_glm, shared_settings, root / "study", prompt_tokens=30)
    return Place(bench, Tracker(f"sqlite:///{root}/mlflow.db", root / "artifacts"), shared_settings)


def register(place: Place, name: str, checkpoint: Path, folder: Path) -> None:
    """Make the torch candidate of ``checkpoint`` the champion of ``name``."""
    study = openable_study(checkpoint)
    study = study.model_copy(update={"spec": study.spec.model_copy(update={"register_as": name})})
    bundle = build_bundle(study, study.trial(SERVED), folder / "bundle")
    run_id = place.tracker.start_study(study.spec, study.id, name)
    place.tracker.register_champion(study, bundle, run_id)


@pytest.fixture(scope="module")
def served(place: Place, tiny_glm: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """With the champion of an earlier study in the registry."""
    register(place, "served", tiny_glm, tmp_path_factory.mktemp("earlier"))
    return place.named("served")


def test_without_a_champion_there_is_no_incumbent(place: Place) -> None:
    """The first study of a model has nobody to beat."""
    trials = [place.trial(SERVED)]
    none = find_incumbent(place.named("nobody").bench, place.tracker, trials, place.settings)
    assert none == (None, trials)


def test_a_champion_that_is_a_candidate_is_marked_among_them(served: Place) -> None:
    """It is timed once, under its own name, and everything else about it stays."""
    trials = [served.trial(name) for name in ("onnxruntime-fp32", SERVED)]
    incumbent, marked = find_incumbent(served.bench, served.tracker, trials, served.settings)
    assert incumbent is not None
    assert (incumbent.trial_id, incumbent.version, incumbent.note) == (SERVED, "1", "")
    assert [t.candidate.incumbent for t in marked] == [False, True]
    assert marked[0] == trials[0]
    candidate = marked[1].candidate.model_copy(update={"incumbent": False})
    assert marked[1].model_copy(update={"candidate": candidate}) == trials[1]
    assert not is_registered_bundle(marked[1])


@pytest.mark.parametrize("change", ["knobs", "files"])
def test_a_champion_is_only_a_candidate_if_nothing_differs(served: Place, change: str) -> None:
    """The same name with other threads or other files is another engine."""
    trial = served.trial(SERVED)
    assert trial.exported is not None
    if change == "knobs":
        other = trial.candidate.model_copy(update={"knobs": {**trial.candidate.knobs, "threads": 1}})
        trial = trial.model_copy(update={"candidate": other})
    else:
        exported = trial.exported.model_copy(update={"digest": "of other files"})
        trial = trial.model_copy(update={"exported": exported})
    incumbent, trials = find_incumbent(served.bench, served.tracker, [trial], served.settings)
    assert incumbent is not None
    assert incumbent.trial_id == "registered-v1"
    assert [t.id for t in trials] == [SERVED, "registered-v1"]
    assert trials[0] == trial


def test_a_champion_of_another_configuration_is_added_and_measured(served: Place) -> None:
    """From its bundle, with the knobs it is served with: its files may exist nowhere else."""
    others = [served.trial("onnxruntime-fp32")]
    incumbent, trials = find_incumbent(served.bench, served.tracker, others, served.settings)
    added = trials[-1]
    assert incumbent is not None
    assert incumbent.trial_id == added.id == "registered-v1"
    assert trials[:-1] == others
    assert added.candidate.incumbent
    assert not added.candidate.reference
    assert is_registered_bundle(added)
    assert added.exported is not None
    assert added.exported.path != served.bench.checkpoint.path
    reference = prepare_reference(served.bench, demo_analysis(), served.settings)
    seen = screen_trial(served.bench, added, reference, served.settings)
    assert (seen.status, seen.reused) == ("ok", ())
    assert seen.quality is not None
    assert seen.quality.ratio == pytest.approx(1, abs=1e-4)


def test_a_champion_of_another_checkpoint_is_named_and_not_compared(
    place: Place, tiny_llama: Path, tmp_path: Path
) -> None:
    """Two models are not two ways to serve one."""
    register(place, "retrained", tiny_llama, tmp_path)
    trials = [place.trial(SERVED)]
    there = place.named("retrained")
    incumbent, same = find_incumbent(there.bench, there.tracker, trials, there.settings)
    assert incumbent is not None
    assert (incumbent.trial_id, incumbent.version) == (None, "1")
    assert incumbent.note == "it was made from another checkpoint"
    assert same == trials


def test_a_damaged_champion_is_named_and_not_compared(place: Place, tiny_glm: Path, tmp_path: Path) -> None:
    """A study goes on without it, and says what is wrong with what is registered."""
    register(place, "damaged", tiny_glm, tmp_path)
    there = place.named("damaged")
    registered = there.tracker.champion("damaged", tmp_path / "cache")
    assert registered is not None
    weights = registered.bundle / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    trials = [place.trial(SERVED)]
    incumbent, same = find_incumbent(there.bench, there.tracker, trials, there.settings)
    assert incumbent is not None
    assert incumbent.trial_id is None
    assert incumbent.note.startswith("its bundle cannot be opened: ")
    assert "model.safetensors" in incumbent.note
    assert same == trials
