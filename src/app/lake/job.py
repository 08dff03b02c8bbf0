"""The job `lake_day`: closed days of the export become files of one Iceberg table, in one snapshot per run.

The table is loaded before the objects are listed, and when another process commits first, the run plans again. So a
commit is always made from objects at least as new as those in the table. A process that dies leaves unreferenced files,
which a later run removes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from importlib.util import find_spec
from time import monotonic
from typing import TYPE_CHECKING
from zlib import crc32

from app.config.settings import Settings
from app.core.closed_days import ClosedDays
from app.core.errors import Conflict, Permanent, Rejected, Transient
from app.core.ledger import SetAside, Tally, ledger_of
from app.core.runs import Context, Failure, Job, Report
from app.object_store.port import ObjectStore

if TYPE_CHECKING:
    from app.lake.day import Compaction, NewFile
    from app.lake.plan import LakeFile, Rewrite
    from app.lake.table import Catalog, LakeTable

NAME = "lake_day"
EXTRA = "pyiceberg"
SERVES = "influx_to_s3"
ATTEMPTS = 3
RUN_SECONDS = 600.0
MAX_BYTES = 256 << 20
CHECK_EVERY_SECONDS, CHECK_BYTES = 7 * 86_400.0, 1 << 30  # or, of a large table, this much a run
UNREADABLE = "object that the table cannot take"
IS_CSV = "CSV object: the table takes Parquet"


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


def catalog_uri(settings: Settings) -> str:
    """The SQLAlchemy URI of the catalog: in the checkpoint database, or in a separate file if that is SQLite."""
    url = settings.checkpoint.url.get_secret_value()
    if url:
        return "postgresql+psycopg://" + url.partition("://")[2]
    return f"sqlite:///{settings.service.data_dir.resolve() / 'lake.db'}"


def location_base(settings: Settings) -> str:
    """The prefix that turns an object's key into a location that other programs can read."""
    bucket = settings.s3.bucket
    return f"s3://{bucket}/" if bucket else f"file://{settings.service.data_dir.resolve() / 'objects'}/"


def catalog_of(settings: Settings, store: ObjectStore) -> "Catalog":
    """Where the table is."""
    from app.lake.table import Catalog

    return Catalog(catalog_uri(settings), store, location_base(settings), settings.lake.prefix, settings.s3.prefix)


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
        catalog = catalog_of(self.settings, self.store)
        for _ in range(ATTEMPTS):
            try:
                with catalog.opened() as table:
                    return self._once(context, table)
            except Conflict:
                context.stop.check()  # another process committed: plan again
        raise Transient("other processes changed the table each time", "no action needed; it is retried")

    def _once(self, context: Context, table: "LakeTable") -> Report:
        from app.lake.day import Compaction
        from app.lake.plan import closed_days, plan, read_layout

        settings, prefix, export = self.settings, self.settings.s3.prefix, self.settings.export
        table.load(context.now_at, repair=not context.dry_run)
        layout = read_layout(self.store, prefix, export.date_format, export.window_seconds)
        spool = settings.service.data_dir / "spool"
        compaction = Compaction(self.store, prefix, table.folder, layout, spool, self.max_bytes, context.run_id[:12])
        files = self._checked(table.files(), compaction, context.now_at)
        wait = timedelta(seconds=export.grace_seconds, hours=settings.lake.wait_hours)
        days = list(closed_days(self.store.list(f"{prefix}/"), prefix, layout, (context.now_at - wait).date()))
        made = plan(days, files, self.max_bytes)
        notes = list(table.notes)
        if missing := sum(file.missing for file in files):
            notes.append(f"{missing} files of the table are gone or damaged")
        aside: dict[str, str] = {}
        if context.dry_run:
            tally = Tally(waiting=sum(rewrite.objects for rewrite in made.rewrites))
            report = Report(notes=[f"would write {len(made.rewrites)} slices"])
        else:
            report, tally, aside = self._write(context, table, compaction, made.rewrites)
            if removed := table.expire(context.clock(), timedelta(days=settings.lake.snapshot_days)):
                notes.append(f"{removed} old files removed")
        csv = sum(one.csv for one in days)
        tally += Tally(counted=csv + sum(one.objects for one in days), already_there=made.kept - made.kept_aside)
        reasons = [
            SetAside(UNREADABLE, made.kept_aside + len(aside), len(aside), ": ".join(next(iter(aside.items()), ()))),
            SetAside(IS_CSV, csv),
        ]
        ledger = ledger_of(tally, *(one for one in reasons if one.number), unit="objects")
        return replace(report, ledger=ledger, notes=(*notes, *report.notes))

    def _checked(self, files: Sequence["LakeFile"], compaction: "Compaction", now: datetime) -> Sequence["LakeFile"]:
        """The files of the table. Each is read whole about once a week, in turn, since the listing does not show damage
        that leaves the size as it was.
        """
        seconds, size_bytes = self.settings.lake.interval_seconds, sum(file.entry.file_size_in_bytes for file in files)
        turns = int(max(1, CHECK_EVERY_SECONDS // seconds, size_bytes // CHECK_BYTES))
        turn = int(now.timestamp() // seconds) % turns

        def is_damaged(file: "LakeFile") -> bool:
            return crc32(file.key.encode()) % turns == turn and compaction.is_damaged(file)

        return [replace(file, missing=file.missing or is_damaged(file)) for file in files]

    def _write(
        self, context: Context, table: "LakeTable", compaction: "Compaction", rewrites: Sequence["Rewrite"]
    ) -> tuple[Report, Tally, dict[str, str]]:
        """Write the slices and commit them together. A slice that fails waits and does not block others.

        Returns what became of their objects as well, and the reason for each that was set aside.
        """
        from app.lake.day import SourceMoved

        columns, done_until = table.columns(), monotonic() + self.run_seconds
        new: list[NewFile] = []
        replaced: list[LakeFile] = []
        failures: list[Failure] = []
        aside: dict[str, str] = {}
        tally, rows, kept_rows, moved, damaged = Tally(), 0, 0, 0, 0
        context.progress.advance(total=len(rewrites))
        for number, rewrite in enumerate(rewrites):
            if new and monotonic() > done_until:
                tally += Tally(waiting=sum(one.objects for one in rewrites[number:]))
                break
            try:
                done = compaction.run(rewrite, columns, context.stop)
            except (Transient, Permanent, Rejected, SourceMoved) as error:
                tally += Tally(waiting=rewrite.objects)
                if isinstance(error, SourceMoved):
                    moved += 1
                else:
                    failures.append(Failure(rewrite.day.isoformat(), error.message, error.hint))
                continue
            good = rewrite.objects - len(done.aside)
            tally += Tally(read=good, corrected=good) if rewrite.replaced else Tally(read=good, new=good)
            new += done.files
            replaced += rewrite.replaced
            aside |= done.aside
            rows, kept_rows, damaged = rows + done.rows, kept_rows + done.kept_rows, damaged + done.damaged
            context.progress.advance(done=1, rows=done.rows)
        if new:
            context.stop.check()
            table.commit(columns, new, replaced)
        told = (
            (moved, "slices changed while they were read: the next run takes them"),
            (damaged, "files of the table cannot be read: their days are re-created from the objects"),
            (kept_rows, "rows are kept whose objects are gone"),
        )
        report = Report(
            rows=rows,
            bytes=sum(file.size_bytes for file in new),
            windows=len(new),
            failures=failures,
            more=monotonic() > done_until and bool(tally.waiting),
            notes=[f"{count} {what}" for count, what in told if count],
        )
        return report, tally, aside
