"""The rungs of ONNX Runtime's CUDA and TensorRT providers; see :mod:`open_autoglm.engines.capability`.

A list of providers says only what was compiled in, and a session whose provider cannot be loaded runs on
the CPU without a word. So the libraries are loaded one by one, and the session may not fall back.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from open_autoglm.engines.capability import WIDTH, Asked, Reached, judge, operands
from open_autoglm.engines.capability_driver import LIBRARY as DRIVER_LIBRARY
from open_autoglm.engines.capability_driver import find_device
from open_autoglm.engines.capability_elf import needed_libraries
from open_autoglm.engines.capability_packages import INSTALL, TENSORRT
from open_autoglm.packages import version_of


class _Provider(NamedTuple):
    name: str
    file: str
    said: str


_PROVIDERS = {
    "onnxruntime-cuda": _Provider(
        "CUDAExecutionProvider",
        "libonnxruntime_providers_cuda.so",
        "ONNX Runtime's CUDA provider",
    ),
    "onnxruntime-tensorrt": _Provider(
        "TensorrtExecutionProvider",
        "libonnxruntime_providers_tensorrt.so",
        "ONNX Runtime's TensorRT provider",
    ),
}


def reach_import(asked: Asked) -> Reached:
    provider = _PROVIDERS[asked.engine]
    try:
        import onnxruntime as ort
    except (ImportError, OSError) as error:
        obstacle = f"onnxruntime-gpu {asked.version} cannot be imported: {error}"
        return Reached(obstacle=obstacle, install=INSTALL[asked.engine])
    if provider.name in ort.get_available_providers():
        return Reached()
    obstacle = f"the onnxruntime that is imported was built without {provider.name}"
    return Reached(obstacle=obstacle, install=INSTALL[asked.engine])


def reach_libraries(asked: Asked) -> Reached:
    """Load all that the provider's file needs, less what comes with the driver; name all that is missing."""
    import onnxruntime as ort

    provider = _PROVIDERS[asked.engine]
    needed = needed_libraries(_file(ort, provider))
    ort.preload_dlls()  # from the CUDA packages beside it
    if asked.engine == "onnxruntime-tensorrt":
        with suppress(ImportError):
            import_module("tensorrt_libs")  # loads all that its folder holds
    missing = [name for name in needed if name != DRIVER_LIBRARY and not _loads(name)]
    if not missing:
        return Reached()
    clause = _wrong_tensorrt(missing)
    obstacle = f"{provider.said} needs what cannot be loaded here, {', '.join(missing)}{clause}"
    return Reached(obstacle=obstacle, install=INSTALL[asked.engine])


def _wrong_tensorrt(missing: Sequence[str]) -> str:
    """``: of TensorRT installed 11, needs 10``, or nothing if that is not what is wrong."""
    needs = _major("libnvinfer", missing)
    if needs is None:
        return ""
    installed = version_of(*TENSORRT)
    if installed is None:
        return ": TensorRT is not installed"
    major = int(installed.partition(".")[0])
    return f": of TensorRT installed {major}, needs {needs}" if major != needs else ""


def reach_device(asked: Asked) -> Reached:
    import onnxruntime as ort

    provider = _PROVIDERS[asked.engine]
    return find_device(provider.said, _major("libcudart", needed_libraries(_file(ort, provider))))


def reach_product(asked: Asked) -> Reached:
    import onnxruntime as ort

    from open_autoglm.export.matmul_graph import matmul_graph

    wanted = _PROVIDERS[asked.engine].name
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    session = ort.InferenceSession(matmul_graph(WIDTH), options, providers=[wanted], enable_fallback=0)
    chosen = session.get_providers()[0]
    if chosen != wanted:
        return Reached(obstacle=f"the session chose {chosen} instead of {wanted}")
    left, right = operands()
    (product,) = session.run(None, {"left": left, "right": right})
    return judge(product)


def _file(ort: Any, provider: _Provider) -> Path:
    return Path(ort.__file__).parent / "capi" / provider.file


def _major(library: str, names: Sequence[str]) -> int | None:
    """13 for ``libcudart`` among ``libcudart.so.13, …``; None if it is not there."""
    found = [re.fullmatch(rf"{library}\.so\.(\d+)", name) for name in names]
    return next((int(match[1]) for match in found if match), None)


def _loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True
