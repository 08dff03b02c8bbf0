"""The upsert: merges an incoming file into the master, by a full scan of the master or along its key index.

Invariants: master rows whose key is not in the file are copied verbatim, in order; both ways produce the same bytes;
memory is bounded by one block and the file's keys. The master is only read, never written; an unreadable master stops
the run.
"""

import itertools
import os
from array import array
from collections.abc import Callable, Container, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from app.core.errors import Permanent, Transient
from app.core.files import keep_mode, sync_file
from app.csv_inbox import key_index
from app.csv_inbox.config import InboxConfig, UnmergeableFile
from app.csv_inbox.csv_tokenizer import (
    MASTER_RECORD_BYTES,
    NONE,
    CellSlices,
    CsvDialect,
    Octets,
    Offsets,
    RecordBlock,
    blocks,
    cut,
    find_field_bounds,
    pairs,
)
from app.csv_inbox.discovery import MEBIBYTE, FileIdentity, InboxPaths, identity_of
from app.csv_inbox.incoming import CsvHeader, IncomingFile, read_header
from app.csv_inbox.key_index import BLANK, LENGTH, Hashes, IndexMismatch, IndexWriter, KeyIndex, Truths
from app.csv_inbox.transaction import LoadRecord

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
        self.beat = beat
        self._removed = removed

    def write(self, data: bytes | memoryview) -> None:
        """Append all bytes: a single write may be short, for example just before the disk is full."""
        rest = memoryview(data)
        while rest:
            rest = rest[self.file.write(rest) :]

    def keep(self, data: bytes | memoryview, first: Offsets, last: Offsets, at: int) -> None:
        """Append `data`, which is at this offset of the old master, without the ranges from each `first` to its `last`.

        The ranges are saved, if an undo file is kept.
        """
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
        if self._removed is not None and len(first):
            self._removed.write(cut(data, first, last))
            self.ranges.frombytes(np.stack((first + at, last - first), axis=1).astype(np.int64).tobytes())


class MatchCounts:
    """Matches each master row with the file's keys, and counts matched and unchanged keys.

    Each key of the file counts once, however often the master has it: as unchanged if its first row there equals the
    new row byte for byte, else as replaced. `matched` says of each row of the file whether it replaces one of the
    master. `doubtful` are columns in which no kept row has had a value so far.
    """

    def __init__(self, incoming: IncomingFile, spool: IO[bytes]) -> None:
        self.incoming = incoming
        self.union = incoming.union
        self.dialect = incoming.out
        self.padding = self.dialect.delimiter.encode() * len(incoming.union.added)
        self.spool = spool
        self.offsets: Offsets = np.frombuffer(incoming.offsets, np.int64)
        self.doubtful: list[int] = list(self.union.doubtful)
        self.kept = self.taken = self.unchanged = 0
        self.matched: Truths = np.zeros(incoming.rows, np.bool_)

    def find(self, block: RecordBlock, width: int) -> tuple[Hashes, Offsets, Offsets]:
        """The key hash of each row, the positions of the rows whose key is in the file, and the file's row for each.

        Raises UnmergeableFile for invalid text and for a row that does not have `width` fields.
        """
        block.check_text(self.dialect.encoding)
        block.check_width(width)
        cells = block.cells(self.union.key, self.dialect)
        hashes = key_index.hashed(cells, self.incoming.keys.seed)
        places = self.incoming.keys.candidates(hashes)
        if not len(places):
            return hashes, places, places
        rows = self.incoming.keys.last_rows(cells.taken(places), hashes[places])
        return hashes, places[rows >= 0], rows[rows >= 0]

    def count(self, rows: Offsets, block: RecordBlock, positions: Offsets) -> None:
        """Count the master's records that are removed; `rows` are the file's rows that replace them."""
        self.taken += len(rows)
        first = key_index.first_positions(rows)
        fresh = first[~self.matched[rows[first]]]
        self.matched[rows] = True
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


class Master(NamedTuple):
    """The old master, opened before the incoming file is read, since its columns decide how that file's rows are
    written. `identity` shows whether another program writes to it or replaces it meanwhile.
    """

    file: IO[bytes]
    identity: FileIdentity
    header: CsvHeader


