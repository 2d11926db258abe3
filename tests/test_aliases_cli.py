"""``open-autoglm promote``, ``rollback``, ``canary`` and ``events``, on a real registry."""

from __future__ import annotations

import getpass
import json
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
from registries import Shelf

from open_autoglm.cli import main
from open_autoglm.settings import Settings


class Outcome(NamedTuple):
    code: int
    stdout: str
    stderr: str


Cli = Callable[..., Outcome]


@pytest.fixture
def cli(
    shelf: Shelf, settings: Settings, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Cli:
    """Run a command against the shelf's registry, in this process."""
    monkeypatch.setenv("AUTOGLM_HOME", str(settings.home))
    monkeypatch.setenv("AUTOGLM_TRACKING_URI", shelf.tracker.uri)

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["open-autoglm", *arguments])
        capfd.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return Outcome(code, *capfd.readouterr())

    return run


def test_a_version_is_tried_promoted_and_rolled_back(cli: Cli, shelf: Shelf) -> None:
    """Each command says what it moved, in one sentence."""
    name = shelf.register("told", 3)
    said = [
        cli("canary", name, "--version", "2", "--weight", "10", "--shadow", "20", "--reason", "faster"),
        cli("canary", name, "--weight", "50"),
        cli("promote", name, "--by", "release pipeline"),
        cli("rollback", name, "--expected", "2"),
    ]
    assert [(outcome.code, outcome.stdout) for outcome in said] == [
        (0, "told: challenger none → version 2, 10 % of the requests, 20 % shadowed\n"),
        (0, "told: 50 % of the requests, 0 % shadowed\n"),
        (0, "told: champion version 1 → version 2, challenger version 2 → none, previous none → version 1\n"),
        (0, "told: champion version 2 → version 1, previous version 1 → version 2\n"),
    ]
    lines = cli("events", name).stdout.splitlines()
    assert lines[:3] == ["champion   1", "challenger –", "previous   2"]
    assert "rollback" in lines[3]
    assert f"{getpass.getuser()}: told: champion version 2 → version 1" in lines[3]
    assert "release pipeline: told: champion version 1 → version 2" in lines[4]
    assert lines[-1].strip() == "faster"


def test_rollback_says_that_it_took_the_challenger_only(cli: Cli, shelf: Shelf) -> None:
    """And how to go further back."""
    name = shelf.register("only", 3)
    cli("promote", name, "--version", "2")
    cli("canary", name, "--version", "3", "--weight", "10")
    lines = cli("rollback", name).stdout.splitlines()
    assert lines == [
        "the challenger was taken away, and version 2 stays champion:",
        "--champion goes back to the champion before",
        "only: challenger version 3 → none",
    ]
    cli("canary", name, "--version", "3", "--weight", "10")
    assert cli("rollback", name, "--champion").code == 0
    assert shelf.aliases(name) == {"champion": "1", "challenger": "3", "previous": "2"}
    assert cli("canary", name, "--stop").stdout == "only: challenger version 3 → none\n"


def test_json_is_the_event(cli: Cli, shelf: Shelf) -> None:
    """One object on stdout, for each command."""
    name = shelf.register("typed", 2)
    event = json.loads(cli("promote", name, "--version", "2", "--reason", "tested", "--json").stdout)
    assert (event["kind"], event["state"], event["reason"]) == ("promote", "done", "tested")
    assert (event["before"]["champion"], event["after"]["champion"]) == ("1", "2")
    back = json.loads(cli("rollback", name, "--json").stdout)
    told = json.loads(cli("events", name, "--limit", "1", "--json").stdout)
    assert told["aliases"]["champion"] == "1"
    assert told["events"] == [back]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["promote", "nobody"], "there is no registered model 'nobody'"),
        (["promote", "wrong"], "wrong has no challenger to promote: say which --version"),
        (["promote", "wrong", "--version", "2", "--expected", "7"], "is version 1 by now, not version 7"),
        (["canary", "wrong", "--version", "2"], "weight or shadow, above 0 %"),
        (["canary", "wrong", "--stop", "--weight", "1"], "--stop takes the challenger away: it needs no"),
        (["events", "nobody"], "there is no registered model 'nobody'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_request_is_one_sentence(cli: Cli, shelf: Shelf, arguments: list[str], said: str) -> None:
    """Exit code 2, and nothing has moved."""
    if not shelf.client.search_registered_models("name = 'wrong'"):
        shelf.register("wrong", 2)
    outcome = cli(*arguments)
    assert outcome.code == 2
    assert outcome.stdout == ""
    (line,) = outcome.stderr.splitlines()
    assert said in line
    assert shelf.aliases("wrong") == {"champion": "1"}


def test_a_share_is_at_most_everything(cli: Cli) -> None:
    assert cli("canary", "any", "--version", "2", "--weight", "101").code == 2
