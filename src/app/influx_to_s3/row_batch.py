"""A batch of this pipeline: ordered rows of one device and window, digested, with bounded memory; and the documented
columns, which are computed from them.

Rows come in order and are cut into blocks of a fixed number of rows. The columns of an object are timestamp, device_id,
device_type, location, voltage, current, power, temperature, hour, day_of_week, is_weekend, power_factor, then further
tags and further fields, each alphabetically.

Invariants: the digest depends on the rows alone, not on how they were cut when they were read; blocks beyond
`memory_rows` wait in a temporary file that has no name, so nothing is left behind by a crash; a column has the same
type in every object of a layout, whatever a window holds, and the documented ones exist even without such a field (then
null).
"""

import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from app.core.ledger import Tally
from app.core.pipeline import Sums
from app.influx_to_s3.layout import COMPUTED, DEVICE, MEASURED, TAGS, TIMESTAMP, Columns
from app.influx_to_s3.rows import Disagreement, identities_of, instant_of, instants_of

HOUR_NS = 3_600_000_000_000
DAY_NS = 24 * HOUR_NS
THURSDAY, FRIDAY = 3, 4


def output_schema(rows: pa.Schema, columns: Columns) -> pa.Schema:
    """The columns of an object whose canonical rows have the schema `rows`.

    device_id has dictionary type, as pandas takes the `device_id=` in paths: it merges the two only then.
    """
    others = [column for column in rows if column.name not in (TIMESTAMP, *TAGS, *MEASURED)]
    return pa.schema(
        [
            (TIMESTAMP, pa.timestamp("ns", "UTC")),
            (DEVICE, pa.dictionary(pa.int32(), pa.string())),
            *((name, pa.string()) for name in TAGS),
            *((name, pa.float64()) for name in MEASURED),
            *zip(COMPUTED, (pa.int32(), pa.int32(), pa.bool_(), pa.float64()), strict=True),
            *(
                pa.field(each.name, each.type, metadata=columns.describe(each.name))
                for each in sorted(others, key=lambda each: (each.name not in columns.tags, each.name))
            ),
        ]
    )


def enrich(table: pa.Table, device: str, schema: pa.Schema) -> pa.Table:
    """Canonical rows with the computed columns, as `schema` from `output_schema`."""
    columns: dict[str, Any] = {name: table.column(name) for name in table.column_names}
    columns[DEVICE] = pa.DictionaryArray.from_arrays(pa.repeat(pa.scalar(0, pa.int32()), table.num_rows), [device])
    for name in MEASURED:
        columns.setdefault(name, pa.nulls(table.num_rows, pa.float64()))
    columns |= computed_from(pa.table(columns))
    return pa.table([columns[name] for name in schema.names], schema=schema)


def computed_from(rows: pa.Table) -> dict[str, Any]:
    """The computed columns of rows that have the documented ones, as numbers or as text.

    power_factor is power / (voltage * current) clipped to [0, 1]; null where an input is null or the quotient is not a
    number.
    """
    volts, amperes, watts = (rows.column(name).cast(pa.float64()).to_numpy() for name in MEASURED[:3])
    with np.errstate(all="ignore"):
        apparent = volts * amperes
        factor = np.clip(watts / apparent, 0.0, 1.0)
    unknown = ~np.isfinite(factor) | (apparent == 0.0)
    return {**_calendar(rows), "power_factor": pa.array(factor, mask=unknown)}


