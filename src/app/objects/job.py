"""The sweep: what killed processes left behind in a bucket costs money until somebody removes it.

Invariant: only uploads that are far older than an upload through /s3 can become are aborted, and only below keys that
/s3 may write.
"""

from collections.abc import Callable
from datetime import datetime, timedelta

from app.core.runs import Context, Job, Report

NAME = "s3_sweep"
INTERVAL_SECONDS = 3600

Sweep = Callable[[datetime, Callable[[str], bool]], int]
"""Abort the uploads that were begun before under keys that are ours; how many."""


def build(sweep: Sweep, hours: int, ours: Callable[[str], bool], clock: Callable[[], datetime]) -> Job:
    """The job."""

    def work(context: Context) -> Report:
        before = clock() - timedelta(hours=hours)
        if context.dry_run:
            return Report(notes=(f"would abort multipart uploads that were begun before {before:%Y-%m-%d %H:%M} UTC",))
        count = sweep(before, ours)
        return Report(notes=(f"{count} multipart uploads aborted",))

    return Job(NAME, INTERVAL_SECONDS, work, off="" if hours else "set S3_SWEEP_HOURS")
