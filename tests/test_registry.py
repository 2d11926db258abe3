"""Aliases and their events in a real MLflow database, and bundles that come from MLflow's server."""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from bundles import openable_study
from endpoints import endpoint
from registries import MlflowServer, Shelf
from small_disk import on_a_small_disk

from open_autoglm.bundle import open_bundle
from open_autoglm.errors import UserError
from open_autoglm.schemas import Aliases, Canary, Event
from open_autoglm.serving.last_good import remember
from open_autoglm.serving.source import find_source
from open_autoglm.settings import Settings
from open_autoglm.tracking import NotFetched, Tracker, UnderWay, in_use, sentence
from open_autoglm.tracking.bundles import Bundles
from open_autoglm.tracking.registry import Registry

TENTH = Canary(weight_percent=10, shadow_percent=20)


def kinds(shelf: Shelf, name: str) -> list[tuple[str, str]]:
    """What happened, oldest first."""
    return [(event.kind, event.state) for event in reversed(shelf.tracker.events(name))]


# ── moves ────────────────────────────────────────────────────────────────────────────────────────


def test_a_challenger_becomes_champion_and_goes_back(shelf: Shelf) -> None:
    """Through the whole life of a canary, each step is an event that says who, from what to what, and why."""
    name = shelf.register("life", 2)
    tracker = shelf.tracker
    tracker.canary(name, "2", TENTH, by="ada", reason="faster")
    assert tracker.aliases(name) == Aliases(champion="1", challenger="2", canary=TENTH)
    tracker.promote(name, by="judge", evidence={"ttft": {"change": -0.1}})
    assert tracker.aliases(name) == Aliases(champion="2", previous="1")
    undone = tracker.rollback(name, by="ada", reason="it stutters")
    assert tracker.aliases(name) == Aliases(champion="1", previous="2")
    assert sentence(undone) == ("life: champion version 2 → version 1, previous version 1 → version 2")
    assert tracker.events(name)[0] == undone
    assert kinds(shelf, name) == [("canary", "done"), ("promote", "done"), ("rollback", "done")]
    promotion = tracker.events(name)[1]
    assert (promotion.by, promotion.before.champion, promotion.after.champion) == ("judge", "1", "2")
    kept = Path(shelf.client.download_artifacts(promotion.id, "evidence.json"))
    assert json.loads(kept.read_text()) == {"ttft": {"change": -0.1}}


def test_events_are_no_studies(shelf: Shelf) -> None:
    """They lie beside the studies of the model, without the tags by which those are found, and have ended."""
    name = shelf.register("beside", 2)
    shelf.tracker.promote(name, "2", by="ada")
    experiment = shelf.client.get_experiment_by_name(f"open-autoglm/{name}")
    (run,) = shelf.client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert not {"autoglm.study_id", "autoglm.trial_key", "mlflow.parentRunId"} & run.data.tags.keys()
    assert run.data.tags["mlflow.user"] == "ada"


def test_rollback_takes_a_challenger_away_first(shelf: Shelf) -> None:
    """The champion goes back only without one, or if it is said."""
    name = shelf.register("first", 3)
    tracker = shelf.tracker
    tracker.promote(name, "2", by="ada")
    tracker.canary(name, "3", TENTH, by="ada")
    tracker.rollback(name, by="ada")
    assert tracker.aliases(name) == Aliases(champion="2", previous="1")
    tracker.canary(name, "3", TENTH, by="ada")
    tracker.rollback(name, champion=True, by="ada")
    assert tracker.aliases(name) == Aliases(champion="1", previous="2", challenger="3", canary=TENTH)


def test_a_share_is_changed_and_taken_away(shelf: Shelf) -> None:
    name = shelf.register("share", 2)
    tracker = shelf.tracker
    tracker.canary(name, "2", TENTH, by="ada")
    tracker.canary(name, None, Canary(weight_percent=50), by="ada")
    assert tracker.aliases(name).canary == Canary(weight_percent=50)
    tracker.stop_canary(name, by="ada")
    assert tracker.aliases(name) == Aliases(champion="1")
    assert kinds(shelf, name) == [("canary", "done"), ("canary", "done"), ("stop", "done")]


