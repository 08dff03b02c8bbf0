"""The pipeline put together: its job, its daily reconcile and its backfill.

Invariants: the job owns the live windows, from the cursor on; reconcile and backfill touch only windows before the
cursor, so the two never work on one window. Nothing is connected before the first run.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from app.core.gaps import Chart
from app.core.late import fill
from app.core.partitions import DISCOVERY, Pass, isolated, sync_all
from app.core.ports import Checkpoints
from app.core.retry import RetryPolicy
from app.core.runs import Context, Job, Report, Stop
from app.core.sync import Grid, Pipeline
from app.core.verify import Verification
from app.core.window import EPOCH, Window, floor_to
from app.influx_to_s3.connection import Connection, Server
from app.influx_to_s3.flux import FluxReader, FluxTarget
from app.influx_to_s3.influxql import InfluxQlReader, InfluxQlTarget
from app.influx_to_s3.layouts import Layouts, LayoutStore
from app.influx_to_s3.reader import Reader
from app.influx_to_s3.rows import DEVICE, TAGS
from app.influx_to_s3.source import InfluxSource, Patience, Reading
from app.influx_to_s3.spool import RowBatch
from app.influx_to_s3.verify import ExportChart, ExportEnds
from app.settings import Settings
from app.stores.layouts import Layout
from app.stores.objects import ObjectStore
from app.stores.parquet import EncodedFile, TableSink

NAME = "influx_to_s3"
RECONCILE = "influx_to_s3_reconcile"
RECONCILE_SECONDS = 86_400
SPOOL = "spool"
OFF = "off: set INFLUXDB_URL"

Kept = dict[tuple[str, datetime], tuple[str, RowBatch]]


@dataclass(frozen=True, slots=True)
class Parts:
    """What the pipeline is made of; `kept` is this process's memory of large open windows."""

    settings: Settings
    reader: Reader
    checkpoints: Checkpoints
    layouts: Layouts
    store: ObjectStore
    clock: Callable[[], datetime]
    kept: Kept = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Export:
    """What `main` wires: the jobs, the backfill, how both ends are compared and mapped, and how to try the source."""

    jobs: Sequence[Job]
    backfill: Callable[[Context, Window], Report]
    verification: Verification
    chart: Chart
    ping: Callable[[], str]


def build(
    settings: Settings,
    checkpoints: Checkpoints,
    layouts: LayoutStore,
    store: ObjectStore,
    clock: Callable[[], datetime],
) -> Export:
    """The pipeline as it is configured; its jobs are `off` while INFLUXDB_URL is not set."""
    export = settings.export

    def wanted() -> Layout:
        return Layout(EPOCH, export.window_seconds, export.format, export.date_format)

    parts = Parts(settings, _reader(settings), checkpoints, Layouts(layouts, NAME, wanted), store, clock)
    off = "" if settings.influx.url else OFF
    jobs = (
        Job(NAME, export.interval_seconds, lambda context: _sync(parts, context), off),
        Job(RECONCILE, RECONCILE_SECONDS, lambda context: _reconcile(parts, context), off),
    )
    chart = ExportChart(NAME, _asked(parts), checkpoints, export.grace_seconds)
    return Export(jobs, lambda context, span: _backfill(parts, context, span), _asked(parts), chart, parts.reader.ping)


def _asked(parts: Parts) -> Callable[[Stop], ExportEnds]:
    """Both ends as they are now, with layouts of their own: a look must not depend on a run going on."""

    def opened(stop: Stop) -> ExportEnds:
        own = replace(parts, layouts=parts.layouts.fresh())
        return ExportEnds(_pipeline(_prepared(own, dry_run=True), stop), parts.clock)

    return opened


def _reader(settings: Settings) -> Reader:
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
        return InfluxQlReader(connection, InfluxQlTarget(influx.database, influx.retention_policy, influx.measurement))
    return FluxReader(connection, FluxTarget(influx.org, influx.bucket, influx.measurement))


def _pipeline(parts: Parts, stop: Stop) -> Pipeline[RowBatch, EncodedFile]:
    """The pipeline of one run: its pauses end with that run."""
    export, service = parts.settings.export, parts.settings.service
    spool = service.data_dir / SPOOL
    reading = Reading(parts.settings.influx.measurement, export.device_ids, export.batch_size, spool)
    # Jitter is no secret: any source of numbers serves.
    patience = Patience(RetryPolicy(), stop, random.random)
    sink = TableSink(
        store=parts.store,
        pipeline=NAME,
        prefix=parts.settings.s3.prefix,
        layout_at=parts.layouts.at,
        spool_directory=spool,
        app_version=service.version,
        dictionary=(DEVICE, *TAGS),
    )
    return Pipeline(
        name=NAME,
        source=InfluxSource(parts.reader, reading, patience),
        sink=sink,
        checkpoints=parts.checkpoints,
        grid=Grid(parts.layouts.windows, export.grace_seconds),
        allow_shrink=export.allow_shrink,
        kept=parts.kept,
    )


def _pass(parts: Parts) -> Pass:
    export = parts.settings.export

    def start_at(now: datetime) -> datetime:
        start = export.start or now - timedelta(hours=export.lookback_hours)
        return floor_to(start, parts.layouts.at(start).window_seconds)

    return Pass(parts.clock, start_at, export.concurrency)


def _prepare(parts: Parts, context: Context) -> Pipeline[RowBatch, EncodedFile]:
    """A store that was not reached yet is probed first: conditions must be known to hold before they are relied on."""
    return _pipeline(_prepared(parts, dry_run=context.dry_run), context.stop)


def _prepared(parts: Parts, *, dry_run: bool) -> Parts:
    if not parts.store.conditional:
        parts.store.probe()
    parts.layouts.refresh(parts.clock(), dry_run=dry_run)
    return parts


def _sync(parts: Parts, context: Context) -> Report:
    return sync_all(_prepare(parts, context), context, _pass(parts))


def _reconcile(parts: Parts, context: Context) -> Report:
    """Compare the counts of the last days' closed windows and write what came late. Counted in `late_rows`."""
    now = parts.clock()
    pipeline = _prepare(parts, context)
    since = now - timedelta(days=parts.settings.export.reconcile_days)
    return _fill(parts, context, pipeline, Window(since, now), parts.checkpoints.starts(NAME))


def _backfill(parts: Parts, context: Context, span: Window) -> Report:
    """Bring the due windows of `span` up to the source; the live cursor does not move."""
    return _fill(parts, context, _prepare(parts, context), span)


def _fill(
    parts: Parts,
    context: Context,
    pipeline: Pipeline[RowBatch, EncodedFile],
    span: Window,
    starts: Mapping[str, datetime] | None = None,
) -> Report:
    """Fill `span` up to each partition's cursor; with `starts`, only for those that it names, from there on."""
    cursors = {name: at for name, at in parts.checkpoints.cursors(NAME).items() if name != DISCOVERY}
    partitions = sorted(
        starts.keys() & cursors if starts is not None else {*cursors, *pipeline.source.partitions(span.start)}
    )
    now = parts.clock()

    def one(partition: str) -> Report:
        since = max(span.start, starts[partition]) if starts is not None else span.start
        until = min(span.end, cursors.get(partition, span.end))
        return fill(pipeline, context, partition, Window(since, until), now) if until > since else Report()

    return isolated(pipeline, context, partitions, one, _pass(parts))
