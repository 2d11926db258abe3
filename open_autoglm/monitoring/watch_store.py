"""What a service's watch remembers, on disk: ``AUTOGLM_HOME/watch/SERVICE``.

``memory.json`` and ``baselines/`` are replaced whole; ``judgements.jsonl`` grows by a line at each look. A
power cut may tear its last line, which is then left out; a full disk is a reason and no exception.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from pydantic import AwareDatetime, Field

from open_autoglm.files import digest_of, file_lock, write_atomic
from open_autoglm.monitoring.baseline import Baseline
from open_autoglm.monitoring.judge import LEVEL, JudgeState
from open_autoglm.monitoring.lesson import Lesson
from open_autoglm.schemas.base import FORMAT_VERSION, Model
from open_autoglm.schemas.watch import EndpointProbe, Judgement, LatencyWindow

_MOST_HISTORY_BYTES = 32 * 2**20
"""About three months of a look every quarter of an hour; the three before are kept, too."""

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class Memory(Model):
    """What is known between two looks."""

    format_version: int = FORMAT_VERSION
    state: JudgeState = JudgeState()
    lesson: Lesson = Lesson()
    due: AwareDatetime | None = Field(None, description="when it was found that there is something to do")


class Remembered(NamedTuple):
    """The memory, or an empty one and why."""

    memory: Memory
    problem: str | None = None


class WatchStore:
    """Of one service. ``home`` is made when something is written."""

    def __init__(self, home: Path, service: str) -> None:
        self._folder = home / "watch" / _file_name(service)

    @property
    def history_file(self) -> Path:
        return self._folder / "judgements.jsonl"

    def lock(self) -> AbstractContextManager[None]:
        """Held for the time of a look. Raises OSError where nothing can be written at all."""
        return file_lock(self._folder / "lock")

    # ── what is replaced ─────────────────────────────────────────────────────────────────────────

    def memory(self) -> Remembered:
        """Begins anew if it cannot be read: a cool-down is then forgotten, and said to be."""
        path = self._folder / "memory.json"
        try:
            return Remembered(Memory.model_validate_json(path.read_bytes()))
        except FileNotFoundError:
            return Remembered(Memory())
        except (OSError, ValueError) as error:
            problem = f"{path} cannot be read and is begun anew: {_first_line(error)}"
            return Remembered(Memory(), problem)

    def baseline(self, window: LatencyWindow) -> Baseline | None:
        """Of the version and the bundle that ``window`` is of; None if it has none that can be read."""
        path = self._baseline_file(window.version, window.bundle_digest)
        try:
            return Baseline.model_validate_json(path.read_bytes())
        except (OSError, ValueError):  # absent, or another format's: it is learned again
            return None

    def keep(self, memory: Memory, learned: Baseline | None) -> str | None:
        """Write both; why that is not possible, in words."""
        try:
            if learned is not None:
                self._write_baseline(learned)
            write_atomic(self._folder / "memory.json", memory.model_dump_json())
        except OSError as error:
            return f"this look cannot be remembered, so nothing is done about it: {_first_line(error)}"
        return None

    def answered(self, again: datetime | None = None) -> str | None:
        """What was to be done is done, or begun; why that cannot be remembered, in words.

        If that was nothing, the next act may come at ``again``, and need not wait for a whole cool-down.
        """
        try:
            with self.lock():
                memory = self.memory().memory
                if memory.due is None:
                    return None
                cool_until = memory.state.cool_until
                if cool_until is not None and again is not None:
                    cool_until = min(cool_until, again)
                state = memory.state.model_copy(update={"cool_until": cool_until})
                return self.keep(memory.model_copy(update={"due": None, "state": state}), None)
        except OSError as error:
            return f"{self._folder} cannot be locked: {_first_line(error)}"

    def keep_baseline(self, baseline: Baseline) -> str | None:
        """One that was learned elsewhere; why that is not possible, in words."""
        try:
            self._write_baseline(baseline)
        except OSError as error:
            return f"its registered baseline cannot be kept: {_first_line(error)}"
        return None

    def _write_baseline(self, baseline: Baseline) -> None:
        file = self._baseline_file(baseline.version, baseline.bundle_digest)
        write_atomic(file, baseline.model_dump_json())

    def _baseline_file(self, version: str, digest: str) -> Path:
        """Labels come from whoever answers at the address, so they name no path."""
        return (
            self._folder / "baselines" / f"{_file_name(version or 'unregistered')}-{_file_name(digest)}.json"
        )

    # ── good times ───────────────────────────────────────────────────────────────────────────────

    def probe(self, digest: str) -> EndpointProbe | None:
        """Of the bundle when nothing was wrong with it; None if none was taken that can be read."""
        try:
            return EndpointProbe.model_validate_json(self._probe_file(digest).read_bytes())
        except (OSError, ValueError):
            return None

    def probe_age_s(self, digest: str, now: datetime) -> float:
        """Since it was kept, or confirmed; infinite without one."""
        try:
            return now.timestamp() - self._probe_file(digest).stat().st_mtime
        except OSError:
            return math.inf

    def keep_probe(self, probe: EndpointProbe) -> str | None:
        """Write it; why that is not possible, in words."""
        try:
            write_atomic(self._probe_file(probe.bundle_digest), probe.model_dump_json())
        except OSError as error:
            return f"the probe cannot be kept: {_first_line(error)}"
        return None

    def _probe_file(self, digest: str) -> Path:
        return self._folder / "probes" / f"{_file_name(digest)}.json"

    def good_window(self, digest: str, confirm: int) -> LatencyWindow | None:
        """The last one of this bundle before the breach there is, if any, began to show.

        A breach shows in ``confirm`` windows before it is called one, and those before the last of them are
        still `ok`; a small shift shows in more, from where its cumulative sum has left zero. Windows that
        said nothing may lie between.
        """
        known = [
            one
            for one in self.history()
            if one.state != "no_data" and one.window and one.window.bundle_digest == digest
        ]
        healthy = len(known)
        while healthy and known[healthy - 1].state == "breached":
            healthy -= 1
        if healthy < len(known):
            healthy -= confirm - 1
        good = [one for one in known[: max(healthy, 0)] if one.state == "ok"]
        unmoved = (one.window for one in reversed(good) if not _has_begun_to_shift(one))
        return next(unmoved, good[-1].window if good else None)

    # ── what grows ───────────────────────────────────────────────────────────────────────────────

    def append(self, judgement: Judgement) -> str | None:
        """Add it to the history; why that is not possible, in words."""
        line = judgement.model_dump_json() + "\n"
        try:
            self._turn_over()
            self.history_file.parent.mkdir(parents=True, exist_ok=True)
            with self.history_file.open("ab+") as file:
                if _is_torn(file.tell(), self.history_file):
                    file.write(b"\n")
                file.write(line.encode())
        except OSError as error:
            return f"the history cannot be written: {_first_line(error)}"
        return None

    def history(self) -> Iterator[Judgement]:
        """Oldest first. What cannot be read, is torn, or is of another format is left out."""
        for path in (self._older_file, self.history_file):
            with suppress(OSError), path.open("rb") as file:
                for line in file:
                    with suppress(ValueError):
                        yield Judgement.model_validate_json(line)

    @property
    def _older_file(self) -> Path:
        return self._folder / "judgements.older.jsonl"

    def _turn_over(self) -> None:
        if self.history_file.exists() and self.history_file.stat().st_size > _MOST_HISTORY_BYTES:
            self.history_file.replace(self._older_file)


def _has_begun_to_shift(judgement: Judgement) -> bool:
    levels = (value for name, value in judgement.figures.items() if name.endswith(LEVEL))
    return any(level > 0 for level in levels)


def _is_torn(size: int, path: Path) -> bool:
    """Whether the last line has no end."""
    if size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _file_name(label: str) -> str:
    return label if _PLAIN_NAME.fullmatch(label) else digest_of(label)[:16]


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
