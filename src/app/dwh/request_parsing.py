"""Parses a POST, from its bytes to storable rows: options, formats, checks, batches."""

import csv
import hashlib
import io
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from email.message import Message
from typing import Any, BinaryIO, Literal

import msgspec

from app.core.files import temporary_file
from app.dwh.query import flag
from app.dwh.rows import (
    SHAPE_HINT,
    UNREADABLE,
    CheckedRows,
    CsvRow,
    RowFault,
    Slice,
    Values,
    has_json_grammar,
    quoted_value,
    reader,
    split_json,
)
from app.dwh.tables import Table, TableColumn
from app.dwh.warehouse import MERGE, RESOLUTIONS, Resolution
from app.object_store.port import ReadableBody
from app.web.errors import Refusal, Refused

# Splits bodies into the JSON of single rows: a JSON document, NDJSON, or CSV, each optionally gzipped.
#
# Invariants: bytes are counted before they are parsed, also after decompression; NDJSON and CSV hold no more than one
# row and one group of rows in memory.

GROUP_ROWS, GROUP_BYTES = 1000, 1 << 18
BLOCK_BYTES = 1 << 18
MAX_RATIO = 200
RATIO_FREE_BYTES = 1 << 24
BLANKS = b" \t\r\n"
BOM = b"\xef\xbb\xbf"
OPENING = re.compile(rb'[ \t\r\n]*\{[ \t\r\n]*"data"[ \t\r\n]*:[ \t\r\n]*(?=\[)')
CLOSING = re.compile(rb"[ \t\r\n]*\}[ \t\r\n]*")
EMPTY = Refusal(400, "there are no rows in the body", "send at least one row", "data")
NOT_GZIP = Refusal(400, "the body is not gzip, or damaged", "send it again, or without gzip")
CUT_OFF = Refusal(400, "the gzip body is truncated", "send it again, whole")
TOO_DENSE = Refusal(413, f"the body unpacks to more than {MAX_RATIO} times its size", "send it without gzip")
Groups = Iterator[Sequence[Slice]]


