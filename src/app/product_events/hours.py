"""Processes one hour of a pull: loads its events into the warehouse, stores its object, records both. Also handles
hours that cannot be fetched or stored.

The order is rows, object, record. After a crash before the record, the hour is repeated; everything in it is recognized
by its content, so nothing is duplicated. There is one object per window: the same rows are not stored twice, even if
their order or bytes differ. An object is replaced only if its version is still the one that was read, and a complete
object is never replaced by one with fewer rows.

A failed hour never blocks the others. If the service returns other hours and the destination accepts them, the fault
belongs to that hour: it waits, each run retries it, and after a day it is set aside together with whatever was
received. If no other hour works either, nothing is recorded and the cursor stays.
"""

import hashlib
import logging
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from app.core.errors import AppError, LeaseLost, Permanent, Rejected, Transient
from app.core.files import temporary_file
from app.core.ledger import SetAside, Tally, ledger_of
from app.core.pipeline import QUIET_AFTER, Commit, ObjectState, Record
from app.core.runs import Context, Failure, Report
from app.core.verify import WindowContent
from app.core.windows import Window
from app.object_store.deltas import state_from_metadata
from app.object_store.port import ObjectStore, PutRequest
from app.object_store.set_aside import LINES, SetAsideStore
from app.product_events.mapping import Tables, load_hour, missing_events, uuids_in

if TYPE_CHECKING:
    from app.product_events.pull import PullPipeline

HOUR = timedelta(hours=1)
ABOVE_LIMIT, KEEPS_FAILING = "hour above the service's limit", "hour that keeps failing"
REFUSED = "refused by the warehouse"
NOT_HAD = "not had"
"""The version in the record of a window that could not be loaded; `closed` means it was set aside."""
GZIP = "application/gzip"
LARGE_BYTES, LOGGED_SAMPLES = 1 << 20, 3
MAX_LINE_BYTES = 1 << 24
KEPT_LINE_BYTES = 2 * MAX_LINE_BYTES
"""Kept of a line above MAX_LINE_BYTES, regardless of the limit for many small lines."""
SET_ASIDE_AFTER = timedelta(days=1)
GIVEN_UP_AFTER = timedelta(days=4)
CLOCKS_APART = timedelta(minutes=30)
REFUSED_IN_A_ROW = 25  # the hours of one day, which share a folder, plus one
FAILED_IN_A_ROW = 2
EVER = Window(datetime(1970, 1, 1, tzinfo=UTC), datetime(9999, 1, 1, tzinfo=UTC))
log = logging.getLogger(__name__)


class PullMode(Enum):
    """How hours are pulled. LIVE: moves the cursor. AGAIN: loads rows regardless of what is recorded."""

    LIVE = "live"
    AGAIN = "again"
    ONCE_MORE = "once more"


class DamagedObject(Permanent):
    """The object of an hour cannot be read."""


@dataclass(slots=True)
class _RefusedWindow:
    """`parts`: where its lines are in the spool, as start, end, start, end."""

    parts: "array[int]" = field(default_factory=lambda: array("q"))
    samples: list[str] = field(default_factory=list)
    number: int = 0


