"""One hour of a pull: its events into the warehouse, its object into the store, then the record of both; and what
becomes of an hour that cannot be had.

Order: rows, object, record. A crash before the record repeats the hour; all of it is recognized by its content, so
nothing is doubled. One object per window: the same rows are not stored twice, however their order or their bytes
differ; an object is replaced only while it is the version that was looked at, and one that is whole never by one with
fewer rows.

An hour that cannot be had never holds up the others. While the service gives other hours, and the destination takes
them, the fault is its own: it waits, each run tries it again, and after a day it is set aside with what came of it.
When no other hour can be had either, nothing is recorded and the cursor stays.
"""

import csv
import gzip
import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import Enum
from shutil import copyfileobj
from typing import BinaryIO, Protocol

from app.core.errors import AppError, LeaseLost, Permanent, Rejected, Transient
from app.core.files import temporary_file
from app.core.ledger import Ledger, SetAside, Tally, ledger_of
from app.core.pipeline import NEVER_AFTER, QUIET_AFTER, USUAL_HOURS, Held, Record
from app.core.runs import Failure, Report
from app.core.verify import Content
from app.core.windows import Window
from app.object_store.deltas import held_of
from app.object_store.port import ObjectStore, Put
from app.object_store.set_aside import LINES
from app.product_events.mapping import Events, Loaded, Tables, events_in, load_in_turns, lost
from app.product_events.pull import PartitionRun, PullContext

ABOVE_LIMIT, KEEPS_FAILING = "hour above the service's limit", "hour that keeps failing"
REFUSED = "refused by the warehouse"
ANOTHER_PROJECT = "check that it is the right project, in the right region, and that events reach it"
NOT_HAD = "not had"
"""The version in the record of a window that could not be had; `closed` says that it was set aside."""
GZIP = "application/gzip"
SET_ASIDE_AFTER = timedelta(days=1)
GIVEN_UP_AFTER = timedelta(days=4)
REFUSED_IN_A_ROW = 25  # a day, whose objects have a folder of their own, and one
FAILED_IN_A_ROW = 2
REFUSED_ROWS = 20
EVER = Window(datetime(1970, 1, 1, tzinfo=UTC), datetime(9999, 1, 1, tzinfo=UTC))
log = logging.getLogger(__name__)


class Mode(Enum):
    """How hours are pulled. LIVE: the cursor moves. AGAIN: rows are loaded whatever is recorded."""

    LIVE = "live"
    AGAIN = "again"
    ONCE_MORE = "once more"


class PulledHour(Protocol):
    """An hour as a service gave it, or as its object holds it. Its numbers are known once it was read, which `digest`
    does if nobody did.
    """

    @property
    def window(self) -> Window:
        """Its hour."""

    @property
    def body(self) -> BinaryIO | None:
        """The gzip file that is its object; None when there is nothing to store."""

    @property
    def rows(self) -> int:
        """How many rows it has."""

    @property
    def refused(self) -> int:
        """Those that are not among them."""

    @property
    def digest(self) -> str:
        """The same for the same rows."""

    @property
    def is_loaded(self) -> bool:
        """Whether its rows go into the warehouse as well."""

    def tables(self, *, careful: bool = False) -> Iterator[Tables]:
        """Its rows for the warehouse. `careful`: sanitised one by one."""

    def load_each(self, load: Callable[[Tables], None]) -> None:
        """Give each event to `load`, and set that one aside for which it raises Rejected."""

    def content(self) -> Content:
        """What it holds, to compare it with the other end."""

    def close(self) -> None:
        """Free its files. Idempotent."""


Opened = Callable[[Window, BinaryIO], PulledHour]


class BrokenHour(AppError):
    """What was given of an hour cannot be read, as `fault` says. Its rows were not loaded."""

    def __init__(self, fault: AppError) -> None:
        super().__init__(fault.message, fault.hint)
        self.fault = fault


class DamagedObject(Permanent):
    """What lies under the key of an hour cannot be read."""


BROKEN = (BrokenHour, EOFError, gzip.BadGzipFile, zlib.error, csv.Error, ValueError)


