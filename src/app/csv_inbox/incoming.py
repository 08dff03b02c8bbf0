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
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np

from app.core.errors import Permanent
from app.csv_inbox.config import FaultKind, FileFault, FileStillChanging, InboxConfig, UnmergeableFile, printable
from app.csv_inbox.csv_tokenizer import (
    BOM,
    LONGEST_RECORD_BYTES,
    MASTER_RECORD_BYTES,
    CsvDialect,
    Read,
    RecordBlock,
    blocks,
    find_field_bounds,
    invalid_byte,
    malformed,
    pairs,
    shown,
)
from app.csv_inbox.discovery import MEBIBYTE, identity_of, open_regular, read_some
from app.csv_inbox.key_index import FileKeys

# Headers: the columns of the master, of an incoming file, and their union.
#
# Invariants: names are distinct, and fields are the raw bytes of the header; for an incoming file, spreadsheet
# artefacts around the header are removed first. The master's columns keep their order and new ones follow, so a master
# row changes only by appended fields.

PIECE_BYTES = 1 << 16
ABSENT = -1
MOST_BLANK_BYTES = 1 << 20
MOST_FIELDS = 100_000
SEPARATOR_LINE = re.compile(rb'"?sep=([^"\r\n\0\x80-\xff])"?\r?\n', re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class CsvHeader:
    """The header record, which ends on line `line`. `size_bytes` is the offset of the first row; `eol` may be empty.

    `width` is the number of fields, including empty ones that spreadsheets leave after the last name. `dialect` is that
    of the rows.
    """

    names: tuple[str, ...]
    fields: tuple[bytes, ...]
    record: bytes
    bom: bytes
    eol: bytes
    size_bytes: int
    line: int
    width: int
    dialect: CsvDialect


def read_header(read: Read, master: CsvDialect, known: Sequence[str] | None = None) -> CsvHeader:
    """The header of the master, or that of an incoming file, for which `known` names are given; reads past its end.

    The master's names are as written. In an incoming file everything that spreadsheets write around a header is
    skipped: byte order marks, a line such as `sep=;`, which sets the delimiter, blank records, whitespace around names,
    and unnamed fields after the last name. `known` are names to match as they are: those of the configuration, then the
    master's. `fields` are in the master's dialect. Raises UnmergeableFile.
    """
    longest_bytes = MASTER_RECORD_BYTES if known is None else LONGEST_RECORD_BYTES
    data, begin, start, end, dialect = _find_header(read, master, longest_bytes, is_incoming=known is not None)
    line = 1 + data.count(b"\n", 0, start)
    if (end or len(data)) - start > longest_bytes:
        raise malformed(FaultKind.LONG_RECORD, f"a header longer than {longest_bytes >> 20} MiB", line)
    if start >= len(data):
        raise malformed(FaultKind.NO_ROWS, "the file is empty", 1)
    raw = data[start:end]
    record = raw[:-1].removesuffix(b"\r") if raw.endswith(b"\n") else raw
    if not end or record.endswith(b"\r"):
        raise malformed(FaultKind.HEADER, "the header is not complete: a quote or a line end is cut", line)
    written = _values(dialect, record, line)
    names, fields = tuple(written), dialect.fields(record)
    if known is not None:
        names = columns(written, known)
        as_is = dialect.delimiter == master.delimiter
        fields = [
            raw_field if as_is and name == value else master.written(name.encode(master.encoding))
            for name, value, raw_field in zip(names, written, fields, strict=False)
        ]
    if len(set(names)) < len(names):
        places: dict[str, int] = {}
        twice = next(name for place, name in enumerate(names) if places.setdefault(name, place) < place)
        raise malformed(FaultKind.HEADER, f"the column {twice!r} occurs twice in the header", line, record)
    return CsvHeader(
        names=names,
        fields=tuple(fields),
        record=record,
        bom=data[:begin] if known is None else b"",
        eol=raw[len(record) :],
        size_bytes=start + len(raw),
        line=line + max(raw.count(b"\n"), 1) - 1,
        width=len(written),
        dialect=dialect,
    )


def _find_header(
    read: Read, master: CsvDialect, longest_bytes: int, *, is_incoming: bool
) -> tuple[bytes, int, int, int, CsvDialect]:
    """Read to the end of the header, or until it is too long.

    Returns what was read, the offset of the first record, the bounds of the header (its end is 0 if it is not complete)
    and the dialect of the file. Raises UnmergeableFile.
    """
    data = b""
    while True:
        # The skipped part and the header itself may each be longer than one piece.
        piece = read(max(PIECE_BYTES, len(data)))
        data += piece
        # Before anything is taken for a line end: the carriage returns of UTF-16 are followed by NUL bytes.
        if is_incoming and (at := data.find(b"\0")) >= 0:
            raise invalid_byte(master.encoding, 0, 1 + data.count(b"\n", 0, at))
        begin, dialect = _before_records(data, master, skip=is_incoming)
        # A file may end without a line end; with one added, a header that is still not complete is cut in its quotes.
        start, end = _first_row(data if piece else data + b"\n", begin, dialect)
        d = dialect.delimiter.encode()
        # The blank records before a header, and its fields, must not fill the memory.
        for told, is_over in (
            (f"no header in the first {MOST_BLANK_BYTES >> 20} MiB", start > MOST_BLANK_BYTES),
            (f"a header of more than {MOST_FIELDS} fields", data.count(d, start, end or len(data)) >= MOST_FIELDS),
        ):
            if is_incoming and is_over:
                raise malformed(FaultKind.HEADER, told, 1 + data.count(b"\n", 0, start))
        if end or not piece or len(data) - start > longest_bytes:
            return data, begin, start, end, dialect


def _before_records(data: bytes, dialect: CsvDialect, *, skip: bool) -> tuple[int, CsvDialect]:
    """The offset of the first record, after a byte order mark, and the dialect of the file.

    `skip`: also after further marks and a `sep=` line.
    """
    at = len(BOM) if data.startswith(BOM) else 0
    while skip and data.startswith(BOM, at):
        at += len(BOM)
    if skip and at:
        dialect = after_mark(dialect)
    said = SEPARATOR_LINE.match(data, at) if skip else None
    return (said.end(), CsvDialect(said[1].decode("ascii"), dialect.encoding)) if said else (at, dialect)


def after_mark(dialect: CsvDialect) -> CsvDialect:
    """The dialect of what follows a byte order mark: it is UTF-8, so in another encoding only ASCII can be read."""
    return dialect if dialect.encoding == "utf-8" else CsvDialect(dialect.delimiter, "ascii")


def _first_row(data: bytes, at: int, dialect: CsvDialect) -> tuple[int, int]:
    """The bounds of the first record that is not blank; the end is 0 until the record is complete."""
    marks = find_field_bounds(data[at:], dialect, 1 + data.count(b"\n", 0, at))
    start = at
    for last in marks.lasts.tolist():
        end = at + int(marks.at[last]) + 1
        if not dialect.blank(data[start:end].rstrip(b"\r\n")):
            return start, end
        start = end
    return start, 0


def _values(dialect: CsvDialect, record: bytes, line: int) -> Sequence[str]:
    try:
        return [dialect.unquoted(field).decode(dialect.encoding) for field in dialect.fields(record)]
    except UnicodeDecodeError as error:
        raise invalid_byte(dialect.encoding, error.object[error.start], line, " in the header") from error


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


class ColumnUnion:
    """The columns of the result, before obsolete ones are dropped: those of `master` (None: no master yet), in their
    order, then new ones of `incoming`, which has the key. Raises Permanent if the master lacks the key column.

    `order` is each column's position in the file, or ABSENT; `fits`: rows fit unchanged. `doubtful` are positions of
    columns that the file lacks: obsolete if no row of the result has a value there.
    """

    def __init__(self, master: CsvHeader | None, incoming: CsvHeader, config: InboxConfig, dialect: CsvDialect) -> None:
        held, key = master or incoming, config.key_column
        if key not in held.names:
            raise Permanent(
                f"the master has no column {key!r}: {', '.join(held.names)[:200]}",
                "correct key_column or csv_delimiter, or restore the master; it was not changed",
            )
        there, places = frozenset(held.names), {name: place for place, name in enumerate(incoming.names)}
        new = tuple(name for name in incoming.names if name not in there)
        self.names = (*held.names, *new)
        self.fields = (*held.fields, *(incoming.fields[places[name]] for name in new))
        self.added = new if master else incoming.names
        self.key = self.names.index(key)
        self.bom = master.bom if master else dialect.bom
        self.eol = held.eol or incoming.eol or b"\n"
        self.order = tuple(places.get(name, ABSENT) for name in self.names)
        self.fits = self.order == tuple(range(len(incoming.names)))
        kept = {key, *config.required_columns, *incoming.names}
        self.doubtful = tuple(place for place, name in enumerate(held.names) if name not in kept)

    def header(self, dialect: CsvDialect, dropped: Container[int] = ()) -> bytes:
        """The header line without the columns `dropped`."""
        fields = [field for place, field in enumerate(self.fields) if place not in dropped]
        return self.bom + dialect.delimiter.encode().join(fields) + self.eol


# The rows of an incoming file.

MOST_FAULTS = 1000
MOST_PARTS = 10_000
"""Of files that were appended to each other with a byte order mark each: every one costs a look at a whole block."""
log = logging.getLogger(__name__)


class IncomingFile:
    """An incoming file, read once, with its rows in a spool: record n is `[offsets[n], offsets[n + 1])`.

    `counted` is the number of rows in the file, counted before they are spooled. `unended_bytes` is the size of a last
    record without a line end. `keys` are sorted after everything is read. `out` is the master's dialect, `dialect` the
    file's.
    """

    def __init__(self, master: CsvHeader | None, config: InboxConfig, spool: Path) -> None:
        self.spool = spool
        self.out = self.dialect = CsvDialect(config.csv_delimiter, config.csv_encoding)
        self.offsets = array("q", [0])
        self.counted = self.unended_bytes = 0
        self.keys = FileKeys()
        self._config, self._master = config, master
        # Column names to match as they are.
        self._known = (config.key_column, *config.required_columns, *(master.names if master else ()))
        self._faults: list[tuple[FaultKind, FileFault]] = []
        self._bad_rows = bytearray()
        self._more = self._parts = 0
        self._width = 0  # fields in the first row, 0 before it; may be more than the header's

    @property
    def rows(self) -> int:
        """The number of spooled rows: all rows of a file without faults."""
        return len(self.offsets) - 1

    def read(self, path: Path, beat: Callable[[int], None]) -> None:
        """Check and spool every row; `beat` receives the bytes read and may raise to stop.

        Raises UnmergeableFile, FileStillChanging if the file changed during the read, StuckFile on a read error,
        Permanent if the master lacks the key column, and OSError.
        """
        try:
            with open_regular(path) as file:
                self._read(file, beat)
        except UnmergeableFile as error:
            error.rows = self.counted
            raise

    def _read(self, file: IO[bytes], beat: Callable[[int], None]) -> None:
        self.identity = identity_of(os.fstat(file.fileno()))
        if self.identity.size > self._config.max_file_size_mb * MEBIBYTE:
            told = f"{self.identity.size} bytes, above max_file_size_mb={self._config.max_file_size_mb:g}"
            raise UnmergeableFile(FaultKind.TOO_LARGE, [FileFault(told)], "split the file, or raise max_file_size_mb")
        self._read_header(file)
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
        with self.spool.open("xb") as spool:
            first = 1 + self.header.line
            for block in blocks(read, self.dialect, first, longest_bytes=LONGEST_RECORD_BYTES, bom=BOM):
                self._take(block, spool)
        self.md5 = digest.hexdigest()
        if identity_of(os.fstat(file.fileno())) != self.identity:
            raise FileStillChanging("it changed while it was read")
        if self._faults:
            raise self._rejection()
        if not self.counted:
            hint = "put a file with at least one row below the header"
            raise UnmergeableFile(FaultKind.NO_ROWS, [FileFault("it has no rows")], hint)
        self.keys.sort()

    def _read_header(self, file: IO[bytes]) -> None:
        self.header = header = read_header(partial(read_some, file), self.out, self._known)
        self.dialect = dialect = header.dialect
        log.debug(
            "header: %d columns in line %d (%s), %d fields in all; delimiter %r, encoding %s, line end %r",
            *(len(header.names), header.line, printable(", ".join(header.names)[:500]), header.width),
            *(dialect.delimiter, dialect.encoding, header.eol.decode("ascii")),
        )
        wanted = dict.fromkeys((self._config.key_column, *self._config.required_columns))
        missing = [name for name in wanted if name not in header.names]
        if missing:
            hint = f"the file has: {', '.join(header.names)[:300]}"
            if len(header.names) == 1:
                hint += f"; its delimiter was detected as {dialect.delimiter!r}"
            raise UnmergeableFile(
                FaultKind.MISSING_COLUMN,
                [FileFault(f"the column {name!r} is missing", header.line, name) for name in missing],
                f"add the column, or change key_column or required_columns; {hint}",
            )
        self.union = ColumnUnion(self._master, header, self._config, self.out)
        if self.union.added and len(self.union.header(self.out)) > LONGEST_RECORD_BYTES:
            told = f"with its columns the header of the master is longer than {LONGEST_RECORD_BYTES >> 20} MiB"
            raise malformed(FaultKind.LONG_RECORD, told, header.line)

    def _check_bytes(self, block: RecordBlock) -> None:
        if block.begins:
            self.dialect = after_mark(self.dialect)
            self._parts += 1
            if self._parts > MOST_PARTS:
                told = f"more than {MOST_PARTS} files with a byte order mark are appended to each other"
                raise malformed(FaultKind.SECOND_HEADER, told, block.line)
        if (at := block.data.find(b"\0")) >= 0:
            raise invalid_byte(self.dialect.encoding, 0, block.line_at(at))
        block.check_text(self.dialect.encoding)

    def _take(self, block: RecordBlock, spool: IO[bytes]) -> None:
        self._check_bytes(block)
        self.unended_bytes = 0 if block.data.endswith(b"\n") else len(block.data) - int(block.starts[-1])
        _drop_blank_rows(block, self.dialect)
        self._drop_repeated_headers(block)
        if not len(block.rows):
            return
        self.counted += len(block.rows)
        self._cut_empty_fields(block)
        wanted, column = len(self.header.names), self._config.key_column
        uneven = np.flatnonzero(block.widths != wanted)
        for place in uneven.tolist():
            self._blame(block, place, FaultKind.RAGGED, f"{block.widths[place]} fields where the header has {wanted}")
        if len(uneven):
            return
        keys = block.cells(self.header.names.index(column), self.dialect)
        for place in np.flatnonzero(keys.lengths == 0).tolist():
            self._blame(block, place, FaultKind.EMPTY_KEY, f"the key {column!r} is empty", column)
        for place in range(len(block.rows)) if BOM in block.data else ():
            if BOM in keys.value(place):
                self._blame(block, place, FaultKind.EMPTY_KEY, f"a byte order mark in the key {column!r}", column)
        # A file with a fault is not merged, so its keys and rows are not needed.
        if not self._faults:
            self.keys.add(keys)
            self._write(block, spool)

    def _drop_repeated_headers(self, block: RecordBlock) -> None:
        """A header that comes again is no row: after a byte order mark, or to the byte, as appending writers leave it.

        After a mark there may also be rows at once, if the appended file had no header. Raises UnmergeableFile for a
        different header.
        """
        header = self.header
        if block.begins and len(block.rows):
            position = int(block.rows[0])
            record = block.record(position)
            values = _values(self.dialect, record, 0)
            names = columns(values, self._known)
            if names == header.names:
                block.drop([0])
            elif {name for name in names if name} & set(header.names) or values[0].lower().startswith("sep="):
                told = "another file begins here, and its header is not that of the first line"
                raise malformed(FaultKind.SECOND_HEADER, told, block.line_of(position), record)
        # The search in the whole block is fast, and rules out nearly every block.
        if len(header.names) > 1 and header.record in block.data:
            sizes = block.stops[block.rows] - block.starts[block.rows]
            again = np.flatnonzero(sizes == len(header.record)).tolist()
            block.drop([place for place in again if block.record(int(block.rows[place])) == header.record])

    def _cut_empty_fields(self, block: RecordBlock) -> None:
        """Drop empty fields after the last column, if the header or every row has them."""
        named, widths = len(self.header.names), block.widths
        if self.header.width > named:
            allowed = (widths > named) & (widths <= self.header.width)
        else:
            self._width = self._width or int(widths[0])
            allowed = (widths > named) & (widths == self._width)
            for place in np.flatnonzero(widths == named).tolist() if self._width > named else ():
                told = f"{named} fields where the rows before have {self._width}"
                self._blame(block, place, FaultKind.RAGGED, told)
        wide = np.flatnonzero(allowed)
        if len(wide):
            begins, ends = block.marks.at[block.heads[wide] + named - 1], block.stops[block.rows[wide]]
            empty = ends - begins == widths[wide] - named  # only delimiters
            for place in np.flatnonzero(~empty).tolist():
                empty[place] = self.dialect.blank(block.data[int(begins[place]) : int(ends[place])])
            block.cut(wide[empty], named, begins[empty])

    def _blame(self, block: RecordBlock, place: int, kind: FaultKind, reason: str, column: str | None = None) -> None:
        """Note a bad row; beyond MOST_FAULTS, or the size of the longest record in all, they are only counted."""
        if len(self._faults) >= MOST_FAULTS or len(self._bad_rows) >= LONGEST_RECORD_BYTES:
            self._more += 1
            return
        position = int(block.rows[place])
        record = block.record(position)
        self._faults.append((kind, FileFault(reason, block.line_of(position), column, "" if column else shown(record))))
        self._bad_rows += record + b"\n"

    def _rejection(self) -> UnmergeableFile:
        """The error for a file with bad rows."""
        hint = "correct these rows and put the file into the inbox again; no row of it was merged"
        error = UnmergeableFile(self._faults[0][0], [fault for _, fault in self._faults], hint, more=self._more)
        names = [self.dialect.written(name.encode(self.dialect.encoding)) for name in self.header.names]
        line = self.dialect.delimiter.encode().join(names) + (self.header.eol or b"\n")
        error.bad_rows = line + self._bad_rows
        return error

    def _write(self, block: RecordBlock, spool: IO[bytes]) -> None:
        """Spool the rows in the columns of the new master, verbatim where possible."""
        union, base = self.union, self.offsets[-1]
        eol, d = union.eol, self.out.delimiter.encode()
        translated = self.dialect.delimiter != self.out.delimiter
        # Most files fit as they are: then write the block in one piece and only shift its offsets.
        as_is = union.fits and len(block.rows) == len(block.ends) and not translated and not block.is_cut
        if as_is and bool((block.ends - block.stops == len(eol)).all()):
            spool.write(block.data)
            self.offsets.frombytes((block.ends + base).tobytes())
            return
        for start, stop in pairs(block.starts[block.rows], block.stops[block.rows]):
            record = block.data[start:stop]
            if translated or not union.fits:
                fields = [*self.dialect.fields(record), b""]  # what ABSENT, the last, finds
                if translated:
                    fields = [self.out.written(self.dialect.unquoted(raw)) for raw in fields]
                record = d.join([fields[place] for place in union.order])
            base += spool.write(record + eol)  # one by one: with the columns of the master a row may be far longer
            self.offsets.append(base)


def _drop_blank_rows(block: RecordBlock, dialect: CsvDialect) -> None:
    """Drop rows of nothing but delimiters, blanks and empty quotes."""
    soft = np.zeros(256, np.bool_)
    soft[[ord(dialect.delimiter), ord(" "), ord("\t"), ord('"')]] = True
    starts, stops = block.starts[block.rows], block.stops[block.rows]
    places = np.arange(len(block.rows))
    # The first byte rules out most rows; only rows that look blank at both ends and in the middle are checked in full.
    for part in (0.0, 1.0, 0.5):
        at = starts[places] + ((stops[places] - 1 - starts[places]) * part).astype(np.int64)
        places = places[soft[block.array[at]]]
    if len(places):
        bounds = np.stack((starts[places], stops[places]), axis=1).ravel()
        hard = np.append(~soft[block.array], False)  # the last row may end where the data does
        places = places[~np.logical_or.reduceat(hard, bounds)[::2]]
    if len(block.marks.quotes):
        places = np.array([at for at in places.tolist() if dialect.blank(block.record(int(block.rows[at])))], np.int64)
    block.drop(places)
