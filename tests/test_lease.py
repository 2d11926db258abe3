"""The device lease across processes: one timed run alone, preparations together, ghosts hold nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from open_autoglm.files import file_lock
from open_autoglm.measure.lease import device_lease, lease_directory

HOLDER = """
import sys
from open_autoglm.measure.lease import device_lease
for line in sys.stdin:
    print("asks", flush=True)
    with device_lease(line.split()[0], alone=line.split()[1] == "alone"):
        print("holds", flush=True)
        sys.stdin.readline()
    print("freed", flush=True)
"""


class Holder:
    """Another process that takes and frees the lease when told to."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] = subprocess.Popen(
            [sys.executable, "-c", HOLDER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def says(self) -> str:
        """Its next word; waits for it."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, how: str, device: str = "cpu") -> None:
        """Let it ask for the lease; return when it has begun to."""
        self.tell(f"{device} {how}")
        assert self.says() == "asks"

    def take(self, how: str, device: str = "cpu") -> None:
        """Let it ask for the lease; return when it has it."""
        self.ask(how, device)
        assert self.says() == "holds"

    def free(self) -> None:
        self.tell("")
        assert self.says() == "freed"

    @property
    def waits(self) -> bool:
        """Whether the kernel has it in line for a lock: ``->`` in /proc/locks marks those."""
        waiting = [line.split() for line in Path("/proc/locks").read_text().splitlines() if "->" in line]
        return any(fields[5] == str(self.process.pid) for fields in waiting)

    def wait_in_line(self) -> None:
        while not self.waits:
            assert self.process.poll() is None


@pytest.fixture(autouse=True)
def leases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOGLM_LEASE_DIR", str(tmp_path / "leases"))


@pytest.fixture
def holder() -> Iterator[Callable[[], Holder]]:
    holders: list[Holder] = []

    def start() -> Holder:
        holders.append(Holder())
        return holders[-1]

    yield start
    for each in holders:
        each.process.kill()
        each.process.communicate()


@pytest.mark.parametrize(("first", "second"), [("alone", "alone"), ("alone", "shared"), ("shared", "alone")])
def test_who_wants_the_device_alone_waits_and_is_waited_for(
    first: str, second: str, holder: Callable[[], Holder]
) -> None:
    """A timed run goes together with nothing, and the next one begins when it ends."""
    earlier, later = holder(), holder()
    earlier.take(first)
    later.ask(second)
    later.wait_in_line()
    earlier.free()
    assert later.says() == "holds"
    later.free()


def test_preparations_go_together(holder: Callable[[], Holder]) -> None:
    """Loading one candidate does not wait for the export of another."""
    one, other = holder(), holder()
    one.take("shared")
    other.take("shared")
    one.free()
    other.free()


def test_devices_have_leases_of_their_own(holder: Callable[[], Holder]) -> None:
    """A timed run on the GPU leaves the CPU to others."""
    one, other = holder(), holder()
    one.take("alone", "gpu")
    other.take("alone", "cpu")


def test_a_killed_holder_frees_the_device(holder: Callable[[], Holder]) -> None:
    """The kernel releases the lease, however its holder dies."""
    ghost, later = holder(), holder()
    ghost.take("alone")
    later.ask("alone")
    later.wait_in_line()
    ghost.process.kill()
    assert later.says() == "holds"


def test_an_exception_frees_the_device(holder: Callable[[], Holder]) -> None:
    """Alone or shared, leaving the block by an error is leaving it."""
    for alone in (True, False):
        with pytest.raises(ValueError, match="inside"), device_lease("cpu", alone=alone):
            raise ValueError("inside")
    holder().take("alone")


def test_a_timed_run_is_not_starved_by_preparations(holder: Callable[[], Holder]) -> None:
    """While one waits for the device, preparations that come later stay behind it."""
    preparing, timed, newcomer = holder(), holder(), holder()
    preparing.take("shared")
    timed.ask("alone")
    timed.wait_in_line()
    newcomer.ask("shared")
    newcomer.wait_in_line()
    preparing.free()
    assert timed.says() == "holds"
    assert newcomer.waits
    timed.free()
    assert newcomer.says() == "holds"


def test_the_lease_is_one_per_user_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every study of a user on a host must use the same files, and nobody else may open them."""
    with device_lease("cpu", alone=True):
        assert lease_directory().stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv("AUTOGLM_LEASE_DIR")
    assert lease_directory().name == f"open-autoglm-{os.getuid()}"


@pytest.mark.parametrize("shared", [False, True])
def test_a_file_lock_refuses_instead_of_waiting_if_asked_to(tmp_path: Path, shared: Any) -> None:
    """An exclusive holder excludes both kinds."""
    path = tmp_path / "deep" / "lock"
    with file_lock(path), pytest.raises(BlockingIOError), file_lock(path, shared=shared, blocking=False):
        pass
