"""One POST, from its bytes to rows that can be stored: options, formats, checks, batches."""

import csv
import hashlib
import io
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from email.message import Message
from functools import partial
from itertools import chain, groupby, pairwise
from typing import Any, BinaryIO, Literal, Protocol

import msgspec

from app.core.files import temporary_file
from app.dwh.query import flag
from app.dwh.rows import (
    SHAPE_HINT,
    UNREADABLE,
    CsvRow,
    RowFault,
    RowReader,
    Slice,
    Values,
    cut,
    has_json_grammar,
    reader,
    shown,
)
from app.dwh.tables import Table, TableColumn
from app.dwh.warehouse import MERGE, RESOLUTIONS, Resolution
from app.web.errors import Refusal, Refused

# Bodies as they arrive, cut into the JSON of single rows: a JSON document, NDJSON, or CSV; gzip around any of them.
#
# Invariants: bytes are counted before they are parsed, also those that gzip makes; NDJSON and CSV hold no more than
# one row and one block in memory. A body is fed in blocks of any size, and cut the same way whatever the blocks are.

GROUP_ROWS = 1000
PIECE_BYTES = 1 << 18
MAX_RATIO = 200
RATIO_FREE_BYTES = 1 << 24
BLANKS = b" \t\r\n"
OPENING = re.compile(rb'[ \t\r\n]*\{[ \t\r\n]*"data"[ \t\r\n]*:[ \t\r\n]*(?=\[)')
ENVELOPE = 'the body is {"data": [...]}, an array of rows and nothing else'
EMPTY = Refusal(400, "there are no rows in the body", "send at least one row", "data")


class Body(Protocol):
    """One body. Raises Refused."""

    def feed(self, block: bytes) -> Iterator[Sequence[Slice]]:
        """Take the next bytes; the rows that are whole now, in groups."""

    def finish(self) -> Iterator[Sequence[Slice]]:
        """The body has ended; the rows that were left."""


