"""One incoming file, read once: checked, and its rows written to a spool in the columns of the new master.

Invariants: the file is read through one descriptor, once, so what was checked is what is merged, whatever happens to
the name meanwhile; a file with any fault is Unmergeable as a whole, with every fault that was found; memory grows with
the keys of the file and nothing else of it. Of what spreadsheets write around the rows, nothing that has a value is
ever taken away, and lines keep their numbers.
"""

import hashlib
import logging
import os
from array import array
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from app.csv_inbox.config import Fault, FaultKind, InboxConfig, Unmergeable, Unsteady
from app.csv_inbox.csv_tokenizer import (
    BOM,
    LONGEST_RECORD_BYTES,
    Dialect,
    Malformed,
    Offsets,
    RecordBlock,
    blocks,
    pairs,
)
from app.csv_inbox.discovery import Identity, identity_of, is_too_large, open_regular, read_some
from app.csv_inbox.header import ColumnUnion, Header, columns, read_incoming_header, united
from app.csv_inbox.key_index import Gathering, Keys

MOST_FAULTS = 1000
LONGEST_VALUE = 200
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Incoming:
    """What was read. Record n of the spool is `[offsets[n], offsets[n + 1])`.

    `counted` is the number of rows that were seen in the file, tallied before any was spooled. `unended_bytes` is the
    size of a last record that lacks its line end.
    """

    identity: Identity
    md5: str
    header: Header
    union: ColumnUnion
    spool: Path
    keys: Keys
    offsets: "array[int]"
    counted: int
    unended_bytes: int

    @property
    def rows(self) -> int:
        """All rows of the file."""
        return len(self.offsets) - 1

    @property
    def duplicates(self) -> int:
        """Rows that a later row of the same file replaces."""
        return self.rows - self.keys.count

    def runs(self, rows: Offsets) -> Iterator[tuple[int, int]]:
        """Where these records, in ascending order, lie in the spool; neighbours make one run."""
        breaks = np.flatnonzero(np.diff(rows) > 1)
        first, last = rows[np.append(0, breaks + 1)], rows[np.append(breaks, len(rows) - 1)]
        for start, end in pairs(first, last):
            yield self.offsets[start], self.offsets[end + 1]


def read_incoming(
    path: Path, master: Header | None, config: InboxConfig, spool: Path, beat: Callable[[int], None]
) -> Incoming:
    """Check the file and spool its rows; `beat` is told of bytes read, and may raise to stop.

    Raises Unmergeable, Unsteady when it changed meanwhile, Stuck when it cannot be read now, Permanent when the master
    lacks the key column, and OSError.
    """
    with open_regular(path) as file, spool.open("xb") as rows:
        before = identity_of(os.fstat(file.fileno()))
        if is_too_large(before.size, config):
            told = f"{before.size} bytes, above max_file_size_mb={config.max_file_size_mb:g}"
            raise Unmergeable([Fault(told)], "split the file, or raise max_file_size_mb", kind=FaultKind.TOO_LARGE)
        digest = hashlib.md5(usedforsecurity=False)

        def read(size: int) -> bytes:
            piece = read_some(file, size)
            digest.update(piece)
            beat(len(piece))
            return piece

        reading = None
        try:
            reading = _begin(file, master, config, rows)
            file.seek(0)
            reading.take_all(read)
        except Malformed as error:
            fault = Fault(error.message, error.line, None, _shown(error.record) if error.record else None)
            counted, hint = reading.counted if reading else 0, "correct the file and put it into the inbox again"
            raise Unmergeable([fault], hint, kind=error.kind, rows=counted) from error
        if identity_of(os.fstat(file.fileno())) != before:
            raise Unsteady(f"{path.name} changed while it was read", "no action needed; the next run looks again")
    reading.check_faults()
    return Incoming(
        identity=before,
        md5=digest.hexdigest(),
        header=reading.header,
        union=reading.union,
        spool=spool,
        keys=reading.keys.keys(),
        offsets=reading.offsets,
        counted=reading.counted,
        unended_bytes=reading.unended_bytes,
    )


