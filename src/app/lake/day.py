"""A slice of a day: its objects, ordered by device, as a few sorted Parquet files in the table's folder.

Rows flow from object to file in bounded memory. Invariants: each row of a readable object is in exactly one file, and
this is checked by count. Rows of replaced files are kept where no object of their device and window is left. An
unreadable object is set aside and does not block others.
"""

import io
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from app.core.errors import Conflict, Permanent, Rejected, Transient
from app.core.runs import Stop
from app.core.windows import DAY_SECONDS
from app.lake.columns import DEVICE, TIMESTAMP, LakeColumns
from app.lake.plan import DeviceDay, LakeFile, Rewrite, TreeLayout, closed_days, ends_at, file_name
from app.object_store.deltas import named_second, unfolded_deltas
from app.object_store.port import ObjectInfo, ObjectStore, PutRequest
from app.object_store.table_sink import split_nanoseconds

if TYPE_CHECKING:
    from datetime import date

GROUP_ROWS = 64 * 1024
GROUP_CELLS = 2 << 20  # limits the rows of very wide tables
AHEAD, READERS = 16, 4
WHOLE_BYTES = COPY_BYTES = 1 << 20
PARQUET = "application/vnd.apache.parquet"
US = pa.timestamp("us", "UTC")


class SourceMoved(Conflict):
    """An object of the slice changed since it was listed: a later run handles the slice."""


@dataclass(frozen=True, slots=True)
class NewFile:
    """A stored Parquet file; `footer` is its pyarrow metadata."""

    key: str
    day: "date"
    size_bytes: int
    footer: pq.FileMetaData


@dataclass(slots=True)
class Compacted:
    """What was written of a slice.

    `kept_rows`: rows kept although their objects are gone; `damaged`: unreadable files of the table, which may have
    held such rows. `aside`: key and reason of each object that was set aside.
    """

    files: list[NewFile] = field(default_factory=list)
    rows: int = 0
    kept_rows: int = 0
    damaged: int = 0
    aside: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Compaction:
    """Where objects come from and files go. `folder`: the table's folder in the store; `nonce` identifies this run."""

    store: ObjectStore
    prefix: str
    folder: str
    layout: TreeLayout
    spool: Path
    max_bytes: int
    nonce: str

    def run(self, rewrite: Rewrite, columns: LakeColumns, stop: Stop) -> Compacted:
        """Write the files of a slice. Raises SourceMoved when an object changed since the slice was planned."""
        done = Compacted()
        self.spool.mkdir(parents=True, exist_ok=True)
        try:
            with ExitStack() as opened, ThreadPoolExecutor(READERS, thread_name_prefix="lake") as pool:
                parts = FileParts(
                    lambda: opened.enter_context(self._temporary()), rewrite.day, columns, self.max_bytes, done.aside
                )
                self._fill(parts, rewrite, pool, stop, done)
                written = parts.close()
                done.rows = parts.rows
                for number, file in enumerate(written):
                    stop.check()
                    done.files.append(self._put(file, rewrite, len(done.aside), number))
        except OSError as error:  # the store raises our own errors only
            raise Transient(f"{self.spool} cannot be used: {error}"[:300], "make room in DATA_DIR") from error
        if sum(file.footer.num_rows for file in done.files) != done.rows:
            raise Permanent(f"{rewrite.day}: the files have other rows than the objects", "please report it")
        return done

    def _fill(
        self, parts: "FileParts", rewrite: Rewrite, pool: ThreadPoolExecutor, stop: Stop, done: Compacted
    ) -> None:
        covered: dict[str, set[int]] = {}
        seconds = self.layout.window_seconds(rewrite.day)
        old = _KeptRows(self._old_rows(rewrite.replaced, done), covered, seconds)
        member = rewrite.members[0]
        for of, info, body in self._fetched(rewrite.members, pool):
            stop.check()
            if of is not member:
                done.kept_rows += parts.add_kept(old.until(member.device, of.device))
                member = of
            with _readable(info, body, done.aside) as file:
                if file is not None and parts.add(info.key, of.device, file):
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
        listed = list(self.store.list(member.folder))
        found = next(closed_days(listed, self.prefix, self.layout, ends_at(member.day).date()), None)
        if found is None or found.digest != member.digest:
            raise SourceMoved(f"{member.folder} changed while it was read", "no action needed; a later run takes it")

        def head(one: ObjectInfo | str) -> ObjectInfo | None:
            return self.store.head(one if isinstance(one, str) else one.key)

        named = [info for info in listed if named_second(info.key) is not None and info.key.endswith(".parquet")]
        return unfolded_deltas(named, head, window_seconds=self.layout.window_seconds(member.day)).infos

    def _body(self, info: ObjectInfo) -> BinaryIO:
        try:
            with self.store.open(info.key, info.etag) as body:
                if body is None:
                    raise SourceMoved(f"{info.key} is gone", "no action needed; a later run takes it")
                if info.size_bytes <= WHOLE_BYTES:
                    return io.BytesIO(body.read())
                return self._copied(body)
        except Conflict as error:
            raise SourceMoved(error.message, "no action needed; a later run takes it") from error

    def _copied(self, body: BinaryIO) -> BinaryIO:
        file = self._temporary()
        while chunk := body.read(COPY_BYTES):
            file.write(chunk)
        file.seek(0)
        return file

    def _temporary(self) -> BinaryIO:
        """An unnamed file: a killed process leaves nothing behind."""
        return tempfile.TemporaryFile(dir=self.spool)

    def _old_rows(self, files: Sequence[LakeFile], done: Compacted) -> Iterator[pa.Table]:
        """The rows of replaced files, as far as they still exist and can be read."""
        for held in sorted(files, key=lambda file: file.key):
            if held.missing:
                continue
            with self.store.open(held.key) as body:
                if body is None:
                    continue
                with self._copied(body) as copy:
                    try:
                        with pq.ParquetFile(copy) as file:
                            yield from (pa.Table.from_batches([batch]) for batch in file.iter_batches(GROUP_ROWS))
                    except (pa.ArrowException, OSError):
                        done.damaged += 1

    def _put(self, file: BinaryIO, rewrite: Rewrite, aside: int, number: int) -> NewFile:
        key = f"{self.folder}/data/{file_name(rewrite, aside, number, self.nonce)}"
        size_bytes = file.seek(0, 2)
        footer = pq.read_metadata(file)
        file.seek(0)
        self.store.put(key, file, PutRequest(PARQUET))
        return NewFile(key, rewrite.day, size_bytes, footer)


