"""What befalls who watches: killed between finding and doing, two at once, other clocks, a full disk.

Each time the next look goes on from there, and what is said is a sentence. What befalls Prometheus is told by
test_monitoring_http, counters that begin again by test_tape, test_scrapes and test_windows.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from small_disk import on_a_small_disk
from watched import POLICY, WINDOW, judged, window

from open_autoglm.monitoring.config import WatchSpec
from open_autoglm.monitoring.judge import JudgeState, judge
from open_autoglm.monitoring.watch import look
from open_autoglm.monitoring.watch_store import WatchStore
from open_autoglm.schemas.watch import Judgement, LatencyWindow
from open_autoglm.serving.local import LocalEndpoint, announced, local_endpoints

HERE = Path(__file__).parent
SECOND = timedelta(seconds=1)
SPEC = WatchSpec.model_validate(
    {
        "service": "demo",
        "endpoint": "http://127.0.0.1:8000",
        "slo": {"ttft_p95": "500ms"},
        "judge": {"baseline_windows": 24},
        "optimize": {"model_path": "demo"},
    }
)


def seen(store: WatchStore, one: LatencyWindow) -> Judgement:
    return look(SPEC, lambda _: one, store, one.end + SECOND)


@pytest.fixture
def store(tmp_path: Path) -> WatchStore:
    """In which a window was bad already: another one is a breach."""
    made = WatchStore(tmp_path, SPEC.service)
    assert seen(made, window(0, bad=200)).state == "ok"
    return made


# ── killed ───────────────────────────────────────────────────────────────────────────────────────

LOOKING = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_watch_faults import SPEC, seen
from watched import window
from open_autoglm.monitoring.watch_store import WatchStore

store = WatchStore(Path(sys.argv[2]), SPEC.service)
print("ready", flush=True)
sys.stdin.readline()
found = seen(store, window(1, bad=200))
print(found.model_dump_json(include={"state", "act", "due", "reasons"}), flush=True)
sys.stdin.readline()
os.kill(os.getpid(), signal.SIGKILL)
"""


