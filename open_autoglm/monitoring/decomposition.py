"""Where the milliseconds of a slower answer come from.

The mean time of an answer is a sum, exactly, and each of its terms a product:

    e2e  =  queue  +  prompt tokens × ms to read one  +  output tokens × ms to write one

So the change between two windows can be shared out among what changed and nothing is left over. For a product
the logarithmic mean does it: if ``y = a·b``, then ``y' - y = L(y, y')·ln(a'/a) + L(y, y')·ln(b'/b)`` with
``L(y, y') = (y' - y) / ln(y'/y)``. It is exact, and it says the same forwards and backwards (Ang, "The LMDI
approach to decomposition analysis: a practical guide", *Energy Policy* 33, 2005).

What a token takes changes for two reasons. The engine alone may have become slower, which the golden requests
show: they are answered while nobody else is. The rest is company: requests that share the engine's calls.
Company and queue have no cause of their own. They grow with the offered load,

    load  =  arrivals per second  ×  work of a request  ×  time the engine needs for that work

which is a product again, so what they cost is shared out among its factors by their logarithms.

An endpoint so busy that it is never alone cannot be timed alone. Then the load itself tells: of requests that
share one server there are ``load / (1 - load)`` at a time on the mean, however long each is (Kleinrock,
*Queueing Systems* II, 1976, 4.4), and there are arrivals per second times seconds of an answer (Little). From
the loads of both windows, arrivals and work, the third factor follows. Calls that answer several requests at
once are cheaper than one call for each; so this finds rather too little slowness than too much.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

from open_autoglm.schemas import LatencyWindow, Stage

Driver = Literal["arrivals", "mix", "speed"]

_LEAST_MS = 1e-3
"""Means of different requests are subtracted (who has a first token need not have a last one): what comes out
below this is none."""


class Figures(NamedTuple):
    """A window per request: means, since only means can be added."""

    queue_ms: float
    read_ms: float
    write_ms: float
    read_tokens: float
    """Of a prompt, without those that were in the cache."""
    written_tokens: float
    """After the first."""
    arrivals_per_s: float
    """Those that were refused included: they came."""
    requests: int

    @property
    def e2e_ms(self) -> float:
        return self.queue_ms + self.read_ms + self.write_ms

    @property
    def load(self) -> float:
        """Of the requests at a time, by sharing: from 0 to 1."""
        present = self.arrivals_per_s * self.e2e_ms / 1000
        return present / (1 + present)

    @property
    def read_ms_per_token(self) -> float:
        return self.read_ms / self.read_tokens

    @property
    def write_ms_per_token(self) -> float:
        return self.write_ms / self.written_tokens

    def stage_ms(self, stage: Stage) -> float:
        """What the decomposition of a stage starts from; of `tpot` all tokens together."""
        terms = {"queue": self.queue_ms, "read": self.read_ms, "write": self.write_ms}
        return sum(terms[name] for name in _TERMS[stage])


_TERMS: Mapping[Stage, tuple[Literal["queue", "read", "write"], ...]] = {
    "e2e": ("queue", "read", "write"),
    "ttft": ("queue", "read"),
    "tpot": ("write",),
    "queue": ("queue",),
}


def figures_of(window: LatencyWindow) -> Figures | None:
    """None if nobody was answered in it."""
    times, prompts, outputs = window.times_ms, window.prompt_tokens, window.output_tokens
    ttft_ms = times["ttft"].mean if "ttft" in times else None
    e2e_ms = times["e2e"].mean if "e2e" in times else None
    arrivals = window.requests + window.refused
    if not (arrivals and ttft_ms and e2e_ms and prompts.mean and outputs.mean):
        return None
    queue_ms = (times["queue"].mean if "queue" in times else None) or 0.0
    return Figures(
        queue_ms=queue_ms,
        read_ms=max(ttft_ms - queue_ms, _LEAST_MS),
        write_ms=max(e2e_ms - ttft_ms, _LEAST_MS),
        read_tokens=max(prompts.mean - window.cached_tokens / prompts.count, 1.0),
        written_tokens=max(outputs.mean - 1, 1e-3),
        arrivals_per_s=arrivals / window.seconds,
        requests=times["e2e"].count,
    )


class Speed(NamedTuple):
    """How many times as long as before the engine alone takes, for a token of each kind."""

    read: float = 1.0
    write: float = 1.0


class Parts(NamedTuple):
    """The change of a stage's mean, in ms per request: all of it."""

    prompt_ms: float
    """More tokens to read."""
    output_ms: float
    """More tokens to write."""
    slower_ms: float
    """The engine alone takes longer for each."""
    company_ms: float
    """It takes longer for each because it does something else between."""
    queue_ms: float

    @property
    def change_ms(self) -> float:
        return sum(self)


def decompose(before: Figures, now: Figures, speed: Speed, stage: Stage = "e2e") -> Parts:
    """What ``now`` takes more than ``before``, term by term."""
    terms = _TERMS[stage]
    reading = log_mean(before.read_ms, now.read_ms) if "read" in terms else 0.0
    writing = log_mean(before.write_ms, now.write_ms) if "write" in terms else 0.0
    prompt_ms = reading * math.log(now.read_tokens / before.read_tokens)
    output_ms = writing * math.log(now.written_tokens / before.written_tokens)
    slower_ms = reading * math.log(speed.read) + writing * math.log(speed.write)
    engaged_ms = now.stage_ms(stage) - before.stage_ms(stage)
    queue_ms = now.queue_ms - before.queue_ms if "queue" in terms else 0.0
    company_ms = engaged_ms - queue_ms - prompt_ms - output_ms - slower_ms
    return Parts(
        prompt_ms=prompt_ms,
        output_ms=0.0 if stage == "tpot" else output_ms,  # of a token, not of an answer
        slower_ms=slower_ms,
        company_ms=company_ms,
        queue_ms=queue_ms,
    )


def load_growth(before: Figures, now: Figures, speed: Speed) -> dict[Driver, float]:
    """The logarithm of how many times as large each factor of the offered load has become."""
    reading = now.read_tokens * before.read_ms_per_token
    writing = now.written_tokens * before.write_ms_per_token
    work = reading + writing
    return {
        "arrivals": math.log(now.arrivals_per_s / before.arrivals_per_s),
        "mix": math.log(work / (before.read_ms + before.write_ms)),
        "speed": math.log((reading * speed.read + writing * speed.write) / work),
    }


def slowness_by_load(before: Figures, now: Figures) -> float:
    """How many times as long the engine takes, if it is that which arrivals and mix leave of the load; at
    least 1."""
    return math.exp(max(0.0, unexplained_growth(before, now, load_growth(before, now, Speed()))))


def unexplained_growth(before: Figures, now: Figures, growth: Mapping[Driver, float]) -> float:
    """The logarithm of how many times as large the load is as its factors make it."""
    return math.log(now.load / before.load) - sum(growth.values())


def chance_of_growth(before: Figures, now: Figures) -> float:
    """By how much, as a logarithm, arrivals and mean lengths differ between two windows by chance: two
    standard errors, if requests arrive at random and lengths spread as widely as they are long."""
    return 2 * math.sqrt(1 / max(before.requests, 1) + 1 / max(now.requests, 1))


def log_mean(one: float, other: float) -> float:
    """The logarithmic mean of two positive numbers: between the geometric and the arithmetic one."""
    ratio = math.log(other / one)
    return one if abs(ratio) < 1e-9 else (other - one) / ratio
