"""Whether the engine is slower when it is alone: the golden requests now, beside those in good times."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from open_autoglm.measure.statistics import median_ratio
from open_autoglm.monitoring.decomposition import Speed
from open_autoglm.monitoring.policy import CausePolicy
from open_autoglm.schemas import EndpointProbe, GoldenTimes


class Ratio(NamedTuple):
    """How many times as long something takes."""

    middle: float
    low: float
    high: float

    def beyond(self, tolerance: float) -> float:
        """The ratio, if all of its interval is over what is tolerated; else 1."""
        return self.middle if self.low > 1 + tolerance else 1.0


class GoldenRatios(NamedTuple):
    """Of the golden requests' times, now to then."""

    ttft: Ratio
    tpot: Ratio | None
    e2e: Ratio | None
    reading: float
    """Share of the whole time that was the first token's."""
    tolerance: float
    same_host: bool
    """Both were taken by a probe."""

    @property
    def speed(self) -> Speed:
        """Of reading and writing, each by itself.

        Where that explains less than the whole has become slower beyond doubt, the whole decides for both:
        a server that gets little time finds several tokens at once, and when each came is lost.
        """
        read = self.ttft.beyond(self.tolerance)
        write = self.tpot.beyond(self.tolerance) if self.tpot else 1.0
        explained = self.reading * read + (1 - self.reading) * write
        if self.e2e is None or self.e2e.low <= max(explained, 1 + self.tolerance):
            return Speed(read, write)
        return Speed(self.e2e.middle, self.e2e.middle)

    @property
    def tells(self) -> bool:
        """The study's figures can show that the engine is slower, but not that it is not."""
        return self.same_host or self.speed != Speed()


def golden_ratios(
    probe: EndpointProbe, baseline: EndpointProbe | None, policy: CausePolicy
) -> GoldenRatios | None:
    """None if there were too few golden requests, or none of that bundle and shape to compare them with."""
    if baseline is None or baseline.bundle_digest != probe.bundle_digest:
        return None
    now, then = probe.golden, baseline.golden
    if now is None or then is None or _shape(now) != _shape(then):
        return None
    if len(now.ttft_ms) < policy.golden_samples or not then.ttft_ms:
        return None
    same_host = baseline.source == "probe"
    return GoldenRatios(
        ttft=_ratio(now.ttft_ms, then.ttft_ms),
        tpot=_ratio(now.tpot_ms, then.tpot_ms) if now.tpot_ms and then.tpot_ms else None,
        e2e=_ratio(now.e2e_ms, then.e2e_ms) if now.e2e_ms and then.e2e_ms else None,
        reading=min(median(then.ttft_ms) / median(then.e2e_ms), 1.0) if then.e2e_ms else 1.0,
        tolerance=policy.golden_tolerance if same_host else policy.study_tolerance,
        same_host=same_host,
    )


def _shape(golden: GoldenTimes) -> tuple[int, int]:
    return golden.prompt_tokens, golden.output_tokens


def _ratio(now_ms: Sequence[float], then_ms: Sequence[float]) -> Ratio:
    middle, (low, high) = median_ratio(now_ms, then_ms)
    return Ratio(middle, low, high)
