"""The hours of one source in one run: which are due, which are looked at once more, and the objects of their weeks."""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, time, timedelta
from enum import Enum
from itertools import chain, groupby
from typing import TYPE_CHECKING, BinaryIO

from app.amplitude.archives import (
    WEEK,
    Archive,
    Member,
    inflated,
    joined,
    joined_lines,
    monday,
    name_of,
    opened,
    weeks,
)
from app.amplitude.client import FetchedArchive, HourTooLarge, Project
from app.core.errors import AppError, Permanent, Rejected, Transient
from app.core.files import temporary_file
from app.core.ledger import Ledger, Tally, ledger_of
from app.core.pipeline import Record
from app.core.runs import Failure, Report
from app.core.windows import DAY_SECONDS, HOUR_SECONDS, Window, floor_to, windows_between
from app.product_events.mapping import Loaded, Tables, events_in, load_in_turns
from app.product_events.pull import (
    HOUR,
    NOT_HAD,
    SET_ASIDE_AFTER,
    PartitionRun,
    PullContext,
    RefusedLines,
    record_of_nothing,
    store_rows,
    was_had,
)

if TYPE_CHECKING:
    from app.amplitude.events import Block, HourStats

# One hour of a source: its events into the warehouse, its NDJSON into an object, and then the record of both.
#
# Order: rows, object, what was set aside, record. A crash before the record repeats the hour; all of it is recognized
# by its content, so nothing is doubled. Invariants: memory is bounded, whatever the hour holds; the object holds every
# line as it came, also those that are not events; a fault of the hour is told from one of the store or the warehouse.

NAME = "amplitude"
UNIT = "lines"
GZIP_HEAD = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"
log = logging.getLogger(__name__)


class Mode(Enum):
    """How hours are pulled. LIVE: the cursor moves. AGAIN: rows are loaded whatever is recorded."""

    LIVE = "live"
    AGAIN = "again"
    ONCE_MORE = "once more"


@dataclass(frozen=True, slots=True)
class SourceHour:
    """One hour of an archive, and what is known of it from before. `final`: this is the last look."""

    key: str
    window: Window
    members: Sequence[Member]
    record: Record | None
    mode: Mode
    final: bool


def hour_key(source: str, window: Window) -> str:
    """`amplitude/{source}/hours/{date}/{HH}.ndjson.gz`."""
    return f"{NAME}/{source}/hours/{window.start:%Y-%m-%d}/{window.start:%H}.ndjson.gz"


def set_aside_name(source: str, window: Window) -> tuple[str, ...]:
    """What was set aside of an hour lies below `amplitude/_set_aside/{source}/{date}/{HH}`."""
    return source, f"{window.start:%Y-%m-%d}", f"{window.start:%H}"


class BrokenHour(Exception):
    """What the service gave of an hour cannot be read, as `fault` says. Its rows were not loaded."""

    def __init__(self, fault: AppError) -> None:
        super().__init__(str(fault))
        self.fault = fault


def load_hour(
    run: PartitionRun, archive: Archive | None, hour: SourceHour, *, over: str | None = None
) -> tuple[Record, int, Ledger]:
    """Load the hour: the record to commit, how many events are new, and the ledger of its lines.

    `over`: see `store_rows`. Raises BrokenHour when it cannot be read, and what store and warehouse raise.
    """
    if archive is None or not hour.members:
        return _empty(hour), 0, Ledger()
    with temporary_file(run.pull.spool) as file, closing(RefusedLines(run.pull.spool)) as refused:
        lines = _Lines(run, hour, file, refused)
        with _broken():
            _gather(archive, hour.members, lines.file)
        known = hour.record if was_had(hour.record) and hour.mode is not Mode.AGAIN else None
        if known and known.digest:
            seen = lines.read()
            if seen.digest == known.digest:
                record = replace(known, closed=known.closed or hour.final, source_cells=known.rows + seen.fault_rows)
                return record, 0, lines.ledger(Loaded(known.rows))
        seen, loaded = lines.load()
        if seen.fault_rows:
            where = "lines are not events; they are in the object and in _set_aside, not in the warehouse"
            log.warning("%s: %d %s: %s", hour.key, seen.fault_rows, where, "; ".join(seen.faults))
        if run.context.dry_run:
            empty = record_of_nothing(hour.window, hour.key, closed=hour.final)
            return replace(empty, rows=seen.rows, size_bytes=lines.file.seek(0, 2)), 0, Ledger()
        record = store_rows(
            run.pull.store,
            file,
            pipeline=NAME,
            key=hour.key,
            window=hour.window,
            rows=seen.rows,
            digest=seen.digest,
            closed=hour.final,
            refused=seen.fault_rows,
            over=over,
        )
        return record, loaded.new, lines.ledger(loaded)


