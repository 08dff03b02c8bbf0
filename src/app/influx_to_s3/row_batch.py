"""A batch of this pipeline: digested, ordered rows of one device and window in bounded memory, and computed columns.

Rows arrive in order and are cut into blocks of a fixed number of rows. The columns of an object are timestamp,
device_id, device_type, location, voltage, current, power, temperature, hour, day_of_week, is_weekend, power_factor,
then further tags and further fields, each alphabetically.

Invariants: the digest depends on the rows alone, not on how they were split when read. Blocks beyond `memory_rows` wait
in an unnamed temporary file, so a crash leaves nothing behind. A column has the same type in every object of a layout,
whatever a window holds. The documented columns always exist, and are null where the source has no such field.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from app.core.files import temporary_file
from app.core.ledger import Tally
from app.core.pipeline import Sums
from app.influx_to_s3.layout import COMPUTED, DEVICE, MEASURED, TAGS, TIMESTAMP, TreeColumns
from app.influx_to_s3.rows import ConflictingValue, identities_of, instant_of, instants_of, times_of

HOUR_NS = 3_600_000_000_000
THURSDAY, FRIDAY = 3, 4
BLOCK_ROWS = 16_384
MEMORY_BYTES = 32 << 20
NANOS_PER_MICROSECOND = 1000
NO_SUMS: Mapping[str, Sums] = {}
NONE: Mapping[str, int] = {}


def computed_from(rows: Mapping[str, Any] | pa.Table) -> dict[str, Any]:
    """The computed columns of rows, given as columns by name that have the documented ones, as numbers or as text.

    hour 0-23 and day_of_week (Monday = 0) are in UTC. power_factor is power / (voltage * current) clipped to [0, 1];
    null where an input is null or the quotient is not a number.
    """
    hours = times_of(rows[TIMESTAMP]) // HOUR_NS
    day = ((hours // 24 + THURSDAY) % 7).astype(np.int32)  # 1970-01-01 was a Thursday
    floats = (rows[name].cast(pa.float64()) for name in MEASURED[:3])
    volts, amperes, watts = (values.to_numpy(zero_copy_only=False) for values in floats)
    with np.errstate(all="ignore"):
        apparent = volts * amperes
        factor = np.clip(watts / apparent, 0.0, 1.0)
    unknown = ~np.isfinite(factor) | (apparent == 0.0)
    return {
        "hour": pa.array((hours % 24).astype(np.int32)),
        "day_of_week": pa.array(day),
        "is_weekend": pa.array(day > FRIDAY),
        "power_factor": pa.array(factor, mask=unknown),
    }


class RowBatch:
    """See `app.core.pipeline.Batch`. Rows are added with `append`; everything else is available after `finish`.

    `cells`: the source's counts per bucket, taken before reading. `sums`: per field, of what was read. `accounts`: per
    field, the values counted, read, held by the rows (`new`), repeated in points that differ only in ignored tags
    (`already_there`), and in conflict between such points (`set_aside`; these are `disagreements`).

    `has_all_tags`: false when some rows were read back from an object of an older version, which dropped their further
    tags. `has_nanos`: whether a timestamp has digits below the microsecond. `schema`: that of the canonical rows.
    """

    def __init__(self, device: str, directory: Path, memory_rows: int, columns: TreeColumns) -> None:
        self.device, self.columns = device, columns
        self.rows = self.new_rows = self.corrected_rows = 0
        self.digest = ""
        self.min_at: datetime | None = None
        self.max_at: datetime | None = None
        self.schema = pa.schema([])
        self.has_nanos, self.has_all_tags = False, True
        self.cells: Mapping[datetime, int] = {}
        self.accounts: Mapping[str, Tally] = {}
        self.sums: dict[str, Sums] = {}
        self.disagreements: list[ConflictingValue] = []
        self._directory, self._memory_rows = directory, max(memory_rows, BLOCK_ROWS)
        self._waiting: list[pa.Table] = []
        self._waiting_rows = 0
        self.blocks: list[pa.Table] = []
        self._memory_bytes = 0
        self._file: BinaryIO | None = None
        self._types: dict[str, Any] = {}
        self._landed: Counter[str] = Counter()
        self._twice: Counter[str] = Counter()
        self._digest = hashlib.sha256()
        self._last_ns: int | None = None

    def append(
        self,
        table: pa.Table,
        read: Mapping[str, Sums] = NO_SUMS,
        twice: Mapping[str, int] = NONE,
        others: Sequence[ConflictingValue] = (),
    ) -> None:
        """Add rows in canonical order that are later than all previous rows. Raises ValueError when they are not later.

        Per field: the sums of what was `read` for these rows, and how many values occurred `twice`. `others`:
        conflicting values.
        """
        for name, sums in read.items():
            self.sums[name] = self.sums[name] + sums if name in self.sums else sums
        self._twice.update(twice)
        self.disagreements += others
        if table.num_rows == 0:
            return
        instants = instants_of(table)
        if self._last_ns is not None and int(instants[0]) <= self._last_ns:
            raise ValueError(f"rows of {self.device} are out of order: {instants[0]} after {self._last_ns}")
        self._last_ns = int(instants[-1])
        self.min_at, self.max_at = self.min_at or instant_of(int(instants[0])), instant_of(self._last_ns)
        self.rows += table.num_rows
        self.has_nanos = self.has_nanos or bool((instants % NANOS_PER_MICROSECOND).any())
        self._waiting.append(table)
        self._waiting_rows += table.num_rows
        if self._waiting_rows >= BLOCK_ROWS:
            self._cut(whole_blocks_only=True)

    def finish(self, cells: Mapping[datetime, int], counted: Mapping[str, int]) -> "RowBatch":
        """Complete the batch. `counted`: values per field that the source counted before reading.

        Rows that arrived between counting and reading are counted from what was read.
        """
        self._cut(whole_blocks_only=False)
        others = sorted(name for name in self._types if name not in (TIMESTAMP, *TAGS))
        self.schema = pa.schema(
            [
                (TIMESTAMP, pa.timestamp("ns", "UTC")),
                *((tag, pa.string()) for tag in TAGS),
                *((name, self._types[name]) for name in others),
            ]
        )
        self.digest, self.new_rows, self.cells = self._digest.hexdigest(), self.rows, cells
        aside = Counter(each.field for each in self.disagreements)
        landed: Counter[str] = Counter()
        for name, number in self._landed.items():
            landed[self.columns.sources.get(name) or name] += number
        read = {name: sums.values for name, sums in self.sums.items()}
        self.accounts = {
            name: Tally(
                counted=max(counted.get(name, 0), read.get(name, 0)),
                read=read.get(name, 0),
                new=landed[name],
                already_there=self._twice[name],
                set_aside=aside[name],
            )
            for name in counted.keys() | read.keys() | landed.keys()
        }
        return self

    @cached_property
    def identities(self) -> Any:
        """64 bits per row, a numpy array; see `rows.identities_of`."""
        parts = [identities_of(table, self.columns.tags) for table in self.tables()]
        return np.concatenate(parts) if parts else np.empty(0, np.uint64)

    def holds_all(self, identities: Any) -> bool:
        """See `Batch.holds_all`."""
        return len(identities) <= self.rows and bool(np.isin(identities, self.identities).all())

    @property
    def reusable(self) -> bool:
        """True for large, spooled windows, where reading only the tail saves the source work.

        False where points were merged: repeated or conflicting values can no longer be assigned to a time.
        """
        merged = self.disagreements or any(each.already_there for each in self.accounts.values())
        return self._file is not None and not merged

    @cached_property
    def output_schema(self) -> pa.Schema:
        """The documented columns, then this batch's further tags and fields. Timestamps are in nanoseconds.

        device_id has dictionary type, because pandas reads the `device_id=` in paths as such and merges the two only
        then.
        """
        others = [column for column in self.schema if column.name not in (TIMESTAMP, *TAGS, *MEASURED)]
        return pa.schema(
            [
                (TIMESTAMP, pa.timestamp("ns", "UTC")),
                (DEVICE, pa.dictionary(pa.int32(), pa.string())),
                *((name, pa.string()) for name in TAGS),
                *((name, pa.float64()) for name in MEASURED),
                *zip(COMPUTED, (pa.int32(), pa.int32(), pa.bool_(), pa.float64()), strict=True),
                *(
                    pa.field(each.name, each.type, metadata=self.columns.describe(each.name))
                    for each in sorted(others, key=lambda each: (each.name not in self.columns.tags, each.name))
                ),
            ]
        )

    def output(self) -> Iterator[pa.Table]:
        """The rows as written to an object, with the computed columns."""
        schema = self.output_schema
        for table in self.tables():
            columns: dict[str, Any] = {name: table.column(name) for name in table.column_names}
            places = pa.repeat(pa.scalar(0, pa.int32()), table.num_rows)
            columns[DEVICE] = pa.DictionaryArray.from_arrays(places, [self.device])
            for name in MEASURED:
                columns.setdefault(name, pa.nulls(table.num_rows, pa.float64()))
            columns |= computed_from(columns)
            yield pa.table([columns[name] for name in schema.names], schema=schema)

    def tables(self) -> Iterator[pa.Table]:
        """The rows in order, block by block, all with `schema`."""
        for block in _blocks_in(self._file) if self._file else self.blocks:
            there = set(block.column_names)
            columns = [
                block.column(column.name) if column.name in there else pa.nulls(block.num_rows, column.type)
                for column in self.schema
            ]
            yield pa.table(columns, schema=self.schema)

    def close(self) -> None:
        """Delete the spooled rows. Idempotent."""
        self.blocks = []
        if self._file is not None:
            self._file.close()

    def _cut(self, *, whole_blocks_only: bool) -> None:
        if not self._waiting:
            return
        several = len(self._waiting) > 1
        table = pa.concat_tables(self._waiting, promote_options="default") if several else self._waiting[0]
        end = table.num_rows - table.num_rows % BLOCK_ROWS if whole_blocks_only else table.num_rows
        for start in range(0, end, BLOCK_ROWS):
            self._add(table.slice(start, min(BLOCK_ROWS, end - start)).combine_chunks())
        rest = table.slice(end)
        self._waiting, self._waiting_rows = ([rest], rest.num_rows) if rest.num_rows else ([], 0)

    def _add(self, block: pa.Table) -> None:
        """Digest and keep a block without its empty columns; the digest covers names, types and values."""
        names = [name for name in block.column_names if block.column(name).null_count < block.num_rows]
        block = block.select(names)
        for name in sorted(names):
            column = block.column(name)
            self._types[name] = column.type
            if name != TIMESTAMP and name not in self.columns.tags:
                self._landed[name] += len(column) - column.null_count
            array = column.chunk(0)  # a block has one chunk
            self._digest.update(f"{name}\0{array.type}\0{len(array)}\0{array.null_count}\0".encode())
            for part in _value_bytes(array):
                self._digest.update(part)
        self.blocks.append(block)
        self._memory_bytes += block.nbytes
        if self._file is None and (self.rows > self._memory_rows or self._memory_bytes > MEMORY_BYTES):
            self._file = temporary_file(self._directory)
        if self._file is not None:
            for each in self.blocks:
                with pa.ipc.new_stream(self._file, each.schema) as writer:
                    writer.write_table(each)
            self.blocks.clear()
            self._memory_bytes = 0


def identify_together(batches: Sequence[RowBatch]) -> None:
    """Compute the identities of small batches at once: for a few rows, the calls cost far more than the rows."""
    tables = [table for batch in batches for table in batch.tables()]
    if not tables:
        return
    tags = batches[0].columns.tags
    names = [[name for name in table.column_names if name == TIMESTAMP or name in tags] for table in tables]
    rows = pa.concat_tables(map(pa.Table.select, tables, names), promote_options="default")
    ends = np.cumsum([batch.rows for batch in batches])
    for batch, identities in zip(batches, np.split(identities_of(rows, tags), ends[:-1]), strict=True):
        batch.identities = identities


def _blocks_in(file: BinaryIO) -> Iterator[pa.Table]:
    file.seek(0)
    source = pa.PythonFile(file, mode="r")
    while source.tell() < source.size():
        with pa.ipc.open_stream(source) as reader:
            yield reader.read_all()


def _value_bytes(array: Any) -> Iterator[Any]:
    """The values of an array as buffers that are equal exactly when the values are."""
    if array.null_count:
        yield np.packbits(array.is_valid().to_numpy(zero_copy_only=False))
        array = array.fill_null(pa.scalar("" if pa.types.is_string(array.type) else 0).cast(array.type))
    if pa.types.is_string(array.type):
        _, offsets, data = array.buffers()
        ends = np.frombuffer(offsets, np.int32)[array.offset : array.offset + len(array) + 1]
        yield np.diff(ends)
        if data is not None:
            yield memoryview(data)[int(ends[0]) : int(ends[-1])]
    elif pa.types.is_boolean(array.type):
        yield np.packbits(array.to_numpy(zero_copy_only=False))
    elif pa.types.is_timestamp(array.type):
        yield array.cast(pa.int64()).to_numpy()
    else:
        yield array.to_numpy()
