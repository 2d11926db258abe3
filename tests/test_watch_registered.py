"""A version's baseline is kept with it in MLflow, and found again by whoever has lost it."""

from __future__ import annotations

import shutil
from datetime import timedelta
from pathlib import Path

import pytest
from bundles import openable_study
from registries import Shelf
from watched import baseline, judged, traffic, window

from open_autoglm.bundle import build_bundle
from open_autoglm.measure.environment import host_environment
from open_autoglm.monitoring.anchor import anchor_of
from open_autoglm.monitoring.baseline import Anchor, Baseline
from open_autoglm.monitoring.config import WatchSpec
from open_autoglm.monitoring.registered import origin_of, share_baseline
from open_autoglm.monitoring.watch import look
from open_autoglm.monitoring.watch_store import WatchStore
from open_autoglm.schemas import Judgement, LatencyWindow
from open_autoglm.tracking import Unreachable

WATCHED = {
    "service": "demo",
    "endpoint": "http://10.0.0.7:8000",
    "slo": {"ttft_p95": "500ms"},
    "judge": {"baseline_windows": 24},
    "optimize": {"model_path": "demo"},
}
SPEC = WatchSpec.model_validate(WATCHED)
TAG = "autoglm.baseline."


def seen(store: WatchStore, one: LatencyWindow, anchor: Anchor | None = None) -> Judgement:
    return look(SPEC, lambda _: one, store, one.end + timedelta(seconds=1), lambda _: anchor)


def of(service: str, known: Baseline) -> Baseline:
    return known.model_copy(update={"service": service})


def watch_of(service: str, endpoint: str = SPEC.endpoint) -> WatchSpec:
    return WatchSpec.model_validate(WATCHED | {"service": service, "endpoint": endpoint})


def judgement_of(service: str, **changes: str) -> Judgement:
    (found,), _ = judged([traffic(400, service=service, **changes)])
    return found


@pytest.fixture
def name(shelf: Shelf, request: pytest.FixtureRequest) -> str:
    """Of a registered model with one version."""
    return shelf.register(request.node.name, 1)


# ── there and back ───────────────────────────────────────────────────────────────────────────────


def test_a_lost_baseline_is_found_again(shelf: Shelf, name: str, tmp_path: Path) -> None:
    """Registered once, under a tag of its version; fetched by a watch that knows nothing, and compares."""
    watch, store = watch_of(name), WatchStore(tmp_path, name)
    known, one = of(name, baseline(96)), judgement_of(name)
    assert share_baseline(watch, one, store, shelf.tracker) is None
    assert store.keep_baseline(known) is None
    assert share_baseline(watch, one, store, shelf.tracker) == "the baseline of 96 windows is registered"
    assert share_baseline(watch, one, store, shelf.tracker) is None

    tags = shelf.client.get_model_version(name, "1").tags
    (address,) = [value for tag, value in tags.items() if tag.startswith(TAG)]
    run_id, path = address.removeprefix("runs:/").split("/", 1)
    kept = Path(shelf.client.download_artifacts(run_id, path, str(tmp_path)))
    assert Baseline.model_validate_json(kept.read_bytes()) == known

    elsewhere = WatchStore(tmp_path / "another", name)
    told = share_baseline(watch, one, elsewhere, shelf.tracker)
    assert told == "its registered baseline of 96 windows holds from the next look on"
    assert one.window is not None
    assert elsewhere.baseline(one.window) == known
    later = seen(elsewhere, traffic(401, service=name))
    assert "ttft_expected_ms" in later.figures


def test_a_longer_lesson_takes_its_place(shelf: Shelf, name: str, tmp_path: Path) -> None:
    watch, store, one = watch_of(name), WatchStore(tmp_path, name), judgement_of(name)
    for count in (48, 96):
        store.keep_baseline(of(name, baseline(count)))
        assert share_baseline(watch, one, store, shelf.tracker) is not None
    elsewhere = WatchStore(tmp_path / "another", name)
    share_baseline(watch, one, elsewhere, shelf.tracker)
    assert one.window is not None
    found = elsewhere.baseline(one.window)
    assert found is not None
    assert found.windows == 96


def test_nobody_takes_anothers(shelf: Shelf, name: str, tmp_path: Path) -> None:
    """Of another bundle, another version, or another host; nor where its file was removed."""
    watch, store, one = watch_of(name), WatchStore(tmp_path, name), judgement_of(name)
    store.keep_baseline(of(name, baseline(48)))
    share_baseline(watch, one, store, shelf.tracker)
    lost = WatchStore(tmp_path / "another", name)
    for other in ({"version": "2"}, {"bundle_digest": "ba9876543210"}):
        assert share_baseline(watch, judgement_of(name, **other), lost, shelf.tracker) is None
    there = watch_of(name, "http://10.0.0.8:8000")
    assert share_baseline(there, one, lost, shelf.tracker) is None
    no_window = one.model_copy(update={"window": None})
    assert share_baseline(watch, no_window, lost, shelf.tracker) is None

    experiment = shelf.client.get_experiment_by_name(f"open-autoglm/{name}")
    folder = Path(experiment.artifact_location.removeprefix("file://"))
    for kept in folder.rglob("baselines"):
        shutil.rmtree(kept)
    assert share_baseline(watch, one, lost, shelf.tracker) is None


