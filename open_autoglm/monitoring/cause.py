"""Why an answer takes longer than it did: load, environment, traffic mix, or the engine.

In this order, each step resting on the one before:

1. Did the mean rise at all, by more than windows differ anyway?
2. Is the engine slower when it is alone? The golden requests say so, since nobody else is answered then.
3. Of the rise, how much is each term's, and each factor's (:mod:`open_autoglm.monitoring.decomposition`)?
4. Of what is the engine's, how much could the host have done (:mod:`open_autoglm.monitoring.signs`)?
5. The cause is what explains most. If that is not much of it, or if more is left unexplained, there is none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from open_autoglm.monitoring.decomposition import (
    Driver,
    Figures,
    Parts,
    Speed,
    chance_of_growth,
    decompose,
    figures_of,
    load_growth,
    slowness_by_load,
    unexplained_growth,
)
from open_autoglm.monitoring.golden_ratios import GoldenRatios, golden_ratios
from open_autoglm.monitoring.policy import CausePolicy
from open_autoglm.monitoring.signs import Sign, signs_of
from open_autoglm.schemas import Cause, CauseKind, EndpointProbe, LatencyWindow, Stage
from open_autoglm.units import quantity

_NOUNS: Mapping[Stage, str] = {
    "e2e": "an answer",
    "ttft": "a first token",
    "tpot": "writing what follows the first token",
    "queue": "the wait for a slot",
}


def name_cause(
    before: LatencyWindow,
    now: LatencyWindow,
    probe: EndpointProbe,
    baseline: EndpointProbe | None = None,
    *,
    stage: Stage = "e2e",
    policy: CausePolicy | None = None,
) -> Cause:
    """Why ``stage`` takes longer in ``now`` than in ``before``, a window of the same version in good times.

    ``probe`` was taken just after ``now``, ``baseline`` when nothing was wrong; with none, or with the
    study's figures, only a gross slowdown of the engine shows. The first call imports SciPy, a second.
    """
    policy = policy or CausePolicy()
    was, is_now = figures_of(before), figures_of(now)
    if was is None or is_now is None:
        return Cause(kind="unknown", told="nobody was answered: there is nothing to compare", evidence={})
    case = _Case(was, is_now, stage, probe, baseline, policy)
    evidence = {**_window_evidence(before, now, was, is_now), **case.evidence()}
    kind, told = case.verdict(refused=(before.refused, now.refused))
    return Cause(kind=kind, told=told + _rehearsed(probe), evidence=evidence)


def _rehearsed(probe: EndpointProbe) -> str:
    """A rehearsal is judged as if it were none, and whoever reads of it knows."""
    if not probe.slowed_share:
        return ""
    return f"; it is a rehearsal: `open-autoglm slow` made the engine {probe.slowed_share:.0%} slower"


# ── the case ─────────────────────────────────────────────────────────────────────────────────────

_SpeedFrom = Literal["golden requests", "load", "signs on the host", "not known"]


class _Case:
    """One breach, taken apart."""

    def __init__(
        self,
        before: Figures,
        now: Figures,
        stage: Stage,
        probe: EndpointProbe,
        baseline: EndpointProbe | None,
        policy: CausePolicy,
    ) -> None:
        self.before, self.now, self.stage, self.policy = before, now, stage, policy
        self.probe, self.baseline = probe, baseline
        self.golden = golden_ratios(probe, baseline, policy)
        self.signs = signs_of(probe, baseline)
        self.floor = max(policy.least_growth, chance_of_growth(before, now))
        self.speed, self.speed_from = self._speed()
        self.parts = decompose(before, now, self.speed, stage)
        self.growth = load_growth(before, now, self.speed)
        self.explained_ms = self._explain()

    def _speed(self) -> tuple[Speed, _SpeedFrom]:
        """How much slower the engine alone is, and how that is known.

        A window that began before the trouble did shows less of it than the probe: never more than the window
        shows is the engine's.
        """
        slower = Speed(
            max(1.0, self.now.read_ms_per_token / self.before.read_ms_per_token),
            max(1.0, self.now.write_ms_per_token / self.before.write_ms_per_token),
        )
        if self.golden is not None and self.golden.tells:
            return _lesser(self.golden.speed, slower), "golden requests"
        if self._never_alone():
            ratio = slowness_by_load(self.before, self.now)
            ratio = ratio if math.log(ratio) > self.floor else 1.0
            return _lesser(Speed(ratio, ratio), slower), "load"
        if self.signs and not self._traffic_grew():
            most = math.prod(sign.factor for sign in self.signs)
            return _lesser(Speed(most, most), slower), "signs on the host"
        return Speed(), "not known"

    def _never_alone(self) -> bool:
        """Whether clients kept the probe from timing enough golden requests."""
        golden, policy = self.probe.golden, self.policy
        if golden is None or len(golden.ttft_ms) >= policy.golden_samples:
            return False
        return golden.busy_share > policy.busy_share

    def _traffic_grew(self) -> bool:
        growth = load_growth(self.before, self.now, Speed())
        return max(growth["arrivals"], growth["mix"]) > self.floor

    def _explain(self) -> dict[CauseKind, float]:
        """The ms per request that each cause stands for: together, all of the change."""
        parts = self.parts
        crowd = self._share_out_crowd(parts)
        own_ms = parts.slower_ms + crowd["speed"]
        hosts_ms = own_ms * self._share_of_host()
        return {
            "load": crowd["arrivals"],
            "environment": hosts_ms,
            "mix": parts.prompt_ms + parts.output_ms + crowd["mix"],
            "engine": own_ms - hosts_ms,
            "unknown": parts.queue_ms + parts.company_ms - sum(crowd.values()),
        }

    def _share_out_crowd(self, parts: Parts) -> dict[Driver, float]:
        """What queue and company cost, by what made the load grow.

        What no factor explains is called load as far as requests waited, since then they came closer
        together; tokens that only took longer are nobody's.
        """
        crowd_ms = parts.queue_ms + parts.company_ms
        shares: dict[Driver, float] = {"arrivals": 0.0, "mix": 0.0, "speed": 0.0}
        if crowd_ms <= 0:
            return shares | {"arrivals": crowd_ms}
        floors: dict[Driver, float] = {"arrivals": self.floor, "mix": self.floor, "speed": 0.0}
        rising = {driver: grown for driver, grown in self.growth.items() if grown > floors[driver]}
        rest = unexplained_growth(self.before, self.now, self.growth)
        whole = sum(rising.values()) + (rest if rest > self.floor else 0.0)
        shares |= {driver: crowd_ms * grown / whole for driver, grown in rising.items()}
        waited_ms = min(max(parts.queue_ms, 0.0), crowd_ms)
        shares["arrivals"] += waited_ms * (1 - sum(shares.values()) / crowd_ms)
        return shares

    def _share_of_host(self) -> float:
        """Of the engine's slowness, what the host could have done."""
        slower = self.growth["speed"]
        could = sum(math.log(sign.factor) for sign in self.signs)
        return min(1.0, could / slower) if slower > 0 else 0.0

    # ── what is said ─────────────────────────────────────────────────────────────────────────────

    def verdict(self, refused: tuple[int, int]) -> tuple[CauseKind, str]:
        noun, change_ms = _NOUNS[self.stage], self.parts.change_ms
        if change_ms < self.policy.least_change * self.before.stage_ms(self.stage):
            if refused[1] > refused[0]:
                return self._of_refusals(*refused)
            return "unknown", f"{noun} takes {_ms(change_ms)} more on the mean, which may be chance"
        known = {kind: ms for kind, ms in self.explained_ms.items() if kind != "unknown"}
        kind = max(known, key=lambda kind: known[kind])
        share = known[kind] / sum(ms for ms in self.explained_ms.values() if ms > 0)
        of_it = f"{_ms(max(known[kind], 0))} of the {_ms(change_ms)} that {noun} takes more on the mean"
        unexplained_ms = self.explained_ms["unknown"]
        if share < self.policy.least_share or unexplained_ms > known[kind]:
            told = f"{_ms(max(unexplained_ms, 0))} of the {_ms(change_ms)} that {noun} takes more on the mean"
            return (
                "unknown",
                f"{told} have no cause that is seen; the likeliest, {kind}, explains {share:.0%}",
            )
        if kind == "engine" and self.probe.host is None:
            return "unknown", f"{of_it}: {self._slower_words()}, but nobody looked at the host"
        return kind, f"{of_it}: {self._why(kind)}"

    def _of_refusals(self, before: int, now: int) -> tuple[CauseKind, str]:
        """Who was answered waited no longer, but more were turned away: what made the load grow?"""
        driver = max(self.growth, key=lambda driver: self.growth[driver])
        kinds: dict[Driver, CauseKind] = {"arrivals": "load", "mix": "mix", "speed": "engine"}
        kind = kinds[driver] if self.growth[driver] > self.floor else "load"
        if kind == "engine" and self._share_of_host() > 0.5:
            kind = "environment"
        return kind, f"{now} requests were refused instead of {before}: {self._why(kind)}"

    def _why(self, kind: CauseKind) -> str:
        before, now = self.before, self.now
        if kind == "load":
            rates = f"{now.arrivals_per_s:.3g} requests a second instead of {before.arrivals_per_s:.3g}"
            more = self.growth["arrivals"] > self.floor
            return (
                f"there are {rates}" if more else f"requests come closer together, though there are {rates}"
            )
        if kind == "mix":
            return (
                f"a request has {now.read_tokens:.0f} tokens to read instead of {before.read_tokens:.0f} and "
                f"{now.written_tokens:.0f} to write after the first instead of {before.written_tokens:.0f}"
            )
        if kind == "environment":
            return "; ".join(sign.told for sign in self.signs)
        return f"{self._slower_words()}, and the host does not explain it"

    def _slower_words(self) -> str:
        if self.golden is None or not self.golden.tells:
            load = f"{self.now.load:.0%} instead of {self.before.load:.0%}"
            return f"it is never alone, and its load ({load}) is more than arrivals and lengths explain"
        ratios = (self.golden.ttft, self.golden.tpot, self.golden.e2e)
        surest = max((one for one in ratios if one), key=lambda one: one.low)
        return (
            f"alone it takes {surest.middle:.2f} times as long for the golden requests "
            f"({surest.low:.2f} to {surest.high:.2f})"
        )

    def evidence(self) -> dict[str, float | str]:
        found: dict[str, float | str] = {"speed_known_by": self.speed_from}
        for kind, ms in self.explained_ms.items():
            found["unexplained_ms" if kind == "unknown" else f"{kind}_ms"] = ms
        found |= self.parts._asdict()
        found |= {f"{driver}_growth_log": grown for driver, grown in self.growth.items()}
        found["growth_by_chance_log"] = self.floor
        return found | _golden_evidence(self.golden, self.probe) | _host_evidence(self.probe, self.signs)


