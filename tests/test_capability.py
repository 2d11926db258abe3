"""What NVIDIA engines can do here: every rung of a probe, on real parts and on fakes of what is not here."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from elf_files import write_elf
from studies import demo_analysis

from open_autoglm.engines import nvidia
from open_autoglm.engines.capability import WIDTH, Asked, judge, operands
from open_autoglm.engines.capability_driver import missing_driver
from open_autoglm.engines.capability_elf import needed_libraries
from open_autoglm.engines.capability_tensorrt import reach_import
from open_autoglm.engines.nvidia import probe_nvidia
from open_autoglm.planning import plan
from open_autoglm.schemas import OptimizeSpec, Probe, ProbeStage

TESTS = str(Path(__file__).parent)
TRT_LIBS, CUDA_LIBS = ("libnvinfer.so.10", "libnvonnxparser.so.10"), ("libcudart.so.13", "libcuda.so.1")

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="a fake driver needs a C compiler")


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    """Probes are kept for a process; here each test asks anew."""
    probe_nvidia.cache_clear()
    yield
    probe_nvidia.cache_clear()


# ── ELF ──────────────────────────────────────────────────────────────────────────────────────────


def test_needs_are_read_from_a_real_library() -> None:
    """torch's extension module, as its own linker wrote it."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    (extension,) = Path(spec.origin).parent.glob("_C.*.so")
    assert {"libtorch_python.so", "libc.so.6"} <= set(needed_libraries(extension))


def test_needs_are_read_in_their_order(tmp_path: Path) -> None:
    """A name may be the end of another; a file may need nothing."""
    names = ("libnvinfer.so.10", "so.10", "libc.so.6")
    assert needed_libraries(write_elf(tmp_path / "a.so", *names)) == names
    assert needed_libraries(write_elf(tmp_path / "b.so")) == ()


def test_what_is_no_library_is_refused(tmp_path: Path) -> None:
    """Text, an empty file, and one that was cut anywhere."""
    whole = write_elf(tmp_path / "whole.so", "libc.so.6").read_bytes()
    for content in (b"", b"not a library", *(whole[:length] for length in range(6, len(whole)))):
        (tmp_path / "cut.so").write_bytes(content)
        with pytest.raises(ValueError, match=r"ELF|truncated|empty"):
            needed_libraries(tmp_path / "cut.so")


# ── the product ──────────────────────────────────────────────────────────────────────────────────


def test_the_product_is_exact_in_half_precision() -> None:
    """So a GPU may take TF32 or fp16 and any difference is an error."""
    left, right = operands()
    assert judge((left.astype(np.float16) @ right.astype(np.float16)).astype(np.float32)).obstacle == ""


def test_a_wrong_product_is_seen() -> None:
    """One element, the operands swapped, or another shape."""
    left, right = operands()
    almost = left @ right
    almost[WIDTH - 1, 0] += 1
    for wrong in (almost, right @ left, (left @ right)[:1]):
        assert "differs from numpy's" in judge(wrong).obstacle


