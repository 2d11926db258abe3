"""On a GPU host, what no other can tell: that the engines for GPUs answer like torch on the CPU, that a call
ends when the device is done, and how a device without memory is told. Elsewhere all of it is skipped.

``make bench-gpu`` runs it without conftest.py, so that it needs no more than the engines do.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from benchmarks.checkout import declare_engines

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU that torch can use"),
]

ROWS, PROMPT, LENGTH = 2, 20, 28
LEAST_CORRELATION = {"fp32": 0.9999, "bf16": 0.999, "fp16": 0.9999, "fp8": 0.97, "int8": 0.98, "int4": 0.8}
"""With torch's fp32 logits on the CPU."""


class Host(NamedTuple):
    """A tiny random model, and what torch says of it on the CPU."""

    checkpoint: Any
    home: Path
    tokens: Any
    truth: Any


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    from transformers import AutoModelForCausalLM

    from benchmarks.gpu_models import write_checkpoint

    with tempfile.TemporaryDirectory(prefix="autoglm-gpu-test-") as folder:
        declare_engines(Path(folder) / "engines")
        checkpoint = write_checkpoint("tiny", Path(folder) / "tiny", "cpu")
        tokens = np.random.default_rng(5).integers(4, checkpoint.vocab_size, (ROWS, LENGTH))
        model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).eval()
        with torch.no_grad():
            truth = model(torch.from_numpy(tokens)).logits.numpy()
        yield Host(checkpoint, Path(folder), tokens, truth)


NAMES = (
    "torch-cuda-fp32",
    "torch-cuda-bf16",
    "torch-cuda-fp16",
    "onnxruntime-cuda-fp16",
    "onnxruntime-cuda-bf16",
    "onnxruntime-cuda-w8-b32",
    "onnxruntime-cuda-w4-b32",
    "torch-cuda-bf16-compile",
    "torch-cuda-fp16-compile",
    "torch-cuda-int8-compile",
    "torch-cuda-fp8-compile",
    "onnxruntime-tensorrt-fp16",
    "onnxruntime-tensorrt-bf16",
    "onnxruntime-tensorrt-w8",
    "onnxruntime-tensorrt-fp8",
)
"""What takes seconds before what takes minutes: the time may not suffice for all."""


def proposed(name: str, host: Host) -> Any:
    """The candidate; skips the test with the reason where it cannot run here."""
    from benchmarks.gpu import _hardware
    from open_autoglm import engines
    from open_autoglm.analysis import profile_model
    from open_autoglm.schemas import Analysis, OptimizeSpec

    analysis = Analysis(profile=profile_model(host.checkpoint), hardware=_hardware(), roofline=())
    engine = engines.get("-".join(name.split("-")[:2]) if name.startswith("onnx") else name.split("-")[0])
    probe = engine.probe("gpu")
    if not probe.ready:
        pytest.skip(f"{probe.stage}: {probe.reason}")
    spec = OptimizeSpec(model_path=str(host.checkpoint.path))
    found = next(c for c in engine.propose(analysis, spec, "gpu") if c.id == name)
    if found.vetoed_because:
        pytest.skip(found.vetoed_because)
    return found


@contextlib.contextmanager
def opened(name: str, host: Host, **options: int) -> Iterator[Any]:
    from open_autoglm import engines
    from open_autoglm.engines.contract import ExportContext, SessionOptions
    from open_autoglm.schemas import ExportedModel

    candidate = proposed(name, host)
    engine, path = engines.get(candidate.engine), host.checkpoint.path
    if engine.recipe(candidate) is not None:
        path = host.home / name
        if not path.exists():
            path.mkdir()
            context = ExportContext(output=path, ledger=host.home / "ledger.json")
            with contextlib.redirect_stdout(io.StringIO()):
                engine.export(candidate, host.checkpoint, context)
    exported = ExportedModel(candidate_id=name, path=path, digest="", route="", size_bytes=0, build_s=0)
    room = SessionOptions(**{"batch_size": ROWS, "max_tokens": LENGTH, "threads": 1, **options})
    session = engine.open(candidate, exported, room)
    try:
        yield session
    finally:
        session.close()
        # Dynamo allows one function a few graphs in a process and then runs it uncompiled without a word;
        # all sessions of these tests share a process.
        torch.compiler.reset()


def decoded(session: Any, tokens: Any) -> Any:
    steps = [session.prefill(tokens[:, :PROMPT])]
    steps += [session.decode(tokens[:, place]) for place in range(PROMPT, LENGTH)]
    return np.stack(steps, axis=1)


@pytest.mark.parametrize("name", NAMES)
def test_an_engine_answers_like_torch_on_the_cpu(name: str, host: Host) -> None:
    """All positions, prefill and decode, twice, and for one row; wherever it says that it ran, it did."""
    from open_autoglm.engines.contract import RAN_ELSEWHERE

    with opened(name, host) as session:
        precision = proposed(name, host).precision
        for rows in (ROWS, ROWS, 1):
            tokens, truth = host.tokens[:rows], host.truth[:rows]
            for found, wanted in (
                (session.full_logits(tokens), truth),
                (decoded(session, tokens), truth[:, PROMPT - 1 :]),
            ):
                assert found.dtype == np.float32
                assert np.isfinite(found).all()
                correlation = float(np.corrcoef(found.ravel(), wanted.ravel())[0, 1])
                assert correlation > LEAST_CORRELATION[precision], correlation
        facts = session.facts()
        assert RAN_ELSEWHERE not in facts, facts[RAN_ELSEWHERE]
        assert facts.get("cuda_graphs", "none") in ("none", "decode")


@pytest.mark.parametrize("name", ["torch-cuda-bf16", "torch-cuda-bf16-compile"])
def test_a_call_ends_when_the_device_is_done(name: str, host: Host) -> None:
    """Nothing is left in the stream, and the device's own time is within the caller's."""
    import time

    with opened(name, host) as session:
        session.prefill(host.tokens[:, :PROMPT])
        begin = time.perf_counter()
        session.decode(host.tokens[:, PROMPT])
        elapsed_ms = (time.perf_counter() - begin) * 1e3
        assert torch.cuda.current_stream().query()
        facts = session.facts()
        assert 0 < float(facts["decode_device_ms"]) <= elapsed_ms
        assert int(facts["peak_device_bytes"]) >= int(facts["peak_allocated_bytes"]) > 0


def test_a_cache_that_does_not_fit_is_out_of_memory(host: Host) -> None:
    """In the words that the trial's reason is made of; the next session opens."""
    from open_autoglm.measure.isolation import _OUT_OF_MEMORY

    held = torch.empty(int(torch.cuda.mem_get_info()[0] * 0.9), dtype=torch.uint8, device="cuda")
    with pytest.raises(torch.OutOfMemoryError) as raised:
        torch.empty(held.numel(), dtype=torch.uint8, device="cuda")
    assert any(sign in f"{raised.type.__name__}: {raised.value}" for sign in _OUT_OF_MEMORY)
    del held
    torch.cuda.empty_cache()
    with opened("torch-cuda-bf16", host) as session:
        assert np.isfinite(session.prefill(host.tokens[:, :PROMPT])).all()


def test_the_driver_tells_what_a_session_holds() -> None:
    """More than the tensors, since the context counts; None only where nvidia-ml-py is not there."""
    pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    from open_autoglm.measure.device_memory import DeviceMemory

    memory = DeviceMemory.open()
    assert memory is not None
    held = torch.zeros(2**28, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    used = memory.used_bytes()
    assert used is not None
    assert used >= held.numel()