def _lesser(one: Speed, other: Speed) -> Speed:
    return Speed(min(one.read, other.read), min(one.write, other.write))


def _ms(value: float) -> str:
    return quantity(value, "ms")


# ── evidence ─────────────────────────────────────────────────────────────────────────────────────


def _window_evidence(
    before: LatencyWindow, now: LatencyWindow, was: Figures, is_now: Figures
) -> dict[str, float | str]:
    found: dict[str, float | str] = {}
    for word, window, figures in (("before", before, was), ("now", now, is_now)):
        found |= {
            f"e2e_{word}_ms": figures.e2e_ms,
            f"queue_{word}_ms": figures.queue_ms,
            f"read_{word}_ms_per_token": figures.read_ms_per_token,
            f"write_{word}_ms_per_token": figures.write_ms_per_token,
            f"read_{word}_tokens": figures.read_tokens,
            f"written_{word}_tokens": figures.written_tokens,
            f"arrivals_{word}_per_s": figures.arrivals_per_s,
            f"requests_{word}": window.requests,
            f"refused_{word}": window.refused,
            f"failed_{word}": window.failed,
            f"restarts_{word}": window.restarts,
        }
    return found


def _golden_evidence(ratios: GoldenRatios | None, probe: EndpointProbe) -> dict[str, float | str]:
    found: dict[str, float | str] = {}
    if (golden := probe.golden) is not None:
        found |= {
            "golden_samples": len(golden.ttft_ms),
            "golden_waits": golden.waits,
            "golden_gave_way": golden.gave_way,
            "golden_busy_share": golden.busy_share,
        }
        found |= {"golden_ended": golden.ended} if golden.ended else {}
    named = {"ttft": ratios.ttft, "tpot": ratios.tpot, "e2e": ratios.e2e} if ratios else {}
    for name, ratio in named.items():
        if ratio is not None:
            found[f"golden_{name}_ratio"] = ratio.middle
            found |= {f"golden_{name}_ratio_low": ratio.low, f"golden_{name}_ratio_high": ratio.high}
    return found


def _host_evidence(probe: EndpointProbe, signs: Sequence[Sign]) -> dict[str, float | str]:
    found: dict[str, float | str] = {f"sign_{number}": sign.told for number, sign in enumerate(signs, 1)}
    found |= {"slowed_on_purpose_share": probe.slowed_share} if probe.slowed_share else {}
    if (host := probe.host) is None:
        return found
    figures = {
        "foreign_cores": host.conditions.foreign_cores,
        "steal_cores": host.conditions.steal_cores,
        "swapped_pages": host.conditions.swapped_pages,
        "own_cores": host.own_cores,
        "busiest_foreign_process": host.busiest or None,
        "busiest_foreign_cores": host.busiest_cores,
        "clock_mhz": host.clock_mhz,
        "thermal_events": host.thermal_events,
        "throttled_share": host.throttled_share,
        "cpu_pressure_share": host.cpu_pressure_share,
        "memory_pressure_share": host.memory_pressure_share,
        "probe_s": host.seconds,
    }
    return found | {name: value for name, value in figures.items() if value is not None}
