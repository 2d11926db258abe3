"""What a long run tells while it runs: one line per event, through the standard logging module.

The command line prints these lines, Prefect shows them among a run's logs, and a library user may
listen to the logger or not.
"""

from __future__ import annotations

import logging

LOGGER = "open_autoglm.progress"


def announce(line: str) -> None:
    """Tell whoever listens."""
    logging.getLogger(LOGGER).info(line)
