"""Reads one incoming file: checks it and spools its rows in the columns of the new master.

Invariants: the file is read once, through one descriptor, so the checked bytes are the merged bytes, whatever happens
to its name; a file with any fault is rejected as a whole, with all faults found; memory grows only with the file's
keys. Cleaning up spreadsheet artefacts never drops a value, and line numbers stay those of the file.
"""

import hashlib
import logging
import os
import re
from array import array
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np

from app.core.errors import Permanent
from app.csv_inbox.config import FaultKind, FileFault, FileStillChanging, InboxConfig, UnmergeableFile
from app.csv_inbox.csv_tokenizer import (
    BOM,
    LONGEST_RECORD_BYTES,
    MASTER_RECORD_BYTES,
    CsvDialect,
    MalformedCsv,
    Offsets,
    Read,
    RecordBlock,
    blocks,
    find_field_bounds,
    pairs,
)
from app.csv_inbox.discovery import FileIdentity, identity_of, is_too_large, open_regular, read_some
from app.csv_inbox.key_index import FileKeys

# Headers: the columns of the master, of an incoming file, and their union.
#
# Invariants: names are distinct, and fields are the raw bytes of the header; for an incoming file, spreadsheet
# artefacts around the header are removed first. The master's columns keep their order and new ones follow, so a master
# row changes only by appended fields.

