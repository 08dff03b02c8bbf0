"""The hours of one source in one run: which are due, which are looked at once more, and the objects of their weeks."""

import hashlib
import logging
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import BinaryIO, cast

from app.amplitude.archives import WEEK, Archive, monday, name_of, opened, weeks
from app.amplitude.client import Fetched, HourTooLarge, Patience, Project
from app.amplitude.load_hour import HOUR, NAME, UNIT, BrokenHour, Grounds, Hour, Landed, hour_key, land, set_aside_name
from app.core.errors import AppError, Permanent, Rejected, Transient
from app.core.ledger import Tally, ledger_of
from app.core.pipeline import Checkpoints, Commit, Held, Record
from app.core.retry import RetryPolicy
from app.core.runs import Context, Failure, Report
from app.core.windows import DAY_SECONDS, Window, floor_to
from app.object_store.port import ObjectStore
from app.object_store.set_aside import LINES, SetAsideStore
from app.product_events.mapping import Load
from app.product_events.raw_objects import NOT_HAD, Keep, RawObject, in_place_of, keep, was_had

# The object of a week: a zip with one NDJSON entry, joined from the objects of its hours.
#
# Invariants: it is a function of the records of its hours, so it can be made again at any time and a crash needs
# nothing; it is made anew when a day of it is complete or one of its hours changed, and only then.

PIPELINE = "amplitude_weeks"
HOURS = "amplitude"
ZIP = "application/zip"
DAY_HOURS = 24
MAX_BYTES = 5 << 30


@dataclass(frozen=True, slots=True)
class Weeks:
    """Where weeks are made."""

    store: ObjectStore
    checkpoints: Checkpoints
    spool: Path

    def refresh(self, context: Context, source: str, days: Sequence[date]) -> int:
        """Bring the objects of the weeks of `days` up to date; the bytes that were stored."""
        if context.dry_run:
            return 0
        return sum(self._one(context, source, first) for first in sorted({monday(day) for day in days}))

    def hours(self, source: str, window: Window) -> Sequence[Record]:
        """The hours that the object of a week should hold: those of days that were pulled whole."""
        return _complete(self.checkpoints.records(HOURS, source, window.start, window.end))

    def mend(self, context: Context, source: str, window: Window, version: str) -> int:
        """Make the object of a week anew in place of that version; the bytes that were stored."""
        hours = self.hours(source, window)
        if not hours:
            span = f"--from {window.start:%Y-%m-%d} --to {window.end:%Y-%m-%d}"
            raise Permanent(f"no day of {source} {window} is known", f"python -m app backfill amplitude {span}")
        return self._store(context, source, window, in_place_of(version))

    def _one(self, context: Context, source: str, first: date) -> int:
        window = week_of(first)
        hours = self.hours(source, window)
        held = next(iter(self.checkpoints.records(PIPELINE, source, window.start, window.end)), None)
        if not hours or (held is not None and held.digest == _digest(hours)):
            return 0
        return self._store(context, source, window, keep)

    def _store(self, context: Context, source: str, window: Window, how: Keep) -> int:
        hours = self.hours(source, window)
        what = RawObject(
            PIPELINE, week_key(source, window), window, ZIP, sum(hour.rows for hour in hours), _digest(hours)
        )
        with tempfile.TemporaryFile(dir=self.spool) as file:
            file.writelines(weeks(self._streams(context, hours), [window.start.date()]))
            _check_size(what.key, file.tell())
            held = how(self.store, cast("BinaryIO", file), what)
        record = _record(what, held, hours)
        self.checkpoints.commit(PIPELINE, source, Commit((record,)), context.lease)
        return record.size_bytes

    def _streams(self, context: Context, hours: Sequence[Record]) -> Iterator[tuple[datetime, BinaryIO]]:
        for hour in hours:
            context.stop.check()
            if not hour.version or not was_had(hour):
                continue  # an hour without events has no object, nor has one that was set aside
            with ExitStack() as opened:
                stream = opened.enter_context(self.store.open(hour.key, hour.version))
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
    return f"{HOURS}/{source}/{name_of(window.start.date())}.zip"


def _digest(hours: Sequence[Record]) -> str:
    return hashlib.sha256("".join(f"{hour.window}{hour.digest}" for hour in hours).encode()).hexdigest()


def _record(what: RawObject, held: Held, hours: Sequence[Record]) -> Record:
    return Record(
        window=what.window,
        part=0,
        key=what.key,
        version=held.version,
        digest=what.digest,
        rows=what.rows,
        size_bytes=held.size_bytes,
        source_cells=len(hours),
        min_at=hours[0].window.start,
        max_at=hours[-1].window.end,
        closed=all(hour.closed for hour in hours) and hours[-1].window.end == what.window.end,
    )


