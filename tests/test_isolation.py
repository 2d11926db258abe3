"""A job in a child of its own: whatever it does comes back as an answer or as a reason, and nothing stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from child_jobs import Answer, Order

from open_autoglm.measure.isolation import Child, Failure, run_isolated

TESTS = str(Path(__file__).parent)


def run(
    job: str,
    log: Path,
    text: str = "",
    *,
    timeout_s: float = 60,
    memory_limit_bytes: int | None = None,
    environment: dict[str, str] | None = None,
) -> Answer | Failure:
    return run_isolated(
        f"child_jobs:{job}",
        Order(text=text),
        Answer,
        log=log,
        timeout_s=timeout_s,
        memory_limit_bytes=memory_limit_bytes,
        environment={"PYTHONPATH": TESTS, **(environment or {})},
    )


def ask(child: Child, job: str, text: str = "", timeout_s: float = 60) -> Answer | Failure:
    return child.ask(f"child_jobs:{job}", Order(text=text), Answer, timeout_s)


def begin(log: Path, *, cpus: tuple[int, ...] = ()) -> Child:
    return Child(log, environment={"PYTHONPATH": TESTS}, cpus=cpus)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "child.log"


def gone(pid: int) -> bool:
    """Whether the process has ended; a zombie that nobody collects has."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until_gone(pids: list[int], seconds: float = 5) -> list[int]:
    """Those of ``pids`` that are still there after that time."""
    deadline = time.monotonic() + seconds
    while (alive := [pid for pid in pids if not gone(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return alive


def wait_for(path: Path, seconds: float = 30) -> list[int]:
    """The numbers in a file that someone is about to write."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} was not written"
        time.sleep(0.05)
    return [int(word) for word in path.read_text().split()]


# ── answers ──────────────────────────────────────────────────────────────────────────────────────


def test_a_job_answers_from_a_process_of_its_own(log: Path) -> None:
    """The payload goes in, the answer comes out, and the process is not ours."""
    answer = run("answers", log, "hello")
    assert isinstance(answer, Answer)
    assert answer.text == "hello"
    assert answer.pid != os.getpid()
    assert gone(answer.pid)


def test_an_answer_may_be_longer_than_a_pipe(log: Path) -> None:
    """It is read while it is written, so neither side waits for the other."""
    answer = run("answers_at_length", log, "tok")
    assert isinstance(answer, Answer)
    assert len(answer.text) == 3_000_000


def test_what_a_runtime_prints_goes_to_the_log_and_not_into_the_answer(log: Path) -> None:
    """Even if it looks like an answer, and even if it is no text."""
    answer = run("prints_garbage", log, "real")
    assert isinstance(answer, Answer)
    assert answer.text == "real"
    assert b'"fake"' in log.read_bytes()
    assert b"warning" in log.read_bytes()
    assert b"\xff\xfe not text" in log.read_bytes()


def test_a_crash_after_the_answer_does_not_matter(log: Path) -> None:
    """Some runtimes die while they are torn down; their figures are good."""
    assert isinstance(run("crashes_after_answering", log), Answer)


def test_the_child_gets_its_own_environment(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours, and what was asked for on top."""
    monkeypatch.setenv("AUTOGLM_TEST_OURS", "ours")
    answer = run("reads_its_environment", log, "AUTOGLM_TEST_OURS")
    assert isinstance(answer, Answer)
    assert answer.text == "ours"
    answer = run("reads_its_environment", log, "OMP_NUM_THREADS", environment={"OMP_NUM_THREADS": "7"})
    assert isinstance(answer, Answer)
    assert answer.text == "7"


# ── failures ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("job", "status", "reason"),
    [
        ("segfaults", "crashed", "ended with SIGSEGV"),
        ("exits_with_3", "crashed", "ended with exit code 3"),
        ("leaves_without_a_word", "crashed", "ended without an answer"),
        ("dies_while_answering", "crashed", "ended without an answer"),
        ("raises", "failed", "ValueError: this is wrong"),
        ("raises_memory_error", "out_of_memory", "can't allocate memory"),
        ("lacks_gpu_memory", "out_of_memory", "Requested size was"),
        ("answers_nonsense", "incorrect", "logits that are not finite"),
        ("no_such_job", "failed", "no_such_job"),
    ],
)
def test_a_job_that_gives_no_answer_gives_a_reason(job: str, status: str, reason: str, log: Path) -> None:
    """One status and one line for each way to fail."""
    failure = run(job, log, "this")
    assert isinstance(failure, Failure)
    assert failure.status == status
    assert reason in failure.reason
    assert "\n" not in failure.reason


def test_an_exception_leaves_its_traceback_in_the_log(log: Path) -> None:
    """The reason is one line; the rest is there for who wants to mend it."""
    run("raises", log, "this")
    said = log.read_text()
    assert "Traceback" in said
    assert "and a second line" in said


def test_a_job_without_end_is_killed_with_all_it_started(log: Path, tmp_path: Path) -> None:
    """After the time limit neither it nor its own children are left."""
    failure = run("hangs", log, str(tmp_path / "pids"), timeout_s=3)
    assert failure == Failure("timed_out", "gave no answer within 3 s and was killed")
    assert wait_until_gone(wait_for(tmp_path / "pids")) == []


def test_a_job_that_takes_all_memory_is_stopped_at_its_limit(log: Path) -> None:
    """The limit is the child's alone: this process does not notice."""
    failure = run("allocates_without_end", log, memory_limit_bytes=400 * 2**20)
    assert isinstance(failure, Failure)
    assert failure.status == "out_of_memory"
    assert "ran out of memory" in failure.reason


def test_a_child_killed_from_outside_is_told_as_such(log: Path, tmp_path: Path) -> None:
    """SIGKILL comes from the kernel when memory is gone, and the reason says so."""
    killer = "import os, signal, sys, time\n" + (
        "from pathlib import Path\n"
        "while not Path(sys.argv[1]).exists(): time.sleep(0.05)\n"
        "os.kill(int(Path(sys.argv[1]).read_text().split()[0]), signal.SIGKILL)"
    )
    with subprocess.Popen([sys.executable, "-c", killer, str(tmp_path / "pids")]):
        failure = run("hangs", log, str(tmp_path / "pids"))
    assert isinstance(failure, Failure)
    assert failure.status == "out_of_memory"
    assert "SIGKILL" in failure.reason
    assert wait_until_gone(wait_for(tmp_path / "pids")) == []


# ── a conversation ───────────────────────────────────────────────────────────────────────────────


def test_a_child_answers_one_job_after_another_and_keeps_its_state(log: Path) -> None:
    """A session that one job opens is there for the next, in the same process."""
    with begin(log) as child:
        answers = [ask(child, "remembers", letter) for letter in "abc"]
        other = ask(child, "answers", "another job")
    told = [answer.text for answer in answers if isinstance(answer, Answer)]
    assert told == ["a", "ab", "abc"]
    assert isinstance(other, Answer)
    assert {answer.pid for answer in answers if isinstance(answer, Answer)} == {other.pid}
    assert gone(other.pid)


def test_what_a_child_prints_between_jobs_does_not_shift_its_answers(log: Path) -> None:
    """The next answer is that of the next job, however much a runtime talks."""
    with begin(log) as child:
        for word in ("one", "two"):
            answer = ask(child, "prints_garbage", word)
            assert isinstance(answer, Answer)
            assert answer.text == word


@pytest.mark.parametrize("fatal", ["segfaults", "raises", "leaves_without_a_word"])
def test_a_child_that_failed_stays_failed(log: Path, fatal: str) -> None:
    """What it says first is what it says from then on: nothing is asked of a dead process."""
    with begin(log) as child:
        assert isinstance(ask(child, "answers"), Answer)
        failure = ask(child, fatal)
        assert isinstance(failure, Failure)
        assert ask(child, "answers") == failure


def test_the_time_limit_of_one_child_leaves_the_others_alone(tmp_path: Path) -> None:
    """Whoever hangs is killed with what it started; its neighbour goes on with its state."""
    with begin(tmp_path / "a.log") as hanging, begin(tmp_path / "b.log") as working:
        assert isinstance(ask(working, "remembers", "a"), Answer)
        failure = ask(hanging, "hangs", str(tmp_path / "pids"), timeout_s=3)
        assert failure == Failure("timed_out", "gave no answer within 3 s and was killed")
        assert wait_until_gone(wait_for(tmp_path / "pids")) == []
        assert ask(hanging, "answers") == failure
        answer = ask(working, "remembers", "b")
        assert isinstance(answer, Answer)
        assert answer.text == "ab"


def test_a_closed_child_is_gone_and_says_so(log: Path) -> None:
    """Closing it twice does no harm."""
    child = begin(log)
    answer = ask(child, "answers")
    assert isinstance(answer, Answer)
    child.close()
    child.close()
    assert gone(answer.pid)
    assert ask(child, "answers") == Failure("failed", "was closed")


def test_a_child_runs_on_the_cores_it_is_given(log: Path) -> None:
    """One of ours, or all of them if nothing is said."""
    ours = sorted(os.sched_getaffinity(0))
    with begin(log, cpus=(ours[-1],)) as child:
        answer = ask(child, "tells_its_cores")
    assert isinstance(answer, Answer)
    assert answer.text == str(ours[-1])
    everywhere = run("tells_its_cores", log)
    assert isinstance(everywhere, Answer)
    assert everywhere.text == ",".join(map(str, ours))


# ── nothing stays ────────────────────────────────────────────────────────────────────────────────

PARENT = """
import signal, sys, threading
from pathlib import Path
from child_jobs import Answer, Order
from open_autoglm.measure.isolation import Child, Interrupted, run_isolated, stop_children

signal.signal(signal.SIGTERM, lambda *_: stop_children())
outcome = []

def work():
    try:
        with Child(Path(sys.argv[2])) as child:
            child.ask("child_jobs:answers", Order(), Answer, 60)  # it has a past
            child.ask("child_jobs:hangs", Order(text=sys.argv[1]), Answer, 600)
    except Interrupted:
        outcome.append("interrupted")

thread = threading.Thread(target=work)
thread.start()
while thread.is_alive():
    thread.join(0.1)
try:
    run_isolated("child_jobs:answers", Order(), Answer, log=Path(sys.argv[2]), timeout_s=60)
except Interrupted:
    outcome.append("refused")
print(*outcome)
"""


@pytest.fixture
def parent(tmp_path: Path, log: Path) -> subprocess.Popen[str]:
    """A process that converses with a child in a thread, as the flow does; its second job has no end."""
    return subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "pids"), str(log)],
        env={**os.environ, "PYTHONPATH": TESTS},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_killed_parent_leaves_no_child(parent: subprocess.Popen[str], tmp_path: Path) -> None:
    """The kernel ends the child with its parent, whatever ended the parent."""
    child, grandchild = wait_for(tmp_path / "pids")
    parent.kill()
    parent.communicate()
    assert wait_until_gone([child]) == []
    os.kill(grandchild, signal.SIGKILL)  # an engine's own helpers must watch their parent themselves


IDLE_PARENT = """
import os, signal, sys
from pathlib import Path
from child_jobs import Answer, Order
from open_autoglm.measure.isolation import Child

child = Child(Path(sys.argv[1]))
print(child.ask("child_jobs:answers", Order(), Answer, 60).pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_parent_leaves_no_idle_child(log: Path) -> None:
    """One that waits for its next round ends with its parent as well."""
    environment = {**os.environ, "PYTHONPATH": TESTS}
    command = [sys.executable, "-c", IDLE_PARENT, str(log)]
    parent = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert parent.returncode == -signal.SIGKILL
    assert wait_until_gone([int(parent.stdout)]) == []


def test_stopping_the_children_ends_them_and_starts_no_more(
    parent: subprocess.Popen[str], tmp_path: Path
) -> None:
    """An interrupt raises in the thread that waits, and in every one that would start a child after it."""
    pids = wait_for(tmp_path / "pids")
    parent.send_signal(signal.SIGTERM)
    said, _ = parent.communicate(timeout=30)
    assert said.split() == ["interrupted", "refused"]
    assert wait_until_gone(pids) == []
