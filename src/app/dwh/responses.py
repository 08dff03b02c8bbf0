"""Answers to GET: JSON, NDJSON, CSV or Parquet, read in one thread and sent in another."""

import codecs
import csv
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Any

import msgspec

from app.core.errors import AppError, Permanent, Transient
from app.core.files import temporary_file
from app.dwh.query import Format, KeysetPosition, Selection
from app.dwh.tables import TableColumn
from app.dwh.warehouse import Warehouse
from app.web.errors import Refused
from app.web.text_values import FORMULA

# Encodes rows as JSON, NDJSON, CSV or Parquet, block by block.
#
# Invariant: every format has the same rows; an encoder holds at most one block, or one row group for Parquet.

PARQUET_ROWS, PARQUET_BYTES = 20_000, 1 << 25
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


def encoded(selection: Selection, blocks: Iterable[Block], file: Any, *, made: bool) -> Iterator[bytes]:
    """The bytes of an answer; those of Parquet are written to `file`. `made`: the database builds the lines, see
    `Selection.is_made`.
    """
    columns = selection.columns
    if selection.format == "csv":
        return _csv(selection, blocks)
    if selection.format == "parquet":
        return _parquet(columns, blocks, file)
    lines = _made if made else _encoder(columns)
    return _json(blocks, lines) if selection.format == "json" else map(lines, blocks)


def _json(blocks: Iterable[Block], lines: Callable[[Block], bytes]) -> Iterator[bytes]:
    """`{"rows":[...],"count":n}`. A row never contains a newline, so each newline becomes a comma."""
    start, rows = b'{"rows":[', 0
    for block in blocks:
        yield start + lines(block)[:-1].replace(b"\n", b",")
        start, rows = b",", rows + len(block)
    yield (b"" if rows else start) + b'],"count":%d}' % rows


def _csv(selection: Selection, blocks: Iterable[Block]) -> Iterator[bytes]:
    """A header, then rows; null is an empty cell. `formula_safe`: prefix an apostrophe to text that a spreadsheet would
    take for a formula; numbers stay unchanged.
    """
    safe = {"text": _without_formula, "json": _without_formula} if selection.formula_safe else {}
    turns = _turns(selection.columns, bool=lambda value: str(bool(value)).lower(), **safe)
    header = ",".join(column.name for column in selection.columns) + "\n"
    yield (codecs.BOM_UTF8 if selection.bom else b"") + header.encode()
    for block in blocks:
        lines = _Lines()
        # Python quotes a carriage return only where it is part of the end of a line.
        csv.writer(lines, lineterminator="\r\n").writerows(_turned(block, turns))
        yield "".join([f"{line[:-2]}\n" for line in lines]).encode()


class _Lines(list[str]):
    """What a csv.writer writes to: it writes each row with one call."""

    write = list.append


def _without_formula(text: str) -> str:
    return f"'{text}" if text.startswith(tuple(FORMULA)) else text


def _parquet(columns: Sequence[TableColumn], blocks: Iterable[Block], file: Any) -> Iterator[bytes]:
    """Typed columns; JSON stays text, timestamps are UTC in microseconds. A row group has many blocks."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    types = {
        "integer": pa.int32(),
        "bigint": pa.int64(),
        "float": pa.float64(),
        "bool": pa.bool_(),
        "instant": pa.timestamp("us", tz="UTC"),
    }
    schema = pa.schema([(column.name, types.get(column.kind, pa.string())) for column in columns])
    writer, held = ParquetWriter(file, schema, compression="zstd"), list[Any]()

    def write() -> None:
        writer.write_table(pa.Table.from_batches(held, schema))
        held.clear()

    for block in blocks:
        values = zip(columns, schema.types, zip(*block, strict=True), strict=True)
        held.append(pa.record_batch([_array(*each) for each in values], schema=schema))
        if sum(map(len, held)) >= PARQUET_ROWS or sum(batch.nbytes for batch in held) >= PARQUET_BYTES:
            write()
        yield b""
    if held:
        write()
    writer.close()  # not after an error: without its end the file is no Parquet


def _array(column: TableColumn, kind: Any, values: Sequence[Any]) -> Any:
    import pyarrow as pa

    if column.kind == "instant":
        try:
            return pa.array(values, pa.string()).cast(kind)
        except pa.ArrowInvalid as error:
            what = f"{column.name} holds a timestamp of another program that Parquet cannot hold"
            raise Refused(422, what, "leave the column out of select=, or take another format", "format") from error
    if column.kind == "bool":
        return pa.array([None if value is None else bool(value) for value in values], kind)
    return pa.array(values, kind)


GZIP_FROM_BYTES = 1 << 10
GZIP_LEVEL = 1  # a tenth of the size at the speed of the database; higher levels cost more than they save


def gzipped(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The pieces, compressed."""
    packer = zlib.compressobj(GZIP_LEVEL, wbits=31)
    yield from filter(None, map(packer.compress, pieces))
    yield packer.flush()


# A byte buffer between a writing and a reading thread, each at its own speed.
#
# Invariants: unread bytes are in an unnamed file in TMPDIR, except the first ones, which stay in memory; bytes are read
# once, in order; a reader never waits for a writer that has ended, whether or not it failed.

MEMORY_BYTES = 1 << 16  # small, since every connection may have a slow client


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
        error: AppError | None = Permanent(
            "the response could not be completed", "report it with the log, which says why"
        )
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
        self._gzip = gzip and selection.format != "parquet"
        # Valid once the reader may begin: the last row if more follow, the number of matching rows, if asked, and
        # whether the bytes are gzip.
        self.last: KeysetPosition | None = None
        self.total: int | None = None
        self.compressed = False

    def look(self) -> None:
        """Get the data for the headers without reading rows. Raises what the database raises."""
        with self._warehouse.selected(self._selection, count=self._count) as found:
            self.last, self.total = found.last(), found.total

    def produce(self) -> None:
        """Read all rows, or until the client disconnects. `wait` and `pieces` raise any error."""
        chosen, shown = self._selection, False
        with (
            suppress(ClientDisconnected),
            self.written(),
            self._warehouse.selected(chosen, count=self._count) as found,
        ):
            self.total = found.total
            made = chosen.is_made(self._warehouse.database.dialect)
            pieces = encoded(chosen, self._rows(found.blocks, made=made), self, made=made)
            for piece in self._packed(pieces) if self._gzip else pieces:
                self.write(piece)
                if not shown and self.size_bytes >= HEAD_BYTES:
                    self.last, shown = found.last(), True
                    self.show()

    def _rows(self, blocks: Iterable[Block], *, made: bool) -> Iterator[Block]:
        """The rows that were asked for, without the columns that only `last` needs."""
        left, width = self._selection.limit, len(self._selection.columns)
        last_row: Sequence[Any] = ()
        for block in blocks:
            if asked := block[:left]:
                left, last_row = left - len(asked), asked[-1]
                yield [row[:width] for row in asked] if not made and len(last_row) > width else asked
            if len(asked) < len(block) and last_row:
                self.last = self._selection.place_of(last_row, self._warehouse.database.dialect)

    def _packed(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """The pieces, compressed if there is enough to be worth it."""
        start = b""
        while len(start) < GZIP_FROM_BYTES and (piece := next(pieces, None)) is not None:
            start += piece
        self.compressed = len(start) >= GZIP_FROM_BYTES
        yield from gzipped(chain([start], pieces)) if self.compressed else [start]

    def pieces(self) -> Iterator[bytes]:
        """The bytes. Raises what the database raised while reading."""
        while piece := self.read(PIECE_BYTES):
            yield piece
