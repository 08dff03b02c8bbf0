"""A CSV tokenizer on bytes: the dialect's rules, and record and field bounds found with numpy block by block.

Invariants: quotes follow the csv module: one opens only at the start of a field, elsewhere it is text. A block holds
whole records, so memory is bounded by the block and the longest record. Malformed input is an error that names the
line, never a guess.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from app.csv_inbox.config import FaultKind, FileFault, UnmergeableFile

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
LONGEST_VALUE = 200


def malformed(kind: FaultKind, reason: str, line: int | None = None, record: bytes = b"") -> UnmergeableFile:
    """The error for a fault that ends the reading of a file. `record` is the raw record, b"" if it is not shown."""
    fault = FileFault(reason, line, None, shown(record) if record else None)
    return UnmergeableFile(kind, [fault], "correct the file and put it into the inbox again")


def shown(record: bytes) -> str:
    """The beginning of a raw record, as text."""
    return record[:LONGEST_VALUE].decode("utf-8", "backslashreplace")


class CsvDialect:
    """Delimiter, encoding and quoting. `encoding` is ASCII-compatible; `delimiter` is one ASCII character."""

    def __init__(self, delimiter: str, encoding: str) -> None:
        self.delimiter = delimiter
        self.encoding = "utf-8" if encoding == "utf-8-sig" else encoding
        self.bom = BOM if encoding == "utf-8-sig" else b""
        d = re.escape(delimiter.encode("ascii"))
        # Possessive quantifiers (`*+`, `++`): an unclosed quote would otherwise cause endless backtracking.
        field = rb'(?:"(?:[^"]++|"")*+"[^' + d + rb'\n]*+|(?!")[^' + d + rb"\n]*+)"
        self.record = re.compile(field + rb"(?:" + d + field + rb")*+\n")
        self._field = re.compile(rb"(" + field + rb")" + d)
        self._value = re.compile(rb'"((?:[^"]++|"")*+)"(.*+)', re.DOTALL)
        self._blank = re.compile(rb'[ \t"' + d + rb"]*+")
        self._needs_quotes = re.compile(rb'["\r\n' + d + rb"]")

    def fields(self, record: bytes) -> list[bytes]:
        """The raw fields, with their quotes, of one whole record without its line end."""
        d = self.delimiter.encode("ascii")
        return self._field.findall(record + d) if b'"' in record else record.split(d)

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

    def has_return_outside_quotes(self, record: bytes) -> bool:
        """True for a carriage return that is not part of a quoted value."""
        fields = self.fields(record) if b"\r" in record else []
        matches = ((field, self._value.fullmatch(field)) for field in fields)
        return any(b"\r" in (match[2] if match else field) for field, match in matches)


@dataclass(frozen=True, slots=True)
class FieldBounds:
    """Where fields end. `at` has the offsets of delimiters and line feeds outside quotes, `lasts` the positions in `at`
    of the line feeds, `quotes` the offsets of all quotes. `returns` is True if there are carriage returns.
    """

    at: Offsets
    lasts: Offsets
    quotes: Offsets
    returns: bool


def find_field_bounds(data: bytes, dialect: CsvDialect, line: int = 1) -> FieldBounds:
    """The field bounds in `data`, which begins with a record on `line` and may end anywhere. Raises UnmergeableFile."""
    array = np.frombuffer(data, np.uint8)
    found = array == ord(dialect.delimiter)
    found |= array == LF
    quotes = np.flatnonzero(array == QUOTE) if b'"' in data else NONE
    # If all quotes are regular, a byte is quoted when an odd number of quotes precede it.
    if len(quotes) and not _strict(array, quotes, dialect):
        return walked(data, dialect, quotes, line)
    at = np.flatnonzero(found)
    del found  # a byte for each byte of the block; the peak is still to come
    feeds = array.take(at) == LF
    if len(quotes):
        if 4 * len(quotes) > len(at):
            inside = (np.searchsorted(quotes, at) & 1).astype(np.bool_)
        else:  # to look up few quotes among many marks takes far less
            marks_between = np.diff(np.searchsorted(at, quotes), prepend=0, append=len(at))
            inside = np.repeat(np.arange(len(marks_between)) % 2 == 1, marks_between)
        at, feeds = at[~inside], feeds[~inside]
    returns = b"\r" in data
    if returns:
        _no_lone_return(array, quotes, line)
    return FieldBounds(at, np.flatnonzero(feeds), quotes, returns)


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


def _lone_return(line: int) -> UnmergeableFile:
    told = "a carriage return that ends no line; write line ends as LF or CRLF"
    return malformed(FaultKind.LONE_RETURN, told, line)


def walked(data: bytes, dialect: CsvDialect, quotes: Offsets, line: int = 1) -> FieldBounds:
    """As `find_field_bounds`, record by record: for quotes inside unquoted fields, such as 5" in a list of sizes."""
    at: list[int] = []
    lasts: list[int] = []
    start = 0
    while match := dialect.record.match(data, start):
        record = match[0][:-1]
        if dialect.has_return_outside_quotes(record.removesuffix(b"\r")):
            raise _lone_return(line + data.count(b"\n", 0, start))
        ends = accumulate((len(field) + 1 for field in dialect.fields(record)), initial=start - 1)
        at.extend(list(ends)[1:])
        lasts.append(len(at) - 1)
        start = match.end()
    return FieldBounds(np.array(at, np.int64), np.array(lasts, np.int64), quotes, b"\r" in data)


