"""The upsert: master and file in, the new master out, in one pass over the master or along its index.

Invariants: a row of the master whose key is not in the file is copied as bytes, in its place; both ways give the same
bytes; memory is bounded by one block and the file's keys. The master is read, never written; one that cannot be read
stops everything.
"""

import itertools
import os
from array import array
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np

from app.core.errors import Permanent, Transient
from app.core.files import keep_mode, sync_file
from app.csv_inbox import key_index
from app.csv_inbox.config import FaultKind, InboxConfig
from app.csv_inbox.csv_tokenizer import (
    MASTER_RECORD_BYTES,
    NONE,
    CellSlices,
    CsvDialect,
    MalformedCsv,
    Octets,
    Offsets,
    RecordBlock,
    blocks,
    cut,
    find_field_bounds,
)
from app.csv_inbox.discovery import MEBIBYTE, identity_of
from app.csv_inbox.incoming import ColumnUnion, CsvHeader, IncomingFile, read_header
from app.csv_inbox.key_index import BLANK, LENGTH, Hashes, IndexMismatch, IndexWriter, KeyIndex, Truths
from app.csv_inbox.quarantine import LoadRecord

READ_BYTES = 1 << 20
SCAN_BYTES = 1 << 21
CHUNK_BYTES = 1 << 23
DOUBT_BLOCKS = 4
JOIN_BYTES = 1 << 19
Beat = Callable[[int], None]