@contextmanager
def object_hour(
    pull: PullContext, window: Window, opened: Opened, *, key: str, etag: str | None = None
) -> Iterator[PulledHour | None]:
    """The hour that an object holds, which is downloaded whole; None when it is gone. What is broken while it is used
    is a DamagedObject. Raises Conflict when it is another version.
    """
    with temporary_file(pull.spool) as file:
        with pull.store.open(key, etag) as stream:
            if stream is not None:
                copyfileobj(stream, file, 1 << 18)
        file.seek(0)
        hour = None
        try:
            hour = opened(window, file) if stream is not None else None
            yield hour
        except BROKEN as error:
            what = error.message if isinstance(error, BrokenHour) else error
            hint = "heal the window: the object is written again from what the service gives"
            raise DamagedObject(f"{key} is damaged: {what}", hint) from error
        finally:
            if hour is not None:
                hour.close()


def was_had(record: Record | None) -> bool:
    """False for a window that has no record, or one that says that it could not be had."""
    return record is not None and record.version != NOT_HAD


def silence(pull: PullContext, partition: str) -> str:
    """What is odd about a source that answers and gives no rows; "" when it gives some, or is not known for long.

    Both services answer for another project, or another application, as for one in which nothing happens.
    """
    first_at = pull.checkpoints.starts(pull.name).get(partition)
    cursor_at = pull.checkpoints.cursors(pull.name).get(partition)
    if first_at is None or cursor_at is None:
        return ""
    if any(
        record.rows for record in pull.checkpoints.records(pull.name, partition, cursor_at - QUIET_AFTER, cursor_at)
    ):
        return ""  # as most runs find: the rest need not be read
    records = pull.checkpoints.records(pull.name, partition, first_at, cursor_at)
    filled = [record.window.end for record in records if record.rows]
    if not filled and cursor_at - first_at >= NEVER_AFTER:
        return f"{partition} has given no row since {first_at:%Y-%m-%d}: {ANOTHER_PROJECT}"
    if len(filled) >= USUAL_HOURS and cursor_at - filled[-1] >= QUIET_AFTER:
        return f"{partition} has given no row since {filled[-1]:%Y-%m-%d %H:%M}Z: {ANOTHER_PROJECT}"
    return ""


def heard(pull: PullContext, ping: Callable[[], str], start: str) -> Callable[[], str]:
    """`ping`, and what is odd about those of its partitions whose names have this `start`."""

    def check() -> str:
        names = sorted(name for name in pull.checkpoints.cursors(pull.name) if name.startswith(start))
        return "; ".join([ping(), *filter(None, (silence(pull, name) for name in names))])

    return check


def record_of_nothing(
    window: Window, key: str, *, closed: bool, version: str = "", digest: str = "", min_at: datetime | None = None
) -> Record:
    """The record of a window without rows, or with NOT_HAD of one that waits (since `min_at`) or was set aside."""
    return Record(window, 0, key, version, digest, 0, 0, 0, min_at, None, closed)


def store_rows(
    store: ObjectStore,
    file: BinaryIO,
    *,
    pipeline: str,
    key: str,
    window: Window,
    rows: int,
    digest: str,
    closed: bool = False,
    refused: int = 0,
    content_type: str = GZIP,
    over: str | None = None,
) -> Record:
    """Store `file` from its beginning as the object of a window; the record of what is there then.

    `digest` tells these rows from others. `over`: the version to replace, whatever it holds ("" = nothing is there);
    None = an object with these rows, or with more, stays. `source_cells` of the record counts the `refused` rows too,
    so what it has more than `rows` are those that were set aside. Raises Conflict when somebody else writes the same
    object at this moment: read the service again, then repeat.
    """
    held = None
    if over is None and (there := store.head(key)) is not None:
        held, over = held_of(there), there.etag
        # Services forget, and give fewer rows of an old hour: what was stored then is worth more.
        if held.digest != digest and (held.rows or 0) > rows:
            log.warning("%s holds %s rows, the service now gives %d: it stays", key, held.rows, rows)
        elif held.digest != digest:
            held = None
    if held is None:
        size_bytes = file.seek(0, 2)
        file.seek(0)
        metadata = {"pipeline": pipeline, "window": str(window), "rows": str(rows), "digest": digest}
        held = Held(store.put(key, file, Put(content_type, metadata, over or "")), digest, rows, size_bytes=size_bytes)
    there_rows = rows if held.rows is None else held.rows
    return Record(
        window=window,
        part=0,
        key=key,
        version=held.version,
        digest=held.digest,
        rows=there_rows,
        size_bytes=held.size_bytes,
        source_cells=there_rows + refused,
        min_at=window.start,
        max_at=window.end,
        closed=closed,
    )


