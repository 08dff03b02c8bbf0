"""The hours of one resource in one run, and the days that are counted again."""

import logging
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import BinaryIO
from zoneinfo import ZoneInfo

from app.appmetrica.client import SERVICE, Refused, Service
from app.appmetrica.export_request import (
    Asking,
    Patience,
    Polling,
    Question,
    Resource,
    TooManyParts,
    asking,
    keep_question,
    question_of,
    received_in,
)
from app.appmetrica.rows import (
    HOUR,
    HOUR_SECONDS,
    NEEDED,
    BadRow,
    CsvRows,
    HourFile,
    Reading,
    by_hour,
    check_columns,
    hour_of,
    tables,
)
from app.core.errors import AppError, LeaseLost, Permanent, Rejected, Transient
from app.core.ledger import Tally, ledger_of
from app.core.pipeline import Checkpoints, Commit, Record
from app.core.runs import Context, Failure, Report
from app.core.windows import DAY_SECONDS, Window, floor_to
from app.db.run_records import Export, SqlPulls
from app.object_store.port import ObjectStore
from app.object_store.set_aside import LINES, SetAsideStore
from app.product_events.mapping import Load, Loaded, load_in_turns
from app.product_events.raw_objects import NOT_HAD, Keep, RawObject, RefusedLines, keep, was_had

# The hours of one resource in one run: asked for together, landed one by one, in order.
#
# Order within an hour: what is set aside, rows, object, record; a crash before the record repeats the hour, all of
# which is told by its content. Invariants: each question also covers the hour before the cursor, so what the service
# received late is found; the question is kept before it is asked, and the next run goes on with it when this one ends
# before the file is there.
#
# A row that cannot be taken is set aside with its bytes, all others land. A question that fails for a day, or for
# which the service wants too many parts, is put anew hour by hour; an hour that fails like that as well is set aside,
# as long as the service answers at all.

NAME = "appmetrica"
EVENTS = "events"
GZIP = "application/gzip"
DUE_AFTER = timedelta(minutes=15)
STEP = timedelta(hours=24)
UNIT = "records"
NARROWED = "appmetrica_narrowed"
"""The pipeline whose cursor says up to where questions are put hour by hour."""
SET_ASIDE_AFTER = timedelta(days=1)
ABOVE_LIMIT, KEEPS_FAILING = "hour above the service's limit", "hour that keeps failing"
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Places:
    """Where hours and what is known of them are kept. `refused` are columns that the service did not know."""

    checkpoints: Checkpoints
    pulls: SqlPulls
    store: ObjectStore
    load: Load
    spool: Path
    clock: Callable[[], datetime]
    polling: Polling
    lookback_days: int
    zone: Callable[[], ZoneInfo]
    refused: set[str]
    set_aside: SetAsideStore
    recount_days: int
    daily_calls: int


