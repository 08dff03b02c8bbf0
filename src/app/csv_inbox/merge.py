"""The upsert: merges an incoming file into the master, by a full scan of the master or along its key index.

Invariants: master rows whose key is not in the file are copied verbatim, in order; both ways produce the same bytes;
memory is bounded by one block and the file's keys. The master is only read, never written; an unreadable master stops
the run.
"""

import itertools
import logging
import os
from array import array
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from app.core.errors import Permanent, Transient
from app.core.files import keep_mode, sync_file
from app.core.ledger import Tally, ledger_of
from app.core.runs import Report
from app.csv_inbox import key_index
from app.csv_inbox.config import FaultKind, FileStillChanging, InboxConfig, UnmergeableFile
from app.csv_inbox.csv_tokenizer import (
    MASTER_RECORD_BYTES,
    NONE,
    CellSlices,
    CsvDialect,
    Offsets,
    RecordBlock,
    blocks,
    cut,
    find_field_bounds,
    malformed,
    pairs,
)
from app.csv_inbox.discovery import (
    MEBIBYTE,
    UNIT,
    Candidate,
    FileIdentity,
    InboxPaths,
    InboxRun,
    identity_of,
    link_or_copy,
)
from app.csv_inbox.incoming import CsvHeader, IncomingFile, read_header
from app.csv_inbox.key_index import BLANK, LENGTH, Hashes, IndexMismatch, IndexWriter, KeyIndex, Truths
from app.csv_inbox.transaction import LoadRecord

READ_BYTES = 1 << 20
SCAN_BYTES = 1 << 21
CHUNK_BYTES = 1 << 23
DOUBT_BLOCKS = 4
JOIN_BYTES = 1 << 19
"""Kept pieces are joined up to this size, which the CPU cache holds: many short writes take twice as long."""
KEPT_BYTES = 1 << 23
Beat = Callable[[int], None]
log = logging.getLogger(__name__)


class MergedFile(NamedTuple):
    """A merge that lies in temporary files: its record, the new columns, and the old master's identity, if any."""

    load: LoadRecord
    columns: Sequence[str]
    master: FileIdentity | None
    report: Report


def read_and_merge(inbox: InboxRun, each: Candidate, load: LoadRecord) -> MergedFile:
    """Check, spool and merge one file into temporary files; the master and its index need not exist."""
    # glibc returns memory to the kernel once the idle part exceeds twice the largest block ever freed; the kernel then
    # has to clear each page again, a hundred pages per megabyte merged. Freeing one large, untouched block raises that
    # limit, so memory is reused from block to block. The daemon sets its own limits.
    bytearray(KEPT_BYTES)
    paths, config = inbox.paths, inbox.config
    with ExitStack() as files:
        old = open_master(files, config)
        beat = inbox.beat(old.identity.size if old else 0)
        spool = paths.temporary(load.load_id, "rows")
        incoming = IncomingFile(old.header if old else None, config, spool)
        incoming.read(each.path, beat)
        if each.md5 not in ("", incoming.md5):
            raise FileStillChanging("it changed under its name")
        log.debug(
            "%s: MD5 %s, %d rows in %d bytes, %d distinct keys; master %s",
            *(load.file, "unchanged" if each.md5 else "read once"),
            *(incoming.counted, incoming.identity.size, incoming.keys.count),
            f"with {len(old.header.names)} columns" if old else "not there yet",
        )
        load = replace(
            load,
            rows=incoming.rows,
            duplicates=incoming.rows - incoming.keys.count,
            source=incoming.identity,
            source_md5=incoming.md5,
            rows_at=incoming.header.size_bytes,
            unended_bytes=incoming.unended_bytes,
        )
        try:
            load, columns = merge(paths, old, incoming, load, index=paths.index, beat=beat)
        except IndexMismatch:
            for what in ("master", "removed", "index"):
                paths.temporary(load.load_id, what).unlink(missing_ok=True)
            load, columns = merge(paths, old, incoming, load, index=None, beat=beat)
    tally = Tally(
        counted=incoming.counted,
        read=incoming.rows,
        new=load.inserted,
        already_there=load.unchanged,
        # A row replaced by a later row of the same file counts as corrected.
        corrected=load.replaced + load.duplicates,
    )
    ledger = ledger_of(tally, unit=UNIT).of_partition(load.file)
    report = Report(rows=incoming.rows, bytes=incoming.identity.size, ledger=ledger)
    return MergedFile(load, columns, old.identity if old else None, report)