class JsonBody:
    """`{"data": [...]}`, held whole: a row can be told only when its end is there."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._held = bytearray()

    def feed(self, block: bytes) -> Iterator[Sequence[Slice]]:
        """See `Body.feed`; nothing is whole before the end."""
        self._held += block
        if len(self._held) > self._limit_bytes:
            raise too_large(self._limit_bytes, "send it as NDJSON, which may be larger, or less at once")
        yield from ()

    def finish(self) -> Iterator[Sequence[Slice]]:
        """See `Body.finish`."""
        rows = self._rows()
        if not rows:
            raise Refused(EMPTY)
        for start in range(0, len(rows), GROUP_ROWS):
            yield rows[start : start + GROUP_ROWS]

    def _rows(self) -> Sequence[Slice]:
        """The rows as views of the body. Cut out of their envelope here, so that a second `data` is no JSON."""
        opening = OPENING.match(self._held)
        end = _last(self._held, len(self._held))
        array_end = _last(self._held, end - 1)
        enveloped = opening and self._held[end - 1 : end] == b"}" and self._held[array_end - 1 : array_end] == b"]"
        if not opening or not enveloped:
            raise self._misshapen()
        try:
            array = memoryview(self._held)[opening.end() : array_end]
            return msgspec.json.decode(array, type=list[msgspec.Raw])
        except UNREADABLE:
            return self._rows_beside_a_bad_value(bytes(array))

    def _rows_beside_a_bad_value(self, array: bytes) -> Sequence[bytes]:
        """The rows of an array that holds a value which JSON cannot: its row is left to the reader of rows, which names
        it. Text without JSON's grammar, such as a body that was cut off, refuses all of it.
        """
        try:
            rows = cut(array)
        except ValueError:
            raise self._misshapen() from None
        for row in rows:
            try:
                msgspec.json.decode(row, type=msgspec.Raw)
            except UNREADABLE:
                if not has_json_grammar(row):
                    raise self._misshapen() from None
        return rows

    def _misshapen(self) -> Refused:
        """Why this is not the envelope: no JSON at all, or another shape."""
        try:
            msgspec.json.decode(self._held, type=dict[str, msgspec.Raw] | list[msgspec.Raw])
        except UNREADABLE:
            return Refused(Refusal(400, "the body is not JSON", "check its syntax, also that it is complete"))
        return Refused(Refusal(422, ENVELOPE, SHAPE_HINT, "data"))


def _last(held: bytearray, end: int) -> int:
    """The end of `held[:end]` without blanks."""
    while end > 0 and held[end - 1] in BLANKS:
        end -= 1
    return end


class NdjsonBody:
    """One object a line; blank lines count for nothing."""

    def __init__(self, row_bytes: int) -> None:
        self._row_bytes = row_bytes
        self._rest = b""

    def feed(self, block: bytes) -> Iterator[Sequence[bytes]]:
        """See `Body.feed`."""
        *lines, self._rest = (self._rest + block).split(b"\n")
        if len(self._rest) > self._row_bytes or any(len(line) > self._row_bytes for line in lines):
            raise row_too_large(self._row_bytes)
        yield from _grouped(lines)

    def finish(self) -> Iterator[Sequence[bytes]]:
        """See `Body.finish`."""
        yield from _grouped([self._rest])


def _grouped(lines: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    rows = [line for line in lines if line.strip(BLANKS)]
    for start in range(0, len(rows), GROUP_ROWS):
        yield rows[start : start + GROUP_ROWS]


class Gzip:
    """What a gzip body holds, member by member, in pieces of bounded size."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._inflater = zlib.decompressobj(wbits=31)
        self._taken_bytes = self._made_bytes = 0

    def feed(self, block: bytes) -> Iterator[bytes]:
        """The next bytes, inflated. Raises Refused for invalid gzip, and for too much of it."""
        self._taken_bytes += len(block)
        while block:
            if self._inflater.eof:
                self._inflater = zlib.decompressobj(wbits=31)
            try:
                piece = self._inflater.decompress(block, PIECE_BYTES)
            except zlib.error:
                raise Refused(
                    Refusal(400, "the body is not gzip, or damaged", "send it again, or without gzip")
                ) from None
            block = self._inflater.unconsumed_tail or self._inflater.unused_data
            self._count(len(piece))
            yield piece

    def _count(self, piece_bytes: int) -> None:
        self._made_bytes += piece_bytes
        if self._made_bytes > self._limit_bytes:
            raise too_large(self._limit_bytes, "send less at once")
        if self._made_bytes > RATIO_FREE_BYTES and self._made_bytes > MAX_RATIO * self._taken_bytes:
            raise Refused(
                Refusal(413, f"the body unpacks to more than {MAX_RATIO} times its size", "send it without gzip")
            )

    def finish(self) -> None:
        """Raises Refused when the end is missing."""
        if not self._inflater.eof:
            raise Refused(Refusal(400, "the gzip body is cut off", "send it again, whole"))


def too_large(limit_bytes: int, hint: str) -> Refused:
    """The answer to a body over its limit."""
    return Refused(Refusal(413, f"the body is larger than {limit_bytes} bytes", hint))


def row_too_large(row_bytes: int) -> Refused:
    """The answer to a row without an end."""
    return Refused(
        Refusal(413, f"a row is larger than {row_bytes} bytes", "look for a missing newline or closing quote")
    )


# CSV as rows of JSON, so that its values are checked by the same compiled decoder as all others.
#
# Invariants: rows are cut outside of quotes; an empty cell is null; a cell never changes what stands in another one.
# Source of the form: RFC 4180, with a header line, in UTF-8.

NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?", re.ASCII)
BOM = b"\xef\xbb\xbf"
Cell = Callable[[str], bytes]


