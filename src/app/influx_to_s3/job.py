"""The pipeline put together: its job, its daily reconcile, its backfill and its rewrite. Nothing is connected before
the first run.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

from app.core.partitions import Backoff, Pass, Settling, Step, SyncPlan, in_this_process, isolated, sync_all, sync_step
from app.core.pipeline import Grid, KnownRows, Pipeline, Shrink
from app.core.repair import HEAL_HINT, fill, reconcile, said_of
from app.core.retry import Pace, RetryPolicy
from app.core.runs import Context, Failure, Job, Report, Stop
from app.core.sync import Done
from app.core.verify import Chart, Verification
from app.core.windows import EPOCH, Window, floor_to
from app.db.checkpoints import Layout, SqlCheckpoints
from app.influx_to_s3.flux import FluxReader, FluxTarget
from app.influx_to_s3.influxql import InfluxQlReader, InfluxQlTarget
from app.influx_to_s3.layout import DEVICE, TAGS, Columns, LayoutFile, Tree, as_on
from app.influx_to_s3.reader import Connection, Server
from app.influx_to_s3.rewrite import devices_in, lost_cursor, rewrite, tree_of_data
from app.influx_to_s3.row_batch import RowBatch
from app.influx_to_s3.set_aside import (
    OTHER_VALUE,
    Aside,
    OutsidePoints,
    RefusedPartition,
    absent_devices,
    is_nameable,
    refuse_wrong_settings,
)
from app.influx_to_s3.source import Coverage, InfluxSource
from app.influx_to_s3.verify import ExportChart, ExportEnds
from app.object_store.table_sink import EncodedFile, TableSink

if TYPE_CHECKING:
    import pyarrow as pa

    from app.config.settings import Settings
    from app.db.checkpoints import SqlLayouts
    from app.db.object_summaries import Facts, SqlSummaries
    from app.influx_to_s3.reader import Reader
    from app.object_store.port import ObjectStore
    from app.object_store.set_aside import SetAsideStore
    from app.object_store.table_sink import TableSummary

# The pipeline put together: its job, its daily reconcile, its backfill and its rewrite.
#
# Invariants: the job owns the live windows, from the cursor on; reconcile, backfill and rewrite touch only windows
# before the cursor, so they never work on one window at once. Nothing is connected before the first run.

NAME = "influx_to_s3"
RECONCILE = "influx_to_s3_reconcile"
RECONCILE_SECONDS = 86_400
RECONCILE_SHARE = 0.1
# Each night the oldest day is compared by content, just before it is looked at no more, so that what came until then is
# found. An hour more, since the next night's run may start later.
CONTENT_SPAN = timedelta(hours=25)
SPOOL = "spool"
OFF = "set INFLUXDB_URL"
LOOK_KEY = "headwater-readiness"

log = logging.getLogger(__name__)

Kept = dict[tuple[str, datetime], tuple[str, RowBatch]]
ExportPipeline = Pipeline[RowBatch, EncodedFile]


@dataclass(frozen=True, slots=True)
class ObjectSums:
    """What is summed of each object while it is written (see `TableSink.summed`), and who keeps that."""

    take: "Callable[[pa.Schema, str], TableSummary]"
    stored: "SqlSummaries"


@dataclass(frozen=True, slots=True)
class ExportParts:
    """What the pipeline is made of.

    Memory of this process that may be lost at any time: `kept`, rows of large open windows; `identities`, which rows
    the objects of open windows have; `backoff`, partitions that failed; `settling`, when older windows were counted;
    `refused`, how many values of a window were set aside of partitions that cannot have objects.
    """

    settings: "Settings"
    reader: "Reader"
    checkpoints: SqlCheckpoints
    layout_file: LayoutFile
    store: "ObjectStore"
    aside: Aside
    clock: Callable[[], datetime]
    steps: Callable[[Context, SyncPlan, Step], Report]
    rewrite_seconds: Callable[[int, float], float] | None = None
    sums: "ObjectSums | None" = None
    kept: Kept = field(default_factory=dict)
    identities: KnownRows = field(default_factory=KnownRows)
    backoff: Backoff = field(default_factory=Backoff)
    settling: Settling = field(default_factory=Settling)
    refused: dict[tuple[str, datetime], int] = field(default_factory=dict)
    warned: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class InfluxExport:
    """What `main` wires: jobs, backfill and rewrite, how both ends are compared and mapped, how to try the source.

    `step`: one step of a shard of a plan that another process made.
    """

    jobs: Sequence[Job]
    step: Step
    backfill: Callable[[Context, Window], Report]
    replace: Callable[[Context, Window, bool], Report]
    rewrite: Callable[[Context, Window], Report]
    verification: Verification
    chart: Chart
    ping: Callable[[], str]


@dataclass(frozen=True, slots=True)
class OpenedExport:
    """The pipeline of one run, whose pauses end with that run. `now`: no window that starts later may be written."""

    tree: Tree
    now: datetime
    columns: Columns
    source: InfluxSource
    sink: TableSink
    pipeline: ExportPipeline


def build(
    settings: "Settings",
    checkpoints: SqlCheckpoints,
    layouts: "SqlLayouts",
    store: "ObjectStore",
    *,
    set_aside: "SetAsideStore",
    clock: Callable[[], datetime],
    rewrite_seconds: Callable[[int, float], float] | None = None,
    steps: Callable[[Context, SyncPlan, Step], Report] = in_this_process,
    sums: ObjectSums | None = None,
) -> InfluxExport:
    """The pipeline as it is configured; its jobs are `off` while INFLUXDB_URL is not set. `steps`: see `Pass`.

    `rewrite_seconds(devices, window_seconds)`: how far apart the writes of an open window's object have to be.
    """
    export, influx = settings.export, settings.influx

    def make(now: datetime) -> Tree:
        return tree_of_data(
            store,
            settings.s3.prefix,
            kept=layouts.layouts(NAME),
            starts=checkpoints.starts(NAME).values(),
            wanted=_wanted(settings, None),
            first_start_at=export.start or now - timedelta(hours=export.lookback_hours),
        )

    parts = ExportParts(
        settings=settings,
        reader=_reader(settings),
        checkpoints=checkpoints,
        layout_file=LayoutFile(store, settings.s3.prefix, make),
        store=store,
        aside=Aside(set_aside, measurement=influx.measurement, device_tag=influx.device_tag),
        clock=clock,
        steps=steps,
        rewrite_seconds=rewrite_seconds,
        sums=sums,
    )
    off = "" if influx.url else OFF
    jobs = (
        Job(NAME, export.interval_seconds, lambda context: _sync(parts, context), off),
        Job(RECONCILE, RECONCILE_SECONDS, lambda context: _reconcile(parts, context), off, helper_of=NAME),
    )

    def ends(stop: Stop) -> ExportEnds:
        """Both ends as they are now; a look must not depend on a run going on, and changes nothing."""
        now = _open(parts, stop, dry_run=True)
        return ExportEnds(now.pipeline, now.source, now.sink, now.columns, parts.clock)

    return InfluxExport(
        jobs,
        lambda context, plan: _step(parts, context, plan),
        lambda context, span: _backfill(parts, context, span),
        lambda context, span, allow_shrink: _replace(parts, context, span, allow_shrink=allow_shrink),
        lambda context, span: _rewrite(parts, context, span),
        ends,
        ExportChart(NAME, ends, checkpoints, export.grace_seconds),
        parts.reader.ping,
    )


def _wanted(settings: "Settings", tree: Tree | None) -> Layout:
    """The layout that the settings ask for; an existing tree keeps its unit until one is set."""
    export = settings.export
    unit = export.timestamp_unit or (tree.layouts[-1].timestamp_unit if tree else "us")
    return Layout(EPOCH, export.window_seconds, export.format, export.date_format, unit)


def _reader(settings: "Settings") -> "Reader":
    influx = settings.influx
    by_influxql = influx.api == "influxql"
    connection = Connection(
        Server(
            url=influx.url,
            token=influx.token.get_secret_value(),
            username=influx.username if by_influxql else "",
            password=influx.password.get_secret_value() if by_influxql else "",
            timeout_seconds=influx.timeout_seconds,
            connections=2 * settings.export.concurrency + 2,  # a backfill may run beside the job
        )
    )
    if by_influxql:
        target = InfluxQlTarget(influx.database, influx.retention_policy, influx.measurement, influx.device_tag)
        return InfluxQlReader(connection, target)
    return FluxReader(connection, FluxTarget(influx.org, influx.bucket, influx.measurement, influx.device_tag))


def _open(
    parts: ExportParts,
    stop: Stop,
    *,
    dry_run: bool,
    change: Callable[[Tree, datetime], Tree] | None = None,
    share: float | None = None,
    cursors: Mapping[str, datetime] | None = None,
) -> OpenedExport:
    """A store that was not reached yet is probed first: conditions must be known to hold before they are relied on.

    `change(tree, now)` is made to the layout before anything is read or written. `share`: of one core of the source, to
    be taken by questions at most. `cursors`: those that matter, where they are known.
    """
    if not parts.store.conditional:
        parts.store.probe()
    settings, export = parts.settings, parts.settings.export
    types = dict(export.column_types)
    tree, now = parts.layout_file.begin(
        parts.clock(), wanted=lambda tree: _wanted(settings, tree), types=types, dry_run=dry_run
    )
    known = parts.checkpoints.cursors(NAME) if cursors is None else cursors
    tree = _with_earlier_start(parts, tree, is_new=not any(known) and not dry_run)
    if change is not None:
        tree = change(tree, now) if dry_run else parts.layout_file.change(lambda tree: change(tree, now))
    columns = Columns(
        tree,
        device_tag=settings.influx.device_tag,
        ignored=settings.influx.ignored_tags,
        types=types,
        file=None if dry_run else parts.layout_file,
    )
    spool = settings.service.data_dir / SPOOL
    source = InfluxSource(
        parts.reader,
        columns,
        devices=export.device_ids,
        batch_rows=export.batch_size,
        spool_directory=spool,
        pauses=stop,
        policy=RetryPolicy(),
        pace=Pace(stop, share) if share else None,
    )
    sink = TableSink(
        store=parts.store,
        pipeline=NAME,
        prefix=settings.s3.prefix,
        layout_at=tree.layout_at,
        spool_directory=spool,
        app_version=settings.service.version,
        dictionary=(DEVICE, *TAGS),
        run=uuid4().hex,
        cursors={name: at for name, at in known.items() if name},
        storage_class=settings.s3.storage_class if settings.s3.bucket else "",
        summed=parts.sums.take if parts.sums else None,
    )
    pipeline = Pipeline(
        name=NAME,
        source=source,
        sink=sink,
        checkpoints=parts.checkpoints,
        grid=Grid(tree.windows, export.grace_seconds),
        shrink=_shrinking(parts, source, removes=True) if export.allow_shrink else None,
        deltas=sink,
        kept=parts.kept,
        identities=parts.identities,
        large_points=export.batch_size,
        lost_cursor=_lost_cursors(parts, tree, now),
        set_aside=lambda device, window, batch: parts.aside.keep_values(
            OTHER_VALUE, device, window, batch.disagreements
        ),
        refused=lambda context, at, live: RefusedPartition(parts.aside, parts.refused).sync(
            pipeline, source, context, at, live
        ),
        rewrite_seconds=_spaced(parts, tree.layout_at(now).window_seconds),
        summarise=_summaries,
        # Where nobody ever asked for reports, only past windows are summed: an open object is replaced each minute.
        summarises_open=parts.sums is not None and parts.sums.stored.is_asked(),
    )
    return OpenedExport(tree, now, columns, source, sink, pipeline)


def _summaries(encoded: EncodedFile, key: str, version: str) -> Sequence["Facts"]:
    facts = encoded.sums.facts(key, version, encoded.size_bytes) if encoded.sums else None
    return () if facts is None else (facts,)


def _spaced(parts: ExportParts, window_seconds: float) -> Callable[[int], float] | None:
    spaced = parts.rewrite_seconds
    return None if spaced is None else lambda devices: spaced(devices, window_seconds)


def _lost_cursors(parts: ExportParts, tree: Tree, now: datetime) -> Callable[[str], datetime | None]:
    """Asks the destination about each device without a cursor; in a new tree, where thousands have none, only once."""
    start = f"{prefix}/" if (prefix := parts.settings.s3.prefix) else ""
    written: list[bool] = []

    def find(device: str) -> datetime | None:
        if not written:
            written.append(any(True for _ in parts.store.list(f"{start}device_id=")))
        return lost_cursor(parts.store, prefix, device, tree, now) if written[0] and is_nameable(device) else None

    return find


def _shrinking(parts: ExportParts, source: InfluxSource, *, removes: bool) -> Callable[[], Shrink]:
    """What may go in this run: what the source lacks although its retention still covers it."""
    coverage = Coverage(parts.reader, source.again, parts.clock)
    return lambda: Shrink(coverage.since(), removes=removes)


def _with_earlier_start(parts: ExportParts, tree: Tree, *, is_new: bool) -> Tree:
    """EXPORT_START may be set earlier until the first device was found; later it has no effect, and that is said."""
    start_at = parts.settings.export.start
    if start_at is None or start_at >= tree.first_start_at:
        return tree
    if is_new:
        first_start_at = floor_to(start_at, tree.layout_at(start_at).window_seconds)
        return parts.layout_file.change(
            lambda each: replace(each, first_start_at=min(each.first_start_at, first_start_at))
        )
    if not parts.warned:
        parts.warned.append("start")
        log.warning(
            "EXPORT_START=%s is earlier than the first start of this installation, %s, which stands: "
            "run `python -m app backfill %s --from ... --to ...` for what is before it",
            f"{start_at:%Y-%m-%dT%H:%M:%SZ}",
            f"{tree.first_start_at:%Y-%m-%dT%H:%M:%SZ}",
            NAME,
        )
    return tree


def _pass(parts: ExportParts, opened: OpenedExport) -> Pass:
    def probe() -> None:
        parts.reader.ping()
        parts.store.head(LOOK_KEY)

    return Pass(
        now=opened.now,
        first_at=opened.tree.first_start_at,
        probe=probe,
        nothing_found=lambda: refuse_wrong_settings(opened.source, parts.settings, opened.tree.first_start_at),
        backoff=parts.backoff,
        settling=parts.settling,
        latency_seconds=opened.source.latency_seconds,
        concurrency=parts.settings.export.concurrency,
        steps=parts.steps,
    )


def _step(parts: ExportParts, context: Context, plan: SyncPlan) -> Report:
    """One step of each device of a shard, whose plan another process has made."""
    opened = _open(parts, context.stop, dry_run=context.dry_run, cursors=plan.cursors)
    return sync_step(opened.pipeline, context, plan, _pass(parts, opened))


def _sync(parts: ExportParts, context: Context) -> Report:
    """Bring every device up to date, and account for points that no window of this run holds."""
    opened = _open(parts, context.stop, dry_run=context.dry_run)
    report = sync_all(opened.pipeline, context, _pass(parts, opened))
    absent = absent_devices(opened.source, parts.settings, opened.tree.first_start_at)
    failures = tuple(Failure(device, *why) for device, why in absent.items())
    outside = OutsidePoints(parts.aside, parts.refused).account(opened.pipeline, opened.source, context, opened.now)
    return report + Report(failures=failures) + outside


def _reconcile(parts: ExportParts, context: Context) -> Report:
    """Compare the last days' windows of every device with the destination and the source, and bring what differs."""
    opened = _open(parts, context.stop, dry_run=context.dry_run, share=RECONCILE_SHARE)
    days, first_start_at = timedelta(days=parts.settings.export.reconcile_days), opened.tree.first_start_at
    since = max(opened.now - days, first_start_at)
    by_content = Window(since, since + CONTENT_SPAN)
    # A device without a cursor is new: the job closes its windows from the first start on.
    cursors = {device: at for device, at in parts.checkpoints.cursors(NAME).items() if is_nameable(device)}

    def one(device: str, done: Done) -> None:
        until = min(opened.now, cursors[device])
        if until > since:
            report = reconcile(
                opened.pipeline,
                context,
                device,
                Window(since, until),
                opened.now,
                asked=opened.source.sums,
                by_content=by_content,
                heals=parts.settings.export.heal == "auto",
            )
            done(report)

    how = replace(_pass(parts, opened), backoff=Backoff())
    report = isolated(opened.pipeline, context, sorted(cursors), one, how=how)
    if parts.settings.export.record_days and not context.dry_run:
        _retire(parts, context, cursors, opened.now)
    troubles = parts.checkpoints.troubles().get(NAME, {})
    return report + Report(notes=[f"{said}: {HEAL_HINT}" for said in said_of(troubles)])


