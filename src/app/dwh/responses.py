"""Answers to GET: JSON, NDJSON, CSV or Parquet, read in one thread and sent in another."""

import codecs
import csv
import io
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import msgspec

from app.core.errors import AppError, Permanent, Transient
from app.core.files import temporary_file
from app.dwh.query import Format, KeysetPosition, Selection
from app.dwh.tables import TableColumn
from app.dwh.warehouse import Warehouse
from app.web.errors import Refused
from app.web.text_values import FORMULA

# Encodes rows as JSON, NDJSON, CSV or Parquet, written to a file block by block.
#
# Invariant: every format has the same rows; a writer holds at most one block, or one row group for Parquet.

PARQUET_ROWS = 20_000
MEDIA: dict[Format, str] = {
    "json": "application/json",
    "ndjson": "application/x-ndjson",
    "csv": "text/csv; charset=utf-8",
    "parquet": "application/vnd.apache.parquet",
}
Block = Sequence[Sequence[Any]]


def _turned(block: Block, turns: Mapping[int, Callable[[Any], Any]]) -> Block:
    """The block with the values of some columns converted; most tables need no conversion."""
    if not turns:
        return block
    rows = [list(row) for row in block]
    for row in rows:
        for place, turn in turns.items():
            row[place] = None if row[place] is None else turn(row[place])
    return rows


def _turns(columns: Sequence[TableColumn], **by_kind: Callable[[Any], Any]) -> Mapping[int, Callable[[Any], Any]]:
    return {place: by_kind[column.kind] for place, column in enumerate(columns) if column.kind in by_kind}


def _encoder(columns: Sequence[TableColumn]) -> Callable[[Block], bytes]:
    """Encodes rows as lines of JSON in compiled code, using a row type that holds the database's values."""
    row: Any = msgspec.defstruct("StoredRow", [(column.name, Any) for column in columns], gc=False)
    encode = msgspec.json.Encoder().encode_lines
    turns = _turns(columns, bool=bool, json=msgspec.Raw)
    return lambda block: encode([row(*values) for values in _turned(block, turns)])


def _made(block: Block) -> bytes:
    """As `_encoder`, for rows of an id and a line of JSON that the database built."""
    return ("\n".join([line for _, line in block]) + "\n").encode()


class NdjsonWriter:
    """NDJSON: writes blocks of rows to a file."""

    def __init__(self, file: Any, lines: Callable[[Block], bytes]) -> None:
        self._file, self._lines = file, lines

    def write(self, block: Block) -> None:
        """Write the next rows."""
        self._file.write(self._lines(block))

    def close(self) -> None:
        """Finish the output."""


class _JsonWriter(NdjsonWriter):
    """`{"rows":[...],"count":n}`."""

    def __init__(self, file: Any, lines: Callable[[Block], bytes]) -> None:
        super().__init__(file, lines)
        self._rows = 0
        file.write(b'{"rows":[')

    def write(self, block: Block) -> None:
        """Write the next rows. A row never contains a newline, so each newline becomes a comma."""
        self._file.write((b"," if self._rows else b"") + self._lines(block)[:-1].replace(b"\n", b","))
        self._rows += len(block)

    def close(self) -> None:
        """Write the end of the array."""
        self._file.write(b'],"count":%d}' % self._rows)


class _CsvWriter(NdjsonWriter):
    """A header, then rows; null is an empty cell. `formula_safe`: prefix an apostrophe to text that a spreadsheet would
    take for a formula; numbers stay unchanged.
    """

    def __init__(self, columns: Sequence[TableColumn], file: Any, *, bom: bool, formula_safe: bool) -> None:
        super().__init__(file, self._cells)
        safe = {"text": _without_formula, "json": _without_formula} if formula_safe else {}
        self._turns = _turns(columns, bool=lambda value: str(bool(value)).lower(), **safe)
        if bom:
            file.write(codecs.BOM_UTF8)
        file.write((",".join(column.name for column in columns) + "\n").encode())

    def _cells(self, block: Block) -> bytes:
        cells = _turned(block, self._turns)
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows(cells)
        return (_with_quoted_returns(cells) if "\r" in text.getvalue() else text.getvalue()).encode()


def _with_quoted_returns(block: Block) -> str:
    """Encode rows that contain a carriage return, which Python quotes only if it is part of the line terminator."""
    lines = io.StringIO(newline="")
    for row in block:
        line = io.StringIO(newline="")
        csv.writer(line, lineterminator="\r\n").writerow(row)
        lines.write(line.getvalue()[:-2] + "\n")
    return lines.getvalue()


