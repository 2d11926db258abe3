"""What the probes of NVIDIA engines share: the question, the answer, and the product they compute.

A probe climbs rung by rung (:mod:`open_autoglm.engines.nvidia`). Each rung is a job that takes `Asked`
and returns `Reached`, in the engine's ``capability_*`` module. It runs in a child process, all rungs of one
engine in the same one, so what a rung imported and loaded is there for the next.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from open_autoglm.schemas import Model

WIDTH = 32
"""Of the square matrices that are multiplied."""

Matrix = NDArray[np.float32]


class Asked(Model):
    """Payload of every rung."""

    engine: str
    version: str = Field(description="of its package, as installed")


class Reached(Model):
    """Answer of every rung: reached, or what stands in the way and the command that would remove it."""

    obstacle: str = Field("", description="one clause; empty if the rung was reached")
    install: str | None = None
    found: str = Field("", description="what is worth telling of it")


def operands() -> tuple[Matrix, Matrix]:
    """Two ``float32[WIDTH, WIDTH]`` of small whole numbers.

    Their product is exact in fp32, and in the TF32 or fp16 that a GPU may take instead, so it is compared
    for equality and no tolerance can hide a wrong one.
    """
    numbers = np.random.default_rng(0).integers(-4, 5, size=(2, WIDTH, WIDTH))
    left, right = numbers.astype(np.float32)
    return left, right


def judge(product: Matrix) -> Reached:
    """Whether ``product`` is what numpy makes of the operands."""
    left, right = operands()
    if product.shape == (WIDTH, WIDTH) and np.array_equal(product, left @ right):
        return Reached()
    return Reached(obstacle=f"a product of {WIDTH} by {WIDTH} matrices differs from numpy's")
