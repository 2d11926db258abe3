"""Studies, trials and champions in a real MLflow database: complete, repeatable, silent."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from bundles import openable_study
from studies import CHAMPION, demo_study, demo_trials

from open_autoglm.bundle import BundleModel, build_bundle
from open_autoglm.errors import UserError
from open_autoglm.schemas import Bundle, Study, Trial
from open_autoglm.tracking import Tracker, mlflow_link, registered_name


@pytest.fixture(scope="module")
def first_use(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tracker, str]:
    """One database for all tests, as it takes seconds to make, and what was printed meanwhile."""
    home = tmp_path_factory.mktemp("mlflow") / "not there yet"
    with redirect_stdout(StringIO()) as printed:
        tracker = Tracker(f"sqlite:///{home}/mlflow.db", home / "artifacts")
    return tracker, printed.getvalue()


@pytest.fixture(scope="module")
def tracker(first_use: tuple[Tracker, str]) -> Tracker:
    """The tests keep apart by the name of their model."""
    return first_use[0]


@pytest.fixture(scope="module")
def client(tracker: Tracker) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracker.uri)


@pytest.fixture(scope="module")
def study(tiny_glm: Path) -> Study:
    return openable_study(tiny_glm)


@pytest.fixture
def bundle(study: Study, tmp_path: Path) -> Bundle:
    return build_bundle(study, study.trial(study.champion or ""), tmp_path / "bundle")


def trial(trial_id: str) -> Trial:
    return next(trial for trial in demo_trials() if trial.id == trial_id)


def begin(tracker: Tracker, model_name: str, study_id: str = "study-1") -> str:
    return tracker.start_study(demo_study().spec, study_id, model_name)


def named(study: Study, name: str, promote: bool = True, **changes: Any) -> Study:
    """The openable study, registered as ``name``."""
    spec = study.spec.model_copy(update={"register_as": name, "promote": promote})
    return study.model_copy(update={"spec": spec, **changes})


def another_bundle(study: Study, directory: Path) -> Bundle:
    """Of the same files, tuned otherwise."""
    winner = study.trial(study.champion or "")
    tuned = winner.candidate.model_copy(update={"knobs": {"compile": True}})
    return build_bundle(study, winner.model_copy(update={"candidate": tuned}), directory)


def aliases_of(client: Any, name: str) -> dict[str, str]:
    return {alias: str(version) for alias, version in client.get_registered_model(name).aliases.items()}


def test_stdout_stays_free_for_json(
    first_use: tuple[Tracker, str], study: Study, bundle: Bundle, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither the first use, which makes directory and tables, nor a whole study prints there."""
    tracker, printed = first_use
    run_id = begin(tracker, "silent")
    tracker.log_trial(run_id, trial(CHAMPION))
    tracker.finish_study(run_id, demo_study())
    tracker.register_champion(named(study, "silent"), bundle, run_id)
    assert printed + capfd.readouterr().out == ""


def test_resumed_study_is_the_same_run(tracker: Tracker, client: Any) -> None:
    """Starting a study again finds its run, sets it running and keeps its request."""
    run_id = begin(tracker, "resumed")
    client.set_terminated(run_id, "FAILED")
    other = {"output": "another/directory", "model_path": "./demo", "promote": False, "register_as": "chat"}
    elsewhere = demo_study().spec.model_copy(update=other)
    assert tracker.start_study(elsewhere, "study-1", "resumed") == run_id
    run = client.get_run(run_id)
    assert {run.data.tags[f"autoglm.{name}"] for name in ("model_path", "promote")} == {"./demo", "False"}
    assert run.info.status == "RUNNING"
    assert run.data.params["max_latency"] == "1s"
    assert begin(tracker, "resumed", "study-2") != run_id


