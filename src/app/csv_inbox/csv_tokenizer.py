"""A CSV tokenizer on bytes: the dialect's rules, and record and field bounds found with numpy block by block.

Invariants: quotes follow the csv module: one opens only at the start of a field, elsewhere it is text. A block holds
whole records, so memory is bounded by the block and the longest record. Malformed input is an error that names the
line, never a guess.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from app.core.errors import AppError
from app.csv_inbox.config import FaultKind

Offsets = npt.NDArray[np.int64]
Octets = npt.NDArray[np.uint8]
Read = Callable[[int], bytes]

BLOCK_BYTES = 1 << 20
LONGEST_RECORD_BYTES = 1 << 24
"""The size limit of an incoming record or header, including its line end."""
MASTER_RECORD_BYTES = 4 * LONGEST_RECORD_BYTES
"""The limit when reading the master. It is never reached: an incoming record grows only by delimiters,
at most one per byte of a header. Earlier versions accepted records of twice that limit.
"""
BOM = b"\xef\xbb\xbf"
LF, CR, QUOTE = 10, 13, 34
NONE = np.zeros(0, np.int64)


class MalformedCsv(AppError):
    """Malformed CSV. `line` is the line in the file, None if unknown; `record` is the raw record."""

    def __init__(self, message: str, line: int | None = None, record: bytes = b"", *, kind: FaultKind) -> None:
        super().__init__(message)
        self.line = line
        self.record = record
        self.kind = kind


class CsvDialect:
    """Delimiter, encoding and quoting. `encoding` is ASCII-compatible; `delimiter` is one ASCII character."""

    def __init__(self, delimiter: str, encoding: str) -> None:
        self.delimiter = delimiter
        self.encoding = "utf-8" if encoding == "utf-8-sig" else encoding
        self.bom = BOM if encoding == "utf-8-sig" else b""
        d = re.escape(delimiter.encode("ascii"))
        # Possessive quantifiers (`*+`, `++`): an unclosed quote would otherwise cause endless backtracking.
        quoted = rb'"(?:[^"]++|"")*+"[^' + d + rb"\n]*+"
        plain = rb'(?!")[^' + d + rb"\n]*+"
        self._field = re.compile(rb"(?:" + quoted + rb"|" + plain + rb")")
        self._record = re.compile(
            rb"(?:" + quoted + rb"|" + plain + rb")(?:" + d + rb"(?:" + quoted + rb"|" + plain + rb"))*+\n"
        )
        self._value = re.compile(rb'"((?:[^"]++|"")*+)"(.*+)', re.DOTALL)
        self._blank = re.compile(rb'[ \t"' + d + rb"]*+")
        self._needs_quotes = re.compile(rb'["\r\n' + d + rb"]")

    def fields(self, record: bytes) -> list[bytes]:
        """The raw fields, with their quotes, of one record without its line end."""
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

    def blank(self, record: bytes) -> bool:
        """True if there are only delimiters, blanks and empty quotes, as spreadsheets write an empty row."""
        blanks = self._blank.fullmatch(record) is not None
        return blanks and not any(self.unquoted(field).strip(b" \t") for field in self.fields(record))

    def written(self, value: bytes) -> bytes:
        """The value as a raw field, quoted if necessary."""
        return b'"' + value.replace(b'"', b'""') + b'"' if self._needs_quotes.search(value) else value

    def unquoted(self, field: bytes) -> bytes:
        """The value of one raw field."""
        match = self._value.fullmatch(field)
        return match[1].replace(b'""', b'"') + match[2] if match else field

    def outside(self, field: bytes) -> bytes:
        """The part of a raw field outside its quotes."""
        match = self._value.fullmatch(field)
        return match[2] if match else field

    def record_end(self, data: bytes, at: int) -> int:
        """The end offset, after the line end, of the record that begins at `at`; -1 if it does not end in `data`."""
        match = self._record.match(data, at)
        return match.end() if match else -1


@dataclass(frozen=True, slots=True)
class FieldBounds:
    """Where fields end. `at` has the offsets of delimiters and line feeds outside quotes, `lasts` the positions in `at`
    of the line feeds, `quotes` the offsets of all quotes. `inner` counts line feeds inside quotes; `returns` is True if
    there are carriage returns.
    """

    at: Offsets
    lasts: Offsets
    quotes: Offsets
    inner: int
    returns: bool


def find_field_bounds(data: bytes, dialect: CsvDialect, line: int = 1) -> FieldBounds:
    """The field bounds in `data`, which begins with a record on `line` and may end anywhere. Raises MalformedCsv."""
    array = np.frombuffer(data, np.uint8)
    found = array == ord(dialect.delimiter)
    found |= array == LF
    quotes = np.flatnonzero(array == QUOTE) if b'"' in data else NONE
    # If all quotes are regular, a byte is quoted when an odd number of quotes precede it.
    if len(quotes) and not _strict(array, quotes, dialect):
        return walked(data, dialect, quotes, line)
    at = np.flatnonzero(found)
    feeds = array.take(at) == LF
    inside = np.flatnonzero(np.searchsorted(quotes, at) & 1) if len(quotes) else NONE
    inner = int(np.count_nonzero(feeds[inside]))
    if len(inside):
        at, feeds = np.delete(at, inside), np.delete(feeds, inside)
    returns = b"\r" in data
    if returns:
        _no_lone_return(array, quotes, line)
    return FieldBounds(at, np.flatnonzero(feeds), quotes, inner, returns)


def spread(starts: Offsets, lengths: Offsets) -> Offsets:
    """The ranges `start` to `start + length`, concatenated."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))


