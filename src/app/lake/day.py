"""A run of the lake day: closed days become files of the table, in one commit.

A slice of a day is its objects, ordered by device, as a few sorted Parquet files in the table's folder. Rows flow from
object to file in bounded memory. Invariants: each row of a readable object is in exactly one file, and this is checked
by count. Rows of replaced files are kept where no object of their device and window is left. An unreadable object is
set aside and does not block others.
"""

import io
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from shutil import copyfileobj
from time import monotonic
from typing import TYPE_CHECKING, BinaryIO
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from app.core.errors import Conflict, Permanent, Rejected, Transient
from app.core.files import temporary_file
from app.core.ledger import SetAside, Tally, ledger_of
from app.core.runs import Context, Failure, Report
from app.core.windows import DAY_SECONDS
from app.lake.columns import DEVICE, TIMESTAMP, LakeColumns
from app.lake.plan import DeviceDay, LakeFile, Rewrite, TreeLayout, closed_days, ends_at, file_name, plan
from app.object_store.deltas import named_second, unfolded_deltas
from app.object_store.port import ObjectInfo, PutRequest
from app.object_store.table_sink import split_nanoseconds

if TYPE_CHECKING:
    from app.lake.job import LakeDay
    from app.lake.table import LakeTable

GROUP_ROWS = 64 * 1024
GROUP_CELLS = 2 << 20  # limits the rows of very wide tables
AHEAD, READERS = 16, 4
CHECK_EVERY_SECONDS, CHECK_BYTES = 7 * 86_400.0, 1 << 30  # or, of a large table, this much a run
UNREADABLE = "object that the table cannot take"
IS_CSV = "CSV object: the table takes Parquet"
WHOLE_BYTES = COPY_BYTES = 1 << 20
PARQUET = "application/vnd.apache.parquet"
US = pa.timestamp("us", "UTC")
UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


class SourceMoved(Conflict):
    """An object of the slice changed since it was listed: a later run handles the slice."""