def _without_formula(text: str) -> str:
    return f"'{text}" if text.startswith(tuple(FORMULA)) else text


class _ParquetWriter(NdjsonWriter):
    """Typed columns; JSON stays text, timestamps are UTC in microseconds."""

    def __init__(self, columns: Sequence[TableColumn], file: Any) -> None:
        import pyarrow as pa
        from pyarrow.parquet import ParquetWriter

        types = {
            "integer": pa.int32(),
            "bigint": pa.int64(),
            "float": pa.float64(),
            "bool": pa.bool_(),
            "instant": pa.timestamp("us", tz="UTC"),
        }
        self._columns = columns
        self._schema = pa.schema([(column.name, types.get(column.kind, pa.string())) for column in columns])
        self._writer = ParquetWriter(file, self._schema, compression="zstd")
        self._held: list[Sequence[Any]] = []

    def write(self, block: Block) -> None:
        """Add the next rows; a row group has many blocks."""
        self._held += block
        if len(self._held) >= PARQUET_ROWS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        values = zip(*self._held, strict=True)
        arrays = [self._array(column, each) for column, each in zip(self._columns, values, strict=True)]
        self._writer.write_batch(pa.record_batch(arrays, schema=self._schema))
        self._held.clear()

    def _array(self, column: TableColumn, values: Sequence[Any]) -> Any:
        import pyarrow as pa

        kind = self._schema.field(column.name).type
        if column.kind == "instant":
            try:
                return pa.array(values, pa.string()).cast(kind)
            except pa.ArrowInvalid as error:
                what = f"{column.name} holds a timestamp of another program that Parquet cannot hold"
                raise Refused(422, what, "leave the column out of select=, or take another format", "format") from error
        if column.kind == "bool":
            return pa.array([None if value is None else bool(value) for value in values], kind)
        return pa.array(values, kind)

    def close(self) -> None:
        """Write the last row group and the footer."""
        if self._held:
            self._flush()
        self._writer.close()


def writer(selection: Selection, file: Any, *, made: bool) -> NdjsonWriter:
    """The writer of an answer. `made`: the database builds the lines, see `Selection.is_made`."""
    columns = selection.columns
    if selection.format == "csv":
        return _CsvWriter(columns, file, bom=selection.bom, formula_safe=selection.formula_safe)
    if selection.format == "parquet":
        return _ParquetWriter(columns, file)
    lines = _made if made else _encoder(columns)
    return (_JsonWriter if selection.format == "json" else NdjsonWriter)(file, lines)


# Answers above a minimum size are compressed if the client accepts it.

GZIP_FROM_BYTES = 1 << 10
GZIP_LEVEL = 1  # a tenth of the size at the speed of the database; higher levels cost more than they save