def test_a_share_that_somebody_scribbled_on_is_none(shelf: Shelf) -> None:
    """The challenger waits, and the next move mends it."""
    name = shelf.register("scribbled", 2)
    shelf.tracker.canary(name, "2", TENTH, by="ada")
    shelf.client.set_registered_model_tag(name, "autoglm.canary", "much")
    assert shelf.tracker.aliases(name) == Aliases(champion="1", challenger="2")
    shelf.tracker.canary(name, None, TENTH, by="ada")
    assert shelf.tracker.aliases(name).canary == TENTH


REFUSED: dict[str, tuple[Any, str]] = {
    "no model": (lambda t, _: t.promote("nobody", "1", by="a"), "no registered model 'nobody'"),
    "no version": (lambda t, n: t.promote(n, "9", by="a"), "has no version 9"),
    "no number": (lambda t, n: t.promote(n, "best", by="a"), "has no version best"),
    "no challenger": (lambda t, n: t.promote(n, by="a"), "no challenger to promote: say which --version"),
    "champion already": (lambda t, n: t.promote(n, "1", by="a"), "version 1 is the champion of .* already"),
    "nothing before": (lambda t, n: t.rollback(n, by="a"), "no previous champion to go back to"),
    "against itself": (lambda t, n: t.canary(n, "1", TENTH, by="a"), "cannot challenge itself"),
    "no share": (lambda t, n: t.canary(n, "2", Canary(), by="a"), "weight or shadow, above 0 %"),
    "whose share": (lambda t, n: t.canary(n, None, TENTH, by="a"), "say which --version"),
    "nothing to stop": (lambda t, n: t.stop_canary(n, by="a"), "no challenger to stop"),
    "no bundle": (lambda t, n: t.promote(n, "3", by="a"), "version 3 of .* holds no bundle"),
    "moved": (lambda t, n: t.promote(n, "2", by="a", expected={"champion": "7"}), "is version 1 by now"),
}


@pytest.fixture(scope="module")
def still(shelf: Shelf) -> str:
    """A model that no test moves; its third version is somebody else's."""
    name = shelf.register("still", 2)
    shelf.client.create_model_version(name, source=str(shelf.home))
    return name


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_before_anything_is_written(shelf: Shelf, still: str, case: str) -> None:
    ask, said = REFUSED[case]
    with pytest.raises(UserError, match=said):
        ask(shelf.tracker, still)
    assert shelf.tracker.aliases(still) == Aliases(champion="1")
    assert kinds(shelf, still) == []


# ── several at once, and crashes ─────────────────────────────────────────────────────────────────


class Interrupted(Exception):
    """The machine of who was moving aliases is gone."""


def cut_off(shelf: Shelf, monkeypatch: pytest.MonkeyPatch, call: str, when: int) -> None:
    """The ``when``-th ``call`` to the registry from now on does not happen, and nothing after it."""
    real, count = getattr(shelf.tracker._client, call), iter(range(when + 1))

    def until(*arguments: Any) -> Any:
        if next(count) == when:
            raise Interrupted
        return real(*arguments)

    monkeypatch.setattr(shelf.tracker._client, call, until)