def _retire(parts: ExportParts, context: Context, cursors: Mapping[str, datetime], now: datetime) -> None:
    """Forget records of closed windows that no reconcile looks at any more: the destination has what they said."""
    export = parts.settings.export
    before = now - timedelta(days=max(export.record_days, export.reconcile_days + 2))
    for device, cursor_at in cursors.items():
        context.stop.check()
        parts.checkpoints.retire(NAME, device, before, cursor_at, context.lease)
    if parts.sums:
        parts.sums.stored.forget_unasked((before - EPOCH).days)


def _backfill(parts: ExportParts, context: Context, span: Window) -> Report:
    """Bring the due windows of `span` up to the source; the live cursor does not move."""
    opened = _open(parts, context.stop, dry_run=context.dry_run)
    cursors = parts.checkpoints.cursors(NAME)
    partitions = sorted(filter(is_nameable, {*cursors, *opened.source.partitions(span.start)}))

    def one(partition: str, done: Done) -> None:
        until = min(span.end, cursors.get(partition, span.end))
        if until > span.start:
            window = Window(span.start, until)
            done(fill(opened.pipeline, context, partition, window, opened.now, by_content=True))

    return isolated(opened.pipeline, context, partitions, one, how=replace(_pass(parts, opened), backoff=Backoff()))


