"""Windows from a real Prometheus that holds scrapes of the test's own making: roles change, endpoints go."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

import pytest
from prometheus_server import needs_prometheus, prometheus, sample, store

from open_autoglm.monitoring.prometheus import Prometheus
from open_autoglm.monitoring.windows import NoWindow, Role, window
from open_autoglm.schemas import LatencyWindow
from open_autoglm.serving.metrics import Board, Metrics, State

pytestmark = needs_prometheus
SPAN_S = 900
BEGIN_S = float(int(time.time()) - SPAN_S)


@dataclass
class Scraped:
    """An endpoint, as it is seen every now and then."""

    name: str
    instance: str
    started_s: float = BEGIN_S - 5000
    samples: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.board = Board(self.name)

    def start_again(self, second: float) -> None:
        self.started_s = BEGIN_S + second
        self.board = Board(self.name)

    def champion(self, version: str) -> Metrics:
        metrics = self.board.of(version, f"digest-{version}", "champion")
        metrics.show(State(0, 0, 0.0, engine_bytes=100, restarts=0, slower=0))
        return metrics

    def at(self, second: float, *, up: bool = True) -> None:
        """Scrape it, so long after the window's begin."""
        target = {"job": "autoglm", "instance": self.instance}
        figures = [("up", {}, float(up))]
        if up:
            figures.append(("process_start_time_seconds", {}, self.started_s))
            figures += [(one.name, dict(one.labels), one.value) for one in self.board.figures()]
        self.samples += [
            sample(name, {**{label: text for label, text in labels.items() if text}, **target}, value, time_s)
            for name, labels, value in figures
            for time_s in [BEGIN_S + second]
        ]


def answer(metrics: Metrics, count: int) -> None:
    for _ in range(count):
        metrics.request(prompt_tokens=7).finished("stop")


def changing() -> Iterator[Scraped]:
    """Two endpoints go from version 1 to 2; the second is killed before, and dies at the end."""
    a, b = (Scraped("changing", instance) for instance in ("a:1", "b:1"))
    first_a, first_b = a.champion("1"), b.champion("1")
    answer(first_a, 100)
    for one in (a, b):
        one.at(-15)
        one.at(0)
    answer(first_a, 10)
    answer(first_b, 10)
    a.at(300)
    b.at(302, up=False)
    b.start_again(310)
    answer(b.champion("1"), 30)
    a.at(400)
    b.at(400)
    first_a.hide()
    second_a = a.champion("2")
    answer(second_a, 4)
    a.at(500)
    b.board.of("1", "digest-1", "champion").hide()
    second_b = b.champion("2")
    second_b.refused("queue_full")
    answer(second_b, 3)
    b.at(500)
    answer(second_a, 2)
    a.at(880)
    b.at(880, up=False)
    return iter((a, b))


def gone() -> Scraped:
    """Its file was taken away while it ran."""
    one = Scraped("gone", "g:1")
    one.champion("1")
    one.at(-600)
    return one


def young() -> Scraped:
    """Started in the window, and asked before it was scraped."""
    one = Scraped("young", "y:1", started_s=BEGIN_S + 600)
    answer(one.champion("1"), 5)
    one.at(610)
    one.at(890)
    return one


def stumbling() -> Scraped:
    """Killed twice a minute, after three requests; every second scrape finds nobody."""
    one = Scraped("stumbling", "s:1")
    for life in range(30):
        second = life * 30
        one.at(second - 5, up=False)
        one.start_again(second)
        answer(one.champion("1"), 3)
        one.at(second + 10)
    return one


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    folder = tmp_path_factory.mktemp("prometheus") / "kept"
    samples = [line for one in (*changing(), gone(), young(), stumbling()) for line in one.samples]
    with prometheus(folder, store(folder, samples)) as url:
        yield Prometheus(url)


def look(
    source: Prometheus, service: str, end: float = SPAN_S, role: Role = "champion"
) -> LatencyWindow | NoWindow:
    begin, until = (datetime.fromtimestamp(BEGIN_S + second, UTC) for second in (0, end))
    return window(source, service, begin, until, role)


def test_the_version_that_took_over_is_counted_since(source: Prometheus) -> None:
    """By both endpoints, also by the one that has died meanwhile."""
    found = look(source, "changing")
    assert isinstance(found, LatencyWindow), found
    assert (found.version, found.bundle_digest) == ("2", "digest-2")
    assert (found.requests, found.refused, found.restarts) == (4 + 2 + 3, 1, 0)
    assert (found.begin.timestamp() - BEGIN_S, found.end.timestamp() - BEGIN_S) == (400, 880)


def test_a_restart_between_two_scrapes_is_counted(source: Prometheus) -> None:
    """Though its counters are higher after it than before."""
    found = look(source, "changing", end=450)
    assert isinstance(found, LatencyWindow), found
    assert (found.version, found.requests, found.restarts) == ("1", 10 + 30, 1)
    assert (found.begin.timestamp() - BEGIN_S, found.seconds) == (0, 400)


def test_a_young_endpoint_is_counted_from_its_start(source: Prometheus) -> None:
    found = look(source, "young")
    assert isinstance(found, LatencyWindow), found
    assert (found.requests, found.restarts) == (5, 0)
    assert (found.begin.timestamp() - BEGIN_S, found.seconds) == (600, 290)


def test_an_endpoint_that_restarts_often_is_counted(source: Prometheus) -> None:
    """Each life from nothing, and how many there were; while it is down there is no window."""
    found = look(source, "stumbling")
    assert isinstance(found, LatencyWindow), found
    assert (found.requests, found.output_tokens.count, found.restarts) == (90, 90, 29)
    down = look(source, "stumbling", end=866)
    assert isinstance(down, NoWindow)
    assert "no endpoint of stumbling answers Prometheus: s:1 since" in down.reason


def test_what_is_not_there_is_a_reason(source: Prometheus) -> None:
    """Somebody who is not scraped any more, a role nobody has, and figures that are too old."""
    lost = look(source, "gone")
    assert isinstance(lost, NoWindow)
    assert lost.reason.startswith("g:1, which had the champion of gone until ")
    assert lost.reason.endswith("is not scraped any more")
    nobody = look(source, "changing", role="challenger")
    assert isinstance(nobody, NoWindow)
    assert "knows no challenger of changing" in nobody.reason
    old = look(source, "changing", end=295)
    assert isinstance(old, NoWindow)
    assert "295 s before the window's end" in old.reason
