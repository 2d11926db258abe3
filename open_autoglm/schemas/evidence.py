"""What was measured: rounds and figures, differences and their noise, races, memory and quality."""

from __future__ import annotations

import math
from statistics import median
from typing import Literal

from pydantic import Field

from open_autoglm.schemas.base import Model, Phase

FOREIGN_CPU_LIMIT = 0.05
"""Cores taken by other processes above which a round is disturbed."""
STEAL_LIMIT = 0.05
"""Cores the hypervisor gave away above which a round is disturbed."""
SLOW_CLOCK_LIMIT = 0.9
"""Share of the highest clock seen below which a round is disturbed."""


class Metric(Model):
    """A figure with its evidence. ``values`` keeps the raw samples in the order they were taken."""

    unit: Literal["ms", "tokens/s", "requests/s", "bytes"]
    median: float
    interval: tuple[float, float] = Field(description="95 % confidence interval of the median")
    samples: int
    p50: float
    p90: float
    p95: float
    p99: float
    indicative: tuple[Literal["p90", "p95", "p99"], ...] = Field(
        description="percentiles that too few samples stand behind for them to decide"
    )
    values: tuple[float, ...]


class Conditions(Model):
    """What else the host did during one round."""

    foreign_cores: float = Field(description="cores kept busy by other processes, steal included")
    steal_cores: float = Field(0, description="cores the hypervisor gave to others")
    swapped_pages: int = Field(0, description="pages the host swapped in or out")
    clock_share: float | None = Field(
        None, description="the fastest core's clock / the highest seen; None where the kernel does not tell"
    )

    @property
    def disturbances(self) -> tuple[str, ...]:
        """Why the round is not to be trusted; empty if it is."""
        found = []
        if self.steal_cores > STEAL_LIMIT:
            found.append(f"the hypervisor took {self.steal_cores:.2f} cores")
        elif self.foreign_cores > FOREIGN_CPU_LIMIT:
            found.append(f"other processes took {self.foreign_cores:.2f} cores")
        if self.swapped_pages:
            found.append(f"{self.swapped_pages} pages were swapped")
        if self.clock_share is not None and self.clock_share < SLOW_CLOCK_LIMIT:
            found.append(f"the clock fell to {self.clock_share:.0%}")
        return tuple(found)


class Round(Model):
    """One timed turn of one candidate: one request, or the arrivals of one server round."""

    index: int = Field(description="which of the workload's rounds: the same prompts for every candidate")
    ttft_ms: tuple[float, ...] = Field(description="per request; from its arrival in the server scenario")
    tpot_ms: tuple[float, ...] = Field(description="per request, the first token excluded")
    e2e_ms: tuple[float, ...] = Field(description="per request, from its arrival")
    token_ms: tuple[tuple[float, ...], ...] = Field(description="per request, each token after the first")
    output_tokens: tuple[int, ...] = Field(description="generated per request and row")
    duration_ms: float
    drafted_tokens: tuple[int, ...] = Field((), description="guessed per request, where there are drafts")
    accepted_tokens: tuple[int, ...] = Field((), description="of these, right ones")
    conditions: Conditions
    repeated: bool = Field(False, description="disturbed and run again: kept, but counted in no figure")


class Footprint(Model):
    """Memory of a fresh process that opens a candidate and answers one request; nothing is timed for the
    race meanwhile. Mapped files count as far as they were touched; PSS shares them among processes."""

    peak_rss_bytes: int = Field(description="VmHWM: the most physical memory it held, files included")
    peak_pss_bytes: int = Field(description="the same, but shared pages divided among their users; sampled")
    mapped_file_bytes: int = Field(description="of the sample with the highest RSS, pages of mapped files")
    device_bytes: int | None = Field(None, description="peak memory on a GPU, where there is one")


class Screening(Model):
    """A first look at a candidate, alone in a fresh process: memory, quality on a slice, short prompts."""

    footprint: Footprint
    load_ms: float
    first_request_ms: float = Field(description="compilation and first touch included")
    prompt_tokens: int
    output_tokens: int
    rounds: tuple[Round, ...]
    estimated_e2e_ms: float = Field(description="short rounds scaled to the output length; ranks only")
    facts: dict[str, str]


class Measurements(Model):
    """All rounds of one candidate in one stage, and the figures made of them."""

    metrics: dict[str, Metric]
    rounds: tuple[Round, ...] = Field(description="in the order they were run, repeated ones included")
    warmups: tuple[Round, ...] = Field(description="run before the steady state was found; counted nowhere")
    steady: bool = Field(description="false if the warm-up ended without a steady state")
    output_tokens_ratio: float = Field(description="generated tokens / requested tokens")
    environment: dict[str, str]

    @property
    def counted(self) -> tuple[Round, ...]:
        """The rounds that the figures are made of."""
        return tuple(r for r in self.rounds if not r.repeated)

    @property
    def noisy_rounds(self) -> int:
        """Counted rounds that stayed disturbed although they were repeated."""
        return sum(bool(r.conditions.disturbances) for r in self.counted)

    @property
    def repeated_rounds(self) -> int:
        return len(self.rounds) - len(self.counted)


