"""The shared sink of the pipelines that write rows as objects: Parquet or CSV, one object per window and part.

Key: `{prefix}/device_id={id}/date={date}/export_{HHMMSS}.{parquet|csv}`, all UTC, HHMMSS being the start of the window;
deltas, which older versions wrote for late rows, take the seconds after it. Invariants: the key depends on partition,
window and part alone; an object is replaced only while it is the version that was read; metadata holds digest and row
count of its content.
"""

import csv
import io
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from app.core.errors import Conflict, Permanent, Rejected
from app.core.files import temporary_file
from app.core.pipeline import ALL_TAGS, SOME_TAGS, Batch, Objects, ObjectState
from app.core.windows import Window
from app.db.checkpoints import Layout
from app.object_store.deltas import (
    check_device,
    named_second,
    state_from_metadata,
    unfolded_deltas,
    window_from_metadata,
)
from app.object_store.port import STORAGE_CLASS, ObjectInfo, ObjectStore, PutRequest, check_key
from app.object_store.row_digest import one_array

ROW_GROUP_ROWS = 128 * 1024
MEMORY_BYTES = 4 << 20
CSV_BLOCK_BYTES = 1 << 20
WRITE_BYTES = 1 << 18
TIMESTAMP, NANOS = "timestamp", "timestamp_nanos"
CSV_ROWS = {b"headwater.format": b"csv"}
"""Schema metadata of rows read from a CSV object, where every value but the timestamp is text."""
LOST_TAGS = {b"headwater.lost-tags": b"yes"}
"""Schema metadata of rows from an object without the mark `tags: all`: older versions dropped all but two tags."""
CONTENT_TYPES = {"parquet": "application/vnd.apache.parquet", "csv": "text/csv; charset=utf-8"}


class TableBatch(Batch, Protocol):
    """A batch that can be written as a table."""

    def output_schema(self, unit: str) -> pa.Schema:
        """Columns of the object, in order; the timestamp in this unit, "ns" or "us": see `stored_schema`."""

    @property
    def has_all_tags(self) -> bool:
        """False if it contains rows of an older version, which lost tags."""

    def output(self, unit: str) -> Iterator[pa.Table]:
        """The rows with `output_schema(unit)`, in order, in tables of moderate size."""


class TableSummary(Protocol):
    """Sums over the rows of an object, taken while they are written."""

    def add(self, table: pa.Table) -> None:
        """Add rows as they are written, sorted by their timestamps."""

    def facts(self, key: str, etag: str, size_bytes: int) -> Any:
        """The facts about the object in its new version; None for none."""


@dataclass(frozen=True, slots=True)
class EncodedFile:
    """An object's bytes in memory or an unnamed temporary file, with its metadata."""

    file: BinaryIO
    size_bytes: int
    content_type: str
    metadata: Mapping[str, str]
    sums: "TableSummary | None" = None

    @property
    def write(self) -> str:
        """See `app.core.pipeline.Encoded.write`."""
        return self.metadata.get("write", "")

    def close(self) -> None:
        """Remove the file. Idempotent."""
        self.file.close()


