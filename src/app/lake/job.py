"""The job `lake_day`: closed days of the export become files of one Iceberg table, in one snapshot per run.

The table is loaded before the objects are listed, and when another process commits first, the run plans again. So a
commit is always made from objects at least as new as those in the table. A process that dies leaves unreferenced files,
which a later run removes.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from importlib.util import find_spec
from typing import TYPE_CHECKING

from app.config.settings import Settings
from app.core.closed_days import ClosedDays
from app.core.errors import Conflict, Transient
from app.core.runs import Context, Job, Report
from app.lake.plan import read_layout
from app.object_store.port import ObjectStore

if TYPE_CHECKING:
    from app.lake.table import LakeTable

NAME = "lake_day"
EXTRA = "pyiceberg"
SERVES = "influx_to_s3"
ATTEMPTS = 3
RUN_SECONDS = 600.0
MAX_BYTES = 256 << 20


def build(settings: Settings, store: ObjectStore) -> Job:
    """The job. pyiceberg is not imported before it runs."""
    lake = settings.lake
    work = LakeDay(settings, store).run
    off = "" if lake.catalog == "iceberg" else "set CATALOG=iceberg"
    if not off and find_spec(EXTRA) is None:
        off = "install headwater[lake]"
    return Job(NAME, lake.interval_seconds, work, off=off, unit="slice", helper_of=SERVES)


def table_for_reports(settings: Settings, store: ObjectStore, clock: Callable[[], datetime]) -> ClosedDays | None:
    """The closed days for /analytics; None where there is no table, or pyiceberg is not installed."""
    if settings.lake.catalog != "iceberg" or find_spec(EXTRA) is None:
        return None
    from app.lake.reader import TableReader

    return TableReader(settings, store, clock)


def opened_table(settings: Settings, store: ObjectStore) -> AbstractContextManager["LakeTable"]:
    """See `app.lake.table.open_table`, which imports pyiceberg."""
    from app.lake.table import open_table

    return open_table(settings, store)


@dataclass(frozen=True, slots=True)
class LakeDay:
    """The work of the job. `run_seconds`: after this time a run commits what it has; the next run continues.

    `max_bytes`: maximum size of a slice's objects, unless one device has more, and approximate size of a file.
    """

    settings: Settings
    store: ObjectStore
    run_seconds: float = RUN_SECONDS
    max_bytes: int = MAX_BYTES

    def run(self, context: Context) -> Report:
        """One run. Raises Transient when other processes changed the table on every attempt."""
        from app.lake.day import LakeRun

        settings, export = self.settings, self.settings.export
        for _ in range(ATTEMPTS):
            try:
                with opened_table(settings, self.store) as table:
                    table.load(context.now_at, repair=not context.dry_run)
                    layout = read_layout(self.store, settings.s3.prefix, export.date_format, export.window_seconds)
                    return LakeRun(self, table, layout, context).report()
            except Conflict:
                context.stop.check()  # another process committed: plan again
        raise Transient("other processes changed the table each time", "no action needed; it is retried")
