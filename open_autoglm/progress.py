"""What a long run tells while it runs: one line per event, through the standard logging module.

The command line prints these lines, Prefect shows them among a run's logs, and a library user may
listen to the logger or not.
"""

from __future__ import annotations

import logging

LOGGER = "open_autoglm.progress"
# A level of its own: Prefect, like most hosts, leaves libraries at WARNING, and these lines are wanted.
logging.getLogger(LOGGER).setLevel(logging.INFO)


def announce(line: str) -> None:
    """Tell whoever listens."""
    logging.getLogger(LOGGER).info(line)
