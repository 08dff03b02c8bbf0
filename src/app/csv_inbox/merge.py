"""The upsert: master and file in, the new master out, in one pass over the master.

Invariants: a row of the master whose key is not in the file is copied as bytes, in its place; only the key is parsed,
and of the columns that may be obsolete as much as it takes to know; memory is bounded by one block and the file's keys.
The master is read, never written; one that cannot be read stops everything.
"""

import os
import zlib
from array import array
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from app.core.errors import Permanent
from app.core.files import keep_mode, sync_file
from app.csv_inbox.config import InboxConfig
from app.csv_inbox.incoming import Incoming
from app.csv_inbox.records import (
    BLOCK_BYTES,
    Block,
    Columns,
    Dialect,
    Header,
    Malformed,
    Offsets,
    blocks,
    filled,
    read_header,
)

COPY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Content:
    """What a file holds, for telling whether it is still that: its size and its CRC-32."""

    size_bytes: int
    crc32: int


@dataclass(frozen=True, slots=True)
class Removal:
    """How to come back from a merge: the ranges that were taken out of the old master, and how much of it was kept.

    None of this exists where the columns changed: then the old master itself is kept.
    """

    kept_bytes: int
    ranges: int


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge did, and how many rows there were. `removal` None: the old master has to be kept whole."""

    inserted: int
    replaced: int
    unchanged: int
    rows_before: int
    rows: int
    columns: tuple[str, ...]
    columns_added: tuple[str, ...]
    columns_removed: tuple[str, ...]
    content: Content
    removal: Removal | None


@dataclass(frozen=True, slots=True)
class Plan:
    """Where a merge writes. `removed` None: how to come back is not kept. `beat` is told of bytes and may stop it."""

    out: Path
    removed: Path | None
    beat: Callable[[int], None]


class Output:
    """A file being written whose content is known at the end."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._size = 0
        self._crc = 0

    def write(self, data: Any) -> None:
        """Append bytes, all of them: the system may take less at once, before it says that the disk is full."""
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]
        self._size += len(data)
        self._crc = zlib.crc32(data, self._crc)

    @property
    def content(self) -> Content:
        """What was written so far."""
        return Content(self._size, self._crc)


def content_of(path: Path) -> Content:
    """Read a file to its end. Raises OSError."""
    with path.open("rb", buffering=0) as file:
        size, crc = 0, 0
        while piece := file.read(COPY_BYTES):
            size, crc = size + len(piece), zlib.crc32(piece, crc)
    return Content(size, crc)


def master_header(path: Path, config: InboxConfig) -> Header | None:
    """The master's header; None when there is no master. Raises Permanent when it cannot be read."""
    dialect = Dialect(config.csv_delimiter, config.csv_encoding)
    try:
        with path.open("rb", buffering=0) as file:
            return read_header(file.read, dialect)
    except FileNotFoundError:
        return None
    except Malformed as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Malformed) -> Permanent:
    """The master cannot be read; nothing is done with it."""
    where = f", line {error.line}" if error.line else ""
    return Permanent(
        f"the master {path.name} cannot be read{where}: {error.message}",
        "restore it from a backup or correct it; it was not changed, and files wait in the inbox until it can be read",
    )


def merge(master: Path | None, incoming: Incoming, config: InboxConfig, plan: Plan) -> Merged:
    """Write the result to `plan.out` and, durably, what it takes to come back. Raises Permanent, OSError."""
    dialect = Dialect(config.csv_delimiter, config.csv_encoding)
    with plan.out.open("xb", buffering=0) as file, _removed(incoming, plan) as removed:
        work = _Merging(incoming, dialect, Output(file), plan, removed)
        try:
            if master is None:
                work.out.write(incoming.layout.header(dialect))
            else:
                keep_mode(master, file.fileno())
                work.pass_over(master)
        except Malformed as error:
            raise unreadable(config.merged_file, error) from error
        work.append()
        work.keep_ranges()
        if not work.doubtful:
            sync_file(file.fileno())
    return _told(work, master, _without(work, plan) if work.doubtful else work.out.content)