class Master(NamedTuple):
    """The old master, opened before the incoming file is read, since its columns decide how that file's rows are
    written. `identity` shows whether another program writes to it or replaces it meanwhile.
    """

    file: FileIO
    identity: FileIdentity
    header: CsvHeader


def open_master(files: ExitStack, config: InboxConfig) -> Master | None:
    """The master; None if there is none. `files` closes it. Raises Permanent if its header cannot be parsed."""
    try:
        file = files.enter_context(config.merged_file.open("rb", buffering=0))
        header = read_header(file.read, CsvDialect(config.csv_delimiter, config.csv_encoding))
    except FileNotFoundError:
        return None
    except UnmergeableFile as error:
        raise _unreadable(config.merged_file, error) from error
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
            keep_mode(config.merged_file, file.fileno())
            return file

        size_bytes = incoming.offsets[-1] + (master.identity.size if master else 0)
        is_indexed = size_bytes >= config.index_from_mb * MEBIBYTE and not incoming.keys.seed
        upsert = Upsert(
            incoming,
            files.enter_context(incoming.spool.open("rb", buffering=0)),
            out=created("master", JOIN_BYTES),
            # If columns are added, undo keeps the whole old master instead of the removed rows.
            removed=created("removed") if config.undo_keep and not union.added else None,
            indexing=IndexWriter(created("index")) if is_indexed else None,
            beat=beat,
        )
        if master is None:
            upsert.out.write(union.header(upsert.dialect))
        else:
            fitting = key_index.open_matching_index(files, index, master.identity, config) if index else None
            try:
                upsert.keep_rows(master, fitting)
            except UnmergeableFile as error:
                raise _unreadable(config.merged_file, error) from error
            # A program that does not take the lock may have written in place: then we read a mix of two versions.
            if identity_of(os.fstat(master.file.fileno())) != master.identity:
                told = f"the master {config.merged_file.name} was written to while it was read"
                raise Transient(told, "no action needed; the next run merges into what it is then")
        dropped, after = upsert.finish(paths.temporary(load.load_id, "master"), config)
    if dropped:  # every record has another length then
        paths.temporary(load.load_id, "index").unlink(missing_ok=True)
    # If columns are added or dropped, every row changes: undo then keeps the whole old master instead of rows.
    revert = "first" if master is None else "whole" if union.added or dropped else "rows"
    if config.undo_keep and revert != "rows":
        undo_file = paths.temporary(load.load_id, "removed")
        undo_file.unlink(missing_ok=True)
        if master:
            link_or_copy(config.merged_file, undo_file)
        else:
            undo_file.touch()
    matched, ranges = int(np.count_nonzero(upsert.matched)), upsert.ranges if revert == "rows" else array("q")
    load = replace(
        load,
        inserted=upsert.appended - matched,
        replaced=matched - upsert.unchanged,
        unchanged=upsert.unchanged,
        columns_added=union.added,
        columns_removed=tuple(union.names[place] for place in sorted(dropped)),
        rows_before=upsert.kept + upsert.taken,
        rows_after=upsert.kept + upsert.appended,
        revert=revert if config.undo_keep else "",
        kept_bytes=master.identity.size - sum(ranges[1::2]) if master and revert == "rows" else 0,
        ranges=len(ranges) // 2,
        size_bytes=after.size,
        mtime_ns=after.mtime_ns,
        mtime_before_ns=master.identity.mtime_ns if master else 0,
    )
    return load, [name for place, name in enumerate(union.names) if place not in dropped]


