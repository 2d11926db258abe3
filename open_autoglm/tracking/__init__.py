"""MLflow: studies and trials as runs, champions as versions, and who moved which alias when.

Everything goes through one ``MlflowClient`` with explicit run ids; MLflow's fluent API orphans runs
in threads. Everything can be repeated: runs are found again by tag, versions by bundle digest.
"""

from open_autoglm.tracking.aliases import CHALLENGER, PREVIOUS, UnderWay
from open_autoglm.tracking.bundles import CHAMPION, RegisteredChampion
from open_autoglm.tracking.cache import NoRoom, NotFetched, RegisteredVersion, in_use
from open_autoglm.tracking.connection import Unreachable, mlflow_link
from open_autoglm.tracking.events import sentence
from open_autoglm.tracking.registry import registered_name
from open_autoglm.tracking.tracker import Tracker

__all__ = [
    "CHALLENGER",
    "CHAMPION",
    "PREVIOUS",
    "NoRoom",
    "NotFetched",
    "RegisteredChampion",
    "RegisteredVersion",
    "Tracker",
    "UnderWay",
    "Unreachable",
    "in_use",
    "mlflow_link",
    "registered_name",
    "sentence",
]
