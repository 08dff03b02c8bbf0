"""One incoming file, read once: checked, and its rows written to a spool in the columns of the new master."""

import hashlib
import logging
import os
from array import array
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

import numpy as np

from app.core.errors import Permanent
from app.csv_inbox.config import (
    EMPTY_KEY,
    ENCODING,
    LONG_RECORD,
    MISSING_COLUMN,
    NO_ROWS,
    RAGGED,
    SECOND_HEADER,
    TOO_LARGE,
    Fault,
    InboxConfig,
    Unmergeable,
    Unsteady,
)
from app.csv_inbox.csv_tokenizer import BOM, LONGEST_RECORD_BYTES, Block, Dialect, Malformed, Offsets, blocks, marked
from app.csv_inbox.discovery import Identity, identity_of, is_too_large, open_regular, read_some
from app.csv_inbox.header import Header, columns, read_incoming_header
from app.csv_inbox.key_index import Gathering, Keys
from app.csv_inbox.master_output import cut

# How the rows of a file and those of the master come to have the same columns: a pure decision.
#
# Invariant: the master's columns keep their order and new ones follow, so a row of the master changes only by fields
# that are put behind it; a row of the file is taken as it stands where its columns are already those.

ABSENT = -1


@dataclass(frozen=True, slots=True)
class Layout:
    """The columns of the result, before any is found to be obsolete.

    `order` gives for each column its place in the file (ABSENT: empty there), None when rows fit as they are.
    `doubtful` are places of columns that the file has not: obsolete if no row of the result has anything there.
    """

    names: tuple[str, ...]
    fields: tuple[bytes, ...]
    bom: bytes
    eol: bytes
    order: tuple[int, ...] | None
    doubtful: tuple[int, ...]
    added: tuple[str, ...]
    key: int

    def header(self, dialect: Dialect, dropped: Sequence[int] = ()) -> bytes:
        """The header line without the columns `dropped`."""
        fields = [field for place, field in enumerate(self.fields) if place not in dropped]
        return self.bom + dialect.delimiter.encode().join(fields) + self.eol

    def rendered(self, fields: Sequence[bytes]) -> list[bytes]:
        """The fields of one row of the file, as raw as they came, in the order of the result."""
        if self.order is None:
            return list(fields)
        return [b"" if place == ABSENT else fields[place] for place in self.order]


def united(master: Header | None, incoming: Header, key: str, required: Sequence[str], dialect: Dialect) -> Layout:
    """The layout of `incoming`, which has the key, merged into `master` (None: there is none yet)."""
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
    return Layout(
        names=names,
        fields=(*held.fields, *(fields[name] for name in added)),
        bom=dialect.bom if master is None else master.bom,
        eol=held.eol or incoming.eol or b"\n",
        order=None if order == tuple(range(len(incoming.names))) else order,
        doubtful=tuple(place for place, name in enumerate(held.names) if name not in kept),
        added=incoming.names if master is None else added,
        key=names.index(key),
    )


# What spreadsheets write around the rows: records in which every cell is empty, and delimiters behind the last
# column.
#
# Invariant: nothing that has a value is ever taken away, and lines keep their numbers.


def without_blank_records(block: Block, dialect: Dialect) -> Block:
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


def without_surplus(block: Block, dialect: Dialect, width: int, allowed: Container[int]) -> Block:
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
        for place, (first, last) in enumerate(zip(firsts.tolist(), lasts.tolist(), strict=True))
        if int(widths[wide[place]]) in allowed and (only_delimiters[place] or dialect.blank(block.data[first:last]))
    ]
    if not goes:
        return block
    stays_from, stays_to = np.append(0, lasts[goes]), np.append(firsts[goes], len(block.data))
    data = cut(block.data, stays_from, stays_to)
    marks = marked(data if data.endswith(b"\n") else data + b"\n", dialect)
    return replace(block, data=data, marks=marks)


# One incoming file, read once: checked, and its rows written to a spool in the layout of the result.
#
# Invariants: the file is read through one descriptor, once, so what was checked is what is merged, whatever happens
# to the name meanwhile; a file with any fault is Unmergeable as a whole, with every fault that was found, and no row
# of it goes any further; memory grows with the keys of the file and nothing else of it.

MOST_FAULTS = 1000
LONGEST_VALUE = 200
CORRECT = "correct the file and put it into the inbox again"
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
    layout: Layout
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
        for start, end in zip(first.tolist(), last.tolist(), strict=True):
            yield self.offsets[start], self.offsets[end + 1]


@dataclass(slots=True)
class _Reading:
    """The state of one pass over a file. `dialect` is the file's own, `out` that of the master.

    `width`: the number of fields of every row where all have more than the header, 0 before the first row.
    """

    config: InboxConfig
    out: Dialect
    dialect: Dialect
    header: Header
    known: Sequence[str]
    layout: Layout
    spool: IO[bytes]
    keys: Gathering = field(default_factory=Gathering)
    offsets: "array[int]" = field(default_factory=lambda: array("q", [0]))
    faults: list[Fault] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    records: list[bytes] = field(default_factory=list)
    more: int = 0
    counted: int = 0
    width: int = 0
    unended_bytes: int = 0


