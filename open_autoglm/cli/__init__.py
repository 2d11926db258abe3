"""The command line. Heavy imports happen inside commands, so that ``--help`` answers at once."""

from open_autoglm.cli.main import main

__all__ = ["main"]