class RefusedLines:
    """Lines of a service's files that are not valid events, spooled until they are set aside.

    Invariants: the bytes stay unchanged; lines are on disk until they are kept, all in one file, since a process may
    not open a file for each of their windows; a line is kept under its window, so pulling a window again adds nothing.
    Close it after use. Not thread-safe.
    """

    def __init__(self, spool: Path) -> None:
        self._spool = spool
        self._file: BinaryIO | None = None
        self._found: dict[tuple[tuple[str, ...], str], _RefusedWindow] = {}
        self.not_kept = 0

    def add(self, name: tuple[str, ...], reason: str, line: bytes, sample: str) -> None:
        """Add a line of the window `name`. A large line gets its own object, so that it is not truncated."""
        if len(line) > LARGE_BYTES:
            # A set-aside object has a size limit, which could truncate such a line.
            name = (*name, hashlib.sha256(line).hexdigest()[:16])
        if self._file is None:
            self._file = temporary_file(self._spool)
        start = self._file.seek(0, 2)
        end = start + self._file.write(line.rstrip(b"\r\n") + b"\n")
        found = self._found.setdefault((name, reason), _RefusedWindow())
        if found.parts and found.parts[-1] == start:
            found.parts[-1] = end
        else:
            found.parts.extend((start, end))
        found.number += 1
        found.samples += [sample] if found.number <= LOGGED_SAMPLES else []

    def keep(self, store: SetAsideStore) -> list[SetAside]:
        """Set aside all lines; returns ledger entries. `not_kept` counts lines that the store could not take."""
        entries = []
        for (name, reason), found in self._found.items():
            log.warning("%d lines are set aside (%s): %s", found.number, reason, "; ".join(found.samples))
            with temporary_file(self._spool) as lines:
                lines.writelines(self._pieces(found.parts))
                lines.seek(0)
                kept = store.keep(
                    name, lines, content_type=LINES, reason=reason, number=found.number, sample=found.samples[0]
                )
            self.not_kept += 0 if kept.key else kept.number
            entries.append(kept.entry)
        return entries

    def _pieces(self, parts: Sequence[int]) -> Iterator[bytes]:
        """The bytes of these parts of the spool."""
        if self._file is not None:
            for start, end in zip(parts[::2], parts[1::2], strict=True):
                self._file.seek(start)
                for at in range(start, end, LARGE_BYTES):
                    yield self._file.read(min(LARGE_BYTES, end - at))

    def close(self) -> None:
        """Free the spool. Idempotent."""
        self._found.clear()
        if self._file is not None:
            self._file.close()
            self._file = None