def read_incoming(
    path: Path, master: Header | None, config: InboxConfig, spool: Path, beat: Callable[[int], None]
) -> Incoming:
    """Check the file and spool its rows; `beat` is told of bytes read, and may raise to stop.

    Raises Unmergeable, Unsteady when it changed meanwhile, Stuck when it cannot be read now, Permanent when the master
    lacks the key column, and OSError.
    """
    with open_regular(path) as file:
        before = identity_of(os.fstat(file.fileno()))
        if is_too_large(before.size, config):
            told = f"{before.size} bytes, above max_file_size_mb={config.max_file_size_mb:g}"
            raise Unmergeable([Fault(told)], "split the file, or raise max_file_size_mb", kind=TOO_LARGE)
        digest = hashlib.md5(usedforsecurity=False)

        def read(size: int) -> bytes:
            piece = read_some(file, size)
            digest.update(piece)
            beat(len(piece))
            return piece

        reading = _read(file, read, master, config, spool)
        if identity_of(os.fstat(file.fileno())) != before:
            raise Unsteady(f"{path.name} changed while it was read", "no action needed; the next run looks again")
    _judge(reading)
    return Incoming(
        before,
        digest.hexdigest(),
        reading.header,
        reading.layout,
        spool,
        reading.keys.keys(),
        reading.offsets,
        reading.counted,
        reading.unended_bytes,
    )


def _read(
    file: IO[bytes], read: Callable[[int], bytes], master: Header | None, config: InboxConfig, spool: Path
) -> _Reading:
    out = Dialect(config.csv_delimiter, config.csv_encoding)
    known = (config.key_column, *config.required_columns, *(master.names if master else ()))
    reading = None
    with spool.open("xb") as rows:
        try:
            header, dialect = read_incoming_header(lambda size: read_some(file, size), out, known)
            log.debug(
                "header: %d columns in line %d (%s), %d fields in all; delimiter %r, encoding %s, line end %r",
                *(len(header.names), header.lines, ", ".join(header.names)[:500], header.width),
                *(dialect.delimiter, dialect.encoding, header.eol.decode("ascii")),
            )
            file.seek(0)
            _skip(read, header.size_bytes)
            _refuse_columns(header, dialect, config)
            layout = united(master, header, config.key_column, config.required_columns, out)
            _refuse_header(layout, out, header.lines)
            reading = _Reading(config, out, dialect, header, known, layout, rows)
            bom = BOM if dialect.encoding == "utf-8" else b""
            for block in blocks(read, dialect, 1 + header.lines, longest_bytes=LONGEST_RECORD_BYTES, bom=bom):
                _take(reading, block)
        except Malformed as error:
            raise Unmergeable(
                [Fault(error.message, error.line, None, _shown(error.record) if error.record else None)],
                CORRECT,
                kind=error.kind,
                rows=reading.counted if reading else 0,
            ) from error
    return reading


def _refuse_header(layout: Layout, out: Dialect, line: int) -> None:
    """Raises Malformed when the master, with the columns of the file, could have a header above the limit."""
    if layout.added and len(layout.header(out)) > LONGEST_RECORD_BYTES:
        told = f"with its columns the header of the master is longer than {LONGEST_RECORD_BYTES >> 20} MiB"
        raise Malformed(told, line, kind=LONG_RECORD)


def _skip(read: Callable[[int], bytes], size: int) -> None:
    """Read past the header, so that it is in the digest."""
    while size > 0:
        size -= len(read(size)) or size


def _refuse_columns(header: Header, dialect: Dialect, config: InboxConfig) -> None:
    wanted = dict.fromkeys((config.key_column, *config.required_columns))
    missing = [name for name in wanted if name not in header.names]
    if not missing:
        return
    hint = f"the file has: {', '.join(header.names)[:300]}"
    if len(header.names) == 1:
        hint += f"; its delimiter was taken to be {dialect.delimiter!r}"
    faults = [Fault(f"the column {name!r} is missing", header.lines, name) for name in missing]
    raise Unmergeable(faults, f"add the column, or change key_column or required_columns; {hint}", kind=MISSING_COLUMN)


def _take(reading: _Reading, block: Block) -> None:
    """Check one block and spool it."""
    _check_text(reading, block)
    reading.unended_bytes = 0 if block.data.endswith(b"\n") else len(block.data) - int(block.starts[-1])
    block = without_blank_records(block, reading.dialect)
    if block.begins:
        block = _without_header(reading, block)
    if not len(block.rows):
        return
    reading.counted += len(block.rows)
    block = _narrowed(reading, block)
    wanted = len(reading.header.names)
    uneven = [(at, f"{found} fields where the header has {wanted}", None) for at, found in block.uneven(wanted)]
    if uneven:
        _blame(reading, block, RAGGED, uneven)
        return
    column = reading.config.key_column
    keys = block.cells(reading.header.names.index(column), reading.dialect)
    empty = block.rows[keys.lengths == 0].tolist()
    _blame(reading, block, EMPTY_KEY, [(at, f"the key {column!r} is empty", column) for at in empty])
    if BOM in block.data and reading.dialect.encoding == "utf-8":
        marked = [at for place, at in enumerate(block.rows.tolist()) if BOM in keys.value(place)]
        _blame(reading, block, EMPTY_KEY, [(at, f"a byte order mark in the key {column!r}", column) for at in marked])
    reading.keys.add(keys)
    _spool(reading, block)