# ── climbing ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("version", "stage", "reason", "install"),
    [
        ("dies", "crashed", "looking for a GPU ended with SIGABRT", None),
        ("hangs", "timed_out", "looking for a GPU gave no answer within 3 s and was killed", None),
        ("raises", "loadable", "looking for a GPU failed: RuntimeError: no kernel image is available", None),
        ("stops", "no_device", "there is no GPU", "plug one in"),
        ("works", "ready", "computes on the GPU what numpy computes, imported well", None),
    ],
)
def test_whatever_a_rung_does_is_a_stage_and_a_reason(
    version: str, stage: ProbeStage, reason: str, install: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash and a hang too; the rung at which it happened is said."""
    monkeypatch.setenv("PYTHONPATH", TESTS)
    monkeypatch.setattr(nvidia, "RUNG_TIMEOUT_S", 3 if version == "hangs" else 60)
    rungs: dict[str, ProbeStage] = {
        "reach_import": "loadable",
        "reach_device": "device",
        "reach_product": "ready",
    }
    climb = nvidia._Climb(("demo",), "probe_rungs", rungs)
    monkeypatch.setattr(nvidia, "_CLIMBS", {"demo": climb})
    monkeypatch.setattr(nvidia, "version_of", lambda *_: version)
    expected = Probe(engine="demo", version=version, stage=stage, reason=reason, install=install)
    assert probe_nvidia("demo") == expected


def test_nothing_is_started_for_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan on a machine without a GPU pays for no process."""

    def start(*_: object) -> None:
        raise AssertionError("a child was started")

    monkeypatch.setattr(nvidia, "Child", start)
    monkeypatch.setattr(nvidia, "version_of", lambda *_: None)
    for name in nvidia.NAMES:
        probe = probe_nvidia(name)
        assert (probe.stage, probe.can_build) == ("missing", None)
        assert "is not installed" in probe.reason
        assert str(probe.install).startswith("pip ")


def test_a_plan_vetoes_by_the_same_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the probe's sentence and command, though the study is for the CPU."""
    monkeypatch.setattr(nvidia, "version_of", lambda *_: None)
    spec = OptimizeSpec(model_path="x", engines=("tensorrt",))
    probe = probe_nvidia("tensorrt")
    vetoes = {candidate.vetoed_because for candidate in plan(demo_analysis(), spec, "cpu")}
    assert vetoes == {f"{probe.reason}; mend it with: {probe.install}"}


# ── real engines ─────────────────────────────────────────────────────────────────────────────────

without_driver = pytest.mark.skipif(missing_driver() is None, reason="there is an NVIDIA driver here")


@without_driver
def test_tensorrt_for_rtx_builds_without_a_gpu_and_says_that_it_cannot_run() -> None:
    """The real library, in a real child."""
    pytest.importorskip("tensorrt_rtx_bindings", reason="needs the extra trt-rtx", exc_type=ImportError)
    probe = probe_nvidia("tensorrt-rtx")
    assert (probe.stage, probe.can_build, probe.ready) == ("no_device", True, False)
    assert probe.reason.startswith("can build plans and cannot run them: ")
    assert "libcuda.so.1 cannot be loaded" in probe.reason


def test_a_tensorrt_without_the_layers_is_told_by_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a graph fails in its parser: what is asked for is the layer."""
    old = SimpleNamespace(__version__="8.6.1", INetworkDefinition=object)
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    reached = reach_import(Asked(engine="tensorrt", version="8.6.1"))
    assert reached.obstacle == "tensorrt 8.6.1 cannot update a KV cache in place: TensorRT 10.15 can"
    assert "open-autoglm[tensorrt]" in str(reached.install)
    old.INetworkDefinition = SimpleNamespace(add_kv_cache_update=None)
    assert reach_import(Asked(engine="tensorrt", version="10.16")).obstacle == ""


@without_driver
def test_torch_without_a_driver_is_not_imported_to_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which build it is and that there is no driver, from the metadata alone."""
    monkeypatch.setattr(nvidia, "Child", None)
    for version, stage in (("2.13.0+cpu", "installed"), ("2.13.0", "no_device")):
        monkeypatch.setattr(nvidia, "version_of", lambda *_, version=version: version)
        probe_nvidia.cache_clear()
        probe = probe_nvidia("torch")
        assert (probe.stage, probe.version) == (stage, version)
        assert "there is no NVIDIA driver here" in probe.reason


# ── ONNX Runtime: the package is a fake, its provider's file a real ELF file ─────────────────────

_FAKE_ONNXRUNTIME = """
import numpy
def get_available_providers():
    return ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
def preload_dlls():
    pass
class SessionOptions:
    def __init__(self):
        self.entries = {{}}
    def add_session_config_entry(self, name, value):
        self.entries[name] = value
class InferenceSession:
    def __init__(self, model, options, providers, enable_fallback):
        assert options.entries == {{"session.disable_cpu_ep_fallback": "1"}} and enable_fallback == 0
        self.chosen = "{chosen}" or providers[0]
    def get_providers(self):
        return [self.chosen, "CPUExecutionProvider"]
    def run(self, _, feeds):
        return [feeds["left"] @ feeds["right"]]
"""

FakeOnnxRuntime = Callable[..., None]


def write_metadata(site: Path, name: str, version: str) -> None:
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.fixture
def fake_onnxruntime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeOnnxRuntime:
    """An onnxruntime-gpu whose providers need the given libraries, for this process and its children."""
    site = tmp_path / "site"

    def install(*needs: str, chosen: str = "") -> None:
        write_metadata(site, "onnxruntime-gpu", "1.31.1")
        for provider in ("cuda", "tensorrt"):
            write_elf(site / "onnxruntime/capi" / f"libonnxruntime_providers_{provider}.so", *needs)
        (site / "onnxruntime/__init__.py").write_text(_FAKE_ONNXRUNTIME.format(chosen=chosen))
        monkeypatch.syspath_prepend(site)
        monkeypatch.setenv("PYTHONPATH", str(site))

    return install


@pytest.mark.parametrize(
    ("tensorrt", "clause"), [("11.4.0.106", "of TensorRT installed 11, needs 10"), (None, "is not installed")]
)
def test_the_wrong_tensorrt_is_told_from_none(
    tensorrt: str | None, clause: str, fake_onnxruntime: FakeOnnxRuntime, tmp_path: Path
) -> None:
    """The major version comes from the provider's file, and every library that is missing is named."""
    fake_onnxruntime(*TRT_LIBS, "libc.so.6")
    if tensorrt is not None:
        write_metadata(tmp_path / "site", "tensorrt-cu13", tensorrt)
    probe = probe_nvidia("onnxruntime-tensorrt")
    assert (probe.stage, probe.version) == ("importable", "1.31.1")
    assert ", ".join(TRT_LIBS) in probe.reason
    assert probe.reason.endswith(clause)
    assert "open-autoglm[gpu,tensorrt]" in str(probe.install)


@without_driver
def test_the_drivers_own_library_is_not_a_missing_package(fake_onnxruntime: FakeOnnxRuntime) -> None:
    """It comes with the driver: the stage is that of a machine without a GPU."""
    fake_onnxruntime("libcuda.so.1", "libc.so.6")
    probe = probe_nvidia("onnxruntime-cuda")
    assert (probe.stage, probe.reason) == ("no_device", missing_driver())


# ── the driver: a fake one, compiled here, in the loader's path of a process of its own ──────────

_FAKE_DRIVER = """
#include <stdlib.h>
#include <string.h>
int cuDriverGetVersion(int *version) { *version = %(version)d; return %(version)d ? 0 : 34; }
int cuInit(unsigned flags) { return %(init)d; }
int cuGetErrorName(int code, const char **name) {
  *name = code == 100 ? "CUDA_ERROR_NO_DEVICE" : 0;
  return 0;
}
int cuDeviceGetCount(int *count) { *count = %(gpus)d; return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, "Fake GPU", size); return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = context; return 0; }
int cuCtxSetCurrent(void *context) { return context == 0; }
int cuCtxSynchronize(void) { return 0; }
int cuMemAlloc_v2(unsigned long long *address, size_t size) {
  *address = (unsigned long long)malloc(size);
  return 0;
}
int cuMemFree_v2(unsigned long long address) { free((void *)address); return 0; }
int cuMemcpyHtoD_v2(unsigned long long to, const void *from, size_t size) {
  memcpy((void *)to, from, size);
  return 0;
}
int cuMemcpyDtoH_v2(void *to, unsigned long long from, size_t size) {
  memcpy(to, (void *)from, size);
  return 0;
}
"""

FakeDriver = Callable[..., str]


@pytest.fixture
def with_driver(tmp_path: Path) -> FakeDriver:
    """Run Python code where a driver of this kind is found; what it printed."""

    def compile_library(name: str, source: str) -> None:
        command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(tmp_path / "lib" / name)]
        subprocess.run([*command, f"-Wl,-soname,{name}"], input=source, text=True, check=True)

    def run(code: str, *, version: int = 13000, init: int = 0, gpus: int = 1) -> str:
        (tmp_path / "lib").mkdir()
        compile_library("libcuda.so.1", _FAKE_DRIVER % {"version": version, "init": init, "gpus": gpus})
        compile_library("libcudart.so.13", "int unused;")
        path = f"{tmp_path / 'site'}:{Path(TESTS).parent}"
        environment = {"LD_LIBRARY_PATH": str(tmp_path / "lib"), "PYTHONPATH": path, "PATH": "/usr/bin:/bin"}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    return run