def _replace(parts: ExportParts, context: Context, span: Window, *, allow_shrink: bool) -> Report:
    """Write the due windows of `span` again from the source. Rows that only an object has are told, and stay unless
    `allow_shrink`, whatever the settings allow.
    """
    opened = _open(parts, context.stop, dry_run=context.dry_run)
    pipeline = replace(opened.pipeline, shrink=_shrinking(parts, opened.source, removes=allow_shrink))
    cursors = parts.checkpoints.cursors(NAME)

    def one(partition: str, done: Done) -> None:
        until = min(span.end, cursors.get(partition, span.end))
        if until > span.start:
            window = Window(span.start, until)
            done(fill(pipeline, context, partition, window, opened.now, always_writes=True))

    devices = sorted(filter(is_nameable, {*cursors, *opened.source.partitions(span.start)}))
    return isolated(pipeline, context, devices, one, how=replace(_pass(parts, opened), backoff=Backoff()))


def _rewrite(parts: ExportParts, context: Context, span: Window) -> Report:
    """Re-encode the objects of closed windows from themselves, in today's unit, names and types.

    The layout says so first, for whole days of which every window is due: what is written there later is then alike.
    """

    def change(tree: Tree, now: datetime) -> Tree:
        due_at = now - timedelta(seconds=parts.settings.export.grace_seconds)
        first, end = (span.start - datetime.resolution).date() + timedelta(days=1), min(span.end, due_at).date()
        return as_on(tree, now.date(), first=first, end=end) if first < end else tree

    opened = _open(parts, context.stop, dry_run=context.dry_run, change=change)

    def one(device: str, done: Done) -> None:
        rewrite(
            opened.pipeline,
            opened.source,
            opened.sink,
            opened.columns,
            context,
            device=device,
            span=span,
            now=opened.now,
            done=done,
        )

    devices = devices_in(opened.sink)
    context.progress.advance(total=len(devices))
    return isolated(opened.pipeline, context, devices, one, how=replace(_pass(parts, opened), backoff=Backoff()))
