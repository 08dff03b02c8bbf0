"""The hours of one resource in one run: asked for together, landed one by one, in order.

Order within an hour: rows, object, record; a crash before the record repeats the hour, whose rows and object are told
by their content. Invariants: each question also covers the hour before the cursor, so what the service received late is
found; the question is kept before it is asked, and the next run goes on with it when this one ends before the file is
there.
"""

import logging
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

from app.appmetrica.client import SERVICE, Refused, Service
from app.appmetrica.exports import Asking, Patience, Polling, asking, keep_question
from app.appmetrica.questions import Question, Resource, question_of, received_in
from app.appmetrica.records import HOUR, HOUR_SECONDS, NEEDED, HourFile, by_hour, tables
from app.core.errors import Permanent
from app.core.ports import Checkpoints, Commit, Record
from app.core.runs import Context, Report
from app.core.window import Window, floor_to
from app.stores.objects import ObjectStore
from app.stores.product_loading import Load, load_in_turns
from app.stores.pulls import Export, SqlPulls
from app.stores.raw_objects import Keep, RawObject, keep

NAME = "appmetrica"
EVENTS = "events"
GZIP = "application/gzip"
DUE_AFTER = timedelta(minutes=15)
STEP = timedelta(hours=24)
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
            return Report()
        export = self._under_way(cursor)
        if export is None:
            span = Window(cursor - HOUR, min(due, cursor + STEP))
            export = self._kept(self.partition, span, now)
        report = self._land(export, cursor)
        span_end = _span(export).end
        return report + Report(more=span_end < due and not self.context.dry_run)

    def fill(self, span: Window) -> Report:
        """Pull the hours of `span` up to the cursor again. The cursor does not move."""
        now = self.places.clock()
        cursor = self.places.checkpoints.cursors(NAME).get(self.partition, due_at(now))
        at, end = floor_to(span.start, HOUR_SECONDS), min(_ceiling(span.end), cursor, due_at(now))
        report = Report()
        while at < end and not report.more:
            hours = Window(at, min(at + STEP, end))
            owner = f"{self.partition}:backfill"
            report += self._land(self._kept(owner, hours, now), None)
            at = hours.end
        return report

    def _begin(self, now: datetime) -> datetime:
        start = floor_to(now - timedelta(days=self.places.lookback_days), HOUR_SECONDS)
        self._commit(Commit(cursor_at=start))
        return start

    def _commit(self, commit: Commit) -> None:
        if not self.context.dry_run:
            self.places.checkpoints.commit(NAME, self.partition, commit, self.context.lease)

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

    def _land(self, export: Export, cursor: datetime | None) -> Report:
        """Wait for the file and land its hours; those from the cursor on move it. `more`: it is not there yet."""
        places = self.places
        # Jitter is no secret: any source of numbers serves.
        patience = Patience(self.context.stop, random.random)
        try:
            with asking(self.service, places.pulls, places.clock, export, fresh=True) as under_way:
                told = under_way.wait(patience, places.polling)
                if told is not None:
                    log.info("%s: no file yet, it is asked for again: %s", self.partition, told.text)
                    return Report(more=not self.context.dry_run, notes=(f"{self.partition}: {told.text}",))
                report = self._land_all(under_way, cursor)
                if not self.context.dry_run:
                    under_way.finish()
                return report
        except Refused as error:
            places.pulls.save(replace(export, done=True))
            leave_out(self.places, self.resource, error)
            return Report(more=not self.context.dry_run)

    def _land_all(self, under_way: Asking, cursor: datetime | None) -> Report:
        question = under_way.question
        span = _span(under_way.export)
        records = self.places.checkpoints.records(NAME, self.partition, span.start, span.end)
        known = {record.window.start: record for record in records}
        self.context.progress.advance(total=(span.end - span.start) // HOUR)
        report = Report()
        received = self.resource.received
        with by_hour(under_way.files, question.columns, received, span, self.places.spool) as hours:
            for hour in hours:
                self.context.stop.check()
                live = cursor is not None and hour.window.start >= cursor
                report += self._one(hour, known.get(hour.window.start), live=live, again=cursor is None)
        return report

    def _one(self, hour: HourFile, record: Record | None, *, live: bool, again: bool) -> Report:
        """Land an hour. `again`: load its rows whatever is recorded."""
        same = record is not None and record.digest == hour.digest
        self.context.progress.advance(done=1)
        if record is not None and same and not again:
            if not record.closed:
                self._commit(Commit((replace(record, closed=True),)))
            return Report()
        if self.context.dry_run:
            return Report(rows=hour.rows, windows=int(not same))
        new = hour.rows if not same else 0
        if self.resource.name == EVENTS and hour.rows:
            new = load_in_turns(self.places.load, tables(hour, self.service.application_id), past=not live).new
        self.context.progress.advance(rows=new)
        landed = self._record(hour, keep, closed=record is not None)
        self._commit(Commit((landed,), hour.window.end if live else None))
        late = new if record is not None and not again else 0
        return Report(rows=new, bytes=0 if same else landed.size_bytes, windows=int(not same), late_rows=late)

    def mend(self, hour: HourFile, record: Record | None, how: Keep) -> Report:
        """Land an hour anew and store its object as `how` does. The cursor does not move."""
        if self.context.dry_run:
            return Report(windows=1)
        new = 0
        if self.resource.name == EVENTS and hour.rows:
            new = load_in_turns(self.places.load, tables(hour, self.service.application_id), past=True).new
        landed = self._record(hour, how, closed=record is not None and record.closed)
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