def gzipped(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The pieces, compressed."""
    packer = zlib.compressobj(GZIP_LEVEL, wbits=31)
    yield from filter(None, map(packer.compress, pieces))
    yield packer.flush()


class GzipWriter:
    """A file that compresses its data once there is enough to be worth it. Close it to write the end."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._held = b""
        self._compress: Any = None

    @property
    def started(self) -> bool:
        """Whether the output is compressed."""
        return self._compress is not None

    def write(self, piece: bytes) -> None:
        """The next bytes."""
        if self._compress is None:
            self._held += piece
            if len(self._held) < GZIP_FROM_BYTES:
                return
            self._compress, piece = zlib.compressobj(GZIP_LEVEL, wbits=31), self._held
        self._file.write(self._compress.compress(piece))

    def close(self) -> None:
        """Write the last bytes."""
        self._file.write(self._compress.flush() if self._compress else self._held)


# A byte buffer between a writing and a reading thread, each at its own speed.
#
# Invariants: unread bytes are in an unnamed file in TMPDIR, except the first ones, which stay in memory; bytes are read
# once, in order; a reader never waits for a writer that has ended, whether or not it failed.

MEMORY_BYTES = 1 << 16  # small, since every connection may have a slow client
BROKEN = Permanent("the response could not be completed", "report it with the log, which says why")


class ClientDisconnected(Exception):
    """The reader has gone."""


class ByteSpool:
    """One writer and one reader."""

    closed = False  # file writers check this

    def __init__(self) -> None:
        self._file = temporary_file(memory_bytes=MEMORY_BYTES)
        self._first = self._end = 0  # range of the unread bytes in the file
        self._changed = threading.Condition()
        self._shown = self._ended = self._abandoned = False
        self._error: AppError | None = None
        self.size_bytes = 0

    @contextmanager
    def written(self) -> Iterator["ByteSpool"]:
        """Write inside the block. Its end completes the bytes; if it raises, the reader gets the error."""
        error: AppError | None = BROKEN
        try:
            yield self
            error = None
        except AppError as raised:
            error = raised
        finally:
            with self._changed:
                self._ended, self._error = True, error
                self._changed.notify_all()

    def write(self, piece: bytes) -> int:
        """Append bytes. Raises ClientDisconnected, and Transient when the disk is full."""
        with self._changed:
            if self._abandoned:
                raise ClientDisconnected
            try:
                self._file.seek(self._end)
                self._file.write(piece)
            except OSError as error:
                raise Transient(
                    f"the answer cannot be spooled: {error.strerror}", "free space in TMPDIR, or ask for fewer rows"
                ) from error
            self._end += len(piece)
            self.size_bytes += len(piece)
            self._changed.notify_all()
        return len(piece)

    def flush(self) -> None:
        """Part of the file interface; does nothing."""

    def tell(self) -> int:
        """The position of the next byte."""
        return self.size_bytes

    def show(self) -> None:
        """Let the reader begin."""
        with self._changed:
            self._shown = True
            self._changed.notify_all()

    def wait(self, *, whole: bool = False) -> int | None:
        """Wait until the reader may begin or the bytes are complete; returns the size if complete. Raises the writer's
        error.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._ended or (self._shown and not whole))
            if self._ended and self._error:
                raise self._error
            return self.size_bytes if self._ended else None

    def read(self, count: int) -> bytes:
        """The next `count` bytes; fewer or none at the end. Raises the writer's error."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._abandoned or self._end - self._first >= count)
            if self._abandoned:
                return b""
            if self._first == self._end and self._error:
                raise self._error
            self._file.seek(self._first)
            piece = self._file.read(min(count, self._end - self._first))
            self._first += len(piece)
            if self._first == self._end:  # the reader has caught up: reuse the file from its start
                self._first = self._end = 0
            return piece

    def close(self) -> None:
        """Free the bytes; the writer's next write raises ClientDisconnected. Idempotent."""
        with self._changed:
            self._abandoned = True
            self._file.close()


# Answers to GET: one thread reads rows at the speed of the database, another sends them at the speed of the client.
#
# Invariants: a failure before the first byte is an error response; a later one truncates the answer, so that no client
# takes it for complete; memory is bounded, and a slow reader holds no database connection.

HEAD_BYTES, PIECE_BYTES = 1 << 18, 1 << 19


class AnswerPage(ByteSpool):
    """One answer: `produce` runs in one thread, the rest in another. The reader closes it, which stops the database
    read at the next block.
    """

    def __init__(self, warehouse: Warehouse, selection: Selection, *, count: bool = False, gzip: bool = False) -> None:
        super().__init__()
        self._warehouse = warehouse
        self._selection = selection
        self._count = count
        self._gzip = GzipWriter(self) if gzip and selection.format != "parquet" else None
        # Valid once the reader may begin: the last row if more follow, and the number of matching rows, if asked.
        self.last: KeysetPosition | None = None
        self.total: int | None = None

    def produce(self) -> None:
        """Read all rows, or until the client disconnects. `wait` and `pieces` raise any error."""
        with suppress(ClientDisconnected), self.written():
            self._fill()

    def look(self) -> None:
        """Get the data for the headers without reading rows. Raises what the database raises."""
        with self._warehouse.selected(self._selection, count=self._count) as found:
            self.last, self.total = found.last(), found.total

    def _fill(self) -> None:
        """Write the rows; `last` is set before the reader may begin."""
        chosen, dialect = self._selection, self._warehouse.database.dialect
        made = chosen.is_made(dialect)
        out = writer(chosen, self._gzip or self, made=made)
        width = len(chosen.columns)
        left, last_row, shown = chosen.limit, None, False
        with self._warehouse.selected(chosen, count=self._count) as found:
            self.total = found.total
            for block in found.blocks:
                if asked := block[:left]:
                    left, last_row = left - len(asked), asked[-1]
                    out.write([row[:width] for row in asked] if not made and len(last_row) > width else asked)
                if len(asked) < len(block) and not shown and last_row:
                    self.last = chosen.place_of(last_row, dialect)
                if not shown and self.size_bytes >= HEAD_BYTES:
                    self.last, shown = found.last(), True
                    self.show()
        out.close()
        if self._gzip:
            self._gzip.close()

    @property
    def compressed(self) -> bool:
        """Whether the bytes are gzip; valid once the reader may begin."""
        return self._gzip is not None and self._gzip.started

    def pieces(self) -> Iterator[bytes]:
        """The bytes. Raises what the database raised while reading."""
        while piece := self.read(PIECE_BYTES):
            yield piece