def _begin(file: IO[bytes], master: Header | None, config: InboxConfig, spool: IO[bytes]) -> "_Reading":
    """Read the header. Raises Unmergeable when a column is missing, Malformed when the header is too long."""
    out = Dialect(config.csv_delimiter, config.csv_encoding)
    known = (config.key_column, *config.required_columns, *(master.names if master else ()))
    header, dialect = read_incoming_header(lambda size: read_some(file, size), out, known)
    log.debug(
        "header: %d columns in line %d (%s), %d fields in all; delimiter %r, encoding %s, line end %r",
        *(len(header.names), header.lines, ", ".join(header.names)[:500], header.width),
        *(dialect.delimiter, dialect.encoding, header.eol.decode("ascii")),
    )
    wanted = dict.fromkeys((config.key_column, *config.required_columns))
    missing = [name for name in wanted if name not in header.names]
    if missing:
        hint = f"the file has: {', '.join(header.names)[:300]}"
        if len(header.names) == 1:
            hint += f"; its delimiter was taken to be {dialect.delimiter!r}"
        raise Unmergeable(
            [Fault(f"the column {name!r} is missing", header.lines, name) for name in missing],
            f"add the column, or change key_column or required_columns; {hint}",
            kind=FaultKind.MISSING_COLUMN,
        )
    union = united(master, header, config.key_column, config.required_columns, out)
    if union.added and len(union.header(out)) > LONGEST_RECORD_BYTES:
        told = f"with its columns the header of the master is longer than {LONGEST_RECORD_BYTES >> 20} MiB"
        raise Malformed(told, header.lines, kind=FaultKind.LONG_RECORD)
    return _Reading(config.key_column, out, dialect, header, known, union, spool)


