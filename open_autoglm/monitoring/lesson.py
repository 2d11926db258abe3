"""How a version's baseline comes about: from its first healthy windows, and again when more are known.

The first lesson is a day, since a night says nothing of the day's load. Each further one is twice as long, up
to a week, after which a baseline stays: one that always followed would take any slow decline for healthy.
What it has not seen by then, such as other lengths, is added when a day of it has come.
"""

from __future__ import annotations

from pydantic import Field

from open_autoglm.monitoring.baseline import Baseline, Observation, learn, observe
from open_autoglm.monitoring.noise import LEAST_WINDOWS
from open_autoglm.schemas.base import FORMAT_VERSION, Model
from open_autoglm.schemas.watch import Judgement

_DOUBLINGS = 3
_MOST_WEEKS = 4
"""Of a lesson, with all that was added: after as much, what still is new will never be usual."""


class Lesson(Model):
    """What has been seen of one version so far."""

    format_version: int = FORMAT_VERSION
    version: str = ""
    bundle_digest: str = ""
    observations: tuple[Observation, ...] = Field((), description="of healthy windows, oldest first")


def attend(lesson: Lesson, judgement: Judgement, baseline: Baseline | None, day: int) -> Lesson:
    """The lesson with the judged window added, if it was healthy and there is something to learn from it.

    ``day`` is the number of windows of the first lesson.
    """
    window = judgement.window
    if window is None or judgement.state != "ok":
        return lesson
    if (window.version, window.bundle_digest) != (lesson.version, lesson.bundle_digest):
        lesson = Lesson(version=window.version, bundle_digest=window.bundle_digest)
    seen = observe(window)
    if seen is None:
        return lesson
    enough = _week(day) if _known(baseline, seen) else _MOST_WEEKS * _week(day)
    if len(lesson.observations) >= enough:
        return lesson
    return lesson.model_copy(update={"observations": (*lesson.observations, seen)})


def next_baseline(before: Lesson, after: Lesson, service: str, day: int) -> Baseline | None:
    """A new baseline, if with the last window a lesson has become complete."""
    count = len(after.observations)
    if after == before or not _complete(count, day):
        return None
    return learn(service, after.version, after.bundle_digest, after.observations)


def _complete(count: int, day: int) -> bool:
    if count <= _week(day):
        return count in (*(day * 2**n for n in range(_DOUBLINGS)), _week(day)) and count >= LEAST_WINDOWS
    return (count - _week(day)) % day == 0


def _week(day: int) -> int:
    return 7 * day


def _known(baseline: Baseline | None, seen: Observation) -> bool:
    return baseline is None or all(
        baseline.stages[watched].covers(seen.features(watched))
        for watched in seen.engine_ms
        if watched in baseline.stages
    )