def _check_text(reading: _Reading, block: Block) -> None:
    """Every byte belongs to a character of the encoding, and none is NUL: what a half-written block leaves behind."""
    at = block.data.find(b"\0")
    if at < 0 and not block.data.isascii():
        try:
            block.data.decode(reading.dialect.encoding)
        except UnicodeDecodeError as error:
            at = error.start
    if at < 0:
        return
    byte = f"0x{block.data[at]:02X}"
    told = f"a NUL byte ({byte})" if byte == "0x00" else f"invalid {reading.dialect.encoding.upper()} byte {byte}"
    fault = Fault(told, block.line + block.data.count(b"\n", 0, at), None, byte)
    raise Unmergeable(
        [fault], "save the file in that encoding, or set csv_encoding", kind=ENCODING, rows=reading.counted
    )


def _without_header(reading: _Reading, block: Block) -> Block:
    """The block without the header of a file that was appended to another one. Raises Malformed for another header.

    Rows alone may follow the mark as well: then the part was saved without a header.
    """
    if not len(block.rows):
        return block
    position = int(block.rows[0])
    dialect, record = reading.dialect, block.record(position)
    values = [dialect.unquoted(each).decode(dialect.encoding) for each in dialect.fields(record)]
    names = columns(values, reading.known)
    if names == reading.header.names:
        return block.without(np.array([position]))
    if {name for name in names if name} & set(reading.header.names) or values[0].lower().startswith("sep="):
        told = "another file begins here, and its header is not that of the first line"
        raise Malformed(told, block.line_of(position), record[:LONGEST_VALUE], kind=SECOND_HEADER)
    return block


def _narrowed(reading: _Reading, block: Block) -> Block:
    """The block without empty fields behind the last column: where the header has them too, or every row has them."""
    header = reading.header
    named = len(header.names)
    if header.width == named and not reading.width:
        reading.width = int(block.widths[0])
    if header.width > named:
        return without_surplus(block, reading.dialect, named, range(named + 1, header.width + 1))
    if reading.width <= named:
        return block
    short = block.rows[block.widths == named].tolist()
    told = f"{named} fields where the rows before have {reading.width}"
    _blame(reading, block, RAGGED, [(at, told, None) for at in short])
    return without_surplus(block, reading.dialect, named, range(reading.width, reading.width + 1))


def _blame(reading: _Reading, block: Block, kind: str, found: Sequence[tuple[int, str, str | None]]) -> None:
    """Remember bad rows, as many as fit."""
    for number, (position, reason, column) in enumerate(found):
        if len(reading.faults) >= MOST_FAULTS:
            reading.more += len(found) - number
            return
        record = block.record(position)
        value = "" if column else _shown(record)
        reading.faults.append(Fault(reason, block.line_of(position), column, value))
        reading.kinds.append(kind)
        reading.records.append(record)


def _shown(record: bytes) -> str:
    return record[:LONGEST_VALUE].decode("utf-8", "backslashreplace")


def _spool(reading: _Reading, block: Block) -> None:
    """Write the rows in the layout of the result: as they are where that is possible."""
    if reading.faults:
        return
    layout, base = reading.layout, reading.offsets[-1]
    eol, d = layout.eol, reading.out.delimiter.encode()
    translated = reading.dialect.delimiter != reading.out.delimiter
    as_is = layout.order is None and len(block.rows) == len(block.ends) and not translated
    lengths = block.ends - block.stops
    if as_is and bool((lengths == len(eol)).all()):
        reading.spool.write(block.data)
        reading.offsets.frombytes((block.ends + base).tobytes())
        return
    parts = []
    for position in block.rows.tolist():
        record = block.record(position)
        if translated:
            values = [reading.dialect.unquoted(raw) for raw in reading.dialect.fields(record)]
            record = d.join(layout.rendered([reading.out.written(value) for value in values]))
        elif layout.order is not None:
            record = d.join(layout.rendered(reading.dialect.fields(record)))
        base += len(record) + len(eol)
        reading.offsets.append(base)
        parts.append(record)
    reading.spool.write(eol.join([*parts, b""]))


def _judge(reading: _Reading) -> None:
    if reading.faults:
        delimiter = reading.dialect.delimiter.encode()
        fields = [reading.dialect.written(name.encode(reading.dialect.encoding)) for name in reading.header.names]
        raise Unmergeable(
            reading.faults,
            "correct these rows and put the file into the inbox again; no row of it was merged",
            kind=reading.kinds[0],
            header=delimiter.join(fields) + (reading.header.eol or b"\n"),
            records=reading.records,
            more=reading.more,
            rows=reading.counted,
        )
    if not reading.keys.rows:
        raise Unmergeable([Fault("it has no rows")], "put a file with at least one row below the header", kind=NO_ROWS)
