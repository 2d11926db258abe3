"""Finding engines: by entry point, and with a reason when a package is broken."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest
from studies import demo_study

from open_autoglm import engines
from open_autoglm.errors import UserError
from open_autoglm.planning import plan
from open_autoglm.schemas import OptimizeSpec


@pytest.mark.parametrize("value", ["no_such_module:Engine", "json:NoSuchName", "json:dumps"])
def test_a_broken_plug_in_is_a_veto_with_its_reason(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that cannot be imported, lacks the class, or names no class ends nothing."""
    broken = EntryPoint(name="broken", value=value, group=engines.GROUP)
    monkeypatch.setattr(engines, "entry_points", lambda **_: [broken])
    for cached in (engines.names, engines.get):
        cached.cache_clear()
    try:
        probe = engines.get("broken").probe("cpu")
        assert not probe.ready
        assert value in probe.reason
        (candidate,) = plan(demo_study().analysis, OptimizeSpec(model_path="x"), "cpu")
        assert candidate.vetoed_because == probe.reason
    finally:
        for cached in (engines.names, engines.get):
            cached.cache_clear()


def test_an_unknown_engine_is_refused_with_the_known_ones() -> None:
    """The sentence lists what could have been meant."""
    with pytest.raises(UserError, match=r"unknown engine 'onyx': choose from .*onnxruntime.*torch"):
        engines.get("onyx")