def _empty(hour: SourceHour) -> Record:
    """An hour without events; one that had some keeps them."""
    if hour.record is not None and hour.record.rows:
        log.warning("%s: the service has no events of this hour any more; those that were loaded stay", hour.key)
        return replace(hour.record, closed=hour.record.closed or hour.final)
    return record_of_nothing(hour.window, hour.key, closed=hour.final)


@contextmanager
def _broken() -> Iterator[None]:
    try:
        yield
    except (Transient, Permanent) as error:
        raise BrokenHour(error) from error


def _gather(archive: Archive, members: Sequence[Member], file: BinaryIO) -> None:
    """The members as one gzip file, the same bytes for the same members."""
    joining = joined()
    file.write(GZIP_HEAD)
    file.writelines(joined_lines(joining, archive.streams(members)))
    file.write(joining.crc.to_bytes(4, "little") + (joining.size_bytes & 0xFFFFFFFF).to_bytes(4, "little"))


@dataclass(slots=True)
class _Lines:
    """The lines of an hour in a file. Each pass counts them again, and sets aside again what is not an event."""

    run: PartitionRun
    hour: SourceHour
    file: BinaryIO
    refused: RefusedLines
    counted: int = 0

    def read(self) -> "HourStats":
        """What the hour holds, without loading it."""
        seen = self._begin()
        for _ in self._tables(seen, careful=False):
            pass
        return seen

    def load(self) -> "tuple[HourStats, Loaded]":
        """Load all; where the warehouse refuses a value, each event with sanitised values, at last one by one."""
        if self.run.context.dry_run:
            return self.read(), Loaded()
        for careful in (False, True):
            seen = self._begin()
            try:
                tables = self._tables(seen, careful=careful)
                return seen, load_in_turns(self.run.pull.warehouse, tables, past=self.hour.mode is not Mode.LIVE)
            except Rejected as error:
                log.warning("%s: retrying row by row with sanitised values: %s", self.hour.key, error)
        seen = self._begin()
        return seen, self._load_each(seen)

    def ledger(self, loaded: Loaded) -> Ledger:
        """Lines are counted as they are read, events where the warehouse took them, what is set aside where it lies."""
        counted = self.counted
        tally = Tally(counted=counted, read=counted, new=loaded.new, already_there=loaded.given - loaded.new)
        entries = () if self.run.context.dry_run else self.refused.keep(self.run.pull.set_aside)
        return ledger_of(tally, *entries, unit=UNIT)

    def _begin(self) -> "HourStats":
        from app.amplitude.events import HourStats  # the decoder, which an idle daemon does not load

        def refuse(reason: str, line: bytes, place: str) -> None:
            name = set_aside_name(self.run.name, self.hour.window)
            self.refused.add(name, reason, line, f"{self.hour.key} {place}")

        self.refused.close()
        self.counted = 0
        return HourStats(refuse)

    def _blocks(self) -> "Iterator[Block]":
        """The lines, counted as they come."""
        from app.amplitude.events import blocks, lines_in

        self.file.seek(0)
        found = blocks(inflated(self.file))
        while True:
            self.run.context.stop.check()
            with _broken():
                block = next(found, None)
            if block is None:
                return
            self.counted += lines_in(block)
            yield block

    def _tables(self, seen: "HourStats", *, careful: bool) -> Iterator[Tables]:
        from app.amplitude.events import reader

        for block in self._blocks():
            yield reader().tables(block, seen, careful=careful)

    def _load_each(self, seen: "HourStats") -> Loaded:
        """Load line by line: the warehouse refuses some event even sanitised, and that one alone is set aside."""
        from app.amplitude.events import REFUSED, HourStats, reader

        done, load, past = Loaded(), self.run.pull.warehouse.load, self.hour.mode is not Mode.LIVE
        for block in self._blocks():
            if not isinstance(block, bytes):
                reader().tables(block, seen)
                continue
            for line in filter(bytes.strip, block.split(b"\n")):
                found = reader().tables(line, alone := HourStats(seen.refuse), careful=True)
                try:
                    done += Loaded(events_in(found), load([found], past=past) if found else 0)
                except Rejected as error:
                    seen.refused(REFUSED, line, seen.lines + 1, f"refused by the warehouse: {error.message}")
                else:
                    seen.add(alone)
        return done