@dataclass(frozen=True, slots=True)
class ResourceRun:
    """One resource in one run. Its methods raise what the ports and the service raise; what was committed stays."""

    places: Places
    context: Context
    service: Service
    resource: Resource

    @property
    def partition(self) -> str:
        """Application and resource: another application has a cursor of its own."""
        return f"{self.service.application_id}:{self.resource.name}"

    def bring(self) -> Report:
        """Go on with the question that is under way, or put the next one, and land its hours."""
        now = self.places.clock()
        cursor = self.places.checkpoints.cursors(NAME).get(self.partition) or self._begin(now)
        due = due_at(now)
        if cursor >= due:
            return self._recount()
        export = self._under_way(cursor)
        if export is None:
            is_narrowed = cursor < self.places.checkpoints.cursors(NARROWED).get(self.partition, cursor)
            before = self.places.checkpoints.records(NAME, self.partition, cursor - HOUR, cursor)
            # An hour that was set aside would fail this question as well.
            start = cursor - HOUR if all(map(was_had, before)) else cursor
            span = Window(start, min(due, cursor + (HOUR if is_narrowed else STEP)))
            export = self._kept(self.partition, span, now)
        report = self._land(export, cursor)
        if report.more or _span(export).end < due:
            return report + Report(more=not self.context.dry_run)
        return report + self._recount()

    def _recount(self) -> Report:
        """Look for rows that came late, once all that is due was pulled."""
        return Report() if self.context.dry_run else recount(self, NAME, UNIT)

    def pull_late(self, span: Window) -> Report:
        """Pull hours that have more rows now than when they landed. `more`: the file is not there yet."""
        export = self._kept(f"{self.partition}:late", span, self.places.clock())
        return self._land(export, None, late=True)

    def fill(self, span: Window) -> Report:
        """Pull the hours of `span` up to the cursor again. The cursor does not move. Raises Rejected for no hour."""
        now = self.places.clock()
        cursor = min(self.places.checkpoints.cursors(NAME).get(self.partition, due_at(now)), due_at(now))
        start, end = floor_to(span.start, HOUR_SECONDS), min(_ceiling(span.end), cursor)
        if start >= end:
            raise Rejected(
                f"nothing was filled: {self.partition} was pulled up to {cursor:%Y-%m-%dT%H:%MZ}, not {span} yet",
                "give an earlier span, or run the job, which pulls later hours by itself: python -m app run appmetrica",
            )
        report, at = Report(), start
        while at < end and not report.more:
            hours = Window(at, min(at + STEP, end))
            report += self._land(self._kept(f"{self.partition}:backfill", hours, now), None)
            at = hours.end
        if report.more:
            return report
        total = report.ledger.total
        note = f"{self.partition}: {(end - start) // HOUR} hours asked for again: {total.new} records are new"
        return report + Report(notes=(f"{note}, {total.already_there} were there",))

    def _begin(self, now: datetime) -> datetime:
        start = floor_to(now - timedelta(days=self.places.lookback_days), HOUR_SECONDS)
        self._commit(Commit(cursor_at=start))
        return start

    def _commit(self, commit: Commit, pipeline: str = NAME) -> None:
        if not self.context.dry_run:
            self.places.checkpoints.commit(pipeline, self.partition, commit, self.context.lease)

    def _under_way(self, cursor: datetime) -> Export | None:
        """The export that an earlier run has asked for; one that does not lead on from the cursor is done with."""
        found = None
        for export in self.places.pulls.open(SERVICE, self.partition):
            span = _span(export)
            if found is None and span.start <= cursor < span.end:
                found = export
            else:
                self.places.pulls.save(replace(export, done=True))
        return found

    def _kept(self, owner: str, span: Window, now: datetime) -> Export:
        question = question_for(self.places, self.service.application_id, self.resource, span)
        return keep_question(self.places.pulls, owner, question, now)

    def _not_given(self, export: Export, cursor: datetime, error: Transient | Permanent) -> Report:
        """A question that the service did not answer. Raises `error` while it may pass, or the service is away."""
        is_large, span = isinstance(error, TooManyParts), _span(export)
        failing_for = self.places.clock() - export.created_at
        if self.context.dry_run or not (is_large or failing_for >= SET_ASIDE_AFTER):
            raise error
        self.service.applications()  # raises when the service does not answer at all
        if span.end - cursor > HOUR:
            self._commit(Commit(cursor_at=span.end), NARROWED)
            hint = "no action needed: it is asked for hour by hour from now on"
            report = Report(failures=(Failure(self.partition, error.message, hint),))
        else:
            report = self._hour_set_aside(Window(cursor, span.end), error, ABOVE_LIMIT if is_large else KEEPS_FAILING)
        self.places.pulls.save(replace(export, done=True))
        return report

    def _hour_set_aside(self, window: Window, error: AppError, reason: str) -> Report:
        """An hour that the service cannot give. It counts as one record."""
        log.warning("%s %s is set aside: %s", self.partition, window, error)
        kept = self.places.set_aside.keep(
            self._set_aside_name(window.start),
            str(error).encode(),
            content_type=LINES,
            reason=reason,
            number=1,
            sample=f"{self.partition} {window}: {error.message}",
        )
        key = hour_key(self.resource.name, self.service.application_id, window)
        record = Record(window, 0, key, NOT_HAD, "", 0, 0, 0, None, None, closed=True)
        self._commit(Commit((record,), window.end))
        return Report(ledger=ledger_of(Tally(counted=1), kept.entry, unit=UNIT).of_partition(self.partition))

    def _set_aside_name(self, hour_at: datetime | None) -> tuple[str, ...]:
        """What is set aside of an hour lies below `{resource}/date={date}/{application}_{HHMMSS}`."""
        application_id = self.service.application_id
        if hour_at is None:
            return self.resource.name, f"{application_id}_of_no_hour"
        return self.resource.name, f"date={hour_at:%Y-%m-%d}", f"{application_id}_{hour_at:%H%M%S}"

    def _land(self, export: Export, cursor: datetime | None, *, late: bool = False) -> Report:
        """Wait for the file and land its hours; those from the cursor on move it. `more`: it is not there yet.

        Without a cursor rows are loaded whatever is recorded, unless they are `late`: then what has changed is.
        """
        places = self.places
        # Jitter is no secret: any source of numbers serves.
        patience = Patience(self.context.stop, random.random)
        try:
            with asking(self.service, places.pulls, places.clock, export, fresh=True) as under_way:
                try:
                    told = under_way.wait(patience, places.polling)
                except (Transient, Permanent) as error:
                    if isinstance(error, Refused) or cursor is None:
                        raise
                    return self._not_given(export, cursor, error)
                if told is not None:
                    log.info("%s: no file yet, it is asked for again: %s", self.partition, told.text)
                    return Report(more=not self.context.dry_run, notes=(f"{self.partition}: {told.text}",))
                report = self._land_all(under_way, cursor, again=cursor is None and not late)
                if not self.context.dry_run:
                    under_way.finish()
                return report
        except Refused as error:
            places.pulls.save(replace(export, done=True))
            leave_out(self.places, self.resource, error)
            return Report(more=not self.context.dry_run)

    def _land_all(self, under_way: Asking, cursor: datetime | None, *, again: bool) -> Report:
        question, span, places = under_way.question, _span(under_way.export), self.places
        records = places.checkpoints.records(NAME, self.partition, span.start, span.end)
        known = {record.window.start: record for record in records}
        self.context.progress.advance(total=(span.end - span.start) // HOUR)
        report, loaded = Report(), Loaded()
        with closing(RefusedLines(places.spool)) as refused:

            def refuse(hour_at: datetime | None, row: BadRow) -> None:
                sample = f"{self.partition} {span} {row.detail}"
                refused.add(self._set_aside_name(hour_at), row.reason, row.raw, sample)

            sorted_rows = by_hour(
                under_way.files,
                question.columns,
                self.resource.received,
                span,
                places.spool,
                needed=NEEDED if self.resource.name == EVENTS else (),
                refuse=refuse,
            )
            with sorted_rows as reading:
                self._tell(reading, span)
                entries = [] if self.context.dry_run else refused.keep(places.set_aside)
                if refused.not_kept:
                    raise Transient(
                        f"{self.partition} {span}: {refused.not_kept} rows that cannot be read could not be set aside",
                        "no action needed if it passes: the hours are pulled again; else see whether the object store "
                        "takes writes below appmetrica/_set_aside/",
                    )
                for hour in reading.hours:
                    self.context.stop.check()
                    live = cursor is not None and hour.window.start >= cursor
                    record = known.get(hour.window.start)
                    whole = not reading.lacking
                    done, given = self._one(hour, record, live=live, again=again, whole=whole)
                    report, loaded = report + done, loaded + given
                if self.context.dry_run:
                    return report
                tally = Tally(
                    counted=reading.records - reading.left_out,
                    read=reading.records,
                    new=loaded.new,
                    already_there=loaded.given - loaded.new,
                )
        return report + Report(ledger=ledger_of(tally, *entries, unit=UNIT).of_partition(self.partition))

    def _tell(self, reading: Reading, span: Window) -> None:
        if number := sum(hour.refused for hour in reading.hours):
            log.warning(
                "%s %s: %d of %d rows cannot be taken and are set aside", self.partition, span, number, reading.records
            )
        if reading.lacking:
            log.warning(
                "%s %s: the file lacks the columns %s", self.partition, span, ", ".join(sorted(reading.lacking))
            )

    def _one(
        self, hour: HourFile, record: Record | None, *, live: bool, again: bool, whole: bool
    ) -> tuple[Report, Loaded]:
        """Land an hour; what became of its rows. `again`: load its rows whatever is recorded. `whole`: no column lacks;
        else what has as many rows already stays as it is.
        """
        had = record if record is not None and was_had(record) else None
        stays = had is not None and not whole and had.rows >= hour.rows > 0
        same = had is not None and (had.digest == hour.digest or stays)
        self.context.progress.advance(done=1)
        if had is not None and same and not again:
            looked_at = replace(had, closed=True, source_cells=max(had.source_cells, had.rows + hour.refused))
            if looked_at != had or live:
                self._commit(Commit((looked_at,), hour.window.end if live else None))
            return Report(), Loaded(min(had.rows, hour.rows))
        if self.context.dry_run:
            return Report(rows=hour.rows, windows=int(not same)), Loaded()
        loaded = Loaded()
        if self.resource.name == EVENTS and hour.rows:
            loaded = load_in_turns(self.places.load, tables(hour, self.service.application_id), past=not live)
        landed = had if had is not None and stays else self._record(hour, keep, closed=had is not None)
        landed = replace(landed, source_cells=landed.rows + hour.refused)
        self._commit(Commit((landed,), hour.window.end if live else None))
        if self.resource.name != EVENTS:
            loaded = _stored(hour, landed, had)
        self.context.progress.advance(rows=loaded.new)
        late = loaded.new if had is not None and not again else 0
        size_bytes = 0 if same else landed.size_bytes
        return Report(rows=loaded.new, bytes=size_bytes, windows=int(not same), late_rows=late), loaded

    def mend(self, hour: HourFile, record: Record | None, how: Keep) -> Report:
        """Land an hour anew and store its object as `how` does. The cursor does not move."""
        if self.context.dry_run:
            return Report(windows=1)
        new = 0
        if self.resource.name == EVENTS and hour.rows:
            new = load_in_turns(self.places.load, tables(hour, self.service.application_id), past=True).new
        landed = self._record(hour, how, closed=record is not None and was_had(record) and record.closed)
        landed = replace(landed, source_cells=landed.rows + hour.refused)
        self._commit(Commit((landed,)))
        return Report(rows=new, bytes=landed.size_bytes, windows=1)

    def _record(self, hour: HourFile, how: Keep, *, closed: bool) -> Record:
        """The object is stored, unless the hour is empty; what is there then."""
        key = hour_key(self.resource.name, self.service.application_id, hour.window)
        record = Record(hour.window, 0, key, "", hour.digest, hour.rows, 0, hour.rows, None, None, closed)
        if not hour.rows:
            return record
        what = RawObject(NAME, key, hour.window, GZIP, hour.rows, hour.digest)
        held = how(self.places.store, hour.file, what)
        return replace(
            record,
            version=held.version,
            digest=held.digest,
            rows=hour.rows if held.rows is None else held.rows,
            size_bytes=held.size_bytes,
            min_at=hour.window.start,
            max_at=hour.window.end,
        )


def _stored(hour: HourFile, landed: Record, had: Record | None) -> Loaded:
    """What became of rows that land only as an object, told by what the object holds."""
    if landed.version and landed.digest != hour.digest:  # it held more, and stays
        return Loaded(min(landed.rows, hour.rows))
    return Loaded(landed.rows, max(0, landed.rows - (had.rows if had else 0)))


def question_for(places: Places, application_id: int, resource: Resource, span: Window) -> Question:
    """What was received in whole hours, without the columns that the service did not know."""
    columns = tuple(column for column in resource.columns if column not in places.refused)
    return received_in(application_id, replace(resource, columns=columns), span, places.zone())


def leave_out(places: Places, resource: Resource, error: Refused) -> None:
    """Do without the column that the service does not know. Raises `error` when that is none to do without."""
    named = set(re.findall(r"\w+", error.text)) & set(resource.columns)
    if len(named) != 1 or named & {*NEEDED, resource.received}:
        raise error
    places.refused.update(named)
    log.warning("AppMetrica does not know the column %s: it is left out from now on", ", ".join(named))


def hour_key(resource: str, application_id: int, window: Window) -> str:
    """`appmetrica/{resource}/date={YYYY-MM-DD}/{application}_{HHMMSS}.csv.gz`."""
    return f"{NAME}/{resource}/date={window.start:%Y-%m-%d}/{application_id}_{window.start:%H%M%S}.csv.gz"


def due_at(now: datetime) -> datetime:
    """Hours that end until then can be asked for."""
    return floor_to(now - DUE_AFTER, HOUR_SECONDS)


def _ceiling(instant: datetime) -> datetime:
    whole = floor_to(instant, HOUR_SECONDS)
    return whole if whole == instant else whole + HOUR


def _span(export: Export) -> Window:
    """The hours of an export that a job asked for."""
    span = question_of(export.request).span
    if span is None:
        raise Permanent(f"export {export.export_id} has no hours", "this is a fault of the program: please report it")
    return span


# Rows that arrive late with an old time of receipt: days are counted again once they were pulled, what lacks lands.
#
# The service may deliver events above its quota later, under the time at which it received them. Invariants: once a
# day each of the last days of receipt is exported with the one column that tells the hour; only hours that have more
# rows than were recorded are pulled again; a day is asked for only while less than BUDGET of the day's calls are
# used.

RECOUNTED = "appmetrica_recount"
"""The pipeline whose records are days of receipt; `digest` is the day on which each was counted last."""
BUDGET = 0.5
DAY = timedelta(days=1)


def recount(run: "ResourceRun", pipeline: str, unit: str) -> Report:
    """Count the days that were not counted today, oldest first, for as long as one run may wait for a file."""
    places, report = run.places, Report()
    began_at = places.clock()
    for day in _days(run, pipeline, began_at):
        waited_seconds = (places.clock() - began_at).total_seconds()
        if waited_seconds > places.polling.timeout_seconds:
            break
        if places.pulls.calls(SERVICE, places.clock()) >= BUDGET * places.daily_calls:
            log.info("%s: half of the day's calls are used, so days are not counted again", run.partition)
            break
        try:
            done, counted = _day(run, day, pipeline, unit)
        except LeaseLost:
            raise
        except (Transient, Permanent) as error:  # tomorrow again: a day that cannot be had must not hold up the others
            done, counted = True, Report(failures=(Failure(f"{run.partition} {day}", error.message, error.hint),))
        report += counted
        if not done:
            break
        today = f"{began_at:%Y-%m-%d}"
        record = Record(day, 0, "", "", today, 0, 0, 0, None, None, closed=True)
        places.checkpoints.commit(RECOUNTED, run.partition, Commit((record,)), run.context.lease)
    return report


def _days(run: "ResourceRun", pipeline: str, now: datetime) -> Iterator[Window]:
    """Days of receipt that were pulled and not counted today; of the first and the last one what was pulled."""
    checkpoints, today = run.places.checkpoints, floor_to(now, DAY_SECONDS)
    first, last = checkpoints.starts(pipeline).get(run.partition), checkpoints.cursors(pipeline).get(run.partition)
    since = today - run.places.recount_days * DAY
    counted = checkpoints.records(RECOUNTED, run.partition, since, today)
    done = {floor_to(record.window.start, DAY_SECONDS) for record in counted if record.digest == f"{now:%Y-%m-%d}"}
    for number in range(run.places.recount_days if first and last else 0):
        at = since + number * DAY
        start, end = max(at, first or at), min(at + DAY, last or at)
        if start < end and at not in done:
            yield Window(start, end)


def _day(run: "ResourceRun", day: Window, pipeline: str, unit: str) -> tuple[bool, Report]:
    """Count a day and pull what is missing; False when the service is still making a file."""
    places, resource = run.places, run.resource
    keys = replace(resource, columns=(resource.received,))
    question = received_in(run.service.application_id, keys, day, places.zone())
    export = keep_question(places.pulls, f"{run.partition}:recount", question, places.clock())
    # Jitter is no secret: any source of numbers serves.
    patience = Patience(run.context.stop, random.random)
    with asking(run.service, places.pulls, places.clock, export, fresh=True) as under_way:
        if under_way.wait(patience, places.polling) is not None:
            return False, Report()
        records = places.checkpoints.records(pipeline, run.partition, day.start, day.end)
        known = {record.window.start: record.source_cells for record in records}
        not_had = {record.window.start for record in records if not was_had(record)}  # left to a backfill
        counts = _counts(under_way.files, resource.received)
        asked_for = (at for at in counts if day.start <= at < day.end and at not in not_had)
        missing = {at: counts[at] - known.get(at, 0) for at in asked_for}
        report = Report()
        for span in _spans(sorted(at for at, number in missing.items() if number > 0)):
            rows = sum(missing[at] for at in missing if span.start <= at < span.end and missing[at] > 0)
            log.info("%s %s: the service has %d rows that were not there before", run.partition, span, rows)
            pulled = run.pull_late(span)
            if pulled.more:
                waiting = ledger_of(Tally(counted=rows, waiting=rows), unit=unit).of_partition(run.partition)
                return False, report + replace(pulled, more=False, ledger=waiting)
            report += pulled
        under_way.finish()
        return True, report


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


def _spans(hours: Sequence[datetime]) -> Iterator[Window]:
    """Hours, oldest first, as windows of neighbours."""
    held: Window | None = None
    for at in hours:
        if held is not None and held.end == at:
            held = Window(held.start, at + HOUR)
            continue
        if held is not None:
            yield held
        held = Window(at, at + HOUR)
    if held is not None:
        yield held
