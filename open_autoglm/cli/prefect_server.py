"""Where a flow run from the command line reports to: the address in the environment, the local stack
if it is up, or else a server of Prefect's own that lives as long as the command."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from pathlib import Path

from open_autoglm.errors import UserError
from open_autoglm.settings import Settings


def is_up(url: str) -> bool:
    """Whether a server answers at ``url``; asks once and waits at most a second."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=1):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def use_prefect(settings: Settings) -> None:
    """Set Prefect's environment. Must be called before Prefect is imported."""
    defaults = {
        "PREFECT_HOME": str(settings.home / "prefect"),
        "PREFECT_LOGGING_LEVEL": "WARNING",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "open_autoglm.progress",
        # What ends a run is raised here too; its traceback need not be printed three times.
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "DO_NOT_TRACK": "true",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    home = Path(os.environ["PREFECT_HOME"])
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to {home} ({error.strerror}): set AUTOGLM_HOME to a directory of yours"
        ) from None
    if "PREFECT_API_URL" not in os.environ and is_up(f"{settings.prefect_url}/api"):
        os.environ["PREFECT_API_URL"] = f"{settings.prefect_url}/api"
