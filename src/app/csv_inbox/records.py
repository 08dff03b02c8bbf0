"""CSV as bytes: where records end, which fields they have, and the values of a few chosen columns.

Invariants: a block holds whole records and begins where one begins, so memory is bounded by the block and by the
longest record; quotes follow the csv module (a quote opens only at the start of a field, elsewhere it is text); what
cannot be read as records of one width is an error that names the line, never a guess.
"""

import csv
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from app.core.errors import AppError

if TYPE_CHECKING:
    import pyarrow as pa

Offsets = npt.NDArray[np.int64]
Read = Callable[[int], bytes]

BLOCK_BYTES = 1 << 19
LONGEST_RECORD_BYTES = 1 << 24
BOM = b"\xef\xbb\xbf"
LF, CR, QUOTE = 10, 13, 34


class Malformed(AppError):
    """Not CSV of one width. `line` is that of the file, None where it is not known; `record` the raw record."""

    def __init__(self, message: str, line: int | None = None, record: bytes = b"") -> None:
        super().__init__(message)
        self.line = line
        self.record = record


class Dialect:
    """How records are written. `encoding` keeps ASCII as it is; `delimiter` is one ASCII character."""

    def __init__(self, delimiter: str, encoding: str) -> None:
        self.delimiter = delimiter
        self.encoding = "utf-8" if encoding == "utf-8-sig" else encoding
        self.bom = BOM if encoding == "utf-8-sig" else b""
        d = re.escape(delimiter.encode("ascii"))
        quoted = rb'"(?:[^"]++|"")*+"[^' + d + rb"\n]*+"
        plain = rb'(?!")[^' + d + rb"\n]*+"
        self._field = re.compile(rb"(?:" + quoted + rb"|" + plain + rb")")
        self._record = re.compile(
            rb"(?:" + quoted + rb"|" + plain + rb")(?:" + d + rb"(?:" + quoted + rb"|" + plain + rb"))*+\n"
        )
        self._opens = np.array([delimiter.encode()[0], LF, QUOTE], np.uint8)
        self._closes = np.array([delimiter.encode()[0], LF, CR, QUOTE], np.uint8)

    def fields(self, record: bytes) -> list[bytes]:
        """The raw fields of one record without its line end, quotes and all."""
        d = self.delimiter.encode("ascii")
        if b'"' not in record:
            return record.split(d)
        found = []
        at = 0
        while True:
            match = self._field.match(record, at)
            if match is None:  # an opening quote that is never closed
                found.append(record[at:])
                return found
            found.append(match[0])
            at = match.end() + 1
            if at > len(record):
                return found

    def values(self, record: bytes) -> list[str]:
        """The decoded values of one record. Raises UnicodeDecodeError."""
        text = record.decode(self.encoding)
        return next(csv.reader(io.StringIO(text, newline=""), delimiter=self.delimiter), [""])

    def ends(self, data: bytes) -> Offsets:
        """The offset behind each line end that ends a record; `data` begins where a record begins."""
        array = np.frombuffer(data, np.uint8)
        ends = np.flatnonzero(array == LF)
        quotes = np.flatnonzero(array == QUOTE) if b'"' in data else None
        if quotes is not None and not self._strict(array, quotes):
            return self._walked(data)
        if quotes is not None:
            ends = ends[(np.searchsorted(quotes, ends) & 1) == 0]
        if b"\r" in data:
            _no_lone_return(array, quotes)
        return ends + 1

    def _strict(self, array: npt.NDArray[np.uint8], quotes: Offsets) -> bool:
        """True when every quote opens, closes or doubles as writers do it: then counting them tells what is quoted."""
        opening, closing = quotes[0::2], quotes[1::2]
        before = array[opening[opening > 0] - 1]
        after = array[closing[closing < len(array) - 1] + 1]
        return bool(np.isin(before, self._opens).all() and np.isin(after, self._closes).all())

    def _walked(self, data: bytes) -> Offsets:
        """The same, record by record: for quotes inside plain fields, such as 5" in a list of sizes."""
        ends = []
        at = 0
        while match := self._record.match(data, at):
            at = match.end()
            ends.append(at)
        return np.array(ends, np.int64)