def _calendar(table: pa.Table) -> dict[str, Any]:
    """hour 0-23 and day_of_week (Monday = 0) of the UTC instant; 1970-01-01 was a Thursday."""
    instants = instants_of(table)
    if len(instants) and instants[0] // HOUR_NS == instants[-1] // HOUR_NS:  # rows are in order: all of one hour
        return _of_one_hour(int(instants[0]), len(instants))
    hour = (instants // HOUR_NS % 24).astype(np.int32)
    day = ((instants // DAY_NS + THURSDAY) % 7).astype(np.int32)
    return {"hour": pa.array(hour), "day_of_week": pa.array(day), "is_weekend": pa.array(day > FRIDAY)}


def _of_one_hour(instant: int, rows: int) -> dict[str, Any]:
    """What `_calendar` gives for `rows` instants of the hour that holds `instant`."""
    hour, day = instant // HOUR_NS % 24, (instant // DAY_NS + THURSDAY) % 7
    return {
        "hour": pa.repeat(pa.scalar(hour, pa.int32()), rows),
        "day_of_week": pa.repeat(pa.scalar(day, pa.int32()), rows),
        "is_weekend": pa.repeat(pa.scalar(day > FRIDAY), rows),
    }


BLOCK_ROWS = 16_384
MEMORY_BYTES = 32 << 20
NANOS_PER_MICROSECOND = 1000
NONE: Mapping[str, int] = {}


@dataclass(slots=True)
class RowBatch:
    """A finished batch (see `app.core.pipeline.Batch`). `cells`: the source's counts by bucket, taken before.

    `accounts`: by field, what was counted, read, and (as `new`) what the rows hold, (as `already_there`) what points
    that differ in ignored tags only have twice, and (as `set_aside`) what disagrees between these.

    `has_all_tags`: false when some rows were read back from an object of an older version, which dropped their further
    tags.
    """

    device: str
    rows: int
    digest: str
    first_ns: int | None
    last_ns: int | None
    schema: pa.Schema
    columns: Columns
    has_nanos: bool
    blocks: Sequence[pa.Table]
    spooled: BinaryIO | None = None
    cells: Mapping[datetime, int] = field(default_factory=dict)
    accounts: Mapping[str, Tally] = field(default_factory=dict)
    sums: Mapping[str, Sums] = field(default_factory=dict)
    disagreements: Sequence[Disagreement] = ()
    has_all_tags: bool = True
    united_new_rows: int | None = None
    corrected_rows: int = 0

    @property
    def new_rows(self) -> int:
        """See `Batch.new_rows`."""
        return self.rows if self.united_new_rows is None else self.united_new_rows

    @property
    def identities(self) -> Any:
        """64 bits a row, a numpy array; see `rows.identities_of`."""
        parts = [identities_of(table, self.columns.tags) for table in self.tables()]
        return np.concatenate(parts) if parts else np.empty(0, np.uint64)

    def holds_all(self, identities: Any) -> bool:
        """See `Batch.holds_all`."""
        return len(identities) <= self.rows and bool(np.isin(identities, self.identities).all())

    @property
    def min_at(self) -> datetime | None:
        """Oldest event time, to the microsecond below."""
        return instant_of(self.first_ns)

    @property
    def max_at(self) -> datetime | None:
        """Newest event time, to the microsecond below."""
        return instant_of(self.last_ns)

    @property
    def reusable(self) -> bool:
        """Large windows are spooled; reading only their tail is what saves the source work.

        Where points were merged, the values that stand in no row of their own cannot be told by their time any more.
        """
        merged = self.disagreements or any(each.already_there for each in self.accounts.values())
        return self.spooled is not None and not merged

    @property
    def output_schema(self) -> pa.Schema:
        """The documented columns, then this batch's further tags and fields. Timestamps are in nanoseconds."""
        return output_schema(self.schema, self.columns)

    def output(self) -> Iterator[pa.Table]:
        """The rows as they are written to an object."""
        schema = self.output_schema
        return (enrich(table, self.device, schema) for table in self.tables())

    def tables(self) -> Iterator[pa.Table]:
        """The rows in order, block by block, all with `schema`."""
        for block in self._spooled_blocks() if self.spooled else self.blocks:
            if len(block.schema) == len(self.schema) and block.select(self.schema.names).schema == self.schema:
                yield block.select(self.schema.names)
                continue
            aligned = {
                column.name: block.column(column.name)
                if column.name in block.column_names
                else pa.nulls(block.num_rows, column.type)
                for column in self.schema
            }
            yield pa.table(aligned, schema=self.schema)

    def _spooled_blocks(self) -> Iterator[pa.Table]:
        if self.spooled is None:
            return
        self.spooled.seek(0)
        source = pa.PythonFile(self.spooled, mode="r")
        while source.tell() < source.size():
            with pa.ipc.open_stream(source) as reader:
                yield reader.read_all()

    def close(self) -> None:
        """Remove the spool. Idempotent."""
        self.blocks = ()
        if self.spooled is not None:
            self.spooled.close()


class RowSpool:
    """Collects ordered rows into blocks of BLOCK_ROWS, digests them, and keeps them in memory or in a file."""

    def __init__(self, device: str, directory: Path, memory_rows: int, columns: Columns) -> None:
        self.device = device
        self.columns = columns
        self._directory = directory
        self._memory_rows = max(memory_rows, BLOCK_ROWS)
        self._waiting: list[pa.Table] = []
        self._waiting_rows = 0
        self._blocks: list[pa.Table] = []
        self._memory_bytes = 0
        self._file: BinaryIO | None = None
        self._types: dict[str, Any] = {}
        self._landed: Counter[str] = Counter()
        self._read: dict[str, Sums] = {}
        self._twice: Counter[str] = Counter()
        self._disagreements: list[Disagreement] = []
        self._digest = hashlib.sha256()
        self._rows = 0
        self._has_nanos = False
        self._first_ns: int | None = None
        self._last_ns: int | None = None

    def append(self, table: pa.Table) -> None:
        """Add rows in canonical order that are later than all rows before. ValueError when they are not later."""
        if table.num_rows == 0:
            return
        instants = instants_of(table)
        if self._last_ns is not None and int(instants[0]) <= self._last_ns:
            raise ValueError(f"rows of {self.device} are out of order: {instants[0]} after {self._last_ns}")
        self._first_ns = int(instants[0]) if self._first_ns is None else self._first_ns
        self._last_ns = int(instants[-1])
        self._rows += table.num_rows
        self._has_nanos = self._has_nanos or bool((instants % NANOS_PER_MICROSECOND).any())
        self._waiting.append(table)
        self._waiting_rows += table.num_rows
        if self._waiting_rows >= BLOCK_ROWS:
            self._cut(whole_blocks_only=True)

    def note(
        self, read: Mapping[str, Sums], twice: Mapping[str, int] = NONE, others: Sequence[Disagreement] = ()
    ) -> None:
        """By field: values that were read for the rows, and how many of them stand in no row of their own."""
        for name, sums in read.items():
            self._read[name] = self._read[name] + sums if name in self._read else sums
        self._twice.update(twice)
        self._disagreements += others

    @property
    def values(self) -> Mapping[str, int]:
        """By field, how many values were read."""
        return {name: sums.values for name, sums in self._read.items()}

    def finish(self, cells: Mapping[datetime, int], counted: Mapping[str, int]) -> RowBatch:
        """All that was appended, as a batch that owns the spool file. `counted`: by field, at the source before."""
        self._cut(whole_blocks_only=False)
        others = sorted(name for name in self._types if name not in (TIMESTAMP, *TAGS))
        schema = pa.schema(
            [
                (TIMESTAMP, pa.timestamp("ns", "UTC")),
                *((tag, pa.string()) for tag in TAGS),
                *((name, self._types[name]) for name in others),
            ]
        )
        return RowBatch(
            device=self.device,
            rows=self._rows,
            digest=self._digest.hexdigest(),
            first_ns=self._first_ns,
            last_ns=self._last_ns,
            schema=schema,
            columns=self.columns,
            has_nanos=self._has_nanos,
            blocks=tuple(self._blocks),
            spooled=self._file,
            cells=cells,
            accounts=self._accounts(counted),
            sums=self._read,
            disagreements=tuple(self._disagreements),
        )

    def _accounts(self, counted: Mapping[str, int]) -> Mapping[str, Tally]:
        """Rows that came between the count and the reading were counted by the reading."""
        aside = Counter(each.field for each in self._disagreements)
        landed: Counter[str] = Counter()
        for name, number in self._landed.items():
            landed[self.columns.sources.get(name) or name] += number
        read = self.values
        return {
            name: Tally(
                counted=max(counted.get(name, 0), read.get(name, 0)),
                read=read.get(name, 0),
                new=landed[name],
                already_there=self._twice[name],
                set_aside=aside[name],
            )
            for name in counted.keys() | read.keys() | landed.keys()
        }

    def abandon(self) -> None:
        """Remove what was spooled so far, after an error."""
        if self._file is not None:
            self._file.close()

    def _cut(self, *, whole_blocks_only: bool) -> None:
        if not self._waiting:
            return
        table = pa.concat_tables(self._waiting, promote_options="default")
        end = table.num_rows - table.num_rows % BLOCK_ROWS if whole_blocks_only else table.num_rows
        for start in range(0, end, BLOCK_ROWS):
            self._add(table.slice(start, min(BLOCK_ROWS, end - start)).combine_chunks())
        rest = table.slice(end)
        self._waiting, self._waiting_rows = ([rest], rest.num_rows) if rest.num_rows else ([], 0)

    def _add(self, block: pa.Table) -> None:
        # Without the columns that hold nothing.
        block = block.select([c.name for c in block.schema if block.column(c.name).null_count < block.num_rows])
        for column in block.schema:
            self._types[column.name] = column.type
            if column.name != TIMESTAMP and column.name not in self.columns.tags:
                self._landed[column.name] += block.num_rows - block.column(column.name).null_count
        _digest_block(self._digest, block)
        self._blocks.append(block)
        self._memory_bytes += block.nbytes
        if self._file or self._rows > self._memory_rows or self._memory_bytes > MEMORY_BYTES:
            self._spill()

    def _spill(self) -> None:
        if self._file is None:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self._directory, prefix="rows-")  # noqa: SIM115 - the batch closes it
        for block in self._blocks:
            with pa.ipc.new_stream(self._file, block.schema) as writer:
                writer.write_table(block)
        self._blocks.clear()
        self._memory_bytes = 0


def _digest_block(digest: Any, block: pa.Table) -> None:
    """Feed names, types and values of a block; columns without any value do not count."""
    for name in sorted(block.column_names):
        column = block.column(name).combine_chunks()
        array = column.chunk(0) if hasattr(column, "chunk") else column
        digest.update(f"{name}\0{array.type}\0{len(array)}\0{array.null_count}\0".encode())
        for part in _value_bytes(array):
            digest.update(part)


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