class CsvBody:
    """Header, then rows; see the module."""

    def __init__(self, table: Table, row_bytes: int) -> None:
        self._table = table
        self._row_bytes = row_bytes
        self._rest = b""
        self._heads: Sequence[bytes] = ()
        self._cells: Sequence[Cell] = ()
        self._names: Sequence[str] = ()
        self._row_count = 0

    def feed(self, block: bytes) -> Iterator[Sequence[bytes]]:
        """See `Body.feed`."""
        self._rest += block
        end = _row_end(self._rest)
        whole, self._rest = self._rest[:end], self._rest[end:]
        if len(self._rest) > self._row_bytes:
            raise row_too_large(self._row_bytes)
        yield from self._groups(whole)

    def finish(self) -> Iterator[Sequence[bytes]]:
        """See `Body.finish`."""
        yield from self._groups(self._rest)

    def _groups(self, whole: bytes) -> Iterator[Sequence[bytes]]:
        rows: list[bytes] = []
        csv.field_size_limit(max(csv.field_size_limit(), self._row_bytes))  # the process's; its default is 128 KiB
        try:
            for cells in _parsed(whole):
                if not self._heads:
                    self._head(cells)
                elif cells:
                    rows.append(self._row(cells))
                if len(rows) == GROUP_ROWS:
                    yield rows
                    self._row_count += len(rows)
                    rows = []
        except csv.Error as error:
            where = f"row {self._row_count + len(rows)}" if self._heads else "header"
            hint = "quote cells as RFC 4180 says"
            raise Refused(Refusal(400, f"the body is not CSV: {where}: {error}", hint)) from None
        if rows:
            yield rows
            self._row_count += len(rows)

    def _head(self, cells: Sequence[str]) -> None:
        columns = {column.name: column for column in self._table.columns}
        unknown = [cell[:80] for cell in cells if cell not in columns]
        if unknown or len(set(cells)) < len(cells) or self._table.key.name not in cells:
            what = f"unknown column {unknown[0]!r}" if unknown else f"a column twice, or no {self._table.key.name}"
            raise Refused(Refusal(422, f"the header cannot be used: {what}", SHAPE_HINT, "header"))
        self._heads = [msgspec.json.encode(cell) + b":" for cell in cells]
        self._cells = [_cell(columns[cell]) for cell in cells]
        self._names = cells

    def _row(self, cells: Sequence[str]) -> CsvRow:
        try:
            pairs = zip(self._heads, self._cells, cells, strict=True)
            return CsvRow(b"{" + b",".join([head + turned(cell) for head, turned, cell in pairs]) + b"}")
        except ValueError:
            row = CsvRow(b"")
            row.fault = self._fault(cells)
            return row

    def _fault(self, cells: Sequence[str]) -> tuple[str, str]:
        """The column and what is wrong: with one cell, or with their number."""
        counts = f"the row has {len(cells)} cells, the header {len(self._names)}"
        if len(cells) < len(self._names):
            return self._names[len(cells)], f"is missing: {counts}; the last cell is {shown(cells[-1])}"
        if len(cells) > len(self._names):
            return self._names[-1], f"is followed by {shown(cells[len(self._names)])}: {counts}"
        for name, turned, cell in zip(self._names, self._cells, cells, strict=True):
            try:
                turned(cell)
            except ValueError as error:
                return name, f"{error}, not {shown(cell)}"
        raise AssertionError("called for a row without a fault")


def _row_end(held: bytes) -> int:
    """Behind the last newline that has an even number of quotes before it; 0 when there is none."""
    end = held.rfind(b"\n")
    quotes = held.count(b'"', 0, end + 1)
    while end >= 0 and quotes % 2:
        before = held.rfind(b"\n", 0, end)
        quotes -= held.count(b'"', before + 1, end)
        end = before
    return end + 1


def _parsed(whole: bytes) -> Iterator[list[str]]:
    # Decoded as it is read: a StringIO takes four bytes a character.
    # A byte that is not UTF-8 becomes half of a surrogate pair, which refuses its cell and not the body.
    text = io.TextIOWrapper(io.BytesIO(whole), "utf-8", "surrogateescape", newline="")
    return csv.reader(text, strict=True)


def _cell(column: TableColumn) -> Cell:
    """What makes a cell's JSON; raises ValueError for text that is not a value of the kind."""
    if column.kind in ("text", "uuid", "instant"):
        return _text_cell

    def turned(cell: str) -> bytes:
        if not cell:
            return b"null"
        raw = cell.encode(errors="surrogateescape")  # as it came
        if column.kind == "bool" and cell.lower() in ("true", "false"):
            return raw.lower()
        if column.kind == "json" and _is_json(raw):
            return raw
        if column.kind not in ("bool", "json") and NUMBER.fullmatch(cell):
            return raw
        raise ValueError(f"must be {column.wanted}")

    return turned


def _text_cell(cell: str) -> bytes:
    try:
        return msgspec.json.encode(cell) if cell else b"null"
    except UnicodeEncodeError:
        raise ValueError("must be valid UTF-8") from None


def _is_json(raw: bytes) -> bool:
    try:
        msgspec.json.decode(raw)
    except UNREADABLE:
        return False
    return True


# How a POST wants its body to be read and stored: query string and headers, checked.
#
# Invariant: what is unknown is refused, since a misspelt `dry_run` would otherwise store.

