"""Rows as the bytes of an answer: JSON, NDJSON, CSV or Parquet, written to a file block by block.

Invariant: the same rows in each; a writer holds one block, of Parquet one row group, at most.
"""

import csv
import io
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from app.dwh.query import Format, Selection
from app.dwh.tables import Column, Table

PARQUET_ROWS = 20_000
MEDIA: dict[Format, str] = {
    "json": "application/json",
    "ndjson": "application/x-ndjson",
    "csv": "text/csv; charset=utf-8",
    "parquet": "application/vnd.apache.parquet",
}
Block = Sequence[Sequence[Any]]


class Writer(Protocol):
    """Writes blocks of rows to a file."""

    def write(self, block: Block) -> None:
        """The next rows."""

    def close(self) -> None:
        """No more rows."""


def _flags(columns: Sequence[Column]) -> Sequence[int]:
    return [place for place, column in enumerate(columns) if column.kind == "bool"]


def _turned(block: Block, places: Sequence[int], turn: Callable[[Any], Any]) -> Block:
    """The block with the values at `places` turned; most tables have none."""
    if not places:
        return block
    rows = [list(row) for row in block]
    for row in rows:
        for place in places:
            row[place] = None if row[place] is None else turn(row[place])
    return rows


def _encoder(table: Table) -> Callable[[Block], bytes]:
    """Rows as lines of JSON, encoded in compiled code from a row type that holds what the database gave."""
    import msgspec

    names = [column.name for column in table.stored]
    row: Any = msgspec.defstruct(f"Stored_{table.name}", [(name, Any) for name in names], gc=False)
    encode = msgspec.json.Encoder().encode_lines
    flags = _flags(table.stored)
    json = [place for place, column in enumerate(table.stored) if column.kind == "json"]
    return lambda block: encode([row(*values) for values in _turned(_turned(block, flags, bool), json, msgspec.Raw)])


def _made(block: Block) -> bytes:
    """As `_encoder`, of lines that the database has made; beside each, its id."""
    return ("\n".join([line for _, line in block]) + "\n").encode()


class _Lines:
    """NDJSON."""

    def __init__(self, file: Any, lines: Callable[[Block], bytes]) -> None:
        self._file, self._lines = file, lines

    def write(self, block: Block) -> None:
        """See `Writer.write`."""
        self._file.write(self._lines(block))

    def close(self) -> None:
        """See `Writer.close`."""


class _Json:
    """`{"rows":[...],"count":n}`."""

    def __init__(self, file: Any, lines: Callable[[Block], bytes]) -> None:
        self._file, self._lines = file, lines
        self._rows = 0
        file.write(b'{"rows":[')

    def write(self, block: Block) -> None:
        """See `Writer.write`; a newline is never inside a row, so each one becomes a comma."""
        self._file.write((b"," if self._rows else b"") + self._lines(block)[:-1].replace(b"\n", b","))
        self._rows += len(block)

    def close(self) -> None:
        """See `Writer.close`."""
        self._file.write(b'],"count":%d}' % self._rows)


class _Csv:
    """A header, then rows; null is an empty cell."""

    def __init__(self, table: Table, file: Any) -> None:
        self._file = file
        self._flags = _flags(table.stored)
        self.write([[column.name for column in table.stored]])

    def write(self, block: Block) -> None:
        """See `Writer.write`."""
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows(_turned(block, self._flags, _flag))
        self._file.write(text.getvalue().encode())

    def close(self) -> None:
        """See `Writer.close`."""


def _flag(value: Any) -> Any:
    return value if isinstance(value, str) else str(bool(value)).lower()


class _Parquet:
    """Typed columns; JSON stays text, instants are UTC in microseconds."""

    def __init__(self, table: Table, file: Any) -> None:
        import pyarrow as pa
        from pyarrow.parquet import ParquetWriter

        types = {
            "integer": pa.int32(),
            "bigint": pa.int64(),
            "float": pa.float64(),
            "bool": pa.bool_(),
            "instant": pa.timestamp("us", tz="UTC"),
        }
        self._columns = table.stored
        self._schema = pa.schema([(column.name, types.get(column.kind, pa.string())) for column in table.stored])
        self._writer = ParquetWriter(file, self._schema, compression="zstd")
        self._held: list[Sequence[Any]] = []

    def write(self, block: Block) -> None:
        """See `Writer.write`. A row group takes many blocks."""
        self._held += block
        if len(self._held) >= PARQUET_ROWS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        values = zip(*self._held, strict=True)
        arrays = [self._array(column, each) for column, each in zip(self._columns, values, strict=True)]
        self._writer.write_batch(pa.record_batch(arrays, schema=self._schema))
        self._held.clear()

    def _array(self, column: Column, values: Sequence[Any]) -> Any:
        import pyarrow as pa

        kind = self._schema.field(column.name).type
        if column.kind == "instant":
            return pa.array(values, pa.string()).cast(kind)
        if column.kind == "bool":
            return pa.array([None if value is None else bool(value) for value in values], kind)
        return pa.array(values, kind)

    def close(self) -> None:
        """See `Writer.close`."""
        if self._held:
            self._flush()
        self._writer.close()


def writer(selection: Selection, file: Any, *, made: bool) -> Writer:
    """The writer of an answer. `made`: the database makes the lines, see `Selection.is_made`."""
    table = selection.table
    if selection.format == "csv":
        return _Csv(table, file)
    if selection.format == "parquet":
        return _Parquet(table, file)
    lines = _made if made else _encoder(table)
    return (_Json if selection.format == "json" else _Lines)(file, lines)