class MasterWriter:
    """The new master being written; what is kept stays as it was to the byte, in its order.

    `removed` and `indexing` are None where nobody wants them. `ranges`: offset and length, in the old master.
    """

    def __init__(self, file: IO[bytes], removed: IO[bytes] | None, indexing: IndexWriter | None, beat: Beat) -> None:
        self.file = file
        self.indexing = indexing
        self.kept_bytes = 0
        self.ranges = array("q")
        self._removed = removed
        self.beat = beat

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes, all of them: the system may take less at once, before it says that the disk is full."""
        rest = memoryview(data)
        while rest:
            rest = rest[self.file.write(rest) :]

    def keep(self, data: bytes | memoryview, first: Offsets, last: Offsets) -> None:
        """Append what lay in the old master, without the ranges from each of `first` to that of `last`."""
        self.kept_bytes += len(data) - int((last - first).sum())
        held, done = memoryview(data), 0
        if len(first):
            # Joined before they are written: the kernel takes many short pieces at half the speed of one long one.
            # As many at a time as end within some bytes: what is joined should stay in the processor's cache.
            edges = np.searchsorted(last, np.arange(JOIN_BYTES, int(last[-1]), JOIN_BYTES)).tolist()
            for low, high in itertools.pairwise([0, *edges, len(last)]):
                if low < high:
                    starts, ends = first[low:high].tolist(), last[low:high].tolist()
                    stays = zip([done, *ends[:-1]], starts, strict=True)
                    self.write(b"".join([held[start:end] for start, end in stays]))
                    done = ends[-1]
        self.write(held[done:])

    def note(self, removed: Callable[[], bytes], first: Offsets, last: Offsets) -> None:
        """Remember what was taken out of the old master, if anybody wants it, and which ranges of it that was."""
        if self._removed is not None and len(first):
            self._removed.write(removed())
            self.ranges.frombytes(np.stack((first, last - first), axis=1).astype(np.int64).tobytes())

    def finish(self) -> None:
        """Make the undo file durable: the ranges follow the removed bytes."""
        if self._removed is not None:
            self._removed.write(self.ranges.tobytes())
            self._removed.flush()
            sync_file(self._removed.fileno())


class MatchCounts:
    """Matches rows of the master with the file's keys, each row once, and counts inserted, replaced and unchanged.

    Each key of the file counts once, however often the master has it: as unchanged when its first row there comes again
    to the byte, else as replaced. `doubtful`: columns in which no row that stays had a value so far.
    """

    def __init__(self, incoming: IncomingFile, dialect: CsvDialect, spool: IO[bytes]) -> None:
        self.incoming = incoming
        self.union = incoming.union
        self.dialect = dialect
        self.padding = dialect.delimiter.encode() * len(incoming.union.added)
        self.spool = spool
        self.offsets: Offsets = np.frombuffer(incoming.offsets, np.int64)
        self.doubtful: list[int] = list(self.union.doubtful)
        self.kept = self.taken = self.unchanged = 0
        self._matched: Truths = np.zeros(incoming.rows, np.bool_)

    @property
    def matched(self) -> int:
        """How many keys of the file the master had."""
        return int(np.count_nonzero(self._matched))

    def find(self, cells: CellSlices, hashes: Hashes) -> tuple[Offsets, Offsets]:
        """The places of the keys that the file has, and its last row with each."""
        places = self.incoming.keys.candidates(hashes)
        if not len(places):
            return places, places
        rows = self.incoming.keys.last_rows(cells.taken(places), hashes[places])
        return places[rows >= 0], rows[rows >= 0]

    def count(self, rows: Offsets, block: RecordBlock, positions: Offsets) -> None:
        """Count records of the master that go, with the row of the file that has the key of each."""
        self.taken += len(rows)
        first = key_index.first_positions(rows)
        fresh = first[~self._matched[rows[first]]]
        self._matched[rows] = True
        starts, stops = block.starts[positions[fresh]], block.stops[positions[fresh]]
        there = self.offsets[rows[fresh]]
        lengths = self.offsets[rows[fresh] + 1] - there - len(self.union.eol)
        # Lengths first: most rows that changed differ in them, and nothing has to be read for these.
        alike = np.flatnonzero(lengths == stops - starts + len(self.padding))
        if len(alike):
            records = CellSlices(block.array, starts[alike], (stops - starts)[alike])
            self.unchanged += self._same(records, there[alike])

    def _same(self, records: CellSlices, starts: Offsets) -> int:
        """How many of the records the file has, padded, each where it starts; there is at least one."""
        held, places = self._spooled(starts, records.lengths + len(self.padding))
        alike = key_index.equal_pairs(records, CellSlices(held, places, records.lengths))
        if self.padding:
            sizes = np.full(len(places), len(self.padding))
            padding = CellSlices(np.frombuffer(self.padding, np.uint8), np.zeros(len(places), np.int64), sizes)
            alike &= key_index.equal_pairs(CellSlices(held, places + records.lengths, sizes), padding)
        return int(np.count_nonzero(alike))

    def _spooled(self, starts: Offsets, lengths: Offsets) -> tuple[Octets, Offsets]:
        """What the spool has there, and where in it each begins: all between them, unless that is too much."""
        base, end = int(starts.min()), int((starts + lengths).max())
        if end - base <= READ_BYTES:
            return np.frombuffer(os.pread(self.spool.fileno(), end - base, base), np.uint8), starts - base
        spans = zip(starts.tolist(), lengths.tolist(), strict=True)
        pieces = b"".join([os.pread(self.spool.fileno(), length, start) for start, length in spans])
        return np.frombuffer(pieces, np.uint8), np.cumsum(lengths) - lengths

    def doubt(self, block: RecordBlock, hits: Offsets) -> None:
        """A column with a value in any row that stays is not obsolete."""
        stays = np.ones(len(block.rows), np.bool_)
        stays[hits] = False
        self.doubtful = [
            place for place in self.doubtful if not bool((block.cells(place, self.dialect).lengths[stays] > 0).any())
        ]


@dataclass(frozen=True, slots=True)
class MergeResult:
    """A merge into temporary files: its record, the columns of the new master, and the old master if there was one."""

    load: LoadRecord
    columns: tuple[str, ...]
    before: os.stat_result | None


def master_header(path: Path, config: InboxConfig) -> CsvHeader | None:
    """The master's header; None when there is no master. Raises Permanent when it cannot be read."""
    try:
        with path.open("rb", buffering=0) as file:
            return read_header(file.read, CsvDialect(config.csv_delimiter, config.csv_encoding))
    except FileNotFoundError:
        return None
    except MalformedCsv as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: MalformedCsv) -> Permanent:
    where = f", line {error.line}" if error.line else ""
    return Permanent(
        f"the master {path.name} cannot be read{where}: {error.message}",
        "restore it from a backup or correct it; it was not changed, and files wait in the inbox until it can be read",
    )