def _no_lone_return(array: npt.NDArray[np.uint8], quotes: Offsets | None) -> None:
    returns = np.flatnonzero(array == CR)
    returns = returns[returns < len(array) - 1]
    lone = returns[array[returns + 1] != LF]
    if quotes is not None:
        lone = lone[(np.searchsorted(quotes, lone) & 1) == 0]
    if len(lone):
        line = 1 + int(np.count_nonzero(array[: lone[0]] == LF))
        raise Malformed("a carriage return that ends no line; write line ends as LF or CRLF", line)


@dataclass(frozen=True)
class Block:
    """Whole records. `ends` are offsets behind each; the last record of a file may lack its line end."""

    data: bytes
    ends: Offsets
    line: int
    """Line of the file on which the block begins."""

    @cached_property
    def starts(self) -> Offsets:
        """The offset of each record."""
        return np.concatenate(([0], self.ends[:-1]))

    @cached_property
    def stops(self) -> Offsets:
        """The offset of each record's line end; what is blank has `stops == starts`."""
        array = np.frombuffer(self.data, np.uint8)
        stops = self.ends - (array[self.ends - 1] == LF)
        before = np.maximum(stops - 1, 0)
        crlf = (stops > self.starts) & (array[before] == CR) & (stops < self.ends)
        found: Offsets = stops - crlf
        return found

    @cached_property
    def rows(self) -> Offsets:
        """Positions of the records that are rows: lines with nothing in them are none."""
        if len(self.ends) == 0 or int((self.ends - self.starts).min()) > 2:  # noqa: PLR2004 - longer than CRLF: no blank
            return np.arange(len(self.ends))
        return np.flatnonzero(self.stops > self.starts)

    def line_of(self, position: int) -> int:
        """The line of the file on which a record begins."""
        return self.line + self.data.count(b"\n", 0, int(self.starts[position]))

    def record(self, position: int) -> bytes:
        """One record without its line end."""
        return self.data[int(self.starts[position]) : int(self.stops[position])]


def blocks(read: Read, dialect: Dialect, line: int, size: int = BLOCK_BYTES) -> Iterator[Block]:
    """The records that `read` gives from here on. Raises Malformed for a quote that is never closed."""
    tail = b""
    while piece := read(max(size, len(tail))):
        data = tail + piece if tail else piece
        ends = _placed(dialect, data, line)
        if not len(ends):
            if len(data) > LONGEST_RECORD_BYTES:
                raise Malformed(f"a record longer than {LONGEST_RECORD_BYTES >> 20} MiB: a quote is not closed", line)
            tail = data
            continue
        cut = int(ends[-1])
        whole = data if cut == len(data) else data[:cut]
        tail = data[cut:]
        yield Block(whole, ends, line)
        line += whole.count(b"\n")
    if tail:
        if len(_placed(dialect, tail + b"\n", line)) != 1:
            raise Malformed("a quote is not closed before the end of the file", line, tail[:1000])
        yield Block(tail, np.array([len(tail)], np.int64), line)


def _placed(dialect: Dialect, data: bytes, line: int) -> Offsets:
    try:
        return dialect.ends(data)
    except Malformed as error:
        raise Malformed(error.message, line - 1 + (error.line or 1)) from None


@dataclass(frozen=True, slots=True)
class Header:
    """The first record. `size_bytes` is where rows begin, byte order mark included; `eol` may be empty."""

    names: tuple[str, ...]
    fields: tuple[bytes, ...]
    bom: bytes
    eol: bytes
    size_bytes: int
    lines: int


