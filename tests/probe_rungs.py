"""Rungs that go wrong in every way, for the probe's child; see `open_autoglm.engines.capability`."""

from __future__ import annotations

import os
import time

from open_autoglm.engines.capability import Asked, Reached


def reach_import(_asked: Asked) -> Reached:
    return Reached(found="imported well")


def reach_device(asked: Asked) -> Reached:
    """Go wrong as the version says."""
    match asked.version:
        case "dies":
            os.abort()
        case "hangs":
            time.sleep(60)
        case "raises":
            raise RuntimeError("no kernel image is available")
        case "stops":
            return Reached(obstacle="there is no GPU", install="plug one in")
    return Reached()


def reach_product(_asked: Asked) -> Reached:
    return Reached()