def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody who is alive takes that long."""
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 120)


TRIED = Aliases(champion="2", challenger="3", previous="1", canary=TENTH)


@pytest.mark.parametrize(
    ("call", "when", "left", "mended", "ended"),
    [
        ("set_registered_model_alias", 0, TRIED, TRIED, "failed"),
        ("set_registered_model_alias", 1, TRIED.model_copy(update={"previous": "2"}), TRIED, "failed"),
        (
            "delete_registered_model_alias",
            0,
            TRIED.model_copy(update={"previous": "2", "champion": "3"}),
            Aliases(champion="3", previous="2"),
            "done",
        ),
    ],
    ids=["before the first alias", "before the champion", "before the challenger"],
)
def test_a_move_that_died_is_finished_or_undone(
    shelf: Shelf,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    when: int,
    left: Aliases,
    mended: Aliases,
    ended: str,
) -> None:
    """Wherever it was cut off there is a champion, and the next move begins from a whole state."""
    name = shelf.register(f"died-{call}-{when}", 4)
    tracker = shelf.tracker
    tracker.promote(name, "2", by="ada")
    tracker.canary(name, "3", TENTH, by="ada")
    with monkeypatch.context() as patch:
        cut_off(shelf, patch, call, when)
        with pytest.raises(Interrupted):
            tracker.promote(name, by="ada")
    assert tracker.aliases(name) == left
    with pytest.raises(UnderWay, match=r"ada is moving aliases of .* just now \(promote\)"):
        tracker.promote(name, "4", by="eve")
    later(monkeypatch)
    tracker.promote(name, "4", by="eve")
    newest, died = tracker.events(name)[:2]
    assert newest.before == mended
    assert (died.by, died.state) == ("ada", ended)
    assert "its writer did not end it" in died.note


def test_who_was_overtaken_moves_nothing(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody moves an alias, in MLflow's own pages, after it was read and before it is written."""
    name = shelf.register("overtaken", 3)
    begin = Registry._begin

    def slowly(self: Registry, *arguments: Any, **named: Any) -> Any:
        event = begin(self, *arguments, **named)
        shelf.client.set_registered_model_alias(name, "champion", "3")
        return event

    monkeypatch.setattr(Registry, "_begin", slowly)
    with pytest.raises(UserError, match="somebody else has moved an alias of overtaken meanwhile"):
        shelf.tracker.promote(name, "2", by="ada")
    assert shelf.aliases(name) == {"champion": "3"}
    assert kinds(shelf, name) == [("promote", "failed")]


def test_of_those_at_once_one_moves_at_most(shelf: Shelf) -> None:
    """Each with a connection of its own: whoever says it is done is alone, and its aliases are whole."""
    name = shelf.register("crowded", 4)
    movers = [Tracker(shelf.tracker.uri, shelf.home) for _ in range(3)]
    together = threading.Barrier(len(movers))

    def move(number: int) -> Event | None:
        together.wait()
        try:
            return movers[number].promote(name, str(number + 2), by="somebody", expected={"champion": "1"})
        except UserError:
            return None

    with ThreadPoolExecutor(len(movers)) as pool:
        for _ in range(5):
            done = [event for event in pool.map(move, range(len(movers))) if event is not None]
            assert len(done) <= 1
            after = done[0].after if done else Aliases(champion="1", previous=None)
            assert shelf.tracker.aliases(name) == after
            shelf.client.set_registered_model_alias(name, "champion", "1")
            shelf.client.delete_registered_model_alias(name, "previous")


# ── bundles from a server ────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def remote(mlflow_server: MlflowServer, tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    return Tracker(mlflow_server.url, tmp_path_factory.mktemp("unused"))


@pytest.fixture(scope="module")
def stocked(shelf: Shelf, mlflow_server: MlflowServer) -> str:
    """A model whose five versions the server keeps."""
    for bundle in shelf.bundles:
        shelf.upload(mlflow_server.url, "stocked", bundle)
    return "stocked"


def fetch(remote: Tracker, name: str, version: str, root: Path) -> Path:
    return remote.fetch(remote.version(name, version), root)


def cached(root: Path) -> list[str]:
    """Which versions are there, and nothing else is."""
    folders = sorted(path.name for path in root.iterdir() if path.is_dir())
    assert not [name for name in folders if name.startswith(".")]
    return [name.split("-")[1] for name in folders]