def load(warehouse: Events, hour: PulledHour, *, past: bool) -> Loaded:
    """Load an hour; where the warehouse refuses it, with sanitised values, and at last event by event.

    Raises what the warehouse raises when it takes none of its events.
    """
    for careful in (False, True):
        try:
            return load_in_turns(warehouse, hour.tables(careful=careful), past=past)
        except (Permanent, Rejected) as error:
            log.warning("%s: retrying row by row with sanitised values: %s", hour.window, error)
    loaded, faults = Loaded(), list[Permanent]()

    def load_one(tables: Tables) -> None:
        nonlocal loaded
        try:
            loaded += Loaded(events_in(tables), warehouse.load([tables], past=past))
        except Permanent as error:
            faults.append(error)
            if not loaded.given and len(faults) >= REFUSED_ROWS:
                raise
            raise Rejected(error.message, error.hint) from error

    # A warehouse that takes some of the events can be used, so what it refuses is the fault of the others.
    hour.load_each(load_one)
    if faults and not loaded.given:
        raise faults[0]
    return loaded


@dataclass(slots=True)
class HourLanding:
    """The hours of one partition in one run. `key`: the object of an hour; `place`: where it is set aside; `opened`:
    the hour in the file of an object. Close it when the run is over.
    """

    run: PartitionRun
    key: Callable[[Window], str]
    place: Callable[[Window], tuple[str, ...]]
    opened: Opened
    _works: bool = False
    _failed_in_a_row: int = 0
    _held: list[tuple[PulledHour, Record | None, Mode, AppError]] = field(default_factory=list)

    def take(self, hour: PulledHour, record: Record | None, mode: Mode, *, final: bool) -> tuple[Report, Loaded]:
        """`land`; an hour that the destination refuses is held until it takes another one, and closed then.

        Raises its error where so many fail in a row that it is hardly theirs.
        """
        try:
            report, loaded = self.land(hour, record, mode, final=final)
        except LeaseLost:
            raise
        except (Transient, Permanent, Rejected) as error:
            self._held.append((hour, record, mode, error))
            self._failed_in_a_row += 1
            limit = FAILED_IN_A_ROW if isinstance(error, Transient) else REFUSED_IN_A_ROW
            if self._failed_in_a_row >= limit:
                raise
            return (self.settle() if self._works else Report()), Loaded()
        self._failed_in_a_row = 0
        return report, loaded

    def holds(self, hour: PulledHour) -> bool:
        """Whether the hour is still needed."""
        return any(hour is held for held, *_ in self._held)

    def settle(self) -> Report:
        """What becomes of hours that the destination refused. Where it took no other, the first error is raised, unless
        the hour waits or landed already.
        """
        report = Report()
        while self._held:
            hour, record, mode, error = self._held[0]
            if not self._works and mode is Mode.LIVE:
                raise error
            self._held.pop(0)
            with closing(hour):
                if self._works:
                    report += self.not_had(hour.window, record, error, mode, number=hour.rows, body=hour.body)
                else:
                    failure = Failure(f"{self.run.name} {hour.window}", error.message, error.hint)
                    report += Report(failures=(failure,), ledger=self._ledger(Tally(waiting=hour.rows)))
        return report

    def close(self) -> None:
        """Free what is held. Idempotent."""
        while self._held:
            self._held.pop()[0].close()

    def land(
        self, hour: PulledHour, record: Record | None, mode: Mode, *, final: bool = False, over: str | None = None
    ) -> tuple[Report, Loaded]:
        """Land an hour, and record that; what became of its rows. `final`: it is not looked at once more.

        `over`: see `store_rows`. Raises what store and warehouse raise.
        """
        run, had, held = self.run, record if was_had(record) else None, Report()
        if had is not None and mode is not Mode.AGAIN and had.digest == hour.digest and had.rows >= hour.rows:
            source_cells = max(had.source_cells, hour.rows + hour.refused)
            landed, loaded = replace(had, source_cells=source_cells), Loaded(hour.rows)
        elif run.context.dry_run:
            size_bytes = hour.body.seek(0, 2) if hour.digest and hour.body else 0
            return Report(rows=hour.rows, bytes=size_bytes, windows=1), Loaded()
        else:
            loaded = Loaded()
            if hour.body is not None and hour.is_loaded:
                loaded = load(run.pull.warehouse, hour, past=mode is not Mode.LIVE)
            landed = self._stored(hour, had, over)
            if not hour.is_loaded:
                loaded = _told_by_object(hour, landed, had)
            landed = replace(landed, rows=landed.rows - hour.rows + loaded.given) if loaded.given else landed
            if hour.body is not None:
                self._works = True
                held = self.settle()  # before the cursor moves past them
        landed = replace(landed, closed=final or (had is not None and had.closed))
        changed = had is None or landed.version != had.version
        run.context.progress.advance(done=1, rows=loaded.new)
        if not run.context.dry_run and (mode is Mode.LIVE or landed != record):
            run.commit(landed, cursor_at=self._cursor(hour.window, mode))
        if record is not None and had is None:
            run.commit(replace(record, closed=True), pipeline=run.waiting)
        report = Report(
            rows=loaded.new,
            bytes=landed.size_bytes if changed else 0,
            windows=int(changed),
            late_rows=loaded.new if had is not None and mode is not Mode.AGAIN else 0,
        )
        return held + report, loaded

    def not_had(
        self,
        window: Window,
        record: Record | None,
        fault: AppError,
        mode: Mode,
        *,
        number: int,
        counted: int = 0,
        body: BinaryIO | None = None,
        content_type: str = GZIP,
        is_too_large: bool = False,
        at_once: bool = False,
    ) -> Report:
        """Record that an hour waits, or after a day that it is set aside, `at_once` or because it `is_too_large`.

        The ledger accounts for the `number` of its rows, of which `counted` are counted by nobody else. `body`: what
        came of it. An hour that landed before stays as it is, and after some days it is not looked at once more.
        """
        run, now = self.run, self.run.pull.clock()
        run.context.progress.advance(done=1)
        failed = Report(failures=(Failure(f"{run.name} {window}", fault.message, fault.hint),))
        if run.context.dry_run:
            return failed
        waits = Report(ledger=self._ledger(Tally(counted=counted, waiting=number)))
        if record is not None and was_had(record):
            if record.closed or now - window.end < GIVEN_UP_AFTER:
                return failed + waits
            log.warning("%s: the service does not give this hour again; it stays as it is", record.key)
            run.commit(replace(record, closed=True))
            return waits
        noted = run.records(window, run.waiting).get(window.start)
        since = noted.min_at if noted and noted.min_at else now
        since = min(since, now)  # it was noted later than now while the clock was ahead
        gives_up = at_once or is_too_large or now - since >= SET_ASIDE_AFTER
        ledger = waits.ledger
        if gives_up:
            log.warning("%s %s is set aside: %s", run.name, window, fault)
            if body is not None:
                body.seek(0)
            kept = run.pull.set_aside.keep(
                self.place(window),
                body or str(fault).encode(),
                content_type=content_type if body else LINES,
                reason=ABOVE_LIMIT if is_too_large else KEEPS_FAILING,
                number=number,
                sample=f"{run.name} {window}: {fault.message}",
            )
            ledger = self._ledger(Tally(counted=counted), kept.entry)
        waiting = record_of_nothing(window, self.key(window), closed=gives_up, version=NOT_HAD, min_at=since)
        run.commit(waiting, pipeline=run.waiting)
        run.commit(replace(waiting, min_at=None), cursor_at=self._cursor(window, mode))
        return (failed if mode is Mode.AGAIN or not gives_up else Report()) + Report(ledger=ledger)

    def waiting(self) -> Sequence[Window]:
        """Hours that earlier runs could not have, to be tried again."""
        run, found = self.run, []
        for record in run.records(EVER, run.waiting).values():
            if not record.closed and any(map(was_had, run.records(record.window).values())):
                run.commit(replace(record, closed=True), pipeline=run.waiting)  # a kill came between its two records
            elif not record.closed:
                found.append(record.window)
        return found

    def bring_back(self) -> Report:
        """Load the newest hours again, from their objects, when the warehouse does not have them: it was emptied, or
        restored from a backup that is older than the records. What was deleted on request counts as there.

        Oldest first, so that a run that ends before its time leaves the newest lacking, by which the next one knows.
        """
        run, found, total, gone = self.run, list[tuple[Record, bool | None]](), Report(), list[Record]()
        for record in self._newest_first():
            if record.rows and was_had(record):
                found.append((record, is_there := self._is_known(record)))
                if is_there:  # perhaps only its first events are
                    break
        if run.context.dry_run or all(is_there is not False for _, is_there in found):
            return Report()
        since = f"{found[-1][0].window.start:%Y-%m-%dT%H:%MZ}"
        log.warning("%s: the warehouse lacks events of hours since %s: they are loaded again", run.name, since)
        for record, _ in reversed(found):
            run.context.stop.check()
            try:
                with object_hour(run.pull, record.window, self.opened, key=record.key) as hour:
                    loaded = load(run.pull.warehouse, hour, past=False) if hour else None
            except DamagedObject as error:
                log.warning("%s: %s", run.name, error)
                loaded = None
            if loaded is None:
                gone.append(record)
            else:
                there = Tally(
                    counted=record.rows, read=record.rows, new=loaded.new, already_there=loaded.given - loaded.new
                )
                total += Report(rows=loaded.new, ledger=self._ledger(there))
        note = f"{run.name}: {total.rows} events of hours since {since} were not in the warehouse: loaded from objects"
        if gone:
            what = f"{len(gone)} hours since {gone[0].window.start:%Y-%m-%dT%H:%MZ} are in no object to load them from"
            span = f"--from {gone[0].window.start:%Y-%m-%dT%H} --to {gone[-1].window.end:%Y-%m-%dT%H}"
            total += Report(failures=(Failure(run.name, what, f"python -m app backfill {run.pull.name} {span}"),))
        return total + Report(notes=(note,))

    def _newest_first(self) -> Iterator[Record]:
        """All records, of which those of the last days are mostly enough."""
        recent_at = self.run.pull.clock() - QUIET_AFTER
        for span in (Window(recent_at, EVER.end), Window(EVER.start, recent_at)):
            yield from reversed(list(self.run.records(span).values()))

    def noted(self) -> Report:
        """A note of the run about a source that gives nothing: no failure, since there may be nothing."""
        said = silence(self.run.pull, self.run.name)
        if said:
            log.warning("%s: %s", self.run.pull.name, said)
        return Report(notes=(f"warning: {said}",) if said else ())

    def _is_known(self, record: Record) -> bool | None:
        """Whether the warehouse has some of the first events of an object; None for one that cannot be read."""
        try:
            with object_hour(self.run.pull, record.window, self.opened, key=record.key) as hour:
                tables = next(hour.tables(), None) if hour else None
        except DamagedObject:
            return None
        return None if tables is None else lost(self.run.pull.warehouse.known, tables) < events_in(tables)

    def _cursor(self, window: Window, mode: Mode) -> datetime | None:
        """Up to where the partition is finished with this hour; None while an earlier one is held."""
        is_behind = any(hour.window.start < window.start for hour, *_ in self._held)
        return window.end if mode is Mode.LIVE and not is_behind else None

    def _ledger(self, tally: Tally, *entries: SetAside) -> Ledger:
        return ledger_of(tally, *entries, unit=self.run.pull.unit).of_partition(self.run.name)

    def _stored(self, hour: PulledHour, had: Record | None, over: str | None) -> Record:
        """Store the object of an hour, if there is something to store; what is there then."""
        key, body = self.key(hour.window), hour.body
        if body is None and had is not None and had.rows:
            log.warning("%s: the service has no rows of this hour any more; those that were loaded stay", key)
            return had
        if body is None:
            empty = record_of_nothing(hour.window, key, closed=False, digest=hour.digest)
            return replace(empty, source_cells=hour.refused)
        return store_rows(
            self.run.pull.store,
            body,
            pipeline=self.run.pull.name,
            key=key,
            window=hour.window,
            rows=hour.rows,
            digest=hour.digest,
            refused=hour.refused,
            over=over,
        )


def _told_by_object(hour: PulledHour, landed: Record, had: Record | None) -> Loaded:
    """What became of rows that land only as an object, told by what the object holds."""
    given = min(landed.rows, hour.rows)
    if landed.version and landed.digest != hour.digest:  # it held more, and stays
        return Loaded(given)
    return Loaded(given, max(0, landed.rows - (had.rows if had else 0)))