@dataclass(slots=True)
class _Reading:
    """The state of one pass over a file. `dialect` is the file's own, `out` that of the master.

    `width`: the number of fields of every row where all have more than the header, 0 before the first row.
    """

    key_column: str
    out: Dialect
    dialect: Dialect
    header: Header
    known: Sequence[str]
    union: ColumnUnion
    spool: IO[bytes]
    keys: Gathering = field(default_factory=Gathering)
    offsets: "array[int]" = field(default_factory=lambda: array("q", [0]))
    faults: list[Fault] = field(default_factory=list)
    first_kind: FaultKind | None = None
    records: list[bytes] = field(default_factory=list)
    more: int = 0
    counted: int = 0
    width: int = 0
    unended_bytes: int = 0

    def take_all(self, read: Callable[[int], bytes]) -> None:
        """Check and spool every row; no block outlives this. `read` begins at the header. Raises Malformed."""
        left = self.header.size_bytes
        while left > 0:  # read once more, so that it is in the digest
            left -= len(read(left)) or left
        bom, line = BOM if self.dialect.encoding == "utf-8" else b"", 1 + self.header.lines
        for block in blocks(read, self.dialect, line, longest_bytes=LONGEST_RECORD_BYTES, bom=bom):
            self._take(block)

    def _take(self, block: RecordBlock) -> None:
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
        column = self.key_column
        keys = block.cells(self.header.names.index(column), self.dialect)
        empty = block.rows[keys.lengths == 0].tolist()
        self._blame(block, FaultKind.EMPTY_KEY, [(at, f"the key {column!r} is empty", column) for at in empty])
        if BOM in block.data and self.dialect.encoding == "utf-8":
            marked = [at for place, at in enumerate(block.rows.tolist()) if BOM in keys.value(place)]
            self._blame(
                block, FaultKind.EMPTY_KEY, [(at, f"a byte order mark in the key {column!r}", column) for at in marked]
            )
        self.keys.add(keys)
        if not self.faults:
            self._spool(block)

    def _check_text(self, block: RecordBlock) -> None:
        """Every byte belongs to a character of the encoding, and none is NUL: what a half-written block leaves."""
        encoding, at = self.dialect.encoding, block.data.find(b"\0")
        if at < 0 and (at := block.first_invalid(encoding)) < 0:
            return
        byte = f"0x{block.data[at]:02X}"
        told = f"a NUL byte ({byte})" if byte == "0x00" else f"invalid {encoding.upper()} byte {byte}"
        fault = Fault(told, block.line_at(at), None, byte)
        hint = "save the file in that encoding, or set csv_encoding"
        raise Unmergeable([fault], hint, kind=FaultKind.ENCODING, rows=self.counted)

    def _without_header(self, block: RecordBlock) -> RecordBlock:
        """The block without the header of a file that was appended to another one. Raises Malformed for another header.

        Rows alone may follow the mark as well: then the part was saved without a header.
        """
        if not len(block.rows):
            return block
        position = int(block.rows[0])
        dialect, record = self.dialect, block.record(position)
        values = [dialect.unquoted(each).decode(dialect.encoding) for each in dialect.fields(record)]
        names = columns(values, self.known)
        if names == self.header.names:
            return block.without(np.array([position]))
        if {name for name in names if name} & set(self.header.names) or values[0].lower().startswith("sep="):
            told = "another file begins here, and its header is not that of the first line"
            raise Malformed(told, block.line_of(position), record[:LONGEST_VALUE], kind=FaultKind.SECOND_HEADER)
        return block

    def _without_empty_fields(self, block: RecordBlock) -> RecordBlock:
        """Without empty fields behind the last column: where the header has them too, or every row has them."""
        header = self.header
        named = len(header.names)
        if header.width == named and not self.width:
            self.width = int(block.widths[0])
        if header.width > named:
            return _without_surplus(block, self.dialect, named, range(named + 1, header.width + 1))
        if self.width <= named:
            return block
        short = block.rows[block.widths == named].tolist()
        told = f"{named} fields where the rows before have {self.width}"
        self._blame(block, FaultKind.RAGGED, [(at, told, None) for at in short])
        return _without_surplus(block, self.dialect, named, range(self.width, self.width + 1))

    def _blame(self, block: RecordBlock, kind: FaultKind, found: Sequence[tuple[int, str, str | None]]) -> None:
        """Remember bad rows, as many as fit."""
        room = MOST_FAULTS - len(self.faults)
        self.more += len(found[room:])
        for position, reason, column in found[:room]:
            record = block.record(position)
            self.first_kind = self.first_kind or kind
            self.faults.append(Fault(reason, block.line_of(position), column, "" if column else _shown(record)))
            self.records.append(record)

    def _spool(self, block: RecordBlock) -> None:
        """Write the rows in the columns of the new master: as they are where that is possible."""
        union, base = self.union, self.offsets[-1]
        eol, d = union.eol, self.out.delimiter.encode()
        translated = self.dialect.delimiter != self.out.delimiter
        as_is = union.order is None and len(block.rows) == len(block.ends) and not translated
        if as_is and bool((block.ends - block.stops == len(eol)).all()):
            self.spool.write(block.data)
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
        self.spool.write(eol.join([*parts, b""]))

    def check_faults(self) -> None:
        """Raises Unmergeable for the rows that were blamed, or when there are no rows."""
        if self.first_kind:
            delimiter = self.dialect.delimiter.encode()
            fields = [self.dialect.written(name.encode(self.dialect.encoding)) for name in self.header.names]
            raise Unmergeable(
                self.faults,
                "correct these rows and put the file into the inbox again; no row of it was merged",
                kind=self.first_kind,
                header=delimiter.join(fields) + (self.header.eol or b"\n"),
                records=self.records,
                more=self.more,
                rows=self.counted,
            )
        if not self.keys.rows:
            raise Unmergeable(
                [Fault("it has no rows")], "put a file with at least one row below the header", kind=FaultKind.NO_ROWS
            )


def _shown(record: bytes) -> str:
    return record[:LONGEST_VALUE].decode("utf-8", "backslashreplace")


def _without_blank_records(block: RecordBlock, dialect: Dialect) -> RecordBlock:
    """The block; records of nothing but delimiters, blanks and empty quotes are no rows of it."""
    soft = np.zeros(256, np.bool_)
    soft[[ord(dialect.delimiter), ord(" "), ord("\t"), ord('"')]] = True
    positions = block.rows
    # Most rows are told by their first byte; only what is soft at both ends and in the middle is looked at as a whole.
    for part in (0.0, 1.0, 0.5):
        starts, lasts = block.starts[positions], block.stops[positions] - 1
        places = starts + ((lasts - starts) * part).astype(np.int64)
        positions = positions[soft[block.array[places]]]
    blank = [at for at in positions.tolist() if dialect.blank(block.record(at))]
    return block.without(np.array(blank, np.int64)) if blank else block


def _without_surplus(block: RecordBlock, dialect: Dialect, width: int, allowed: Container[int]) -> RecordBlock:
    """Rows of an allowed number of fields cut to `width` fields, where all behind these are blank."""
    if block.is_even(width):
        return block
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