# The object of a week: a zip with one NDJSON entry, joined from the objects of its hours.
#
# Invariant: it is a function of the records of its hours, so a crash needs nothing: it is re-created when a day of it
# is complete or one of its hours changed, and only then.

WEEKS = "amplitude_weeks"
DAY_HOURS = 24
MAX_BYTES = 5 << 30


def refresh_weeks(run: PartitionRun, span: Window) -> Report:
    """Bring the objects of the weeks of `span` up to date; the bytes that were stored."""
    size_bytes = 0
    for window in weeks_between(span.start, span.end) if not run.context.dry_run else ():
        hours = hours_of_week(run.pull, run.name, window)
        held = run.records(window, WEEKS).get(window.start)
        if hours and (held is None or held.digest != _digest(hours)):
            size_bytes += _store_week(run, window, hours)
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
    return _store_week(run, window, hours, version)


def _store_week(run: PartitionRun, window: Window, hours: Sequence[Record], over: str | None = None) -> int:
    key, rows, digest = week_key(run.name, window), sum(hour.rows for hour in hours), _digest(hours)
    with temporary_file(run.pull.spool) as file:
        file.writelines(weeks(_streams(run, hours), [window.start.date()]))
        if file.tell() > MAX_BYTES:
            raise Permanent(
                f"{key}: {file.tell()} bytes are more than the 5 GiB that one upload may have",
                "take the objects of its hours, which hold all of it; nothing is missing there",
            )
        stored = store_rows(
            run.pull.store,
            file,
            pipeline=WEEKS,
            key=key,
            window=window,
            rows=rows,
            digest=digest,
            closed=all(hour.closed for hour in hours) and hours[-1].window.end == window.end,
            content_type="application/zip",
            over=over,
        )
    min_at, max_at = hours[0].window.start, hours[-1].window.end
    record = replace(stored, digest=digest, rows=rows, source_cells=len(hours), min_at=min_at, max_at=max_at)
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
                    f"{hour.key} is gone, so the week cannot be re-created",
                    f"python -m app verify amplitude --from {hour.window.start:%Y-%m-%dT%H} "
                    f"--to {hour.window.end:%Y-%m-%dT%H} --heal",
                )
            yield hour.window.start, stream


def weeks_between(start: datetime, end: datetime) -> Iterator[Window]:
    """Every ISO week that overlaps `[start, end)`, oldest first."""
    at = datetime.combine(monday(start.date()), time(), UTC)
    while at < end:
        yield Window(at, at + WEEK)
        at += WEEK


def week_key(source: str, window: Window) -> str:
    """`amplitude/{source}/{year}_week_{week}.zip`."""
    return f"amplitude/{source}/{name_of(window.start.date())}.zip"


