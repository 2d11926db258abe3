"""The glossary: every noun that crosses a task, a disk or HTTP, one meaning per word.

All models are frozen and refuse unknown fields. What is stored carries ``format_version``.
Large things (weights, raw samples, logits) travel as a path and a digest, never as values.
"""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from open_autoglm.units import ByteSize, Duration, LengthMix, quantity

FORMAT_VERSION = 1
"""Raised when a stored model changes in a way that an older reader would misunderstand."""

STUDY_FORMAT_VERSION = 2

TargetDevice = Literal["auto", "cpu", "gpu"]
Device = Literal["cpu", "gpu"]
Objective = Literal["latency", "ttft", "ttft_p95", "tpot", "e2e_p95", "throughput", "goodput", "memory"]
Scenario = Literal["single_stream", "server", "offline"]
Precision = Literal["fp32", "bf16", "fp16", "int8", "int4"]
AttentionKind = Literal["mha", "gqa", "mqa", "mla", "mla+dsa"]
RotaryStyle = Literal["interleaved", "half", "none"]
Phase = Literal["prefill", "decode"]
Bound = Literal["compute", "bandwidth", "capacity"]


class Model(BaseModel):
    """Base of all glossary models."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


# ── the request ──────────────────────────────────────────────────────────────────────────────────


def _fit_for_forms(schema: dict[str, Any]) -> None:
    """Fit the JSON schema to forms: an optional text is one box that may stay empty, engines are a choice."""
    from open_autoglm.engines import names  # late: the engines build on this module

    for field in schema["properties"].values():
        if "anyOf" in field:
            del field["default"]
            field.update(field.pop("anyOf")[0])
    schema["properties"]["engines"]["items"] = {"type": "string", "enum": list(names())}


class OptimizeSpec(Model):
    """The whole request. Two equal specs on the same checkpoint and host are the same study."""

    model_config = ConfigDict(json_schema_extra=_fit_for_forms)

    model_path: str = Field(
        title="Model",
        description="Directory of a Hugging Face checkpoint (safetensors), or a hub id when online",
        min_length=1,
    )
    target_device: TargetDevice = Field(
        "auto", title="Device", description="Where the model will be served; auto takes a GPU if there is one"
    )
    batch_size: int = Field(1, ge=1, le=1024, title="Batch size", description="Prompts per call")
    prompt_tokens: int = Field(512, ge=1, title="Prompt length", description="Tokens per prompt")
    output_tokens: int = Field(64, ge=2, title="Output length", description="New tokens per prompt")
    length_mix: LengthMix | None = Field(
        None,
        title="Mix of lengths",
        description="Prompt/output lengths with their weights instead of one length, such as "
        "128/32:3,512/64:1; the prompt and output length then are the longest of it",
    )
    scenario: Scenario = Field(
        "single_stream",
        title="Scenario",
        description="single_stream: the next request starts when the last one ends; server: Poisson "
        "arrivals at the request rate; offline: whole batches, for throughput",
    )
    request_rate_per_s: float | None = Field(
        None, gt=0, title="Request rate", description="Mean arrivals per second; the server scenario needs it"
    )
    objective: Objective = Field(
        "latency",
        title="Objective",
        description="latency: time to the last token; ttft, tpot and the p95s by name; throughput: decoded "
        "tokens/s (offline: all tokens/s); goodput: requests/s within the limits; memory: peak RSS",
    )
    max_latency: Duration | None = Field(
        None, title="Limit on TTFT p95", description="Time to first token, with its unit: 50ms, 0.05s"
    )
    max_tpot: Duration | None = Field(
        None, title="Limit on TPOT", description="Time per output token after the first: 20ms"
    )
    max_memory: ByteSize | None = Field(
        None, title="Limit on memory", description="Peak resident memory of the engine process: 2GiB, 512MB"
    )
    min_quality: float = Field(
        0.99,
        gt=0,
        le=1.5,
        title="Quality to keep",
        description="Reference perplexity / candidate perplexity, on the worse of prefill and decode",
    )
    engines: tuple[str, ...] = Field(
        (), title="Engines", description="Engines to try; none chosen means all of them"
    )
    rounds: int = Field(
        10,
        ge=3,
        le=2000,
        title="Timed rounds, at least",
        description="Rounds of each finalist, after warm-up; more follow until the target width is met",
    )
    target_width: float = Field(
        0.05,
        gt=0,
        lt=1,
        title="Target width of intervals",
        description="Rounds are added until the 95 % interval of each comparison is narrower than this share",
    )
    timing_budget_s: float = Field(
        120,
        gt=0,
        title="Timing budget in seconds",
        description="Rounds of the final end when this is spent, though not before five; the race has half",
    )
    search_generations: int = Field(
        1,
        ge=0,
        le=5,
        title="Search generations",
        description="How often the leaders' neighbours in the engines' search spaces are tried; 0: none",
    )
    quality_tokens: int = Field(
        3072,
        ge=64,
        title="Quality tokens, at most",
        description="At most this many tokens are scored one at a time with the cache; "
        "scoring stops earlier once the verdict is clear",
    )
    seed: int = Field(0, ge=0, title="Seed", description="Chooses prompts and evaluation windows")
    output: str | None = Field(
        None,
        title="Output directory",
        description="Where the study is kept; a new one under $AUTOGLM_HOME/studies if empty",
    )
    register_as: str | None = Field(
        None,
        title="Registered model",
        description="Name in the MLflow registry; the checkpoint directory's name if empty",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
    )
    trust_remote_code: bool = Field(
        False, title="Trust remote code", description="Run Python code that comes with the checkpoint"
    )
    allow_pickle: bool = Field(
        False, title="Allow pickles", description="Load .bin weights, which can run code when opened"
    )

    @model_validator(mode="before")
    @classmethod
    def _longest_of_the_mix(cls, given: Any) -> Any:
        """With a mix of lengths, prompt and output length are what the cache needs room for."""
        if not isinstance(given, dict) or not (mix := given.get("length_mix")):
            return given
        shares = LengthMix(str(mix)).shares
        longest = {"prompt_tokens": max(s[0] for s in shares), "output_tokens": max(s[1] for s in shares)}
        return given | longest


# ── what is known before anything runs ───────────────────────────────────────────────────────────


class FileDigest(Model):
    """One file of a checkpoint, export or bundle, relative to its directory."""

    path: str
    size_bytes: int
    sha256: str


class Checkpoint(Model):
    """A resolved, validated checkpoint: safetensors, config, tokenizer, and the digest of all of it."""

    path: Path
    name: str
    model_type: str
    architecture: str
    files: tuple[FileDigest, ...]
    digest: str
    weight_bytes: int
    weight_dtype: str
    context_tokens: int
    vocab_size: int
    trust_remote_code: bool = False

    @property
    def config_path(self) -> Path:
        return self.path / "config.json"


class PhaseCost(Model):
    """What one call of a phase must do at the workload's shape, in fp32 unless said otherwise."""

    flops: float
    bytes_read_weights: float
    bytes_moved_kv: float


