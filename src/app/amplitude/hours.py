"""The hours of one source in one run: which are due, which are looked at once more, and the objects of their weeks."""

import hashlib
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta
from enum import Enum
from itertools import groupby
from typing import BinaryIO, cast

from app.amplitude.archives import WEEK, Archive, monday, name_of, opened, weeks
from app.amplitude.client import FetchedArchive, HourTooLarge, Project
from app.amplitude.load_hour import BrokenHour, SourceHour, hour_key, load_hour, set_aside_name
from app.core.errors import AppError, Permanent, Transient
from app.core.pipeline import Record
from app.core.runs import Failure, Ledger, Report, Tally, ledger_of
from app.core.windows import DAY_SECONDS, Window, floor_to
from app.product_events.pull import HOUR, SET_ASIDE_AFTER, PartitionRun, PullContext, hours_of, not_had
from app.product_events.raw_objects import PutPolicy, RawObject, in_place_of, keep, was_had

# The object of a week: a zip with one NDJSON entry, joined from the objects of its hours.
#
# Invariant: it is a function of the records of its hours, so a crash needs nothing: it is re-created when a day of it
# is complete or one of its hours changed, and only then.

WEEKS = "amplitude_weeks"
DAY_HOURS = 24
MAX_BYTES = 5 << 30


def refresh_weeks(run: PartitionRun, days: Iterable[date]) -> Report:
    """Bring the objects of the weeks of `days` up to date; the bytes that were stored."""
    size_bytes = 0
    for window in sorted({week_of(day) for day in days} if not run.context.dry_run else ()):
        hours = hours_of_week(run.pull, run.name, window)
        held = run.records(window, WEEKS).get(window.start)
        if hours and (held is None or held.digest != _digest(hours)):
            size_bytes += _store_week(run, window, hours, keep)
    return Report(bytes=size_bytes)


def hours_of_week(pull: PullContext, source: str, window: Window) -> Sequence[Record]:
    """The hours that the object of a week should hold: those of days that were pulled whole.

    A day with an hour that waits is not whole; one that was set aside is not waited for.
    """
    records = pull.checkpoints.records(pull.name, source, window.start, window.end)
    days = _by_day(record for record in records if was_had(record) or record.closed)
    return [record for day in days if len(day) == DAY_HOURS for record in day]


def _by_day(records: Iterable[Record]) -> Sequence[Sequence[Record]]:
    """Records of hours, oldest first, day by day."""
    return [list(day) for _, day in groupby(records, lambda record: record.window.start.date())]


def mend_week(run: PartitionRun, window: Window, version: str) -> int:
    """Re-create the object of a week in place of that version; the bytes that were stored."""
    hours = hours_of_week(run.pull, run.name, window)
    if not hours:
        span = f"--from {window.start:%Y-%m-%d} --to {window.end:%Y-%m-%d}"
        raise Permanent(f"no day of {run.name} {window} is known", f"python -m app backfill amplitude {span}")
    return _store_week(run, window, hours, in_place_of(version))


def _store_week(run: PartitionRun, window: Window, hours: Sequence[Record], put: PutPolicy) -> int:
    what = RawObject(
        pipeline=WEEKS,
        key=week_key(run.name, window),
        window=window,
        content_type="application/zip",
        rows=sum(hour.rows for hour in hours),
        digest=_digest(hours),
    )
    with tempfile.TemporaryFile(dir=run.pull.spool) as file:
        file.writelines(weeks(_streams(run, hours), [window.start.date()]))
        if file.tell() > MAX_BYTES:
            raise Permanent(
                f"{what.key}: {file.tell()} bytes are more than the 5 GiB that one upload may have",
                "take the objects of its hours, which hold all of it; nothing is missing there",
            )
        held = put(run.pull.store, cast("BinaryIO", file), what)
    record = Record(
        window=window,
        part=0,
        key=what.key,
        version=held.version,
        digest=what.digest,
        rows=what.rows,
        size_bytes=held.size_bytes,
        source_cells=len(hours),
        min_at=hours[0].window.start,
        max_at=hours[-1].window.end,
        closed=all(hour.closed for hour in hours) and hours[-1].window.end == window.end,
    )
    run.commit(record, pipeline=WEEKS)
    return record.size_bytes


