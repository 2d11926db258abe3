"""The follower: a fleet that is only a list of what it was told, and a real registry that comes and goes."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from registries import MlflowServer, Shelf

from open_autoglm.bundle import open_bundle
from open_autoglm.errors import UserError
from open_autoglm.schemas import Canary, Model
from open_autoglm.serving.errors import Rejected
from open_autoglm.serving.follow import Follower
from open_autoglm.serving.last_good import recall
from open_autoglm.serving.source import Source
from open_autoglm.tracking import Tracker

TENTH = Canary(weight_percent=10)


class Check(Model):
    """What an exam asks."""

    name: str
    ok: bool


class ToyFleet:
    """Does as it is told, and remembers it; opens the bundles that it is given, but starts no engines."""

    def __init__(self) -> None:
        self.champion, self.challenger = "1", ""
        self.told: list[str] = []
        self.refuses: set[str] = set()

    @property
    def versions(self) -> tuple[str, str | None]:
        return self.champion, self.challenger or None

    def _admit(self, source: Source) -> None:
        open_bundle(source.bundle)
        if source.version in self.refuses:
            raise Rejected("it stammers", [Check(name="golden_prompts", ok=False)])

    async def swap(self, source: Source) -> None:
        self.told.append(f"swap {source.version}")
        self._admit(source)
        self.champion, self.challenger = source.version, ""

    async def try_challenger(self, source: Source, canary: Canary) -> None:
        self.told.append(f"try {source.version} at {canary.weight_percent:g}")
        self._admit(source)
        self.challenger = source.version

    async def promote(self) -> None:
        self.told.append("promote")
        if not self.challenger:
            raise UserError("there is no challenger to promote")
        self.champion, self.challenger = self.challenger, ""

    async def drop_challenger(self, reason: str) -> None:
        self.told.append(f"drop: {reason}")
        self.challenger = ""

    def set_canary(self, canary: Canary) -> None:
        self.told.append(f"share {canary.weight_percent:g}")

    def since(self) -> list[str]:
        """What it was told since it was asked last."""
        told, self.told = self.told, []
        return told


Follow = Callable[..., Follower]


@pytest.fixture
def fleet() -> ToyFleet:
    return ToyFleet()


@pytest.fixture
def follow(shelf: Shelf, fleet: ToyFleet, tmp_path: Path) -> Follow:
    """A follower of a model in the shelf's registry, or in the server before it."""

    def make(name: str, uri: str = "", **options: Any) -> Follower:
        def connect() -> Tracker:
            return Tracker(uri, shelf.home) if uri else shelf.tracker

        return Follower(fleet, name, connect, home=tmp_path, cache=tmp_path / "cache", by="host-1", **options)

    return make


def look(follower: Follower) -> None:
    asyncio.run(follower.look())