def _complete(records: Sequence[Record]) -> Sequence[Record]:
    """Hours of days that were pulled whole. An hour that waits is none; one that was set aside is not waited for."""
    days: dict[datetime, list[Record]] = {}
    for record in records:
        if not was_had(record) and not record.closed:
            continue
        days.setdefault(floor_to(record.window.start, DAY_SECONDS), []).append(record)
    return [record for day in sorted(days) for record in days[day] if len(days[day]) == DAY_HOURS]


def _check_size(key: str, size_bytes: int) -> None:
    if size_bytes > MAX_BYTES:
        raise Permanent(
            f"{key}: {size_bytes} bytes are more than the 5 GiB that one upload may have",
            "take the objects of its hours, which hold all of it; nothing is missing there",
        )


def days_of(span: Window) -> list[date]:
    """The days that a span touches."""
    first, last = span.start.date(), (span.end - timedelta(microseconds=1)).date()
    return [first + timedelta(days=number) for number in range((last - first).days + 1)]


# The hours of one source in one run: which are due, which are looked at once more; each lands before it counts.
#
# Invariants: hours are pulled in order from the cursor on; the cursor moves over an hour that landed, was empty, or
# is noted as one that cannot be had; what lies before it is only added to. An hour is due two and a half hours after
# its end, since the service needs two; asked earlier, it would give a part of it that looks like all.
#
# An hour that cannot be had never holds up the others. While the service gives another hour, the fault is its own: it
# waits, is tried again by each run, and is set aside after a day, or at once when the service says that it is too
# large. When the service gives nothing at all, nothing is noted and the cursor stays.

HOUR_SECONDS = 3600
DUE_AFTER = timedelta(hours=2, minutes=30)
AGAIN_AFTER = timedelta(hours=24)
AGAIN_DAYS = 14
AGAIN_GIVEN_UP_AFTER = timedelta(days=4)
STEP_HOURS = 31 * 24
WAITING = "amplitude_waiting"
"""The pipeline whose records are hours that wait to be tried again: `min_at` is when they failed first."""
KNOWN_FOR = timedelta(days=7)
SET_ASIDE_AFTER = timedelta(days=1)
ABOVE_LIMIT, KEEPS_FAILING = "hour above the service's limit", "hour that keeps failing"
EVER = datetime(1970, 1, 1, tzinfo=UTC), datetime(9999, 1, 1, tzinfo=UTC)
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Places:
    """Where hours and what is known of them are kept."""

    checkpoints: Checkpoints
    store: ObjectStore
    load: Load
    spool: Path
    clock: Callable[[], datetime]
    policy: RetryPolicy
    lookback_days: int
    set_aside: SetAsideStore


@dataclass(frozen=True, slots=True)
class Mode:
    """How hours are pulled. `live`: the cursor moves. `again`: rows are loaded whatever is recorded."""

    live: bool = False
    again: bool = False


LIVE, AGAIN, ONCE_MORE = Mode(live=True), Mode(again=True), Mode()