class BodyBytes(io.RawIOBase):
    """A body as a raw stream for Python's readers: decompressed, counted and hashed. `limit_bytes`: the limit for the
    decompressed size; None for a body without gzip, which was counted on receipt.
    """

    def __init__(self, body: ReadableBody, limit_bytes: int | None) -> None:
        self._body, self._limit_bytes = body, limit_bytes
        self._inflater = zlib.decompressobj(wbits=31)
        self._packed = b""
        self._taken_bytes = self._made_bytes = 0
        self.digest = hashlib.sha256()

    def readable(self) -> bool:
        """See RawIOBase."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """See RawIOBase. Raises Refused for invalid gzip, and when it decompresses to too much."""
        piece = self._body.read(len(buffer)) if self._limit_bytes is None else self._inflated(len(buffer))
        self.digest.update(piece)
        buffer[: len(piece)] = piece
        return len(piece)

    def _inflated(self, count: int) -> bytes:
        """The next decompressed bytes, across gzip members; none at the end."""
        piece = b""
        while not piece:
            if not self._packed:
                self._packed = self._body.read(BLOCK_BYTES)
                self._taken_bytes += len(self._packed)
            if not self._packed:
                if self._inflater.eof:
                    return b""
                raise Refused(*CUT_OFF)
            if self._inflater.eof:
                self._inflater = zlib.decompressobj(wbits=31)
            try:
                piece = self._inflater.decompress(self._packed, count)
            except zlib.error:
                raise Refused(*NOT_GZIP) from None
            self._packed = self._inflater.unconsumed_tail or self._inflater.unused_data
        self._made_bytes += len(piece)
        if self._limit_bytes is not None and self._made_bytes > self._limit_bytes:
            raise too_large(self._limit_bytes, "send less at once")
        if self._made_bytes > max(RATIO_FREE_BYTES, MAX_RATIO * self._taken_bytes):
            raise Refused(*TOO_DENSE)
        return piece


def json_rows(stream: BinaryIO, limit_bytes: int) -> Groups:
    """The rows of `{"data": [...]}` as views of the body, which is held in memory, since a row is known only once its
    end has arrived. The envelope is removed here by hand, so that a second `data` is invalid JSON.
    """
    held = stream.read(limit_bytes + 1)
    if len(held) > limit_bytes:
        raise too_large(limit_bytes, "send it as NDJSON, which may be larger, or less at once")
    held = held.removeprefix(BOM)
    opening, array_end = OPENING.match(held), held.rfind(b"]") + 1
    if not opening or not CLOSING.fullmatch(held, array_end):
        raise _misshapen(held)
    array = memoryview(held)[opening.end() : array_end]
    rows: Sequence[Slice]
    try:
        rows = msgspec.json.decode(array, type=list[msgspec.Raw])
    except UNREADABLE:
        rows = _rows_beside_a_bad_value(bytes(array), held)
    return (rows[start : start + GROUP_ROWS] for start in range(0, len(rows), GROUP_ROWS))


def _rows_beside_a_bad_value(array: bytes, held: bytes) -> Sequence[bytes]:
    """The rows of an array with a value that is not valid JSON; the row reader later names the row. If the text does
    not have JSON grammar, such as a truncated body, everything is refused.
    """
    try:
        rows = split_json(array)
    except ValueError:
        raise _misshapen(held) from None
    if not all(_is_json(row) or has_json_grammar(row) for row in rows):
        raise _misshapen(held)
    return rows


def _misshapen(held: bytes) -> Refused:
    """Why this is not the envelope: not JSON, or another shape."""
    if _is_json(held):
        return Refused(422, 'the body is {"data": [...]}, an array of rows and nothing else', SHAPE_HINT, "data")
    return Refused(400, "the body is not JSON", "check its syntax, also that it is complete")


def _is_json(text: bytes, kind: Any = msgspec.Raw) -> bool:
    """Whether this is JSON. As Raw, which builds no values, the text of strings is not checked."""
    try:
        msgspec.json.decode(text, type=kind)
    except UNREADABLE:
        return False
    return True


def ndjson_rows(stream: BinaryIO, row_bytes: int) -> Groups:
    """One object per line; blank lines are ignored."""

    def lines() -> Iterator[bytes]:
        start = BOM
        while line := stream.readline(row_bytes + len(BOM) + 1):
            row = line.removesuffix(b"\n").removeprefix(start)
            if len(row) > row_bytes:
                raise row_too_large(row_bytes)
            if row.strip(BLANKS):
                yield row
            start = b""

    return grouped(lines())


def grouped(rows: Iterable[bytes]) -> Groups:
    """Group rows, with a bounded number and size per group."""
    group: list[bytes] = []
    size_bytes = 0
    for row in rows:
        group.append(row)
        size_bytes += len(row)
        if len(group) == GROUP_ROWS or size_bytes >= GROUP_BYTES:
            yield group
            group, size_bytes = [], 0
    if group:
        yield group


def too_large(limit_bytes: int, hint: str) -> Refused:
    """The error for a body over its limit."""
    return Refused(413, f"the body is larger than {limit_bytes} bytes", hint)


def row_too_large(row_bytes: int) -> Refused:
    """The error for a row over its limit."""
    return Refused(413, f"a row is larger than {row_bytes} bytes", "look for a missing newline or closing quote")


# Converts CSV to rows of JSON, so that the same compiled decoder checks its values as all others.
#
# Invariants: an empty cell is null; a cell never affects the content of another. Format: RFC 4180, with a header line,
# in UTF-8.

NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?", re.ASCII)
SIGNS = ("+", "-")
Cell = Callable[[str], bytes]
"""Converts a cell to JSON; raises ValueError for text that is invalid for the column's kind."""


def csv_rows(stream: BinaryIO, table: Table, row_bytes: int) -> Iterator[bytes]:
    """Each row after the header as JSON. Raises Refused."""
    csv.field_size_limit(max(csv.field_size_limit(), row_bytes))  # process-wide; the default is 128 KiB
    # An invalid UTF-8 byte becomes a lone surrogate, so only its cell is refused, not the body.
    text = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
    row_characters = count = 0
    names: Sequence[str] = ()
    turns: Sequence[tuple[bytes, Cell]] = ()

    def lines() -> Iterator[str]:
        """Refuses long rows here: the CSV reader would use 4 bytes per character."""
        nonlocal row_characters
        while line := text.readline(row_bytes + 1):
            row_characters += len(line)
            if row_characters > row_bytes:
                raise row_too_large(row_bytes)
            yield line

    try:
        for cells in csv.reader(lines(), strict=True):
            row_characters = 0
            if not names:
                names, turns = cells, _turns_of(table, cells)
            elif cells:
                yield _csv_row(names, turns, cells)
                count += 1
    except csv.Error as error:
        where = f"row {count}" if names else "header"
        raise Refused(400, f"the body is not CSV: {where}: {error}", "quote cells as RFC 4180 says") from None


