"""What is asked for after a breach: the request as it was, for what callers send now, and once."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from watched import window as steady_window
from windows import golden, probe, window

from open_autoglm.errors import UserError
from open_autoglm.monitoring import diagnosis
from open_autoglm.monitoring.answer import is_curable, observed, once_key, reoptimization
from open_autoglm.monitoring.config import read_watch_spec, watch_file
from open_autoglm.monitoring.diagnosis import Served, remember_good_times
from open_autoglm.monitoring.picture import draw_windows, watch_figure
from open_autoglm.monitoring.watch_store import WatchStore
from open_autoglm.schemas import Cause, EndpointProbe, Judgement, LatencyWindow, OptimizeSpec, Slo, WatchState
from open_autoglm.serving.local import LocalEndpoint

NOW = datetime(2026, 11, 23, 14, 20, tzinfo=UTC)
EXAMPLE = Path(__file__).parent.parent / "infra" / "watch" / "demo-glm.yaml"
SPEC = OptimizeSpec(model_path="m", length_mix="128/32:3,512/64:1", max_latency="2s", promote=True)


def test_the_request_is_for_what_callers_send_now() -> None:
    """Its limits stay; its seed is the hour's, so that no figure from before the breach is used again."""
    now = window()
    found = observed(SPEC, now, NOW)
    assert found.length_mix is None
    assert found.prompt_tokens == round(now.prompt_tokens.mean or 0)
    assert found.output_tokens == round(now.output_tokens.mean or 0)
    assert found.max_latency == SPEC.max_latency
    assert found.seed == observed(SPEC, now, NOW + timedelta(minutes=39)).seed
    assert found.seed != observed(SPEC, now, NOW + timedelta(minutes=40)).seed
    assert found.request_rate_per_s is None
    served = SPEC.model_copy(update={"scenario": "server", "request_rate_per_s": 9.0})
    assert observed(served, now, NOW).request_rate_per_s == now.requests / now.seconds


def test_the_file_says_what_may_be_done() -> None:
    cause = Cause(kind="engine", told="it is slower alone", evidence={})
    found = reoptimization(read_watch_spec(EXAMPLE), window(), cause, NOW)
    assert (found.highest_rung, found.require_approval) == ("quantise", False)
    assert (found.canary.weight_percent, found.canary.shadow_percent) == (5, 20)
    assert found.spec.register_as == "demo-glm"
    assert found.reason == "engine: it is slower alone"
    assert found.renew
    mix = cause.model_copy(update={"kind": "mix"})
    assert not reoptimization(read_watch_spec(EXAMPLE), window(), mix, NOW).renew


@pytest.mark.parametrize(
    ("kind", "curable"),
    [("mix", True), ("engine", True), ("load", False), ("environment", False), ("unknown", False)],
)
def test_what_another_configuration_may_help(kind: str, curable: bool) -> None:
    assert is_curable(Cause.model_validate({"kind": kind, "told": "", "evidence": {}})) is curable


def test_polls_and_alerts_of_an_hour_are_one() -> None:
    assert once_key("m", NOW) == once_key("m", NOW + timedelta(minutes=39))
    assert once_key("m", NOW) != once_key("m", NOW + timedelta(minutes=40))
    assert once_key("m", NOW) != once_key("other", NOW)


def test_a_watch_is_found_by_its_service(tmp_path: Path) -> None:
    """A user's own before the checkout's."""
    own = tmp_path / "watches" / "mine.yaml"
    own.parent.mkdir()
    own.write_text("")
    assert watch_file("mine", tmp_path) == own
    assert watch_file("some/where.yaml", tmp_path) == Path("some/where.yaml")
    for odd in ("absent", "../mine", ""):
        with pytest.raises(UserError, match="no watch is known as"):
            watch_file(odd, tmp_path)


# ── the past ─────────────────────────────────────────────────────────────────────────────────────


def judged(state: WatchState, minute: int, seen: LatencyWindow | None = None) -> Judgement:
    return Judgement(
        service="m",
        at=NOW + timedelta(minutes=minute),
        state=state,
        reasons=(),
        window=(seen or window()).model_copy(update={"requests": minute}),
    )


@pytest.mark.parametrize(
    "states",
    [
        ("ok", "ok", "ok", "breached", "breached"),
        ("ok", "ok", "ok", "no_data", "breached", "no_data", "breached"),
    ],
)
def test_the_window_before_a_breach_is_not_its_first(tmp_path: Path, states: tuple[WatchState, ...]) -> None:
    """A breach that takes two windows to be called one began in a window that was still `ok`; those that said
    nothing change nothing."""
    store = WatchStore(tmp_path, "m")
    digest = window().bundle_digest
    assert store.good_window(digest, 2) is None
    for minute, state in enumerate(states):
        assert store.append(judged(state, minute)) is None
    good = store.good_window(digest, 2)
    assert good is not None
    assert good.requests == 1
    store.append(judged("ok", 9))
    after = store.good_window(digest, 2)
    assert after is not None
    assert after.requests == 9
    assert store.good_window("another", 2) is None


def test_a_shift_that_was_found_late_has_a_good_window_from_before_it(tmp_path: Path) -> None:
    """Its cumulative sum left zero long before it was enough: what came after is slow already."""
    store = WatchStore(tmp_path, "m")
    levels = [0.0, 0.1, 0.0, 0.2, 0.5, 0.8]
    for minute, level in enumerate(levels):
        one = judged("ok", minute)
        store.append(one.model_copy(update={"figures": {"ttft_level_of_limit": level}}))
    store.append(judged("breached", 6))
    good = store.good_window(window().bundle_digest, 2)
    assert good is not None
    assert good.requests == 2


