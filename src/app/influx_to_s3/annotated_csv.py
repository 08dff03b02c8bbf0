"""Parse InfluxDB's annotated CSV into Arrow columns; memory is bounded by the block size, not by the response.

Bytes are cut into blocks at row ends outside quotes. Arrow's compiled reader parses each block with the types of the
annotations in force. A response may hold one table per series, so rows of many small tables with the same schema are
collected and parsed together. Invariants: the result does not depend on how the bytes were chunked; a response that is
truncated, malformed or ends in an error table raises and never silently yields fewer rows.

Format: https://docs.influxdata.com/influxdb/v2/reference/syntax/annotated-csv/, details as in flux `csv/result.go`.
"""

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from app.core.errors import AppError, Permanent, Transient
from app.influx_to_s3.reader import TOO_MUCH, QueryTooLarge

BLOCK_BYTES = 1 << 20
QUOTE = 0x22
HEAD_ROW = re.compile(rb"\n(?=#|\r?\n)")
BLANK_ROW = re.compile(rb"\n(?=\r?\n)")
BLANK_ROWS = re.compile(rb"\r?\n[\r\n]*")
TYPES = {
    "long": pa.int64(),
    "unsignedLong": pa.uint64(),
    "double": pa.float64(),
    "boolean": pa.bool_(),
    "dateTime:number": pa.int64(),
    "dateTime:RFC3339": pa.timestamp("ns", "UTC"),
    "dateTime:RFC3339Nano": pa.timestamp("ns", "UTC"),
}
"""The Arrow type of a #datatype; durations and base64 stay text."""
ENVELOPE = 3  # the annotation's name, `result` and `table` come before the data


@dataclass(frozen=True, slots=True)
class CsvBlock:
    """Rows of one schema as three parallel sequences. Names may repeat, so columns are addressed by position.

    `grouped`: whether the column is part of the group key. After a pivot those columns are the tags of the series.
    """

    names: Sequence[str]
    grouped: Sequence[bool]
    columns: Sequence[pa.ChunkedArray]


def read_blocks(
    chunks: Iterable[bytes], block_bytes: int = BLOCK_BYTES, known: frozenset[str] = frozenset()
) -> Iterator[CsvBlock]:
    """Parse a response body, given as chunks of any size. Group key columns named in `known` are left out.

    Raises Transient when the body ends inside a header or a quoted value and for in-band errors that may pass,
    QueryTooLarge where a smaller query would succeed, Permanent for responses that are not annotated CSV.
    """
    schemas: dict[bytes, _Schema] = {}
    schema: _Schema | None = None
    head = b""
    waiting_bytes = 0
    for rows in _whole_rows(chunks, block_bytes):
        if schema and not (head or waiting_bytes or schema.is_error or b"#" in rows or BLANK_ROWS.match(rows)):
            yield schema.block(rows)
            continue
        position = 0
        while position < len(rows):
            if head or rows.startswith(b"#", position):
                end = _line_end(rows, position)
                head += rows[position:end]
                if not rows.startswith(b"#", position):  # the header row ends the annotations
                    schema = schemas.get(head) or schemas.setdefault(head, _Schema(head, known))
                    head = b""
            else:
                end = _next_head(rows, position)
                waiting_bytes += _put_off(schema, rows[position:end])
                if blank := BLANK_ROWS.match(rows, end):
                    end = blank.end()
            position = end
        if waiting_bytes >= block_bytes:
            yield from _waiting_in(schemas.values())
            waiting_bytes = 0
    yield from _waiting_in(schemas.values())
    if head or (schema and schema.is_error):
        raise Transient("InfluxDB's response ends inside a header", "no action needed: the window is read again")


def error_of(message: str) -> AppError:
    """Classify an in-band error by whether a retry or a smaller query can help."""
    shown = message[:300]
    if any(word in message.lower() for word in TOO_MUCH):
        return QueryTooLarge(
            f"InfluxDB stopped inside its response: {shown}", "no action needed: a shorter range is tried"
        )
    return Transient(
        f"InfluxDB reports an error inside its response: {shown}", "no action needed: the window is read again"
    )