def merge(
    master: Path | None,
    incoming: IncomingFile,
    config: InboxConfig,
    load: LoadRecord,
    *,
    out: Path,
    removed: Path | None,
    index: Path | None,
    new_index: Path | None,
    beat: Beat,
) -> MergeResult:
    """Write the result to `out` and, durably, what it takes to come back to `removed` (None: that is not kept).

    `index` is that of the master, if there is one; `new_index` is None where none is wanted. `beat` is told of bytes
    and may stop it. Raises Permanent, OSError, Transient when the master changed meanwhile, and IndexMismatch for an
    index that is another's: then nothing of what was written holds.
    """
    before = None
    with ExitStack() as files:
        # Rows that go are not kept where columns are added: the old master is kept whole then.
        rows = _created(files, removed, master) if removed is not None and not incoming.union.added else None
        indexing = IndexWriter(_created(files, new_index, master)) if new_index is not None else None
        output = MasterWriter(_created(files, out, master, buffering=0), rows, indexing, beat)
        spool = files.enter_context(incoming.spool.open("rb", buffering=0))
        counts = MatchCounts(incoming, CsvDialect(config.csv_delimiter, config.csv_encoding), spool)
        try:
            if master is None:
                output.write(counts.union.header(counts.dialect))
            else:
                old = files.enter_context(master.open("rb", buffering=0))
                fitting = key_index.open_matching_index(files, index, os.fstat(old.fileno()), config) if index else None
                before = _keep_rows(old, counts, output, fitting, config.merged_file.name)
        except MalformedCsv as error:
            raise _unreadable(config.merged_file, error) from error
        appended = _append(counts, output)
        output.finish()
        after = _complete(counts, output, config, out=out, new_index=new_index)
    union, dropped = counts.union, counts.doubtful
    # Where columns come or go every row changes: then the old master is kept whole instead of the rows.
    revert = "first" if before is None else "whole" if union.added or dropped else "rows"
    load = replace(
        load,
        inserted=appended - counts.matched,
        replaced=counts.matched - counts.unchanged,
        unchanged=counts.unchanged,
        columns_added=union.added,
        columns_removed=tuple(union.names[place] for place in dropped),
        rows_before=counts.kept + counts.taken,
        rows_after=counts.kept + appended,
        revert=revert if config.undo_keep else "",
        kept_bytes=output.kept_bytes if revert == "rows" else 0,
        ranges=len(output.ranges) // 2 if revert == "rows" else 0,
        size_bytes=after.st_size,
        mtime_ns=after.st_mtime_ns,
        mtime_before_ns=before.st_mtime_ns if before else 0,
    )
    return MergeResult(load, tuple(name for place, name in enumerate(union.names) if place not in dropped), before)


def _created(files: ExitStack, path: Path, master: Path | None, buffering: int = -1) -> IO[bytes]:
    file: IO[bytes] = files.enter_context(path.open("xb", buffering=buffering))
    if master is not None:
        keep_mode(master, file.fileno())
    return file


def _keep_rows(
    master: IO[bytes], counts: MatchCounts, out: MasterWriter, index: KeyIndex | None, name: str
) -> os.stat_result:
    """Write what stays of the master, along its index where that fits."""
    before = os.fstat(master.fileno())
    header = read_header(master.read, counts.dialect)
    fits = index is not None and not counts.padding and bool(header.eol)
    if index is not None and fits and _no_column_is_obsolete(master, header, counts):
        _IndexedMerge(master, header, counts, out).run(index)
    else:
        _full_scan(master, header, counts, out)
    # A program that takes no lock may have written in place: what was read is then no version of it.
    if identity_of(os.fstat(master.fileno())) != identity_of(before):
        told = f"the master {name} was written to while it was read"
        raise Transient(told, "no action needed; the next run merges into what it is then")
    return before


def _no_column_is_obsolete(master: IO[bytes], header: CsvHeader, counts: MatchCounts) -> bool:
    """Whether the first rows alone tell that. Nothing is counted."""
    if not counts.doubtful:
        return True
    master.seek(header.size_bytes)
    for number, block in enumerate(blocks(master.read, counts.dialect, 1 + header.lines)):
        _, hits, _ = _looked_up(block, header, counts)
        counts.doubt(block, hits)
        if not counts.doubtful or number == DOUBT_BLOCKS:
            break
    return not counts.doubtful


def _append(counts: MatchCounts, out: MasterWriter) -> int:
    """Write the file's rows; of rows with one key, the last. How many were written."""
    incoming, keys = counts.incoming, counts.incoming.keys
    # Where the file has a key more than once, its last row counts, in that row's place.
    rows = keys.kept_rows()
    for start, end in incoming.runs(rows):
        for at in range(start, end, MEBIBYTE):
            piece = os.pread(counts.spool.fileno(), min(end - at, MEBIBYTE), at)
            out.beat(len(piece))
            out.write(piece)
    if out.indexing is not None:
        lengths = counts.offsets[rows + 1] - counts.offsets[rows]
        out.indexing.add(key_index.entries_of(keys.by_row[rows], lengths))
    return len(rows)


