"""An export in a child that tells how much memory it took."""

from __future__ import annotations

import time

from open_autoglm.export.store import ExportJob, export_job
from open_autoglm.measure.memory import read_peak_rss_bytes
from open_autoglm.schemas import Model


class MeasuredExport(Model):
    """Answer of :func:`export_measured`."""

    route: str
    seconds: float
    peak_rss_bytes: int


def export_measured(job: ExportJob) -> MeasuredExport:
    """The peak is of this process since its start, without processes that an exporter starts."""
    started = time.monotonic()
    done = export_job(job)
    seconds = time.monotonic() - started
    return MeasuredExport(route=done.route, seconds=seconds, peak_rss_bytes=read_peak_rss_bytes())