Form = Literal["json", "ndjson", "csv"]
FORMS: Mapping[str, Form] = {
    "application/json": "json",
    "application/x-ndjson": "ndjson",
    "application/ndjson": "ndjson",
    "application/jsonl": "ndjson",
    "text/csv": "csv",
}
KEY = re.compile(r"[!-~]{1,255}")


@dataclass(frozen=True, slots=True)
class Options:
    """`key` is the Idempotency-Key, "" for none."""

    form: Form = "json"
    gzip: bool = False
    skip: bool = False
    dry_run: bool = False
    key: str = ""
    resolution: Resolution | None = None


def options(given: Sequence[tuple[str, str]], headers: Mapping[str, str], preferred: Sequence[str] = ()) -> Options:
    """Raises Refused. Of what is preferred, what is not known is ignored, as RFC 7240 has it."""
    chosen = dict(given)
    for name in chosen.keys() - {"on_error", "dry_run"}:
        raise Refused(Refusal(400, f"unknown parameter {name[:80]}", "use on_error and dry_run", name[:80]))
    on_error = chosen.get("on_error", "stop")
    if len(chosen) < len(given) or on_error not in ("stop", "skip"):
        raise Refused(Refusal(422, "on_error is not stop or skip, or given twice", "correct it", "on_error"))
    dry_run = flag(chosen, "dry_run")
    key = headers.get("idempotency-key")
    if key is not None and not KEY.fullmatch(key):
        raise Refused(
            Refusal(
                422,
                "Idempotency-Key is not 1 to 255 characters of ASCII without blanks",
                "use a UUID",
                "Idempotency-Key",
            )
        )
    resolution = next((each for each in RESOLUTIONS if f"resolution={each}" in preferred), None)
    return Options(_form(headers), _packed(headers), on_error == "skip", dry_run, key or "", resolution)


def _form(headers: Mapping[str, str]) -> Form:
    given = Message()
    given["content-type"] = headers.get("content-type") or "application/json"
    form = FORMS.get(given.get_content_type())
    if form is None or given.get_content_charset("utf-8") not in ("utf-8", "utf8"):
        raise Refused(
            Refusal(
                415, "this media type is not read", "send application/json, application/x-ndjson or text/csv in UTF-8"
            )
        )
    return form


def _packed(headers: Mapping[str, str]) -> bool:
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip", "x-gzip", ""):
        raise Refused(Refusal(415, "this content encoding is not read", "send gzip, or nothing"))
    return "gzip" in encoding


# One POST, from its bytes to rows that can be stored: checked, cut into batches, spooled.
#
# Invariants: memory is bounded by the first rows, which are held as they are, a group of rows and the spool's part of
# it, however large the body; nothing of a body reaches the database before the last byte was checked.

