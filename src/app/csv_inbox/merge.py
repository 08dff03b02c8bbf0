"""The upsert: merges an incoming file into the master, by a full scan of the master or along its key index.

Invariants: master rows whose key is not in the file are copied verbatim, in order; both ways produce the same bytes;
memory is bounded by one block and the file's keys. The master is only read, never written; an unreadable master stops
the run.
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
    """Writes the new master; kept rows are copied byte for byte, in order.

    `removed` and `indexing` are None if not wanted. `ranges` has the offset and length of removed ranges in the old
    master.
    """

    def __init__(self, file: IO[bytes], removed: IO[bytes] | None, indexing: IndexWriter | None, beat: Beat) -> None:
        self.file = file
        self.indexing = indexing
        self.kept_bytes = 0
        self.ranges = array("q")
        self._removed = removed
        self.beat = beat

    def write(self, data: bytes | memoryview) -> None:
        """Append all bytes: a single write may be short, for example just before the disk is full."""
        rest = memoryview(data)
        while rest:
            rest = rest[self.file.write(rest) :]

    def keep(self, data: bytes | memoryview, first: Offsets, last: Offsets) -> None:
        """Append `data` of the old master, without the ranges from each `first` to its `last`."""
        self.kept_bytes += len(data) - int((last - first).sum())
        held, done = memoryview(data), 0
        if len(first):
            # Join pieces before writing: many short writes run at half the speed of one long one. Join at most
            # JOIN_BYTES at a time, so that the joined data stays in the CPU cache.
            edges = np.searchsorted(last, np.arange(JOIN_BYTES, int(last[-1]), JOIN_BYTES)).tolist()
            for low, high in itertools.pairwise([0, *edges, len(last)]):
                if low < high:
                    starts, ends = first[low:high].tolist(), last[low:high].tolist()
                    stays = zip([done, *ends[:-1]], starts, strict=True)
                    self.write(b"".join([held[start:end] for start, end in stays]))
                    done = ends[-1]
        self.write(held[done:])

    def note(self, removed: Callable[[], bytes], first: Offsets, last: Offsets) -> None:
        """Save the removed bytes and their ranges in the old master, if an undo file is kept."""
        if self._removed is not None and len(first):
            self._removed.write(removed())
            self.ranges.frombytes(np.stack((first, last - first), axis=1).astype(np.int64).tobytes())

    def finish(self) -> None:
        """Append the ranges to the removed bytes, and make the undo file durable."""
        if self._removed is not None:
            self._removed.write(self.ranges.tobytes())
            self._removed.flush()
            sync_file(self._removed.fileno())


class MatchCounts:
    """Matches each master row with the file's keys, and counts matched and unchanged keys.

    Each key of the file counts once, however often the master has it: as unchanged if its first row there equals the
    new row byte for byte, else as replaced. `doubtful` are columns in which no kept row has had a value so far.
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
        """The number of the file's keys that the master has."""
        return int(np.count_nonzero(self._matched))

    def find(self, cells: CellSlices, hashes: Hashes) -> tuple[Offsets, Offsets]:
        """The positions of the cells whose key is in the file, and the file's last row for each."""
        places = self.incoming.keys.candidates(hashes)
        if not len(places):
            return places, places
        rows = self.incoming.keys.last_rows(cells.taken(places), hashes[places])
        return places[rows >= 0], rows[rows >= 0]

    def count(self, rows: Offsets, block: RecordBlock, positions: Offsets) -> None:
        """Count the master's records that are removed; `rows` are the file's rows that replace them."""
        self.taken += len(rows)
        first = key_index.first_positions(rows)
        fresh = first[~self._matched[rows[first]]]
        self._matched[rows] = True
        starts, stops = block.starts[positions[fresh]], block.stops[positions[fresh]]
        there = self.offsets[rows[fresh]]
        lengths = self.offsets[rows[fresh] + 1] - there - len(self.union.eol)
        # Compare lengths first: most changed rows differ in length, and then nothing has to be read.
        alike = np.flatnonzero(lengths == stops - starts + len(self.padding))
        if len(alike):
            records = CellSlices(block.array, starts[alike], (stops - starts)[alike])
            self.unchanged += self._same(records, there[alike])

    def _same(self, records: CellSlices, starts: Offsets) -> int:
        """How many records equal, with padding, the spooled record at its start. There is at least one record."""
        held, places = self._spooled(starts, records.lengths + len(self.padding))
        alike = key_index.equal_pairs(records, CellSlices(held, places, records.lengths))
        if self.padding:
            sizes = np.full(len(places), len(self.padding))
            padding = CellSlices(np.frombuffer(self.padding, np.uint8), np.zeros(len(places), np.int64), sizes)
            alike &= key_index.equal_pairs(CellSlices(held, places + records.lengths, sizes), padding)
        return int(np.count_nonzero(alike))

    def _spooled(self, starts: Offsets, lengths: Offsets) -> tuple[Octets, Offsets]:
        """The spooled records and their offsets in the result: one read of the whole span, unless it is too long."""
        base, end = int(starts.min()), int((starts + lengths).max())
        if end - base <= READ_BYTES:
            return np.frombuffer(os.pread(self.spool.fileno(), end - base, base), np.uint8), starts - base
        spans = zip(starts.tolist(), lengths.tolist(), strict=True)
        pieces = b"".join([os.pread(self.spool.fileno(), length, start) for start, length in spans])
        return np.frombuffer(pieces, np.uint8), np.cumsum(lengths) - lengths

    def doubt(self, block: RecordBlock, hits: Offsets) -> None:
        """Clear the doubt about columns in which a kept row has a value: they are not obsolete."""
        stays = np.ones(len(block.rows), np.bool_)
        stays[hits] = False
        self.doubtful = [
            place for place in self.doubtful if not bool((block.cells(place, self.dialect).lengths[stays] > 0).any())
        ]