def _digest(hours: Sequence[Record]) -> str:
    return hashlib.sha256("".join(f"{hour.window}{hour.digest}" for hour in hours).encode()).hexdigest()


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


@dataclass(frozen=True, slots=True)
class SourceRun:
    """One source in one run. Its methods raise what the ports and the service raise; what was committed stays."""

    run: PartitionRun
    project: Project

    def pull_due(self) -> Report:
        """Pull what is due, look once more at what is old enough, re-create weeks. `more`: more is due."""
        pull, context = self.run.pull, self.run.context
        now, due = pull.clock(), pull.due_at
        # From the Monday of the week in which the lookback begins, so that every object of a week is a whole one.
        oldest = next(weeks_between(now - timedelta(days=pull.lookback_days), now + WEEK)).start
        start = self.run.cursor_at or self.run.begin(oldest)
        end = min(due, start + STEP_HOURS * HOUR)
        waiting = [record for record in self.run.records(EVER, WAITING).values() if not record.closed]
        report = self._pull(Window(start, end), Mode.LIVE) if start < end else Report()
        report += self._retry(waiting)
        report += self._look_again(now)
        report += refresh_weeks(self.run, Window(min(start, now - timedelta(days=AGAIN_DAYS)), now))
        return report + Report(more=start < end < due and not context.dry_run)

    def fill(self, span: Window) -> Report:
        """Pull the hours of `span` up to the cursor again. The cursor does not move. Raises Rejected for no hour."""

        def pull_again(hours: Window) -> Report:
            return self._pull(hours, Mode.AGAIN) + refresh_weeks(self.run, hours)

        return self.run.fill(span, pull_again)

    def mend(self, archive: Archive, over: str | None) -> Report:
        """Load the hour of an archive again and store its object, see `store_rows`. The cursor does not move."""
        span = archive.span
        (hour,) = self._hours(span, archive, self.run.records(span), Mode.AGAIN)
        try:
            record, new, ledger = load_hour(self.run, archive, hour, over=over)
        except BrokenHour as error:
            raise error.fault from error
        loaded = self._commit(hour, record, new, ledger)
        return replace(loaded, windows=1) + refresh_weeks(self.run, span)

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

    def _load_each(self, pieces: Iterable[FetchedArchive], known: Mapping[datetime, Record], mode: Mode) -> Report:
        report = Report()
        for fetched in pieces:
            with closing(fetched):
                report += self._load(fetched, known, mode)
        return report

    def _load(self, fetched: FetchedArchive, known: Mapping[datetime, Record], mode: Mode) -> Report:
        """Load the hours of an archive. One that cannot be opened comes again hour by hour, so that only those hours
        that cannot be read are lacking.
        """
        stop, span, report = self.run.context.stop, fetched.span, Report()
        if fetched.fault is not None:
            return self._not_had(span, fetched.fault, known.get(span.start), mode)
        with ExitStack() as held:
            try:
                archive = held.enter_context(opened(fetched.file, span)) if fetched.file else None
                hours = self._hours(span, archive, known, mode)
            except (Transient, Permanent) as error:
                if span.end - span.start <= HOUR:
                    return self._not_had(span, error, known.get(span.start), mode, evidence=fetched.file)
                alone = (
                    self.project.fetch_each(hour, stop) for hour in windows_between(span.start, span.end, HOUR_SECONDS)
                )
                return self._load_each(chain.from_iterable(alone), known, mode)
            for hour in hours:
                stop.check()
                try:
                    record, new, ledger = load_hour(self.run, archive, hour)
                except BrokenHour as error:
                    evidence = fetched.file if span == hour.window else None
                    report += self._not_had(hour.window, error.fault, hour.record, mode, came=True, evidence=evidence)
                else:
                    report += self._commit(hour, record, new, ledger)
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
        run = self.run
        run.context.progress.advance(done=1)
        failed = Report(failures=(Failure(f"{run.name} {window}", fault.message, fault.hint),))
        if run.context.dry_run:
            return failed
        if record is None or not was_had(record):
            return self._record_not_had(window, fault, mode, failed, evidence)
        if record.closed or run.pull.clock() - window.end < AGAIN_GIVEN_UP_AFTER:
            return failed
        log.warning("%s: the service does not give this hour again; it stays as it is", record.key)
        run.commit(replace(record, closed=True))
        return Report()

    def _service_answers(self, window: Window) -> bool:
        """Whether the service gives another hour than this: the one that it gave last, or the newest."""
        start, due = window.start, self.run.pull.due_at
        records = self.run.records(Window(start - KNOWN_FOR, start)).values()
        before = next((each.window for each in reversed(list(records)) if was_had(each)), Window(start - HOUR, start))
        others = (before, Window(due - HOUR, due))
        return any(self.project.answers(other, self.run.context.stop) for other in others if other != window)

    def _record_not_had(
        self, window: Window, fault: AppError, mode: Mode, failed: Report, evidence: BinaryIO | None
    ) -> Report:
        """Record that an hour waits, or after a day that it is set aside."""
        run, now = self.run, self.run.pull.clock()
        noted = run.records(window, WAITING).get(window.start)
        since = noted.min_at if noted and noted.min_at and (mode is Mode.AGAIN or not noted.closed) else now
        since = min(since, now)  # it was noted later than now while the clock was ahead
        is_too_large = isinstance(fault, HourTooLarge)
        gives_up = is_too_large or now - since >= SET_ASIDE_AFTER
        if gives_up:
            place = set_aside_name(run.name, window)
            ledger = run.set_hour_aside(window, fault, place=place, is_too_large=is_too_large, archive=evidence)
        else:
            ledger = ledger_of(Tally(counted=1, waiting=1), unit=run.pull.unit).of_partition(run.name)
        key = hour_key(run.name, window)
        waiting = record_of_nothing(window, key, closed=gives_up, version=NOT_HAD, min_at=since)
        run.commit(waiting, pipeline=WAITING)
        run.commit(replace(waiting, min_at=None), cursor_at=window.end if mode is Mode.LIVE else None)
        return (failed if mode is Mode.AGAIN or not gives_up else Report()) + Report(ledger=ledger)

    def _hours(
        self, span: Window, archive: Archive | None, known: Mapping[datetime, Record], mode: Mode
    ) -> list[SourceHour]:
        members = archive.hours() if archive is not None else {}
        settled = settled_at(self.run.pull.clock())
        return [
            SourceHour(
                key=hour_key(self.run.name, window),
                window=window,
                members=members.get(window.start, ()),
                record=known.get(window.start),
                mode=mode,
                final=window.start < settled,
            )
            for window in windows_between(span.start, span.end, HOUR_SECONDS)
        ]

    def _commit(self, hour: SourceHour, record: Record, new: int, ledger: Ledger) -> Report:
        self.run.context.progress.advance(done=1, rows=new)
        changed = hour.record is None or record.version != hour.record.version
        if self.run.context.dry_run:
            return Report(rows=record.rows, bytes=record.size_bytes, windows=1) if changed else Report()
        is_live = hour.mode is Mode.LIVE
        if changed or record != hour.record or is_live:
            self.run.commit(record, cursor_at=hour.window.end if is_live else None)
        if hour.record is not None and not was_had(hour.record):
            self.run.commit(replace(hour.record, closed=True), pipeline=WAITING)
        return Report(
            rows=new,
            bytes=record.size_bytes if changed else 0,
            windows=int(changed),
            late_rows=new if hour.mode is Mode.ONCE_MORE else 0,
            ledger=ledger.of_partition(self.run.name),
        )


def settled_at(now: datetime) -> datetime:
    """Days that end until then are looked at for the last time, be it for the first."""
    return floor_to(now - DUE_AFTER - AGAIN_AFTER, DAY_SECONDS)