class _Schema:
    """The annotations and the header row in force: how to parse the rows that follow."""

    def __init__(self, head: bytes, known: frozenset[str]) -> None:
        rows = list(csv.reader(io.StringIO(head.decode("utf-8", "replace"), newline="")))
        annotations, header = {row[0]: row for row in rows[:-1]}, rows[-1]
        self.is_error = header[1:] == ["error", "reference"]
        self.waiting: list[bytes] = []
        types = annotations.get("#datatype", [])
        if len(types) != len(header):
            raise Permanent(
                f"the response's header is not annotated CSV: {head[:200]!r}",
                "check that INFLUXDB_URL is an InfluxDB 2 server, or set INFLUXDB_API=influxql",
            )
        groups = [word == "true" for word in annotations.get("#group", ())] or [False] * len(header)
        defaults = annotations.get("#default") or [""] * len(header)
        # Data columns may also be called `result` or `table`, so the envelope is identified by position, not by name.
        kept = [at for at in range(ENVELOPE, len(header)) if not (groups[at] and header[at] in known)]
        self.names = [header[at] for at in kept]
        self.grouped = [groups[at] for at in kept]
        self._defaults = [defaults[at] for at in kept]
        self._places = [str(at) for at in range(len(header))]
        self._convert = pacsv.ConvertOptions(
            include_columns=[str(at) for at in kept],
            column_types={str(at): TYPES.get(types[at], pa.string()) for at in kept},
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
            true_values=["true"],
            false_values=["false"],
        )

    def block(self, rows: bytes) -> CsvBlock:
        """Parse whole rows."""
        try:
            # `read_csv` hands even the smallest block to another thread; this reader stays in the calling one.
            with pacsv.open_csv(
                pa.BufferReader(rows),
                # A single block holds all rows, so that no newline inside quotes falls on a block boundary.
                read_options=pacsv.ReadOptions(
                    column_names=self._places, block_size=max(len(rows) + 1, 1 << 16), use_threads=False
                ),
                convert_options=self._convert,
            ) as reader:
                table = reader.read_all()
            # An empty cell of a column with a #default means that default.
            columns = [
                column.fill_null(pa.array([default]).cast(column.type)[0]) if default else column
                for column, default in zip(table.columns, self._defaults, strict=True)
            ]
        except pa.ArrowInvalid as error:
            raise Transient(
                f"InfluxDB's response holds a row that does not fit its header: {error}",
                "no action needed: the window is read again; if it stays, set INFLUXDB_API=influxql",
            ) from error
        # The server writes a newline inside a value as CRLF; convert it back.
        if QUOTE in rows and rows.count(b"\n") > table.num_rows:
            columns = [
                pc.replace_substring(column, "\r\n", "\n") if column.type == pa.string() else column
                for column in columns
            ]
        return CsvBlock(self.names, self.grouped, columns)


def _put_off(schema: _Schema | None, rows: bytes) -> int:
    """Buffer data rows until a block is full. Returns the number of bytes.

    Raises for rows of an error table and for rows without a header.
    """
    if not rows:
        return 0
    if schema is None:
        raise Permanent(
            f"the response is not annotated CSV: {rows[:200]!r}",
            "check that INFLUXDB_URL is an InfluxDB 2 server, or set INFLUXDB_API=influxql",
        )
    if schema.is_error:
        raise error_of(rows.decode("utf-8", "replace").strip(" ,\r\n"))
    schema.waiting.append(rows)
    return len(rows)


def _waiting_in(schemas: Iterable[_Schema]) -> Iterator[CsvBlock]:
    for schema in schemas:
        if rows := b"".join(schema.waiting):
            schema.waiting.clear()
            yield schema.block(rows)


def _whole_rows(chunks: Iterable[bytes], block_bytes: int) -> Iterator[bytes]:
    """The same bytes in pieces of at least `block_bytes` that end at a row end; the last piece may be shorter."""
    parts: list[bytes] = []
    size = 0
    for chunk in chunks:
        parts.append(chunk)
        size += len(chunk)
        if size >= block_bytes:
            block = b"".join(parts)
            cut = _last_row_end(block)
            if cut:
                yield block[:cut]
            parts, size = [block[cut:]], len(block) - cut
    if size:
        block = b"".join(parts)
        if not _closed(block, 0, len(block)):
            raise Transient(
                "InfluxDB's response ends inside a quoted value", "no action needed: the window is read again"
            )
        if not block.endswith(b"\n"):
            raise Transient("InfluxDB's response ends inside a row", "no action needed: the window is read again")
        yield block


def _closed(block: bytes, start: int, end: int) -> bool:
    """True when no quote is open at `end`, given that none is at `start`. numpy counts 3 times faster than bytes."""
    if block.find(b'"', start, end) < 0:
        return True

    return not np.count_nonzero(np.frombuffer(block, np.uint8, end - start, start) == QUOTE) & 1


def _line_end(rows: bytes, position: int) -> int:
    """The offset just past the row that begins at `position`."""
    end = rows.find(b"\n", position) + 1
    while not _closed(rows, position, end):
        end = rows.find(b"\n", end) + 1
    return end


def _last_row_end(block: bytes) -> int:
    """The offset just past the last newline outside quotes, 0 when there is none."""
    end = len(block)
    is_outside = _closed(block, 0, end)
    while (newline := block.rfind(b"\n", 0, end)) >= 0:
        is_outside = is_outside == _closed(block, newline, end)
        if is_outside:
            return newline + 1
        end = newline
    return 0


def _next_head(rows: bytes, position: int) -> int:
    """The offset of the next blank or annotation line outside quotes, or the length if there is none."""
    if BLANK_ROWS.match(rows, position):
        return position
    # Most blocks hold no annotation: one search for `#` is much cheaper than checking the start of every row.
    pattern = BLANK_ROW if rows.find(b"#", position) < 0 else HEAD_ROW
    counted_to, is_outside = position, True  # texts may hold many such lines, so no quote is counted twice
    for found in pattern.finditer(rows, position):
        is_outside = is_outside == _closed(rows, counted_to, found.start())
        counted_to = found.start()
        if is_outside:
            return found.end()
    return len(rows)
