"""How the activations of a standard graph are rounded, from what flows through its fp32 form on a text.

A compiler needs one scale per value, known before it sees a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from open_autoglm.export.calibrate import calibration_windows, observe
from open_autoglm.export.graph import DecoderFacts, load_decoder
from open_autoglm.export.linears import Decoder, Vector
from open_autoglm.export.rounding import by_source, choose, smoothed_by
from open_autoglm.export.standard_weights import LARGEST
from open_autoglm.schemas import Checkpoint


@dataclass(frozen=True)
class Calibration:
    """What is known of the values that linear layers read, by the names they have in the graph."""

    scales: Mapping[str, float] = field(default_factory=dict)
    """Of values that are rounded: the head's is not, nor is one that no single scale fits."""

    smoothing: Mapping[str, Vector] = field(default_factory=dict)
    """``float32[inputs]``: what the weights that multiply a value are multiplied by."""

    divided: Mapping[str, Vector] = field(default_factory=dict)
    """``float32[outputs]``: what the weights that make such a value are divided by instead."""


NOT_CALIBRATED = Calibration()


def calibrate_fp8(checkpoint: Checkpoint, exact: Path) -> Calibration:
    """Scales that just hold the largest value seen. fp8 resolves small numbers beside large ones.

    ``exact`` has the fp32 graph of ``checkpoint``.
    """
    decoder = Decoder(load_decoder(exact).graph, exact)
    roles = decoder.roles()
    sources = {linear.source for linear in decoder.linears() if roles[linear.output] != "head"}
    seen = observe(exact, sorted(sources), calibration_windows(checkpoint), DecoderFacts.read(exact))
    return Calibration(scales={name: float(seen[name].largest.max()) / LARGEST["fp8"] for name in sources})


def calibrate_int8(checkpoint: Checkpoint, exact: Path) -> Calibration:
    """Smoothing and scales with the least error of the products, see :mod:`~open_autoglm.export.rounding`.

    A value gets a scale if that costs little more than one per token would; it is left as it is otherwise.
    """
    decoder = Decoder(load_decoder(exact).graph, exact)
    roles = decoder.roles()
    linears = [linear for linear in decoder.linears() if roles[linear.output] != "head"]
    readers = by_source(linears)
    seen = observe(exact, sorted(readers), calibration_windows(checkpoint), DecoderFacts.read(exact))
    chosen = choose(decoder, linears, seen, frozenset(readers))
    makers = {source: smoothed_by(decoder, source, readers[source]) for source in readers}
    return Calibration(
        scales={source: best.scale for source, best in chosen.items() if best.scale is not None},
        smoothing={source: chosen[source].smoothing for source, maker in makers.items() if maker},
        divided={maker: chosen[source].smoothing for source, maker in makers.items() if maker},
    )