def _turns_of(table: Table, header: Sequence[str]) -> Sequence[tuple[bytes, Cell]]:
    """For each column of a header its JSON key and the conversion of its cells."""
    columns = {column.name: column for column in table.columns}
    unknown = [name[:80] for name in header if name not in columns]
    if unknown or len(set(header)) < len(header) or table.key.name not in header:
        what = f"unknown column {unknown[0]!r}" if unknown else f"a column twice, or no {table.key.name}"
        raise Refused(422, f"the header cannot be used: {what}", SHAPE_HINT, "header")
    return [(msgspec.json.encode(name) + b":", _cell(columns[name])) for name in header]


def _csv_row(names: Sequence[str], turns: Sequence[tuple[bytes, Cell]], cells: Sequence[str]) -> CsvRow:
    try:
        pairs = [key + turned(cell) for (key, turned), cell in zip(turns, cells, strict=True)]
        return CsvRow(b"{" + b",".join(pairs) + b"}")
    except ValueError:
        row = CsvRow(b"")
        row.fault = _csv_fault(names, turns, cells)
        return row


def _csv_fault(
    names: Sequence[str], turns: Sequence[tuple[bytes, Cell]], cells: Sequence[str]
) -> tuple[str, str] | None:
    """The column and the fault: an invalid cell, or the wrong number of cells."""
    counts = f"the row has {len(cells)} cells, the header {len(names)}"
    if len(cells) < len(names):
        return names[len(cells)], f"is missing: {counts}; the last cell is {quoted_value(cells[-1])}"
    if len(cells) > len(names):
        return names[-1], f"is followed by {quoted_value(cells[len(names)])}: {counts}"
    for name, (_, turned), cell in zip(names, turns, cells, strict=True):
        try:
            turned(cell)
        except ValueError as error:
            return name, f"{error}, not {quoted_value(cell)}"
    return None


def _cell(column: TableColumn) -> Cell:
    if column.kind == "instant":
        return lambda cell: _text_cell(with_minutes(cell))
    if column.kind in ("text", "uuid"):
        return _text_cell

    def turned(cell: str) -> bytes:
        if not cell:
            return b"null"
        raw = cell.encode(errors="surrogateescape")  # the original bytes
        if column.kind == "bool" and cell.lower() in ("true", "false"):
            return raw.lower()
        if column.kind == "json" and _is_json(raw, Any):
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


def with_minutes(instant: str) -> str:
    """PostgreSQL writes an offset of whole hours without minutes, 10:20:30+00, which the decoder does not read."""
    return f"{instant}:00" if instant[-3:-2] in SIGNS and ":" in instant else instant


# Options of a POST: its query string and headers, validated.
#
# Invariant: unknown options are refused; otherwise a misspelt `dry_run` would store rows.

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
class WriteOptions:
    """Options of a POST. `key` is the Idempotency-Key, "" for none."""

    form: Form = "json"
    gzip: bool = False
    skip: bool = False
    dry_run: bool = False
    key: str = ""
    resolution: Resolution | None = None


def options(
    given: Sequence[tuple[str, str]], headers: Mapping[str, str], preferred: Sequence[str] = ()
) -> WriteOptions:
    """Parse the options. Raises Refused. Unknown preferences are ignored, as RFC 7240 requires."""
    chosen = dict(given)
    for name in chosen.keys() - {"on_error", "dry_run"}:
        raise Refused(400, f"unknown parameter {name[:80]}", "use on_error and dry_run", name[:80])
    on_error = chosen.get("on_error", "stop")
    if len(chosen) < len(given) or on_error not in ("stop", "skip"):
        raise Refused(422, "on_error is not stop or skip, or given twice", "correct it", "on_error")
    dry_run = flag(chosen, "dry_run")
    key = headers.get("idempotency-key")
    if key is not None and not KEY.fullmatch(key):
        raise Refused(
            422, "Idempotency-Key is not 1 to 255 characters of ASCII without blanks", "use a UUID", "Idempotency-Key"
        )
    given_type = Message()
    given_type["content-type"] = headers.get("content-type") or "application/json"
    form = FORMS.get(given_type.get_content_type())
    if form is None or given_type.get_content_charset("utf-8") not in ("utf-8", "utf8"):
        raise Refused(415, "unsupported media type", "send application/json, application/x-ndjson or text/csv in UTF-8")
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip", "x-gzip", ""):
        raise Refused(415, "unsupported content encoding", "send gzip, or nothing")
    resolution = next((each for each in RESOLUTIONS if f"resolution={each}" in preferred), None)
    return WriteOptions(form, "gzip" in encoding, on_error == "skip", dry_run, key or "", resolution)


