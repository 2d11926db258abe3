"""The nightly promise from end to end: a slow engine is noticed, explained, and replaced by what is faster;
a bad successor is taken away; and nobody's request fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from endpoints import metric
from loop_stage import NAME, OUTPUT_TOKENS, SLO_MS, Callers, Stage, environment, staged, wait_until
from prometheus_server import needs_alertmanager, needs_prometheus

from open_autoglm.schemas import Judgement

pytestmark = [needs_prometheus, needs_alertmanager, pytest.mark.timeout(1800)]


@pytest.fixture
def stage(
    tiny_glm: Path,
    tiny_bundle: Path,
    shared_ledger: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Stage]:
    for name, value in environment(tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    with staged(tiny_glm, tiny_bundle, shared_ledger) as stage:
        yield stage


def test_a_slow_engine_is_replaced_and_a_bad_successor_is_not_kept(stage: Stage) -> None:
    """Noticed in two windows, the first of them told by Alertmanager; explained; optimised again; the winner
    is tried beside the champion and promoted; what answers otherwise is rolled back."""
    with Callers(stage.server.url) as callers:
        is_well(stage, callers)
        grows_slow(stage, callers)
        is_noticed_and_explained(stage)
        has_a_challenger(stage)
        is_promoted(stage)
        bad = stage.try_bad_challenger()  # while its first answers are heard, the promise is looked at
        is_well_again(stage)
        is_rid_of(bad, stage, callers)
    assert (set(callers.statuses), callers.failures) == ({200}, [])
    shown = stage.metrics()
    for counter in ("autoglm_requests_failed_total", "autoglm_requests_not_finite_total"):
        assert metric(shown, counter) == 0
    assert "autoglm_requests_refused_total{" not in shown


def is_well(stage: Stage, callers: Callers) -> None:
    """A first look finds the promise kept, and takes a probe to compare with."""
    callers.more(9)  # while a look begins, they go on: enough for a window
    stage.look_until(is_within_promise)
    stage.check_good_times()


def is_within_promise(judgement: Judgement) -> bool:
    return judgement.state == "ok" and judgement.figures["e2e_p95_ms"] <= SLO_MS


def grows_slow(stage: Stage, callers: Callers) -> None:
    """By one command, which slows the engine's process and nothing else: so much that a promise is broken."""
    while 1e3 * median(callers.more(3)) < 1.5 * SLO_MS:
        stage.slower()


def is_noticed_and_explained(stage: Stage) -> None:
    """By an alert, and then by the schedule. A busy host may be blamed at first; it is looked at again. On a
    host that was busy when the engine was slowed, it is less slow once the host is not."""
    stage.ended("regression", by="AUTOMATION")

    def explained(judgement: Judgement) -> bool:
        if judgement.state == "ok":
            stage.slower()
        return "### Cause: engine" in stage.artifact(f"judgement-{NAME}")

    stage.look_until(explained)
    judgements = stage.judgements()
    acted = next(number for number, judgement in enumerate(judgements) if judgement.act)
    assert judgements[acted].reasons[0].endswith("in 2 windows running")
    assert any(judgement.reasons[0].endswith("in a first window") for judgement in judgements[:acted])


def has_a_challenger(stage: Stage) -> None:
    """The study found what is faster than the champion, measured again in the same heats."""
    (run,) = stage.runs("reoptimize")
    asked: dict[str, Any] = run["parameters"]["request"]
    assert asked["reason"].startswith("engine: ")
    assert asked["spec"]["output_tokens"] == OUTPUT_TOKENS
    stage.completed(run["id"])
    stage.completed(stage.runs("optimize")[0]["id"])
    assert "Version 2 is to be tried beside version 1." in stage.artifact("outcome")
    canary = stage.event("canary")
    assert (canary.by, canary.reason, canary.after.challenger) == ("reoptimize", asked["reason"], "2")


def is_promoted(stage: Stage) -> None:
    """By the judge, who saw both beside each other, after some callers had met it."""
    promoted = stage.event("promote")
    assert (promoted.by, promoted.after.champion, promoted.after.previous) == ("judge", "2", "1")
    assert promoted.reason.startswith("e2e_ms changes by -")
    asked = metric(stage.metrics(), "vllm:request_success_total", model_version="2", role="challenger")
    assert asked > 0
    wait_until(lambda: version_2("autoglm_model_info{", stage.metrics()))
    assert metric(stage.metrics(), "autoglm_engine_slowed_share") == 0


def version_2(series: str, shown: str) -> bool:
    """Whether it is the champion's, who is version 2."""
    lines = (line for line in shown.splitlines() if line.startswith(series))
    return any('model_version="2"' in line and 'role="champion"' in line for line in lines)


def is_well_again(stage: Stage) -> None:
    """Within the promise, as the watch finds."""
    found = stage.look_until(is_within_promise)
    assert found.window is not None
    assert found.window.version == "2"


def is_rid_of(bad: str, stage: Stage, callers: Callers) -> None:
    """Its weights were mixed up: it is as quick as the champion, and says something else."""
    gone = stage.event("rollback")
    assert (gone.by, gone.before.challenger, gone.after.challenger) == ("judge", bad, None)
    assert gone.after.champion == "2"
    assert "first tokens are the champion's" in gone.reason
    callers.more(3)
    assert metric(stage.metrics(), "autoglm_model_info") == 1
