"""Plans, their records and their timings: what is opened, what is refused and in which words. No TensorRT."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from open_autoglm.export.tensorrt_api import DeviceOutOfMemoryError, Log, TensorRT, TensorRTFailure
from open_autoglm.export.tensorrt_build import TimingFile
from open_autoglm.export.tensorrt_plan import (
    PLAN,
    RECORD,
    RUNTIME_CACHE,
    PlanGpu,
    PlanHost,
    PlanRecord,
    PlanRefused,
    PlanSizes,
    check_plan,
)
from open_autoglm.export.tensorrt_runtime import weight_budget
from open_autoglm.files import digest_files

H100 = PlanGpu(name="NVIDIA H100", compute_capability="9.0")
L4 = PlanGpu(name="NVIDIA L4", compute_capability="8.9")
HOST = PlanHost(flavour="tensorrt", version="10.16.1.11", gpu=H100)
AHEAD = PlanHost(flavour="tensorrt-rtx", version="1.7.1.116", gpu=None)
SIZES = PlanSizes(batch_size=2, prompt_tokens=16, cache_tokens=48)


def write_plan(directory: Path, host: PlanHost = HOST, *, runtime_cache: bool = False) -> Path:
    """A plan of a few bytes with its record."""
    (directory / PLAN).write_bytes(b"compiled")
    if runtime_cache:
        (directory / RUNTIME_CACHE).write_bytes(b"kernels")
    files = {file.path: file for file in digest_files(directory, directory.iterdir())}
    record = PlanRecord(
        host=host,
        sizes=SIZES,
        profiles={"prefill": (), "decode": ()},
        layers=9,
        weight_streaming=False,
        graph_digest="0" * 64,
        plan=files[PLAN],
        runtime_cache=files.get(RUNTIME_CACHE),
        run_reason="",
    )
    (directory / RECORD).write_text(record.model_dump_json())
    return directory


def refusal(directory: Path, host: PlanHost = HOST, batch_size: int = 1, cache_tokens: int = 48) -> str:
    with pytest.raises(PlanRefused) as refused:
        check_plan(directory, host, batch_size=batch_size, cache_tokens=cache_tokens)
    return str(refused.value)


# ── plans ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("here", [AHEAD, AHEAD.model_copy(update={"gpu": L4})])
def test_what_was_built_ahead_of_time_fits_every_gpu(tmp_path: Path, here: PlanHost) -> None:
    """TensorRT-RTX without a GPU builds for all that it serves."""
    write_plan(tmp_path, AHEAD, runtime_cache=True)
    assert check_plan(tmp_path, here, batch_size=2, cache_tokens=48).sizes == SIZES


@pytest.mark.parametrize(
    ("here", "told"),
    [
        ({"flavour": "tensorrt-rtx"}, "built by tensorrt and tensorrt-rtx is to open it"),
        ({"version": "11.4.0.106"}, "built by tensorrt 10.16.1.11 and 11.4.0.106 is installed here"),
        ({"gpu": L4}, "built for NVIDIA H100 (compute capability 9.0) and here is NVIDIA L4 (compute"),
        ({"gpu": None}, "built for NVIDIA H100 (compute capability 9.0) and here is none"),
    ],
)
def test_a_plan_of_another_host_is_refused(tmp_path: Path, here: dict[str, Any], told: str) -> None:
    """One sentence: what was found, what is here, what to do."""
    reason = refusal(write_plan(tmp_path), HOST.model_copy(update=here))
    assert told in reason
    assert reason.endswith(": export again")
    assert "\n" not in reason


def test_a_plan_that_is_too_small_is_refused(tmp_path: Path) -> None:
    """Its sizes are part of it."""
    write_plan(tmp_path)
    assert check_plan(tmp_path, HOST, batch_size=2, cache_tokens=48).host == HOST
    assert "batches of 2 at most and 3 were asked for" in refusal(tmp_path, batch_size=3)
    assert "holds 48 tokens and 49 were asked for" in refusal(tmp_path, cache_tokens=49)


@pytest.mark.parametrize("name", [PLAN, RUNTIME_CACHE])
def test_code_that_was_changed_is_refused(tmp_path: Path, name: str) -> None:
    """A plan is code: neither another content nor a link to another place is opened."""
    write_plan(tmp_path, runtime_cache=True)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content + b"!")
    assert f"{name} in {tmp_path} does not match the digest" in refusal(tmp_path)
    (tmp_path / name).unlink()
    assert f"{name}, which the plan's record names, is no file" in refusal(tmp_path)
    (tmp_path / "elsewhere").write_bytes(content)
    (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    assert "is no file" in refusal(tmp_path)


def test_a_record_names_no_file_outside(tmp_path: Path) -> None:
    """Nor any other name inside."""
    inside = tmp_path / "export"
    inside.mkdir()
    write_plan(inside)
    (tmp_path / PLAN).write_bytes(b"compiled")
    for path in (f"../{PLAN}", RECORD):
        record = PlanRecord.model_validate_json((inside / RECORD).read_bytes())
        moved = record.model_copy(update={"plan": record.plan.model_copy(update={"path": path})})
        (inside / RECORD).write_text(moved.model_dump_json())
        assert f"{path}, which the plan's record names, is no file" in refusal(inside)


@pytest.mark.parametrize("content", [None, "{", '{"format_version": 1}'])
def test_without_a_record_no_plan_is_opened(tmp_path: Path, content: str | None) -> None:
    """Missing, cut off, or not all there."""
    write_plan(tmp_path)
    (tmp_path / RECORD).unlink()
    if content is not None:
        (tmp_path / RECORD).write_text(content)
    assert f"{RECORD}, without which no plan is opened, cannot be read: export again" in refusal(tmp_path)


def test_a_record_of_another_format_is_refused(tmp_path: Path) -> None:
    """Even if its fields have the same names."""
    write_plan(tmp_path)
    text = (tmp_path / RECORD).read_text().replace('"format_version":1', '"format_version":2')
    (tmp_path / RECORD).write_text(text)
    assert "has format 2 and this release reads 1" in refusal(tmp_path)


# ── timings ──────────────────────────────────────────────────────────────────────────────────────


class TimingConfig:
    """The part of an ``IBuilderConfig`` that timing caches need; ``refused`` is content it does not take."""

    def __init__(self, refused: bytes = b"never") -> None:
        self.known = b""
        self._refused = refused

    def create_timing_cache(self, serialized: bytes) -> Any:
        return SimpleNamespace(serialize=lambda: serialized)

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if cache.serialize() == self._refused:
            return False
        self.known = cache.serialize()
        return True

    def get_timing_cache(self) -> Any:
        return SimpleNamespace(serialize=lambda: self.known + b"+")


def attach(file: TimingFile, config: Any) -> list[str]:
    return file.attach(config)


def test_timings_are_kept_between_builds(tmp_path: Path) -> None:
    """The second build knows what the first one timed; another version or GPU begins anew."""
    for known in (b"", b"+", b"++"):
        config: Any = TimingConfig()
        file = TimingFile(tmp_path, HOST)
        assert file.attach(config) == []
        assert config.known == known
        file.save(config)
    for change in ({"version": "11.4"}, {"gpu": L4}, {"flavour": "tensorrt-rtx"}):
        other: Any = TimingConfig()
        assert TimingFile(tmp_path, HOST.model_copy(update=change)).attach(other) == []
        assert other.known == b""


def test_damaged_timings_are_thrown_away_with_a_warning(tmp_path: Path) -> None:
    """What the digest does not know is never handed to TensorRT."""
    file, config = TimingFile(tmp_path, HOST), TimingConfig()
    builder: Any = config
    file.attach(builder)
    file.save(builder)
    file.path.write_bytes(file.path.read_bytes() + b"?")
    again: Any = TimingConfig()
    (warning,) = file.attach(again)
    assert "was damaged" in warning
    assert again.known == b""
    file.save(again)
    assert file.attach(again) == []


def test_timings_that_tensorrt_refuses_are_made_anew(tmp_path: Path) -> None:
    """Whole by its digest, and of another driver perhaps."""
    file, first = TimingFile(tmp_path, HOST), TimingConfig()
    builder: Any = first
    file.attach(builder)
    file.save(builder)
    refusing: Any = TimingConfig(refused=b"+")
    (warning,) = file.attach(refusing)
    assert "TensorRT refused" in warning
    assert refusing.known == b""


# ── weights that are streamed ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("automatic", "expected"),
    [(1000, 450), (900, 450), (899, 835), (800, 736), (10, 0)],
    ids=["roomy", "just-fits", "one-short", "some-stream", "no-room"],
)
def test_streamed_weights_leave_room_for_the_cache(automatic: int, expected: int) -> None:
    """Of 900 bytes, beside two caches of 2 rows, 8 numbers each, in fp16; half stay where all would fit."""
    names = ["input_ids", "past_key_values.0.key", "past_key_values.0.value", "present.0.key"]
    engine: Any = SimpleNamespace(
        num_io_tensors=len(names),
        streamable_weights_size=900,
        get_weight_streaming_automatic_budget=lambda: automatic,
        get_tensor_name=names.__getitem__,
        get_tensor_profile_shape=lambda _name, _profile: [(1, 8), (1, 8), (2, 8)],
        get_tensor_dtype=lambda _name: SimpleNamespace(itemsize=2),
    )
    assert weight_budget(engine) == expected


# ── failures ─────────────────────────────────────────────────────────────────────────────────────


class Logger:
    """``ILogger`` as the bindings have it."""

    Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2, INFO=3)


def failure_after(*messages: str) -> TensorRTFailure:
    trt: Any = SimpleNamespace(ILogger=Logger)
    module: TensorRT = trt
    log = Log(module)
    for message in messages:
        log.logger.log(Logger.Severity.ERROR, message)
    log.logger.log(Logger.Severity.INFO, "cudaMalloc: out of memory")  # said by the way
    return log.failure("cannot build")


def test_the_reason_is_what_tensorrt_said() -> None:
    """Without places in its source, and not that there is no GPU where there is another reason."""
    found = failure_after(
        "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (cudaError 35: CUDA driver)",
        "Error Code 9: no kernel for node a (In build at /_src/builder.cpp:12)\nmore\n",
    )
    assert type(found) is TensorRTFailure
    assert str(found) == "cannot build: Error Code 9: no kernel for node a: more"
    assert str(failure_after()) == "cannot build: it gave no reason"


@pytest.mark.parametrize(
    "message",
    [
        "Error Code 2: OutOfMemory (Requested size was 34359738368 bytes.)",
        "[defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)",
        "Error Code 1: Cuda Runtime (In alloc at /_src/a.cpp:2 (cudaError 2: out of memory))",
    ],
)
def test_too_little_memory_is_told_apart(message: str) -> None:
    """And whoever waits for the trial knows the error by its name (``test_isolation.py``)."""
    found = failure_after("something before it", message)
    assert isinstance(found, DeviceOutOfMemoryError)