def _told(work: "_Merging", master: Path | None, content: Content) -> Merged:
    layout, dropped = work.layout, work.doubtful
    whole = bool(layout.added or dropped)
    return Merged(
        inserted=len(work.incoming.keys) - len(work.met),
        replaced=len(work.met) - work.unchanged,
        unchanged=work.unchanged,
        rows_before=work.kept + work.taken,
        rows=work.kept + len(work.incoming.keys),
        columns=tuple(name for place, name in enumerate(layout.names) if place not in dropped),
        columns_added=layout.added,
        columns_removed=tuple(layout.names[place] for place in dropped),
        content=content,
        removal=None if whole or master is None else Removal(work.kept_bytes, len(work.ranges) // 2),
    )


def _removed(incoming: Incoming, plan: Plan) -> AbstractContextManager[IO[bytes] | None]:
    """Where removed rows are kept; nowhere when the old master is to be kept whole."""
    return nullcontext() if plan.removed is None or incoming.layout.added else plan.removed.open("xb")


class _Merging:
    """The state of one pass."""

    def __init__(
        self, incoming: Incoming, dialect: Dialect, out: Output, plan: Plan, removed: IO[bytes] | None
    ) -> None:
        self.incoming = incoming
        self.layout = incoming.layout
        self.dialect = dialect
        self.out = out
        self.doubtful: list[int] = list(incoming.layout.doubtful)
        self.met: set[bytes] = set()
        self.kept = self.taken = self.unchanged = self.kept_bytes = 0
        self.ranges = array("q")
        self._plan = plan
        self._padding = b""
        self._at = 0
        self._removed = removed

    def pass_over(self, master: Path) -> None:
        """Write the header and every row that stays."""
        with master.open("rb", buffering=0) as file, self.incoming.spool.open("rb", buffering=0) as spool:
            header = read_header(file.read, self.dialect)
            self._padding = self.dialect.delimiter.encode() * len(self.layout.added)
            self._start(file, header)
            columns = Columns(self.dialect, len(header.names))
            for block in blocks(file.read, self.dialect, 1 + header.lines):
                self._plan.beat(len(block.data))
                _check_decodes(block, self.dialect)
                self._pass(block, columns, spool.fileno())

    def _start(self, file: IO[bytes], header: Header) -> None:
        file.seek(0)
        raw = file.read(header.size_bytes)
        if self.layout.added or not header.eol:
            raw = self.layout.header(self.dialect)
        self.out.write(raw)
        self._at = self.kept_bytes = header.size_bytes

    def _pass(self, block: Block, columns: Columns, spool: int) -> None:
        keys, *others = columns.of(block, [self.layout.key, *self.doubtful])
        values = keys.to_pylist()
        held = np.fromiter(map(self.incoming.keys.__contains__, values), np.bool_, len(values))
        hits = np.flatnonzero(held)
        self.kept += len(values) - len(hits)
        self.taken += len(hits)
        if self.doubtful:
            self._doubt(others, held)
        if len(hits):
            self._meet(block, hits, values, spool)
        self._write(block, block.rows[hits])
        self._at += len(block.data)

    def _doubt(self, others: Sequence[Any], held: npt.NDArray[np.bool_]) -> None:
        """A column with a value in any row that stays is not obsolete."""
        columns = zip(self.doubtful, others, strict=True)
        self.doubtful = [place for place, column in columns if not bool((filled(column) & ~held).any())]

    def _meet(self, block: Block, hits: Offsets, values: Sequence[bytes], spool: int) -> None:
        """Count what the file does to rows that are there: a row that comes again to the byte is unchanged."""
        eol = len(self.layout.eol)
        offsets = self.incoming.offsets
        for hit, position in zip(hits.tolist(), block.rows[hits].tolist(), strict=True):
            key = values[hit]
            row = self.incoming.keys[key]
            start, end = offsets[row], offsets[row + 1]
            if key not in self.met and end - start - eol == int(block.stops[position] - block.starts[position]) + len(
                self._padding
            ):
                same = os.pread(spool, end - start - eol, start) == block.record(position) + self._padding
                self.unchanged += same
            self.met.add(key)

    def _write(self, block: Block, removed: Offsets) -> None:
        """The block without the removed records, every other byte as it is but for fields put behind."""
        if not len(removed):
            self._put(block.data)
            self._end(block)
            return
        view = memoryview(block.data)
        # Neighbours make one range.
        breaks = np.flatnonzero(np.diff(removed) > 1)
        first = block.starts[removed[np.concatenate(([0], breaks + 1))]].tolist()
        last = block.ends[removed[np.concatenate((breaks, [len(removed) - 1]))]].tolist()
        parts = []
        at = 0
        for start, end in zip(first, last, strict=True):
            parts.append(view[at:start])
            at = end
            if self._removed is not None:
                self._removed.write(view[start:end])
                self.ranges.extend((self._at + start, end - start))
        parts.append(view[at:])
        self._put(b"".join(parts))
        if int(removed[-1]) != len(block.ends) - 1:
            self._end(block)

    def _put(self, data: bytes) -> None:
        self.kept_bytes += len(data)
        if self._padding and data:
            data = _padded(data, self._padding, self.dialect)
        self.out.write(data)

    def _end(self, block: Block) -> None:
        """The last record of the master may lack its line end, and rows follow now."""
        if not block.data.endswith(b"\n"):
            self.out.write(self.layout.eol)

    def append(self) -> None:
        """Write the file's rows; of rows with one key, the last."""
        with self.incoming.spool.open("rb", buffering=0) as spool:
            if not self.incoming.duplicates:
                while piece := spool.read(BLOCK_BYTES):
                    self._plan.beat(len(piece))
                    self.out.write(piece)
                return
            offsets = self.incoming.offsets
            for row in sorted(self.incoming.keys.values()):
                self.out.write(os.pread(spool.fileno(), offsets[row + 1] - offsets[row], offsets[row]))

    def keep_ranges(self) -> None:
        """Make what it takes to come back durable: the ranges follow the removed bytes."""
        if self._removed is not None:
            self._removed.write(self.ranges.tobytes())
            self._removed.flush()
            sync_file(self._removed.fileno())


def _check_decodes(block: Block, dialect: Dialect) -> None:
    if not block.data.isascii():
        try:
            block.data.decode(dialect.encoding)
        except UnicodeDecodeError as error:
            line = block.line + block.data.count(b"\n", 0, error.start)
            raise Malformed(
                f"the byte 0x{block.data[error.start]:02X} is no text in {dialect.encoding}", line
            ) from error


def _padded(data: bytes, padding: bytes, dialect: Dialect) -> bytes:
    """`padding` behind the last field of each record that is a row."""
    terminated = data if data.endswith(b"\n") else data + b"\n"
    block = Block(terminated, dialect.ends(terminated), 0)
    stops = np.repeat(block.stops[block.rows], len(padding))
    padded: bytes = np.insert(np.frombuffer(terminated, np.uint8), stops, padding[0]).tobytes()
    return padded if terminated is data else padded[:-1]


def _without(work: _Merging, plan: Plan) -> Content:
    """Write the result anew without the obsolete columns, in place of the first one."""
    dialect, layout, dropped = work.dialect, work.layout, frozenset(work.doubtful)
    first = plan.out
    second = first.with_name(f"{first.name}.2.tmp")
    d, keep = dialect.delimiter.encode(), [at for at in range(len(layout.names)) if at not in dropped]
    with first.open("rb", buffering=0) as file, second.open("xb", buffering=0) as narrow:
        keep_mode(first, narrow.fileno())
        out = Output(narrow)
        out.write(layout.header(dialect, work.doubtful))
        header = read_header(file.read, dialect)
        file.seek(header.size_bytes)
        for block in blocks(file.read, dialect, 1):
            plan.beat(0)
            lines = []
            for position in block.rows.tolist():
                fields = dialect.fields(block.record(position))
                stop, end = int(block.stops[position]), int(block.ends[position])
                lines.append(d.join([fields[at] for at in keep]) + block.data[stop:end])
            out.write(b"".join(lines))
        sync_file(narrow.fileno())
    second.replace(first)
    return out.content
