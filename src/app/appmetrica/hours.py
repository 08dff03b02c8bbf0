"""The hours of one resource in one run, and the days that are counted again."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import BinaryIO

from app.appmetrica.client import (
    KEPT_FOR,
    ExportInProgress,
    Exports,
    LogsRequest,
    RequestRefused,
    Resource,
    TooManyParts,
    request_of,
)
from app.appmetrica.rows import (
    NEEDED,
    BadRow,
    CsvRows,
    ReceiptHourFile,
    SortedRows,
    by_hour,
    check_columns,
    hour_of,
    tables,
)
from app.core.errors import LeaseLost, Permanent, Transient
from app.core.ledger import Tally, ledger_of
from app.core.pipeline import Record
from app.core.runs import Failure, Report
from app.core.windows import DAY_SECONDS, HOUR_SECONDS, Window, floor_to
from app.db.state import PendingExport
from app.product_events.mapping import Loaded, load_in_turns
from app.product_events.pull import (
    HOUR,
    NOT_HAD,
    SET_ASIDE_AFTER,
    PartitionRun,
    RefusedLines,
    record_of_nothing,
    store_rows,
    was_had,
)

# The hours of a resource in one run: requested together, landed one by one, in order.
#
# Order within an hour: what is set aside, rows, object, record; a crash before the record repeats the hour, all of
# which is recognized by its content. Invariants: each request also covers the hour before the cursor, so what the
# service received late is found; when a run ends before the file is there, the next one goes on with the same request.
#
# A row that cannot be taken is set aside with its bytes, all others land. A request that fails for a day, or for which
# the service wants too many parts, is made again hour by hour; an hour that fails like that as well is set aside, as
# long as the service answers at all.

NAME = "appmetrica"
EVENTS = "events"
DUE_AFTER = timedelta(minutes=15)
STEP = timedelta(hours=24)
UNIT = "records"
NARROWED = "appmetrica_narrowed"
"""The pipeline whose cursor says up to where requests are made hour by hour."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ResourceRun:
    """One resource in one run. Its methods raise what the ports and the service raise; what was committed stays."""

    run: PartitionRun
    exports: Exports
    resource: Resource
    recount_days: int = 0

    def pull_due(self) -> Report:
        """Go on with the request that is under way, or make the next one, and land its hours."""
        pull, context = self.run.pull, self.run.context
        oldest = floor_to(pull.clock() - timedelta(days=pull.lookback_days), HOUR_SECONDS)
        due, cursor = pull.due_at, self.run.cursor_at or self.run.begin(oldest)
        if cursor >= due:
            return recount(self)
        export = self._under_way(cursor)
        if export is None:
            is_narrowed = cursor < pull.checkpoints.cursors(NARROWED).get(self.run.name, cursor)
            before = self.run.records(Window(cursor - HOUR, cursor)).values()
            # An hour that was set aside would fail this request as well.
            start = cursor - HOUR if all(map(was_had, before)) else cursor
            span = Window(start, min(due, cursor + (HOUR if is_narrowed else STEP)))
            export = self._kept("", span)
        report = self._land(export, cursor)
        if report.more or _span(export).end < due:
            return report + Report(more=not context.dry_run)
        return report + recount(self)

    def pull_late(self, span: Window) -> Report:
        """Pull hours that have more rows now than when they landed. `more`: the file is not there yet."""
        return self._land(self._kept(":late", span), None, late=True)

    def fill(self, span: Window) -> Report:
        """Pull the hours of `span` up to the cursor again. The cursor does not move. Raises Rejected for no hour."""

        def pull_again(hours: Window) -> Report:
            report, at = Report(), hours.start
            while at < hours.end and not report.more:
                day = Window(at, min(at + STEP, hours.end))
                report += self._land(self._kept(":backfill", day), None)
                at = day.end
            return report

        return self.run.fill(span, pull_again)

    def _under_way(self, cursor: datetime) -> PendingExport | None:
        """The export that an earlier run has asked for; one that does not lead on from the cursor is done with.

        So is one from a clock that was ahead, whose age could not be told before that time has come.
        """
        found, soon = None, self.run.pull.clock() + HOUR
        for export in self.exports.pulls.open(NAME, self.run.name):
            span = _span(export)
            if found is None and span.start <= cursor < span.end and export.created_at <= soon:
                found = export
            else:
                self._done(export)
        return found

    def _done(self, export: PendingExport) -> None:
        self.exports.pulls.save(replace(export, done=True))

    def _kept(self, purpose: str, span: Window) -> PendingExport:
        return self.exports.keep(self.run.name + purpose, self.exports.request_received(self.resource, span))

    def _land(self, export: PendingExport, cursor: datetime | None, *, late: bool = False) -> Report:
        """Wait for the file and land its hours; those from the cursor on move it. `more`: it is not there yet.

        Without a cursor rows are loaded whatever is recorded, unless they are `late`: then what has changed is.
        """
        context = self.run.context
        try:
            with self.exports.resumed(export) as under_way:
                try:
                    answer = under_way.wait(context.stop)
                except (Transient, Permanent) as error:
                    if isinstance(error, RequestRefused) or cursor is None:
                        raise
                    return self._not_given(export, cursor, error)
                if answer is not None:
                    return self._no_file(export, cursor, answer.text)
                report = self._land_all(under_way, cursor, again=cursor is None and not late)
                if not context.dry_run:
                    under_way.finish()
                return report
        except RequestRefused as error:
            self._done(export)
            self.exports.leave_out(self.resource, error)
            return Report(more=not context.dry_run)

    def _no_file(self, export: PendingExport, cursor: datetime | None, said: str) -> Report:
        """The service is still making the file. After a day, when it was requested anew, that is told as a failure, and
        after another one it is as if the service had refused it.
        """
        name, context = self.run.name, self.run.context
        log.info("%s: no file yet, it is requested again: %s", name, said)
        waited_for = self.run.pull.clock() - export.created_at
        late = Transient(f"no file of {_span(export)} in {waited_for // HOUR} hours: {said}", "no action needed")
        if cursor is not None and waited_for >= KEPT_FOR + SET_ASIDE_AFTER:
            return self._not_given(export, cursor, late)
        failures = (Failure(name, late.message, late.hint),) if waited_for >= KEPT_FOR else ()
        return Report(more=not context.dry_run, notes=(f"{name}: {said}",), failures=failures)

    def _not_given(self, export: PendingExport, cursor: datetime, error: Transient | Permanent) -> Report:
        """A request that the service did not answer. Raises `error` while it may pass, or the service is away."""
        is_large, span, run = isinstance(error, TooManyParts), _span(export), self.run
        failing_for = run.pull.clock() - export.created_at
        if run.context.dry_run or not (is_large or failing_for >= SET_ASIDE_AFTER):
            raise error
        self.exports.service.applications()  # raises when the service does not answer at all
        if span.end - cursor > HOUR:
            run.commit(cursor_at=span.end, pipeline=NARROWED)
            hint = "no action needed: it is asked for hour by hour from now on"
            report = Report(failures=(Failure(run.name, error.message, hint),))
        else:
            hour = Window(cursor, span.end)
            place = set_aside_name(run.name, cursor)
            ledger = run.set_hour_aside(hour, error, place=place, is_too_large=is_large)
            lost = record_of_nothing(hour, hour_key(run.name, hour), closed=True, version=NOT_HAD)
            run.commit(lost, cursor_at=hour.end)
            report = Report(ledger=ledger)
        self._done(export)
        return report

    def _land_all(self, under_way: ExportInProgress, cursor: datetime | None, *, again: bool) -> Report:
        request, span, run = under_way.request, _span(under_way.export), self.run
        known = run.records(span)
        run.context.progress.advance(total=(span.end - span.start) // HOUR)
        report, loaded = Report(), Loaded()
        with closing(RefusedLines(run.pull.spool)) as refused:

            def refuse(hour_at: datetime | None, row: BadRow) -> None:
                refused.add(set_aside_name(run.name, hour_at), row.reason, row.raw, f"{run.name} {span} {row.detail}")

            sorted_rows = by_hour(
                under_way.files,
                request.columns,
                self.resource.received,
                span,
                run.pull.spool,
                needed=NEEDED if self.resource.name == EVENTS else (),
                refuse=refuse,
            )
            with sorted_rows as reading:
                self._warn(reading, span)
                entries = [] if run.context.dry_run else refused.keep(run.pull.set_aside)
                if refused.not_kept:
                    raise Transient(
                        f"{run.name} {span}: {refused.not_kept} rows that cannot be read could not be set aside",
                        "no action needed if it passes: the hours are pulled again; otherwise check whether the "
                        "object store takes writes below appmetrica/_set_aside/",
                    )
                for hour in reading.hours:
                    run.context.stop.check()
                    live = cursor is not None and hour.window.start >= cursor
                    record = known.get(hour.window.start)
                    done, given = self._one(hour, record, live=live, again=again, whole=not reading.lacking)
                    report, loaded = report + done, loaded + given
        if run.context.dry_run:
            return report
        tally = Tally(
            counted=reading.records - reading.left_out,
            read=reading.records,
            new=loaded.new,
            already_there=loaded.given - loaded.new,
        )
        return report + Report(ledger=ledger_of(tally, *entries, unit=UNIT).of_partition(run.name))

    def _warn(self, reading: SortedRows, span: Window) -> None:
        name = self.run.name
        if number := sum(hour.refused for hour in reading.hours):
            log.warning("%s %s: %d of %d rows cannot be read and are set aside", name, span, number, reading.records)
        if reading.lacking:
            log.warning("%s %s: the file lacks the columns %s", name, span, ", ".join(sorted(reading.lacking)))

    def _one(
        self, hour: ReceiptHourFile, record: Record | None, *, live: bool, again: bool, whole: bool
    ) -> tuple[Report, Loaded]:
        """Land an hour; what became of its rows. `again`: load its rows whatever is recorded. `whole`: no column lacks;
        else what has as many rows already stays as it is.
        """
        run = self.run
        had = record if was_had(record) else None
        # A file that lacks a column must not replace one that has it.
        stays = had is not None and not whole and had.rows >= hour.rows > 0
        same = had is not None and (had.digest == hour.digest or stays)
        cursor_at = hour.window.end if live else None
        run.context.progress.advance(done=1)
        if had is not None and same and not again:
            looked_at = replace(had, closed=True, source_cells=max(had.source_cells, had.rows + hour.refused))
            if looked_at != had or live:
                run.commit(looked_at, cursor_at=cursor_at)
            return Report(), Loaded(min(had.rows, hour.rows))
        if run.context.dry_run:
            return Report(rows=hour.rows, windows=int(not same)), Loaded()
        loaded = self._load(hour, past=not live)
        if had is not None and stays:
            landed = replace(had, source_cells=had.rows + hour.refused)
        else:
            landed = self._store(hour, closed=had is not None)
        run.commit(landed, cursor_at=cursor_at)
        if self.resource.name != EVENTS:
            loaded = _stored(hour, landed, had)
        run.context.progress.advance(rows=loaded.new)
        late = loaded.new if had is not None and not again else 0
        size_bytes = 0 if same else landed.size_bytes
        return Report(rows=loaded.new, bytes=size_bytes, windows=int(not same), late_rows=late), loaded

    def mend(self, hour: ReceiptHourFile, record: Record | None, over: str | None) -> Report:
        """Land an hour again and store its object, see `store_rows`. The cursor does not move."""
        if self.run.context.dry_run:
            return Report(windows=1)
        new = self._load(hour, past=True).new
        closed = record is not None and was_had(record) and record.closed
        landed = self._store(hour, closed=closed, over=over)
        self.run.commit(landed)
        return Report(rows=new, bytes=landed.size_bytes, windows=1)

    def _load(self, hour: ReceiptHourFile, *, past: bool) -> Loaded:
        """Events go into the warehouse as well."""
        if self.resource.name != EVENTS or not hour.rows:
            return Loaded()
        rows = tables(hour, self.exports.service.application_id)
        return load_in_turns(self.run.pull.warehouse, rows, past=past)

    def _store(self, hour: ReceiptHourFile, *, closed: bool, over: str | None = None) -> Record:
        """The object is stored, unless the hour is empty; what is there then."""
        key = hour_key(self.run.name, hour.window)
        if not hour.rows:
            empty = record_of_nothing(hour.window, key, closed=closed, digest=hour.digest)
            return replace(empty, source_cells=hour.refused)
        return store_rows(
            self.run.pull.store,
            hour.file,
            pipeline=NAME,
            key=key,
            window=hour.window,
            rows=hour.rows,
            digest=hour.digest,
            closed=closed,
            refused=hour.refused,
            over=over,
        )


def _stored(hour: ReceiptHourFile, landed: Record, had: Record | None) -> Loaded:
    """What became of rows that land only as an object, told by what the object holds."""
    if landed.version and landed.digest != hour.digest:  # it held more, and stays
        return Loaded(min(landed.rows, hour.rows))
    return Loaded(landed.rows, max(0, landed.rows - (had.rows if had else 0)))


def partition_of(exports: Exports, resource: Resource) -> str:
    """`{application}:{resource}`: another application has a cursor of its own."""
    return f"{exports.service.application_id}:{resource.name}"


def hour_key(partition: str, window: Window) -> str:
    """`appmetrica/{resource}/date={YYYY-MM-DD}/{application}_{HHMMSS}.csv.gz`."""
    application_id, _, resource = partition.partition(":")
    return f"{NAME}/{resource}/date={window.start:%Y-%m-%d}/{application_id}_{window.start:%H%M%S}.csv.gz"


def set_aside_name(partition: str, hour_at: datetime | None) -> tuple[str, ...]:
    """What is set aside of an hour lies below `{resource}/date={date}/{application}_{HHMMSS}`."""
    application_id, _, resource = partition.partition(":")
    if hour_at is None:
        return resource, f"{application_id}_of_no_hour"
    return resource, f"date={hour_at:%Y-%m-%d}", f"{application_id}_{hour_at:%H%M%S}"


def _span(export: PendingExport) -> Window:
    """The hours of an export that a job asked for."""
    span = request_of(export).span
    if span is None:
        raise Permanent(f"export {export.export_id} has no hours", "bug in Headwater; please report it")
    return span


# Rows that arrive late with an old time of receipt: days are counted again once they were pulled, what lacks lands.
#
# The service may deliver events above its quota later, under the time at which it received them. Invariants: once a
# day each of the last days of receipt is exported with the one column that tells the hour; only hours that have more
# rows than were recorded are pulled again; a day is asked for only while less than BUDGET of the day's calls are used.

RECOUNTED = "appmetrica_recount"
"""The pipeline whose records are days of receipt; `digest` is the day on which each was counted last."""
BUDGET = 0.5
DAY = timedelta(days=1)


def recount(resource: ResourceRun) -> Report:
    """Count the days that were not counted today, oldest first, for as long as one run may wait for a file."""
    run, exports, report = resource.run, resource.exports, Report()
    began_at = run.pull.clock()
    for day in () if run.context.dry_run else _days(resource, began_at):
        if (run.pull.clock() - began_at).total_seconds() > exports.timeout_seconds:
            break
        if exports.calls_today >= BUDGET * exports.daily_calls:
            log.info("%s: half of the day's calls are used, so days are not counted again", run.name)
            break
        try:
            done, counted = _count_day(resource, day)
        except LeaseLost:
            raise
        except (Transient, Permanent) as error:  # tomorrow again: a day that cannot be had must not hold up the others
            done, counted = True, Report(failures=(Failure(f"{run.name} {day}", error.message, error.hint),))
        report += counted
        if not done:
            break
        record = record_of_nothing(day, "", closed=True, digest=f"{began_at:%Y-%m-%d}")
        run.commit(record, pipeline=RECOUNTED)
    return report


def _days(resource: ResourceRun, now: datetime) -> Iterator[Window]:
    """Days of receipt that were pulled and not counted today; of the first and the last one what was pulled."""
    run, count, today = resource.run, resource.recount_days, floor_to(now, DAY_SECONDS)
    first, last = run.pull.checkpoints.starts(NAME).get(run.name), run.cursor_at
    if not (count and first and last):
        return
    since = today - count * DAY
    counted = run.records(Window(since, today), RECOUNTED).items()
    done = {floor_to(at, DAY_SECONDS) for at, record in counted if record.digest == f"{now:%Y-%m-%d}"}
    for at in (since + number * DAY for number in range(count)):
        start, end = max(at, first), min(at + DAY, last)
        if start < end and at not in done:
            yield Window(start, end)


def _count_day(resource: ResourceRun, day: Window) -> tuple[bool, Report]:
    """Count a day and pull what is missing; False when the service is still making a file."""
    run, exports, received = resource.run, resource.exports, resource.resource.received
    keys: LogsRequest = exports.request_received(replace(resource.resource, columns=(received,)), day)
    with exports.resumed(exports.keep(f"{run.name}:recount", keys)) as under_way:
        if under_way.wait(run.context.stop) is not None:
            return False, Report()
        missing = _missing(_counts(under_way.files, received), run.records(day), day)
        report = Report()
        for span in _spans(sorted(missing)):
            rows = sum(number for at, number in missing.items() if span.start <= at < span.end)
            log.info("%s %s: the service has %d rows that were not there before", run.name, span, rows)
            pulled = resource.pull_late(span)
            # The service still makes the file; until then these rows wait.
            if pulled.more:
                waiting = ledger_of(Tally(counted=rows, waiting=rows), unit=UNIT).of_partition(run.name)
                return False, report + replace(pulled, more=False, ledger=waiting)
            report += pulled
        under_way.finish()
        return True, report


def _missing(counts: Mapping[datetime, int], known: Mapping[datetime, Record], day: Window) -> Mapping[datetime, int]:
    """How many rows more than recorded the service has, by hour. What could not be had is left to a backfill."""
    found = {}
    for at, number in counts.items():
        record = known.get(at)
        more = number - (record.source_cells if record else 0)
        if day.start <= at < day.end and more > 0 and (record is None or was_had(record)):
            found[at] = more
    return found


def _counts(files: Sequence[BinaryIO], received: str) -> Counter[datetime]:
    """Rows by the hour of their receipt."""
    counts = Counter[datetime]()
    for file in files:
        rows = CsvRows(file)
        check_columns(rows.header, {received})
        for row in rows:
            if not isinstance(row, BadRow) and (at := hour_of(row[rows.header.index(received)])) is not None:
                counts[at] += 1
    return counts


def _spans(hours: Sequence[datetime]) -> Sequence[Window]:
    """Hours, oldest first, as windows of neighbours."""
    found: list[Window] = []
    for at in hours:
        start = found.pop().start if found and found[-1].end == at else at
        found.append(Window(start, at + HOUR))
    return found