@dataclass(frozen=True, slots=True)
class SourceRun:
    """One source in one run. Its methods raise what the ports and the service raise; what was committed stays."""

    places: Places
    context: Context
    source: str
    project: Project

    def bring(self) -> Report:
        """Pull what is due, look once more at what is old enough, make weeks anew. `more`: more is due."""
        now = self.places.clock()
        start = self.places.checkpoints.cursors(NAME).get(self.source) or self._begin(now)
        due = due_at(now)
        end = min(due, start + STEP_HOURS * HOUR)
        waiting = [each for each in self.places.checkpoints.records(WAITING, self.source, *EVER) if not each.closed]
        report = self._pull(Window(start, end), LIVE) if start < end else Report()
        report += self._try_again(waiting)
        report += self._look_again(now)
        recent = days_of(Window(min(start, now - timedelta(days=AGAIN_DAYS)), now))
        return report + self._make_weeks(recent) + Report(more=start < end < due and not self.context.dry_run)

    def fill(self, span: Window) -> Report:
        """Pull the hours of `span` up to the cursor again. The cursor does not move. Raises Rejected for no hour."""
        now = self.places.clock()
        cursor = min(self.places.checkpoints.cursors(NAME).get(self.source, due_at(now)), due_at(now))
        start, end = floor_to(span.start, HOUR_SECONDS), min(_ceiling(span.end), cursor)
        if start >= end:
            raise Rejected(
                f"nothing was filled: the job has pulled {self.source} up to {cursor:%Y-%m-%dT%H:%MZ}, not {span} yet",
                "give an earlier span, or run the job, which pulls later hours by itself: python -m app run amplitude",
            )
        report = self._pull(Window(start, end), AGAIN)
        total, hours = report.ledger.total, (end - start) // HOUR
        note = (
            f"{self.source}: {hours} hours asked for again: {total.new} lines are new, {total.already_there} were there"
        )
        left = f"; the job itself pulls those from {cursor:%Y-%m-%dT%H:%MZ} on" if end < span.end else ""
        return report + self._make_weeks(days_of(Window(start, end))) + Report(notes=(note + left,))

    def mend(self, archive: Archive, keep: Keep) -> Report:
        """Land the hour of an archive anew and store its object as `keep` does. The cursor does not move."""
        span = archive.span
        records = self.places.checkpoints.records(NAME, self.source, span.start, span.end)
        (hour,) = self._hours(span, archive, {record.window.start: record for record in records}, AGAIN)
        try:
            landed = land(replace(self._grounds, keep=keep), archive, hour)
        except BrokenHour as error:
            raise error.fault from error
        return replace(self._commit(hour, landed, AGAIN), windows=1) + self._make_weeks(days_of(span))

    def _begin(self, now: datetime) -> datetime:
        """The Monday of the week in which the lookback begins, so that every object of a week is a whole one."""
        day = floor_to(now - timedelta(days=self.places.lookback_days), DAY_SECONDS)
        start = day - (day.date() - monday(day.date()))
        if not self.context.dry_run:
            commit = Commit(cursor_at=start)
            self.places.checkpoints.commit(NAME, self.source, commit, self.context.lease)
        return start

    def _look_again(self, now: datetime) -> Report:
        """Each day once more, a day after its last hour was due: what the service added since is landed."""
        until = settled_at(now)
        since = until - timedelta(days=AGAIN_DAYS)
        days: dict[datetime, list[Record]] = {}
        for record in self.places.checkpoints.records(NAME, self.source, since, until):
            if not record.closed and was_had(record):
                days.setdefault(floor_to(record.window.start, DAY_SECONDS), []).append(record)
        report = Report()
        for hours in days.values():
            report += self._pull(Window(hours[0].window.start, hours[-1].window.end), ONCE_MORE)
        return report

    def _try_again(self, waiting: Sequence[Record]) -> Report:
        """Once more, hours that an earlier run could not have."""
        report = Report()
        for record in waiting:
            window = record.window
            if any(map(was_had, self.places.checkpoints.records(NAME, self.source, window.start, window.end))):
                self._save(WAITING, replace(record, closed=True))  # a kill came between its two records
            else:
                report += self._pull(window, ONCE_MORE)
        return report

    def _pull(self, span: Window, mode: Mode) -> Report:
        """Fetch the hours of `span` and land each."""
        records = self.places.checkpoints.records(NAME, self.source, span.start, span.end)
        known = {record.window.start: record for record in records}
        self.context.progress.advance(total=(span.end - span.start) // HOUR)
        report = Report()
        for fetched in self.project.fetch_each(span, self._patience):
            with closing(fetched):
                report += self._land_all(fetched, known, mode)
        return report

    @property
    def _patience(self) -> Patience:
        # Jitter is no secret: any source of numbers serves.
        return Patience(self.places.policy, self.context.stop, random.random)

    @property
    def _grounds(self) -> Grounds:
        places, context = self.places, self.context
        return Grounds(
            places.store, places.load, places.spool, context.stop.check, places.set_aside, dry_run=context.dry_run
        )

    def _land_all(self, fetched: Fetched, known: Mapping[datetime, Record], mode: Mode) -> Report:
        stop, grounds, span = self.context.stop, self._grounds, fetched.span
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
                stop.check()
                try:
                    landed = land(grounds, archive, hour)
                except BrokenHour as error:
                    alone = fetched.file if span == hour.window else None
                    report += self._not_had(hour.window, error.fault, hour.record, mode, came=True, evidence=alone)
                else:
                    report += self._commit(hour, landed, mode)
        return report

    def _unreadable(
        self, fetched: Fetched, error: Transient | Permanent, known: Mapping[datetime, Record], mode: Mode
    ) -> Report:
        """An archive that is not one: the hours by themselves, so that only those that cannot be read are without."""
        span = fetched.span
        if span.end - span.start <= HOUR:
            return self._not_had(span, error, known.get(span.start), mode, evidence=fetched.file)
        report = Report()
        for start in _hours_of(span):
            for alone in self.project.fetch_each(Window(start, start + HOUR), self._patience):
                with closing(alone):
                    report += self._land_all(alone, known, mode)
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
        self.context.progress.advance(done=1)
        failed = Report(failures=(Failure(f"{self.source} {window}", fault.message, fault.hint),))
        if self.context.dry_run:
            return failed
        if record is not None and was_had(record):
            return failed if self._may_be_looked_at(record) else Report()
        return self._noted(window, fault, mode, failed, evidence)

    def _service_answers(self, window: Window) -> bool:
        """Whether the service gives another hour than this: the one that it gave last, or the newest."""
        due, start = due_at(self.places.clock()), window.start
        records = self.places.checkpoints.records(NAME, self.source, start - KNOWN_FOR, start)
        before = next((each.window for each in reversed(records) if was_had(each)), Window(start - HOUR, start))
        return any(
            self.project.answers(other, self._patience)
            for other in (before, Window(due - HOUR, due))
            if other != window
        )

    def _may_be_looked_at(self, record: Record) -> bool:
        """Whether an hour that landed is worth another second look; else it is closed as it is."""
        if record.closed or self.places.clock() - record.window.end < AGAIN_GIVEN_UP_AFTER:
            return True
        log.warning("%s: the service does not give this hour again; it stays as it landed", record.key)
        self._save(NAME, replace(record, closed=True))
        return False

    def _noted(self, window: Window, fault: AppError, mode: Mode, failed: Report, evidence: BinaryIO | None) -> Report:
        """Note that an hour waits, or after a day that it is set aside. One that is set aside counts as one line."""
        now = self.places.clock()
        noted = next(iter(self.places.checkpoints.records(WAITING, self.source, window.start, window.end)), None)
        key = hour_key(self.source, window)
        wait = Record(window, 0, key, NOT_HAD, "", 0, 0, 0, now, None, closed=False)
        since = noted.min_at if noted and noted.min_at and (mode.again or not noted.closed) else now
        gives_up = isinstance(fault, HourTooLarge) or now - since >= SET_ASIDE_AFTER
        report = failed if mode.again or not gives_up else Report()
        one = Tally(counted=1, waiting=0 if gives_up else 1)
        if gives_up:
            if evidence is not None:
                evidence.seek(0)
            kept = self.places.set_aside.keep(
                set_aside_name(self.source, window),
                evidence or str(fault).encode(),
                content_type=ZIP if evidence else LINES,
                reason=ABOVE_LIMIT if isinstance(fault, HourTooLarge) else KEEPS_FAILING,
                number=1,
                sample=f"{self.source}: {fault.message}",
            )
            ledger = ledger_of(one, kept.entry, unit=UNIT)
            log.warning("%s %s is set aside: %s", self.source, window, fault)
        else:
            ledger = ledger_of(one, unit=UNIT)
        self._save(WAITING, replace(wait, min_at=since, closed=gives_up))
        self._save(NAME, replace(wait, min_at=None, closed=gives_up), window.end if mode.live else None)
        return report + Report(ledger=ledger.of_partition(self.source))

    def _save(self, pipeline: str, record: Record, cursor_at: datetime | None = None) -> None:
        if not self.context.dry_run:
            self.places.checkpoints.commit(pipeline, self.source, Commit((record,), cursor_at), self.context.lease)

    def _hours(self, span: Window, archive: Archive | None, known: Mapping[datetime, Record], mode: Mode) -> list[Hour]:
        members = archive.hours() if archive is not None else {}
        settled = settled_at(self.places.clock())
        return [
            Hour(
                source=self.source,
                window=Window(start, start + HOUR),
                members=members.get(start, ()),
                record=known.get(start),
                past=not mode.live,
                again=mode.again,
                final=start < settled,
            )
            for start in _hours_of(span)
        ]

    def _commit(self, hour: Hour, landed: Landed, mode: Mode) -> Report:
        record, new = landed.record, landed.new
        self.context.progress.advance(done=1, rows=new)
        changed = hour.record is None or record.version != hour.record.version
        if self.context.dry_run:
            return Report(rows=record.rows, bytes=record.size_bytes, windows=1) if changed else Report()
        if changed or record != hour.record or mode.live:
            self._save(NAME, record, hour.window.end if mode.live else None)
        if hour.record is not None and not was_had(hour.record):
            self._save(WAITING, replace(hour.record, closed=True))
        return Report(
            rows=new,
            bytes=record.size_bytes if changed else 0,
            windows=int(changed),
            late_rows=0 if mode.live or mode.again else new,
            ledger=landed.ledger.of_partition(self.source),
        )

    def _make_weeks(self, days: "list[date]") -> Report:
        weeks = Weeks(self.places.store, self.places.checkpoints, self.places.spool)
        return Report(bytes=weeks.refresh(self.context, self.source, days))


def _hours_of(span: Window) -> Sequence[datetime]:
    return [span.start + number * HOUR for number in range((span.end - span.start) // HOUR)]


def due_at(now: datetime) -> datetime:
    """Hours that end until then can be asked for."""
    return floor_to(now - DUE_AFTER, HOUR_SECONDS)


def settled_at(now: datetime) -> datetime:
    """Days that end until then are looked at for the last time, be it for the first."""
    return floor_to(now - DUE_AFTER - AGAIN_AFTER, DAY_SECONDS)


def _ceiling(instant: datetime) -> datetime:
    whole = floor_to(instant, HOUR_SECONDS)
    return whole if whole == instant else whole + HOUR