def test_what_a_study_registers_on_a_server_can_be_fetched(
    shelf: Shelf, remote: Tracker, tiny_glm: Path, tmp_path: Path
) -> None:
    """And the study is in the log, as the one who moved the alias."""
    study = openable_study(tiny_glm)
    study = study.model_copy(update={"spec": study.spec.model_copy(update={"register_as": "studied"})})
    bundle = shelf.bundles[0]
    for _ in range(2):  # a retried task
        remote.register_champion(study, bundle, remote.start_study(study.spec, study.id, "studied"))
    (event,) = remote.events("studied")
    assert (event.kind, event.by, event.after) == ("register", f"study {study.id}", Aliases(champion="1"))
    found = remote.champion("studied", tmp_path)
    assert found is not None
    assert (found.version, found.digest) == ("1", bundle.digest)
    assert found.bundle.is_relative_to(tmp_path)
    assert open_bundle(found.bundle)[1].digest == bundle.digest


def test_a_bundle_is_fetched_once(
    shelf: Shelf, remote: Tracker, stocked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is what was uploaded; a second time only the registry is asked, and a damaged copy is replaced."""
    bundle = fetch(remote, stocked, "1", tmp_path)
    assert open_bundle(bundle)[1].digest == shelf.bundles[0].digest
    with monkeypatch.context() as patch:
        patch.delattr(Bundles, "_download")
        assert fetch(remote, stocked, "1", tmp_path) == bundle
    weights = bundle / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert fetch(remote, stocked, "1", tmp_path) == bundle
    open_bundle(bundle)


def test_what_was_damaged_on_the_way_is_named_and_not_kept(
    shelf: Shelf, remote: Tracker, mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    """A flipped bit in the server's store."""
    version = shelf.upload(mlflow_server.url, "flipped", shelf.bundles[0])
    place = shelf.client.get_model_version("flipped", version).source.removeprefix("mlflow-artifacts:/")
    kept = shelf.home / "server-artifacts" / place / "artifacts/bundle/model/model.safetensors"
    content = bytearray(kept.read_bytes())
    content[-1] ^= 1
    kept.write_bytes(content)
    said = f"version {version} of flipped did not come whole from MLflow: model/model.safetensors is damaged"
    with pytest.raises(UserError, match=said):
        fetch(remote, "flipped", version, tmp_path)
    assert cached(tmp_path) == []


def test_what_the_server_lost_is_said(
    shelf: Shelf, remote: Tracker, mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    """The server answers, so it is not called unreachable, and another time the file may be there."""
    version = shelf.upload(mlflow_server.url, "lost", shelf.bundles[0])
    place = shelf.client.get_model_version("lost", version).source.removeprefix("mlflow-artifacts:/")
    (shelf.home / "server-artifacts" / place / "artifacts/bundle/manifest.json").unlink()
    with pytest.raises(NotFetched, match=r"MLflow does not hand out .*manifest.json: \S+"):
        fetch(remote, "lost", version, tmp_path)
    assert cached(tmp_path) == []


def test_another_bundle_under_the_same_version_is_refused(
    shelf: Shelf, remote: Tracker, mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    """Whole, but not the one whose digest was registered."""
    version = shelf.upload(mlflow_server.url, "exchanged", shelf.bundles[0])
    shelf.client.set_model_version_tag("exchanged", version, "autoglm.bundle_digest", "0" * 64)
    with pytest.raises(UserError, match="is not what was registered"):
        fetch(remote, "exchanged", version, tmp_path)
    assert cached(tmp_path) == []


def test_old_versions_go_and_those_in_use_stay(remote: Tracker, stocked: str, tmp_path: Path) -> None:
    """And what a fetch that was killed had left."""
    first = fetch(remote, stocked, "1", tmp_path)
    left = first.parent.with_name(f".{first.parent.name}.killed")
    left.mkdir()
    with in_use(first):
        for version in "2345":
            fetch(remote, stocked, version, tmp_path)
        assert left.exists()
        assert [name for name in cached_or_left(tmp_path) if not name.startswith(".")] == list("1345")
    fetch(remote, stocked, "5", tmp_path)
    assert cached(tmp_path) == list("345")


def cached_or_left(root: Path) -> list[str]:
    folders = sorted(path.name for path in root.iterdir() if path.is_dir())
    return [name if name.startswith(".") else name.split("-")[1] for name in folders]


FULL = """
import errno, os, shutil, sys
from collections import namedtuple
from pathlib import Path
from open_autoglm.tracking import NoRoom, Tracker

url, version, root, promised = sys.argv[1:]
if promised:  # somebody else fills the disk after it was looked at
    usage = shutil.disk_usage(root)
    shutil.disk_usage = lambda _: usage._replace(free=1 << 40)
tracker = Tracker(url, Path(root))
try:
    tracker.fetch(tracker.version("stocked", version), Path(root))
except NoRoom as error:
    print(error)
print([path.name for path in Path(root).iterdir() if path.is_dir()])
"""


@pytest.mark.usefixtures("stocked")
@pytest.mark.parametrize(("promised", "said"), [("", "left: make room there"), ("more", "became full while")])
def test_a_full_disk_is_said_and_nothing_is_left(
    mlflow_server: MlflowServer, tmp_path: Path, promised: str, said: str
) -> None:
    """Known before the files are fetched, or found out by the kernel in the middle of one."""
    command = (sys.executable, "-c", FULL, mlflow_server.url, "1", str(tmp_path), promised)
    found = on_a_small_disk("100k", tmp_path, *command)
    assert found.returncode == 0, found.stderr
    told, left = found.stdout.splitlines()
    assert "version 1 of stocked" in told
    assert said in told
    assert left == "[]"


# ── what an endpoint serves ──────────────────────────────────────────────────────────────────────


def test_without_a_registry_the_last_good_version_is_served(
    shelf: Shelf, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the reason; unless it is no longer as it was, or another was asked for."""
    name = shelf.register("lasting", 1)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    there = settings.model_copy(update={"tracking_uri": shelf.tracker.uri})
    nowhere = settings.model_copy(update={"tracking_uri": "http://127.0.0.1:9"})
    found = find_source(f"models:/{name}@champion", there)
    with pytest.raises(UserError, match="cannot be used"):
        find_source(f"models:/{name}@champion", nowhere)
    remember(there.home, name, "champion", found.version, found.bundle)
    again = find_source(f"models:/{name}@champion", nowhere)
    assert again._replace(warning="") == found
    assert "version 1 of lasting is served because it was the last that was good: MLflow at" in again.warning
    with pytest.raises(UserError, match="cannot be used"):
        find_source(f"models:/{name}@challenger", nowhere)
    config = found.bundle / "tokenizer" / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(UserError, match="cannot be used"):
        find_source(f"models:/{name}@champion", nowhere)


@pytest.mark.parametrize("hangs", [False, True])
def test_an_endpoint_starts_without_a_registry_and_says_so(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hangs: bool
) -> None:
    """It is ready, with a warning, and what answers now is noted again; the registry is down, or hangs."""
    name = shelf.register(f"lonely-{hangs}", 1)
    bundle = shelf.home / "models" / f"{name}-{shelf.bundles[0].digest[:8]}" / "artifacts" / "bundle"
    remember(tmp_path, name, "champion", "1", bundle)
    noted = tmp_path / "endpoints" / "last-good" / f"{name}@champion.json"
    before = noted.stat().st_mtime_ns
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        port = silent.getsockname()[1] if hangs else 9
        monkeypatch.setenv("AUTOGLM_TRACKING_URI", f"http://127.0.0.1:{port}")
        with endpoint(Path(f"models:/{name}@champion"), tmp_path) as server:
            with urllib.request.urlopen(f"{server.url}/readyz") as answer:
                told = json.load(answer)
            assert any(f"warning: version 1 of {name} is served" in line for line in server.said)
    assert told["status"] == "ready"
    assert re.match(f"version 1 of {name} (is served because|goes on).*MLflow at", told["warning"])
    assert noted.stat().st_mtime_ns > before