def read_header(read: Read, dialect: Dialect) -> Header:
    """The header; reads further than that. Raises Malformed: empty, not decodable, or a name that occurs twice."""
    data = b""
    while piece := read(1 << 16):
        data += piece
        if len(data) > LONGEST_RECORD_BYTES or len(dialect.ends(data)):
            break
    bom = BOM if data.startswith(BOM) and dialect.encoding == "utf-8" else b""
    body = data[len(bom) :]
    ends = dialect.ends(body)
    if not len(ends):
        ends = dialect.ends(body + b"\n")
        if not body or len(ends) != 1:
            raise Malformed("a quote in the header is not closed" if body else "the file is empty", 1)
    raw = body[: int(ends[0])]
    record = raw.removesuffix(b"\n").removesuffix(b"\r") if raw.endswith(b"\n") else raw
    names = _names(dialect, record)
    eol = raw[len(record) :]
    return Header(names, tuple(dialect.fields(record)), bom, eol, len(bom) + len(raw), max(raw.count(b"\n"), 1))


def _names(dialect: Dialect, record: bytes) -> tuple[str, ...]:
    try:
        names = tuple(dialect.values(record))
    except (UnicodeDecodeError, csv.Error) as error:
        raise Malformed(f"the header cannot be read as {dialect.encoding}: {error}", 1, record[:1000]) from error
    twice = (
        next((name for at, name in enumerate(names) if name in names[:at]), None)
        if len(set(names)) < len(names)
        else None
    )
    if twice is not None:
        raise Malformed(f"the column {twice!r} occurs twice in the header", 1, record[:1000])
    return names


class Columns:
    """Reads chosen columns of blocks whose records all have `width` fields."""

    def __init__(self, dialect: Dialect, width: int) -> None:
        from pyarrow import csv as pyarrow_csv

        self._dialect = dialect
        self._width = width
        self._csv = pyarrow_csv
        self._names = [str(position) for position in range(width)]
        self._read = pyarrow_csv.ReadOptions(
            use_threads=False, column_names=self._names, block_size=2 * LONGEST_RECORD_BYTES + 2 * BLOCK_BYTES
        )
        self._parse = pyarrow_csv.ParseOptions(delimiter=dialect.delimiter)
        self._convert: dict[tuple[int, ...], Any] = {}

    def of(self, block: Block, positions: Sequence[int]) -> "list[pa.ChunkedArray]":
        """The values of these columns as bytes, one for each of `block.rows`. Raises Malformed with the line."""
        import pyarrow as pa

        if not len(block.rows):
            return [pa.chunked_array([], pa.binary()) for _ in positions]
        try:
            table = self._csv.read_csv(
                pa.BufferReader(block.data),
                read_options=self._read,
                parse_options=self._parse,
                convert_options=self._options(tuple(positions)),
                memory_pool=pa.system_memory_pool(),
            )
        except pa.ArrowInvalid as error:
            raise self._explained(block, str(error)) from error
        if table.num_rows != len(block.rows):
            raise self._explained(block, f"{len(block.rows)} records, read as {table.num_rows}")
        return [table.column(place) for place in range(len(positions))]

    def uneven(self, block: Block) -> Iterator[tuple[int, int]]:
        """Position and number of fields of each row that has not `width` of them."""
        for position in block.rows.tolist():
            found = len(self._dialect.fields(block.record(position)))
            if found != self._width:
                yield position, found

    def _explained(self, block: Block, said: str) -> Malformed:
        position, found = next(self.uneven(block), (None, 0))
        if position is None:
            return Malformed(said.splitlines()[0][:300], block.line)
        told = f"{found} fields where the header has {self._width}"
        return Malformed(told, block.line_of(position), block.record(position)[:1000])

    def _options(self, positions: tuple[int, ...]) -> Any:
        if positions not in self._convert:
            import pyarrow as pa

            names = [self._names[position] for position in positions]
            self._convert[positions] = self._csv.ConvertOptions(
                include_columns=names,
                column_types=dict.fromkeys(names, pa.binary()),
                strings_can_be_null=False,
                check_utf8=False,
            )
        return self._convert[positions]


def filled(column: "pa.ChunkedArray") -> npt.NDArray[np.bool_]:
    """Which values of a column of bytes are not empty."""
    parts = [np.zeros(0, np.bool_)]
    for chunk in column.chunks:
        offsets = np.frombuffer(chunk.buffers()[1], np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
        parts.append(np.diff(offsets) > 0)
    return np.concatenate(parts)