def pairs(starts: Offsets, stops: Offsets) -> Iterator[tuple[int, int]]:
    """Each start with its stop, as Python integers."""
    return zip(starts.tolist(), stops.tolist(), strict=True)


def cut(data: bytes | memoryview, starts: Offsets, stops: Offsets) -> bytes:
    """The bytes from each start to its stop, joined."""
    held = memoryview(data)
    return b"".join([held[start:stop] for start, stop in pairs(starts, stops)])


def _strict(array: Octets, quotes: Offsets, dialect: CsvDialect) -> bool:
    """True if every quote is a regular opening, closing or doubled one: then counting quotes shows what is quoted."""
    opening, closing = quotes[0::2], quotes[1::2]
    before = array[opening[opening > 0] - 1]
    after = array[closing[closing < len(array) - 1] + 1]
    allowed = np.zeros(256, np.bool_)
    allowed[[ord(dialect.delimiter), LF, QUOTE]] = True
    if not allowed[before].all():
        return False
    allowed[CR] = True
    return bool(allowed[after].all())


def _no_lone_return(array: Octets, quotes: Offsets, line: int) -> None:
    returns = np.flatnonzero(array == CR)
    returns = returns[returns < len(array) - 1]
    lone = returns[array[returns + 1] != LF]
    lone = lone[(np.searchsorted(quotes, lone) & 1) == 0]
    if len(lone):
        raise _lone_return(line + int(np.count_nonzero(array[: lone[0]] == LF)))


def _lone_return(line: int) -> MalformedCsv:
    return MalformedCsv(
        "a carriage return that ends no line; write line ends as LF or CRLF", line, kind=FaultKind.LONE_RETURN
    )


def walked(data: bytes, dialect: CsvDialect, quotes: Offsets, line: int = 1) -> FieldBounds:
    """As `find_field_bounds`, record by record: for quotes inside unquoted fields, such as 5" in a list of sizes."""
    at: list[int] = []
    lasts: list[int] = []
    start = 0
    while (end := dialect.record_end(data, start)) > 0:
        record = data[start : end - 1]
        fields = dialect.fields(record)
        if b"\r" in record.removesuffix(b"\r"):
            plain = [*fields[:-1], fields[-1].removesuffix(b"\r")]
            if any(b"\r" in dialect.outside(field) for field in plain):
                raise _lone_return(line + data.count(b"\n", 0, start))
        at.extend(list(accumulate((len(field) + 1 for field in fields), initial=start - 1))[1:])
        lasts.append(len(at) - 1)
        start = end
    inner = data.count(b"\n", 0, start) - len(lasts)
    return FieldBounds(np.array(at, np.int64), np.array(lasts, np.int64), quotes, inner, b"\r" in data)


@dataclass(frozen=True, slots=True)
class CellSlices:
    """Values as slices of one buffer: value n is `data[starts[n] : starts[n] + lengths[n]]`."""

    data: Octets
    starts: Offsets
    lengths: Offsets

    def value(self, place: int) -> bytes:
        """One value."""
        start = int(self.starts[place])
        return self.data[start : start + int(self.lengths[place])].tobytes()

    def taken(self, places: Offsets) -> "CellSlices":
        """The values at these positions."""
        return CellSlices(self.data, self.starts[places], self.lengths[places])


