"""Cleanup jobs: uploads that killed processes left in a bucket, and objects that runs set aside long ago.

Invariant: an upload is aborted only if it is far older than any /s3 upload can be, and only below keys that /s3 may
write; only objects in the `_set_aside` folders are deleted.
"""

from collections.abc import Callable, Mapping
from datetime import datetime, timedelta

from app.core.errors import Permanent, Transient
from app.core.runs import Context, Failure, Job, Report
from app.object_store.set_aside import SetAsideStore

NAME = "s3_sweep"
HOUSEKEEPING = "housekeeping"  # belongs to no pipeline
INTERVAL_SECONDS = 3600
SET_ASIDE_NAME = "set_aside_sweep"
SET_ASIDE_INTERVAL_SECONDS = 86_400
SET_ASIDE_HINT = (
    "let the key list, and delete in, the _set_aside folders (s3:ListBucket, s3:DeleteObject), "
    "or set SET_ASIDE_DAYS=0 and a lifecycle rule"
)

Sweep = Callable[[datetime, Callable[[str], bool]], int]
"""Abort uploads of our keys that were started before this time; returns how many."""


def build(sweep: Sweep, hours: int, ours: Callable[[str], bool], clock: Callable[[], datetime]) -> Job:
    """The job that aborts multipart uploads older than `hours`."""

    def work(context: Context) -> Report:
        before = clock() - timedelta(hours=hours)
        if context.dry_run:
            return Report(notes=(f"would abort multipart uploads that were begun before {before:%Y-%m-%d %H:%M} UTC",))
        count = sweep(before, ours)
        return Report(notes=(f"{count} multipart uploads aborted",))

    return Job(NAME, INTERVAL_SECONDS, work, off="" if hours else "set S3_SWEEP_HOURS", helper_of=HOUSEKEEPING)


def build_set_aside(folders: Mapping[str, SetAsideStore], days: int, clock: Callable[[], datetime]) -> Job:
    """The daily job that deletes objects set aside more than `days` ago. `folders`: by the pipeline that fills them."""

    def work(context: Context) -> Report:
        before = clock() - timedelta(days=days)
        if context.dry_run:
            return Report(notes=(f"would delete what was set aside before {before:%Y-%m-%d %H:%M} UTC",))
        count, failures = 0, []
        for pipeline, folder in folders.items():
            try:
                count += folder.sweep(before)
            except (Transient, Permanent) as error:
                hint = SET_ASIDE_HINT if isinstance(error, Permanent) else error.hint
                failures.append(Failure(pipeline, error.message, hint))
        return Report(notes=(f"{count} objects deleted",), failures=failures)

    off = (
        ""
        if days and folders
        else "set SET_ASIDE_DAYS"
        if folders
        else "set a source: no pipeline that sets rows aside is on"
    )
    return Job(SET_ASIDE_NAME, SET_ASIDE_INTERVAL_SECONDS, work, off=off, unit="folder", helper_of=HOUSEKEEPING)