def _complete(
    counts: MatchCounts, output: MasterWriter, config: InboxConfig, *, out: Path, new_index: Path | None
) -> os.stat_result:
    """The new master is on the disk, without its obsolete columns, and its index sealed."""
    if counts.doubtful:
        if new_index is not None:
            new_index.unlink()  # without the column every length is another one
        return _drop_columns(out, counts.union, counts.doubtful, counts.dialect, output.beat)
    sync_file(output.file.fileno())
    after = os.fstat(output.file.fileno())
    if output.indexing is not None:
        output.indexing.seal(after, config)
    return after


def _drop_columns(
    path: Path, union: ColumnUnion, dropped: Sequence[int], dialect: CsvDialect, beat: Beat
) -> os.stat_result:
    """Replace the file, durably, by itself without these columns; all else stays as it was to the byte."""
    second = path.with_name(f"{path.name}.2.tmp")
    d, keep = dialect.delimiter.encode(), [at for at in range(len(union.names)) if at not in frozenset(dropped)]
    with path.open("rb", buffering=0) as file, second.open("xb", buffering=0) as narrow:
        keep_mode(path, narrow.fileno())
        out = MasterWriter(narrow, None, None, beat)
        out.write(union.header(dialect, dropped))
        header = read_header(file.read, dialect)
        file.seek(header.size_bytes)
        for block in blocks(file.read, dialect, 1):
            beat(0)
            lines = []
            for position in block.rows.tolist():
                fields = dialect.fields(block.record(position))
                stop, end = int(block.stops[position]), int(block.ends[position])
                lines.append(d.join([fields[at] for at in keep]) + block.data[stop:end])
            out.write(b"".join(lines))
        sync_file(narrow.fileno())
        after = os.fstat(narrow.fileno())
    second.replace(path)
    return after


# The full scan: every record is found, every key looked up, every width checked. It needs nothing but the master, so it
# is what happens when no index fits.


def _full_scan(master: IO[bytes], header: CsvHeader, counts: MatchCounts, out: MasterWriter) -> None:
    """Write the header and every row that stays. Raises MalformedCsv, OSError and what `out.beat` raises."""
    master.seek(0)
    raw = master.read(header.size_bytes)
    out.write(counts.union.header(counts.dialect) if counts.padding or not header.eol else raw)
    out.kept_bytes = at = header.size_bytes
    for block in blocks(master.read, counts.dialect, 1 + header.lines, SCAN_BYTES):
        out.beat(len(block.data))
        hashes, hits, rows = _looked_up(block, header, counts)
        counts.kept += len(block.rows) - len(hits)
        if counts.doubtful:
            counts.doubt(block, hits)
        gone = block.rows[hits]
        if len(hits):
            counts.count(rows, block, gone)
        _write(block, at, gone, counts, out)
        if out.indexing is not None:
            _add_entries(out.indexing, block, gone, hashes, counts)
        at += len(block.data)


def _looked_up(block: RecordBlock, header: CsvHeader, counts: MatchCounts) -> tuple[Hashes, Offsets, Offsets]:
    """The hash of each row's key, the places of those that the file has, and its row for each."""
    encoding = counts.dialect.encoding
    if (at := block.first_invalid(encoding)) >= 0:
        told = f"invalid {encoding.upper()} byte 0x{block.data[at]:02X}"
        raise MalformedCsv(told, block.line_at(at), kind=FaultKind.ENCODING)
    block.check_width(len(header.names))
    cells = block.cells(counts.union.key, counts.dialect)
    hashes = key_index.hashed(cells)
    return hashes, *counts.find(cells, hashes)


def _write(block: RecordBlock, at: int, gone: Offsets, counts: MatchCounts, out: MasterWriter) -> None:
    """The block without the records that go, every other byte as it is but for fields put behind."""
    first, last = _ranges(block.starts[gone], block.ends[gone])
    data = block.data
    if counts.padding:
        size, stops = len(counts.padding), block.stops[block.rows]
        data = np.insert(block.array, np.repeat(stops, size), counts.padding[0]).tobytes()
        first, last = (place + size * np.searchsorted(stops, place, "right") for place in (first, last))
    out.keep(data, first, last)
    out.note(lambda: cut(data, first, last), first + at, last + at)
    last_goes = len(gone) and int(gone[-1]) == len(block.ends) - 1
    if not block.data.endswith(b"\n") and not last_goes:
        out.write(counts.union.eol)  # the last record of the master may lack its line end, and rows follow now


def _ranges(starts: Offsets, ends: Offsets) -> tuple[Offsets, Offsets]:
    """The bounds of what goes, records in their order; neighbours make one range."""
    apart = starts[1:] != ends[:-1]
    return np.concatenate((starts[:1], starts[1:][apart])), np.concatenate((ends[:-1][apart], ends[-1:]))


