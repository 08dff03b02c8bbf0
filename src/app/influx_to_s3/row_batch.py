"""A batch of this pipeline: digested, ordered rows of one device and window in bounded memory, and computed columns.

Rows arrive in order and are cut into blocks of a fixed number of rows. The columns of an object are timestamp,
device_id, device_type, location, voltage, current, power, temperature, hour, day_of_week, is_weekend, power_factor,
then further tags and further fields, each alphabetically.

Invariants: the digest depends on the rows alone, not on how they were split when read. Blocks beyond `memory_rows` wait
in an unnamed temporary file, so a crash leaves nothing behind. A column has the same type in every object of a layout,
whatever a window holds. The documented columns always exist, and are null where the source has no such field.

For a few rows, the calls cost far more than the rows. So everything that depends on the rows alone is computed once for
all batches that were read together; a batch is then a part of their common table.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from app.core.files import temporary_file
from app.core.ledger import Tally
from app.core.pipeline import Sums
from app.influx_to_s3.layout import COMPUTED, DEVICE, MEASURED, TAGS, TIMESTAMP, TreeColumns
from app.influx_to_s3.rows import ConflictingValue, identities_of, instant_of, instants_of, times_of
from app.object_store.row_digest import one_array
from app.object_store.table_sink import split_nanoseconds, stored_schema

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


class BatchSchemas:
    """The schemas of rows that have these columns, by name, and of their objects.

    `rows`: of the canonical rows. `output`: of an object, with timestamps in nanoseconds: the documented columns, then
    further tags and fields. device_id has dictionary type, because pandas reads the `device_id=` in paths as such and
    merges the two only then.
    """

    def __init__(self, types: Mapping[str, Any], columns: TreeColumns) -> None:
        others = sorted(name for name in types if name not in (TIMESTAMP, *TAGS))
        further = [name for name in others if name not in MEASURED]
        self.rows = pa.schema(
            [
                (TIMESTAMP, pa.timestamp("ns", "UTC")),
                *((tag, pa.string()) for tag in TAGS),
                *((name, types[name]) for name in others),
            ]
        )
        self.output = pa.schema(
            [
                (TIMESTAMP, pa.timestamp("ns", "UTC")),
                (DEVICE, pa.dictionary(pa.int32(), pa.string())),
                *((name, pa.string()) for name in TAGS),
                *((name, pa.float64()) for name in MEASURED),
                *zip(COMPUTED, (pa.int32(), pa.int32(), pa.bool_(), pa.float64()), strict=True),
                *(
                    pa.field(name, types[name], metadata=columns.describe(name))
                    for name in sorted(further, key=lambda name: (name not in columns.tags, name))
                ),
            ]
        )
        self._in_microseconds = [
            stored_schema(self.output, in_microseconds=True, with_nanos=with_nanos) for with_nanos in (False, True)
        ]

    def in_unit(self, unit: str, *, with_nanos: bool) -> pa.Schema:
        """The schema of an object whose timestamps are in "us" or "ns"."""
        return self.output if unit == "ns" else self._in_microseconds[with_nanos]


class CommonRows:
    """Canonical rows of one or several batches in one table; part n has the rows `bounds[n]` to `bounds[n + 1]`.

    Each part is in canonical order. A column in which a part has no value does not belong to that part.
    """

    def __init__(self, table: pa.Table, bounds: Sequence[int], columns: TreeColumns) -> None:
        self.bounds = bounds
        self.table = table
        self.instants = instants_of(table)
        self._columns = columns
        self._arrays = {name: one_array(table.column(name)) for name in sorted(table.column_names)}
        self._schemas: dict[tuple[str, ...], BatchSchemas] = {}
        self._written: dict[tuple[BatchSchemas, str, bool], pa.RecordBatch] = {}

    @cached_property
    def _bytes(self) -> Mapping[str, "_ColumnBytes"]:
        return {name: _ColumnBytes(name, array, self.bounds) for name, array in self._arrays.items()}

    def numbers(self, part: int) -> Mapping[str, int]:
        """How many values the part has in each of its columns, by name in sorted order."""
        return {name: each.numbers[part] for name, each in self._bytes.items() if each.numbers[part]}

    def types(self, names: Iterable[str]) -> Mapping[str, Any]:
        """The types of these columns."""
        return {name: self._arrays[name].type for name in names}

    def digest_bytes(self, part: int) -> Iterator[Any]:
        """Buffers that are equal exactly when the part's column names, types and values are."""
        start, end = self.bounds[part], self.bounds[part + 1]
        for each in self._bytes.values():
            if each.numbers[part]:
                yield from each.of(start, end, each.numbers[part])

    @cached_property
    def has_nanos(self) -> Sequence[bool]:
        """By part: whether a timestamp has digits below the microsecond."""
        return [number > 0 for number in _numbers_in(self.instants % NANOS_PER_MICROSECOND != 0, self.bounds)]

    @cached_property
    def _identities(self) -> Any:
        return identities_of(self.table, self._columns.tags)

    def identities(self, part: int) -> Any:
        """64 bits per row of the part, a numpy array; see `rows.identities_of`. A copy, since it is kept for long."""
        return self._identities[self.bounds[part] : self.bounds[part + 1]].copy()

    def schemas(self, names: tuple[str, ...]) -> BatchSchemas:
        """The schemas of a part that has these columns."""
        if names not in self._schemas:
            self._schemas[names] = BatchSchemas(self.types(names), self._columns)
        return self._schemas[names]

    def rows(self, part: int, schema: pa.Schema) -> pa.Table:
        """The part's rows with the columns of `schema`, null where it lacks one."""
        start, rows = self.bounds[part], self.bounds[part + 1] - self.bounds[part]
        arrays = self._arrays
        columns = [
            arrays[each.name].slice(start, rows) if each.name in arrays else pa.nulls(rows, each.type)
            for each in schema
        ]
        return pa.table(columns, schema=schema)

    def output(self, part: int, device: str, schemas: BatchSchemas, unit: str, *, with_nanos: bool) -> pa.Table:
        """The part's rows as written to an object: see `RowBatch.output`."""
        schema, key = schemas.in_unit(unit, with_nanos=with_nanos), (schemas, unit, with_nanos)
        whole = self._written.get(key)
        if whole is None:
            arrays = {**self._arrays, **self._computed, **(self._split if unit == "us" else {})}
            rows = self.table.num_rows
            columns = [arrays[each.name] if each.name in arrays else pa.nulls(rows, each.type) for each in schema]
            whole = self._written[key] = pa.RecordBatch.from_arrays(columns, schema=schema)
        start, rows = self.bounds[part], self.bounds[part + 1] - self.bounds[part]
        # A dictionary is written as it is, so that each part needs its own.
        own = pa.DictionaryArray.from_arrays(pa.repeat(pa.scalar(0, pa.int32()), rows), pa.array([device], pa.string()))
        at = schema.get_field_index(DEVICE)
        return pa.Table.from_batches([whole.slice(start, rows).set_column(at, schema.field(at), own)])

    @cached_property
    def _computed(self) -> Mapping[str, Any]:
        rows = self.table.num_rows
        missing = {name: pa.nulls(rows, pa.float64()) for name in MEASURED}
        return computed_from({**missing, **self._arrays})

    @cached_property
    def _split(self) -> Mapping[str, Any]:
        """The timestamps in microseconds, and their remaining nanoseconds."""
        split = split_nanoseconds(self.table.select([TIMESTAMP]), with_nanos=True)
        return {name: one_array(split.column(name)) for name in split.column_names}


