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

from app.config.settings import Settings
from app.core.closed_days import ClosedDays
from app.core.errors import Conflict, Permanent, Rejected, Transient
from app.core.ledger import SetAside, Tally, ledger_of
from app.core.runs import Context, Failure, Job, Report
from app.object_store.port import ObjectStore

if TYPE_CHECKING:
    from app.lake.day import Compacted, NewFile
    from app.lake.plan import LakeFile, Rewrite, TreeLayout
    from app.lake.table import Catalog, LakeTable

NAME = "lake_day"
EXTRA = "pyiceberg"
SERVES = "influx_to_s3"
ATTEMPTS = 3
RUN_SECONDS = 600.0
MAX_BYTES = 256 << 20
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


@dataclass(slots=True)
class LakeLedger:
    """What happens to the objects of closed days. `counted` is from the listing, the rest from the slices written."""

    counted: int = 0
    csv: int = 0
    new: int = 0
    swapped: int = 0
    kept: int = 0
    aside: int = 0
    newly_aside: int = 0
    waiting: int = 0
    sample: str = ""

    def landed(self, rewrite: "Rewrite", done: "Compacted") -> None:
        """Account for a written slice: it is new, or replaces files."""
        good = rewrite.objects - len(done.aside)
        self.swapped += good if rewrite.replaced else 0
        self.new += 0 if rewrite.replaced else good
        self.aside += len(done.aside)
        self.newly_aside += len(done.aside)
        if done.aside and not self.sample:
            self.sample = ": ".join(done.aside[0])


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
        from app.lake.plan import closed_days, plan, read_layout

        settings, lake = self.settings, self.settings.lake
        table.load(context.now_at, repair=not context.dry_run)
        files = table.files()
        prefix, export = settings.s3.prefix, settings.export
        layout = read_layout(self.store, prefix, export.date_format, export.window_seconds)
        wait = timedelta(seconds=export.grace_seconds, hours=lake.wait_hours)
        days = list(closed_days(self.store.list(f"{prefix}/"), prefix, layout, (context.now_at - wait).date()))
        made = plan(days, files, self.max_bytes)
        account = LakeLedger(sum(one.objects + one.csv for one in days), sum(one.csv for one in days))
        account.kept, account.aside = made.kept - made.kept_aside, made.kept_aside
        missing = sum(file.missing for file in files)
        notes = [*table.notes, *([f"{missing} files of the table are gone or cut"] if missing else [])]
        if context.dry_run:
            account.waiting = sum(rewrite.objects for rewrite in made.rewrites)
            return self._report(account, Report(notes=(*notes, f"would write {len(made.rewrites)} slices")))
        context.progress.advance(total=len(made.rewrites))
        report = self._write(context, table, layout, made.rewrites, account)
        removed = table.expire(context.clock(), timedelta(days=lake.snapshot_days))
        notes += [f"{removed} old files removed"] if removed else []
        return self._report(account, replace(report, notes=(*notes, *report.notes)))

    def _write(
        self,
        context: Context,
        table: "LakeTable",
        layout: "TreeLayout",
        rewrites: Sequence["Rewrite"],
        account: LakeLedger,
    ) -> Report:
        """Write the slices and commit them together. A slice that fails waits and does not block others."""
        from app.lake.day import Compaction, SourceMoved

        columns = table.columns()
        spool = self.settings.service.data_dir / "spool"
        compaction = Compaction(
            self.store, self.settings.s3.prefix, table.folder, layout, spool, self.max_bytes, context.run_id[:12]
        )
        new: list[NewFile] = []
        replaced: list[LakeFile] = []
        failures: list[Failure] = []
        done_until, rows, kept_rows, moved, damaged = monotonic() + self.run_seconds, 0, 0, 0, 0
        for number, rewrite in enumerate(rewrites):
            if new and monotonic() > done_until:
                account.waiting += sum(one.objects for one in rewrites[number:])
                break
            try:
                done = compaction.run(rewrite, columns, context.stop)
            except SourceMoved:
                moved += 1
                account.waiting += rewrite.objects
                continue
            except (Transient, Permanent, Rejected) as error:
                failures.append(Failure(rewrite.day.isoformat(), error.message, error.hint))
                account.waiting += rewrite.objects
                continue
            account.landed(rewrite, done)
            new += done.files
            replaced += rewrite.replaced
            rows, kept_rows, damaged = rows + done.rows, kept_rows + done.kept_rows, damaged + done.damaged
            context.progress.advance(done=1, rows=done.rows)
        if new:
            context.stop.check()
            table.commit(columns, new, replaced)
        notes = [f"{moved} slices changed while they were read: the next run takes them"] if moved else []
        notes += (
            [f"{damaged} files of the table cannot be read: their days are made anew from the objects"]
            if damaged
            else []
        )
        notes += [f"{kept_rows} rows stay whose objects are gone"] if kept_rows else []
        return Report(
            rows=rows,
            bytes=sum(file.size_bytes for file in new),
            windows=len(new),
            failures=failures,
            more=monotonic() > done_until and bool(account.waiting),
            notes=notes,
        )

    @staticmethod
    def _report(account: LakeLedger, report: Report) -> Report:
        tally = Tally(
            counted=account.counted,
            read=account.new + account.swapped,
            new=account.new,
            already_there=account.kept,
            corrected=account.swapped,
            waiting=account.waiting,
        )
        aside = [SetAside(UNREADABLE, account.aside, account.newly_aside, account.sample)] if account.aside else []
        aside += [SetAside(IS_CSV, account.csv)] if account.csv else []
        return replace(report, ledger=ledger_of(tally, *aside, unit="objects"))