class PartlyTaken(Exception):
    """An object whose first rows are in the files already cannot be taken: `key` and `reason`."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(key, reason)
        self.key, self.reason = key, reason


@dataclass(frozen=True, slots=True)
class NewFile:
    """A stored Parquet file; `footer` is its pyarrow metadata."""

    key: str
    day: date
    size_bytes: int
    footer: pq.FileMetaData


@dataclass(slots=True)
class Compacted:
    """What was written of a slice.

    `kept_rows`: rows kept although their objects are gone; `damaged`: unreadable files of the table, which may have
    held such rows. `aside`: key -> reason of each object that was set aside.
    """

    files: list[NewFile] = field(default_factory=list)
    rows: int = 0
    kept_rows: int = 0
    damaged: int = 0
    aside: dict[str, str] = field(default_factory=dict)


class LakeRun:
    """One run of `job` over a table that is loaded. `layout` is that of the objects."""

    def __init__(self, job: "LakeDay", table: "LakeTable", layout: TreeLayout, context: Context) -> None:
        self._settings, self._store, self._table, self._layout = job.settings, job.store, table, layout
        self._context, self._run_seconds, self._max_bytes = context, job.run_seconds, job.max_bytes
        self._prefix, self._spool = job.settings.s3.prefix, job.settings.service.data_dir / "spool"

    def report(self) -> Report:
        """Bring the table up to the objects, in one commit."""
        context, table, prefix = self._context, self._table, self._prefix
        files = self._checked(table.files())
        lake = self._settings.lake
        wait = timedelta(seconds=self._settings.export.grace_seconds, hours=lake.wait_hours)
        listed = self._store.list(f"{prefix}/")
        days = list(closed_days(listed, prefix, self._layout, (context.now_at - wait).date()))
        made = plan(days, files, self._max_bytes)
        notes = list(table.notes)
        if missing := sum(file.missing for file in files):
            notes.append(f"{missing} files of the table are gone or damaged")
        aside: dict[str, str] = {}
        if context.dry_run:
            tally = Tally(waiting=sum(rewrite.objects for rewrite in made.rewrites))
            report = Report(notes=[f"would write {len(made.rewrites)} slices"])
        else:
            report, tally, aside = self._write(made.rewrites)
            if removed := table.expire(context.clock(), timedelta(days=lake.snapshot_days)):
                notes.append(f"{removed} old files removed")
        csv = sum(one.csv for one in days)
        tally += Tally(counted=csv + sum(one.objects for one in days), already_there=made.kept - made.kept_aside)
        reasons = [
            SetAside(UNREADABLE, made.kept_aside + len(aside), len(aside), ": ".join(next(iter(aside.items()), ()))),
            SetAside(IS_CSV, csv),
        ]
        ledger = ledger_of(tally, *(one for one in reasons if one.number), unit="objects")
        return replace(report, ledger=ledger, notes=(*notes, *report.notes))

    def _checked(self, files: Sequence[LakeFile]) -> Sequence[LakeFile]:
        """The files of the table. Each is read whole about once a week, in turn, since the listing does not show damage
        that leaves the size as it was.
        """
        seconds, size_bytes = self._settings.lake.interval_seconds, sum(file.entry.file_size_in_bytes for file in files)
        turns = int(max(1, CHECK_EVERY_SECONDS // seconds, size_bytes // CHECK_BYTES))
        turn = int(self._context.now_at.timestamp() // seconds) % turns

        def is_damaged(file: LakeFile) -> bool:
            if crc32(file.key.encode()) % turns != turn:
                return False
            try:
                deque(self._rows_of(file), maxlen=0)
            except (pa.ArrowException, OSError):
                return True
            return False

        return [replace(file, missing=file.missing or is_damaged(file)) for file in files]

    def _write(self, rewrites: Sequence[Rewrite]) -> tuple[Report, Tally, dict[str, str]]:
        """Write the slices and commit them together. A slice that fails waits and does not block others.

        Returns what became of their objects as well, and the reason for each that was set aside.
        """
        context, columns, done_until = self._context, self._table.columns(), monotonic() + self._run_seconds
        new: list[NewFile] = []
        replaced: list[LakeFile] = []
        failures: list[Failure] = []
        aside: dict[str, str] = {}
        tally, rows, kept_rows, moved, damaged = Tally(), 0, 0, 0, 0
        context.progress.advance(total=len(rewrites))
        for number, rewrite in enumerate(rewrites):
            if new and monotonic() > done_until:
                tally += Tally(waiting=sum(one.objects for one in rewrites[number:]))
                break
            try:
                done = self._compacted(rewrite, columns)
            except (Transient, Permanent, Rejected, SourceMoved) as error:
                tally += Tally(waiting=rewrite.objects)
                if isinstance(error, SourceMoved):
                    moved += 1
                else:
                    failures.append(Failure(rewrite.day.isoformat(), error.message, error.hint))
                continue
            good = rewrite.objects - len(done.aside)
            tally += Tally(read=good, corrected=good) if rewrite.replaced else Tally(read=good, new=good)
            new += done.files
            replaced += rewrite.replaced
            aside |= done.aside
            rows, kept_rows, damaged = rows + done.rows, kept_rows + done.kept_rows, damaged + done.damaged
            context.progress.advance(done=1, rows=done.rows)
        if new:
            context.stop.check()
            self._table.commit(columns, new, replaced)
        told = (
            (moved, "slices changed while they were read: the next run takes them"),
            (damaged, "files of the table cannot be read: their days are re-created from the objects"),
            (kept_rows, "rows are kept whose objects are gone"),
        )
        report = Report(
            rows=rows,
            bytes=sum(file.size_bytes for file in new),
            windows=len(new),
            failures=failures,
            more=monotonic() > done_until and bool(tally.waiting),
            notes=[f"{count} {what}" for count, what in told if count],
        )
        return report, tally, aside

    def _compacted(self, rewrite: Rewrite, columns: LakeColumns) -> Compacted:
        """Write the files of a slice. Raises SourceMoved when an object changed since the slice was planned."""
        unfit: dict[str, str] = {}  # the objects that an attempt could not take, with the reason
        while True:
            try:
                return self._attempt(rewrite, columns, unfit)
            except PartlyTaken as error:  # rare: it is a large object, or has a value that its type allows
                unfit[error.key] = error.reason[:200]
            except OSError as error:  # the store raises our own errors only
                raise Transient(f"{self._spool} cannot be used: {error}"[:300], "free space in DATA_DIR") from error

    def _attempt(self, rewrite: Rewrite, columns: LakeColumns, unfit: Mapping[str, str]) -> Compacted:
        done = Compacted(aside=dict(unfit))
        with ExitStack() as opened, ThreadPoolExecutor(READERS, thread_name_prefix="lake") as pool:
            parts = FileParts(
                lambda: opened.enter_context(temporary_file(self._spool)),
                rewrite.day,
                columns,
                self._max_bytes,
                done.aside,
            )
            try:
                self._fill(parts, rewrite, pool, done)
                written = parts.close()
            finally:
                parts.end_part()
            done.rows = parts.rows
            for number, file in enumerate(written):
                self._context.stop.check()
                done.files.append(self._put(file, rewrite, len(done.aside), number))
        if sum(file.footer.num_rows for file in done.files) != done.rows:
            raise Permanent(f"{rewrite.day}: the files have other rows than the objects", "please report it")
        return done

    def _fill(self, parts: "FileParts", rewrite: Rewrite, pool: ThreadPoolExecutor, done: Compacted) -> None:
        covered: dict[str, set[int]] = {}
        seconds = self._layout.window_seconds(rewrite.day)
        old = _KeptRows(self._old_rows(rewrite.replaced, done), covered, seconds)
        member = rewrite.members[0]
        for of, info, body in self._fetched(rewrite.members, pool):
            self._context.stop.check()
            if of is not member:
                done.kept_rows += parts.add_kept(old.until(member.device, of.device))
                member = of
            with body:
                if info.key not in done.aside and parts.add(info.key, of.device, body):
                    covered.setdefault(of.device, set()).add((named_second(info.key) or 0) // seconds)
        done.kept_rows += parts.add_kept(old.until(member.device, None))

    def _fetched(
        self, members: Sequence[DeviceDay], pool: ThreadPoolExecutor
    ) -> Iterator[tuple[DeviceDay, ObjectInfo, BinaryIO]]:
        """Each object of the slice, in order, with a few read ahead; large ones are in temporary files."""
        waiting: deque[tuple[DeviceDay, ObjectInfo, Future[BinaryIO]]] = deque()
        for member, infos in zip(members, pool.map(self._listed, members), strict=True):
            for info in infos:
                waiting.append((member, info, pool.submit(self._body, info)))
                if len(waiting) > AHEAD:
                    of, first, body = waiting.popleft()
                    yield of, first, body.result()
        for of, first, body in waiting:
            yield of, first, body.result()

    def _listed(self, member: DeviceDay) -> Sequence[ObjectInfo]:
        """The Parquet objects of a device day, without deltas whose rows are also in another object."""
        listed = list(self._store.list(member.folder))
        found = next(closed_days(listed, self._prefix, self._layout, ends_at(member.day).date()), None)
        if found is None or found.digest != member.digest:
            raise SourceMoved(f"{member.folder} changed while it was read", "no action needed; a later run takes it")

        def head(one: ObjectInfo | str) -> ObjectInfo | None:
            return self._store.head(one if isinstance(one, str) else one.key)

        named = [info for info in listed if named_second(info.key) is not None and info.key.endswith(".parquet")]
        return unfolded_deltas(named, head, window_seconds=self._layout.window_seconds(member.day)).infos

    def _body(self, info: ObjectInfo) -> BinaryIO:
        try:
            with self._store.open(info.key, info.etag) as body:
                if body is None:
                    raise SourceMoved(f"{info.key} is gone", "no action needed; a later run takes it")
                if info.size_bytes <= WHOLE_BYTES:
                    return io.BytesIO(body.read())
                return self._copied(body)
        except Conflict as error:
            raise SourceMoved(error.message, "no action needed; a later run takes it") from error

    def _copied(self, body: BinaryIO) -> BinaryIO:
        file = temporary_file(self._spool)
        copyfileobj(body, file, COPY_BYTES)
        file.seek(0)
        return file

    def _old_rows(self, files: Sequence[LakeFile], done: Compacted) -> Iterator[pa.Table]:
        """The rows of replaced files, as far as they still exist and can be read."""
        for held in sorted(files, key=lambda file: file.key):
            try:
                yield from self._rows_of(held)
            except (pa.ArrowException, OSError):
                done.damaged += 1

    def _rows_of(self, held: LakeFile) -> Iterator[pa.Table]:
        """The rows of a file of the table; none if it is gone. Raises ArrowException or OSError if it is damaged."""
        with self._store.open(held.key) as body:
            if body is None:
                return
            with self._copied(body) as copy, pq.ParquetFile(copy, page_checksum_verification=True) as file:
                yield from (pa.Table.from_batches([batch]) for batch in file.iter_batches(GROUP_ROWS))

    def _put(self, file: BinaryIO, rewrite: Rewrite, aside: int, number: int) -> NewFile:
        nonce = self._context.run_id[:12]
        key = f"{self._table.folder}/data/{file_name(rewrite, aside, number, nonce)}"
        size_bytes = file.seek(0, 2)
        footer = pq.read_metadata(file)
        file.seek(0)
        self._store.put(key, file, PutRequest(PARQUET))
        return NewFile(key, rewrite.day, size_bytes, footer)


class _KeptRows:
    """Rows of the replaced files that no object covers, by device, read in step with the objects."""

    def __init__(self, tables: Iterator[pa.Table], covered: dict[str, set[int]], window_seconds: int) -> None:
        self._runs = (run for table in tables for run in _by_device(table))
        self._covered = covered
        self._window_us = window_seconds * 1_000_000
        self._next: tuple[str, pa.Table] | None = next(self._runs, None)

    def until(self, done: str, device: str | None) -> Iterator[pa.Table]:
        """Uncovered rows of the device `done`, whose objects were read, and of all devices before `device`."""
        while self._next is not None:
            own, table = self._next
            if device is not None and own != done and own.encode() >= device.encode():
                return
            if left := self._uncovered(own, table):
                yield left
            self._next = next(self._runs, None)

    def _uncovered(self, device: str, table: pa.Table) -> pa.Table:
        covered = self._covered.get(device)
        if not covered:
            return table
        instants = table[TIMESTAMP].cast(pa.int64()).to_numpy()
        windows = instants % (DAY_SECONDS * 1_000_000) // self._window_us
        return table.filter(pa.array(~np.isin(windows, list(covered))))


def _by_device(table: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    """Consecutive rows of the same device."""
    devices = table[DEVICE].combine_chunks().dictionary_encode()
    codes = devices.indices.to_numpy()
    starts = [0, *(np.flatnonzero(np.diff(codes)) + 1).tolist()] if len(codes) else []
    for start, end in zip(starts, [*starts[1:], len(codes)], strict=True):
        yield str(devices[start].as_py()), table.slice(start, end - start)


class FileParts:
    """The files of a slice on the local disk. A new file starts when columns are added or one is large enough.

    Since objects are small, tables with the same schema are collected before they are aligned. `aside`: key -> reason
    of each object that is left out.
    """

    def __init__(
        self,
        opened: Callable[[], BinaryIO],
        day: date,
        columns: LakeColumns,
        max_bytes: int,
        aside: dict[str, str],
    ) -> None:
        self._opened, self._columns, self._max_bytes, self._aside = opened, columns, max_bytes, aside
        self._end_seconds = round(ends_at(day).timestamp())
        self._files: list[BinaryIO] = []
        self._writer: pq.ParquetWriter | None = None
        self._fitting: pa.Schema | None = None
        self._waiting: list[tuple[str, pa.Table]] = []
        self._waiting_rows = 0
        self.rows = 0

    def add(self, key: str, device: str, body: BinaryIO) -> bool:
        """Add all rows of an object; False when it is set aside. Raises PartlyTaken."""
        rows = 0
        try:
            with pq.ParquetFile(body) as file:
                self._check_columns(file.schema_arrow)
                for table in _tables(file, _group_rows(max(file.metadata.num_columns, len(self._columns.kinds)))):
                    self._gather(key, self._checked(table, device))
                    rows += table.num_rows
        except (Rejected, pa.ArrowException, OSError) as error:
            if rows:
                raise PartlyTaken(key, str(error)) from error
            self._aside[key] = str(error)[:200]
            return False
        self.rows += rows
        return True

    def add_kept(self, tables: Iterator[pa.Table]) -> int:
        """Add rows of a file of the table. Returns their number."""
        rows = 0
        for table in tables:
            rows += table.num_rows
            self._gather("", table.replace_schema_metadata())
        self.rows += rows
        return rows

    def _check_columns(self, schema: pa.Schema) -> None:
        """Raises Rejected or ArrowException for columns that the table cannot hold. Most objects have known ones."""
        if self._fitting is None or not self._fitting.equals(schema):
            if repeated := sorted({name for name in schema.names if schema.names.count(name) > 1}):
                raise Rejected(f"several columns are named {', '.join(repeated)}", "rename them at their writer")
            self._shaped(schema.empty_table())
            self._fitting = schema

    def _checked(self, table: pa.Table, device: str) -> pa.Table:
        """The table with the device from the key, which later shows whose rows these are. Raises Rejected."""
        table = table.replace_schema_metadata()
        instants = table[TIMESTAMP]
        span, units = pc.min_max(instants), UNITS[instants.type.unit]
        first, end = ((self._end_seconds - before) * units for before in (DAY_SECONDS, 0))
        if instants.null_count or (table.num_rows and not first <= span["min"].value <= span["max"].value < end):
            raise Rejected("a row lies outside its day, or has no timestamp", "move the object away")
        if DEVICE not in table.schema.names:
            return table.append_column(DEVICE, pa.repeat(pa.scalar(device), table.num_rows))
        found = pc.unique(table[DEVICE]).to_pylist()
        if found not in ([device], []):
            raise Rejected(
                f"device_id is {found[:3]}, and its key says {device!r}", "write it below the key of its device"
            )
        return table

    def _gather(self, key: str, table: pa.Table) -> None:
        if self._waiting and not self._waiting[0][1].schema.equals(table.schema):
            self._flush()
        self._waiting.append((key, table))
        self._waiting_rows += table.num_rows
        if self._waiting_rows >= _group_rows(max(table.num_columns, len(self._columns.kinds))):
            self._flush()

    def _flush(self) -> None:
        """Write the collected tables. Raises PartlyTaken for one with a value that the table cannot hold."""
        waiting, self._waiting, self._waiting_rows = self._waiting, [], 0
        if not waiting:
            return
        try:
            self._write(pa.concat_tables([table for _, table in waiting]))
        except (Rejected, pa.ArrowException) as error:
            faulty = next((key for key, table in waiting if not self._fits(table)), "")
            if not faulty:
                raise Permanent(f"rows cannot be taken: {error}", "move the object away") from error
            raise PartlyTaken(faulty, str(error)) from error

    def _fits(self, table: pa.Table) -> bool:
        try:
            self._shaped(table)
        except (Rejected, pa.ArrowException):
            return False
        return True

    def _write(self, table: pa.Table) -> None:
        table = self._shaped(table)
        if self._writer and (not self._writer.schema.equals(table.schema) or self._files[-1].tell() >= self._max_bytes):
            self.end_part()
        if self._writer is None:
            self._files.append(self._opened())
            self._stream = pa.BufferedOutputStream(pa.PythonFile(self._files[-1], mode="w"), COPY_BYTES)
            self._writer = pq.ParquetWriter(
                self._stream, table.schema, compression="zstd", compression_level=1, write_page_checksum=True
            )
        self._writer.write_table(table, row_group_size=GROUP_ROWS)

    def _shaped(self, table: pa.Table) -> pa.Table:
        """The rows with the columns of the table, which may get more. Raises Rejected or ArrowException."""
        table = _in_microseconds(table)
        targets = self._columns.take(table.schema)
        schema = self._columns.schema()
        columns = []
        for name, kind in zip(schema.names, schema.types, strict=True):
            if name not in targets:
                columns.append(pa.nulls(table.num_rows, kind))
                continue
            column = table[targets[name]]
            columns.append(column if column.type == kind else column.cast(kind))
        return pa.Table.from_arrays(columns, schema=schema)

    def end_part(self) -> None:
        """End the file that is being written, also after an error. Idempotent."""
        if self._writer is not None:
            self._writer.close()
            self._stream.detach()  # closing it would also close the file
            self._writer = None

    def close(self) -> list[BinaryIO]:
        """All files; an empty one if there is none, so that the slice is not retried."""
        self._flush()
        if not self._files:
            self._write(self._columns.schema().empty_table())
        self.end_part()
        return self._files


def _group_rows(columns: int) -> int:
    return max(1, min(GROUP_ROWS, GROUP_CELLS // columns))


def _tables(file: pq.ParquetFile, rows: int) -> Iterator[pa.Table]:
    """The rows of an object: at once, or if it is large in tables of at most `rows` rows."""
    if file.metadata.num_rows <= rows:
        yield file.read()
        return
    for batch in file.iter_batches(rows):
        yield pa.Table.from_batches([batch])


def _in_microseconds(table: pa.Table) -> pa.Table:
    """The rows with UTC timestamps; digits below the microsecond become a column of their own. Raises Rejected."""
    index = table.schema.get_field_index(TIMESTAMP)
    kind = table.schema.field(index).type if index >= 0 else None
    if kind is None or not pa.types.is_timestamp(kind):
        raise Rejected(f"column timestamp is {kind}", "write it as a timestamp")
    if kind.tz is None:
        table = table.set_column(index, TIMESTAMP, pc.assume_timezone(table[TIMESTAMP], "UTC"))
    if kind.unit == "ns":
        return split_nanoseconds(
            table.set_column(index, TIMESTAMP, table[TIMESTAMP].cast(pa.timestamp("ns", "UTC"))), with_nanos=True
        )
    return table.set_column(index, TIMESTAMP, table[TIMESTAMP].cast(US))