@dataclass(frozen=True, slots=True)
class CellSlices:
    """Values as slices of one buffer: value n is `data[starts[n] : starts[n] + lengths[n]]`."""

    data: Octets
    starts: Offsets
    lengths: Offsets

    @classmethod
    def of(cls, values: Sequence[bytes]) -> "CellSlices":
        """These values in a buffer of their own."""
        lengths = np.array([len(value) for value in values], np.int64)
        return cls(np.frombuffer(b"".join(values), np.uint8), np.cumsum(lengths) - lengths, lengths)

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

    Per record: `starts`, `stops` and `ends`, which is after the line end. `rows` are the positions of the records that
    are rows; empty lines are not. Per row: `widths` is its number of fields, `heads` the mark that ends its first one.
    `begins`: a byte order mark preceded the block, so a file that was appended to another begins here. `is_cut`: some
    rows end before their records.
    """

    is_cut = False

    def __init__(self, data: bytes, marks: FieldBounds, line: int, *, begins: bool = False) -> None:
        self.data = data
        self.marks = marks
        self.line = line
        self.begins = begins
        self.array: Octets = np.frombuffer(data, np.uint8)
        feeds = marks.at[marks.lasts]
        self.ends: Offsets = np.minimum(feeds + 1, len(data))
        self.starts: Offsets = np.append(0, self.ends[:-1]) if len(feeds) else NONE
        # In an empty line the byte before the line feed belongs to the previous record.
        crlf = (feeds > self.starts) & (self.array[feeds - 1] == CR) if marks.returns else 0
        self.stops: Offsets = feeds - crlf
        self.rows: Offsets = np.flatnonzero(self.stops > self.starts)
        self.widths: Offsets = np.diff(marks.lasts, prepend=-1)[self.rows]
        self.heads: Offsets = marks.lasts[self.rows] - self.widths + 1

    def drop(self, places: Sequence[int] | Offsets) -> None:
        """Take the records of these rows for no rows."""
        if len(places):
            self.rows, self.widths, self.heads = (
                np.delete(each, places) for each in (self.rows, self.widths, self.heads)
            )

    def cut(self, places: Offsets, width: int, stops: Offsets) -> None:
        """Let each of these rows end after `width` fields, at its `stop`."""
        self.is_cut = self.is_cut or len(places) > 0
        self.stops[self.rows[places]] = stops
        self.widths[places] = width

    def check_text(self, encoding: str) -> None:
        """Raises UnmergeableFile for the first byte that is invalid in this encoding."""
        try:
            if not self.data.isascii():
                self.data.decode(encoding)
        except UnicodeDecodeError as error:
            raise invalid_byte(encoding, self.data[error.start], self.line_at(error.start)) from error

    def cells(self, place: int, dialect: CsvDialect) -> CellSlices:
        """The values of a column, one per row; all rows must have that column and the same width."""
        at, lasts = self.marks.at, self.heads + place
        # The mark before the field ends the field before it; the first field of a block has none.
        starts = self.starts[self.rows] if place == 0 else at[lasts - 1] + 1
        stops = np.where(self.widths == place + 1, self.stops[self.rows], at[lasts])
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
        raw = pairs(starts[doubled], stops[doubled])
        values = CellSlices.of([dialect.unquoted(self.data[start:stop]) for start, stop in raw])
        bare.starts[doubled] = len(self.data) + values.starts
        bare.lengths[doubled] = values.lengths
        return CellSlices(np.append(self.array, values.data), bare.starts, bare.lengths)

    def line_at(self, offset: int) -> int:
        """The line of the file that has this byte."""
        return self.line + self.data.count(b"\n", 0, offset)

    def line_of(self, position: int) -> int:
        """The line of the file on which a record begins."""
        return self.line_at(int(self.starts[position]))

    def record(self, position: int) -> bytes:
        """One record without its line end."""
        return self.data[int(self.starts[position]) : int(self.stops[position])]


def invalid_byte(encoding: str, byte: int, line: int, where: str = "") -> UnmergeableFile:
    """The error for a byte that is no text, such as the NUL bytes that a half-written disk block leaves."""
    told = f"a NUL byte (0x{byte:02X})" if byte == 0 else f"invalid {encoding.upper()} byte 0x{byte:02X}"
    hint = "save the file in the encoding of csv_encoding, without NUL bytes, or set csv_encoding; then drop it again"
    fault = FileFault(told + where, line, None, f"0x{byte:02X}")
    return UnmergeableFile(FaultKind.ENCODING, [fault], hint)


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

    Raises UnmergeableFile for an unclosed quote and for a record longer than `longest_bytes`.
    """
    tail, told = b"", f"a record longer than {longest_bytes >> 20} MiB"
    # Read as much as is held, otherwise a long record would be rescanned for each piece; but little beyond the limit.
    while piece := read(max(size, min(len(tail), longest_bytes - len(tail)))):
        end = piece.rfind(b"\n") + 1
        data, rest = b"".join((tail, memoryview(piece)[:end])), piece[end:]
        more = True
        while more:
            block, data, more = _first_block(data, dialect, line, bom)
            if block is not None:
                _check_length(block, longest_bytes, told)
                yield block
                line += int(np.count_nonzero(block.array == LF))
        tail = data + rest  # less than one record
        if len(tail) > longest_bytes:
            raise malformed(FaultKind.LONG_RECORD, f"{told}; is a quote not closed?", line)
    body = tail.removeprefix(bom)
    if body:
        # The last record of the file, without a line end.
        marks = find_field_bounds(body + b"\n", dialect, line)
        if len(marks.lasts) != 1:
            raise malformed(FaultKind.OPEN_QUOTE, "a quote is not closed before the end of the file", line, body)
        if body.endswith(b"\r"):
            raise _lone_return(line)
        block = RecordBlock(body, marks, line, begins=len(body) < len(tail))
        _check_length(block, longest_bytes, told)
        yield block


