"""Linear layers of a torch model with 8- or 4-bit weights, by torchao, beside bf16 arithmetic.

Only weights are rounded. int8 and fp8 (E4M3) have one scale per output. On the CPU inductor turns int8's
product into ``aten._weight_int8pack_mm``, on a GPU it widens a tile at a time inside its kernel. int4 has
a scale and a zero per group of inputs, packed for ``aten._weight_int4pack_mm_for_cpu``. All these kernels
read the weights as they are stored.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from open_autoglm.schemas import Precision

_INSTALL = "pip install 'open-autoglm[torchao]'"
_MINIMUM = (0, 18)

GROUP_SIZES = (32, 64, 128)
"""Of int4: neighbouring inputs that share a scale and a zero; what the kernel can read."""


def missing_torchao() -> str | None:
    """None if torchao can round weights here, else the reason why not and what mends it."""
    try:
        found = version("torchao")
    except PackageNotFoundError:
        return f"needs torchao, which is not installed; mend it with: {_INSTALL}"
    if tuple(int(part) for part in found.split(".")[:2]) < _MINIMUM:
        return f"torchao {found} is older than {_MINIMUM[0]}.{_MINIMUM[1]}; mend it with: {_INSTALL}"
    return None


def round_linears(model: Any, precision: Precision, group_size: int) -> str:
    """Round the weights of every linear layer of ``model`` in place; say how many of how many.

    The head is one of them: each token reads all of it. If it is tied to the embedding it gets rounded
    weights of its own, and the embedding, of which a token reads one row, stays what it is. At int4 a layer
    whose inputs are no multiple of ``group_size`` keeps its weights. Raises RuntimeError if all of them do,
    since the figures would be of another precision than the candidate's.
    """
    from torch import nn
    from torchao.quantization import quantize_

    quantize_(model, _config(precision, group_size), lambda module, _: isinstance(module, nn.Linear))
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    rounded = sum(hasattr(module.weight, "qdata") for module in linears)
    if not rounded:
        raise RuntimeError(f"no linear layer has a multiple of {group_size} inputs: none was rounded")
    return f"{rounded} of {len(linears)} linear layers"


def _config(precision: Precision, group_size: int) -> Any:
    # torchao's inductor settings would outlive the call and change what others compile: left alone.
    if precision == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return Int8WeightOnlyConfig(set_inductor_config=False)
    if precision == "fp8":
        from torchao.quantization import Float8WeightOnlyConfig

        return Float8WeightOnlyConfig(set_inductor_config=False)
    # The only one of torchao's int4 layouts that the CPU has a kernel for.
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    return PrototypeInt4WeightOnlyConfig(group_size=group_size, set_inductor_config=False)