class Upsert:
    """Writes the new master to `out`: kept rows of the old one, byte for byte and in order, then the file's rows.

    `removed` takes the rows that go, and then their `ranges` in the old master, offset and length; `indexing` takes the
    new index. Both are None if not wanted.

    Each key of the file counts once, however often the master has it: as unchanged if its first row there equals the
    new row byte for byte, else as replaced. `matched` says of each row of the file whether it replaces one of the
    master. `doubtful` are columns in which no kept row has had a value so far.
    """

    def __init__(
        self,
        incoming: IncomingFile,
        spool: IO[bytes],
        *,
        out: IO[bytes],
        removed: IO[bytes] | None,
        indexing: IndexWriter | None,
        beat: Beat,
    ) -> None:
        self.out, self.removed, self.indexing, self.beat, self.spool = out, removed, indexing, beat, spool
        self.keys, self.union, self.dialect = incoming.keys, incoming.union, incoming.out
        self.padding = self.dialect.delimiter.encode() * len(self.union.added)
        self.offsets: Offsets = np.frombuffer(incoming.offsets, np.int64)
        self.matched: Truths = np.zeros(incoming.rows, np.bool_)
        self.doubtful: Sequence[int] = self.union.doubtful
        self.kept = self.taken = self.unchanged = self.appended = 0
        self.ranges = array("q")

    def keep_rows(self, master: Master, index: KeyIndex | None) -> None:
        """Write the master's header and kept rows, along its index if possible.

        Raises UnmergeableFile for an invalid master, IndexMismatch, OSError and what `beat` raises.
        """
        header = master.header
        fits = index and not self.padding and header.eol and not self.keys.seed
        is_usable = fits and self._no_column_is_obsolete(master)
        master.file.seek(0)
        raw = master.file.read(header.size_bytes)  # with what lies before the header: undo expects it there
        eol = b"" if header.eol else self.union.eol
        self.out.write(self.union.header(self.dialect) if self.padding else raw + eol)
        if index and is_usable:
            self._keep_indexed(master, index)
        else:
            self._keep_scanned(master)

    def finish(self, path: Path, config: InboxConfig) -> tuple[frozenset[int], FileIdentity]:
        """Append the file's rows, only the last row of each key; make everything but the index durable.

        Returns the columns that were dropped, and the identity of the new master, which lies at `path`.
        """
        # If the file has a key more than once, the last row is kept, at its own position.
        rows = self.keys.kept_rows
        self.appended = len(rows)
        for start, end in pairs(*_ranges(self.offsets[rows], self.offsets[rows + 1])):
            for at in range(start, end, MEBIBYTE):
                piece = os.pread(self.spool.fileno(), min(end - at, MEBIBYTE), at)
                self.beat(len(piece))
                self.out.write(piece)
        self.out.flush()
        if self.removed is not None:
            self.removed.write(self.ranges.tobytes())
            self.removed.flush()
            sync_file(self.removed.fileno())
        if dropped := frozenset(self.doubtful):
            return dropped, self._drop_columns(path, dropped)
        sync_file(self.out.fileno())
        after = identity_of(os.fstat(self.out.fileno()))
        if self.indexing is not None:
            lengths = self.offsets[rows + 1] - self.offsets[rows]
            self.indexing.add(key_index.entries_of(self.keys.kept_hashes, lengths))
            self.indexing.seal(after, config)
        return dropped, after

    def _drop_columns(self, path: Path, dropped: Container[int]) -> FileIdentity:
        """Rewrite the file durably without these columns; everything else is unchanged to the byte."""
        second, dialect = path.with_name(f"{path.name}.2.tmp"), self.dialect
        d, keep = dialect.delimiter.encode(), [at for at in range(len(self.union.names)) if at not in dropped]
        with path.open("rb", buffering=0) as file, second.open("xb", JOIN_BYTES) as narrow:
            keep_mode(path, narrow.fileno())
            narrow.write(self.union.header(dialect, dropped))
            file.seek(read_header(file.read, dialect).size_bytes)
            for block in blocks(file.read, dialect, 1):
                self.beat(0)
                for position in block.rows.tolist():
                    fields = dialect.fields(block.record(position))
                    stop, end = int(block.stops[position]), int(block.ends[position])
                    narrow.write(d.join([fields[at] for at in keep]) + block.data[stop:end])
            narrow.flush()
            sync_file(narrow.fileno())
            after = identity_of(os.fstat(narrow.fileno()))
        second.replace(path)
        return after

    def _find(self, block: RecordBlock, width: int) -> tuple[Hashes, Offsets, Offsets]:
        """The key hash of each row, the positions of the rows whose key is in the file, and the file's row for each.

        Raises UnmergeableFile for invalid text and for a row that does not have `width` fields.
        """
        block.check_text(self.dialect.encoding)
        for place in np.flatnonzero(block.widths != width)[:1].tolist():
            position, told = int(block.rows[place]), f"{block.widths[place]} fields where the header has {width}"
            raise malformed(FaultKind.RAGGED, told, block.line_of(position), block.record(position))
        cells = block.cells(self.union.key, self.dialect)
        hashes = key_index.hashed(cells, self.keys.seed)
        return hashes, *self.keys.find(cells, hashes)

    def _count(self, rows: Offsets, block: RecordBlock, gone: Offsets) -> None:
        """Count the master's records that are removed; `rows` are the file's rows that replace them."""
        self.taken += len(rows)
        first = key_index.first_positions(rows)
        fresh = first[~self.matched[rows[first]]]
        self.matched[rows] = True
        starts, stops = block.starts[gone[fresh]], block.stops[gone[fresh]]
        there = self.offsets[rows[fresh]]
        lengths = self.offsets[rows[fresh] + 1] - there - len(self.union.eol)
        # Compare lengths first: most changed rows differ in length, and then nothing has to be read.
        alike = np.flatnonzero(lengths == stops - starts + len(self.padding))
        parts = np.flatnonzero(np.diff(np.cumsum(lengths[alike]) // READ_BYTES)) + 1  # padded rows may be far longer
        for part in np.split(alike, parts) if len(alike) else ():
            old = CellSlices(block.array, starts[part], lengths[part])
            if self.padding:
                rows_before = pairs(starts[part], stops[part])
                old = CellSlices.of([block.data[start:stop] + self.padding for start, stop in rows_before])
            same = key_index.equal_pairs(old, self._spooled(there[part], lengths[part]))
            self.unchanged += int(np.count_nonzero(same))

    def _spooled(self, starts: Offsets, lengths: Offsets) -> CellSlices:
        """These spooled records: one read of the whole span, unless it is too long."""
        descriptor, base, end = self.spool.fileno(), int(starts.min()), int((starts + lengths).max())
        if end - base <= READ_BYTES:
            return CellSlices(np.frombuffer(os.pread(descriptor, end - base, base), np.uint8), starts - base, lengths)
        return CellSlices.of([os.pread(descriptor, length, start) for start, length in pairs(starts, lengths)])

    def _doubt(self, block: RecordBlock, places: Offsets) -> None:
        """Clear the doubt about columns in which a row other than these has a value: they are not obsolete."""
        stays = np.delete(np.arange(len(block.rows)), places)
        lengths = ((place, block.cells(place, self.dialect).lengths) for place in self.doubtful)
        self.doubtful = [place for place, sizes in lengths if not sizes[stays].any()]

    def _no_column_is_obsolete(self, master: Master) -> bool:
        """True if the first rows already prove it. Counts nothing."""
        master.file.seek(master.header.size_bytes)
        found = blocks(master.file.read, self.dialect, 1 + master.header.line) if self.doubtful else ()
        for block in itertools.islice(found, DOUBT_BLOCKS):
            self._doubt(block, self._find(block, len(master.header.names))[1])
            if not self.doubtful:
                break
        return not self.doubtful

    def _keep(
        self, data: bytes | memoryview, at: int, starts: Offsets, ends: Offsets, *, stops: Offsets = NONE
    ) -> None:
        """Write `data`, which is at this offset of the master, without the records from each start to its end.

        These are kept for undo. The others change only by the padding for added columns, which goes to `stops`.
        """
        first, last = _ranges(starts, ends)
        if self.removed is not None:
            self.removed.write(cut(data, first, last))
            self.ranges.frombytes(np.stack((first + at, last - first), axis=1).astype(np.int64).tobytes())
        held = memoryview(data)
        stays = zip([0, *last.tolist()], [*first.tolist(), len(held)], strict=True)
        if self.padding:
            self.out.writelines(self._padded(held, stops, stays))
        else:
            self.out.writelines(held[start:end] for start, end in stays)

    def _padded(
        self, held: memoryview, stops: Offsets, stays: Iterable[tuple[int, int]]
    ) -> Iterator[bytes | memoryview]:
        """The ranges that stay, with the padding at each row's stop; in pieces, since a row may grow a thousandfold."""
        for start, end in stays:
            at = start
            for stop in stops[slice(*np.searchsorted(stops, (start, end), "right"))].tolist():
                yield held[at:stop]
                yield self.padding
                at = stop
            yield held[at:end]

    # The full scan parses every record, looks up every key and checks every width. It needs only the master, so it is
    # the fallback when no index matches.

    def _keep_scanned(self, master: Master) -> None:
        header = master.header
        at = header.size_bytes
        for block in blocks(master.file.read, self.dialect, 1 + header.line, SCAN_BYTES):
            self.beat(len(block.data))
            hashes, places, rows = self._find(block, len(header.names))
            self.kept += len(block.rows) - len(places)
            if self.doubtful:
                self._doubt(block, places)
            gone = block.rows[places]
            if len(gone):
                self._count(rows, block, gone)
            self._keep(block.data, at, block.starts[gone], block.ends[gone], stops=block.stops[block.rows])
            last_goes = len(gone) and int(gone[-1]) == len(block.ends) - 1
            if not block.data.endswith(b"\n") and not last_goes:
                self.out.write(self.union.eol)  # the master's last record may lack its line end, and rows follow now
            if self.indexing is not None:
                self._add_entries(self.indexing, block, gone, hashes)
            at += len(block.data)

    def _add_entries(self, indexing: IndexWriter, block: RecordBlock, gone: Offsets, hashes: Hashes) -> None:
        """Add the block's kept records to the new index, with their lengths as written."""
        lengths = block.ends - block.starts
        lengths[block.rows] += len(self.padding)
        if not block.data.endswith(b"\n"):
            lengths[-1] += len(self.union.eol)
        if len(hashes) < len(lengths):  # some records are not rows
            hashes, found = np.full(len(lengths), BLANK), hashes
            hashes[block.rows] = found
        indexing.add(np.delete(key_index.entries_of(hashes, lengths), gone))

    # The indexed merge parses only rows whose key may be in the file; all others are copied verbatim. The index alone
    # is never trusted: each row that it points to must have the recorded key hash and length.

    def _keep_indexed(self, master: Master, index: KeyIndex) -> None:
        """Also raises IndexMismatch where the index does not cover the master."""
        at, end = master.header.size_bytes, master.identity.size
        buffer = bytearray(CHUNK_BYTES)  # reused, so that the kernel has no new pages to clear
        for entries in index.pieces():
            ends = at + np.cumsum(key_index.lengths_in(entries))
            places = self.keys.candidates(entries)
            gone, done = [], 0
            while done < len(entries):
                # Up to CHUNK_BYTES at a time, or a single longer record.
                stop = max(int(np.searchsorted(ends, at + CHUNK_BYTES, "right")), done + 1)
                size = int(ends[stop - 1]) - at
                if size > min(MASTER_RECORD_BYTES, end - at):
                    raise IndexMismatch
                data = memoryview(buffer if size <= len(buffer) else bytearray(size))[:size]
                if master.file.readinto(data) != size:
                    raise IndexMismatch
                low, high = np.searchsorted(places, (done, stop)).tolist()
                asked = places[low:high]
                lengths = key_index.lengths_in(entries[asked])
                starts = ends[asked] - at - lengths
                hits = self._confirmed(cut(data, starts, starts + lengths), lengths, entries[asked], master.header)
                gone.append(asked[hits])
                self.beat(size)
                self._keep(data, at, starts[hits], (starts + lengths)[hits])
                done, at = stop, at + size
            if self.indexing is not None:
                self.indexing.add(np.delete(entries, np.concatenate(gone)))
        if at != end:
            raise IndexMismatch
        self.kept = index.rows - self.taken

    def _confirmed(self, raw: bytes, lengths: Offsets, asked: Hashes, header: CsvHeader) -> Offsets:
        """Which of these records, that the index points to, have a key of the file; counts them."""
        if not len(asked):
            return NONE
        try:
            block = RecordBlock(raw, find_field_bounds(raw, self.dialect), 0)
            hashes, hits, rows = self._find(block, len(header.names))
        except UnmergeableFile as error:
            raise IndexMismatch from error
        if len(block.rows) != len(asked) or not np.array_equal(block.ends, np.cumsum(lengths)):
            raise IndexMismatch
        if ((hashes ^ asked) > LENGTH).any():
            raise IndexMismatch
        self._count(rows, block, block.rows[hits])
        return hits


def _ranges(starts: Offsets, ends: Offsets) -> tuple[Offsets, Offsets]:
    """The bounds of these records, ascending; adjacent ones are joined into one range."""
    apart = starts[1:] != ends[:-1]
    return np.concatenate((starts[:1], starts[1:][apart])), np.concatenate((ends[:-1][apart], ends[-1:]))