SPOOL_BYTES = HELD_BYTES = 1 << 22
HELD_ROWS = 10_000
MAX_FAULTS = 1000
LENGTH_BYTES = 8
Frame = tuple[int, Sequence[Sequence[Any]]]  # the number of a batch, and rows of it, by column


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Rows of one batch, and then the bytes of its rows as they came, with their commas and brackets."""

    rows: int
    size_bytes: int


class BatchDealer:
    """Deals rows out to batches: first by number, then by size; a larger single row goes alone."""

    def __init__(self, limits: BatchLimits) -> None:
        self._limits = limits
        self.count = 0
        self._chunk_rows = self._size_bytes = 0

    def deal(self, sizes: Sequence[int]) -> Sequence[int]:
        """How many of the next rows go to each batch: to the current one first, then to new ones."""
        ends = [0]
        for position, size_bytes in enumerate(sizes):
            if not self._fits(size_bytes):
                self.count += 1
                ends.append(position)
                self._size_bytes = 1
            self._chunk_rows += 1
            self._size_bytes += size_bytes + 1
        ends.append(len(sizes))
        return [end - start for start, end in pairwise(ends)]

    def _fits(self, size_bytes: int) -> bool:
        if self._chunk_rows == self._limits.rows:
            self._chunk_rows = 0
            return False
        return self.count > 0 and self._size_bytes + size_bytes + 1 <= self._limits.size_bytes


@dataclass(slots=True)
class Received:
    """What a body came to. `digest` is of its bytes, hex; `size_bytes` of its good rows. The caller closes it."""

    rows: int = 0
    batches: int = 0
    faults: list[RowFault] = field(default_factory=list)
    fault_count: int = 0
    digest: str = ""
    size_bytes: int = 0
    held: list[Frame] = field(default_factory=list)
    spool: BinaryIO = field(default_factory=partial(temporary_file, memory_bytes=SPOOL_BYTES))

    def read(self) -> Iterator[Iterator[Values]]:
        """The batches, each as an iterator of its rows; read one to its end before the next."""
        for _, frames in groupby(self._frames(), key=lambda frame: frame[0]):
            yield chain.from_iterable(zip(*columns, strict=True) for _, columns in frames)

    def blocks(self) -> Iterator[Sequence[Values]]:
        """All rows, some at a time, by column."""
        return (columns for _, columns in self._frames())

    def put(self, frame: Frame, size_bytes: int) -> None:
        """The next rows; `size_bytes` as they came."""
        self.rows += len(frame[1][0])
        self.size_bytes += size_bytes
        if self.rows <= HELD_ROWS and self.size_bytes <= HELD_BYTES:
            self.held.append(frame)
            return
        packed = msgspec.msgpack.encode(frame)
        self.spool.write(len(packed).to_bytes(LENGTH_BYTES) + packed)

    def _frames(self) -> Iterator[Frame]:
        yield from self.held
        self.spool.seek(0)
        while head := self.spool.read(LENGTH_BYTES):
            yield msgspec.msgpack.decode(self.spool.read(int.from_bytes(head)))

    def close(self) -> None:
        """Free the rows. Idempotent."""
        self.held.clear()
        self.spool.close()


class Intake:
    """Takes one body. `skip`: bad rows are noted and left out; else the first one refuses the body."""

    def __init__(
        self, body: Body, rows: RowReader, limits: BatchLimits, *, gzip: Gzip | None = None, skip: bool = False
    ) -> None:
        self._body, self._rows, self._gzip, self._skip = body, rows, gzip, skip
        self._batches = BatchDealer(limits)
        self._digest = hashlib.sha256()
        self._seen_rows = 0
        self._head: bytes | None = b""  # the first bytes, until it is known whether they are a byte order mark
        self.received = Received()

    def feed(self, block: bytes) -> None:
        """The next bytes. Raises Refused."""
        for piece in self._gzip.feed(block) if self._gzip else (block,):
            self._digest.update(piece)
            for group in self._body.feed(self._without_mark(piece)):
                self._take(group)

    def _without_mark(self, piece: bytes) -> bytes:
        if self._head is None:
            return piece
        self._head += piece
        if len(self._head) < len(BOM) and BOM.startswith(self._head):
            return b""
        piece, self._head = self._head.removeprefix(BOM), None
        return piece

    def finish(self) -> Received:
        """The body has ended. Raises Refused."""
        if self._gzip:
            self._gzip.finish()
        for group in chain(self._body.feed(self._head or b""), self._body.finish()):
            self._take(group)
        if not self._seen_rows:
            raise Refused(EMPTY)
        self.received.batches = self._batches.count
        self.received.digest = self._digest.hexdigest()
        return self.received

    def _take(self, group: Sequence[Slice]) -> None:
        checked = self._rows.read(group, self._seen_rows)
        self._seen_rows += len(group)
        if checked.faults and not self._skip:
            raise checked.faults[0].refusal()
        received = self.received
        received.fault_count += len(checked.faults)
        received.faults += checked.faults[: MAX_FAULTS - len(received.faults)]
        self._put(checked.columns, checked.sizes)

    def _put(self, columns: Sequence[Values], sizes: Sequence[int]) -> None:
        batch, start = self._batches.count, 0
        for number, length in enumerate(self._batches.deal(sizes)):
            end = start + length
            if length:
                part = columns if length == len(sizes) else [column[start:end] for column in columns]
                self.received.put((batch + number, part), sum(sizes[start:end]))
            start = end


def intake_of(table: Table, chosen: Options, limits: BatchLimits, body_bytes: int, stream_bytes: int) -> Intake:
    """Takes the body of a POST. No JSON body and no row may be larger than `body_bytes`. The first one of a table makes
    its decoder, which takes a while.
    """
    body: Body = NdjsonBody(body_bytes) if chosen.form == "ndjson" else JsonBody(body_bytes)
    if chosen.form == "csv":
        body = CsvBody(table, body_bytes)
    gzip = Gzip(body_bytes if chosen.form == "json" else stream_bytes) if chosen.gzip else None
    rows = reader(table.name, merging=chosen.resolution == MERGE)
    return Intake(body, rows, limits, gzip=gzip, skip=chosen.skip)