def _first_block(data: bytes, dialect: CsvDialect, line: int, bom: bytes) -> tuple[RecordBlock | None, bytes, bool]:
    """The whole records of `data` up to the next `bom`, the rest, and whether the rest begins with `bom`."""
    body = data.removeprefix(bom)
    begins = len(body) < len(data)
    if bom and (at := body.find(b"\n" + bom) + 1):
        marks = find_field_bounds(body[:at], dialect, line)
        if len(marks.lasts) and marks.at[marks.lasts[-1]] == at - 1:  # the line feed before it is not quoted
            return RecordBlock(body[:at], marks, line, begins=begins), body[at:], True
    marks = find_field_bounds(body, dialect, line)
    if not len(marks.lasts):
        return None, data, False
    end = int(marks.at[marks.lasts[-1]]) + 1
    block = RecordBlock(body if end == len(body) else body[:end], marks, line, begins=begins)
    if bom and bom in body:
        for at in block.starts[1:].tolist():
            if body.startswith(bom, at):
                # Tokenize the records before it again: with the mark as text, a quote after it was not an opening one.
                return (
                    RecordBlock(body[:at], find_field_bounds(body[:at], dialect, line), line, begins=begins),
                    body[at:],
                    True,
                )
    return block, body[end:], False


def _check_length(block: RecordBlock, longest_bytes: int, told: str) -> None:
    """Raises UnmergeableFile, with the line, for a record longer than the limit."""
    if len(block.data) > longest_bytes and (long := block.ends - block.starts > longest_bytes).any():
        raise malformed(FaultKind.LONG_RECORD, told, block.line_of(int(long.argmax())))