@dataclass(frozen=True, slots=True)
class TableSink:
    """`app.core.pipeline.Sink` for tables on an object store. `layout_at` gives the layout of a window's start.

    `run` and a counter put a unique id of each write into the bytes, so that no two writes share a version. `cursors`:
    what was committed for each partition when the run began, from which a lost cursor can be recovered. `summed(schema,
    format)` creates the summary of an object's rows.
    """

    store: ObjectStore
    pipeline: str
    prefix: str
    layout_at: Callable[[datetime], Layout]
    spool_directory: Path
    app_version: str
    dictionary: tuple[str, ...] = ()
    run: str = ""
    cursors: Mapping[str, datetime] = field(default_factory=dict)
    storage_class: str = ""
    summed: Callable[[pa.Schema, str], TableSummary] | None = None
    writes: Iterator[int] = field(default_factory=count)

    def key(self, partition: str, window: Window, part: int) -> str:
        """See the module. Raises Rejected for a partition that cannot be part of a key, or when no second is left."""
        check_device(partition, self.store)
        layout = self.layout_at(window.start)
        named_at = window.start + timedelta(seconds=part)
        if named_at >= window.end:
            raise Rejected(
                f"{partition} {window} has no name left for delta {part}", "export the window again elsewhere"
            )
        day = window.start.strftime(layout.date_format)
        name = f"device_id={partition}/date={day}/export_{named_at:%H%M%S}.{layout.format}"
        return check_key(f"{self.prefix}/{name}" if self.prefix else name)

    def listed(self, partition: str, window: Window) -> Iterator[tuple[datetime, ObjectInfo]]:
        """Every object of the partition on the day of `window`, with the time in its name. One listing."""
        folder = self.key(partition, window, 0).rpartition("/")[0]
        midnight = window.start.replace(hour=0, minute=0, second=0, microsecond=0)
        for info in self.store.list(f"{folder}/"):
            second = named_second(info.key)
            if second is not None and info.key.rpartition("/")[0] == folder:
                yield midnight + timedelta(seconds=second), info

    def unfolded(self, partition: str, window: Window) -> Sequence[tuple[datetime, ObjectInfo]]:
        """The same without deltas whose rows the object of their window holds."""
        listed = list(self.listed(partition, window))
        named = {info.key: named_at for named_at, info in listed}
        seconds = self.layout_at(window.start).window_seconds
        left = unfolded_deltas(
            (info for _, info in listed),
            lambda one: self.store.head(one if isinstance(one, str) else one.key),
            window_seconds=seconds,
        )
        return [(named[info.key], info) for info in left.infos]

    def objects(self, partition: str, windows: Sequence[Window]) -> Mapping[datetime, Objects]:
        """See `app.core.pipeline.Deltas`: deltas are named by the seconds after the window's start."""
        days = {window.start.date(): window for window in windows}.values()
        return by_window((each for day in days for each in self.listed(partition, day)), windows)

    def noted(self, encoded: EncodedFile, folded: int) -> EncodedFile:
        """See `app.core.pipeline.Deltas`."""
        return replace(encoded, metadata={**encoded.metadata, "folded": str(folded)})

    def delete(self, key: str) -> None:
        """See `app.core.pipeline.Deltas`."""
        self.store.delete(key)

    def head(self, key: str) -> ObjectState | None:
        """The current object, with its writer's metadata; a copy of another window's object has none."""
        info = self.store.head(key)
        if info is None:
            return None
        second, noted = named_second(key), window_from_metadata(info)
        # An object copied here from another window still has that window's digest and rows in its metadata.
        is_own = second is not None and noted is not None and noted[0] <= second < noted[1]
        return state_from_metadata(info) if is_own else ObjectState(info.etag, size_bytes=info.size_bytes)

    def read(self, key: str, version: str) -> Iterator[pa.Table]:
        """The rows of that version, in order, from a local copy, since Parquet is read from its end.

        Timestamps are in nanoseconds, whatever unit the object has. See LOST_TAGS and CSV_ROWS.
        """
        with closing(temporary_file(self.spool_directory, MEMORY_BYTES)) as file:
            with self.store.open(key, version) as body:
                if body is None:
                    raise Conflict(f"{key} is gone", "no action needed; the window is re-read")
                while chunk := body.read(CSV_BLOCK_BYTES):
                    file.write(chunk)
            file.seek(0)
            if key.endswith(".parquet"):
                yield from _readable(key, _parquet_tables(file))
            else:
                # A CSV object has no schema, so its tags are noted in its metadata.
                held = self.head(key)
                mark = CSV_ROWS if held and held.tags == ALL_TAGS else {**CSV_ROWS, **LOST_TAGS}
                for table in _readable(key, _csv_tables(file)):
                    yield table.replace_schema_metadata(mark)

    def encode(self, partition: str, window: Window, batch: TableBatch, *, summarises: bool = True) -> EncodedFile:
        """Write the batch to memory, above MEMORY_BYTES to a temporary file. In Parquet each write is unique."""
        layout = self.layout_at(window.start)
        metadata = {
            "pipeline": self.pipeline,
            "window": str(window),
            "rows": str(batch.rows),
            "digest": batch.digest,
            "app-version": self.app_version,
            "timestamp-unit": layout.timestamp_unit,
            "tags": ALL_TAGS if batch.has_all_tags else SOME_TAGS,
            "write": f"{self.run}:{next(self.writes)}",
            **({"cursor": f"{self.cursors[partition]:%Y-%m-%dT%H:%M:%SZ}"} if partition in self.cursors else {}),
        }
        file = temporary_file(self.spool_directory, MEMORY_BYTES)
        with ExitStack() as undo:
            undo.callback(file.close)
            unit = layout.timestamp_unit if layout.format == "parquet" else "ns"
            schema = batch.output_schema(unit)
            sums = self.summed(schema, layout.format) if self.summed and summarises else None

            def rows() -> Iterator[pa.Table]:
                for table in batch.output(unit):
                    if sums is not None:
                        sums.add(table)
                    yield table

            if layout.format == "parquet":
                described = {f"headwater.{name}": value for name, value in {**metadata, "partition": partition}.items()}
                _write_parquet(file, rows(), schema.with_metadata(described), self.dictionary)
            else:
                _write_csv(file, schema.names, rows())
            size_bytes = file.seek(0, 2)
            undo.pop_all()
        return EncodedFile(file, size_bytes, CONTENT_TYPES[layout.format], metadata, sums)

    def put(self, key: str, encoded: EncodedFile, expected: str | None, *, closing: bool = False) -> str:
        """Compare-and-swap: see `app.core.pipeline.Sink`. Only a closing write uses `storage_class`: stores bill at
        least thirty days for an object of another class, and an open window is replaced every minute.
        """
        encoded.file.seek(0)
        headers = {STORAGE_CLASS: self.storage_class} if closing and self.storage_class else {}
        return self.store.put(
            key, encoded.file, PutRequest(encoded.content_type, encoded.metadata, expected or "", headers)
        )


