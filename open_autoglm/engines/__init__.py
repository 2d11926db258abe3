"""Runtimes behind one contract; discovered by entry point, imported only when used."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points

from open_autoglm.engines.contract import Engine
from open_autoglm.engines.unloadable import UnloadableEngine
from open_autoglm.errors import UserError
from open_autoglm.schemas import Probe

GROUP = "open_autoglm.engines"


@cache
def names() -> tuple[str, ...]:
    """Names of all installed engines, sorted; imports none of them."""
    return tuple(sorted({point.name for point in entry_points(group=GROUP)}))


@cache
def get(name: str) -> Engine:
    """The engine called ``name``; a stand-in that says why, if its package cannot be loaded.

    Raises UserError if there is none, naming the ones there are.
    """
    for point in entry_points(group=GROUP):
        if point.name == name:
            try:
                engine: Engine = point.load()()
            except (ImportError, AttributeError, SyntaxError, TypeError) as error:
                return UnloadableEngine(name, f"{point.value} cannot be loaded: {error}")
            return engine
    raise UserError(f"unknown engine {name!r}: choose from {', '.join(names())}")


def probe(name: str) -> Probe:
    """What the engine called ``name`` can do here: on the CPU, or on a GPU if it does not serve the CPU.

    Raises UserError as `get` does.
    """
    engine = get(name)
    on_cpu = engine.probe("cpu")
    return engine.probe("gpu") if on_cpu.stage == "no_device" else on_cpu