class RecordBlock:
    """Whole records, the first on `line` of the file. If the file's last record lacks its line end, `marks` has one
    just past the data.

    Per record: `starts`, `ends` (after the line end) and `stops` (before it). `rows` are the positions of the records
    that are rows, which excludes empty lines and `skipped` ones; `widths` are their field counts. `begins`: a byte
    order mark preceded the block, so a file that was appended to another begins here.
    """

    def __init__(
        self, data: bytes, marks: FieldBounds, line: int, *, begins: bool = False, skipped: Offsets = NONE
    ) -> None:
        self.data = data
        self.marks = marks
        self.line = line
        self.begins = begins
        self.skipped = skipped
        self.array: Octets = np.frombuffer(data, np.uint8)
        feeds = marks.at[marks.lasts]
        self.ends: Offsets = np.minimum(feeds + 1, len(data))
        self.starts: Offsets = np.append(0, self.ends[:-1]) if len(feeds) else NONE
        # In an empty line the byte before the line feed belongs to the previous record.
        crlf = (feeds > self.starts) & (self.array[feeds - 1] == CR) if marks.returns else 0
        self.stops: Offsets = feeds - crlf
        self.rows: Offsets = np.flatnonzero(self.stops > self.starts)
        if len(skipped):
            self.rows = np.setdiff1d(self.rows, skipped, assume_unique=True)
        self.widths: Offsets = np.diff(marks.lasts, prepend=-1)[self.rows]

    def without(self, positions: Offsets) -> "RecordBlock":
        """The same block, with the records at these positions not counted as rows."""
        skipped = np.append(self.skipped, positions)
        return RecordBlock(self.data, self.marks, self.line, begins=self.begins, skipped=skipped)

    def without_bytes(self, firsts: Offsets, lasts: Offsets, dialect: CsvDialect) -> "RecordBlock":
        """The same block without the bytes from each of `firsts` to its `lasts`; these contain no line ends."""
        data = cut(self.data, np.append(0, lasts), np.append(firsts, len(self.data)))
        marks = find_field_bounds(data if data.endswith(b"\n") else data + b"\n", dialect, self.line)
        return RecordBlock(data, marks, self.line, begins=self.begins, skipped=self.skipped)

    def tails(self, places: Offsets, width: int) -> Offsets:
        """The end offset of the first `width` fields of each of these rows, all of which have more fields."""
        rows = self.rows[places]
        found: Offsets = self.marks.at[self.marks.lasts[rows] - self.widths[places] + width]
        return found

    def uneven(self, width: int) -> Iterator[tuple[int, int]]:
        """The position and field count of each row that does not have `width` fields."""
        places = self.widths != width
        return pairs(self.rows[places], self.widths[places])

    def check_width(self, width: int) -> None:
        """Raises MalformedCsv, with the line, if a row does not have `width` fields."""
        for position, found in self.uneven(width):
            told = f"{found} fields where the header has {width}"
            raise MalformedCsv(told, self.line_of(position), self.record(position)[:1000], kind=FaultKind.RAGGED)

    def cells(self, place: int, dialect: CsvDialect) -> CellSlices:
        """The values of a column, one per row; all rows must have that column and the same width."""
        at, lasts = self.marks.at, self.marks.lasts[self.rows]
        before = lasts - self.widths + place  # the mark before the field; the block's first field has none
        starts = self.starts[self.rows] if place == 0 else at[before] + 1
        stops = np.where(before + 1 == lasts, self.stops[self.rows], at[before + 1])
        if not len(self.marks.quotes):
            return CellSlices(self.array, starts, stops - starts)
        quoted = (stops > starts) & (self.array[np.minimum(starts, len(self.data) - 1)] == QUOTE)
        places = np.flatnonzero(quoted)
        if not len(places):
            return CellSlices(self.array, starts, stops - starts)
        bare = CellSlices(self.array, starts + quoted, stops - starts - 2 * quoted)
        quotes = self.marks.quotes
        inner = np.searchsorted(quotes, stops[places] - 1) - np.searchsorted(quotes, starts[places] + 1)
        # Only values with doubled quotes are copied, to the end of the data; all others are slices of it.
        doubled = places[inner > 0]
        if not len(doubled):
            return bare
        values = [dialect.unquoted(self.data[start:stop]) for start, stop in pairs(starts[doubled], stops[doubled])]
        lengths = np.array([len(value) for value in values], np.int64)
        bare.starts[doubled] = len(self.data) + np.cumsum(lengths) - lengths
        bare.lengths[doubled] = lengths
        return CellSlices(np.frombuffer(self.data + b"".join(values), np.uint8), bare.starts, bare.lengths)

    def first_invalid(self, encoding: str) -> int:
        """The offset of the first byte that is invalid in this encoding; -1 if there is none."""
        try:
            if not self.data.isascii():
                self.data.decode(encoding)
        except UnicodeDecodeError as error:
            return error.start
        return -1

    def line_at(self, offset: int) -> int:
        """The line of the file that has this byte."""
        return self.line + self.data.count(b"\n", 0, offset)

    def line_of(self, position: int) -> int:
        """The line of the file on which a record begins."""
        return self.line_at(int(self.starts[position]))

    def record(self, position: int) -> bytes:
        """One record without its line end."""
        return self.data[int(self.starts[position]) : int(self.stops[position])]