@contextmanager
def _readable(info: ObjectInfo, body: BinaryIO, aside: list[tuple[str, str]]) -> Iterator[pq.ParquetFile | None]:
    """The object's Parquet file; None, with the object set aside, where it is not valid."""
    with body:
        try:
            file = pq.ParquetFile(body)
        except (pa.ArrowException, OSError) as error:
            aside.append((info.key, str(error)[:200]))
            yield None
            return
        with file:
            yield file


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

    Since objects are small, tables with the same schema are collected before they are aligned. `rows` is counted when
    rows are accepted, not when they are written.
    """

    def __init__(
        self,
        opened: Callable[[], BinaryIO],
        day: "date",
        columns: LakeColumns,
        max_bytes: int,
        aside: list[tuple[str, str]],
    ) -> None:
        self._opened, self._columns, self._max_bytes, self._aside = opened, columns, max_bytes, aside
        self._end_us = round(ends_at(day).timestamp() * 1_000_000)
        self._files: list[BinaryIO] = []
        self._writer: pq.ParquetWriter | None = None
        self._waiting: list[tuple[str, pa.Table]] = []
        self._waiting_rows = 0
        self.rows = 0

    def add(self, key: str, device: str, file: pq.ParquetFile) -> bool:
        """Add all rows of an object; False when it was set aside."""
        size = _group_rows(max(file.metadata.num_columns, len(self._columns.kinds)))
        if file.metadata.num_rows > size:
            for table in _pieces(key, device, file, size):
                self._gather("", table)
        else:
            try:
                table = _of_device(file.read(), device)
            except (Rejected, pa.ArrowException, OSError) as error:
                self._aside.append((key, str(error)[:200]))
                return False
            self._gather(key, table)
        self.rows += file.metadata.num_rows
        return True

    def add_kept(self, tables: Iterator[pa.Table]) -> int:
        """Add rows of a file of the table. Returns their number."""
        rows = 0
        for table in tables:
            rows += table.num_rows
            self._gather("", table.replace_schema_metadata())
        self.rows += rows
        return rows

    def _gather(self, key: str, table: pa.Table) -> None:
        if self._waiting and not self._waiting[0][1].schema.equals(table.schema):
            self._flush()
        self._waiting.append((key, table))
        self._waiting_rows += table.num_rows
        if self._waiting_rows >= _group_rows(max(table.num_columns, len(self._columns.kinds))):
            self._flush()

    def _flush(self) -> None:
        """Write the collected tables. If that fails, write each object alone, to find the faulty one."""
        waiting, self._waiting, self._waiting_rows = self._waiting, [], 0
        if not waiting:
            return
        try:
            self._write(pa.concat_tables([table for _, table in waiting]))
        except (Rejected, pa.ArrowException) as error:
            if len(waiting) == 1:
                key, table = waiting[0]
                if not key:
                    raise Permanent(f"rows cannot be taken: {error}", "move the object away") from error
                self._aside.append((key, str(error)[:200]))
                self.rows -= table.num_rows
                return
            for one in waiting:
                self._waiting = [one]
                self._flush()

    def _write(self, table: pa.Table) -> None:
        table, changed = self._shaped(table)
        if changed or (self._files and self._files[-1].tell() >= self._max_bytes):
            self._end_part()
        if self._writer is None:
            self._files.append(self._opened())
            self._stream = pa.BufferedOutputStream(pa.PythonFile(self._files[-1], mode="w"), COPY_BYTES)
            self._writer = pq.ParquetWriter(self._stream, table.schema, compression="zstd", compression_level=1)
        self._writer.write_table(table, row_group_size=GROUP_ROWS)

    def _shaped(self, table: pa.Table) -> tuple[pa.Table, bool]:
        """The rows with the columns of the table, and whether columns changed. Raises Rejected or ArrowException."""
        table = self._in_microseconds(table)
        targets, changed = self._columns.take(table.schema)
        schema = self._columns.schema()
        columns = []
        for name, kind in zip(schema.names, schema.types, strict=True):
            if name not in targets:
                columns.append(pa.nulls(table.num_rows, kind))
                continue
            column = table[targets[name]]
            columns.append(column if column.type == kind else column.cast(kind))
        return pa.Table.from_arrays(columns, schema=schema), changed

    def _in_microseconds(self, table: pa.Table) -> pa.Table:
        index = table.schema.get_field_index(TIMESTAMP)
        kind = table.schema.field(index).type if index >= 0 else None
        if kind is None or not pa.types.is_timestamp(kind):
            raise Rejected(f"column timestamp is {kind}", "write it as a timestamp")
        if kind.tz is None:
            table = table.set_column(index, TIMESTAMP, pc.assume_timezone(table[TIMESTAMP], "UTC"))
        if kind.unit == "ns":
            table = split_nanoseconds(
                table.set_column(index, TIMESTAMP, table[TIMESTAMP].cast(pa.timestamp("ns", "UTC"))), with_nanos=True
            )
        elif kind.unit != "us":
            table = table.set_column(index, TIMESTAMP, table[TIMESTAMP].cast(US))
        span = pc.min_max(table[TIMESTAMP].cast(pa.int64())).as_py()
        if table[TIMESTAMP].null_count or (
            table.num_rows and not self._end_us - DAY_SECONDS * 1_000_000 <= span["min"] <= span["max"] < self._end_us
        ):
            raise Rejected("a row lies outside its day, or has no timestamp", "move the object away")
        return table

    def _end_part(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._stream.detach()  # closing it would also close the file
            self._writer = None

    def close(self) -> list[BinaryIO]:
        """All files; an empty one if there is none, so that the slice is not retried."""
        self._flush()
        if not self._files:
            self._write(self._columns.schema().empty_table())
        self._end_part()
        return self._files


def _group_rows(columns: int) -> int:
    return max(1, min(GROUP_ROWS, GROUP_CELLS // columns))


def _pieces(key: str, device: str, file: pq.ParquetFile, rows: int) -> Iterator[pa.Table]:
    """A large object in tables of at most `rows` rows. Some may already be written when a later one cannot be read."""
    try:
        for batch in file.iter_batches(rows):
            yield _of_device(pa.Table.from_batches([batch]), device)
    except (Rejected, pa.ArrowException, OSError) as error:
        raise Permanent(f"{key} cannot be read: {error}"[:300], "restore an earlier version of it") from error


def _of_device(table: pa.Table, device: str) -> pa.Table:
    """The table with the device from the key, which later shows whose rows these are. Raises Rejected."""
    table = table.replace_schema_metadata()
    index = table.schema.get_field_index(DEVICE)
    if index < 0:
        return table.append_column(DEVICE, pa.repeat(pa.scalar(device), table.num_rows))
    found = pc.unique(table[DEVICE]).to_pylist()
    if found not in ([device], []):
        raise Rejected(f"device_id is {found[:3]}, and its key says {device!r}", "write it below the key of its device")
    return table