def _streams(run: PartitionRun, hours: Sequence[Record]) -> Iterator[tuple[datetime, BinaryIO]]:
    for hour in hours:
        run.context.stop.check()
        if not hour.version or not was_had(hour):
            continue  # an hour without events has no object, nor has one that was set aside
        with run.pull.store.open(hour.key, hour.version) as stream:
            if stream is None:
                raise Permanent(
                    f"{hour.key} is gone, and with it the week cannot be made again",
                    f"python -m app verify amplitude --from {hour.window.start:%Y-%m-%dT%H} "
                    f"--to {hour.window.end:%Y-%m-%dT%H} --heal",
                )
            yield hour.window.start, stream


def week_of(day: date) -> Window:
    """The ISO week of a day."""
    start = datetime.combine(monday(day), time(), UTC)
    return Window(start, start + WEEK)


def week_key(source: str, window: Window) -> str:
    """`amplitude/{source}/{year}_week_{week}.zip`."""
    return f"amplitude/{source}/{name_of(window.start.date())}.zip"


def _digest(hours: Sequence[Record]) -> str:
    return hashlib.sha256("".join(f"{hour.window}{hour.digest}" for hour in hours).encode()).hexdigest()


def days_of(span: Window) -> list[date]:
    """The days that a span touches."""
    first, last = span.start.date(), (span.end - timedelta(microseconds=1)).date()
    return [first + timedelta(days=number) for number in range((last - first).days + 1)]


# The hours of a source in one run; each is loaded before it is recorded.
#
# Invariants: hours are pulled in order from the cursor on; the cursor moves over an hour that was loaded, was empty, or
# is recorded as not had; what lies before it is only added to. An hour is due two and a half hours after its end, since
# the service needs two; asked earlier, it would answer with a part of it that looks complete.
#
# An hour that cannot be had never holds up the others. While the service gives another hour, the fault is its own: it
# waits, is retried by each run, and is set aside after a day, or at once when the service says that it is too large.
# When the service gives nothing at all, nothing is recorded and the cursor stays.

DUE_AFTER = timedelta(hours=2, minutes=30)
AGAIN_AFTER = timedelta(hours=24)
AGAIN_DAYS = 14
AGAIN_GIVEN_UP_AFTER = timedelta(days=4)
STEP_HOURS = 31 * 24
WAITING = "amplitude_waiting"
"""The pipeline whose records are hours that wait to be retried: `min_at` is when they failed first."""
KNOWN_FOR = timedelta(days=7)
EVER = Window(datetime(1970, 1, 1, tzinfo=UTC), datetime(9999, 1, 1, tzinfo=UTC))
log = logging.getLogger(__name__)


class Mode(Enum):
    """How hours are pulled. LIVE: the cursor moves. AGAIN: rows are loaded whatever is recorded."""

    LIVE = "live"
    AGAIN = "again"
    ONCE_MORE = "once more"