class ModelProfile(Model):
    """Facts of structure, read from the config and the module tree on the meta device."""

    model_type: str
    architecture: str
    layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    context_tokens: int
    attention: AttentionKind
    attention_heads: int
    kv_heads: int
    head_dim: int = Field(description="of queries and keys")
    value_head_dim: int | None = Field(None, description="of values, if it differs from head_dim")
    attention_bias: bool
    qk_norm: bool
    rotary: RotaryStyle
    rotary_dims: int
    mlp: Literal["fused_gate_up", "split_gate_up", "plain"]
    norms_per_layer: int
    norm_eps: float
    tied_embeddings: bool
    experts: int
    experts_per_token: int
    shared_experts: int
    dense_layers: int
    sliding_window: int | None
    limited_layers: int = Field(0, description="layers whose queries see at most `attended_tokens` keys")
    attended_tokens: int | None = Field(None, description="the sliding window, or the top-k of mla+dsa")
    parameters: int
    active_parameters: int
    embedding_parameters: int
    lm_head_parameters: int = Field(description="of the output matrix; the embedding's own number if tied")
    kv_elements_per_token: int = Field(description="cached numbers per token, over all layers")

    def weight_bytes(self, bits: float) -> int:
        """Bytes of all parameters stored at ``bits`` per parameter."""
        return int(self.parameters * bits / 8)

    def kv_bytes_per_token(self, bits: float) -> int:
        return int(self.kv_elements_per_token * bits / 8)


class Gpu(Model):
    name: str
    memory_bytes: int
    driver: str
    compute_capability: str | None = None


class Hardware(Model):
    """The host as measured, with the fingerprint that cache keys use."""

    cpu_model: str
    cores: int
    isa: tuple[str, ...]
    memory_bytes: int
    available_memory_bytes: int
    read_bandwidth_bytes_per_s: float
    matmul_fp32_flops_per_s: float
    matmul_bf16_flops_per_s: float | None
    matmul_int8_ops_per_s: float | None
    gpus: tuple[Gpu, ...]
    gpu_reason: str = Field(description="why `gpus` is empty, or an empty string")
    os: str
    python: str
    fingerprint: str


