"""The rungs of torch on CUDA; see :mod:`open_autoglm.engines.capability`."""

from __future__ import annotations

from open_autoglm.engines.capability import Asked, Reached, judge, operands
from open_autoglm.engines.capability_driver import find_device
from open_autoglm.engines.capability_packages import INSTALL


def reach_import(asked: Asked) -> Reached:
    """Its wheels load CUDA's libraries when torch is imported."""
    try:
        import torch
    except (ImportError, OSError) as error:
        obstacle = f"torch {asked.version} cannot be imported: {error}"
        return Reached(obstacle=obstacle, install=INSTALL["torch"])
    if torch.version.cuda is None:
        return Reached(obstacle=f"torch {asked.version} is a build without CUDA", install=INSTALL["torch"])
    return Reached(found=f"for CUDA {torch.version.cuda}")


def reach_device(asked: Asked) -> Reached:
    import torch

    assert torch.version.cuda is not None  # or the first rung would not have been reached
    reached = find_device(f"torch {asked.version}", int(torch.version.cuda.partition(".")[0]))
    if reached.obstacle or torch.cuda.is_available():
        return reached
    return Reached(obstacle=f"torch {asked.version} finds no GPU that it can use")


def reach_product(_asked: Asked) -> Reached:
    import torch

    left, right = (torch.from_numpy(matrix).to("cuda") for matrix in operands())
    return judge((left @ right).cpu().numpy())