def blocks(
    read: Read,
    dialect: CsvDialect,
    line: int,
    size: int = BLOCK_BYTES,
    *,
    longest_bytes: int = MASTER_RECORD_BYTES,
    bom: bytes = b"",
) -> Iterator[RecordBlock]:
    """The records from `read`, in blocks; a record that begins with `bom` starts a new block, without the mark.

    Raises MalformedCsv for an unclosed quote and for a record longer than `longest_bytes`.
    """
    tail, longer = b"", f"a record longer than {longest_bytes >> 20} MiB"
    # Read at least as much as is held: otherwise a long record would be rescanned for each piece.
    while piece := read(max(size, len(tail))):
        end = piece.rfind(b"\n") + 1
        data, rest = b"".join((tail, memoryview(piece)[:end])), piece[end:]
        more = True
        while more:
            block, data, more = _first_block(data, dialect, line, bom)
            if block is not None:
                _refuse_longer(block, longest_bytes, longer)
                yield block
                marks = block.marks
                line += block.data.count(b"\n") if data else len(marks.lasts) + marks.inner
        tail = data + rest  # less than one record
        if len(tail) > longest_bytes:
            raise MalformedCsv(f"{longer}; is a quote not closed?", line, kind=FaultKind.LONG_RECORD)
    if tail.removeprefix(bom):
        last = _last(tail, dialect, line, bom)
        _refuse_longer(last, longest_bytes, longer)
        yield last


def _first_block(data: bytes, dialect: CsvDialect, line: int, bom: bytes) -> tuple[RecordBlock | None, bytes, bool]:
    """The whole records of `data` up to the next `bom`, the rest, and whether the rest begins with `bom`."""
    body = data.removeprefix(bom)
    marks = find_field_bounds(body, dialect, line)
    if not len(marks.lasts):
        return None, data, False
    cut = int(marks.at[marks.lasts[-1]]) + 1
    block = RecordBlock(body if cut == len(body) else body[:cut], marks, line, begins=len(body) < len(data))
    at = _next_bom(block, bom)
    if not at:
        return block, body[cut:], False
    # Re-tokenize the rest without the mark: with the mark as text, a quote after it was not seen as opening.
    return (
        RecordBlock(body[:at], find_field_bounds(body[:at], dialect, line), line, begins=block.begins),
        body[at:],
        True,
    )


def _next_bom(block: RecordBlock, bom: bytes) -> int:
    """The offset of the next record that begins with `bom`; 0 when none does."""
    if not bom or bom not in block.data:
        return 0
    starts = block.starts[1:]
    maybe = starts[block.array[starts] == bom[0]].tolist()
    return next((start for start in maybe if block.data.startswith(bom, start)), 0)


def _refuse_longer(block: RecordBlock, longest_bytes: int, told: str) -> None:
    """Raises MalformedCsv, with the line, for a record longer than the limit."""
    if len(block.data) > longest_bytes and (long := block.ends - block.starts > longest_bytes).any():
        raise MalformedCsv(told, block.line_of(int(long.argmax())), kind=FaultKind.LONG_RECORD)


def _last(tail: bytes, dialect: CsvDialect, line: int, bom: bytes) -> RecordBlock:
    """The last record of a file, without a line end."""
    body = tail.removeprefix(bom)
    marks = find_field_bounds(body + b"\n", dialect, line)
    if len(marks.lasts) != 1:
        told = "a quote is not closed before the end of the file"
        raise MalformedCsv(told, line, body[:1000], kind=FaultKind.OPEN_QUOTE)
    if body.endswith(b"\r"):
        raise _lone_return(line)
    return RecordBlock(body, marks, line, begins=len(body) < len(tail))