def beyond(change: float, floor: float) -> bool:
    """Whether a figure that changes by ``change`` differs by more than ``floor``, as ratios: so many times as
    much and so many times as little are as far. Half as much lies beyond 99 %, and not beyond 101 %."""
    return abs(math.log1p(change)) > math.log1p(floor)


class Comparison(Model):
    """A paired comparison: both candidates ran the same rounds, one right after the other.

    ``change`` is of the metric's value, ``candidate / against - 1``: -0.1 is 10 % less.
    """

    candidate: str
    against: str
    metric: str
    pairs: int
    change: float
    interval: tuple[float, float]
    confidence: float
    floor: float = Field(0.0, description="what two processes of one candidate may differ by")

    @property
    def clear(self) -> bool:
        """The interval excludes zero, and the change is more than noise can do."""
        return not self.interval[0] <= 0 <= self.interval[1] and beyond(self.change, self.floor)


class NoiseFloor(Model):
    """An A/A run: the same candidate twice, in two processes, among the finalists."""

    comparison: Comparison
    floor: float = Field(
        description="a smaller change than this, as a ratio, is not told from none on this host"
    )
    detectable: float = Field(description="the least change found 9 times in 10 with that many rounds")


class Fall(Model):
    """Where and why a candidate left the race."""

    stage: Literal["screening", "race", "evaluation", "final"]
    heat: int | None = None
    reason: str


class Race(Model):
    """Interleaved heats: in each, every candidate still in runs one round; odd heats run in reverse."""

    stage: Literal["race", "final"]
    metric: str
    heats: tuple[tuple[str, ...], ...] = Field(description="candidates of each heat in the order they ran")
    fallen: dict[str, Fall]
    comparisons: tuple[Comparison, ...] = Field(description="the leader against each of the others")
    noise: NoiseFloor | None = None
    stopped_because: str
    seconds: float


class Place(Model):
    """A position in the evaluation texts."""

    text: str
    window: int = Field(description="of that text, from 0")
    position: int = Field(description="tokens of the window before it")

    def __str__(self) -> str:
        return f"position {self.position} of window {self.window} of {self.text}"


class PathQuality(Model):
    """Quality of one path (prefill batch, or decode with the cache) against the reference.

    With no tokens scored, because the logits were not finite, every number is 0 and means nothing:
    a KL divergence of 0 then is no agreement.
    """

    tokens: int = Field(description="really scored: fewer than planned if the verdict was clear earlier")
    perplexity: float
    reference_perplexity: float
    ratio: float = Field(description="reference perplexity / candidate perplexity: the share kept")
    ratio_interval: tuple[float, float] = Field(description="95 %, Student t over paired blocks")
    clear_of_limit: bool = Field(description="the interval excludes `min_quality`: on this side by evidence")
    kl_divergence: float = Field(description="mean KL(reference‖candidate) in nats; a lower bound")
    top1_agreement: float
    flips_interval: tuple[float, float] = Field(
        (0.0, 1.0), description="95 % interval of the share of flips, as for the ratio; 0 to 1: not known"
    )
    clear_of_flips: bool = Field(False, description="that interval excludes `max_token_flips`")
    first_flip: Place | None = Field(
        None,
        description="where the likeliest token first is not the reference's, in the order of scoring; "
        "None: no position differs",
    )
    by_text: dict[str, float] = Field(description="ratio per evaluation text")

    @property
    def token_flips(self) -> float:
        """Share of positions whose likeliest token is not the reference's."""
        return 1 - self.top1_agreement


class GoldenPrompt(Model):
    """A prompt of the quality evaluation and what the reference answers, to try a served bundle by."""

    prompt: tuple[int, ...] = Field(min_length=1, description="token ids")
    answer: tuple[int, ...] = Field(description="the fp32 reference's likeliest tokens")
    same_tokens: int = Field(description="of these, leading ones that the candidate generated too")


class QualityReport(Model):
    """The judgement of one candidate's output against the fp32 reference."""

    prefill: PathQuality
    decode: PathQuality
    worse_path: Phase
    ratio: float = Field(description="the gated number: the smaller of the two paths' ratios")
    greedy_same_tokens: tuple[int, ...] = Field(
        description="per prompt, leading tokens equal to the reference"
    )
    greedy_tokens: int
    draft_same_tokens: tuple[int, ...] | None = Field(
        None, description="per prompt, leading tokens that are the same with drafts of one token"
    )
    finite: bool
    not_finite: str = Field("", description="where the first NaN or infinity was; empty if all is finite")
    seconds: float

    @property
    def first_divergence(self) -> tuple[float, int]:
        """Median and minimum over the prompts of the tokens generated before the first that the reference
        would not have generated; ``greedy_tokens`` where none is different."""
        return median(self.greedy_same_tokens), min(self.greedy_same_tokens)

    @property
    def flipping_path(self) -> Phase:
        """The path whose likeliest tokens differ more often; its flips are held to the limit."""
        return "decode" if self.decode.token_flips > self.prefill.token_flips else "prefill"

    @property
    def flipping(self) -> PathQuality:
        return self.decode if self.flipping_path == "decode" else self.prefill

    @property
    def worse(self) -> PathQuality:
        """The path that decides."""
        return self.decode if self.worse_path == "decode" else self.prefill
