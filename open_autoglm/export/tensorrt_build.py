"""From a standard ONNX graph to a TensorRT plan: one strongly typed network, with a profile for each regime
or one for both.

Precision lies in the graph alone: a strongly typed network computes in the types that the graph says, which
is the one way that TensorRT 10, 11 and TensorRT-RTX share.

TensorRT-RTX 1.7 writes the weights of linear layers once for each profile: 52 MB of weights became a plan of
100 MB with both regimes and of 54 MB with decode alone. So a plan may have one profile for all lengths.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from open_autoglm.export.graph import DATA, FIRST_LOGITS, GRAPH
from open_autoglm.export.standard_graph import load_standard
from open_autoglm.export.tensorrt_api import (
    BuilderConfig,
    Flavour,
    Log,
    Network,
    Tensor,
    TensorRT,
    TensorRTFailure,
    TimingCache,
    load,
    make_builder,
    make_network,
)
from open_autoglm.export.tensorrt_plan import (
    PLAN,
    RECORD,
    RUNTIME_CACHE,
    InputRange,
    PlanHost,
    PlanRecord,
    PlanSizes,
    ProfileKind,
    host_gpu,
    profiles_of,
)
from open_autoglm.export.tensorrt_runtime import OpenPlan
from open_autoglm.files import digest_files, digest_of, write_atomic
from open_autoglm.schemas import FileDigest


def build_plan(
    graph: Path,
    output: Path,
    sizes: PlanSizes,
    flavour: Flavour,
    *,
    weight_streaming: bool = False,
    timings: Path,
) -> PlanRecord:
    """Build the standard graph in ``graph`` and write the plan and its record into ``output``.

    ``timings`` is a folder where TensorRT's timing caches are kept between builds. Where there is a GPU,
    the plan is also opened once: that it was built does not mean that it runs.
    Raises TensorRTFailure, or DeviceOutOfMemoryError where that is the reason.
    """
    trt = load(flavour)
    host = PlanHost(flavour=flavour, version=trt.__version__, gpu=host_gpu())
    parsed = ParsedGraph(trt, graph, sizes.cache_tokens)
    profiles = {kind: input_ranges(parsed.network, sizes, kind) for kind in profiles_of(sizes)}
    config = parsed.config(profiles, weight_streaming=weight_streaming)
    kept = None if flavour == "tensorrt-rtx" else TimingFile(timings, host)
    warnings = [] if kept is None else kept.attach(config)
    parsed.build(config, output / PLAN)
    if kept is not None:
        kept.save(config)
    layers = parsed.network.num_layers
    warnings += dict.fromkeys(parsed.log.warnings)
    del parsed, config  # as large as the weights
    can_run, reason = _try(trt, output, weight_streaming) if host.gpu else (None, "no GPU to try it on")
    record = PlanRecord(
        host=host,
        sizes=sizes,
        profiles=profiles,
        layers=layers,
        weight_streaming=weight_streaming,
        graph_digest=digest_of([f.model_dump() for f in digest_files(graph, _graph_files(graph))]),
        plan=_digest(output, PLAN),
        runtime_cache=_digest(output, RUNTIME_CACHE) if (output / RUNTIME_CACHE).exists() else None,
        can_run=can_run,
        run_reason=reason,
        warnings=tuple(warnings),
    )
    write_atomic(output / RECORD, record.model_dump_json(indent=2))
    return record


def _graph_files(graph: Path) -> list[Path]:
    return [path for path in (graph / GRAPH, graph / DATA) if path.exists()]


def _digest(directory: Path, name: str) -> FileDigest:
    return digest_files(directory, [directory / name])[0]


# ── the network ──────────────────────────────────────────────────────────────────────────────────


class ParsedGraph:
    """A standard graph as TensorRT's network. The parser stays, since the network's weights are its own."""

    def __init__(self, trt: TensorRT, graph: Path, cache_tokens: int) -> None:
        """Read GRAPH of ``graph`` with a cache of ``cache_tokens``.

        Raises TensorRTFailure with what the parser could not read.
        """
        self.log = Log(trt)
        self._trt = trt
        self._builder = make_builder(trt, self.log)
        self.network: Network = make_network(trt, self._builder)
        self._parser = trt.OnnxParser(self.network, self.log.logger)
        self._model = load_standard(graph, cache_tokens).SerializeToString()
        if not self._parser.parse(self._model, path=str(graph / GRAPH)):
            said = [self._parser.get_error(index).desc() for index in range(self._parser.num_errors)]
            raise self.log.failure(f"TensorRT {trt.__version__} cannot read the graph", said)

    def config(
        self, profiles: dict[ProfileKind, tuple[InputRange, ...]], *, weight_streaming: bool
    ) -> BuilderConfig:
        """A configuration with the ``profiles`` in their order."""
        config = self._builder.create_builder_config()
        for ranges in profiles.values():
            profile = self._builder.create_optimization_profile()
            for found in ranges:
                set_range: Callable[..., None] = (
                    profile.set_shape_input if found.values else profile.set_shape
                )
                set_range(found.name, found.least, found.best, found.most)
            if config.add_optimization_profile(profile) < 0:
                raise self.log.failure(f"TensorRT {self._trt.__version__} takes no profile of {ranges}")
        if weight_streaming:
            config.set_flag(self._trt.BuilderFlag.WEIGHT_STREAMING)
        return config

    def build(self, config: BuilderConfig, path: Path) -> None:
        """Write the plan to ``path``. Raises TensorRTFailure, or DeviceOutOfMemoryError."""
        plan = self._builder.build_serialized_network(self.network, config)
        if plan is None:
            raise self.log.failure(f"TensorRT {self._trt.__version__} cannot build the graph")
        path.write_bytes(plan)


# ── profiles ─────────────────────────────────────────────────────────────────────────────────────


def input_ranges(network: Network, sizes: PlanSizes, kind: ProfileKind) -> tuple[InputRange, ...]:
    """For each input that is not of one shape, the least, the usual and the largest."""
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    return tuple(
        _range(tensor, sizes, kind) for tensor in tensors if tensor.is_shape_tensor or -1 in tensor.shape
    )


def _range(tensor: Tensor, sizes: PlanSizes, kind: ProfileKind) -> InputRange:
    longest = 1 if kind == "decode" else sizes.cache_tokens
    usual = 1 if kind == "any" and sizes.tuned_for == "token" else min(sizes.prompt_tokens, longest)
    if tensor.name == FIRST_LOGITS:
        # Counted from the front: for -1, the last, TensorRT could not bound how many rows remain.
        return InputRange(name=tensor.name, least=(0,), best=(usual - 1,), most=(longest - 1,), values=True)

    def at(rows: int, tokens: int) -> tuple[int, ...]:
        fixed = tuple(tensor.shape)
        return tuple(size if size != -1 else (rows, tokens)[axis] for axis, size in enumerate(fixed))

    return InputRange(
        name=tensor.name,
        least=at(1, 1),
        best=at(sizes.batch_size, usual),
        most=at(sizes.batch_size, longest),
    )


# ── between builds ───────────────────────────────────────────────────────────────────────────────


class TimingFile:
    """How fast which kernel was in earlier builds, so that a build need not time them all again.

    The file begins with the digest of what follows. It belongs to one version and one type of GPU.
    """

    def __init__(self, folder: Path, host: PlanHost) -> None:
        self.path = folder / f"{host.flavour}-{host.version}-{digest_of(str(host.gpu))[:12]}.timings"
        self._timings: TimingCache | None = None  # must not go before the plan is built

    def attach(self, config: BuilderConfig) -> list[str]:
        """Give ``config`` what is known; the warnings are about what was thrown away."""
        known, warnings = self._read()
        if known and not self._attach(config, known):
            warnings, known = [f"TensorRT refused the timing cache {self.path.name}: it was made anew"], b""
        if not known and not self._attach(config, b""):
            warnings.append("TensorRT takes no timing cache")
        return warnings

    def _attach(self, config: BuilderConfig, known: bytes) -> bool:
        self._timings = config.create_timing_cache(known)
        return self._timings is not None and config.set_timing_cache(self._timings, ignore_mismatch=False)

    def _read(self) -> tuple[bytes, list[str]]:
        if not self.path.exists():
            return b"", []
        digest, _, content = self.path.read_bytes().partition(b"\n")
        if hashlib.sha256(content).hexdigest().encode() != digest:
            return b"", [f"the timing cache {self.path.name} was damaged: it was made anew"]
        return content, []

    def save(self, config: BuilderConfig) -> None:
        """Keep what ``config`` knows after a build."""
        timings = config.get_timing_cache()
        if timings is not None:
            content = bytes(timings.serialize())
            write_atomic(self.path, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)


# ── afterwards ───────────────────────────────────────────────────────────────────────────────────


def _try(trt: TensorRT, output: Path, weight_streaming: bool) -> tuple[bool, str]:
    """Whether the plan in ``output`` can be opened here. What TensorRT-RTX compiles for that is kept."""
    try:
        opened = OpenPlan(trt, output / PLAN, weight_streaming=weight_streaming)
    except TensorRTFailure as failure:
        return False, str(failure)
    if opened.runtime_cache is not None:
        write_atomic(output / RUNTIME_CACHE, bytes(opened.runtime_cache.serialize()))
    return True, "opened, with a context for prefill and one for decode"