def by_window(listed: Iterable[tuple[datetime, ObjectInfo]], windows: Sequence[Window]) -> Mapping[datetime, Objects]:
    """The listing of `TableSink.listed`, grouped by the starts of these windows, which are in order."""
    starts = [window.start for window in windows]
    found: dict[datetime, dict[int, tuple[str, str]]] = {}
    for named_at, info in listed:
        at = bisect_right(starts, named_at) - 1
        if at >= 0 and named_at < windows[at].end:
            part = round((named_at - starts[at]).total_seconds())
            found.setdefault(starts[at], {})[part] = (info.key, info.etag)
    return found


def lost_tags_in(table: pa.Table) -> bool:
    """True for rows of an object that lost tags: see LOST_TAGS."""
    return LOST_TAGS.items() <= (table.schema.metadata or {}).items()


def stored_schema(schema: pa.Schema, *, in_microseconds: bool, with_nanos: bool) -> pa.Schema:
    """The columns of a Parquet object. Digits below the microsecond go into a separate last column, 0 to 999."""
    if not in_microseconds:
        return schema
    index = schema.get_field_index(TIMESTAMP)
    schema = schema.set(index, pa.field(TIMESTAMP, pa.timestamp("us", "UTC")))
    return schema.append(pa.field(NANOS, pa.int16())) if with_nanos else schema


def split_nanoseconds(table: pa.Table, *, with_nanos: bool) -> pa.Table:
    """Rows with their timestamp in microseconds, and the remaining nanoseconds in a last column."""
    index = table.schema.get_field_index(TIMESTAMP)
    instants = one_array(table.column(index)).view(pa.int64()).to_numpy()
    micros = instants // 1000  # rounds down, also before 1970, so the rest is never negative
    table = table.set_column(index, TIMESTAMP, pa.array(micros).view(pa.timestamp("us", "UTC")))
    return table.append_column(NANOS, pa.array((instants - micros * 1000).astype(np.int16))) if with_nanos else table


def in_nanoseconds(table: pa.Table) -> pa.Table:
    """The reverse of `split_nanoseconds`, for an object of any unit."""
    index = table.schema.get_field_index(TIMESTAMP)
    if index < 0:
        raise pa.ArrowInvalid("it has no column timestamp")
    if table.schema.field(index).type == pa.timestamp("ns", "UTC"):
        return table
    instants = table.column(index).cast(pa.timestamp("us", "UTC")).cast(pa.int64()).to_numpy() * 1000
    if NANOS in table.column_names:
        instants = instants + table.column(NANOS).to_numpy().astype(np.int64)
        table = table.drop_columns([NANOS])
    return table.set_column(index, TIMESTAMP, pa.array(instants).view(pa.timestamp("ns", "UTC")))


