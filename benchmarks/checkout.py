"""Let a checkout that nobody installed find its engines, as on a host without a network.

Engines come through entry points, which pip writes when it installs a package. Where it did not, the same
lines are written into a folder on the path, of this process and of its children.
"""

from __future__ import annotations

import os
import sys
import tomllib
from importlib import invalidate_caches
from importlib.metadata import entry_points
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GROUP = "open_autoglm.engines"


def declare_engines(folder: Path) -> bool:
    """Write into ``folder`` what is missing; False if the engines of this checkout can be found already."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared: dict[str, str] = project["entry-points"][GROUP]
    known = {point.name: point.value for point in entry_points(group=GROUP)}
    if declared.items() <= known.items():
        return False
    information = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    information.mkdir(parents=True, exist_ok=True)
    (information / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = [f"{name} = {value}" for name, value in declared.items()]
    (information / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines, ""]))
    places = [str(folder), str(ROOT)]
    sys.path[:0] = places
    inherited = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([*places, *filter(None, [inherited])])
    invalidate_caches()
    return True