def test_a_window_that_breaks_a_promise_is_no_good_time(tmp_path: Path) -> None:
    """Although a first one is no breach: a probe taken then would hide what is wrong ever after. In a good
    one a probe is tried, here of nobody."""
    watch, store = read_watch_spec(EXAMPLE), WatchStore(tmp_path, "m")
    well, slow = judged("ok", 1), judged("ok", 2, steady_window(slower=50))
    tried = remember_good_times(watch, well, store, tmp_path)
    assert tried is not None
    assert tried.startswith("no endpoint of this user")
    assert remember_good_times(watch, slow, store, tmp_path) is None


def test_a_rehearsal_is_no_good_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who makes the engine slower while the window that ended is still good does not make that its health."""
    watch, store, taken = read_watch_spec(EXAMPLE), WatchStore(tmp_path, "m"), probe()
    served = Served(here=LocalEndpoint(url="http://127.0.0.1:1", pid=1, token=""), bundle=tmp_path)
    monkeypatch.setattr(diagnosis, "find_served", lambda home, digest: served)
    for share in (0.6, 0.0):
        slowed = taken.model_copy(update={"slowed_share": share})
        monkeypatch.setattr(diagnosis, "take_probe", lambda served, seconds, slowed=slowed: slowed)
        told = remember_good_times(watch, judged("ok", 1), store, tmp_path)
        assert (told is None) == (share == 0)
        assert (store.probe(taken.bundle_digest) is None) == (share > 0)


class Clock:
    """Of a watch, in hours after its first look; probes are taken as `next` says."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store, self._home = WatchStore(home, "m"), home
        self.next = probe()
        self.asked = 0
        served = Served(here=LocalEndpoint(url="http://127.0.0.1:1", pid=1, token=""), bundle=home)
        monkeypatch.setattr(diagnosis, "find_served", lambda home, digest: served)
        monkeypatch.setattr(diagnosis, "take_probe", self._take)

    def _take(self, _served: Served, _seconds: float) -> EndpointProbe:
        self.asked += 1
        return self.next

    def look(self, hours: float) -> EndpointProbe | None:
        now = datetime.now(UTC) + timedelta(hours=hours)
        one = judged("ok", 1).model_copy(update={"at": now})
        assert remember_good_times(read_watch_spec(EXAMPLE), one, self.store, self._home) is None
        return self.store.probe(self.next.bundle_digest)


def test_a_probe_that_clients_left_no_time_for_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour later. Until one tells, the study's figures stand in for its times."""
    clock = Clock(tmp_path, monkeypatch)
    good, clock.next = clock.next, probe(golden(count=1))
    assert clock.look(0) == clock.next
    clock.next = good
    assert clock.look(0.5) != good
    assert clock.look(1.1) == good
    assert clock.asked == 2


def test_a_host_that_has_changed_since_is_the_new_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked at once a day: else whatever is slow later would be put down to the new kernel. On the same host
    the first probe stays, or an engine that becomes slower by and by would take it along."""
    clock = Clock(tmp_path, monkeypatch)
    first = clock.look(0)
    clock.next = probe(golden(1.3))
    assert clock.look(23) == first
    assert clock.asked == 1
    assert clock.look(25) == first
    clock.next = probe(golden(1.3), kernel="6.2")
    assert clock.look(25) == clock.next


def test_the_studys_times_stand_in_for_those_a_probe_has_not_got(tmp_path: Path) -> None:
    kept, now = probe(golden(count=1), kernel="6.0"), probe()
    study = probe(golden(0.9), study=True)
    served = Served(here=LocalEndpoint(url="http://127.0.0.1:1", pid=1, token=""), bundle=tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diagnosis, "_of_the_study", lambda served, probe: study)
        found = diagnosis._baseline(kept, served, now)
        assert diagnosis._baseline(None, served, now) == study
        assert diagnosis._baseline(now, served, now) == now
    assert found is not None
    assert (found.source, found.golden, found.host) == ("study", study.golden, kept.host)
    assert found.settings["kernel"] == "6.0"


def test_the_last_windows_are_drawn() -> None:
    """With times, and without any."""
    slo = Slo(ttft_p95_ms=500)
    for judgements in ([], [judged("ok", 1), judged("breached", 2)]):
        assert watch_figure(judgements, slo).startswith(b"\x89PNG")


def test_a_single_window_is_drawn_in_its_time() -> None:
    """And not amid years; what was promised of whole answers is drawn, too."""
    seen = window().model_copy(update={"begin": NOW - timedelta(minutes=15), "end": NOW})
    panels = draw_windows([judged("ok", 1, seen)], Slo(e2e_p95_ms=500)).axes
    assert [axes.get_ylabel() for axes in panels] == ["TTFT ms", "TPOT ms", "E2E ms"]
    for begin_days, end_days in (axes.get_xlim() for axes in panels):
        assert 16 <= (end_days - begin_days) * 24 * 60 < 20
    promises = [[line for line in axes.get_lines() if line.get_linestyle() == "--"] for axes in panels]
    assert [len(lines) for lines in promises] == [0, 0, 1]