def looking(home: Path) -> subprocess.Popen[str]:
    """Another process that looks at the second bad window when it is told to, and then is killed."""
    command = [sys.executable, "-c", LOOKING, str(HERE), str(home)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def told(process: subprocess.Popen[str]) -> str:
    """Go on, and what it says next."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline()


def test_who_is_killed_before_it_acts_has_a_successor(store: WatchStore, tmp_path: Path) -> None:
    """The next look does what was to be done, within the cool-down, and says since when; then it is done."""
    with looking(tmp_path) as process:
        found = json.loads(told(process))
        assert (found["state"], found["act"]) == ("breached", True)
        told(process)
    assert process.returncode == -signal.SIGKILL
    again = seen(store, window(2, bad=200))
    assert again.act
    assert again.due == window(1).end + SECOND
    assert f"at {again.due.isoformat()} has not been done" in again.reasons[-1]
    assert store.answered() is None
    last = seen(store, window(3, bad=200))
    assert (last.state, last.act, last.due) == ("breached", False, None)
    assert "nothing is done before" in last.reasons[-1]


def test_a_cause_that_was_only_told_blinds_nobody(store: WatchStore) -> None:
    """More callers, say: an hour later it may be the engine. A second telling changes nothing."""
    first = seen(store, window(1, bad=200))
    assert first.act
    again = first.at + timedelta(hours=1)
    assert store.answered(again) is None
    assert store.memory().memory.state.cool_until == again
    later = [seen(store, window(number, bad=200)) for number in range(2, 6)]
    assert [one.act for one in later] == [False, False, False, True]
    assert store.answered() is None
    assert store.answered(again) is None
    assert store.memory().memory.state.cool_until == later[-1].at + timedelta(hours=6)


def test_of_two_at_once_one_acts(store: WatchStore, tmp_path: Path) -> None:
    """The other one waits for it, and then finds the window judged: both are in the history."""
    with looking(tmp_path) as one, looking(tmp_path) as other:
        for process in (one, other):
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        found = [json.loads(process.stdout.readline()) for process in (one, other) if process.stdout]
        for process in (one, other):
            told(process)
    assert sorted((each["state"], each["act"]) for each in found) == [("breached", True), ("no_data", False)]
    assert sum("a window was judged just now" in each["reasons"][0] for each in found) == 1
    assert sorted(each.state for each in store.history()) == ["breached", "no_data", "ok"]


def test_what_is_over_is_not_done(store: WatchStore) -> None:
    """Nor is it done to another bundle, that somebody has put there meanwhile."""
    assert seen(store, window(1, bad=200)).act
    assert seen(store, window(2, requests=3)).due is not None
    calm = [seen(store, window(number)) for number in (3, 4)]
    assert [(one.state, one.act) for one in calm] == [("breached", True), ("ok", False)]
    assert calm[1].due is None
    assert seen(store, window(5, bad=200)).state == "ok"
    other = [seen(store, window(number, bad=200, bundle_digest="ba9876543210")) for number in (6, 7)]
    assert [(one.state, one.act) for one in other] == [("ok", False), ("breached", False)]


# ── clocks ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("back", [timedelta(hours=3), timedelta(days=400)])
def test_a_clock_that_was_set_back_blinds_nobody(back: timedelta) -> None:
    """It is told once, a breach goes on, and two windows running are judged as ever; nothing is acted on for
    longer than a cool-down."""
    found, state = judged([window(n, bad=200) for n in range(2)])
    assert found[-1].act
    windows = [
        window(n, bad=200, begin=window(n).begin - back, end=window(n).end - back) for n in range(2, 40)
    ]
    later, after = judged(windows, state=state)
    assert later[0].state == "no_data"
    assert later[0].reasons[0].startswith("this host's clock was set back: it is ")
    assert {one.state for one in later[1:]} == {"breached"}
    assert [n for n, one in enumerate(later) if one.act] == [24]  # six hours, and no more
    assert after.breach is not None
    assert after.breach.since <= windows[0].end + SECOND


def test_a_clock_that_was_set_back_a_little_costs_a_window() -> None:
    """Less than a window: those that overlap are passed over."""
    _, state = judged([window(0)])
    moved = [
        window(n, begin=window(n).begin - WINDOW / 2, end=window(n).end - WINDOW / 2) for n in range(1, 4)
    ]
    later, _ = judged(moved, state=state)
    assert [one.state for one in later] == ["no_data", "ok", "ok"]
    assert "overlaps one that was judged" in later[0].reasons[0]


def test_a_shorter_cool_down_holds_at_once() -> None:
    found, state = judged([window(n, bad=200) for n in range(2)])
    assert found[-1].act
    short = POLICY.model_copy(update={"cool_down_s": 1800.0})
    later, _ = judged([window(n, bad=200) for n in range(2, 8)], state=state, policy=short)
    assert [one.act for one in later] == [False, False, True, False, True, False]


def test_a_clock_that_is_ahead_says_nothing_of_now() -> None:
    """The host's jumps ahead, or the samples are of the past: the window is old, and not healthy."""
    state = JudgeState()
    found, after = judge(window(0), state, None, POLICY, window(0).end + timedelta(hours=5))
    assert (found.state, after) == ("no_data", state)
    assert "ended 18000 s ago" in found.reasons[0]


# ── restarts ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("restarts", "times"), [(1, "once"), (40, "40 times")])
@pytest.mark.parametrize(("requests", "state"), [(400, "ok"), (3, "no_data")])
def test_restarts_are_told(restarts: int, times: str, requests: int, state: str) -> None:
    """Who was being answered by a server that was killed is in no counter."""
    (found,), _ = judged([window(requests=requests, restarts=restarts)])
    assert found.state == state
    assert found.reasons[-1] == f"the engine or its server was started again {times} in the window"


# ── the disk ─────────────────────────────────────────────────────────────────────────────────────

FULL = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_watch_faults import SPEC, seen
from watched import window
from open_autoglm.monitoring.watch_store import WatchStore

home = Path(sys.argv[2])
store, ballast = WatchStore(home, SPEC.service), home / "ballast"

def fill():
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return

def tell(number):
    print(seen(store, window(number, bad=200)).model_dump_json(include={"state", "act", "reasons"}))

if sys.argv[3] == "at first":
    fill()
tell(0)
fill()
for number in (1, 2):
    tell(number)
ballast.unlink()
for number in (3, 4):
    tell(number)
    store.answered()
print(len(list(store.history())))
"""


def looks_on(tmp_path: Path, size: str, when: str) -> tuple[list[dict[str, object]], int]:
    found = on_a_small_disk(size, tmp_path, sys.executable, "-c", FULL, str(HERE), str(tmp_path), when)
    assert found.returncode == 0, found.stderr
    *looks, kept = map(json.loads, found.stdout.splitlines())
    return looks, kept


def test_a_full_disk_stops_acts_and_not_looks(tmp_path: Path) -> None:
    """The breach is found at each look, and said not to be acted on; with room again, it is acted on once."""
    looks, kept = looks_on(tmp_path, "64k", "later")
    assert [(one["state"], one["act"]) for one in looks] == [
        ("ok", False),
        ("breached", False),
        ("breached", False),
        ("breached", True),
        ("breached", False),
    ]
    for one in looks[1:3]:
        said = " ".join(one["reasons"])  # type: ignore[arg-type]
        assert "this look cannot be remembered, so nothing is done about it" in said
        assert "No space left on device" in said
    assert kept == 3 + sum("history cannot be written" not in str(one["reasons"]) for one in looks[1:3])


def test_a_disk_without_room_for_a_folder_is_no_data(tmp_path: Path) -> None:
    """Nothing can be remembered, so nothing is judged, and that is said."""
    looks, _ = looks_on(tmp_path, "64k,nr_inodes=2", "at first")
    assert [one["state"] for one in looks] == ["no_data", "no_data", "no_data", "no_data", "no_data"]
    assert all("nothing can be remembered, so nothing is judged" in str(one["reasons"]) for one in looks)


def test_a_server_that_cannot_be_announced_serves(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "endpoints").write_text("no folder")
    here = LocalEndpoint(url="http://127.0.0.1:1", pid=1, token="key")
    with announced(tmp_path, 1, here, scraped=True):
        assert local_endpoints(tmp_path) == ()
    (one,) = caplog.records
    assert one.getMessage().startswith("commands, watches and Prometheus will not find this server: ")
