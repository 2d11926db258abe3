"""What of the host could make an engine slower than it was, and by how much at most.

An engine's threads wait for one another at the end of every layer, so it is as slow as its slowest core: who
takes a share ``s`` of one core can make it ``1 / (1 - s)`` times as slow, however many cores there are. That
is a bound. Whether the engine did become slower is not asked here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from open_autoglm.schemas import (
    FOREIGN_CPU_LIMIT,
    SLOW_CLOCK_LIMIT,
    STEAL_LIMIT,
    EndpointProbe,
    GpuConditions,
    HostProbe,
)

MOST_LOST = 0.9
"""The largest share of a core that is believed to be lost: the scheduler gives everybody something."""

_STALL_LIMIT = 0.05
"""Share of the time below which waiting for memory or a quota is no sign."""
_SWAPPED_PAGE_S = 1e-4
"""What reading a page back from a fast disk takes, where the kernel does not tell who waited."""


class Sign(NamedTuple):
    """Something that is not as it was."""

    told: str
    factor: float
    """How many times as slow it can make the engine; infinite if there is no telling."""


def signs_of(probe: EndpointProbe, baseline: EndpointProbe | None) -> tuple[Sign, ...]:
    """What differs from ``baseline``; without its host, or without it, what should not be at all."""
    found = [Sign(told, math.inf) for told in changed_settings(probe, baseline)]
    if probe.host is not None:
        before = baseline.host if baseline else None
        found += [*_taken(probe.host, before), *_clocks(probe.host, before), *_gpus(probe.host, before)]
    return tuple(found)


def changed_settings(probe: EndpointProbe, baseline: EndpointProbe | None) -> tuple[str, ...]:
    """Of host and libraries, as far as both tell them."""
    then = baseline.settings if baseline else {}
    return tuple(
        f"{name.replace('_', ' ')} was {then[name]} and is {value}"
        for name, value in probe.settings.items()
        if then.get(name, value) != value
    )


# ── cores and memory ─────────────────────────────────────────────────────────────────────────────


def _taken(now: HostProbe, before: HostProbe | None) -> Iterator[Sign]:
    """Time that somebody else had, beyond what they had then."""
    stolen = _more(now.conditions.steal_cores, before.conditions.steal_cores if before else None)
    foreign = _more(now.conditions.foreign_cores, before.conditions.foreign_cores if before else None)
    others = foreign - stolen  # steal counts as foreign there
    if stolen > STEAL_LIMIT:
        yield Sign(f"the hypervisor took {stolen:.2f} cores", _slower(stolen))
    if others > FOREIGN_CPU_LIMIT:
        who = f", most of it {now.busiest} ({now.busiest_cores:.2f})" if now.busiest else ""
        yield Sign(f"other processes took {others:.2f} cores{who}", _slower(others))
    throttled = _more(now.throttled_share, before.throttled_share if before else None)
    if throttled > _STALL_LIMIT:
        yield Sign(f"its CPU quota was used up in {throttled:.0%} of the periods", _slower(throttled))
    waited = _more(_memory_wait(now), _memory_wait(before) if before else None)
    if waited > _STALL_LIMIT:
        yield Sign(f"somebody waited for memory in {waited:.0%} of the time", _slower(waited))


def _memory_wait(host: HostProbe) -> float:
    """Share of the time: as the kernel tells it, or at least what the swapped pages took."""
    swapping = host.conditions.swapped_pages * _SWAPPED_PAGE_S / host.seconds
    return max(host.memory_pressure_share or 0.0, min(swapping, 1.0))


def _more(now: float | None, before: float | None) -> float:
    return max((now or 0.0) - (before or 0.0), 0.0)


def _slower(lost: float) -> float:
    return 1 / (1 - min(lost, MOST_LOST))


# ── clocks ───────────────────────────────────────────────────────────────────────────────────────


def _clocks(now: HostProbe, before: HostProbe | None) -> Iterator[Sign]:
    share = now.conditions.clock_share
    if before and before.clock_mhz and now.clock_mhz:
        share = now.clock_mhz / before.clock_mhz
    if share is not None and share < SLOW_CLOCK_LIMIT:
        yield Sign(f"the clock fell to {share:.0%}", 1 / share)
    if share is None and (events := _more(now.thermal_events, before.thermal_events if before else None)):
        yield Sign(f"heat slowed its cores {events:.0f} times", math.inf)


def _gpus(now: HostProbe, before: HostProbe | None) -> Iterator[Sign]:
    then = dict(enumerate(before.gpus if before else ()))
    for number, gpu in enumerate(now.gpus):
        yield from _gpu(gpu, then.get(number))


def _gpu(now: GpuConditions, before: GpuConditions | None) -> Iterator[Sign]:
    if strangers := sorted(set(now.foreign_processes) - set(before.foreign_processes if before else ())):
        yield Sign(f"{now.name} also computes for {', '.join(strangers)}", math.inf)
    why = f" ({', '.join(now.slowed_by)})" if now.slowed_by else ""
    if before is None and now.slowed_by:
        yield Sign(f"{now.name} is slowed{why}", math.inf)
    if before is not None and now.clock_mhz < SLOW_CLOCK_LIMIT * before.clock_mhz:
        told = f"{now.name} runs at {now.clock_mhz} MHz instead of {before.clock_mhz}{why}"
        yield Sign(told, before.clock_mhz / max(now.clock_mhz, 1))