def open_master(files: ExitStack, path: Path, config: InboxConfig) -> Master | None:
    """The master; None if there is none. `files` closes it. Raises Permanent if its header cannot be parsed."""
    try:
        file = files.enter_context(path.open("rb", buffering=0))
        header = read_header(file.read, CsvDialect(config.csv_delimiter, config.csv_encoding))
    except FileNotFoundError:
        return None
    except UnmergeableFile as error:
        raise _unreadable(path, error) from error
    return Master(file, identity_of(os.fstat(file.fileno())), header)


def _unreadable(path: Path, error: UnmergeableFile) -> Permanent:
    return Permanent(
        f"the master {path.name} cannot be read, {error.message}",
        "restore it from a backup or correct it; it was not changed, and files wait in the inbox until it can be read",
    )


def merge(
    paths: InboxPaths,
    master: Master | None,
    incoming: IncomingFile,
    load: LoadRecord,
    *,
    index: Path | None,
    beat: Beat,
) -> tuple[LoadRecord, Sequence[str]]:
    """Write the new master, the undo data and the new index, if they are wanted, to temporary files of `paths`.

    Returns the finished record and the columns. All but the index are durable. `index` is the master's index, if it may
    be used. `beat` receives byte counts and may stop the merge. Raises Permanent, OSError, Transient if the master was
    written to, and IndexMismatch if the index does not match the master: then everything written is invalid.
    """
    config, union = paths.config, incoming.union
    with ExitStack() as files:

        def created(what: str, buffering: int = -1) -> IO[bytes]:
            file: IO[bytes] = files.enter_context(paths.temporary(load.load_id, what).open("xb", buffering))
            if master is not None:
                os.fchmod(file.fileno(), os.fstat(master.file.fileno()).st_mode & 0o7777)
            return file

        size_bytes = incoming.offsets[-1] + (master.identity.size if master else 0)
        is_indexed = size_bytes >= config.index_from_mb * MEBIBYTE and not incoming.keys.seed
        indexing = IndexWriter(created("index")) if is_indexed else None
        # If columns are added, undo keeps the whole old master instead of the removed rows.
        removed = created("removed") if config.undo_keep and not union.added else None
        out = MasterWriter(created("master", buffering=0), removed, indexing, beat)
        counts = MatchCounts(incoming, files.enter_context(incoming.spool.open("rb", buffering=0)))
        if master is None:
            out.write(union.header(counts.dialect))
        else:
            fitting = key_index.open_matching_index(files, index, master.identity, config) if index else None
            try:
                _keep_rows(master, counts, out, fitting)
            except UnmergeableFile as error:
                raise _unreadable(config.merged_file, error) from error
            # A program that does not take the lock may have written in place: then we read a mix of two versions.
            if identity_of(os.fstat(master.file.fileno())) != master.identity:
                told = f"the master {config.merged_file.name} was written to while it was read"
                raise Transient(told, "no action needed; the next run merges into what it is then")
        appended = _append(counts, out)
        if removed is not None:
            removed.write(out.ranges.tobytes())
            removed.flush()
            sync_file(removed.fileno())
        dropped = frozenset(counts.doubtful)
        if dropped:
            after = _drop_columns(paths.temporary(load.load_id, "master"), counts, dropped, beat)
            # Dropping a column changes every record's length.
            paths.temporary(load.load_id, "index").unlink(missing_ok=True)
        else:
            sync_file(out.file.fileno())
            after = identity_of(os.fstat(out.file.fileno()))
            if indexing is not None:
                indexing.seal(after, config)
    matched = int(np.count_nonzero(counts.matched))
    # If columns are added or dropped, every row changes: undo then keeps the whole old master instead of rows.
    revert = "first" if master is None else "whole" if union.added or dropped else "rows"
    load = replace(
        load,
        inserted=appended - matched,
        replaced=matched - counts.unchanged,
        unchanged=counts.unchanged,
        columns_added=union.added,
        columns_removed=tuple(union.names[place] for place in counts.doubtful),
        rows_before=counts.kept + counts.taken,
        rows_after=counts.kept + appended,
        revert=revert if config.undo_keep else "",
        kept_bytes=out.kept_bytes if revert == "rows" else 0,
        ranges=len(out.ranges) // 2 if revert == "rows" else 0,
        size_bytes=after.size,
        mtime_ns=after.mtime_ns,
        mtime_before_ns=master.identity.mtime_ns if master else 0,
    )
    return load, [name for place, name in enumerate(union.names) if place not in dropped]