def test_a_follower_that_ended_is_told(
    shelf: Shelf, fleet: ToyFleet, follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a bug: what is served goes on, and `/readyz` says that nobody looks at the registry."""

    async def bug(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(fleet, "swap", bug)
    follower = follow(shelf.register("bug", 2, champion="2"))
    with pytest.raises(ZeroDivisionError):
        asyncio.run(follower.run())
    assert "the registry is not followed any more" in follower.warning


# ── aliases ──────────────────────────────────────────────────────────────────────────────────────


def test_what_was_swapped_in_by_hand_stays_until_the_alias_moves(
    shelf: Shelf, fleet: ToyFleet, follow: Follow
) -> None:
    """Somebody who administers the server knows what he does; it is told all the while."""
    name = shelf.register("by-hand", 2)
    follower = follow(name)
    look(follower)
    fleet.champion = ""
    look(follower)
    assert fleet.since() == []
    assert "a bundle that was swapped in by hand answers" in follower.warning
    shelf.tracker.promote(name, "2", by="ada")
    look(follower)
    assert (fleet.since(), follower.warning) == (["swap 2"], "")


def test_the_champion_is_swapped_when_its_alias_moves(
    shelf: Shelf, fleet: ToyFleet, follow: Follow, tmp_path: Path
) -> None:
    """Once, and it is noted as the last that was good."""
    name = shelf.register("swapped", 2)
    follower = follow(name)
    look(follower)
    assert fleet.since() == []
    shelf.tracker.promote(name, "2", by="ada")
    look(follower)
    look(follower)
    assert fleet.since() == ["swap 2"]
    good = recall(tmp_path, name, "champion")
    assert good is not None
    assert (good.version, good.digest) == ("2", shelf.bundles[1].digest)
    assert follower.warning == ""


def test_a_challenger_comes_changes_its_share_and_goes(shelf: Shelf, fleet: ToyFleet, follow: Follow) -> None:
    """One without a share waits."""
    name = shelf.register("tried", 3)
    follower = follow(name)
    shelf.client.set_registered_model_alias(name, "challenger", "2")
    look(follower)
    assert fleet.since() == []
    shelf.tracker.canary(name, "2", TENTH, by="ada")
    look(follower)
    assert fleet.since() == ["try 2 at 10"]
    shelf.tracker.canary(name, "2", Canary(weight_percent=50), by="ada")
    look(follower)
    assert fleet.since() == ["share 50"]
    shelf.tracker.canary(name, "3", TENTH, by="ada")
    look(follower)
    assert fleet.since() == ["try 3 at 10"]
    shelf.tracker.rollback(name, by="ada")
    look(follower)
    assert fleet.since() == ["drop: the registry names no challenger any more"]


def test_a_challenger_is_promoted_as_it_runs(
    shelf: Shelf, fleet: ToyFleet, follow: Follow, tmp_path: Path
) -> None:
    """It is not loaded again; and going back is a swap."""
    name = shelf.register("promoted", 2)
    follower = follow(name)
    shelf.tracker.canary(name, "2", TENTH, by="ada")
    look(follower)
    shelf.tracker.promote(name, by="ada")
    look(follower)
    assert fleet.since() == ["try 2 at 10", "promote"]
    good = recall(tmp_path, name, "champion")
    assert good is not None
    assert good.version == "2"
    shelf.tracker.rollback(name, by="ada")
    look(follower)
    assert fleet.since() == ["swap 1"]


def test_a_challenger_that_outlives_a_swap_is_tried_again(
    shelf: Shelf, fleet: ToyFleet, follow: Follow
) -> None:
    """The fleet lets it go with the champion it was compared with."""
    name = shelf.register("outlives", 3)
    follower = follow(name)
    shelf.tracker.canary(name, "2", TENTH, by="ada")
    look(follower)
    shelf.tracker.promote(name, "3", by="ada")
    look(follower)
    assert fleet.since() == ["try 2 at 10", "swap 3"]  # and the registry is asked again before more is done
    look(follower)
    assert fleet.since() == ["try 2 at 10"]


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("role", ["champion", "challenger"])
def test_a_version_that_is_refused_is_tried_again_only_after_its_alias_moved(
    shelf: Shelf, fleet: ToyFleet, follow: Follow, role: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What answered goes on, and the registry is told why, with the checks."""
    name = shelf.register(f"refused-{role}", 2)
    follower = follow(name)
    fleet.refuses = {"2"}

    def ask() -> None:
        if role == "champion":
            shelf.tracker.promote(name, "2", by="ada")
        else:
            shelf.tracker.canary(name, "2", TENTH, by="ada")

    ask()
    for _ in range(3):
        look(follower)
    asked = "swap 2" if role == "champion" else "try 2 at 10"
    assert fleet.since() == [asked]
    assert fleet.versions == ("1", None)
    said = f"version 1 of {name} goes on: version 2 may not answer as {role}: it stammers"
    assert follower.warning == said
    assert [record.getMessage() for record in caplog.records].count(said) == 1
    event = shelf.tracker.events(name)[0]
    assert (event.kind, event.by) == ("rejected", "host-1")
    assert event.before == event.after
    evidence = json.loads(Path(shelf.client.download_artifacts(event.id, "evidence.json")).read_text())
    assert evidence == {"checks": [{"name": "golden_prompts", "ok": False}]}
    shelf.tracker.rollback(name, by="ada")
    look(follower)
    assert (fleet.since(), follower.warning) == ([], "")
    ask()
    look(follower)
    assert fleet.since() == [asked]


def test_a_version_whose_files_are_gone_is_refused(shelf: Shelf, fleet: ToyFleet, follow: Follow) -> None:
    """Before the fleet is troubled."""
    name = shelf.register("gone", 2)
    shutil.rmtree(shelf.home / "models" / f"{name}-{shelf.bundles[1].digest[:8]}" / "artifacts")
    shelf.client.set_model_version_tag(name, "2", "autoglm.bundle_digest", "")
    shelf.client.set_registered_model_alias(name, "champion", "2")
    follower = follow(name)
    look(follower)
    assert fleet.since() == []
    assert "version 2 of gone holds no bundle" in follower.warning
    assert [event.kind for event in shelf.tracker.events(name)] == ["rejected"]


def test_a_model_without_a_champion_changes_nothing(shelf: Shelf, fleet: ToyFleet, follow: Follow) -> None:
    name = shelf.register("headless", 1)
    shelf.client.delete_registered_model_alias(name, "champion")
    follower = follow(name)
    look(follower)
    assert fleet.since() == []
    assert follower.warning == "headless has no champion in the registry: version 1 of headless goes on"


# ── verdicts ─────────────────────────────────────────────────────────────────────────────────────


def test_the_judge_promotes_through_the_registry(shelf: Shelf, fleet: ToyFleet, follow: Follow) -> None:
    """So that every endpoint that follows it does the same, and the evidence is kept."""
    name = shelf.register("judged", 2)
    shelf.tracker.canary(name, "2", TENTH, by="ada")

    async def scene() -> None:
        follower = follow(name, every_s=1000)
        running = asyncio.create_task(follower.run())
        while fleet.versions != ("1", "2"):
            await asyncio.sleep(0.01)
        await follower.verdict("promote", "faster by 12 %", {"change": -0.12})
        while fleet.versions != ("2", None):  # it does not wait for its next turn
            await asyncio.sleep(0.01)
        running.cancel()

    asyncio.run(asyncio.wait_for(scene(), 30))
    assert fleet.since() == ["try 2 at 10", "promote"]
    event = shelf.tracker.events(name)[0]
    assert (event.kind, event.by, event.reason) == ("promote", "judge", "faster by 12 %")
    assert shelf.aliases(name) == {"champion": "2", "previous": "1"}


def test_a_verdict_that_was_overtaken_moves_nothing(
    shelf: Shelf, follow: Follow, caplog: pytest.LogCaptureFixture
) -> None:
    """It rests on a champion that somebody has replaced meanwhile."""
    name = shelf.register("late", 3)
    follower = follow(name)
    shelf.tracker.canary(name, "2", TENTH, by="ada")
    look(follower)
    shelf.tracker.promote(name, "3", by="ada")
    asyncio.run(follower.verdict("promote", "faster", {}))
    assert shelf.aliases(name) == {"champion": "3", "challenger": "2", "previous": "1"}
    assert "the champion of late is version 3 by now, not version 1" in caplog.text


# ── the registry is away ─────────────────────────────────────────────────────────────────────────


@pytest.fixture
def no_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.mark.usefixtures("no_retries")
def test_the_endpoint_goes_on_while_the_registry_is_away(
    shelf: Shelf,
    mlflow_server: MlflowServer,
    fleet: ToyFleet,
    follow: Follow,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One warning; a challenger that is to go is gone at once; the registry is told when it is back."""
    caplog.set_level(logging.INFO, logger="open_autoglm.serving.follow")
    name = "away"
    for bundle in shelf.bundles[:2]:
        shelf.upload(mlflow_server.url, name, bundle)
    shelf.client.set_registered_model_alias(name, "champion", "1")
    shelf.tracker.canary(name, "2", TENTH, by="ada")
    follower = follow(name, mlflow_server.url)
    look(follower)
    mlflow_server.kill()
    try:
        caplog.clear()
        for _ in range(3):
            look(follower)
        (warned,) = caplog.records
        said = f"version 1 of away goes on: MLflow at {mlflow_server.url} cannot be used"
        assert warned.getMessage().startswith(said)
        assert follower.warning.startswith(said)
        asyncio.run(follower.verdict("rollback", "twice as slow", {"change": 1.0}))
        assert fleet.since() == ["try 2 at 10", "drop: twice as slow"]
        look(follower)
        assert shelf.aliases(name) == {"champion": "1", "challenger": "2"}
    finally:
        mlflow_server.start()
    caplog.clear()
    look(follower)
    assert (fleet.since(), follower.warning) == ([], "")
    assert [record.getMessage() for record in caplog.records] == ["away: all is well again with the registry"]
    assert shelf.aliases(name) == {"champion": "1"}
    assert [(event.kind, event.by) for event in shelf.tracker.events(name)][:1] == [("rollback", "judge")]


@pytest.mark.usefixtures("no_retries")
def test_a_full_disk_is_tried_again(
    shelf: Shelf,
    mlflow_server: MlflowServer,
    fleet: ToyFleet,
    follow: Follow,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is nothing against the version: no event, and with more room it is fetched."""
    name = "crammed"
    for bundle in shelf.bundles[:2]:
        shelf.upload(mlflow_server.url, name, bundle)
    shelf.client.set_registered_model_alias(name, "champion", "2")
    follower = follow(name, mlflow_server.url)
    usage = shutil.disk_usage("/")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        look(follower)
    assert fleet.since() == []
    assert "version 1 of crammed goes on: version 2 of crammed takes" in follower.warning
    look(follower)
    assert fleet.since() == ["swap 2"]
    assert follower.warning == ""
    assert shelf.tracker.events(name) == []


HANGING = """
import asyncio, sys
from pathlib import Path
from test_follow import ToyFleet
from open_autoglm.serving.follow import Follower
from open_autoglm.tracking import Tracker

async def main():
    connect = lambda: Tracker(sys.argv[1], Path(sys.argv[2]))
    follower = Follower(ToyFleet(), "any", connect, home=Path(sys.argv[2]), cache=Path(sys.argv[2]))
    running = asyncio.create_task(follower.run())
    await asyncio.sleep(0.1)
    print("asked", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    running.cancel()

asyncio.run(main())
"""


def test_a_registry_that_hangs_does_not_keep_the_endpoint_from_ending(tmp_path: Path) -> None:
    """It has taken the connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        process = subprocess.Popen(
            [sys.executable, "-c", HANGING, uri, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parent,
        )
        connection, _ = silent.accept()
        begin = time.monotonic()
        process.communicate(timeout=60)
        assert process.returncode == 0
        assert time.monotonic() - begin < 10
        connection.close()
