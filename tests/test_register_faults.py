"""A study's winner is registered by a process that is killed, or on a disk that becomes full: wherever that
is, the champion's alias names a version that is whole, and the same again ends as if nothing had been."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from bundles import openable_study
from registries import build_variants
from small_disk import on_a_small_disk

from open_autoglm.bundle import open_bundle
from open_autoglm.schemas import Bundle, Registration, Study
from open_autoglm.tracking import Tracker, UnderWay
from open_autoglm.tracking.events import sentence

HERE = Path(__file__).parent

KILLED = """
import os, signal, sys
from pathlib import Path
from open_autoglm.schemas import Bundle, Study
from open_autoglm.tracking import Tracker

home, call, when, run = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
study = Study.model_validate_json(Path(sys.argv[5]).read_text())
tracker = Tracker(f"sqlite:///{home}/mlflow.db", home / "artifacts")
real, count = getattr(tracker._client, call), iter(range(when + 1))

def until(*arguments, **named):
    if next(count) == when:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **named)

setattr(tracker._client, call, until)
tracker.register_champion(study, study.bundle, run)
"""


class Moment(NamedTuple):
    """Before which call to the registry, of so many, the process is killed."""

    call: str
    when: int = 0
    champion: str = "1"
    """After it."""
    move: str | None = None
    """How the next move ends the one that was under way, if one was."""


MOMENTS = {
    "before the files are there": Moment("log_model_artifacts"),
    "before there is a version": Moment("create_model_version"),
    "between version and move": Moment("create_run"),
    "between move and previous": Moment("set_registered_model_alias", 0, "1", "failed"),
    "between previous and champion": Moment("set_registered_model_alias", 1, "1", "failed"),
    "between champion and event": Moment("set_terminated", 0, "2", "done"),
}


class Home(NamedTuple):
    """A registry, and two winners for each model in it."""

    path: Path
    study: Study
    bundles: list[Bundle]

    @property
    def tracker(self) -> Tracker:
        return Tracker(f"sqlite:///{self.path}/mlflow.db", self.path / "artifacts")

    def winner(self, name: str, number: int) -> Study:
        """With its bundle where no other study has one."""
        place = self.path / name / str(number) / "bundle"
        if not place.exists():
            shutil.copytree(self.bundles[number].path, place)
        spec = self.study.spec.model_copy(update={"register_as": name})
        bundle = self.bundles[number].model_copy(update={"path": place})
        return self.study.model_copy(update={"id": f"study-{name}-{number}", "spec": spec, "bundle": bundle})

    def run(self, name: str, number: int) -> str:
        study = self.winner(name, number)
        return self.tracker.start_study(study.spec, study.id, name)

    def register(self, name: str, number: int) -> Registration:
        study = self.winner(name, number)
        assert study.bundle is not None
        return self.tracker.register_champion(study, study.bundle, self.run(name, number))


def name_of(moment: str) -> str:
    return moment.replace(" ", "-")


@pytest.fixture(scope="module")
def home(tiny_glm: Path, tmp_path_factory: pytest.TempPathFactory) -> Home:
    path = tmp_path_factory.mktemp("home")
    return Home(path, openable_study(tiny_glm), build_variants(tiny_glm, path / "bundles", 2))


@pytest.fixture(scope="module")
def killed(home: Home) -> dict[str, int]:
    """How each process ended, by its moment; they take seconds to start, so they run side by side."""
    processes = {}
    for moment, (call, when, *_) in MOMENTS.items():
        name = name_of(moment)
        home.register(name, 0)
        asked = home.path / f"{name}.json"
        asked.write_text(home.winner(name, 1).model_dump_json())
        command = [sys.executable, "-c", KILLED, str(home.path), call, str(when), home.run(name, 1), asked]
        processes[moment] = subprocess.Popen(command)
    return {moment: process.wait(300) for moment, process in processes.items()}


@pytest.mark.parametrize("moment", MOMENTS)
def test_who_is_killed_while_it_registers_leaves_a_champion(
    home: Home, killed: dict[str, int], moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can be served at once; the same again makes the winner champion, whose files are there once."""
    _, _, champion, ended = MOMENTS[moment]
    name, tracker = name_of(moment), home.tracker
    assert killed[moment] == -signal.SIGKILL
    assert tracker.aliases(name).champion == champion
    check_champion(home, name, int(champion) - 1)
    if ended is not None:
        (begun,) = [event for event in tracker.events(name) if event.state == "begun"]
        assert "(not finished)" in sentence(begun)
        if champion == "1":
            with pytest.raises(UnderWay, match=r"is moving aliases of .* just now \(register\)"):
                home.register(name, 1)
        now = time.time
        monkeypatch.setattr(time, "time", lambda: now() + 120)  # nobody who is alive takes so long
    again = home.register(name, 1)
    assert (again.model_version, again.model_uri) == ("2", f"models:/{name}@champion")
    assert tracker.aliases(name).champion == "2"
    assert tracker.aliases(name).previous == "1"
    check_champion(home, name, 1)
    assert len(tracker._client.search_model_versions(f"name = '{name}'")) == 2
    assert [path.name for path in (home.path / name / "1").iterdir()] == ["bundle"]
    if ended is not None:
        tracker.promote(name, "1", by="ada")
        (found,) = [event for event in tracker.events(name) if "its writer did not end it" in event.note]
        assert (found.kind, found.state) == ("register", ended)