@dataclass(frozen=True, slots=True)
class MergeResult:
    """A merge into temporary files: its record, the new master's columns, and the stat of the old master, if any."""

    load: LoadRecord
    columns: tuple[str, ...]
    before: os.stat_result | None


def master_header(path: Path, config: InboxConfig) -> CsvHeader | None:
    """The master's header; None if there is no master. Raises Permanent if it cannot be parsed."""
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
    """Write the new master to `out` and the undo data, durably, to `removed` (None: no undo data).

    `index` is the master's index, if any; `new_index` is None if none is wanted. `beat` receives byte counts and may
    stop the merge. Raises Permanent, OSError, Transient if the master changed during the merge, and IndexMismatch if
    the index does not match the master: then everything written is invalid.
    """
    before = None
    with ExitStack() as files:
        # If columns are added, undo keeps the whole old master instead of the removed rows.
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
    # If columns are added or dropped, every row changes: undo then keeps the whole old master instead of rows.
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
    """Write the master's kept rows, along its index if possible; returns the master's stat."""
    before = os.fstat(master.fileno())
    header = read_header(master.read, counts.dialect)
    fits = index is not None and not counts.padding and bool(header.eol)
    if index is not None and fits and _no_column_is_obsolete(master, header, counts):
        _IndexedMerge(master, header, counts, out).run(index)
    else:
        _full_scan(master, header, counts, out)
    # A program that does not take the lock may have written in place: then we read a mix of two versions.
    if identity_of(os.fstat(master.fileno())) != identity_of(before):
        told = f"the master {name} was written to while it was read"
        raise Transient(told, "no action needed; the next run merges into what it is then")
    return before


def _no_column_is_obsolete(master: IO[bytes], header: CsvHeader, counts: MatchCounts) -> bool:
    """True if the first rows already prove it. Counts nothing."""
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
    """Write the file's rows, only the last row of each key; returns the number written."""
    incoming, keys = counts.incoming, counts.incoming.keys
    # If the file has a key more than once, the last row is kept, at its own position.
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
    """Make the new master durable without obsolete columns, and seal its index; returns the new master's stat."""
    if counts.doubtful:
        if new_index is not None:
            new_index.unlink()  # dropping a column changes every record's length
        return _drop_columns(out, counts.union, counts.doubtful, counts.dialect, output.beat)
    sync_file(output.file.fileno())
    after = os.fstat(output.file.fileno())
    if output.indexing is not None:
        output.indexing.seal(after, config)
    return after


def _drop_columns(
    path: Path, union: ColumnUnion, dropped: Sequence[int], dialect: CsvDialect, beat: Beat
) -> os.stat_result:
    """Rewrite the file durably without these columns; everything else is unchanged to the byte."""
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


# The full scan parses every record, looks up every key and checks every width. It needs only the master, so it is the
# fallback when no index matches.


def _full_scan(master: IO[bytes], header: CsvHeader, counts: MatchCounts, out: MasterWriter) -> None:
    """Write the header and every kept row. Raises MalformedCsv, OSError and what `out.beat` raises."""
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
    """The key hash of each row, the positions of the rows whose key is in the file, and the file's row for each."""
    encoding = counts.dialect.encoding
    if (at := block.first_invalid(encoding)) >= 0:
        told = f"invalid {encoding.upper()} byte 0x{block.data[at]:02X}"
        raise MalformedCsv(told, block.line_at(at), kind=FaultKind.ENCODING)
    block.check_width(len(header.names))
    cells = block.cells(counts.union.key, counts.dialect)
    hashes = key_index.hashed(cells)
    return hashes, *counts.find(cells, hashes)


def _write(block: RecordBlock, at: int, gone: Offsets, counts: MatchCounts, out: MasterWriter) -> None:
    """Write the block without the removed records; kept records change only by the padding for added columns."""
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
        out.write(counts.union.eol)  # the master's last record may lack its line end, and rows follow now


def _ranges(starts: Offsets, ends: Offsets) -> tuple[Offsets, Offsets]:
    """The bounds of the removed ranges; adjacent records are joined into one range."""
    apart = starts[1:] != ends[:-1]
    return np.concatenate((starts[:1], starts[1:][apart])), np.concatenate((ends[:-1][apart], ends[-1:]))


def _add_entries(indexing: IndexWriter, block: RecordBlock, gone: Offsets, hashes: Hashes, counts: MatchCounts) -> None:
    """Add the block's kept records to the new index, with their lengths as written."""
    lengths = block.ends - block.starts
    lengths[block.rows] += len(counts.padding)
    if not block.data.endswith(b"\n"):
        lengths[-1] += len(counts.union.eol)
    if len(hashes) < len(lengths):  # some records are not rows
        hashes, found = np.full(len(lengths), BLANK), hashes
        hashes[block.rows] = found
    entries = key_index.entries_of(hashes, lengths)
    indexing.add(np.delete(entries, gone) if len(gone) else entries)


# The indexed merge parses only rows whose key may be in the file; all others are copied verbatim. The index alone is
# never trusted: each row that it points to must have the recorded key hash and length.


class _IndexedMerge:
    """One pass over the master along its index. Everything before `_at` is done."""

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
        """Write the header and every kept row. The index must cover the whole master.

        Raises IndexMismatch, as do the methods below.
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
        # Process up to CHUNK_BYTES at a time, or a single longer record.
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
        """Copy the next `size` bytes without matching records; returns which of `asked` matched."""
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
        """The next bytes of the master, valid until the next call."""
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
        """Which of these records have a key of the file; counts them."""
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
