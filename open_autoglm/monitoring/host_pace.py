"""How much of a window's slowness is its host's: told by a fixed piece of work that the endpoint times.

A host that is slower for everybody today is no slower engine. The endpoint times the same short work while
nobody is answered (:mod:`open_autoglm.serving.pace`), and the baseline learns how far the engine's time
follows it: a control variate (Lavenberg and Welch, *Management Science* 27, 1981; as CUPED, Deng et al.,
WSDM 2013). Nothing is assumed of how alike the two are. Where the work says nothing of the engine, as beside
a GPU, no slope stands out and nothing changes.

Two series that both wander for hours seem related where they are not (Granger and Newbold, *J. Econometrics*
2, 1974), so the slope is that of their changes within an hour. And the host is believed only as far as the
lesson has seen it go: a neighbour that is worse than any before is not explained away.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from open_autoglm.monitoring.noise import LEAST_WINDOWS, robust_sd
from open_autoglm.schemas.base import Model

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

_LAG = 4
"""Windows between the two whose change is compared: in fewer a host moves little beside chance."""

_STANDS_OUT = 3.0
"""Standard errors that a slope must be above zero."""

_FAR = 3.0
"""Standard deviations of the usual, beyond which the host is not believed, and changes do not count."""


class HostEffect(Model):
    """What the engine's time owes to its host's pace, of one stage."""

    usual_ms: float = Field(gt=0, description="of the fixed piece of work: its median while it was learned")
    spread: float = Field(ge=0, description="standard deviation of its logarithm, without bursts")
    slope: float = Field(gt=0, description="of the logarithm of the engine's time over that of the work's")
    error: float = Field(ge=0, description="of the slope")

    def log_share(self, pace_ms: float) -> float:
        """By how much, as a logarithm, the engine is slower for its host."""
        return self.slope * self._departure(pace_ms)

    def uncertainty(self, pace_ms: float) -> float:
        """Standard error of that."""
        return self.error * abs(self._departure(pace_ms))

    def _departure(self, pace_ms: float) -> float:
        limit = _FAR * self.spread
        return min(max(math.log(pace_ms / self.usual_ms), -limit), limit)


def host_effect(errors: Floats, paces_ms: Floats, ends: Floats) -> HostEffect | None:
    """From what a baseline leaves unexplained (log ratios), the work's time in the same windows, and their
    ends, numbered in windows. None if the one does not visibly follow the other."""
    logs = np.log(paces_ms)
    spread = robust_sd(logs)
    pairs = _pairs(ends)
    changes, others = (series[pairs[:, 1]] - series[pairs[:, 0]] for series in (logs, errors))
    near = _near(changes) & _near(others)
    if near.sum() < LEAST_WINDOWS // 2:
        return None
    changes, others = changes[near], others[near]
    squares = float(changes @ changes)
    slope = float(changes @ others) / max(squares, 1e-12)
    rest = others - slope * changes
    # Changes over four windows overlap: a fourth of them are known independently.
    error = math.sqrt(float(rest @ rest) / max(len(rest) - 1, 1) / max(squares, 1e-12) * _LAG)
    if slope <= _STANDS_OUT * error:
        return None
    return HostEffect(usual_ms=math.exp(float(np.median(logs))), spread=spread, slope=slope, error=error)


def _pairs(ends: Floats) -> NDArray[np.int64]:
    """Indices of windows that are ``_LAG`` apart, though some between them may be missing."""
    later = np.searchsorted(ends, ends + _LAG - 0.5)
    found = [
        (now, then)
        for now, then in enumerate(later.tolist())
        if then < len(ends) and abs(ends[then] - ends[now] - _LAG) < 0.5
    ]
    return np.array(found, dtype=np.int64).reshape(-1, 2)


def _near(changes: Floats) -> NDArray[np.bool_]:
    """Without those to or from a burst."""
    if not len(changes):
        return np.zeros(0, dtype=bool)
    return np.abs(changes) <= _FAR * robust_sd(changes)