class _ColumnBytes:
    """A column of `CommonRows` as bytes for digests. `numbers`: how many values each part has."""

    def __init__(self, name: str, array: Any, bounds: Sequence[int]) -> None:
        self._head, self._valid = f"{name}\0{array.type}", None
        self.numbers = [end - start for start, end in pairwise(bounds)]
        if array.null_count:
            self._valid = array.is_valid().to_numpy(zero_copy_only=False)
            self.numbers = _numbers_in(self._valid, bounds)
            array = array.fill_null(pa.scalar("" if pa.types.is_string(array.type) else 0).cast(array.type))
        self._texts: tuple[Any, Any] | None = None
        self._truths: Any = None
        if pa.types.is_string(array.type):
            _, offsets, data = array.buffers()
            ends = np.frombuffer(offsets, np.int32)[array.offset : array.offset + len(array) + 1]
            self._texts, values = (ends, memoryview(data or b"")), np.diff(ends)
        elif pa.types.is_boolean(array.type):
            values = self._truths = array.to_numpy(zero_copy_only=False)
        else:
            values = (array.view(pa.int64()) if pa.types.is_timestamp(array.type) else array).to_numpy()
        self._values: Any = memoryview(np.ascontiguousarray(values).data).cast("B")
        self._width = values.itemsize

    def of(self, start: int, end: int, number: int) -> Iterator[Any]:
        """The part from row `start` to `end`, which has this number of values."""
        yield f"{self._head}\0{end - start}\0{end - start - number}\0".encode()
        if self._valid is not None and number < end - start:
            yield np.packbits(self._valid[start:end])
        if self._truths is not None:
            yield np.packbits(self._truths[start:end])
            return
        yield self._values[start * self._width : end * self._width]
        if self._texts is not None:
            ends, data = self._texts
            yield data[int(ends[start]) : int(ends[end])]