def _add_entries(indexing: IndexWriter, block: RecordBlock, gone: Offsets, hashes: Hashes, counts: MatchCounts) -> None:
    """Put the block's records that stay into the new index, as they are written."""
    lengths = block.ends - block.starts
    lengths[block.rows] += len(counts.padding)
    if not block.data.endswith(b"\n"):
        lengths[-1] += len(counts.union.eol)
    if len(hashes) < len(lengths):  # some records are not rows
        hashes, found = np.full(len(lengths), BLANK), hashes
        hashes[block.rows] = found
    entries = key_index.entries_of(hashes, lengths)
    indexing.add(np.delete(entries, gone) if len(gone) else entries)


# The indexed merge: only rows whose key may be in the file are read; all others are copied verbatim. Nothing follows
# from the index alone: each row that it points to must have the key and the length that it says.


class _IndexedMerge:
    """Where the pass is: all of the master before `_at` is done."""

    def __init__(self, master: IO[bytes], header: CsvHeader, counts: MatchCounts, out: MasterWriter) -> None:
        self._at = 0
        self._size = os.fstat(master.fileno()).st_size
        self._master = master
        self._width = len(header.names)
        self._counts = counts
        self._out = out
        self._header_bytes = header.size_bytes
        self._held = memoryview(bytearray(CHUNK_BYTES))

    def run(self, index: KeyIndex) -> None:
        """Write the header and every row that stays: all records that the index has, and nothing of the master may be
        left then. Raises IndexMismatch, as all that it calls does.
        """
        self._chunk(self._header_bytes, NONE, NONE.view(np.uint64))
        for entries in index.pieces():
            self._piece(entries)
        if self._at != self._size:
            raise IndexMismatch
        self._counts.kept = index.rows - self._counts.taken

    def _piece(self, entries: Hashes) -> None:
        ends = np.cumsum(key_index.lengths_in(entries))
        if self._at + int(ends[-1]) > self._size:
            raise IndexMismatch
        places = self._counts.incoming.keys.candidates(entries)
        # All records are read, some megabytes at a time or one that is longer.
        gone, first, done = [], 0, 0
        while first < len(entries):
            last = max(int(np.searchsorted(ends, done + CHUNK_BYTES, "right")), first + 1)
            low, high = np.searchsorted(places, (first, last)).tolist()
            asked = places[low:high]
            gone.append(asked[self._chunk(int(ends[last - 1]) - done, ends[asked] - done, entries[asked])])
            first, done = last, int(ends[last - 1])
        if self._out.indexing is not None:
            self._out.indexing.add(np.delete(entries, np.concatenate(gone)))

    def _chunk(self, size: int, stops: Offsets, asked: Hashes) -> Offsets:
        """Write that many bytes, but not those of these records that go; which these are."""
        data, lengths = self._read(size), key_index.lengths_in(asked)
        starts = stops - lengths
        raw = cut(data, starts, stops)
        hits = self._matches(raw, lengths, asked)
        first, last = _ranges(starts[hits], stops[hits])
        self._out.beat(size)
        self._out.keep(data, first, last)
        self._out.note(lambda: cut(data, first, last), first + self._at, last + self._at)
        self._at += size
        return hits

    def _read(self, size: int) -> memoryview:
        """The next bytes of the master, good until the next call."""
        if size > MASTER_RECORD_BYTES:
            raise IndexMismatch
        if size > len(self._held):
            self._held = memoryview(bytearray(size))
        data, done = self._held[:size], 0
        while done < size:
            count = os.preadv(self._master.fileno(), [data[done:]], self._at + done)
            if not count:
                raise IndexMismatch
            done += count
        return data

    def _matches(self, raw: bytes, lengths: Offsets, asked: Hashes) -> Offsets:
        """Which of these records have a key of the file; those are counted."""
        if not len(asked):
            return NONE
        try:
            block = RecordBlock(raw, find_field_bounds(raw, self._counts.dialect), 0)
            block.check_width(self._width)
        except MalformedCsv as error:
            raise IndexMismatch from error
        if len(block.rows) != len(asked) or not np.array_equal(block.ends, np.cumsum(lengths)):
            raise IndexMismatch
        cells = block.cells(self._counts.union.key, self._counts.dialect)
        hashes = key_index.hashed(cells)
        if ((hashes ^ asked) > LENGTH).any():
            raise IndexMismatch
        hits, rows = self._counts.find(cells, hashes)
        self._counts.count(rows, block, block.rows[hits])
        return hits