@dataclass(frozen=True, slots=True)
class SourceRun:
    """One source in one run. Its methods raise what the ports and the service raise; what was committed stays."""

    run: PartitionRun
    project: Project

    def pull_due(self) -> Report:
        """Pull what is due, look once more at what is old enough, re-create weeks. `more`: more is due."""
        pull, context = self.run.pull, self.run.context
        now, due = pull.clock(), pull.due_at
        start = self.run.cursor_at or self._begin(now)
        end = min(due, start + STEP_HOURS * HOUR)
        waiting = [record for record in self.run.records(EVER, WAITING).values() if not record.closed]
        report = self._pull(Window(start, end), Mode.LIVE) if start < end else Report()
        report += self._retry(waiting)
        report += self._look_again(now)
        report += refresh_weeks(self.run, days_of(Window(min(start, now - timedelta(days=AGAIN_DAYS)), now)))
        return report + Report(more=start < end < due and not context.dry_run)

    def fill(self, span: Window) -> Report:
        """Pull the hours of `span` up to the cursor again. The cursor does not move. Raises Rejected for no hour."""

        def pull_again(hours: Window) -> Report:
            return self._pull(hours, Mode.AGAIN) + refresh_weeks(self.run, days_of(hours))

        return self.run.fill(span, pull_again)

    def mend(self, archive: Archive, put: PutPolicy) -> Report:
        """Load the hour of an archive again and store its object as `put` does. The cursor does not move."""
        span = archive.span
        (hour,) = self._hours(span, archive, self.run.records(span), Mode.AGAIN)
        try:
            record, new, ledger = load_hour(self.run, archive, hour, put=put)
        except BrokenHour as error:
            raise error.fault from error
        loaded = self._commit(hour, record, new, ledger, Mode.AGAIN)
        return replace(loaded, windows=1) + refresh_weeks(self.run, days_of(span))

    def _begin(self, now: datetime) -> datetime:
        """The Monday of the week in which the lookback begins, so that every object of a week is a whole one."""
        start = week_of((now - timedelta(days=self.run.pull.lookback_days)).date()).start
        self.run.commit(cursor_at=start)
        return start

    def _look_again(self, now: datetime) -> Report:
        """Each day once more, a day after its last hour was due: what the service added since is loaded."""
        until = settled_at(now)
        records = self.run.records(Window(until - timedelta(days=AGAIN_DAYS), until)).values()
        report = Report()
        for hours in _by_day(record for record in records if not record.closed and was_had(record)):
            report += self._pull(Window(hours[0].window.start, hours[-1].window.end), Mode.ONCE_MORE)
        return report

    def _retry(self, waiting: Sequence[Record]) -> Report:
        """Once more, hours that an earlier run could not have."""
        report = Report()
        for record in waiting:
            if any(map(was_had, self.run.records(record.window).values())):
                self.run.commit(replace(record, closed=True), pipeline=WAITING)  # a kill came between its two records
            else:
                report += self._pull(record.window, Mode.ONCE_MORE)
        return report

    def _pull(self, span: Window, mode: Mode) -> Report:
        """Fetch the hours of `span` and load each."""
        known = self.run.records(span)
        self.run.context.progress.advance(total=(span.end - span.start) // HOUR)
        return self._load_each(self.project.fetch_each(span, self.run.context.stop), known, mode)

    def _load_each(self, pieces: Iterator[FetchedArchive], known: Mapping[datetime, Record], mode: Mode) -> Report:
        report = Report()
        for fetched in pieces:
            with closing(fetched):
                report += self._load_all(fetched, known, mode)
        return report

    def _load_all(self, fetched: FetchedArchive, known: Mapping[datetime, Record], mode: Mode) -> Report:
        context, span = self.run.context, fetched.span
        if fetched.fault is not None:
            return self._not_had(span, fetched.fault, known.get(span.start), mode)
        report = Report()
        with ExitStack() as held:
            try:
                archive = held.enter_context(opened(fetched.file, span)) if fetched.file else None
                hours = self._hours(span, archive, known, mode)
            except (Transient, Permanent) as error:
                return self._unreadable(fetched, error, known, mode)
            for hour in hours:
                context.stop.check()
                try:
                    record, new, ledger = load_hour(self.run, archive, hour)
                except BrokenHour as error:
                    alone = fetched.file if span == hour.window else None
                    report += self._not_had(hour.window, error.fault, hour.record, mode, came=True, evidence=alone)
                else:
                    report += self._commit(hour, record, new, ledger, mode)
        return report

    def _unreadable(
        self, fetched: FetchedArchive, error: Transient | Permanent, known: Mapping[datetime, Record], mode: Mode
    ) -> Report:
        """An archive that is not one: its hours one by one, so that only those that cannot be read are lacking."""
        span = fetched.span
        if span.end - span.start <= HOUR:
            return self._not_had(span, error, known.get(span.start), mode, evidence=fetched.file)
        report = Report()
        for start in hours_of(span):
            alone = self.project.fetch_each(Window(start, start + HOUR), self.run.context.stop)
            report += self._load_each(alone, known, mode)
        return report

    def _not_had(
        self,
        window: Window,
        fault: AppError,
        record: Record | None,
        mode: Mode,
        *,
        came: bool = False,
        evidence: BinaryIO | None = None,
    ) -> Report:
        """An hour that cannot be had. Raises `fault` when that is not its own: the service gives no other hour either.

        `came`: the service gave it, in an archive that holds others as well. `evidence`: an archive of this hour alone.
        """
        if not came and not isinstance(fault, HourTooLarge) and not self._service_answers(window):
            raise fault
        self.run.context.progress.advance(done=1)
        failed = Report(failures=(Failure(f"{self.run.name} {window}", fault.message, fault.hint),))
        if self.run.context.dry_run:
            return failed
        if record is not None and was_had(record):
            return failed if self._may_be_looked_at(record) else Report()
        return self._record_not_had(window, fault, mode, failed, evidence)

    def _service_answers(self, window: Window) -> bool:
        """Whether the service gives another hour than this: the one that it gave last, or the newest."""
        start, due = window.start, self.run.pull.due_at
        records = self.run.records(Window(start - KNOWN_FOR, start)).values()
        before = next((each.window for each in reversed(list(records)) if was_had(each)), Window(start - HOUR, start))
        others = (before, Window(due - HOUR, due))
        return any(self.project.answers(other, self.run.context.stop) for other in others if other != window)

    def _may_be_looked_at(self, record: Record) -> bool:
        """Whether an hour that was loaded is worth another second look; else it is closed as it is."""
        if record.closed or self.run.pull.clock() - record.window.end < AGAIN_GIVEN_UP_AFTER:
            return True
        log.warning("%s: the service does not give this hour again; it stays as it is", record.key)
        self.run.commit(replace(record, closed=True))
        return False

    def _record_not_had(
        self, window: Window, fault: AppError, mode: Mode, failed: Report, evidence: BinaryIO | None
    ) -> Report:
        """Record that an hour waits, or after a day that it is set aside."""
        run, now = self.run, self.run.pull.clock()
        noted = run.records(window, WAITING).get(window.start)
        since = noted.min_at if noted and noted.min_at and (mode is Mode.AGAIN or not noted.closed) else now
        is_too_large = isinstance(fault, HourTooLarge)
        gives_up = is_too_large or now - since >= SET_ASIDE_AFTER
        if gives_up:
            place = set_aside_name(run.name, window)
            ledger = run.set_hour_aside(window, fault, place=place, is_too_large=is_too_large, archive=evidence)
        else:
            ledger = ledger_of(Tally(counted=1, waiting=1), unit=run.pull.unit).of_partition(run.name)
        key = hour_key(run.name, window)
        run.commit(not_had(window, key, closed=gives_up, since_at=since), pipeline=WAITING)
        run.commit(not_had(window, key, closed=gives_up), cursor_at=window.end if mode is Mode.LIVE else None)
        return (failed if mode is Mode.AGAIN or not gives_up else Report()) + Report(ledger=ledger)

    def _hours(
        self, span: Window, archive: Archive | None, known: Mapping[datetime, Record], mode: Mode
    ) -> list[SourceHour]:
        members = archive.hours() if archive is not None else {}
        settled = settled_at(self.run.pull.clock())
        return [
            SourceHour(
                source=self.run.name,
                window=Window(start, start + HOUR),
                members=members.get(start, ()),
                record=known.get(start),
                past=mode is not Mode.LIVE,
                again=mode is Mode.AGAIN,
                final=start < settled,
            )
            for start in hours_of(span)
        ]

    def _commit(self, hour: SourceHour, record: Record, new: int, ledger: Ledger, mode: Mode) -> Report:
        self.run.context.progress.advance(done=1, rows=new)
        changed = hour.record is None or record.version != hour.record.version
        if self.run.context.dry_run:
            return Report(rows=record.rows, bytes=record.size_bytes, windows=1) if changed else Report()
        is_live = mode is Mode.LIVE
        if changed or record != hour.record or is_live:
            self.run.commit(record, cursor_at=hour.window.end if is_live else None)
        if hour.record is not None and not was_had(hour.record):
            self.run.commit(replace(hour.record, closed=True), pipeline=WAITING)
        return Report(
            rows=new,
            bytes=record.size_bytes if changed else 0,
            windows=int(changed),
            late_rows=new if mode is Mode.ONCE_MORE else 0,
            ledger=ledger.of_partition(self.run.name),
        )


def settled_at(now: datetime) -> datetime:
    """Days that end until then are looked at for the last time, be it for the first."""
    return floor_to(now - DUE_AFTER - AGAIN_AFTER, DAY_SECONDS)