def check_champion(home: Home, name: str, number: int) -> None:
    """Every file of it is there, and as it was."""
    found = home.tracker.champion(name, home.path / "cache")
    assert found is not None
    assert open_bundle(found.bundle)[1].digest == found.digest == home.bundles[number].digest


# ── a full disk ──────────────────────────────────────────────────────────────────────────────────

FULL = """
import json, os, shutil, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from bundles import openable_study
from breaches import breached
from open_autoglm.bundle import open_bundle
from open_autoglm.conclusion import deliver
from open_autoglm.errors import UserError
from open_autoglm.tracking import Tracker

home, ballast = Path(sys.argv[3]), Path(sys.argv[3]) / "ballast"
tracker = Tracker(f"sqlite:///{home}/mlflow.db", home / "artifacts")
found = openable_study(Path(sys.argv[2]))
found = found.model_copy(update={"spec": found.spec.model_copy(update={"register_as": "full"})})

def winner(number):
    (trial,) = found.trials
    candidate = trial.candidate.model_copy(update={"knobs": {**trial.candidate.knobs, "variant": number}})
    trials = (trial.model_copy(update={"candidate": candidate}),)
    root = home / str(number)
    return found.model_copy(update={"id": f"study-{number}", "trials": trials, "output_dir": root})

def delivered(study, run):
    try:
        deliver(study, (), tracker, run)
        return ""
    except UserError as error:
        return str(error)

def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

runs = [tracker.start_study(found.spec, f"study-{number}", "full") for number in (1, 2)]
assert delivered(winner(1), runs[0]) == ""
bundle = size(home / "1" / "bundle")
for share in (0, 0.5, 1.5, 2.5, None):
    if share is not None:
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(home).free - round(share * bundle))
    said = delivered(winner(2), runs[1])
    unseen = ""
    if share == 0:
        try:
            tracker.log_judgement(breached("full"))
        except UserError as error:
            unseen = str(error)
    champion = tracker.champion("full", home / "cache")
    whole = open_bundle(champion.bundle)[1].digest == champion.digest
    left = [path.name for path in home.glob("[12]/.*")]
    told = {"said": said, "unseen": unseen, "champion": champion.version, "whole": whole, "left": left}
    print(json.dumps(told))
    ballast.unlink(missing_ok=True)
"""


def test_a_disk_that_becomes_full_leaves_the_champion(tiny_glm: Path, tmp_path: Path) -> None:
    """However much of the bundle finds room; with enough, the same again makes the winner champion."""
    command = (sys.executable, "-c", FULL, str(HERE), str(tiny_glm), str(tmp_path))
    found = on_a_small_disk("256m", tmp_path, *command)
    assert found.returncode == 0, found.stderr
    looks = [json.loads(line) for line in found.stdout.splitlines() if line.startswith("{")]
    assert len(looks) == 5
    for one in looks:
        assert (one["whole"], one["left"]) == (True, [])
        assert "\n" not in one["said"]
    assert [one["champion"] for one in looks[:2]] == ["1", "1"]
    for one in looks[:2]:
        assert "the disk became full while the study in" in one["said"]
    assert "disk is full" in looks[0]["unseen"]
    assert (looks[-1]["said"], looks[-1]["champion"]) == ("", "2")
