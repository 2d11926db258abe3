"""Optimising again what is served: the ladder, a person's word, and who is tried in the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
from endpoints import endpoint
from registries import Shelf, make_shelf
from studies import demo_registration, demo_study, infeasible_study, tied_study

from open_autoglm.ladder import goes_on, outcome_of, rungs
from open_autoglm.schemas import Canary, OptimizeSpec, Outcome, Reoptimization, Study
from open_autoglm.serving.local import local_endpoints
from open_autoglm.settings import Settings

SPEC = OptimizeSpec(model_path="demo-glm")
SHARE = Canary(weight_percent=10, shadow_percent=20)


def request(**changes: Any) -> Reoptimization:
    return Reoptimization(**{"spec": SPEC, "canary": SHARE, "reason": "TTFT is 30 % up", **changes})


def winner(name: str, version: str, **changes: Any) -> Study:
    """A study whose champion became that version of a registered model."""
    registration = demo_registration().model_copy(update={"model_name": name, "model_version": version})
    spec = SPEC.model_copy(update={"register_as": name})
    return demo_study(spec, registration=registration, **changes)


# ── the ladder ───────────────────────────────────────────────────────────────────────────────────


def test_a_rung_includes_those_before() -> None:
    """Under the same limits; none promotes by itself."""
    (low,) = rungs(request())
    climb = rungs(request(highest_rung="recover"))
    assert low == climb[0]
    assert [(rung, spec.prune, spec.recover, spec.promote) for rung, spec in climb] == [
        ("quantise", False, False, False),
        ("prune", True, False, False),
        ("recover", True, True, False),
    ]
    assert {spec.min_quality for _, spec in climb} == {SPEC.min_quality}


def test_the_same_study_is_not_made_twice() -> None:
    """A request that prunes anyway has nothing left to try."""
    pruning = SPEC.model_copy(update={"prune": True})
    assert len(rungs(request(spec=pruning, highest_rung="prune"))) == 1


@pytest.mark.parametrize(
    ("study", "kind", "further"),
    [
        (winner("demo-glm", "3"), "challenger", False),
        (winner("demo-glm", "1"), "kept", False),
        (tied_study(), "kept", False),
        (infeasible_study(), "nothing_feasible", True),
    ],
)
def test_what_a_study_comes_to(study: Study, kind: str, further: bool) -> None:
    """Only where nothing meets the limits is there a reason to give up more."""
    outcome = outcome_of([study], "1")
    assert (outcome.kind, goes_on(study)) == (kind, further)
    assert outcome.challenger == ("3" if kind == "challenger" else None)
    assert study.verdict.reasons[0] in outcome.told


# ── the flow ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("path", "registered", "called"),
    [
        ("/home/somebody/models/demo-glm/", None, "demo-glm"),
        ("zai-org/glm-4-9b-chat-hf", None, "glm-4-9b-chat-hf"),
        (".", None, "."),
        ("/home/somebody/models/demo-glm", "chat", "chat"),
    ],
)
def test_a_request_is_called_without_its_path(path: str, registered: str | None, called: str) -> None:
    """Runs are listed by that name."""
    assert OptimizeSpec(model_path=path, register_as=registered).called == called


@pytest.fixture(scope="module")
def shelf(tiny_glm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shelf]:
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOGLM_HOME", str(home))
        patch.setenv("AUTOGLM_TRACKING_URI", f"sqlite:///{home}/mlflow.db")
        assert Settings().mlflow_uri == f"sqlite:///{home}/mlflow.db"
        yield make_shelf(home, tiny_glm)


class Studies:
    """What the deployment `optimize` would come back with."""

    def __init__(self, *found: Study) -> None:
        self._left = list(found)
        self.asked: list[tuple[str, OptimizeSpec]] = []

    def __call__(self, rung: str, spec: OptimizeSpec) -> Study:
        self.asked.append((rung, spec))
        return self._left.pop(0)


def run(monkeypatch: pytest.MonkeyPatch, studies: Studies, asked: Reoptimization) -> Outcome:
    from flows import reoptimize as module

    monkeypatch.setattr(module, "run_study", studies)
    outcome: Outcome = module.reoptimize(asked)
    return outcome


@pytest.mark.usefixtures("prefect_harness")
def test_a_winner_is_tried_beside_the_champion(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lower rung had no answer; of the higher one's, the champion's alias hears nothing."""
    name = shelf.register("climbed", 2)
    studies = Studies(infeasible_study(), winner(name, "2"))
    spec = SPEC.model_copy(update={"register_as": name})
    outcome = run(monkeypatch, studies, request(spec=spec, highest_rung="prune"))
    assert outcome.kind == "challenger"
    assert [rung for rung, _ in studies.asked] == ["quantise", "prune"]
    assert shelf.aliases(name) == {"champion": "1", "challenger": "2"}
    assert shelf.tracker.aliases(name).canary == SHARE
    (event,) = shelf.tracker.events(name, 5)
    assert (event.kind, event.by, event.reason) == ("canary", "reoptimize", "TTFT is 30 % up")
    assert "reoptimize-climbed" in names_of_runs()


