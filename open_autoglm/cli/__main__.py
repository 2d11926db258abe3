"""``python -m open_autoglm.cli``, for environments whose scripts are not on PATH."""

from open_autoglm.cli.main import main

main()
