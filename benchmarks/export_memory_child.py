"""An export in a child that tells how much memory it took, and how much of that were mapped files."""

from __future__ import annotations

import time

from pydantic import Field

from open_autoglm.export.store import ExportJob, export_job
from open_autoglm.measure.memory import FootprintWatch
from open_autoglm.schemas import Model


class Taken(Model):
    """Answer of :func:`export_watched`, without processes that an exporter starts."""

    peak_rss_bytes: int = Field(description="exact, since the start of the process")
    mapped_file_bytes: int = Field(description="of the sample with the highest RSS")
    seconds: float


def export_watched(job: ExportJob) -> Taken:
    """The memory is sampled meanwhile, so that the seconds are a little more than they would be."""
    watch = FootprintWatch()
    started = time.monotonic()
    with watch.sampling():
        export_job(job)
    seconds = time.monotonic() - started
    found = watch.footprint()
    return Taken(
        peak_rss_bytes=found.peak_rss_bytes, mapped_file_bytes=found.mapped_file_bytes, seconds=seconds
    )