# Receives a POST: rows are checked, split into batches and spooled.
#
# Invariants: memory is bounded, however large the body: the first rows, which are held unencoded, one group of rows,
# and the spool's in-memory part; nothing reaches the database before the last byte of the body is checked.

SPOOL_BYTES = HELD_BYTES = 1 << 22
HELD_ROWS = 10_000
MAX_FAULTS = 1000
LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Limits of one batch: its rows, and the bytes of its rows as received, including commas and brackets."""

    rows: int
    size_bytes: int


@dataclass(slots=True)
class ReceivedBody:
    """The rows of a body, filled as it arrives. `batches`: how many the limits make of them; `digest`: of the body's
    bytes, hex; `size_bytes`: of its valid rows. The caller closes it.
    """

    limits: BatchLimits
    rows: int = 0
    batches: int = 0
    faults: list[RowFault] = field(default_factory=list)
    fault_count: int = 0
    digest: str = ""
    size_bytes: int = 0
    held: list[Sequence[Values]] = field(default_factory=list)
    spool: BinaryIO | None = None
    _batch_rows: int = 0
    _batch_bytes: int = 0

    def blocks(self) -> Iterator[Sequence[Values]]:
        """All rows, in blocks, by column."""
        yield from self.held
        if self.spool is not None:
            self.spool.seek(0)
            while head := self.spool.read(LENGTH_BYTES):
                yield msgspec.msgpack.decode(self.spool.read(int.from_bytes(head)))

    def add(self, checked: CheckedRows) -> None:
        """Add a block of rows, and the faults of the invalid ones."""
        self.fault_count += len(checked.faults)
        self.faults += checked.faults[: MAX_FAULTS - len(self.faults)]
        if not checked.sizes:
            return
        # Each batch takes rows until it is full by count or size. A single row over the size limit gets its own.
        for size_bytes in checked.sizes:
            full = self._batch_rows == self.limits.rows
            if full or not self.batches or self._batch_bytes + size_bytes + 1 > self.limits.size_bytes:
                self.batches += 1
                self._batch_bytes = 1
            self._batch_rows = 1 if full else self._batch_rows + 1
            self._batch_bytes += size_bytes + 1
        self.rows += len(checked.sizes)
        self.size_bytes += sum(checked.sizes)
        if self.rows <= HELD_ROWS and self.size_bytes <= HELD_BYTES:
            self.held.append(checked.columns)
            return
        if self.spool is None:
            self.spool = temporary_file(memory_bytes=SPOOL_BYTES)
        packed = msgspec.msgpack.encode(checked.columns)
        self.spool.write(len(packed).to_bytes(LENGTH_BYTES) + packed)

    def close(self) -> None:
        """Free the rows. Idempotent."""
        self.held.clear()
        if self.spool is not None:
            self.spool.close()


def receive(
    body: ReadableBody, table: Table, chosen: WriteOptions, limits: BatchLimits, *, body_bytes: int, stream_bytes: int
) -> ReceivedBody:
    """Receive the body of a POST; the caller closes the result. Raises Refused.

    `body_bytes` limits a JSON body and a single row; `stream_bytes` limits any other body, after decompression.
    """
    unpacked_bytes = body_bytes if chosen.form == "json" else stream_bytes
    raw = BodyBytes(body, unpacked_bytes if chosen.gzip else None)
    stream = io.BufferedReader(raw, BLOCK_BYTES)
    if chosen.form == "csv":
        groups = grouped(csv_rows(stream, table, body_bytes))
    else:
        groups = (json_rows if chosen.form == "json" else ndjson_rows)(stream, body_bytes)
    rows = reader(table.name, merging=chosen.resolution == MERGE)
    seen_rows = 0
    with ExitStack() as failing:
        received = failing.enter_context(closing(ReceivedBody(limits)))
        for group in groups:
            checked = rows.read(group, seen_rows)
            seen_rows += len(group)
            if checked.faults and not chosen.skip:
                raise checked.faults[0].refusal()
            received.add(checked)
        if not seen_rows:
            raise Refused(*EMPTY)
        received.digest = raw.digest.hexdigest()
        failing.pop_all()
    return received