def test_trial_becomes_a_child_run_with_its_evidence(tracker: Tracker, client: Any, tmp_path: Path) -> None:
    """Params, figures with their bounds, quality of both paths, tags and files are all on the child run."""
    (tmp_path / "samples.json").write_text("[1, 2]")
    parent = begin(tracker, "evidence")
    run = client.get_run(tracker.log_trial(parent, trial(CHAMPION), [tmp_path / "samples.json"]))
    ttft, quality = trial(CHAMPION).metrics["ttft_ms"], trial(CHAMPION).quality
    assert quality is not None
    assert run.data.params == {
        "id": CHAMPION,
        "engine": "onnxruntime",
        "device": "cpu",
        "precision": "int8",
        "weight_bits": "9.0",
        "knob.block_size": "32",
        "knob.threads": "2",
    }
    assert run.data.metrics["ttft_ms"] == ttft.median
    assert [run.data.metrics[f"ttft_ms_{p}"] for p in ("p90", "p95", "p99")] == [ttft.p90, ttft.p95, ttft.p99]
    assert run.data.metrics["rounds"] == 10
    assert (run.data.metrics["ttft_ms_low"], run.data.metrics["ttft_ms_high"]) == ttft.interval
    assert run.data.metrics["quality_ratio"] == quality.ratio
    assert run.data.metrics["quality_decode_kl_divergence"] == quality.decode.kl_divergence
    assert run.data.tags["autoglm.feasible"] == str(trial(CHAMPION).feasible).lower()
    assert run.data.tags["autoglm.stage"] == "final"
    assert run.data.tags["autoglm.reproduce"] == f"open-autoglm reproduce studies/demo {CHAMPION}"
    assert "ttft_ms: p90 p95 p99" in run.data.tags["autoglm.indicative"]
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"samples.json", "trial.json"}


@pytest.mark.parametrize(
    ("trial_id", "status", "ended"),
    [
        (CHAMPION, "ok", "FINISHED"),
        ("tensorrt-fp16", "vetoed", "FINISHED"),
        ("torch-fp32", "stopped", "FINISHED"),
        ("onnxruntime-int8-b128", "crashed", "FAILED"),
    ],
)
def test_every_trial_is_a_run_that_ended(
    tracker: Tracker, client: Any, trial_id: str, status: str, ended: str
) -> None:
    """Vetoed and crashed candidates are runs too, with the reason for people to read."""
    run = client.get_run(tracker.log_trial(begin(tracker, "ended"), trial(trial_id)))
    assert run.info.status == ended
    assert run.data.tags["autoglm.status"] == status
    assert run.data.tags["autoglm.reason"] == trial(trial_id).reason


def test_who_left_early_has_rough_figures_under_names_of_their_own(tracker: Tracker, client: Any) -> None:
    """Nobody can rank an estimate among what was timed, and the fall has its stage and reason."""
    left = trial("torch-fp32")
    run = client.get_run(tracker.log_trial(begin(tracker, "left"), left))
    assert left.screening is not None
    assert run.data.metrics["screening_estimated_e2e_ms"] == left.screening.estimated_e2e_ms
    assert run.data.metrics["screening_peak_rss_bytes"] == left.screening.footprint.peak_rss_bytes
    assert "e2e_ms" not in run.data.metrics
    assert run.data.tags["autoglm.stage"] == "screening"
    assert run.data.tags["autoglm.fall"].startswith("screening: misses max_memory: 943 MiB")


def test_trial_logged_again_updates_its_run(tracker: Tracker, client: Any) -> None:
    """A task that runs twice leaves one run, with the later status."""
    parent = begin(tracker, "twice")
    first = tracker.log_trial(parent, trial(CHAMPION))
    worse = trial(CHAMPION).model_copy(update={"status": "incorrect", "reason": "wrong tokens"})
    assert tracker.log_trial(parent, worse) == first
    run = client.get_run(first)
    assert (run.info.status, run.data.tags["autoglm.status"]) == ("FAILED", "incorrect")


def test_trials_logged_from_threads_keep_their_parent(tracker: Tracker, client: Any) -> None:
    """Children logged in parallel all hang below the study, and none is left running."""
    parent = begin(tracker, "threads")
    with ThreadPoolExecutor(4) as pool:
        run_ids = list(pool.map(lambda trial: tracker.log_trial(parent, trial), demo_trials()))
    experiment = client.get_run(parent).info.experiment_id
    children = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{parent}'")
    assert {run.info.run_id for run in children} == set(run_ids)
    assert len(children) == len(demo_trials())
    assert "RUNNING" not in {run.info.status for run in children}


def test_finished_study_holds_verdict_and_report(tracker: Tracker, client: Any, tmp_path: Path) -> None:
    """The parent run shows the champion's figures and keeps study.json, the report and the Data Docs."""
    (tmp_path / "report.html").write_text("<html>")
    (tmp_path / "gate").mkdir()
    (tmp_path / "gate/index.html").write_text("<html>")
    run_id = begin(tracker, "finished")
    tracker.finish_study(run_id, demo_study(), [tmp_path / "report.html", tmp_path / "gate"])
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["autoglm.champion"] == CHAMPION
    assert run.data.metrics["ttft_ms"] == trial(CHAMPION).metrics["ttft_ms"].median
    assert {file.path for file in client.list_artifacts(run_id)} == {
        "gate", "report.html", "spec.json", "study.json",
    }  # fmt: skip
    stored = Path(client.download_artifacts(run_id, "study.json"))
    assert json.loads(stored.read_text())["champion"] == CHAMPION