PROBE_CODE = """
from open_autoglm.engines.nvidia import probe_nvidia
probe = probe_nvidia("onnxruntime-cuda")
print(probe.stage, probe.reason, probe.install, sep="|")
"""


@needs_compiler
@pytest.mark.parametrize(
    ("driver", "told"),
    [
        (
            {"version": 12020},
            "no_device|the NVIDIA driver is too old: it supports CUDA 12.2, and ONNX Runtime's CUDA provider "
            "needs CUDA 13|apt-get install nvidia-driver-580",
        ),
        ({"version": 0}, "no_device|the NVIDIA driver does not answer (error 34)|None"),
        ({"init": 100}, "no_device|the NVIDIA driver does not start (CUDA_ERROR_NO_DEVICE)|None"),
        ({"init": 999}, "no_device|the NVIDIA driver does not start (error 999)|None"),
        ({"gpus": 0}, "no_device|the NVIDIA driver shows no GPU (CUDA_ERROR_NO_DEVICE)|None"),
        ({}, "ready|computes on the GPU what numpy computes, CUDA 13.0 driver, Fake GPU|None"),
    ],
    ids=["too-old", "stub", "no-device", "broken", "hidden", "fit"],
)
def test_a_driver_is_judged_by_what_it_says(
    driver: dict[str, int], told: str, fake_onnxruntime: FakeOnnxRuntime, with_driver: FakeDriver
) -> None:
    """Its CUDA version against the one that the provider links, whether it starts, and its GPUs."""
    fake_onnxruntime(*CUDA_LIBS)
    assert with_driver(PROBE_CODE, **driver).startswith(told)


@needs_compiler
def test_a_session_on_the_cpu_is_not_taken_for_one_on_the_gpu(
    fake_onnxruntime: FakeOnnxRuntime, with_driver: FakeDriver
) -> None:
    """Even where the product is right."""
    fake_onnxruntime(*CUDA_LIBS, chosen="CPUExecutionProvider")
    told = with_driver(PROBE_CODE)
    assert told == "device|the session chose CPUExecutionProvider instead of CUDAExecutionProvider|None"


@needs_compiler
def test_memory_of_the_driver_holds_what_was_put_there(with_driver: FakeDriver) -> None:
    """Through its C interface: sizes, addresses and directions."""
    code = """
import numpy as np
from open_autoglm.engines.capability import operands
from open_autoglm.engines.capability_driver import DeviceMemory
memory, (left, right) = DeviceMemory(), operands()
with memory.holding(left) as first, memory.holding(right) as second:
    back = np.zeros_like(right)
    memory.read(second, back)
    print(first != second, np.array_equal(back, right), np.array_equal(left, right))
"""
    assert with_driver(code) == "True True False"
