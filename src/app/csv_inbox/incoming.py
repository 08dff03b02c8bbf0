"""One incoming file, read once: checked, and its rows written to a spool in the layout of the result.

Invariants: the file is read through one descriptor, once, so what was checked is what is merged, whatever happens to
the name meanwhile; a file with any fault is Unmergeable as a whole, with every fault that was found, and no row of it
goes any further; memory grows with the keys of the file and nothing else of it.
"""

import hashlib
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from app.csv_inbox.config import InboxConfig
from app.csv_inbox.dialect import Dialect, Malformed
from app.csv_inbox.faults import Fault, Unmergeable, Unsteady
from app.csv_inbox.header import Header, read_header
from app.csv_inbox.identity import Identity, identity_of, open_regular
from app.csv_inbox.keys import Gathering, Keys
from app.csv_inbox.layout import Layout, united
from app.csv_inbox.records import Block, Offsets, blocks

MOST_FAULTS = 1000
MEGABYTE = 1 << 20
LONGEST_VALUE = 200


@dataclass(frozen=True, slots=True)
class Incoming:
    """What was read. Record n of the spool is `[offsets[n], offsets[n + 1])`."""

    identity: Identity
    md5: str
    header: Header
    layout: Layout
    spool: Path
    keys: Keys
    offsets: "array[int]"

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
    """The state of one pass over a file."""

    config: InboxConfig
    dialect: Dialect
    header: Header
    layout: Layout
    spool: IO[bytes]
    keys: Gathering = field(default_factory=Gathering)
    offsets: "array[int]" = field(default_factory=lambda: array("q", [0]))
    faults: list[Fault] = field(default_factory=list)
    records: list[bytes] = field(default_factory=list)
    more: int = 0


def read_incoming(
    path: Path, master: Header | None, config: InboxConfig, spool: Path, beat: Callable[[int], None]
) -> Incoming:
    """Check the file and spool its rows; `beat` is told of bytes read, and may raise to stop.

    Raises Unmergeable, Unsteady when it changed meanwhile, Permanent when the master lacks the key column, and OSError.
    """
    with open_regular(path) as file:
        before = identity_of(os.fstat(file.fileno()))
        _refuse_size(before.size, config)
        digest = hashlib.md5(usedforsecurity=False)

        def read(size: int) -> bytes:
            piece = file.read(size)
            digest.update(piece)
            beat(len(piece))
            return piece

        reading = _read(file, read, master, config, spool)
        if identity_of(os.fstat(file.fileno())) != before:
            raise Unsteady(f"{path.name} changed while it was read", "nothing to do: the next run looks again")
    _judge(reading)
    return Incoming(
        before, digest.hexdigest(), reading.header, reading.layout, spool, reading.keys.keys(), reading.offsets
    )


def _refuse_size(size: int, config: InboxConfig) -> None:
    if size > config.max_file_size_mb * MEGABYTE:
        told = f"{size} bytes, above max_file_size_mb={config.max_file_size_mb:g}"
        raise Unmergeable([Fault(told)], "split the file, or raise max_file_size_mb")


def _read(
    file: IO[bytes], read: Callable[[int], bytes], master: Header | None, config: InboxConfig, spool: Path
) -> _Reading:
    dialect = Dialect(config.csv_delimiter, config.csv_encoding)
    with spool.open("xb") as out:
        try:
            header = read_header(file.read, dialect)
            file.seek(0)
            _skip(read, header.size_bytes)
            _refuse_columns(header, config)
            layout = united(master, header, config.key_column, config.required_columns, dialect)
            reading = _Reading(config, dialect, header, layout, out)
            for block in blocks(read, dialect, 1 + header.lines):
                _take(reading, block)
        except Malformed as error:
            raise Unmergeable(
                [Fault(error.message, error.line, None, _shown(error.record) if error.record else None)],
                "correct the file and put it into the inbox again",
            ) from error
    return reading


def _skip(read: Callable[[int], bytes], size: int) -> None:
    """Read past the header, so that it is in the digest."""
    while size > 0:
        size -= len(read(size)) or size


def _refuse_columns(header: Header, config: InboxConfig) -> None:
    wanted = dict.fromkeys((config.key_column, *config.required_columns))
    missing = [name for name in wanted if name not in header.names]
    if not missing:
        return
    hint = f"the file has: {', '.join(header.names)[:300]}"
    if len(header.names) == 1:
        hint += f"; csv_delimiter is {config.csv_delimiter!r}"
    raise Unmergeable([Fault(f"the column {name!r} is missing", 1, name) for name in missing], hint)


def _take(reading: _Reading, block: Block) -> None:
    """Check one block and spool it."""
    _check_text(reading, block)
    wanted = len(reading.header.names)
    uneven = [(at, f"{found} fields where the header has {wanted}", None) for at, found in block.uneven(wanted)]
    if uneven:
        _blame(reading, block, uneven)
        return
    column = reading.config.key_column
    keys = block.cells(reading.header.names.index(column), reading.dialect)
    empty = block.rows[keys.lengths == 0].tolist()
    _blame(reading, block, [(at, f"the key {column!r} is empty", column) for at in empty])
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
    line = block.line + block.data.count(b"\n", 0, at)
    told = f"the byte 0x{block.data[at]:02X} is no text in {reading.config.csv_encoding}"
    raise Unmergeable(
        [Fault(told, line, None, f"0x{block.data[at]:02X}")], "save the file in that encoding, or set csv_encoding"
    )


def _blame(reading: _Reading, block: Block, found: Sequence[tuple[int, str, str | None]]) -> None:
    """Remember bad rows, as many as fit."""
    for position, reason, column in found:
        if len(reading.faults) >= MOST_FAULTS:
            reading.more += len(found) - found.index((position, reason, column))
            return
        record = block.record(position)
        value = "" if column else _shown(record)
        reading.faults.append(Fault(reason, block.line_of(position), column, value))
        reading.records.append(record)


def _shown(record: bytes) -> str:
    return record[:LONGEST_VALUE].decode("utf-8", "backslashreplace")


def _spool(reading: _Reading, block: Block) -> None:
    """Write the rows in the layout of the result: as they are where that is possible."""
    if reading.faults:
        return
    layout, base = reading.layout, reading.offsets[-1]
    eol = layout.eol
    as_is = layout.order is None and len(block.rows) == len(block.ends)
    lengths = block.ends - block.stops
    if as_is and bool((lengths == len(eol)).all()):
        reading.spool.write(block.data)
        reading.offsets.frombytes((block.ends + base).tobytes())
        return
    parts = []
    d = reading.dialect.delimiter.encode()
    for position in block.rows.tolist():
        record = block.record(position)
        if layout.order is not None:
            record = d.join(layout.rendered(reading.dialect.fields(record)))
        base += len(record) + len(eol)
        reading.offsets.append(base)
        parts.append(record)
    reading.spool.write(eol.join([*parts, b""]))


def _judge(reading: _Reading) -> None:
    if reading.faults:
        delimiter = reading.dialect.delimiter.encode()
        header = delimiter.join(reading.header.fields) + (reading.header.eol or b"\n")
        hint = "correct these rows and put the file into the inbox again; no row of it was merged"
        raise Unmergeable(reading.faults, hint, header, reading.records, reading.more)
    if not reading.keys.rows:
        raise Unmergeable([Fault("it has no rows")], "put a file with at least one row below the header")
