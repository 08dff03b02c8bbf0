"""The export itself: one run of its job, its daily reconcile, its backfill and its rewrite.

Invariants: the job owns the live windows, from the cursor on. Reconcile, backfill and rewrite touch only windows before
the cursor, so they never work on the same window as the job. Nothing is connected before the first run.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from functools import cache
from uuid import uuid4

from app.config.settings import Settings
from app.core.partitions import (
    Backoff,
    PassOptions,
    SettlingSchedule,
    Step,
    SyncPlan,
    run_each_partition,
    sync_all,
    sync_step,
)
from app.core.pipeline import Grid, Pipeline, Shrink, WrittenRows
from app.core.repair import HEAL_HINT, describe_trouble, fill, reconcile
from app.core.retry import RequestPacer, RetryPolicy
from app.core.runs import Context, Done, Failure, Report, Stop
from app.core.windows import EPOCH, Window, floor_to
from app.db.checkpoints import Layout, SqlCheckpoints
from app.db.object_summaries import ObjectFacts
from app.influx_to_s3.flux import FluxReader
from app.influx_to_s3.influxql import InfluxQlReader
from app.influx_to_s3.job import NAME, ObjectSums, exported_devices, listed_devices
from app.influx_to_s3.layout import DEVICE, TAGS, LayoutDocument, LayoutFile, TreeColumns, with_types_of
from app.influx_to_s3.reader import InfluxConnection, Reader
from app.influx_to_s3.rewrite import devices_in, layout_from_data, lost_cursor, rewrite
from app.influx_to_s3.row_batch import RowBatch
from app.influx_to_s3.set_aside import SetAsidePoints, absent_devices, refuse_wrong_settings
from app.influx_to_s3.source import InfluxSource, OpenedExport
from app.influx_to_s3.verify import ExportEnds
from app.object_store.deltas import is_nameable
from app.object_store.port import ObjectStore
from app.object_store.set_aside import SetAsideStore
from app.object_store.table_sink import EncodedFile, TableSink

RECONCILE_SHARE = 0.1
# Each night the oldest day is compared by content, just before it leaves the reconcile range, to find everything that
# arrived until then. The extra hour allows for a later start of the next night's run.
CONTENT_SPAN = timedelta(hours=25)
SPOOL = "spool"
LOOK_KEY = "headwater-readiness"

log = logging.getLogger(__name__)


class Export:
    """See `job.build`. One instance per process; its in-memory state between runs may be lost at any time.

    `reader` queries the source.
    """

    def __init__(
        self,
        settings: Settings,
        checkpoints: SqlCheckpoints,
        store: ObjectStore,
        *,
        set_aside: SetAsideStore,
        clock: Callable[[], datetime],
        rewrite_seconds: Callable[[int, float], float] | None,
        steps: Callable[[Context, SyncPlan, Step], Report],
        sums: ObjectSums | None,
    ) -> None:
        self.reader = reader_of(settings)
        self._settings = settings
        self._checkpoints = checkpoints
        self._store = store
        self._is_exported = exported_devices(settings, store)
        self._clock = clock
        self._steps = steps
        self._rewrite_seconds = rewrite_seconds
        self._sums = sums
        self._layout_file = LayoutFile(store, settings.s3.prefix, self._first_tree)
        self._aside = SetAsidePoints(
            set_aside, measurement=settings.influx.measurement, device_tag=settings.influx.device_tag
        )
        self._written = WrittenRows[RowBatch]()
        self._backoff = Backoff()
        self._settling = SettlingSchedule()
        self._is_warned = False

    def step(self, context: Context, plan: SyncPlan) -> Report:
        """Run one step for each device of a shard, following a plan made by another process."""
        opened = self._open(context.stop, dry_run=context.dry_run, cursors=plan.cursors)
        return sync_step(opened.pipeline, context, plan, self._pass(opened))

    def sync(self, context: Context) -> Report:
        """Bring every device up to date, and account for points outside all windows of this run."""
        opened = self._open(context.stop, dry_run=context.dry_run)
        report = sync_all(opened.pipeline, context, self._pass(opened))
        if self._settings.export.device_ids:
            absent = absent_devices(opened, self._settings)
            report += Report(failures=tuple(Failure(device, *why) for device, why in absent.items()))
        return report + self._aside.account_outside(opened, context)

    def reconcile(self, context: Context) -> Report:
        """Compare the windows of the last days with both ends, for every device, and export what differs."""
        opened = self._open(context.stop, dry_run=context.dry_run, share=RECONCILE_SHARE)
        export = self._settings.export
        since = max(opened.now - timedelta(days=export.reconcile_days), opened.tree.first_start_at)
        by_content = Window(since, since + CONTENT_SPAN)
        # A device without a cursor is new: the job closes its windows, beginning at the first start.
        cursors = {device: at for device, at in opened.cursors.items() if self._is_exported(device)}

        def one(device: str, done: Done) -> None:
            until = min(opened.now, cursors[device])
            if until > since:
                reconcile(
                    opened.pipeline,
                    context,
                    device,
                    Window(since, until),
                    opened.now,
                    done=done,
                    asked=opened.source.sums,
                    by_content=by_content,
                    heals=export.heal == "auto",
                )

        report = self._isolated(opened, context, sorted(cursors), one)
        if export.record_days and not context.dry_run:
            failed = {each.partition for each in report.failures}
            self._retire(context, {device: cursors[device] for device in cursors.keys() - failed}, opened.now)
        troubles = self._checkpoints.troubles().get(NAME, {})
        return report + Report(notes=[f"{said}: {HEAL_HINT}" for said in describe_trouble(troubles)])

    def backfill(self, context: Context, span: Window) -> Report:
        """Bring the due windows of `span` in line with the source; the live cursor does not move."""
        return self._fill(self._open(context.stop, dry_run=context.dry_run), context, span, always_writes=False)

    def replace(self, context: Context, span: Window, *, allow_shrink: bool) -> Report:
        """Write the due windows of `span` again from the source.

        Rows that exist only in an object are reported. They are kept unless `allow_shrink` is set, regardless of the
        settings.
        """
        opened = self._open(context.stop, dry_run=context.dry_run)
        pipeline = replace(opened.pipeline, shrink=self._shrinking(opened.source, removes=allow_shrink))
        return self._fill(replace(opened, pipeline=pipeline), context, span, always_writes=True)

    def rewrite(self, context: Context, span: Window) -> Report:
        """Re-encode the objects of closed windows from themselves, with the current unit, names and types.

        The layout is changed first, for whole days whose windows are all due, so that later writes to those days match.
        """

        def change(tree: LayoutDocument, now: datetime) -> LayoutDocument:
            due_at = now - timedelta(seconds=self._settings.export.grace_seconds)
            first, end = (span.start - datetime.resolution).date() + timedelta(days=1), min(span.end, due_at).date()
            return with_types_of(tree, now.date(), first=first, end=end) if first < end else tree

        opened = self._open(context.stop, dry_run=context.dry_run, change=change)

        def one(device: str, done: Done) -> None:
            rewrite(opened, context, device, span, done)

        devices = devices_in(opened.sink)
        context.progress.advance(total=len(devices))
        return self._isolated(opened, context, devices, one)

    def ends(self, stop: Stop) -> ExportEnds:
        """Both ends as they are now. Does not depend on a run in progress. Only healing changes anything."""
        reads_only = self._open(stop, dry_run=True, cursors={})  # only writes need cursors
        return ExportEnds(reads_only, self._clock, self._is_exported, lambda: self._open(stop, dry_run=False))

    def _open(
        self,
        stop: Stop,
        *,
        dry_run: bool,
        change: Callable[[LayoutDocument, datetime], LayoutDocument] | None = None,
        share: float | None = None,
        cursors: Mapping[str, datetime] | None = None,
    ) -> OpenedExport:
        """Open the pipeline for one run.

        `change(tree, now)` is applied to the layout before anything is read or written. `share`: the maximum share of
        one core of the source that queries may use. `cursors`: the relevant cursors, where they are already known.
        """
        settings, export = self._settings, self._settings.export
        known = self._checkpoints.cursors(NAME) if cursors is None else cursors
        tree, now = self._tree(is_new=not any(known), dry_run=dry_run, change=change)
        columns = TreeColumns(
            tree,
            device_tag=settings.influx.device_tag,
            types=dict(export.column_types),
            file=None if dry_run else self._layout_file,
        )
        spool = settings.service.data_dir / SPOOL
        source = InfluxSource(
            self.reader,
            columns,
            devices=export.device_ids,
            batch_rows=export.batch_size,
            spool_directory=spool,
            pauses=stop,
            policy=RetryPolicy(),
            pace=RequestPacer(stop, share) if share else None,
        )
        sink = TableSink(
            store=self._store,
            pipeline=NAME,
            prefix=settings.s3.prefix,
            layout_at=tree.layout_at,
            spool_directory=spool,
            app_version=settings.service.version,
            dictionary=(DEVICE, *TAGS),
            run=uuid4().hex,
            cursors={name: at for name, at in known.items() if name},
            storage_class=settings.s3.storage_class if settings.s3.bucket else "",
            summed=self._sums.take if self._sums else None,
        )
        return OpenedExport(tree, now, columns, source, sink, self._pipeline(tree, now, source, sink), known)

    def _tree(
        self, *, is_new: bool, dry_run: bool, change: Callable[[LayoutDocument, datetime], LayoutDocument] | None
    ) -> tuple[LayoutDocument, datetime]:
        """The layout in force, and the time up to which this run may write windows.

        The store is probed first if that has not happened yet: conditional writes must be known to work before they are
        relied on. EXPORT_START may be moved earlier until the first device is found; after that it has no effect and
        logs a warning.
        """
        if not self._store.conditional:
            self._store.probe()
        export = self._settings.export
        tree, now = self._layout_file.begin(
            self._clock(),
            wanted=self._wanted,
            types=dict(export.column_types),
            ignored=self._settings.influx.ignored_tags,
            dry_run=dry_run,
        )
        start_at = export.start
        if start_at is not None and start_at < tree.first_start_at:
            if is_new and not dry_run:
                first_start_at = floor_to(start_at, tree.layout_at(start_at).window_seconds)
                tree = self._layout_file.change(
                    lambda each: replace(each, first_start_at=min(each.first_start_at, first_start_at))
                )
            elif not self._is_warned:
                self._is_warned = True
                log.warning(
                    "EXPORT_START=%s is earlier than the first start of this installation, %s, which stands: "
                    "run `python -m app backfill %s --from ... --to ...` for what is before it",
                    f"{start_at:%Y-%m-%dT%H:%M:%SZ}",
                    f"{tree.first_start_at:%Y-%m-%dT%H:%M:%SZ}",
                    NAME,
                )
        if tree.first_start_at > now and start_at is None and not dry_run and not self._is_written():
            # The clock was ahead at the first start. Nothing has been written since, so nothing waits for it to come.
            first_start_at = self._first_tree(now).first_start_at
            tree = self._layout_file.change(
                lambda each: replace(each, first_start_at=min(each.first_start_at, first_start_at))
            )
        if change is not None:
            tree = change(tree, now) if dry_run else self._layout_file.change(lambda tree: change(tree, now))
        return tree, now

    def _pipeline(
        self, tree: LayoutDocument, now: datetime, source: InfluxSource, sink: TableSink
    ) -> Pipeline[RowBatch, EncodedFile]:
        export, sums = self._settings.export, self._sums
        spaced, window_seconds = self._rewrite_seconds, tree.layout_at(now).window_seconds
        pipeline = Pipeline(
            name=NAME,
            source=source,
            sink=sink,
            checkpoints=self._checkpoints,
            grid=Grid(tree.windows, export.grace_seconds),
            shrink=self._shrinking(source, removes=True) if export.allow_shrink else None,
            deltas=sink,
            written=self._written,
            is_wanted=listed_devices(self._settings),
            large_points=export.batch_size,
            lost_cursor=self._lost_cursors(tree, now),
            set_aside=self._aside.keep_values,
            refused=lambda context, at, live: self._aside.sync_refused(pipeline, source, context, at, live),
            rewrite_seconds=(lambda devices: spaced(devices, window_seconds)) if spaced else None,
            summarise=_summaries,
            # If no report was ever requested, only past windows are summarised: an open object is replaced every
            # minute.
            summarises_live=cache(sums.stored.is_asked) if sums else lambda: False,
        )
        return pipeline

    def _pass(self, opened: OpenedExport) -> PassOptions:
        def probe() -> None:
            self.reader.ping()
            self._store.head(LOOK_KEY)

        return PassOptions(
            now=opened.now,
            first_at=opened.tree.first_start_at,
            cursors=opened.cursors,
            probe=probe,
            nothing_found=lambda: refuse_wrong_settings(opened, self._settings),
            backoff=self._backoff,
            settling=self._settling,
            latency_seconds=opened.source.latency_seconds,
            concurrency=self._settings.export.concurrency,
            steps=self._steps,
        )

    def _isolated(
        self, opened: OpenedExport, context: Context, devices: Sequence[str], one: Callable[[str, Done], None]
    ) -> Report:
        """Call `one` for each device, ignoring the backoff of the job's passes."""
        return run_each_partition(
            opened.pipeline, context, devices, one, how=replace(self._pass(opened), backoff=Backoff())
        )

    def _fill(self, opened: OpenedExport, context: Context, span: Window, *, always_writes: bool) -> Report:
        cursors = opened.cursors

        def one(device: str, done: Done) -> None:
            until = min(span.end, cursors.get(device, span.end))
            if until > span.start:
                fill(
                    opened.pipeline,
                    context,
                    device,
                    Window(span.start, until),
                    opened.now,
                    done=done,
                    by_content=not always_writes,
                    always_writes=always_writes,
                )

        devices = sorted(filter(self._is_exported, {*cursors, *opened.source.partitions(span.start)}))
        return self._isolated(opened, context, devices, one)

    def _retire(self, context: Context, cursors: Mapping[str, datetime], now: datetime) -> None:
        """Delete records of closed windows that reconcile no longer checks; the destination holds the same facts."""
        export = self._settings.export
        before = now - timedelta(days=max(export.record_days, export.reconcile_days + 2))
        for device, cursor_at in cursors.items():
            context.stop.check()
            self._checkpoints.retire(NAME, device, before, cursor_at, context.lease)
        if self._sums:
            self._sums.stored.forget_unasked((before - EPOCH).days)

    def _first_tree(self, now: datetime) -> LayoutDocument:
        export = self._settings.export
        return layout_from_data(
            self._store,
            self._settings.s3.prefix,
            kept=self._checkpoints.layouts(NAME),
            starts=self._checkpoints.starts(NAME).values(),
            wanted=self._wanted(None),
            first_start_at=export.start or now - timedelta(hours=export.lookback_hours),
        )

    def _wanted(self, tree: LayoutDocument | None) -> Layout:
        """The layout that the settings request; an existing tree keeps its timestamp unit until one is set."""
        export = self._settings.export
        unit = export.timestamp_unit or (tree.layouts[-1].timestamp_unit if tree else "us")
        return Layout(EPOCH, export.window_seconds, export.format, export.date_format, unit)

    def _lost_cursors(self, tree: LayoutDocument, now: datetime) -> Callable[[str], datetime | None]:
        """A function that looks up a missing cursor of a device in the destination.

        In a new tree, where no device has a cursor, the destination is listed only once.
        """
        prefix = self._settings.s3.prefix
        is_written = cache(self._is_written)

        def find(device: str) -> datetime | None:
            if not is_written() or not is_nameable(device, self._store):
                return None
            return lost_cursor(self._store, prefix, device, tree, now)

        return find

    def _is_written(self) -> bool:
        """Whether the destination has any object of the export."""
        start = f"{prefix}/" if (prefix := self._settings.s3.prefix) else ""
        return any(True for _ in self._store.list(f"{start}device_id="))

    def _shrinking(self, source: InfluxSource, *, removes: bool) -> Callable[[], Shrink]:
        """What may be removed: rows that the source lacks although its retention still covers them."""
        return lambda: Shrink(source.covered_since(self._clock), removes=removes)


def _summaries(encoded: EncodedFile, key: str, version: str) -> Sequence[ObjectFacts]:
    facts = encoded.sums.facts(key, version, encoded.size_bytes) if encoded.sums else None
    return () if facts is None else (facts,)


def reader_of(settings: Settings) -> Reader:
    """The reader for the query language in the settings."""
    influx = settings.influx
    by_influxql = influx.api == "influxql"
    connection = InfluxConnection(
        influx.url,
        influx.token.get_secret_value(),
        username=influx.username if by_influxql else "",
        password=influx.password.get_secret_value() if by_influxql else "",
        timeout_seconds=influx.timeout_seconds,
        connections=2 * settings.export.concurrency + 2,  # a backfill may run at the same time as the job
    )
    if by_influxql:
        return InfluxQlReader(
            connection,
            database=influx.database,
            retention_policy=influx.retention_policy,
            measurement=influx.measurement,
            device_tag=influx.device_tag,
        )
    return FluxReader(
        connection,
        org=influx.org,
        bucket=influx.bucket,
        measurement=influx.measurement,
        device_tag=influx.device_tag,
    )
