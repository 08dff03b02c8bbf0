"""The pipeline and its jobs: live hours every minute, late hours every 15 minutes, the past week once a day.

Invariants: live hours start at the cursor, late and past ones are before it, so two jobs never build the same hour; a
file is always rebuilt whole from the table, so the only state is the cursor and the file ids.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial

from app.config.settings import Settings
from app.core.errors import LeaseLost, Permanent, Rejected, Transient
from app.core.partitions import live_windows
from app.core.pipeline import (
    UNCOUNTED,
    Checkpoints,
    Commit,
    Grid,
    Pipeline,
    Position,
    Shrink,
    WindowTask,
)
from app.core.repair import GONE_HINT
from app.core.retry import RetryPolicy
from app.core.runs import Context, Done, Failure, Job, Lease, NoProgress, Report, ReportSum, Stop
from app.core.sync import sync_partition, sync_window
from app.core.verify import (
    NOTHING,
    Ends,
    FoundObject,
    GapMapSource,
    MapCell,
    MapContext,
    PartitionWindow,
    WindowContent,
    cells_of,
)
from app.core.windows import (
    DAY_SECONDS,
    EPOCH,
    HOUR_SECONDS,
    FailedWindows,
    Window,
    floor_to,
    window_at,
    windows_between,
)
from app.dynamo_to_drive.accounts import Accounts
from app.dynamo_to_drive.credentials import TOKEN_FILE
from app.dynamo_to_drive.drive import Drive, DriveService
from app.dynamo_to_drive.hour_file import HourFile, lines_in, read_file
from app.dynamo_to_drive.sinks import DriveSink, FolderSink, HourSink
from app.dynamo_to_drive.source import DynamoSource, ping
from app.dynamo_to_drive.table import DynamoTable
from app.object_store.set_aside import SetAsideStore
from app.ops.connection_checks import ConnectionCheck

NAME = "dynamo_to_drive"
LATE = "dynamo_to_drive_late"
RECONCILE = "dynamo_to_drive_reconcile"
LATE_SECONDS = 900
RECONCILE_SECONDS = 86_400
OFF = "set DYNAMODB_TABLE_NAME"
POLICY = RetryPolicy(attempts=5, first_seconds=1.0, cap_seconds=32.0)
log = logging.getLogger(__name__)

HourPipeline = Pipeline[HourFile, HourFile]


class HourFileExport:
    """The pipeline; see `WindowedPipeline`. Its jobs are `off` while DYNAMODB_TABLE_NAME is not set.

    `drive` None = files go to a directory. `spend` receives the read units of each response.
    """

    def __init__(
        self,
        settings: Settings,
        checkpoints: Checkpoints,
        set_aside: SetAsideStore,
        clock: Callable[[], datetime],
        policy: RetryPolicy = POLICY,
        *,
        spend: Callable[[float], None] = lambda _: None,
    ) -> None:
        self.settings, self.checkpoints, self.set_aside = settings, checkpoints, set_aside
        self.clock, self.policy = clock, policy
        self.table = DynamoTable(settings.dynamo, spend, escape=settings.drive.escape_formulas)
        self.turn = threading.Lock()
        self.drive: DriveService | None = None
        if settings.drive.credentials_file or settings.drive.credentials_json:
            self.drive = DriveService(settings.drive, settings.service.data_dir / TOKEN_FILE)

    @property
    def partition(self) -> str:
        """Names the table and the folder: each folder is a separate partition with its own cursor and file ids."""
        table = self.settings.dynamo.table_name
        return f"{table} -> {self.drive.folder_id}" if self.drive else table

    @property
    def jobs(self) -> Sequence[Job]:
        """Live, late and past hours; `off` while DYNAMODB_TABLE_NAME is not set."""
        drive, off = self.settings.drive, "" if self.settings.dynamo.table_name else OFF
        late, past = timedelta(hours=drive.late_hours), timedelta(days=self.settings.export.reconcile_days)
        return (
            Job(NAME, drive.interval_seconds, self._live, off),
            Job(LATE, LATE_SECONDS, lambda context: self._again(context, late), off, helper_of=NAME),
            Job(RECONCILE, RECONCILE_SECONDS, lambda context: self._again(context, past), off, helper_of=NAME),
        )

    @property
    def checks(self) -> Sequence[ConnectionCheck]:
        """Checks of the table, and of Google Drive if it is the destination."""
        if not self.settings.dynamo.table_name:
            return ()
        table = ConnectionCheck("dynamodb", "DynamoDB", "DYNAMODB_TABLE_NAME", self.ping_table)
        drive = ConnectionCheck("google_drive", "Google Drive", "GOOGLE_CREDENTIALS_FILE", self.ping_drive)
        return (table, drive) if self.drive is not None else (table,)

    @property
    def chart(self) -> GapMapSource:
        """The gap map of the files."""
        return HourEnds(self, Stop())

    def verification(self, stop: Stop) -> Ends:
        """Source and destination for verification: the table and the files."""
        return HourEnds(self, stop)

    def backfill(self, context: Context, span: Window) -> Report:
        """Bring every hour of `span` before the cursor up to date; later hours belong to the live job."""
        until = self.checkpoints.cursors(NAME).get(self.partition) or floor_to(self.clock(), HOUR_SECONDS)
        end = min(span.end, until)
        return self._fill(context, Window(span.start, end)) if end > span.start else Report()

    def ping_table(self) -> str:
        """Describe how the table is read. Raises Transient or Permanent."""
        return ping(self.table, self.clock())

    def ping_drive(self) -> str:
        """Sign in and check the folder, as the first run does. Raises Transient or Permanent."""
        if self.drive is None:
            return ""
        self.drive.forget()
        drive_id = Drive(self.drive, RetryPolicy(attempts=1), Stop()).check_folder()
        return (
            f"may add files to the folder, on shared drive {drive_id}"
            if drive_id
            else "folder in My Drive: a service account cannot create there"
        )

    def close(self) -> None:
        """Close the table's connections, and this thread's to Drive."""
        self.table.close()
        if self.drive is not None:
            self.drive.forget()

    def task(self, hour: Window) -> WindowTask:
        """An ended hour as a `WindowTask`, with its confirmed record, if any."""
        known = self.checkpoints.records(NAME, self.partition, hour.start, hour.end)
        final = hour.end <= self.clock() - timedelta(seconds=self.settings.drive.grace_seconds)
        return WindowTask(self.partition, hour, UNCOUNTED, next(iter(known), None), final=final)

    def opened(self, context: Context, span: Window | None = None) -> tuple[HourPipeline, HourSink]:
        """The pipeline of one run over `span`, and its sink, which has the accounts. Its retry pauses end when the run
        stops.
        """
        now, drive = self.clock(), self.settings.drive
        accounts = Accounts(self.settings.dynamo.timestamp_attribute, now)
        held = self.checkpoints, NAME, self.partition, context.lease
        given = accounts, drive.csv_name_prefix, drive.escape_formulas, context.dry_run
        sink: HourSink = FolderSink(*held, *given, self.settings.service.data_dir / "drive")
        if self.drive is not None:
            sink = DriveSink(*held, *given, Drive(self.drive, self.policy, context.stop), self.drive.told)
        pipeline: HourPipeline = Pipeline(
            name=NAME,
            source=DynamoSource(self.table, self.partition, context.stop, accounts=accounts, now=now, span=span),
            sink=sink,
            checkpoints=self.checkpoints,
            grid=Grid(lambda start, end: windows_between(start, end, HOUR_SECONDS), drive.grace_seconds),
            shrink=Shrink if drive.allow_shrink else None,
            by_digest=True,
        )
        return pipeline, sink

    def _live(self, context: Context) -> Report:
        """Close the hours that are due; update the current hour and the one in its grace period."""
        now = self.clock()
        at = Position(self.partition, self._cursor(context, now), now)
        pipeline, sink = self.opened(context, Window(at.cursor_at, now) if at.cursor_at < now else None)
        live = {window.start: UNCOUNTED for window in live_windows(pipeline, now)}
        return self._noted(context, sink.accounts, partial(sync_partition, pipeline, context, at, live))

    def _noted(self, context: Context, accounts: Accounts, work: Callable[[Done], object]) -> Report:
        """Run `work` and return its report with the ledger.

        A failure is recorded for the partition, whose cursor stays; it is raised if nothing was written.
        """
        report, parts = Report(), ReportSum(context.done)
        try:
            work(parts)
        except LeaseLost:
            raise
        except (Transient, Permanent, Rejected) as error:
            if self.drive is not None and isinstance(error, Permanent):
                self.drive.forget()
            if not context.dry_run:
                self.checkpoints.fail(NAME, self.partition, str(error), context.lease)
            if not parts.total.windows:
                raise
            report = Report(failures=(Failure(self.partition, error.message, error.hint),))
        report += parts.total
        notes = [*report.notes, *accounts.notes()]
        ledger = accounts.closed(self.partition, None if context.dry_run else self.set_aside)
        return replace(report, ledger=ledger, notes=notes)

    def _cursor(self, context: Context, now: datetime) -> datetime:
        """Where to continue; after an outage longer than DRIVE_CATCHUP_HOURS, that many hours back, with a warning."""
        hours = self.settings.drive.catchup_hours
        oldest = floor_to(now - timedelta(hours=hours), HOUR_SECONDS)
        cursor = self.checkpoints.cursors(NAME).get(self.partition)
        if cursor is not None and cursor >= oldest:
            return cursor
        if cursor is not None:
            log.warning(
                "hours from %s to %s are older than DRIVE_CATCHUP_HOURS: `python -m app backfill %s --from %s --to %s`",
                *(cursor, oldest, NAME, cursor.isoformat(), oldest.isoformat()),
            )
        if not context.dry_run:
            self.checkpoints.commit(NAME, self.partition, Commit(cursor_at=oldest), context.lease)
        return oldest

    def _again(self, context: Context, age: timedelta) -> Report:
        """Update the hours up to `age` old, from the first one ever exported to the cursor."""
        since = floor_to(self.clock() - age, HOUR_SECONDS)
        first = self.checkpoints.starts(NAME).get(self.partition)
        until = self.checkpoints.cursors(NAME).get(self.partition)
        if first is None or until is None or max(first, since) >= until:
            return Report()
        return self._fill(context, Window(max(first, since), until))

    def _fill(self, context: Context, span: Window) -> Report:
        pipeline, sink = self.opened(context, span)
        hours = list(windows_between(span.start, span.end, HOUR_SECONDS))
        failed = FailedWindows()

        def work(done: Done) -> None:
            seen = None
            while self.table.traits != seen:  # earlier hours may have items with a trait first seen in a later one
                seen = self.table.traits
                context.progress.advance(total=len(hours))
                for hour in hours:
                    context.stop.check()
                    with failed.one():
                        done(sync_window(pipeline, context, self.task(hour)))
                    failed.check_outage()
                    context.progress.advance(done=1)
            failed.check()

        with self.turn:  # late hours, reconcile and backfill may process the same hour
            return self._noted(context, sink.accounts, work)


# Verification of the hourly files (the table's rows against the file's rows) and the gap map.
#
# Invariants: verifying never creates or trashes a file; a file that someone else changed is rebuilt from the table
# alone, any other keeps the rows that the table no longer returns.


class HourEnds:
    """`Ends` and `GapMapSource` of `app.core.verify` over table and files, which it only reads until `heal`."""

    def __init__(self, export: HourFileExport, stop: Stop) -> None:
        # No lease, and a dry run, which cleans nothing up.
        context = Context("", Lease(NAME, "", 0, EPOCH), stop, NoProgress(), dry_run=True)
        self.export = export
        self.pipeline, self.sink = export.opened(context)

    def partitions(self, _: Window | None = None) -> Sequence[str]:
        """The single partition."""
        return [self.export.partition]

    def slots(self, span: Window, partition: str | None) -> Iterator[PartitionWindow]:
        """See `Ends.slots`; there is a single partition."""
        now = self.export.clock()
        for window in self.pipeline.grid.windows(span.start, min(span.end, now)):
            if window.end <= now and partition in (None, self.export.partition):
                yield PartitionWindow(self.export.partition, window)

    def source(self, slot: PartitionWindow) -> WindowContent:
        """See `Ends.source`."""
        with closing(self.pipeline.source.read(slot.partition, slot.window, UNCOUNTED, None)) as hour:
            return _content_of(read_file(lines_in(hour.file), escaped=hour.shape.escape))

    def destination(self, slot: PartitionWindow) -> WindowContent:
        """See `Ends.destination`."""
        key = self.sink.key(slot.partition, slot.window, 0)
        there = self.sink.head(key)
        return _content_of(self.sink.rows(key, there.version)) if there else NOTHING

    def heal(self, context: Context, slot: PartitionWindow) -> Report:
        """See `Ends.heal`. Raises Permanent if the file was changed and the table has no rows of its hour."""
        (pipeline, sink), task = self.export.opened(context), self.export.task(slot.window)
        with self.export.turn:  # late hours and reconcile may process the same file
            there = sink.head(sink.key(slot.partition, slot.window, 0))
            if there and task.record and task.record.digest not in ("", there.digest):
                # The file differs from the confirmed one.
                if not self.source(slot).rows:
                    raise Permanent(f"{slot}: the file was changed, and the table has no rows of it", GONE_HINT)
                task = replace(task, replaces=True)
            return sync_window(pipeline, context, task)

    def cells(self, partition: str, span: Window) -> Sequence[MapCell]:
        """See `GapMapSource.cells`; one listing per day. A file's version is its MD5 here."""
        export = self.export
        cursor_at = export.checkpoints.cursors(NAME).get(partition)
        moment = MapContext(export.clock(), export.settings.drive.grace_seconds, cursor_at)
        hours = list(windows_between(span.start, min(span.end, moment.now), HOUR_SECONDS))
        if not hours:
            return ()
        records = export.checkpoints.records(NAME, partition, hours[0].start, hours[-1].end)
        starts = {self.sink.key(partition, hour, 0): hour.start for hour in hours}
        found = [
            FoundObject(starts[name], name, digest)
            for day in {window_at(hour.start, DAY_SECONDS) for hour in hours}
            for name, digest in self.sink.listed(day)
            if name in starts
        ]
        return cells_of(hours, [replace(record, version=record.digest) for record in records], found, moment)


def _content_of(rows: Iterator[Mapping[str, str]]) -> WindowContent:
    from app.object_store.row_digest import content_of  # numpy and pyarrow, which an idle daemon does not load

    return content_of(rows)