@pytest.mark.usefixtures("prefect_harness")
@pytest.mark.parametrize("yes", [True, False])
def test_a_person_may_be_asked_first(shelf: Shelf, monkeypatch: pytest.MonkeyPatch, yes: bool) -> None:
    """The run waits, on a form; what is declined is registered and not tried."""
    name = shelf.register(f"asked-{yes}", 2)
    answering = threading.Thread(target=answer, args=({"approve": yes, "remark": "not today"},))
    answering.start()
    outcome = run(monkeypatch, Studies(winner(name, "2")), request(require_approval=True))
    answering.join()
    assert outcome.kind == ("challenger" if yes else "declined")
    assert yes or "not today" in outcome.told
    assert shelf.aliases(name).get("challenger") == ("2" if yes else None)


@pytest.mark.usefixtures("prefect_harness")
def test_no_answer_is_a_no(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the run ends well, with the outcome as its result: Prefect itself would only let it fail."""
    from tasks import deploy

    monkeypatch.setattr(deploy, "_APPROVAL_S", 3)
    name = shelf.register("unanswered", 2)
    outcome = run(monkeypatch, Studies(winner(name, "2")), request(require_approval=True))
    assert (outcome.kind, outcome.challenger) == ("declined", None)
    assert outcome.told == "Version 2 is registered and not tried: nobody answered within a day."
    assert "challenger" not in shelf.aliases(name)


@pytest.mark.usefixtures("prefect_harness")
def test_who_is_being_tried_is_left_in_peace(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """A person's challenger, or the last study's: nothing is studied before its verdict."""
    name = shelf.register("tried", 2)
    shelf.tracker.canary(name, "2", SHARE, by="somebody")
    spec = SPEC.model_copy(update={"register_as": name})
    studies = Studies()
    outcome = run(monkeypatch, studies, request(spec=spec, renew=True))
    assert (outcome.kind, studies.asked) == ("declined", [])
    assert outcome.told.startswith("Nothing is studied: version 2 is being tried")
    assert shelf.aliases(name) == {"champion": "1", "challenger": "2"}


@pytest.mark.usefixtures("prefect_harness")
def test_who_came_during_the_study_is_left_in_peace(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    name = shelf.register("meanwhile", 3)

    class Slow(Studies):
        def __call__(self, rung: str, spec: OptimizeSpec) -> Study:
            shelf.tracker.canary(name, "2", SHARE, by="somebody")
            return super().__call__(rung, spec)

    spec = SPEC.model_copy(update={"register_as": name})
    outcome = run(monkeypatch, Slow(winner(name, "3")), request(spec=spec))
    assert (outcome.kind, outcome.challenger) == ("declined", None)
    assert outcome.told.startswith("Version 3 is registered and not tried: version 2 is being tried")
    assert f"open-autoglm rollback {name}" in outcome.told
    assert shelf.aliases(name) == {"champion": "1", "challenger": "2"}


@pytest.mark.usefixtures("prefect_harness")
def test_who_stays_gets_a_new_engine(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """If its engine had become slow; nobody else changes, and a host where it is not served is told."""
    name = shelf.register("stays", 1)
    slow = request(renew=True, reason="engine: it is slower alone")
    told = run(monkeypatch, Studies(winner(name, "1")), slow)
    assert told.kind == "kept"
    assert "was not started anew: no endpoint of this user" in told.told
    with endpoint(Path(f"models:/{name}@champion"), shelf.home, "--threads", "1") as server:
        (here,) = local_endpoints(shelf.home)
        headers = {"Authorization": f"Bearer {here.token}"}
        with httpx.Client(base_url=server.url, headers=headers, timeout=60) as admin:
            admin.post("/admin/slow", json={"share": 1}).raise_for_status()
            outcome = run(monkeypatch, Studies(winner(name, "1")), slow)
            champion = admin.get("/admin/fleet").json()["champion"]
    assert "Its engine was started anew: version 1 answers from a new engine." in outcome.told
    assert (champion["version"], champion["slower"]) == ("1", 0)
    assert shelf.aliases(name) == {"champion": "1"}


def names_of_runs() -> set[str]:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return {found.name for found in client.read_flow_runs()}


def answer(form: dict[str, Any]) -> None:
    """As the Prefect UI does when the run is resumed."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.states import StateType

    deadline = time.monotonic() + 60
    paused: list[UUID] = []
    with get_client(sync_client=True) as client:
        while not paused:
            assert time.monotonic() < deadline
            time.sleep(0.2)
            only = FlowRunFilter.model_validate({"state": {"type": {"any_": [StateType.PAUSED]}}})
            paused = [found.id for found in client.read_flow_runs(flow_run_filter=only)]
        client.resume_flow_run(paused[0], run_input=form)
