"""What the study measured of the champion, where it says something of the endpoint that is watched.

It does if the bundle is served on this machine, and the study ran on a host with the same settings and asked
one request at a time. Which of its figures compare with the endpoint's traffic, the baseline knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from open_autoglm.bundle import evidence_of, open_bundle
from open_autoglm.errors import UserError
from open_autoglm.measure.environment import host_environment
from open_autoglm.monitoring.baseline import WATCHED, Anchor, Watched
from open_autoglm.monitoring.diagnosis import find_served
from open_autoglm.monitoring.windows import NoWindow
from open_autoglm.schemas import LatencyWindow

_ITS_NAME: Mapping[Watched, str] = {"ttft": "ttft_ms", "tpot": "tpot_ms"}


def trial_anchor(home: Path, window: LatencyWindow) -> Anchor | None:
    """Of the bundle that ``window`` is of."""
    served = find_served(home, window.bundle_digest)
    return None if isinstance(served, NoWindow) else anchor_of(served.bundle, host_environment())


def anchor_of(bundle: Path, host: Mapping[str, str]) -> Anchor | None:
    """The study's figures, if it ran on ``host``."""
    try:
        manifest, _ = open_bundle(bundle, verify=False)
        evidence = evidence_of(manifest)
    except UserError:  # swapped and removed meanwhile, or a study that kept less
        return None
    if evidence.request is None or evidence.request.batch_size != 1:
        return None
    if any(evidence.host.get(name) != value for name, value in host.items()):
        return None
    medians = {
        watched: evidence.metrics[_ITS_NAME[watched]].median
        for watched in WATCHED
        if _ITS_NAME[watched] in evidence.metrics
    }
    if not medians:
        return None
    return Anchor(
        prompt_tokens=evidence.request.prompt_tokens,
        output_tokens=evidence.request.output_tokens,
        median_ms=medians,
    )
