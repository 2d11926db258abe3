"""The packages that NVIDIA engines come in, and what installs them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

TENSORRT = (
    "tensorrt", "tensorrt-cu13", "tensorrt-cu12",
    "tensorrt-cu13-bindings", "tensorrt-cu12-bindings",
)  # fmt: skip
"""Any of these brings TensorRT, all of one installation in the same version."""

TENSORRT_RTX = ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu13-bindings")
"""Likewise for TensorRT for RTX."""

_WITHOUT_CPU_WHEELS = "pip uninstall -y onnxruntime onnxruntime-genai onnxruntime-gpu && pip install "
"""The wheels for CPU and GPU write the same folders."""

INSTALL: Mapping[str, str] = MappingProxyType(
    {
        "torch": "pip uninstall -y torch && pip install torch==2.13.0  # from an index with CUDA builds",
        "onnxruntime-cuda": f"{_WITHOUT_CPU_WHEELS}'open-autoglm[gpu]'",
        "onnxruntime-tensorrt": f"{_WITHOUT_CPU_WHEELS}'open-autoglm[gpu,tensorrt]'",
        "tensorrt": "pip install 'open-autoglm[tensorrt]'  # fetches its libraries from NVIDIA's own index",
        "tensorrt-rtx": "pip install 'open-autoglm[trt-rtx]'",
    }
)
"""What installs each engine in the version that is known to work."""
