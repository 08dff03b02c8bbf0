"""The pipeline: pulls every configured resource independently, recounts recent days, and compares both ends.

The hours of a resource are requested together, loaded and stored one by one, in order. The order within an hour is
set-aside rows, rows, object, record. After a crash before the record, the hour is repeated; everything in it is
recognized by its content. Invariants: each request also covers the hour before the cursor, so data that the service
received late is found; if a run ends before the file is ready, the next run continues the same request; daily calls are
counted across all processes.

A row that cannot be loaded is set aside with its bytes; all others are loaded. A request that fails for a day, or needs
too many parts, is repeated hour by hour; an hour that still fails is set aside, provided the service responds at all.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cached_property, partial
from typing import BinaryIO

from app.appmetrica.client import (
    KEPT_FOR,
    ExportInProgress,
    Exports,
    LogResource,
    NotReady,
    RequestRefused,
    TooManyParts,
    request_of,
    resources,
)
from app.appmetrica.rows import (
    EVENTS,
    BadRow,
    CsvRows,
    ReceiptHourFile,
    SortedRows,
    check_columns,
    hour_of,
    place_of,
    read_hour,
)
from app.config.settings import AppMetricaSettings
from app.core.errors import AppError, Permanent, Transient
from app.core.ledger import Tally
from app.core.runs import Context, Report, Stop
from app.core.windows import DAY_SECONDS, HOUR_SECONDS, Window, floor_to
from app.db.state import PendingExport, SqlPulls
from app.ops.connection_checks import ConnectionCheck
from app.product_events.hours import HOUR, SET_ASIDE_AFTER, PartitionRun, PullMode, has_landed, record_of_nothing
from app.product_events.http_client import disk_fault
from app.product_events.pull import PullPipeline
from app.product_events.verify import Given

NAME = "appmetrica"
OFF = "set APPMETRICA_API_KEY and APPMETRICA_APPLICATION_ID"
LATER = (
    "verify again in a few minutes: the same file is requested; APPMETRICA_POLL_TIMEOUT_SECONDS sets how long to wait"
)
DUE_AFTER = timedelta(minutes=15)
STEP = timedelta(hours=24)
NARROWED = "appmetrica_narrowed"
"""The pipeline whose cursor is the time up to which requests are made hour by hour."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AppMetricaPull(PullPipeline):
    """See `PullPipeline`. Partitions are `{application}:{resource}`, windows hours of receipt."""

    name, variables, unit, due_after = NAME, OFF, "records", DUE_AFTER

    pulls: SqlPulls

    @property
    def given(self) -> AppMetricaSettings:
        """See `PullPipeline.given`."""
        return self.settings.appmetrica

    @cached_property
    def exports(self) -> Exports | None:
        """The application; None without a token."""
        given = self.given
        if given.api_key is None or given.application_id is None:
            return None
        token = given.api_key.get_secret_value()
        return Exports(given, token, given.application_id, spool=self.spool, pulls=self.pulls, clock=self.clock)

    @property
    def application(self) -> Exports:
        """`exports`. Raises Permanent without a token."""
        if self.exports is None:
            raise Permanent("AppMetrica is not configured", OFF)
        return self.exports

    @property
    def partitions(self) -> Sequence[str]:
        """See `PullPipeline.partitions`: each application has its own cursor."""
        return [f"{self.exports.application_id}:{name}" for name in self.given.resources] if self.exports else ()

    @property
    def checks(self) -> Sequence[ConnectionCheck]:
        """See `PullPipeline.checks`."""
        if self.exports is None:
            return ()
        ping = self.heard(self.exports.ping, f"{self.exports.application_id}:")
        return (ConnectionCheck("appmetrica", "AppMetrica", "APPMETRICA_APPLICATION_ID", ping),)

    def run(self, context: Context, partition: str) -> "ResourceRun":
        """See `PullPipeline.run`."""
        return ResourceRun(self, context, partition)

    def key(self, partition: str, window: Window) -> str:
        """`appmetrica/{resource}/date={YYYY-MM-DD}/{application}_{HHMMSS}.csv.gz`."""
        return f"{NAME}/{'/'.join(place_of(partition, window.start))}.csv.gz"

    def place(self, partition: str, window: Window) -> tuple[str, ...]:
        """Below `appmetrica/_set_aside/`: `{resource}/date={date}/{application}_{HHMMSS}`."""
        return place_of(partition, window.start)

    def opened(self, partition: str, window: Window, file: BinaryIO, stop: Stop) -> ReceiptHourFile:  # noqa: ARG002
        """See `PullPipeline.opened`. Raises ValueError when the header is missing."""
        return read_hour(partition, window, file, self.spool)

    def sorted_rows(self, partition: str, under_way: ExportInProgress) -> SortedRows:
        """The rows of an export's file, by hour."""
        try:
            return SortedRows(
                under_way.files,
                under_way.request.columns,
                resource_of(partition).received,
                span_of(under_way.export),
                self.spool,
                partition=partition,
            )
        except OSError as error:
            raise disk_fault(self.spool, error) from error

    def ask(self, partition: str, span: Window, stop: Stop, held: ExitStack) -> tuple[Window, Given]:
        """See `PullPipeline.ask`. A fault applies to all hours of the span: the first one waits for all."""
        exports, resource = self.application, resource_of(partition)
        fault: AppError
        try:
            with exports.resumed(exports.keep_received(f"{partition}:verify", resource, span)) as under_way:
                answer = under_way.wait(stop)
                if answer is None:
                    hours = held.enter_context(closing(self.sorted_rows(partition, under_way))).hours
                    under_way.finish()
                    return span, {hour.window: hour for hour in hours}.__getitem__
                fault = Transient(f"AppMetrica is still preparing the file of {span}: {answer.text}", LATER)
        except (Transient, Permanent) as error:
            if exports.leaves_out(resource, error):
                return self.ask(partition, span, stop, held)
            fault = error

        def lacking(_: Window) -> ReceiptHourFile:
            raise fault

        return span, lacking