def _numbers_in(true: Any, bounds: Sequence[int]) -> list[int]:
    """How often a boolean array is true in each part."""
    before = np.concatenate(([0], np.cumsum(true)))[np.array(bounds)]
    found: list[int] = np.diff(before).tolist()
    return found


class RowBatch:
    """See `app.core.pipeline.Batch`. Rows are added with `append`; everything else is available after `finish`.

    `cells`: the source's counts per bucket, taken before reading. `sums`: per field, of what was read. `accounts`: per
    field, the values counted, read, held by the rows (`new`), repeated in points that differ only in ignored tags
    (`already_there`), and in conflict between such points (`set_aside`; these are `disagreements`).

    `has_all_tags`: false when some rows were read back from an object of an older version, which dropped their further
    tags. `has_nanos`: whether a timestamp has digits below the microsecond.
    """

    def __init__(self, device: str, directory: Path, memory_rows: int, columns: TreeColumns) -> None:
        self.device, self.columns = device, columns
        self.rows = self.new_rows = self.corrected_rows = 0
        self.digest = ""
        self.min_at: datetime | None = None
        self.max_at: datetime | None = None
        self.has_nanos, self.has_all_tags = False, True
        self.cells: Mapping[datetime, int] = {}
        self.accounts: Mapping[str, Tally] = {}
        self.sums: dict[str, Sums] = {}
        self.disagreements: list[ConflictingValue] = []
        self._directory, self._memory_rows = directory, max(memory_rows, BLOCK_ROWS)
        self._waiting: list[pa.Table] = []
        self._waiting_rows = 0
        self.blocks: list[tuple[CommonRows, int]] = []
        self._memory_bytes = 0
        self._file: BinaryIO | None = None
        self._types: dict[str, Any] = {}
        self._landed: Counter[str] = Counter()
        self._twice: Counter[str] = Counter()
        self._digest = hashlib.sha256()
        self._last_ns: int | None = None
        self._schemas: BatchSchemas

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
        self._count(instants, has_nanos=bool((instants % NANOS_PER_MICROSECOND).any()))
        self._waiting.append(table)
        self._waiting_rows += table.num_rows
        if self._waiting_rows >= BLOCK_ROWS:
            self._cut(whole_blocks_only=True)

    def take(self, common: CommonRows, part: int, read: Mapping[str, Sums]) -> None:
        """Make one part of `common` the rows of this batch; they stay in memory. `read`: see `append`."""
        self.sums = dict(read)
        start, end = common.bounds[part], common.bounds[part + 1]
        if start < end:
            self._count(common.instants[start:end], has_nanos=common.has_nanos[part])
            self._hold(common, part)

    def _count(self, instants: Any, *, has_nanos: bool) -> None:
        first, last = int(instants[0]), int(instants[-1])
        if self._last_ns is not None and first <= self._last_ns:
            raise ValueError(f"rows of {self.device} are out of order: {first} after {self._last_ns}")
        self._last_ns = last
        self.min_at, self.max_at = self.min_at or instant_of(first), instant_of(last)
        self.rows += len(instants)
        self.has_nanos = self.has_nanos or has_nanos

    def finish(self, cells: Mapping[datetime, int], counted: Mapping[str, int]) -> "RowBatch":
        """Complete the batch. `counted`: values per field that the source counted before reading.

        Rows that arrived between counting and reading are counted from what was read.
        """
        self._cut(whole_blocks_only=False)
        names = tuple(sorted(self._types))
        if len(self.blocks) == 1:
            self._schemas = self.blocks[0][0].schemas(names)
        else:
            self._schemas = BatchSchemas(self._types, self.columns)
        self.digest, self.new_rows, self.cells = self._digest.hexdigest(), self.rows, cells
        aside = Counter(each.field for each in self.disagreements)
        landed: Counter[str] = Counter()
        for name, number in self._landed.items():
            if name != TIMESTAMP and name not in self.columns.tags:
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
        parts = [common.identities(part) for common, part in self._parts()]
        return np.concatenate(parts) if len(parts) > 1 else parts[0] if parts else np.empty(0, np.uint64)

    def holds_all(self, identities: Any) -> bool:
        """See `Batch.holds_all`."""
        if len(identities) > self.rows:
            return False
        # New rows are nearly always the latest ones; `isin` takes ten times as long for a few rows.
        is_prefix = np.array_equal(identities, self.identities[: len(identities)])
        return is_prefix or bool(np.isin(identities, self.identities).all())

    @property
    def reusable(self) -> bool:
        """True for large, spooled windows, where reading only the tail saves the source work.

        False where points were merged: repeated or conflicting values can no longer be assigned to a time.
        """
        merged = self.disagreements or any(each.already_there for each in self.accounts.values())
        return self._file is not None and not merged

    @property
    def schema(self) -> pa.Schema:
        """The columns of the canonical rows."""
        return self._schemas.rows

    def output_schema(self, unit: str = "ns") -> pa.Schema:
        """The columns of the object: see `BatchSchemas`."""
        return self._schemas.in_unit(unit, with_nanos=self.has_nanos)

    def output(self, unit: str = "ns") -> Iterator[pa.Table]:
        """The rows as written to an object, with the computed columns and `output_schema(unit)`."""
        for common, part in self._parts():
            yield common.output(part, self.device, self._schemas, unit, with_nanos=self.has_nanos)

    def tables(self) -> Iterator[pa.Table]:
        """The rows in order, block by block, all with `schema`."""
        for common, part in self._parts():
            yield common.rows(part, self.schema)

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
            block = table.slice(start, min(BLOCK_ROWS, end - start)).combine_chunks()
            self._hold(CommonRows(block, (0, block.num_rows), self.columns), 0)
            self._spool(block)
        rest = table.slice(end)
        self._waiting, self._waiting_rows = ([rest], rest.num_rows) if rest.num_rows else ([], 0)

    def _hold(self, common: CommonRows, part: int) -> None:
        """Digest and keep a part; the digest covers names, types and values of its columns."""
        numbers = common.numbers(part)
        self._types.update(common.types(numbers))
        self._landed.update(numbers)
        for values in common.digest_bytes(part):
            self._digest.update(values)
        self.blocks.append((common, part))

    def _spool(self, block: pa.Table) -> None:
        """Move the blocks to the file when this last one makes them too many for memory."""
        self._memory_bytes += block.nbytes
        if self._file is None and (self.rows > self._memory_rows or self._memory_bytes > MEMORY_BYTES):
            self._file = temporary_file(self._directory)
        if self._file is not None:
            for each, _ in self.blocks:
                with pa.ipc.new_stream(self._file, each.table.schema) as writer:
                    writer.write_table(each.table)
            self.blocks.clear()
            self._memory_bytes = 0

    def _parts(self) -> Iterator[tuple[CommonRows, int]]:
        if self._file is None:
            yield from self.blocks
        else:
            for block in _blocks_in(self._file):
                yield CommonRows(block, (0, block.num_rows), self.columns), 0


def _blocks_in(file: BinaryIO) -> Iterator[pa.Table]:
    file.seek(0)
    source = pa.PythonFile(file, mode="r")
    while source.tell() < source.size():
        with pa.ipc.open_stream(source) as reader:
            yield reader.read_all()