def test_crashed_flow_leaves_nothing_running(tracker: Tracker, client: Any) -> None:
    """Runs still open end as failed with the reason; those that had ended stay as they were."""
    parent = begin(tracker, "crashed")
    done = tracker.log_trial(parent, trial(CHAMPION))
    running = tracker.log_trial(parent, trial("torch-fp32"))
    client.update_run(running, status="RUNNING")
    other = begin(tracker, "crashed", "another-study")
    tracker.mark_failed(parent, "killed by SIGKILL")
    ended = {run_id: client.get_run(run_id).info.status for run_id in (parent, running, done, other)}
    assert ended == {parent: "FAILED", running: "FAILED", done: "FINISHED", other: "RUNNING"}
    assert client.get_run(parent).data.tags["mlflow.note.content"] == "killed by SIGKILL"


def test_champion_is_registered_once(tracker: Tracker, client: Any, study: Study, bundle: Bundle) -> None:
    """The same bundle from a later study is confirmed, not written again."""
    first = tracker.register_champion(named(study, "once"), bundle, begin(tracker, "once"))
    later = named(study, "once", id="a-later-study")
    again = tracker.register_champion(later, bundle, begin(tracker, "once", later.id))
    assert first.model_version == again.model_version == "1"
    assert again.model_uri == "models:/once@champion"
    assert "confirmed" in again.note
    (version,) = client.search_model_versions("name = 'once'")
    assert version.tags["autoglm.bundle_digest"] == bundle.digest
    assert version.tags["autoglm.study_id"] == study.id
    assert version.tags["autoglm.last_confirmed_study"] == later.id
    assert version.tags["autoglm.engine"] == "torch"
    assert version.tags["autoglm.quality"] == "1"
    assert aliases_of(client, "once") == {"champion": "1"}


def test_a_winner_may_be_registered_without_being_promoted(
    tracker: Tracker, client: Any, study: Study, bundle: Bundle, tmp_path: Path
) -> None:
    """It is to be tried beside the champion first; without a champion there is nobody to be tried beside."""
    first = tracker.register_champion(named(study, "tried", promote=False), bundle, begin(tracker, "tried"))
    assert (first.model_version, first.model_uri) == ("1", "models:/tried@champion")
    other = another_bundle(study, tmp_path / "other")
    second = tracker.register_champion(named(study, "tried", promote=False), other, begin(tracker, "tried"))
    assert (second.model_version, second.model_uri) == ("2", "models:/tried/2")
    assert aliases_of(client, "tried") == {"champion": "1"}


def test_aliases_follow_the_champion(
    tracker: Tracker, client: Any, study: Study, bundle: Bundle, tmp_path: Path
) -> None:
    """A new champion makes the old one `previous`; when the old one wins again the two swap."""
    run_id = begin(tracker, "aliases")
    other = another_bundle(study, tmp_path / "other")
    aliases = []
    for chosen in (bundle, other, bundle):
        tracker.register_champion(named(study, "aliases"), chosen, run_id)
        aliases.append(aliases_of(client, "aliases"))
    assert aliases == [
        {"champion": "1"},
        {"champion": "2", "previous": "1"},
        {"champion": "1", "previous": "2"},
    ]
    assert len(client.search_model_versions("name = 'aliases'")) == 2


@pytest.fixture
def loaded(tracker: Tracker, study: Study, bundle: Bundle) -> Iterator[Any]:
    """The champion as a user of MLflow loads it."""
    import mlflow

    tracker.register_champion(named(study, "loaded"), bundle, begin(tracker, "loaded"))
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(tracker.uri)
    yield mlflow.pyfunc.load_model("models:/loaded@champion", model_config={"max_tokens": 100})
    mlflow.set_tracking_uri(before)