def _keep_rows(master: Master, counts: MatchCounts, out: MasterWriter, index: KeyIndex | None) -> None:
    """Write the master's header and kept rows, along its index if possible."""
    fits = not counts.padding and bool(master.header.eol) and not counts.incoming.keys.seed
    if index is not None and fits and _no_column_is_obsolete(master, counts):
        _indexed_merge(master, index, counts, out)
    else:
        _full_scan(master, counts, out)


def _no_column_is_obsolete(master: Master, counts: MatchCounts) -> bool:
    """True if the first rows already prove it. Counts nothing."""
    if not counts.doubtful:
        return True
    master.file.seek(master.header.size_bytes)
    for number, block in enumerate(blocks(master.file.read, counts.dialect, 1 + master.header.line)):
        _, hits, _ = counts.find(block, len(master.header.names))
        counts.doubt(block, hits)
        if not counts.doubtful or number == DOUBT_BLOCKS:
            break
    return not counts.doubtful


def _append(counts: MatchCounts, out: MasterWriter) -> int:
    """Write the file's rows, only the last row of each key; returns the number written."""
    keys = counts.incoming.keys
    # If the file has a key more than once, the last row is kept, at its own position.
    rows = keys.kept_rows()
    first, last = _ranges(counts.offsets[rows], counts.offsets[rows + 1])
    for start, end in pairs(first, last):
        for at in range(start, end, MEBIBYTE):
            piece = os.pread(counts.spool.fileno(), min(end - at, MEBIBYTE), at)
            out.beat(len(piece))
            out.write(piece)
    if out.indexing is not None:
        lengths = counts.offsets[rows + 1] - counts.offsets[rows]
        out.indexing.add(key_index.entries_of(keys.by_row[rows], lengths))
    return len(rows)


def _drop_columns(path: Path, counts: MatchCounts, dropped: Container[int], beat: Beat) -> FileIdentity:
    """Rewrite the file durably without the doubtful columns; everything else is unchanged to the byte."""
    second, dialect = path.with_name(f"{path.name}.2.tmp"), counts.dialect
    d, keep = dialect.delimiter.encode(), [at for at in range(len(counts.union.names)) if at not in dropped]
    with path.open("rb", buffering=0) as file, second.open("xb", buffering=0) as narrow:
        keep_mode(path, narrow.fileno())
        out = MasterWriter(narrow, None, None, beat)
        out.write(counts.union.header(dialect, dropped))
        file.seek(read_header(file.read, dialect).size_bytes)
        for block in blocks(file.read, dialect, 1):
            beat(0)
            lines = []
            for position in block.rows.tolist():
                fields = dialect.fields(block.record(position))
                stop, end = int(block.stops[position]), int(block.ends[position])
                lines.append(d.join([fields[at] for at in keep]) + block.data[stop:end])
            out.write(b"".join(lines))
        sync_file(narrow.fileno())
        after = identity_of(os.fstat(narrow.fileno()))
    second.replace(path)
    return after


# The full scan parses every record, looks up every key and checks every width. It needs only the master, so it is the
# fallback when no index matches.


def _full_scan(master: Master, counts: MatchCounts, out: MasterWriter) -> None:
    """Write the header and every kept row. Raises UnmergeableFile, OSError and what `out.beat` raises."""
    header = master.header
    master.file.seek(0)
    raw = master.file.read(header.size_bytes)
    out.write(counts.union.header(counts.dialect) if counts.padding or not header.eol else raw)
    out.kept_bytes = at = header.size_bytes
    for block in blocks(master.file.read, counts.dialect, 1 + header.line, SCAN_BYTES):
        out.beat(len(block.data))
        hashes, hits, rows = counts.find(block, len(header.names))
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


