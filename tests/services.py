"""Served bundles without HTTP around them, in an event loop of the tests' own."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from open_autoglm.bundle import open_bundle
from open_autoglm.serving.fleet import Fleet, Launcher
from open_autoglm.serving.messages import EngineOptions
from open_autoglm.serving.metrics import Board
from open_autoglm.serving.service import Service, ServiceOptions, start_service
from open_autoglm.serving.source import Source

ROOM_TOKENS = 200

Weights = NDArray[np.float32]


def engine_options(bundle: Path, slots: int = 2, max_tokens: int = ROOM_TOKENS) -> EngineOptions:
    return EngineOptions(bundle=bundle, slots=slots, max_tokens=max_tokens, threads=1)


class Loop:
    """An event loop, and the services that live in it."""

    def __init__(self, logs: Path) -> None:
        self.runner = asyncio.Runner()
        self._logs = logs
        self._services: list[Service] = []

    def serve(self, bundle: Path, name: str = "tiny") -> Service:
        log = self._logs / f"engine-{len(self._services)}.log"
        options, limits = engine_options(bundle), ServiceOptions(queue=8, deadline_s=30)
        manifest, found = open_bundle(bundle)
        metrics = Board(name).of("", found.digest, "champion")
        started = start_service(name, Source(bundle), manifest, found.digest, options, limits, metrics, log)
        self._services.append(self.runner.run(started))
        return self._services[-1]

    async def _close(self) -> None:
        for service in self._services:
            await service.engine.close()

    def close(self) -> None:
        self.runner.run(self._close())
        self.runner.close()


@contextmanager
def event_loop(logs: Path) -> Iterator[Loop]:
    """One for a whole module: an engine process takes seconds to start."""
    loop = Loop(logs)
    try:
        yield loop
    finally:
        loop.close()


def fleet_of(service: Service) -> Fleet:
    """With nobody but ``service``."""
    engine = engine_options(service.source.bundle)
    launcher = Launcher(service.name, engine, ServiceOptions(queue=8, deadline_s=30), Path(os.devnull))
    return Fleet(launcher, Board(service.name), service)


def counted(service: Service) -> str:
    """All series of its clients' figures."""
    return service.metrics._board.exposition().decode()


def with_nan(bundle: Path) -> None:
    """Every weight becomes NaN, as after a conversion that overflowed."""
    _rewrite(bundle, lambda weights: np.full_like(weights, np.nan))


def with_other_weights(bundle: Path) -> None:
    """Finite, but of no model: each number stands where its neighbour stood."""
    _rewrite(bundle, lambda weights: np.roll(weights, 1))


def _rewrite(bundle: Path, change: Callable[[Weights], Weights]) -> None:
    path = bundle / "model" / "model.onnx.data"
    weights = np.fromfile(path, dtype=np.float32)
    changed = change(weights)
    path.unlink()  # an export's file is linked: the original stays as it is
    changed.tofile(path)
