"""What this host can do at best: memory read bandwidth and matmul peak, measured in a few seconds.

Both bound every engine from below, so each figure is the best of several sizes, kernels and rounds.
Run as ``python -m open_autoglm.hardware_bench --threads 2``: it prints one JSON line and nothing else.
A process of its own keeps torch, its threads and half a gigabyte of buffers out of the caller.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from open_autoglm.measure.interference import CpuMeter
from open_autoglm.schemas import Model

CPUS = Path("/sys/devices/system/cpu")
MIB = 2**20
BUFFER_LIMIT = 2048 * MIB

MATMUL_SHAPES = ((512, 1536, 576), (512, 2048, 2048), (1024, 4096, 4096))
"""(rows, outputs, inputs): prompts of 512 and 1024 tokens through small and large projections."""


class Peaks(Model):
    """Best rates seen, all cores together. None: this torch has no such kernel for this CPU."""

    read_bandwidth_bytes_per_s: float = Field(gt=0)
    matmul_fp32_flops_per_s: float = Field(gt=0)
    matmul_bf16_flops_per_s: float | None = Field(gt=0)
    matmul_int8_ops_per_s: float | None = Field(gt=0)
    foreign_share: float = Field(ge=0, description="of the host's CPUs, taken by others meanwhile")


def measure(threads: int, buffer_limit: int = BUFFER_LIMIT, seconds: float = 0.2, scale: int = 1) -> Peaks:
    """Measure with ``threads`` threads, about ``seconds`` per buffer size and matmul kernel.

    No buffer is larger than ``buffer_limit`` bytes. ``scale`` divides the matmuls; it is for tests,
    whose figures mean nothing.
    """
    import torch

    torch.set_num_threads(threads)
    cpu = CpuMeter()
    with torch.inference_mode():
        early = _read_bandwidth(seconds, buffer_limit)
        matmul = {dtype: _matmul_peak(dtype, seconds, scale) for dtype in ("float32", "bfloat16", "int8")}
        late = _read_bandwidth(
            seconds, buffer_limit
        )  # neighbours on a shared host take bandwidth for seconds
    fp32 = matmul["float32"]
    assert fp32 is not None  # every torch multiplies floats
    return Peaks(
        read_bandwidth_bytes_per_s=max(early, late),
        matmul_fp32_flops_per_s=fp32,
        matmul_bf16_flops_per_s=matmul["bfloat16"],
        matmul_int8_ops_per_s=matmul["int8"],
        foreign_share=cpu.foreign_cores() / (os.cpu_count() or 1),
    )


def _read_bandwidth(seconds: float, buffer_limit: int) -> float:
    """Bytes per second of summing float32 buffers 8 and 16 times the last-level cache.

    At 4 times, STREAM's minimum, the cache still kept enough to read 20 % too fast. This sum came
    within 5 % of a read loop in C with OpenMP; matrix-vector products reach half of it.
    """
    import torch

    cache = max(_last_level_cache_bytes(), 32 * MIB)
    best = 0.0
    for size in {min(8 * cache, buffer_limit), min(16 * cache, buffer_limit)}:
        buffer = torch.ones(size // 4)
        best = max(best, _best_rate(buffer.sum, 4 * buffer.numel(), seconds))
    return best


def _last_level_cache_bytes() -> int:
    """All level 3 caches together (large CPUs have several), or 0 where the kernel does not tell."""
    sizes: dict[str, int] = {}
    for cache in CPUS.glob("cpu[0-9]*/cache/index3"):
        try:
            kib = int((cache / "size").read_text().strip().removesuffix("K"))
            sizes[(cache / "shared_cpu_list").read_text()] = kib * 1024
        except (OSError, ValueError):
            continue
    return sum(sizes.values())


def _matmul_peak(dtype: str, seconds: float, scale: int) -> float | None:
    """Operations per second (two per multiply-add) of the best kernel on the best shape."""
    rates: list[float] = []
    deadline = time.perf_counter() + 5 * seconds  # a slow CPU gets its figure from the small shapes
    for shape in MATMUL_SHAPES:
        rows, outputs, inputs = (side // scale for side in shape)
        try:
            for kernel in _matmul_kernels(dtype, rows, outputs, inputs):
                rates.append(_best_rate(kernel, 2.0 * rows * outputs * inputs, seconds))
        except RuntimeError:  # torch's word for "no such kernel on this CPU"
            continue
        if time.perf_counter() > deadline:
            break
    return max(rates, default=None)


def _matmul_kernels(dtype: str, rows: int, outputs: int, inputs: int) -> Iterator[Callable[[], Any]]:
    """Torch's own matmul, and oneDNN's on pre-packed weights.

    The second matters: on AMD CPUs torch's float32 matmul (MKL) reached 200 of 475 GFLOP/s, and an
    engine that packs its weights must not beat the "bound".
    """
    import torch

    x = torch.ones(rows, inputs, dtype=getattr(torch, dtype))
    weight = torch.ones(outputs, inputs, dtype=getattr(torch, dtype))
    if dtype == "int8":
        yield lambda: torch._int_mm(x, weight.t())
        return
    yield lambda: torch.nn.functional.linear(x, weight)
    onednn = torch.ops.mkldnn
    if hasattr(onednn, "_linear_pointwise"):
        packed = onednn._reorder_linear_weight(weight, rows)
        yield lambda: onednn._linear_pointwise(x, packed, None, "none", [], "")


def _best_rate(call: Callable[[], Any], work: float, seconds: float) -> float:
    """``work`` / the shortest of the calls that fit in ``seconds``; one unmeasured call first."""
    call()
    deadline = time.perf_counter() + seconds
    shortest = float("inf")
    while True:
        start = time.perf_counter()
        call()
        end = time.perf_counter()
        shortest = min(shortest, end - start)
        if end >= deadline:
            return work / shortest


def main() -> None:
    parser = argparse.ArgumentParser(prog="open_autoglm.hardware_bench")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--buffer-limit", type=int, default=BUFFER_LIMIT)
    parser.add_argument("--seconds", type=float, default=0.2)
    parser.add_argument("--scale", type=int, default=1)
    peaks = measure(**vars(parser.parse_args()))
    sys.stdout.write(peaks.model_dump_json() + "\n")


if __name__ == "__main__":
    main()