def _write(block: RecordBlock, at: int, gone: Offsets, counts: MatchCounts, out: MasterWriter) -> None:
    """Write the block without the removed records; kept records change only by the padding for added columns."""
    first, last = _ranges(block.starts[gone], block.ends[gone])
    data = block.data
    if counts.padding:
        size, stops = len(counts.padding), block.stops[block.rows]
        data = np.insert(block.array, np.repeat(stops, size), counts.padding[0]).tobytes()
        first, last = (place + size * np.searchsorted(stops, place, "right") for place in (first, last))
    out.keep(data, first, last, at)
    last_goes = len(gone) and int(gone[-1]) == len(block.ends) - 1
    if not block.data.endswith(b"\n") and not last_goes:
        out.write(counts.union.eol)  # the master's last record may lack its line end, and rows follow now


def _ranges(starts: Offsets, ends: Offsets) -> tuple[Offsets, Offsets]:
    """The bounds of these records, ascending; adjacent ones are joined into one range."""
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


def _indexed_merge(master: Master, index: KeyIndex, counts: MatchCounts, out: MasterWriter) -> None:
    """Write the header and every kept row. Raises IndexMismatch, also where the index does not cover the master."""
    descriptor, end, header = master.file.fileno(), master.identity.size, master.header
    buffer = bytearray(CHUNK_BYTES)  # reused, so that the kernel has no new pages to clear
    out.write(os.pread(descriptor, header.size_bytes, 0))
    out.kept_bytes = at = header.size_bytes
    for entries in index.pieces():
        ends = at + np.cumsum(key_index.lengths_in(entries))
        if int(ends[-1]) > end:
            raise IndexMismatch
        places = counts.incoming.keys.candidates(entries)
        gone, done = [], 0
        while done < len(entries):
            # Up to CHUNK_BYTES at a time, or a single longer record.
            stop = max(int(np.searchsorted(ends, at + CHUNK_BYTES, "right")), done + 1)
            low, high = np.searchsorted(places, (done, stop)).tolist()
            asked = places[low:high]
            data = _read_exactly(descriptor, buffer, at, int(ends[stop - 1]) - at)
            lengths = key_index.lengths_in(entries[asked])
            starts = ends[asked] - at - lengths
            hits = _confirmed(cut(data, starts, starts + lengths), lengths, entries[asked], header, counts)
            gone.append(asked[hits])
            first, last = _ranges(starts[hits], (starts + lengths)[hits])
            out.beat(len(data))
            out.keep(data, first, last, at)
            done, at = stop, at + len(data)
        if out.indexing is not None:
            out.indexing.add(np.delete(entries, np.concatenate(gone)))
    if at != end:
        raise IndexMismatch
    counts.kept = index.rows - counts.taken


def _read_exactly(descriptor: int, buffer: bytearray, at: int, size: int) -> memoryview:
    """These bytes of the file, in the buffer if they fit. Raises IndexMismatch if it ends before them."""
    if size > MASTER_RECORD_BYTES:
        raise IndexMismatch
    data, done = memoryview(buffer if size <= len(buffer) else bytearray(size))[:size], 0
    while done < size:
        count = os.preadv(descriptor, [data[done:]], at + done)
        if not count:
            raise IndexMismatch
        done += count
    return data


def _confirmed(raw: bytes, lengths: Offsets, asked: Hashes, header: CsvHeader, counts: MatchCounts) -> Offsets:
    """Which of these records, that the index points to, have a key of the file; counts them."""
    if not len(asked):
        return NONE
    try:
        block = RecordBlock(raw, find_field_bounds(raw, counts.dialect), 0)
        hashes, hits, rows = counts.find(block, len(header.names))
    except UnmergeableFile as error:
        raise IndexMismatch from error
    if len(block.rows) != len(asked) or not np.array_equal(block.ends, np.cumsum(lengths)):
        raise IndexMismatch
    if ((hashes ^ asked) > LENGTH).any():
        raise IndexMismatch
    counts.count(rows, block, block.rows[hits])
    return hits
