"""A slow engine whose configuration is still the best one is started anew: the process is what is wrong."""

from __future__ import annotations

from pathlib import Path

from open_autoglm.monitoring.diagnosis import ask_admin, find_served
from open_autoglm.monitoring.windows import NoWindow

_LOAD_S = 1800.0
"""An engine may have to be built, and is examined."""


def renew_engine(home: Path, digest: str) -> str:
    """Let the endpoint here whose champion has that bundle start it anew, beside the one that answers.

    Returns what came of it, as a sentence.
    """
    import httpx

    served = find_served(home, digest)
    if isinstance(served, NoWindow):
        return f"Its engine was not started anew: {served.reason}."
    try:
        fleet = ask_admin(served.here, "POST", "/admin/renew", {}, _LOAD_S).json()
    except httpx.HTTPStatusError as error:
        return f"Its engine was not started anew: {error.response.json()['error']['message']}."
    except (httpx.HTTPError, OSError) as error:
        why = str(error) or type(error).__name__
        return f"Its engine was not started anew: {served.here.url} does not answer: {why}."
    return f"Its engine was started anew: {fleet['events'][-1]['told']}."