def _write_parquet(file: BinaryIO, rows: Iterator[pa.Table], schema: pa.Schema, dictionary: tuple[str, ...]) -> None:
    """Row groups of equal size whatever the size of the incoming tables; dictionary only where values repeat.

    The small writes of each page are buffered in Arrow: a call into Python for each one costs a fifth of a small file.
    """
    names = [name for name in dictionary if name in schema.names]
    gathered = pa.BufferedOutputStream(pa.PythonFile(file, mode="w"), WRITE_BYTES)
    with pq.ParquetWriter(
        gathered, schema, compression="zstd", compression_level=1, use_dictionary=names, write_statistics=True
    ) as writer:
        for group in row_groups(rows, ROW_GROUP_ROWS):
            writer.write_table(group, row_group_size=ROW_GROUP_ROWS)
    gathered.detach()  # closing it would close the file as well


def row_groups(tables: Iterator[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of exactly `rows` rows, the last one shorter."""
    waiting: list[pa.Table] = []
    size = 0
    for table in tables:
        waiting.append(table)
        size += table.num_rows
        while size >= rows:
            together = pa.concat_tables(waiting)
            yield together.slice(0, rows)
            waiting, size = [together.slice(rows)], size - rows
    if size:
        yield pa.concat_tables(waiting)


def _write_csv(file: BinaryIO, names: Sequence[str], rows: Iterator[pa.Table]) -> None:
    """RFC 4180 with LF; timestamps in ISO 8601 with nanoseconds and Z; null and empty text are both an empty cell."""
    options = pacsv.WriteOptions(include_header=False, quoting_style="needed")
    header = io.StringIO(newline="")
    csv.writer(header, lineterminator="\n").writerow(names)
    file.write(header.getvalue().encode())
    for table in rows:
        for index, column in enumerate(table.schema):
            if pa.types.is_timestamp(column.type):
                text = pc.strftime(table.column(index), format="%Y-%m-%dT%H:%M:%SZ", locale="C")
                table = table.set_column(index, column.name, text)  # noqa: PLW2901 - the same rows, written as text
        pacsv.write_csv(table, file, write_options=options)


def _readable(key: str, tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The tables of a local copy. A parse error means that the object is not from this sink, or was damaged."""
    try:
        yield from tables
    except (pa.ArrowException, csv.Error, UnicodeDecodeError, OSError) as error:
        raise Permanent(
            f"{key} cannot be read: {str(error)[:200]}", "restore an earlier version of the object, or move it away"
        ) from error


def _parquet_tables(file: BinaryIO) -> Iterator[pa.Table]:
    with pq.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(batch_size=ROW_GROUP_ROWS):
            table = in_nanoseconds(pa.Table.from_batches([batch]))
            said = table.schema.metadata or {}
            yield (
                table if said.get(b"headwater.tags") == ALL_TAGS.encode() else table.replace_schema_metadata(LOST_TAGS)
            )


def _csv_tables(file: BinaryIO) -> Iterator[pa.Table]:
    """Timestamps, and all other columns as text: type inference would only look at the first block, and turn text such
    as 007 into numbers.
    """
    names = next(csv.reader(io.StringIO(_first_record(file), newline="")), [])
    options: Mapping[str, Any] = {
        "read_options": pacsv.ReadOptions(block_size=CSV_BLOCK_BYTES, use_threads=False),
        "parse_options": pacsv.ParseOptions(newlines_in_values=True),
        "convert_options": pacsv.ConvertOptions(
            column_types={**dict.fromkeys(names, pa.string()), "timestamp": pa.timestamp("ns", "UTC")},
            null_values=[""],
            strings_can_be_null=True,
        ),
    }
    with pacsv.open_csv(file, **options) as reader:
        for batch in reader:
            yield pa.Table.from_batches([batch])


def _first_record(file: BinaryIO) -> str:
    """The header, which ends at the first newline outside quotes. Rewinds the file."""
    record = file.readline()
    while record.count(b'"') % 2 and (line := file.readline()):
        record += line
    file.seek(0)
    return record.decode("utf-8")