PIECE_BYTES = 1 << 16
SHOWN_BYTES = 1000
ABSENT = -1
SEPARATOR_LINE = re.compile(rb'"?sep=([^"\r\n\0])"?\r?\n', re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class CsvHeader:
    """The header record. `size_bytes` is the offset of the first row; `eol` may be empty.

    `width` is the number of fields, including empty ones that spreadsheets leave after the last name.
    """

    names: tuple[str, ...]
    fields: tuple[bytes, ...]
    bom: bytes
    eol: bytes
    size_bytes: int
    lines: int
    width: int


def read_header(read: Read, dialect: CsvDialect) -> CsvHeader:
    """The master's header; reads past its end.

    Raises MalformedCsv for an empty file, invalid text, an incomplete header or a duplicate name.
    """
    data = b""
    while piece := read(max(PIECE_BYTES, len(data))):
        data += piece
        if len(data) > MASTER_RECORD_BYTES or len(find_field_bounds(data, dialect).lasts):
            break
    bom = BOM if data.startswith(BOM) and dialect.encoding == "utf-8" else b""
    raw, record = _first(data[len(bom) :], dialect)
    names = _distinct(_values(dialect, record), record)
    fields = tuple(dialect.fields(record))
    lines = max(raw.count(b"\n"), 1)
    return CsvHeader(names, fields, bom, raw[len(record) :], len(bom) + len(raw), lines, len(names))


def read_incoming_header(read: Read, master: CsvDialect, known: Sequence[str]) -> tuple[CsvHeader, CsvDialect]:
    """The header of an incoming file, and its dialect, which a line such as `sep=;` may set.

    Skips byte order marks, that line and blank records before the header; strips whitespace around names; ignores
    unnamed fields after the last name. `fields` are in the master's dialect. `known` are names to match as they are:
    those of the configuration, then the master's. Raises MalformedCsv, also for a NUL byte and for a header longer than
    LONGEST_RECORD_BYTES.
    """
    data = b""
    while True:
        # The skipped part and the header itself may each be longer than one piece.
        piece = read(max(PIECE_BYTES, len(data)))
        data += piece
        at, dialect = _before_records(data, master)
        start, end = _first_row(data, at, dialect)
        if end or not piece or len(data) - start > LONGEST_RECORD_BYTES:
            break
    line = 1 + data.count(b"\n", 0, start)
    if (end or len(data)) - start > LONGEST_RECORD_BYTES:
        raise MalformedCsv(f"a header longer than {LONGEST_RECORD_BYTES >> 20} MiB", line, kind=FaultKind.LONG_RECORD)
    raw, record = _first(data[start:], dialect)
    written = _values(dialect, record)
    if any("\0" in name for name in written):
        raise MalformedCsv("a NUL byte (0x00) in the header", line, record[:SHOWN_BYTES], kind=FaultKind.ENCODING)
    names = _distinct(columns(written, known), record)
    as_is = dialect.delimiter == master.delimiter
    fields = tuple(
        raw_field if as_is and name == value else master.written(name.encode(master.encoding))
        for name, value, raw_field in zip(names, written, dialect.fields(record), strict=False)
    )
    size, lines = start + len(raw), line + max(raw.count(b"\n"), 1) - 1
    return CsvHeader(names, fields, b"", raw[len(record) :], size, lines, len(written)), dialect


def columns(written: Sequence[str], known: Iterable[str]) -> tuple[str, ...]:
    """The column names of a header, stripped and without unnamed trailing fields; `known` spellings win."""
    stripped = [_stripped(name) for name in written]
    there: dict[str, str] = {}
    for name in known:
        there.setdefault(_stripped(name), name)
        if name == _stripped(name):
            there[name] = name
    kept = max((place for place, name in enumerate(stripped, 1) if name), default=1)
    if kept == len(stripped) - 1 and "" in there:  # a master may have a column without a name
        kept = len(stripped)
    return tuple(there.get(name, name) for name in stripped[:kept])


def _stripped(name: str) -> str:
    """The name without surrounding whitespace and byte order marks; quotes after a blank count as quotes too."""
    bare = name.strip().strip("\ufeff").strip()
    if bare != name and len(bare) > 1 and bare[0] == bare[-1] == '"':
        bare = bare[1:-1].replace('""', '"').strip()
    return bare


def _before_records(data: bytes, dialect: CsvDialect) -> tuple[int, CsvDialect]:
    """The offset of the first record, after byte order marks and a `sep=` line, and the file's dialect."""
    at = 0
    while dialect.encoding == "utf-8" and data.startswith(BOM, at):
        at += len(BOM)
    said = SEPARATOR_LINE.match(data, at)
    if said is None or said[1] >= b"\x80":
        return at, dialect
    return said.end(), CsvDialect(said[1].decode("ascii"), dialect.encoding)


def _first_row(data: bytes, at: int, dialect: CsvDialect) -> tuple[int, int]:
    """The bounds of the first record that is not blank; the end is 0 until the record is complete."""
    marks = find_field_bounds(data[at:], dialect)
    start = at
    for last in marks.lasts.tolist():
        end = at + int(marks.at[last]) + 1
        if not dialect.blank(_without_eol(data[start:end])):
            return start, end
        start = end
    return start, 0


def _first(body: bytes, dialect: CsvDialect) -> tuple[bytes, bytes]:
    """The first record with its line end (if it has one), and without it."""
    marks = find_field_bounds(body, dialect)
    if len(marks.lasts):
        raw = body[: int(marks.at[marks.lasts[0]]) + 1]
        return raw, _without_eol(raw)
    if not body:
        raise MalformedCsv("the file is empty", 1, kind=FaultKind.NO_ROWS)
    if body.endswith(b"\r") or len(find_field_bounds(body + b"\n", dialect).lasts) != 1:
        raise MalformedCsv("the header is not complete: a quote or a line end is cut", 1, kind=FaultKind.HEADER)
    return body, body


def _without_eol(raw: bytes) -> bytes:
    return raw[:-1].removesuffix(b"\r") if raw.endswith(b"\n") else raw


def _values(dialect: CsvDialect, record: bytes) -> Sequence[str]:
    try:
        return [dialect.unquoted(field).decode(dialect.encoding) for field in dialect.fields(record)]
    except UnicodeDecodeError as error:
        told = f"invalid {dialect.encoding.upper()} byte 0x{error.object[error.start]:02X} in the header"
        raise MalformedCsv(told, 1, record[:SHOWN_BYTES], kind=FaultKind.ENCODING) from error


def _distinct(names: Sequence[str], record: bytes) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise MalformedCsv(
            f"the column {twice!r} occurs twice in the header", 1, record[:SHOWN_BYTES], kind=FaultKind.HEADER
        )
    return tuple(names)


@dataclass(frozen=True, slots=True)
class ColumnUnion:
    """The columns of the result, before obsolete ones are dropped.

    `order` is each column's position in the file (ABSENT: not in the file); None if rows fit unchanged. `doubtful` are
    positions of columns that the file lacks: obsolete if no row of the result has a value there.
    """

    names: tuple[str, ...]
    fields: tuple[bytes, ...]
    bom: bytes
    eol: bytes
    order: tuple[int, ...] | None
    doubtful: tuple[int, ...]
    added: tuple[str, ...]
    key: int

    def header(self, dialect: CsvDialect, dropped: Sequence[int] = ()) -> bytes:
        """The header line without the columns `dropped`."""
        fields = [field for place, field in enumerate(self.fields) if place not in dropped]
        return self.bom + dialect.delimiter.encode().join(fields) + self.eol

    def rendered(self, fields: Sequence[bytes]) -> list[bytes]:
        """The raw fields of one row of the file, in the column order of the result."""
        if self.order is None:
            return list(fields)
        return [b"" if place == ABSENT else fields[place] for place in self.order]


def united(
    master: CsvHeader | None, incoming: CsvHeader, key: str, required: Sequence[str], dialect: CsvDialect
) -> ColumnUnion:
    """The columns of `incoming`, which has the key, merged into those of `master` (None: no master yet).

    Raises Permanent if the master lacks the key column.
    """
    held = incoming if master is None else master
    if key not in held.names:
        raise Permanent(
            f"the master has no column {key!r}: {', '.join(held.names)[:200]}",
            "correct key_column, or restore the master; it was not changed",
        )
    there = frozenset(held.names)
    added = () if master is None else tuple(name for name in incoming.names if name not in there)
    fields = dict(zip(incoming.names, incoming.fields, strict=True))
    names = (*held.names, *added)
    places = {name: place for place, name in enumerate(incoming.names)}
    order = tuple(places.get(name, ABSENT) for name in names)
    kept = {key, *required, *incoming.names}
    return ColumnUnion(
        names=names,
        fields=(*held.fields, *(fields[name] for name in added)),
        bom=dialect.bom if master is None else master.bom,
        eol=held.eol or incoming.eol or b"\n",
        order=None if order == tuple(range(len(incoming.names))) else order,
        doubtful=tuple(place for place, name in enumerate(held.names) if name not in kept),
        added=incoming.names if master is None else added,
        key=names.index(key),
    )


# The rows of an incoming file.

MOST_FAULTS = 1000
LONGEST_VALUE = 200
log = logging.getLogger(__name__)


class IncomingFile:
    """An incoming file, read once, with its rows in a spool: record n is `[offsets[n], offsets[n + 1])`.

    `counted` is the number of rows in the file, counted before they are spooled. `unended_bytes` is the size of a last
    record without a line end. `keys` are sorted after everything is read. `out` is the master's dialect, `dialect` the
    file's.
    """

    identity: FileIdentity
    md5: str

    def __init__(self, key_column: str, known: Sequence[str], out: CsvDialect, spool: Path) -> None:
        self.spool = spool
        self.out = self.dialect = out
        self.offsets = array("q", [0])
        self.counted = self.unended_bytes = 0
        self._key_column = key_column
        self._known = known  # column names to match as they are
        self.keys = FileKeys()
        self._faults: list[FileFault] = []
        self._records: list[bytes] = []
        self._first_kind: FaultKind | None = None
        self._more = 0
        self._width = 0  # fields in the first row, 0 before it; may be more than the header's

    @property
    def rows(self) -> int:
        """The number of spooled rows: all rows of a file without faults."""
        return len(self.offsets) - 1

    @property
    def duplicates(self) -> int:
        """The number of rows that a later row of the same file replaces."""
        return self.rows - self.keys.count

    def runs(self, rows: Offsets) -> Iterator[tuple[int, int]]:
        """The byte ranges of these records (ascending) in the spool; adjacent records are joined into one range."""
        breaks = np.flatnonzero(np.diff(rows) > 1)
        first, last = rows[np.append(0, breaks + 1)], rows[np.append(breaks, len(rows) - 1)]
        for start, end in pairs(first, last):
            yield self.offsets[start], self.offsets[end + 1]

    def read(
        self, file: IO[bytes], master: CsvHeader | None, required: Sequence[str], beat: Callable[[int], None]
    ) -> None:
        """Check and spool every row.

        Raises MalformedCsv, UnmergeableFile, StuckFile, Permanent, OSError and what `beat` raises.
        """
        self.header, self.dialect = read_incoming_header(partial(read_some, file), self.out, self._known)
        self._check_columns(required)
        self.union = united(master, self.header, self._key_column, required, self.out)
        if self.union.added and len(self.union.header(self.out)) > LONGEST_RECORD_BYTES:
            told = f"with its columns the header of the master is longer than {LONGEST_RECORD_BYTES >> 20} MiB"
            raise MalformedCsv(told, self.header.lines, kind=FaultKind.LONG_RECORD)
        digest = hashlib.md5(usedforsecurity=False)

        def read(size: int) -> bytes:
            piece = read_some(file, size)
            digest.update(piece)
            beat(len(piece))
            return piece

        file.seek(0)
        left = self.header.size_bytes
        while left > 0:  # re-read the header, so that it is in the digest
            left -= len(read(left)) or left
        bom, line = BOM if self.dialect.encoding == "utf-8" else b"", 1 + self.header.lines
        with self.spool.open("xb") as spool:
            for block in blocks(read, self.dialect, line, longest_bytes=LONGEST_RECORD_BYTES, bom=bom):
                self._take(block, spool)
        self.md5 = digest.hexdigest()

    def _check_columns(self, required: Sequence[str]) -> None:
        header, dialect = self.header, self.dialect
        log.debug(
            "header: %d columns in line %d (%s), %d fields in all; delimiter %r, encoding %s, line end %r",
            *(len(header.names), header.lines, ", ".join(header.names)[:500], header.width),
            *(dialect.delimiter, dialect.encoding, header.eol.decode("ascii")),
        )
        missing = [name for name in dict.fromkeys((self._key_column, *required)) if name not in header.names]
        if missing:
            hint = f"the file has: {', '.join(header.names)[:300]}"
            if len(header.names) == 1:
                hint += f"; its delimiter was taken to be {dialect.delimiter!r}"
            raise UnmergeableFile(
                [FileFault(f"the column {name!r} is missing", header.lines, name) for name in missing],
                f"add the column, or change key_column or required_columns; {hint}",
                kind=FaultKind.MISSING_COLUMN,
            )

    def _take(self, block: RecordBlock, spool: IO[bytes]) -> None:
        self._check_text(block)
        self.unended_bytes = 0 if block.data.endswith(b"\n") else len(block.data) - int(block.starts[-1])
        block = _without_blank_records(block, self.dialect)
        if block.begins:
            block = self._without_header(block)
        if not len(block.rows):
            return
        self.counted += len(block.rows)
        block = self._without_empty_fields(block)
        wanted = len(self.header.names)
        uneven = [(at, f"{found} fields where the header has {wanted}", None) for at, found in block.uneven(wanted)]
        if uneven:
            self._blame(block, FaultKind.RAGGED, uneven)
            return
        column = self._key_column
        keys = block.cells(self.header.names.index(column), self.dialect)
        empty = block.rows[keys.lengths == 0].tolist()
        self._blame(block, FaultKind.EMPTY_KEY, [(at, f"the key {column!r} is empty", column) for at in empty])
        if BOM in block.data and self.dialect.encoding == "utf-8":
            marked = [at for place, at in enumerate(block.rows.tolist()) if BOM in keys.value(place)]
            self._blame(
                block,
                FaultKind.EMPTY_KEY,
                [(at, f"a byte order mark in the key {column!r}", column) for at in marked],
            )
        self.keys.add(keys)
        # A file with a fault is not merged, so its rows need not be spooled.
        if not self._faults:
            self._write(block, spool)

    def _check_text(self, block: RecordBlock) -> None:
        """Raises UnmergeableFile for invalid text or a NUL byte, which a half-written disk block leaves."""
        encoding, at = self.dialect.encoding, block.data.find(b"\0")
        if at < 0 and (at := block.first_invalid(encoding)) < 0:
            return
        byte = f"0x{block.data[at]:02X}"
        told = f"a NUL byte ({byte})" if byte == "0x00" else f"invalid {encoding.upper()} byte {byte}"
        fault = FileFault(told, block.line_at(at), None, byte)
        raise UnmergeableFile([fault], _encoding_hint(encoding), kind=FaultKind.ENCODING, rows=self.counted)

    def _without_header(self, block: RecordBlock) -> RecordBlock:
        """Skip the repeated header of a file that was appended to another. Raises MalformedCsv for a different header.

        Rows may also follow the byte order mark directly, if the appended file had no header.
        """
        if not len(block.rows):
            return block
        position = int(block.rows[0])
        dialect, record = self.dialect, block.record(position)
        values = [dialect.unquoted(each).decode(dialect.encoding) for each in dialect.fields(record)]
        names = columns(values, self._known)
        if names == self.header.names:
            return block.without(np.array([position]))
        if {name for name in names if name} & set(self.header.names) or values[0].lower().startswith("sep="):
            told = "another file begins here, and its header is not that of the first line"
            raise MalformedCsv(told, block.line_of(position), record[:LONGEST_VALUE], kind=FaultKind.SECOND_HEADER)
        return block

    def _without_empty_fields(self, block: RecordBlock) -> RecordBlock:
        """Drop empty fields after the last column, if the header or every row has them."""
        header = self.header
        named = len(header.names)
        if header.width == named and not self._width:
            self._width = int(block.widths[0])
        if header.width > named:
            return _without_surplus(block, self.dialect, named, range(named + 1, header.width + 1))
        if self._width <= named:
            return block
        short = block.rows[block.widths == named].tolist()
        told = f"{named} fields where the rows before have {self._width}"
        self._blame(block, FaultKind.RAGGED, [(at, told, None) for at in short])
        return _without_surplus(block, self.dialect, named, range(self._width, self._width + 1))

    def _blame(self, block: RecordBlock, kind: FaultKind, found: Sequence[tuple[int, str, str | None]]) -> None:
        """Record bad rows, up to MOST_FAULTS; count the others."""
        room = MOST_FAULTS - len(self._faults)
        self._more += len(found[room:])
        for position, reason, column in found[:room]:
            record = block.record(position)
            self._first_kind = self._first_kind or kind
            self._faults.append(FileFault(reason, block.line_of(position), column, "" if column else _shown(record)))
            self._records.append(record)

    def _write(self, block: RecordBlock, spool: IO[bytes]) -> None:
        """Spool the rows in the columns of the new master, verbatim where possible."""
        union, base = self.union, self.offsets[-1]
        eol, d = union.eol, self.out.delimiter.encode()
        translated = self.dialect.delimiter != self.out.delimiter
        # Most files fit as they are: then write the block in one piece and only shift its offsets.
        as_is = union.order is None and len(block.rows) == len(block.ends) and not translated
        if as_is and bool((block.ends - block.stops == len(eol)).all()):
            spool.write(block.data)
            self.offsets.frombytes((block.ends + base).tobytes())
            return
        parts = []
        for position in block.rows.tolist():
            record = block.record(position)
            if translated:
                values = [self.dialect.unquoted(raw) for raw in self.dialect.fields(record)]
                record = d.join(union.rendered([self.out.written(value) for value in values]))
            elif union.order is not None:
                record = d.join(union.rendered(self.dialect.fields(record)))
            base += len(record) + len(eol)
            self.offsets.append(base)
            parts.append(record)
        spool.write(eol.join([*parts, b""]))

    def finish(self) -> None:
        """Sort the keys after everything is read. Raises UnmergeableFile if there are bad rows or no rows."""
        if self._first_kind:
            delimiter = self.dialect.delimiter.encode()
            fields = [self.dialect.written(name.encode(self.dialect.encoding)) for name in self.header.names]
            raise UnmergeableFile(
                self._faults,
                "correct these rows and put the file into the inbox again; no row of it was merged",
                kind=self._first_kind,
                header=delimiter.join(fields) + (self.header.eol or b"\n"),
                records=self._records,
                more=self._more,
                rows=self.counted,
            )
        if not self.counted:
            raise UnmergeableFile(
                [FileFault("it has no rows")],
                "put a file with at least one row below the header",
                kind=FaultKind.NO_ROWS,
            )
        self.keys.sort()


def read_incoming(
    path: Path, master: CsvHeader | None, config: InboxConfig, spool: Path, beat: Callable[[int], None]
) -> IncomingFile:
    """Check the file and spool its rows; `beat` receives the bytes read and may raise to stop.

    Raises UnmergeableFile, FileStillChanging if it changed during the read, StuckFile on a read error, Permanent if the
    master lacks the key column, and OSError.
    """
    known = (config.key_column, *config.required_columns, *(master.names if master else ()))
    incoming = IncomingFile(config.key_column, known, CsvDialect(config.csv_delimiter, config.csv_encoding), spool)
    with open_regular(path) as file:
        incoming.identity = before = identity_of(os.fstat(file.fileno()))
        if is_too_large(before.size, config):
            told = f"{before.size} bytes, above max_file_size_mb={config.max_file_size_mb:g}"
            raise UnmergeableFile(
                [FileFault(told)], "split the file, or raise max_file_size_mb", kind=FaultKind.TOO_LARGE
            )
        try:
            incoming.read(file, master, config.required_columns, beat)
        except MalformedCsv as error:
            fault = FileFault(error.message, error.line, None, _shown(error.record) if error.record else None)
            hint = "correct the file and put it into the inbox again"
            if error.kind is FaultKind.ENCODING:
                hint = _encoding_hint(config.csv_encoding)
            raise UnmergeableFile([fault], hint, kind=error.kind, rows=incoming.counted) from error
        if identity_of(os.fstat(file.fileno())) != before:
            raise FileStillChanging(
                f"{path.name} changed while it was read", "no action needed; the next run looks again"
            )
    incoming.finish()
    return incoming


def _encoding_hint(encoding: str) -> str:
    return f"save the file as {encoding} without NUL bytes, or set csv_encoding, and put it into the inbox again"


def _shown(record: bytes) -> str:
    return record[:LONGEST_VALUE].decode("utf-8", "backslashreplace")


def _without_blank_records(block: RecordBlock, dialect: CsvDialect) -> RecordBlock:
    """The block without blank rows: those of nothing but delimiters, blanks and empty quotes."""
    soft = np.zeros(256, np.bool_)
    soft[[ord(dialect.delimiter), ord(" "), ord("\t"), ord('"')]] = True
    positions = block.rows
    # The first byte rules out most rows; only rows that look blank at both ends and in the middle are checked in full.
    for part in (0.0, 1.0, 0.5):
        starts, lasts = block.starts[positions], block.stops[positions] - 1
        places = starts + ((lasts - starts) * part).astype(np.int64)
        positions = positions[soft[block.array[places]]]
    blank = [at for at in positions.tolist() if dialect.blank(block.record(at))]
    return block.without(np.array(blank, np.int64)) if blank else block


def _without_surplus(block: RecordBlock, dialect: CsvDialect, width: int, allowed: Container[int]) -> RecordBlock:
    """Cut rows with an allowed number of fields to `width` fields, if all further ones are blank."""
    widths = block.widths
    wide = np.flatnonzero(widths > width)
    if not len(wide):
        return block
    firsts, lasts = block.tails(wide, width), block.stops[block.rows][wide]
    only_delimiters = lasts - firsts == widths[wide] - width
    goes = [
        place
        for place, (first, last) in enumerate(pairs(firsts, lasts))
        if int(widths[wide[place]]) in allowed and (only_delimiters[place] or dialect.blank(block.data[first:last]))
    ]
    if not goes:
        return block
    return block.without_bytes(firsts[goes], lasts[goes], dialect)