def test_champion_speaks_through_mlflow(loaded: Any, bundle: Bundle) -> None:
    """Lists, records and frames of prompts are answered as the bundle itself answers."""
    import pandas as pd

    expected = BundleModel(bundle.path).generate(["Hello"], 5)
    for prompts in (["Hello"], [{"prompt": "Hello"}], pd.DataFrame({"prompt": ["Hello"]})):
        assert loaded.predict(prompts, params={"max_new_tokens": 5}) == expected
    assert len(loaded.predict(["Hello", "A model"])) == 2
    with pytest.raises(UserError, match="room for 100 together"):
        loaded.predict(["word " * 200])
    with pytest.raises(UserError, match="not text"):
        loaded.predict({"prompt": ["Hello"]})


@pytest.mark.usefixtures("loaded")
def test_model_states_exact_public_requirements(client: Any) -> None:
    """What a server must install is pinned, without local builds, which no index has."""
    source = client.get_model_version_by_alias("loaded", "champion").source
    stated = (Path(unquote(source.removeprefix("file://"))) / "requirements.txt").read_text().split()
    names = {line.split("==")[0] for line in stated}
    assert {"torch", "transformers", "numpy", "mlflow"} <= names
    assert "open-autoglm" not in names
    assert all("==" in line and "+" not in line for line in stated)


@pytest.mark.parametrize("uri", ["file:./mlruns", "./mlruns", "mlruns", ""])
def test_folders_are_refused(uri: str, tmp_path: Path) -> None:
    """The file store is gone from MLflow; the sentence shows what to write instead."""
    with pytest.raises(UserError, match=r"give a database like sqlite:////"):
        Tracker(uri, tmp_path)


def test_unwritable_database_is_refused(tmp_path: Path) -> None:
    """A database below a file, or a file that is no database, is one sentence, not a traceback."""
    (tmp_path / "file").write_text(
        "this is not a database at all, it is a text of more than a hundred bytes" * 4
    )
    for path in (tmp_path / "file" / "mlflow.db", tmp_path / "file", tmp_path):
        with pytest.raises(UserError, match="cannot be written"):
            Tracker(f"sqlite:///{path}", tmp_path)


def test_server_that_is_down_is_named(tmp_path: Path) -> None:
    """An address where nothing listens is one sentence with the address."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{reserved.getsockname()[1]}"
        with pytest.raises(
            UserError, match=rf"MLflow at {uri} cannot be used \(\[Errno 111\] Connection refused\)"
        ):
            Tracker(uri, tmp_path)


def test_passwords_are_not_repeated(tmp_path: Path) -> None:
    """A sentence about an address with a password in it names the address without."""
    with pytest.raises(UserError, match="MLflow at redis://host cannot be used") as refusal:
        Tracker("redis://user:secret@host", tmp_path)
    assert "secret" not in str(refusal.value)


def test_address_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    """A scheme MLflow does not know is one sentence that lists those it does."""
    with pytest.raises(UserError, match=r"MLflow at redis://host cannot be used .*postgresql"):
        Tracker("redis://host", tmp_path)


@pytest.mark.parametrize(
    "uri", ["http://[::1", "http://host:port", "https://:5000", "http://user:pw@host:70000"]
)
def test_an_address_without_a_place_is_refused(uri: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no address of an MLflow server: give one like") as caught:
        Tracker(uri, tmp_path)
    assert "pw" not in str(caught.value)


def test_deleted_experiment_is_explained(tracker: Tracker, client: Any) -> None:
    """An experiment thrown away in the UI is not revived silently; the sentence says how to."""
    begin(tracker, "deleted")
    client.delete_experiment(client.get_experiment_by_name("open-autoglm/deleted").experiment_id)
    with pytest.raises(UserError, match="was deleted: restore it with mlflow experiments restore"):
        begin(tracker, "deleted")


def test_links_open_the_runs_page() -> None:
    """Links carry the mode that shows runs; a database has no page."""
    assert mlflow_link("http://host:5000/", "3", "abc") == (
        "http://host:5000/#/experiments/3/runs/abc?workflowType=machine_learning"
    )
    assert mlflow_link("http://host:5000", "3") == (
        "http://host:5000/#/experiments/3/runs?workflowType=machine_learning"
    )
    assert mlflow_link("sqlite:////mlflow.db", "3") is None


def test_registered_name_is_asked_for_or_made_from_the_checkpoint() -> None:
    """What MLflow forbids in a name is replaced."""
    spec = demo_study().spec
    assert registered_name(spec, "org/GLM 4:9b") == "org-GLM-4-9b"
    assert registered_name(spec.model_copy(update={"register_as": "mine"}), "glm") == "mine"