def resource_of(partition: str) -> LogResource:
    """The resource of a partition."""
    return resources()[partition.partition(":")[2]]


def span_of(export: PendingExport) -> Window:
    """The hours of an export that a job requested."""
    span = request_of(export).span
    if span is None:
        raise Permanent(f"export {export.export_id} has no hours", "bug in Headwater; please report it")
    return span


class ResourceRun(PartitionRun):
    """One resource in one run."""

    pull: AppMetricaPull

    @property
    def exports(self) -> Exports:
        """See `AppMetricaPull.application`."""
        return self.pull.application

    @property
    def resource(self) -> LogResource:
        """The resource of the partition."""
        return resource_of(self.name)

    def pull_due(self) -> Report:
        """See `PartitionRun.pull_due`: continue the request in progress or make the next one."""
        pull = self.pull
        due = pull.due_at
        cursor = self.begun_at(floor_to(pull.clock() - timedelta(days=pull.given.lookback_days), HOUR_SECONDS))
        report = self.bring_back() if self.resource.name == EVENTS else Report()
        waiting = self.waiting_hours()
        if cursor < due:
            export = self._under_way(cursor) or self._next(cursor, due)
            report += self._land(export, cursor)
            if report.more or span_of(export).end < due:
                return report + Report(more=not self.context.dry_run)
        for hour in waiting:
            # A retry; an hour that fails again blocks nothing.
            pulled = self.alone(f" {hour}", partial(self.pull_late, hour))
            report += replace(pulled, more=False)
            if pulled.more:
                break  # the service is still making the file
        return report + recount(self)

    def _next(self, cursor: datetime, due: datetime) -> PendingExport:
        pull = self.pull
        is_narrowed = cursor < pull.checkpoints.cursors(NARROWED).get(self.name, cursor)
        before = self.records(Window(cursor - HOUR, cursor)).values()
        # An hour that was set aside would make this request fail as well.
        start = cursor - HOUR if all(map(has_landed, before)) else cursor
        span = Window(start, min(due, cursor + (HOUR if is_narrowed else STEP)))
        return self.exports.keep_received(self.name, self.resource, span)

    def pull_late(self, span: Window) -> Report:
        """Pull hours that have more rows now than when they were loaded. `more`: the file is not ready yet."""
        export = self.exports.keep_received(f"{self.name}:late", self.resource, span)
        return self._land(export, None, late=True)

    def pull_again(self, hours: Window) -> Report:
        """See `PartitionRun.pull_again`. `more`: a file is not ready yet."""
        owner, report, at = f"{self.name}:backfill", Report(), hours.start
        # An earlier run ended with a file that was not ready: what it pulled before that is not requested again.
        kept_since = self.pull.clock() - KEPT_FOR
        for export in self.exports.pulls.open(NAME, owner):
            start, is_kept = span_of(export).start, (export.asked_at or export.created_at) > kept_since
            if is_kept and at < start < hours.end and not (start - hours.start) % STEP:
                at = start
        while at < hours.end and not report.more:
            day = Window(at, min(at + STEP, hours.end))
            report += self._land(self.exports.keep_received(owner, self.resource, day), None)
            at = day.end
        return report

    def _under_way(self, cursor: datetime) -> PendingExport | None:
        """The export that an earlier run requested; one that does not continue from the cursor is marked done.

        So is one created in the future by a fast clock, since its age is unknown until that time has come.
        """
        found, soon = None, self.pull.clock() + HOUR
        for export in self.exports.pulls.open(NAME, self.name):
            span = span_of(export)
            if found is None and span.start <= cursor < span.end and export.created_at <= soon:
                found = export
            else:
                self._done(export)
        return found

    def _done(self, export: PendingExport) -> None:
        self.exports.pulls.save(replace(export, done=True))

    def _land(self, export: PendingExport, cursor: datetime | None, *, late: bool = False) -> Report:
        """Wait for the file, then load and store its hours; hours from the cursor on move it. `more`: it is not ready
        yet.

        Without a cursor, rows are loaded regardless of what is recorded; with `late`, only changed hours are.
        """
        context = self.context
        with self.exports.resumed(export) as under_way:
            try:
                answer = under_way.wait(context.stop)
            except (Transient, Permanent) as error:
                if self.exports.leaves_out(self.resource, error):
                    self._done(export)
                    return Report(more=not context.dry_run)
                if cursor is None or self.exports.is_needed(self.resource, error):
                    if isinstance(error, RequestRefused):
                        self._done(export)
                    raise
                return self._not_given(export, cursor, error)
            if answer is not None:
                return self._no_file(export, cursor, answer)
            if early := self.clock_fault(span_of(export), self.exports.upstream.answered_at):
                self._done(export)  # the service would give this file again for a day
                raise early
            report = self._land_all(under_way, cursor, again=cursor is None and not late)
            if not context.dry_run:
                under_way.finish()
            return report

    def _no_file(self, export: PendingExport, cursor: datetime | None, answer: NotReady) -> Report:
        """The service is still making the file. After a day, when it has been requested again, that is reported as a
        failure; after another day it counts as refused, unless the service's queue was full all the time.
        """
        name, context, said = self.name, self.context, answer.text
        log.info("%s: no file yet, it is requested again: %s", name, said)
        waited_for = self.pull.clock() - export.created_at
        late = Transient(f"no file of {span_of(export)} in {waited_for // HOUR} hours: {said}", "no action needed")
        if cursor is not None and answer.heard and waited_for >= KEPT_FOR + SET_ASIDE_AFTER:
            return self._not_given(export, cursor, late)
        if not answer.heard and waited_for >= KEPT_FOR:
            self._done(export)  # its time begins when it is in the queue
        failed = self.failed("", late) if waited_for >= KEPT_FOR else Report()
        return Report(more=not context.dry_run, notes=(f"{name}: {said}",)) + failed

    def _not_given(self, export: PendingExport, cursor: datetime, error: Transient | Permanent) -> Report:
        """A request that failed. Raises `error` while it may be temporary, or when the service is down.

        A refused request may cover too many hours, so it is split into hours at once.
        """
        is_large, is_refused, span = isinstance(error, TooManyParts), isinstance(error, RequestRefused), span_of(export)
        is_long = span.end - cursor > HOUR
        is_lasting = self.pull.clock() - export.created_at >= SET_ASIDE_AFTER
        if self.context.dry_run or not (is_large or is_lasting or (is_refused and is_long)):
            raise error
        self.exports.applications()  # raises when the service does not answer at all
        if is_long:
            self.commit(cursor_at=span.end, pipeline=NARROWED)
            hint = "no action needed: it is requested hour by hour from now on"
            report = self.failed("", Transient(error.message, hint))
        else:
            hour = Window(cursor, span.end)
            report = self.not_had(
                hour, None, error, PullMode.LIVE, number=1, counted=1, is_too_large=is_large, at_once=True
            )
        self._done(export)
        return report

    def _land_all(self, under_way: ExportInProgress, cursor: datetime | None, *, again: bool) -> Report:
        span, report, is_dry = span_of(under_way.export), Report(), self.context.dry_run
        known = self.records(span)
        self.context.progress.advance(total=(span.end - span.start) // HOUR)
        with closing(self.pull.sorted_rows(self.name, under_way)) as reading:
            if reading.lacking:
                log.warning("%s %s: the file lacks the columns %s", self.name, span, ", ".join(sorted(reading.lacking)))
            entries = [] if is_dry else reading.refused_lines.keep(self.pull.set_aside)
            if reading.refused_lines.not_kept:
                raise Transient(
                    f"{self.name} {span}: {reading.refused_lines.not_kept} rows that cannot be read could not be set "
                    "aside",
                    "no action needed if this is temporary: the hours are pulled again; otherwise check whether the "
                    "object store takes writes below appmetrica/_set_aside/",
                )
            if not is_dry:
                refused = sum(hour.refused for hour in reading.hours)
                report += self.ledger(Tally(refused, refused + reading.left_out), *entries)
            for hour in reading.hours:
                self.context.stop.check()
                record = known.get(hour.window.start)
                # A file that lacks a column must not replace one that has it.
                if reading.lacking and record is not None and has_landed(record) and record.rows >= hour.rows > 0:
                    hour.stands_for = record.digest
                is_live = cursor is not None and hour.window.start >= cursor
                mode = PullMode.LIVE if is_live else PullMode.AGAIN if again else PullMode.ONCE_MORE
                report += self.take(hour, record, mode, final=has_landed(record))
            return report + self.settle()


# Late rows with an old receipt time: pulled days are counted again, and missing rows are loaded.
#
# The service may deliver events above its quota later, under their original receipt time. Invariants: once a day each
# of the last receipt days is exported with only the column that gives the hour; only hours with more rows than recorded
# are pulled again; a day is requested only while less than BUDGET of the daily calls are used.

RECOUNTED = "appmetrica_recount"
"""The pipeline whose records are days of receipt; `digest` is the day of each one's last count."""
BUDGET = 0.5
DAY = timedelta(days=1)


def recount(resource: ResourceRun) -> Report:
    """Count the days that were not counted today, oldest first, as long as one run may wait for a file."""
    exports, report = resource.exports, Report()
    began_at, given = resource.pull.clock(), exports.given
    for day in () if resource.context.dry_run else _days(resource, began_at):
        if (resource.pull.clock() - began_at).total_seconds() > given.poll_timeout_seconds:
            break
        if exports.calls_today >= BUDGET * given.daily_calls:
            log.info("%s: half of the day's calls are used, so days are not counted again", resource.name)
            break
        # Failures are retried tomorrow: a failing day must not block the others.
        counted = resource.alone(f" {day}", partial(_count_day, resource, day))
        report += replace(counted, more=False)
        if counted.more:
            break
        resource.commit(record_of_nothing(day, "", closed=True, digest=f"{began_at:%Y-%m-%d}"), pipeline=RECOUNTED)
    return report


def _days(resource: ResourceRun, now: datetime) -> Iterator[Window]:
    """Receipt days that were pulled and not counted today; the first and the last one cover only the pulled part."""
    count, today = resource.exports.given.recount_days, floor_to(now, DAY_SECONDS)
    first, last = resource.pull.checkpoints.starts(NAME).get(resource.name), resource.cursor_at
    if not (count and first and last):
        return
    since = today - count * DAY
    counted = resource.records(Window(since, today), RECOUNTED).items()
    done = {floor_to(at, DAY_SECONDS) for at, record in counted if record.digest == f"{now:%Y-%m-%d}"}
    for at in (since + number * DAY for number in range(count)):
        start, end = max(at, first), min(at + DAY, last)
        if start < end and at not in done:
            yield Window(start, end)


def _count_day(resource: ResourceRun, day: Window) -> Report:
    """Count a day and pull what is missing. `more`: the service is still making a file."""
    exports, received = resource.exports, resource.resource.received
    export = exports.keep_received(f"{resource.name}:recount", replace(resource.resource, columns=(received,)), day)
    with exports.resumed(export) as under_way:
        if under_way.wait(resource.context.stop) is not None:
            return Report(more=True)
        known, report = resource.records(day), Report()
        beyond = {
            at: number - (known[at].source_cells if at in known else 0)
            for at, number in _counts(under_way.files, received).items()
            # Unavailable hours are left to a backfill.
            if day.start <= at < day.end and (at not in known or has_landed(known[at]))
        }
        missing = {at: number for at, number in beyond.items() if number > 0}
        for span in _spans(sorted(missing)):
            rows = sum(number for at, number in missing.items() if span.start <= at < span.end)
            log.info("%s %s: the service has %d rows that were not there before", resource.name, span, rows)
            pulled = resource.pull_late(span)
            if pulled.more:  # these rows wait until the file is ready
                waiting = resource.ledger(Tally(counted=rows, waiting=rows)).ledger
                return report + replace(pulled, ledger=waiting)
            report += pulled
        under_way.finish()
        return report


def _counts(files: Sequence[BinaryIO], received: str) -> Counter[datetime]:
    """Rows by hour of receipt."""
    counts = Counter[datetime]()
    for file in files:
        rows = CsvRows(file)
        check_columns(rows.header, {received})
        for row in rows:
            if not isinstance(row, BadRow) and (at := hour_of(row[rows.header.index(received)])) is not None:
                counts[at] += 1
    return counts


def _spans(hours: Sequence[datetime]) -> Sequence[Window]:
    """Hours, oldest first, merged into windows of adjacent hours."""
    found: list[Window] = []
    for at in hours:
        start = found.pop().start if found and found[-1].end == at else at
        found.append(Window(start, at + HOUR))
    return found