def test_a_bundle_that_no_registry_knows_has_one_too(shelf: Shelf, tmp_path: Path) -> None:
    watch, store, one = watch_of("swapped-in"), WatchStore(tmp_path, "swapped-in"), judgement_of("swapped-in")
    store.keep_baseline(of("swapped-in", baseline(48)))
    assert share_baseline(watch, one, store, shelf.tracker) is not None
    assert share_baseline(watch, one, WatchStore(tmp_path / "b", "swapped-in"), shelf.tracker) is not None


def test_a_disk_that_is_full_is_told(shelf: Shelf, name: str, tmp_path: Path) -> None:
    watch, store, one = watch_of(name), WatchStore(tmp_path, name), judgement_of(name)
    store.keep_baseline(of(name, baseline(48)))
    share_baseline(watch, one, store, shelf.tracker)
    lost = WatchStore(tmp_path / "another", name)
    lost.history_file.parent.mkdir(parents=True)
    (lost.history_file.parent / "baselines").write_text("in the way")
    told = share_baseline(watch, one, lost, shelf.tracker)
    assert told is not None
    assert told.startswith("its registered baseline cannot be kept")


def test_mlflow_whose_files_cannot_be_written_is_told(shelf: Shelf, name: str, tmp_path: Path) -> None:
    """In one sentence; the baseline stays where it is, and is registered another time."""
    watch, store, one = watch_of(name), WatchStore(tmp_path, name), judgement_of(name)
    store.keep_baseline(of(name, baseline(48)))
    shelf.tracker.log_judgement(one)
    experiment = shelf.client.get_experiment_by_name(f"open-autoglm/{name}")
    (run,) = shelf.client.search_runs([experiment.experiment_id])
    folder = Path(run.info.artifact_uri.removeprefix("file://"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "baselines").write_text("in the way")
    with pytest.raises(Unreachable, match="cannot be used"):
        share_baseline(watch, one, store, shelf.tracker)
    (folder / "baselines").unlink()
    assert share_baseline(watch, one, store, shelf.tracker) is not None


def test_a_host_is_told_by_its_address() -> None:
    """On loopback by this machine's name, since everybody has that address."""
    assert origin_of(SPEC) == "10.0.0.7:8000"
    assert origin_of(watch_of("demo", "http://gpu-box/")) == "gpu-box:"
    here = {
        origin_of(watch_of("demo", f"http://{host}:8000")) for host in ("127.0.0.1", "localhost", "[::1]")
    }
    assert len(here) == 1
    assert not here.pop().startswith(("127", "localhost", "::1"))


def test_a_short_lesson_does_not_replace_what_was_fetched(tmp_path: Path) -> None:
    """The memory was lost with the disk: its first day is learned again, and knows less."""
    store = WatchStore(tmp_path, "demo")
    store.keep_baseline(baseline(96))
    for number in range(96, 96 + 24):
        seen(store, traffic(number))
    found = store.baseline(window())
    assert found is not None
    assert found.windows == 96
    assert len(store.memory().memory.lesson.observations) == 24


# ── beside the study ─────────────────────────────────────────────────────────────────────────────


def test_a_new_baseline_is_held_against_the_study(tmp_path: Path) -> None:
    """An idle endpoint takes 128 ms for such a prompt, and 9 ms for a token."""
    store = WatchStore(tmp_path, "demo")
    measured = Anchor(prompt_tokens=120, output_tokens=48, median_ms={"ttft": 64.0, "tpot": 9.0})
    found = [seen(store, traffic(number), measured) for number in range(24)]
    told = "a baseline of 24 windows was learned; when idle, it is ttft"
    assert [any(told in reason for reason in one.reasons) for one in found] == [False] * 23 + [True]
    known = store.baseline(window())
    assert known is not None
    assert known.slower_than_trial["ttft"] == pytest.approx(2, rel=0.1)
    assert known.slower_than_trial["tpot"] == pytest.approx(1, rel=0.1)


def test_the_study_speaks_only_for_its_own_kind_of_host(tiny_glm: Path, tmp_path: Path) -> None:
    """Figures of elsewhere say nothing of here, nor do those of several requests at a time."""
    here = host_environment()
    study = openable_study(tiny_glm)
    trial = study.trials[0]
    assert trial.capsule is not None
    capsule = trial.capsule.model_copy(update={"host": here | {"peak": "12 GB/s"}})
    trial = trial.model_copy(update={"capsule": capsule})
    bundle = build_bundle(study, trial, tmp_path / "bundle").path
    found = anchor_of(bundle, here)
    assert found is not None
    assert (found.prompt_tokens, found.output_tokens) == (study.spec.prompt_tokens, study.spec.output_tokens)
    assert found.median_ms == {name: trial.metrics[f"{name}_ms"].median for name in ("ttft", "tpot")}
    assert anchor_of(bundle, here | {"cpu": "another"}) is None
    assert anchor_of(tmp_path / "nothing", here) is None
    spec = study.spec.model_copy(update={"batch_size": 4})
    several = build_bundle(study.model_copy(update={"spec": spec}), trial, tmp_path / "several").path
    assert anchor_of(several, here) is None