class RooflineBound(Model):
    """The least time one phase can take on this host: max(compute, bandwidth), if it fits at all."""

    phase: Phase
    precision: Precision
    flops: float
    bytes_moved: float
    compute_ms: float
    bandwidth_ms: float
    capacity_bytes: float
    binds: Bound
    bound_ms: float


class Analysis(Model):
    """What `analyze` hands on: structure, host, and the roofline of each phase and precision."""

    profile: ModelProfile
    hardware: Hardware
    roofline: tuple[RooflineBound, ...]

    def bound(self, phase: Phase, precision: Precision) -> RooflineBound:
        return next(b for b in self.roofline if b.phase == phase and b.precision == precision)


# ── candidates ───────────────────────────────────────────────────────────────────────────────────

ProbeStage = Literal["missing", "installed", "no_device", "ready"]


class Probe(Model):
    """Whether an engine can run here, and if not, why and how to change that."""

    engine: str
    stage: ProbeStage
    version: str | None = None
    reason: str = Field(description="one sentence; says what was found when ready")
    install: str | None = Field(None, description="the command that would mend it")

    @property
    def ready(self) -> bool:
        return self.stage == "ready"


Knob = str | int | float | bool


class Candidate(Model):
    """One way to serve the model: engine × precision × knobs, and why it is (not) on the list."""

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$", description="stable, readable, unique in a study")
    engine: str
    device: Device
    precision: Precision
    weight_bits: float = Field(description="mean stored bits per weight, scales included")
    knobs: dict[str, Knob] = Field(default_factory=dict)
    proposed_because: str
    vetoed_because: str | None = None
    reference: bool = False
    baseline: bool = False
    incumbent: bool = Field(False, description="the registered champion, measured again beside the others")

    def vetoed(self, reason: str) -> Self:
        return self.model_copy(update={"vetoed_because": reason})


class Dimension(Model):
    """One knob of a candidate that an engine lets the search turn, and the values worth trying here."""

    knob: str
    values: tuple[Knob, ...]
    because: str = Field(description="what the knob trades")


class ExportedModel(Model):
    """The files a candidate needs, in a content-addressed directory. `path` equals the checkpoint's when
    the engine loads it as it is."""

    candidate_id: str
    path: Path
    digest: str
    route: str
    size_bytes: int
    build_s: float
    reused: bool = False
    details: dict[str, str | int | float | bool] = Field(default_factory=dict)


class Workload(Model):
    """The requests every candidate is timed on, saved once per study.

    The file at `path` is a ``.npz`` with one entry per round: ``prompts`` is
    ``int64[rounds, requests * batch, longest prompt]``, padded on the right; ``prompt_tokens`` and
    ``output_tokens`` are ``int64[rounds, requests]``; ``arrivals_ms`` is ``float64[rounds, requests]``,
    counted from the start of the round (zero unless the scenario is server).
    """

    path: Path
    sha256: str
    scenario: Scenario = "single_stream"
    batch_size: int
    prompt_tokens: int = Field(description="of the longest request")
    output_tokens: int = Field(description="of the longest request")
    rounds: int = Field(description="different rounds in the file; a longer run begins again")
    requests: int = Field(1, description="per round: 1, or the arrivals of a server round")
    request_rate_per_s: float | None = None
    length_mix: str | None = None
    slo_ttft_ms: float | None = Field(None, description="goodput: a request is good within both")
    slo_tpot_ms: float | None = None
    seed: int
    corpus: str


# ── evidence ─────────────────────────────────────────────────────────────────────────────────────


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

    @property
    def clear(self) -> bool:
        return not self.interval[0] <= 0 <= self.interval[1]


class NoiseFloor(Model):
    """An A/A run: the same candidate twice, in two processes, among the finalists."""

    comparison: Comparison
    floor: float = Field(description="a smaller change than this is not told from none on this host")
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