class PulledHour(ABC):
    """An hour as the service returned it, or as read from its object. Its counts are known after it was read; `digest`
    reads it if nothing has yet. Close it after use.

    `body`: the gzip file to store as its object; None when there is nothing to store. `rows` are its events, `refused`
    is the number of what is not one. `refused_lines` are set aside once it has landed.
    """

    is_loaded = True
    """Whether its rows also go into the warehouse."""

    def __init__(self, window: Window, file: BinaryIO | None, spool: Path) -> None:
        self.window, self.file, self.body = window, file, file
        self.rows = self.refused = 0
        self.refused_lines = RefusedLines(spool)

    @property
    @abstractmethod
    def counted(self) -> int:
        """Number of lines that its ledger accounts for."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """Equal for equal rows. Hex."""

    @abstractmethod
    def tables(self) -> Iterator[Tables]:
        """Its rows for the warehouse."""

    @abstractmethod
    def load_each(self, load: Callable[[Tables], None]) -> None:
        """Pass each event to `load`, sanitised; refuse every event for which it raises Rejected."""

    @abstractmethod
    def content(self) -> WindowContent:
        """Its content, for comparison with the other end."""

    def close(self) -> None:
        """Free its files. Idempotent."""
        self.refused_lines.close()
        if self.file is not None:
            self.file.close()


def has_landed(record: Record | None) -> bool:
    """False for a window without a record, or whose record says that it could not be fetched or stored."""
    return record is not None and record.version != NOT_HAD


def record_of_nothing(
    window: Window, key: str, *, closed: bool, version: str = "", digest: str = "", min_at: datetime | None = None
) -> Record:
    """The record of a window without rows. With NOT_HAD as version: of one that waits (since `min_at`) or was set
    aside.
    """
    return Record(window, 0, key, version, digest, 0, 0, 0, min_at, None, closed)


def store_rows(
    store: ObjectStore,
    file: BinaryIO,
    wanted: Record,
    *,
    pipeline: str,
    content_type: str = GZIP,
    over: str | None = None,
) -> Record:
    """Store `file`, from its start, as the object of a window; returns the record of the object that is then in the
    store.

    The digest of `wanted` identifies its rows; its `source_cells` includes refused rows. `over`: the version to
    replace, whatever it holds ("" = no object exists); None = an object with the same rows, or with more, stays. Raises
    Conflict when another writer changes the object at the same time: re-read the service, then retry.
    """
    key, rows, digest, held = wanted.key, wanted.rows, wanted.digest, None
    if over is None and (there := store.head(key)) is not None:
        held, over = state_from_metadata(there), there.etag
        # Services drop old data and then return fewer rows for an old hour: the stored object is worth more.
        if held.digest != digest and (held.rows or 0) > rows:
            log.warning("%s holds %s rows, the service now gives %d: it stays", key, held.rows, rows)
        elif held.digest != digest:
            held = None
    if held is None:
        size_bytes = file.seek(0, 2)
        file.seek(0)
        metadata = {"pipeline": pipeline, "window": str(wanted.window), "rows": str(rows), "digest": digest}
        held = ObjectState(
            store.put(key, file, PutRequest(content_type, metadata, over or "")), digest, rows, size_bytes=size_bytes
        )
    there_rows, refused = rows if held.rows is None else held.rows, wanted.source_cells - rows
    return replace(
        wanted,
        version=held.version,
        digest=held.digest,
        rows=there_rows,
        size_bytes=held.size_bytes,
        source_cells=there_rows + refused,
    )


@dataclass(slots=True)
class PartitionRun(ABC):
    """One partition in one run: its records, and loading and storing its hours. Close it at the end of the run.

    Methods raise the errors of the ports and the service; what was committed stays.
    """

    pull: "PullPipeline"
    context: Context
    name: str
    _works: bool = False
    _failed_in_a_row: int = 0
    _held: list[tuple[PulledHour, Record | None, PullMode, AppError]] = field(default_factory=list)

    @abstractmethod
    def pull_due(self) -> Report:
        """Pull what is due. `more`: more is due."""

    @abstractmethod
    def pull_again(self, hours: Window) -> Report:
        """Pull hours again, regardless of what is recorded. The cursor does not move."""

    def mend(self, hour: PulledHour, record: Record | None, over: str | None) -> Report:
        """Load and store an hour again, replacing a version; see `store_rows`. The cursor does not move."""
        return replace(self.land(hour, record, PullMode.AGAIN, over=over), windows=1)

    @property
    def waiting(self) -> str:
        """Pipeline name for records of hours that wait for a retry; their `min_at` is the time of the first failure."""
        return f"{self.pull.name}_waiting"

    @property
    def cursor_at(self) -> datetime | None:
        """Hours before this time were pulled; None before the first run."""
        return self.pull.checkpoints.cursors(self.pull.name).get(self.name)

    def begun_at(self, start: datetime) -> datetime:
        """The cursor; in the first run `start`, which is recorded as the cursor."""
        cursor_at = self.cursor_at
        if cursor_at is None:
            self.commit(cursor_at=start)
        return cursor_at or start

    def records(self, span: Window, pipeline: str = "") -> Mapping[datetime, Record]:
        """Records by start of window, oldest first, of this pull or of another pipeline."""
        found = self.pull.checkpoints.records(pipeline or self.pull.name, self.name, span.start, span.end)
        return {record.window.start: record for record in found}

    def commit(self, *records: Record, cursor_at: datetime | None = None, pipeline: str = "") -> None:
        """Record windows; also move the cursor when `cursor_at` is given."""
        if not self.context.dry_run:
            commit = Commit(records, cursor_at)
            self.pull.checkpoints.commit(pipeline or self.pull.name, self.name, commit, self.context.lease)

    def ledger(self, tally: Tally, *entries: SetAside) -> Report:
        """A report with row accounting only."""
        return Report(ledger=ledger_of(tally, *entries, unit=self.pull.unit).of_partition(self.name))

    def failed(self, what: object, error: AppError) -> Report:
        """Report `error` as the failure of an hour or another part of the partition."""
        return Report(failures=(Failure(f"{self.name}{what}", error.message, error.hint),))

    def alone(self, what: object, work: Callable[[], Report]) -> Report:
        """The result of `work`. An error fails this part only and the others continue, except for a lost lease."""
        try:
            return work()
        except LeaseLost:
            raise
        except (Transient, Permanent, Rejected) as error:
            return self.failed(what, error)

    def take(self, hour: PulledHour, record: Record | None, mode: PullMode, *, final: bool) -> Report:
        """Call `land`, then close the hour. An hour that the destination refuses is held open until the destination
        accepts another one.

        Raises the error when so many hours fail in a row that the hours are probably not the cause.
        """
        with ExitStack() as open_hour:
            open_hour.callback(hour.close)
            try:
                report = self.land(hour, record, mode, final=final)
            except LeaseLost:
                raise
            except (Transient, Permanent, Rejected) as error:
                open_hour.pop_all()
                self._held.append((hour, record, mode, error))
                self._failed_in_a_row += 1
                limit = FAILED_IN_A_ROW if isinstance(error, Transient) else REFUSED_IN_A_ROW
                if self._failed_in_a_row >= limit:
                    raise
                return self.settle() if self._works else Report()
        self._failed_in_a_row = 0
        return report

    def record_empty(self, windows: Sequence[Window], mode: PullMode, *, final: bool) -> Report:
        """Record adjacent hours without rows, none of which has a record: in one commit, since a quiet source has many.
        `final`: see `land`.
        """
        self.context.progress.advance(done=len(windows))
        keys = (self.pull.key(self.name, window) for window in windows)
        records = map(partial(record_of_nothing, closed=final), windows, keys)
        self.commit(*records, cursor_at=self._cursor(windows[-1], mode))
        return Report(windows=len(windows)) + (Report() if self.context.dry_run else self.ledger(Tally()))

    def clock_fault(self, span: Window, answered_at: datetime | None) -> Transient | None:
        """The error when these hours are not over by the service's own clock, `answered_at`: then this machine's clock
        is ahead. Such hours look empty, and would be recorded as such and never be requested again.
        """
        early = span.end + max(self.pull.due_after - CLOCKS_APART, timedelta())
        if answered_at is None or answered_at >= early:
            return None
        said = f"{self.name}: it is {answered_at:%Y-%m-%dT%H:%MZ} by the service's clock, too early for {span}"
        return Transient(said, "set the clock of this machine; nothing was recorded, the hours are requested again")

    def settle(self) -> Report:
        """Decide about hours that the destination refused. If it accepted no other hour, the first error is raised
        unless the hour is already waiting or loaded.
        """
        report = Report()
        while self._held:
            hour, record, mode, error = self._held[0]
            if not self._works and mode is PullMode.LIVE:
                raise error
            self._held.pop(0)
            with closing(hour):
                counted, rows = hour.counted, hour.rows
                if self._works:
                    report += self.not_had(
                        hour.window, record, error, mode, counted=counted, number=rows, body=hour.body
                    )
                else:
                    waits = self.ledger(Tally(counted=counted, waiting=rows))
                    report += self.failed(f" {hour.window}", error) + waits
                if not self.context.dry_run:
                    report += self.ledger(Tally(), *hour.refused_lines.keep(self.pull.set_aside))
        return report

    def close(self) -> None:
        """Close the held hours. Idempotent."""
        while self._held:
            self._held.pop()[0].close()

    def land(
        self, hour: PulledHour, record: Record | None, mode: PullMode, *, final: bool = False, over: str | None = None
    ) -> Report:
        """Load an hour, store its object and record both; accounts for its rows. `final`: it is not checked again.

        `over`: see `store_rows`. Raises the errors of the store and the warehouse.
        """
        had, held, is_dry = record if has_landed(record) else None, Report(), self.context.dry_run
        if had is not None and mode is not PullMode.AGAIN and had.digest == hour.digest and had.rows >= hour.rows:
            source_cells = max(had.source_cells, hour.rows + hour.refused)
            landed, loaded = replace(had, source_cells=source_cells), Tally(already_there=hour.rows)
        elif is_dry:
            size_bytes = hour.body.seek(0, 2) if hour.digest and hour.body else 0
            return Report(rows=hour.rows, bytes=size_bytes, windows=1)
        else:
            loaded = Tally()
            if hour.body is not None and hour.is_loaded:
                loaded = load_hour(self.pull.warehouse, hour, past=mode is not PullMode.LIVE)
            landed = self._stored(hour, had, over)
            if not hour.is_loaded:
                loaded = _told_by_object(hour, landed, had)
            given = loaded.new + loaded.already_there
            landed = replace(landed, rows=landed.rows - hour.rows + given) if given else landed
            if hour.body is not None:
                self._works = True
                held = self.settle()  # before the cursor moves past the held hours
        landed = replace(landed, closed=final or (had is not None and had.closed))
        changed = had is None or landed.version != had.version
        self.context.progress.advance(done=1, rows=loaded.new)
        if mode is PullMode.LIVE or landed != record:
            self.commit(landed, cursor_at=self._cursor(hour.window, mode))
        if record is not None and had is None:
            self.commit(replace(record, closed=True), pipeline=self.waiting)
        report = Report(
            rows=loaded.new,
            bytes=landed.size_bytes if changed else 0,
            windows=int(changed),
            late_rows=loaded.new if had is not None and mode is not PullMode.AGAIN else 0,
        )
        if is_dry:
            return report
        tally = replace(loaded, counted=hour.counted, read=hour.counted)
        return held + report + self.ledger(tally, *hour.refused_lines.keep(self.pull.set_aside))

    def not_had(
        self,
        window: Window,
        record: Record | None,
        fault: AppError,
        mode: PullMode,
        *,
        number: int,
        counted: int = 0,
        body: BinaryIO | None = None,
        content_type: str = GZIP,
        is_too_large: bool = False,
        at_once: bool = False,
    ) -> Report:
        """Record that an hour waits, or that it is set aside: after a day, `at_once`, or because it `is_too_large`.

        The ledger accounts for its `number` of rows, of which `counted` are counted nowhere else. `body`: the data
        received. An hour that was loaded before stays unchanged, and after some days it is no longer checked.
        """
        now = self.pull.clock()
        self.context.progress.advance(done=1)
        failed = self.failed(f" {window}", fault)
        if self.context.dry_run:
            return failed
        waits = self.ledger(Tally(counted=counted, waiting=number))
        if record is not None and has_landed(record):
            if record.closed or now - window.end < GIVEN_UP_AFTER:
                return failed + waits
            log.warning("%s: the service no longer has this hour; it stays as it is", record.key)
            self.commit(replace(record, closed=True))
            return waits
        noted = self.records(window, self.waiting).get(window.start)
        since = noted.min_at if noted and noted.min_at else now
        since = min(since, now)  # it is in the future if the clock was ahead when it was recorded
        gives_up = at_once or is_too_large or now - since >= SET_ASIDE_AFTER
        if gives_up:
            log.warning("%s %s is set aside: %s", self.name, window, fault)
            if body is not None:
                body.seek(0)
            kept = self.pull.set_aside.keep(
                self.pull.place(self.name, window),
                body or str(fault).encode(),
                content_type=content_type if body else LINES,
                reason=ABOVE_LIMIT if is_too_large else KEEPS_FAILING,
                number=number,
                sample=f"{self.name} {window}: {fault.message}",
            )
            waits = self.ledger(Tally(counted=counted), kept.entry)
        key = self.pull.key(self.name, window)
        waiting = record_of_nothing(window, key, closed=gives_up, version=NOT_HAD, min_at=since)
        self.commit(waiting, pipeline=self.waiting)
        self.commit(replace(waiting, min_at=None), cursor_at=self._cursor(window, mode))
        return failed + waits if mode is PullMode.AGAIN or not gives_up else waits

    def waiting_hours(self) -> Sequence[Window]:
        """Hours that failed in earlier runs and are due for a retry."""
        found = []
        for record in self.records(EVER, self.waiting).values():
            if not record.closed and any(map(has_landed, self.records(record.window).values())):
                self.commit(replace(record, closed=True), pipeline=self.waiting)  # killed between the two records
            elif not record.closed:
                found.append(record.window)
        return found

    def bring_back(self) -> Report:
        """Reload the newest hours from their objects when the warehouse lacks them: it was emptied, or restored from a
        backup older than the records. Events deleted on request count as present.

        Loads oldest first: if a run ends early, the newest hours are still missing, which tells the next run to
        continue. An hour that the warehouse refuses is a failure of its own, unless it accepts no other.
        """
        lacking, total, gone, refused = self._lacking_hours(), Report(), list[Record](), list[AppError]()
        if self.context.dry_run or not lacking:
            return Report()
        since = f"{lacking[0].window.start:%Y-%m-%dT%H:%MZ}"
        log.warning("%s: the warehouse lacks events of hours since %s: they are loaded again", self.name, since)
        for record in lacking:
            self.context.stop.check()
            try:
                with self.pull.object_hour(self.name, record.window, self.context.stop) as hour:
                    if hour is None:
                        gone.append(record)
                        continue
                    loaded = load_hour(self.pull.warehouse, hour, past=False)
                    entries = hour.refused_lines.keep(self.pull.set_aside)
            except DamagedObject as error:
                log.warning("%s: %s", self.name, error)
                gone.append(record)
            except (Permanent, Rejected) as error:
                refused.append(error)
                if len(refused) >= REFUSED_IN_A_ROW:
                    raise
                hint = f"{error.hint}; then {self._backfill(record.window)}"
                total += self.failed(f" {record.window}", Permanent(error.message, hint))
            else:
                given = loaded.new + loaded.already_there + sum(entry.number for entry in entries)
                total += Report(rows=loaded.new)
                total += self.ledger(replace(loaded, counted=given, read=given), *entries)
        if refused and not total.ledger:
            raise refused[0]
        note = f"{self.name}: {total.rows} events of hours since {since} were not in the warehouse: loaded from objects"
        if gone:
            what = f"{len(gone)} hours since {gone[0].window.start:%Y-%m-%dT%H:%MZ} are in no object to load them from"
            span = Window(gone[0].window.start, gone[-1].window.end)
            total += self.failed("", Permanent(what, self._backfill(span)))
        return total + Report(notes=(note,))

    def _backfill(self, span: Window) -> str:
        """The command that pulls a span again."""
        return f"python -m app backfill {self.pull.name} --from {span.start:%Y-%m-%dT%H} --to {span.end:%Y-%m-%dT%H}"

    def _lacking_hours(self) -> Sequence[Record]:
        """The newest hours, oldest first, up to one of which the warehouse has events; none when the newest is one."""
        found = list[tuple[Record, bool | None]]()
        recent_at = self.pull.clock() - QUIET_AFTER
        spans = (Window(recent_at, EVER.end), Window(EVER.start, recent_at))  # the recent ones are usually enough
        for record in (record for span in spans for record in reversed(list(self.records(span).values()))):
            if record.rows and has_landed(record):
                found.append((record, is_there := self._is_known(record)))
                if is_there:  # perhaps only its first events are there
                    break
        return [] if all(is_there is not False for _, is_there in found) else [record for record, _ in reversed(found)]

    def _is_known(self, record: Record) -> bool | None:
        """Whether the warehouse has some of the first events of an object; None when the object cannot be read."""
        try:
            with self.pull.object_hour(self.name, record.window, self.context.stop) as hour:
                tables = next(hour.tables(), None) if hour else None
        except DamagedObject:
            return None
        return None if tables is None else missing_events(self.pull.warehouse.known, tables) < len(uuids_in(tables))

    def _cursor(self, window: Window, mode: PullMode) -> datetime | None:
        """The new cursor after this hour; None while an earlier hour is held."""
        is_behind = any(hour.window.start < window.start for hour, *_ in self._held)
        return window.end if mode is PullMode.LIVE and not is_behind else None

    def _stored(self, hour: PulledHour, had: Record | None, over: str | None) -> Record:
        """Store the object of an hour, if there is something to store; returns the record of what the store holds."""
        key, body = self.pull.key(self.name, hour.window), hour.body
        if body is None and had is not None and had.rows:
            log.warning("%s: the service has no rows of this hour any more; those that were loaded stay", key)
            return had
        wanted = record_of_nothing(hour.window, key, closed=False, digest=hour.digest)
        wanted = replace(wanted, rows=hour.rows, source_cells=hour.rows + hour.refused)
        if body is None:
            return wanted
        wanted = replace(wanted, min_at=hour.window.start, max_at=hour.window.end)
        return store_rows(self.pull.store, body, wanted, pipeline=self.pull.name, over=over)


def _told_by_object(hour: PulledHour, landed: Record, had: Record | None) -> Tally:
    """What happened to rows that are stored only as an object, derived from what the object holds."""
    given = min(landed.rows, hour.rows)
    is_kept = landed.version != "" and landed.digest != hour.digest  # the object held more rows
    new = 0 if is_kept else max(0, landed.rows - (had.rows if had else 0))
    return Tally(new=new, already_there=given - new)