class PathQuality(Model):
    """Quality of one path (prefill batch, or one-token decode with the cache) against the reference.

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
    by_text: dict[str, float] = Field(description="ratio per evaluation text")


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
    finite: bool
    seconds: float

    @property
    def worse(self) -> PathQuality:
        """The path that decides."""
        return self.decode if self.worse_path == "decode" else self.prefill


TrialStatus = Literal[
    "vetoed", "failed", "crashed", "out_of_memory", "timed_out", "incorrect", "stopped", "ok"
]
"""``stopped``: able, but out of the race before its end, with the evidence for it."""


class Miss(Model):
    """One limit that a candidate does not meet, and by how much."""

    limit: str
    allowed: float
    measured: float
    unit: str
    decided_by: str

    def sentence(self) -> str:
        beyond = "<" if self.limit == "min_quality" else ">"
        measured, allowed = quantity(self.measured, self.unit), quantity(self.allowed, self.unit)
        return f"{self.limit}: {measured} {beyond} {allowed} ({self.decided_by})"


class Capsule(Model):
    """What it takes to run one trial again and to judge whether the result is the same."""

    command: str
    seed: int
    candidate: Candidate
    checkpoint_digest: str
    export_digest: str
    workload_sha256: str
    fingerprint: str
    host: dict[str, str] = Field(description="CPU, governor, kernel, peaks and what else timing depends on")
    versions: dict[str, str]


class Trial(Model):
    """One candidate's whole story."""

    format_version: int = STUDY_FORMAT_VERSION
    id: str
    engine: str
    candidate: Candidate
    status: TrialStatus
    reason: str
    metrics: dict[str, Metric] = Field(default_factory=dict)
    quality: QualityReport | None = None
    screening: Screening | None = None
    measurements: Measurements | None = Field(None, exclude=True)
    samples_path: str | None = Field(None, description="raw samples, relative to the study directory")
    exported: ExportedModel | None = None
    log_path: str | None = None
    mlflow_run_id: str | None = None
    feasible: bool = False
    misses: tuple[Miss, ...] = ()
    finalist: bool = False
    fall: Fall | None = None
    capsule: Capsule | None = None
    reused: tuple[str, ...] = Field((), description="stages whose results are from an earlier run")


VerdictKind = Literal[
    "champion", "tie", "nothing_feasible", "insufficient_evidence", "gate_failed", "dry_run"
]


class Verdict(Model):
    """The answer, first as a word, then as sentences."""

    kind: VerdictKind
    reasons: tuple[str, ...]
    nearest: str | None = Field(None, description="when nothing is feasible: the candidate that misses least")


class Incumbent(Model):
    """The registered champion that a challenger has to beat."""

    trial_id: str | None = Field(None, description="the trial that measured it again")
    model_name: str
    version: str
    note: str = Field("", description="why it is not compared, where it is not")


class GateResult(Model):
    """The outcome of one Great Expectations suite over the results table."""

    passed: bool
    evaluated: int
    failures: tuple[str, ...]
    warnings: tuple[str, ...]
    data_docs: str | None


def without_password(text: str) -> str:
    """``text`` without user and password in the addresses it holds: studies and reports are passed on."""
    return re.sub(r"(?<=://)[^/@\s]*@", "", text)


class Registration(Model):
    """Where the study went in MLflow; the address is kept without its password."""

    tracking_uri: Annotated[str, AfterValidator(without_password)]
    experiment_id: str
    run_id: str
    model_name: str | None = None
    model_version: str | None = None
    model_uri: str | None = None
    note: str = ""


class Bundle(Model):
    """A deployable directory: manifest, engine files, tokenizer, evidence."""

    path: Path
    digest: str
    size_bytes: int


class Study(Model):
    """All trials of one spec on one host, ranked, with the verdict. Stored as ``study.json``."""

    format_version: int = STUDY_FORMAT_VERSION
    id: str
    created: datetime
    finished: datetime | None = None
    spec: OptimizeSpec
    checkpoint: Checkpoint
    analysis: Analysis
    workload: Workload | None = None
    verdict: Verdict
    champion: str | None = Field(None, description="trial id; in a tie, the incumbent's")
    incumbent: Incumbent | None = None
    races: tuple[Race, ...] = ()
    comparisons: tuple[Comparison, ...] = Field(
        (), description="the champion, or the best challenger, against each other finalist, paired"
    )
    search: tuple[str, ...] = Field((), description="what the search tried and learned, in sentences")
    pareto: tuple[str, ...] = Field((), description="trial ids on the front of latency, memory and quality")
    trials: tuple[Trial, ...]
    gate: GateResult | None = None
    bundle: Bundle | None = None
    registration: Registration | None = None
    not_measured: tuple[str, ...] = ()
    environment: dict[str, str] = Field(default_factory=dict)
    output_dir: Path

    @model_validator(mode="after")
    def _champion_is_a_trial(self) -> Self:
        if self.champion is not None and all(t.id != self.champion for t in self.trials):
            raise ValueError(f"champion {self.champion!r} is not one of the trials")
        return self

    def trial(self, trial_id: str) -> Trial:
        return next(t for t in self.trials if t.id == trial_id)


class Manifest(Model):
    """``manifest.json`` of a bundle: everything needed to open it again and to check it first."""

    format_version: int = FORMAT_VERSION
    name: str
    candidate: Candidate
    exported: ExportedModel
    model_type: str
    context_tokens: int
    checkpoint_digest: str
    trust_remote_code: bool = False
    files: tuple[FileDigest, ...]
    study_id: str
    created: datetime
    versions: dict[str, str]
    evidence: dict[str, Any]
