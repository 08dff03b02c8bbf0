"""The upsert: merges an incoming file into the master in one pass over the master.

Invariants: master rows whose key is not in the file are copied verbatim, in order; memory is bounded by one block and
the file's keys. The master is only read, never written; an unreadable master stops the run.
"""

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
from app.csv_inbox.config import FaultKind, FileStillChanging, InboxConfig, UnmergeableFile
from app.csv_inbox.csv_tokenizer import CellSlices, CsvDialect, Offsets, RecordBlock, blocks, cut, malformed, pairs
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
from app.csv_inbox.file_keys import Truths, equal_pairs, first_positions
from app.csv_inbox.incoming import CsvHeader, IncomingFile, read_header
from app.csv_inbox.transaction import LoadRecord

READ_BYTES = 1 << 20
SCAN_BYTES = 1 << 21
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
    """Check, spool and merge one file into temporary files; the master need not exist."""
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
        load, columns = merge(paths, old, incoming, load, beat)
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
    paths: InboxPaths, master: Master | None, incoming: IncomingFile, load: LoadRecord, beat: Beat
) -> tuple[LoadRecord, Sequence[str]]:
    """Write the new master, and the undo data if wanted, durably to temporary files of `paths`.

    Returns the finished record and the columns. `beat` receives byte counts and may stop the merge. Raises Permanent,
    OSError, and Transient if the master was written to.
    """
    config, union = paths.config, incoming.union
    with ExitStack() as files:

        def created(what: str, buffering: int = -1) -> IO[bytes]:
            file: IO[bytes] = files.enter_context(paths.temporary(load.load_id, what).open("xb", buffering))
            keep_mode(config.merged_file, file.fileno())
            return file

        upsert = Upsert(
            incoming,
            files.enter_context(incoming.spool.open("rb", buffering=0)),
            out=created("master", JOIN_BYTES),
            # If columns are added, undo keeps the whole old master instead of the removed rows.
            removed=created("removed") if config.undo_keep and not union.added else None,
            beat=beat,
        )
        if master is None:
            upsert.out.write(union.header(upsert.dialect))
        else:
            try:
                upsert.keep_rows(master)
            except UnmergeableFile as error:
                raise _unreadable(config.merged_file, error) from error
            # A program that does not take the lock may have written in place: then we read a mix of two versions.
            if identity_of(os.fstat(master.file.fileno())) != master.identity:
                told = f"the master {config.merged_file.name} was written to while it was read"
                raise Transient(told, "no action needed; the next run merges into what it is then")
        dropped, after = upsert.finish(paths.temporary(load.load_id, "master"))
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

    `removed`, if undo is wanted, takes the rows that go, and then their `ranges` in the old master, offset and length.

    Each key of the file counts once, however often the master has it: as unchanged if its first row there equals the
    new row byte for byte, else as replaced. `matched` says of each row of the file whether it replaces one of the
    master. `doubtful` are columns in which no kept row has had a value so far.
    """

    def __init__(
        self, incoming: IncomingFile, spool: IO[bytes], *, out: IO[bytes], removed: IO[bytes] | None, beat: Beat
    ) -> None:
        self.out, self.removed, self.beat, self.spool = out, removed, beat, spool
        self.keys, self.union, self.dialect = incoming.keys, incoming.union, incoming.out
        self.padding = self.dialect.delimiter.encode() * len(self.union.added)
        self.offsets: Offsets = np.frombuffer(incoming.offsets, np.int64)
        self.matched: Truths = np.zeros(incoming.rows, np.bool_)
        self.doubtful: Sequence[int] = self.union.doubtful
        self.kept = self.taken = self.unchanged = self.appended = 0
        self.ranges = array("q")

    def keep_rows(self, master: Master) -> None:
        """Write the master's header and the rows that stay.

        Raises UnmergeableFile for an invalid master, OSError and what `beat` raises.
        """
        header = master.header
        master.file.seek(0)
        raw = master.file.read(header.size_bytes)  # with what lies before the header: undo expects it there
        eol = b"" if header.eol else self.union.eol
        self.out.write(self.union.header(self.dialect) if self.padding else raw + eol)
        at, width = header.size_bytes, len(header.names)
        for block in blocks(master.file.read, self.dialect, 1 + header.line, SCAN_BYTES):
            self.beat(len(block.data))
            block.check_text(self.dialect.encoding)
            for place in np.flatnonzero(block.widths != width)[:1].tolist():
                position, told = int(block.rows[place]), f"{block.widths[place]} fields where the header has {width}"
                raise malformed(FaultKind.RAGGED, told, block.line_of(position), block.record(position))
            places, rows = self.keys.find(block.cells(self.union.key, self.dialect))
            self.kept += len(block.rows) - len(places)
            if self.doubtful:
                stays = np.delete(np.arange(len(block.rows)), places)
                lengths = ((place, block.cells(place, self.dialect).lengths) for place in self.doubtful)
                self.doubtful = [place for place, sizes in lengths if not sizes[stays].any()]
            gone = block.rows[places]
            if len(gone):
                self._count(rows, block, gone)
            self._keep_block(block, at, gone)
            at += len(block.data)

    def _count(self, rows: Offsets, block: RecordBlock, gone: Offsets) -> None:
        """Count the master's records that are removed; `rows` are the file's rows that replace them."""
        self.taken += len(rows)
        first = first_positions(rows)
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
            self.unchanged += int(np.count_nonzero(equal_pairs(old, self._spooled(there[part], lengths[part]))))

    def _spooled(self, starts: Offsets, lengths: Offsets) -> CellSlices:
        """These spooled records: one read of the whole span, unless it is too long."""
        descriptor, base, end = self.spool.fileno(), int(starts.min()), int((starts + lengths).max())
        if end - base <= READ_BYTES:
            return CellSlices(np.frombuffer(os.pread(descriptor, end - base, base), np.uint8), starts - base, lengths)
        return CellSlices.of([os.pread(descriptor, length, start) for start, length in pairs(starts, lengths)])

    def _keep_block(self, block: RecordBlock, at: int, gone: Offsets) -> None:
        """Write the block, which is at this offset of the master, without the records `gone`, which are kept for undo.

        Kept records change only by the padding for added columns.
        """
        first, last = _ranges(block.starts[gone], block.ends[gone])
        if self.removed is not None:
            self.removed.write(cut(block.data, first, last))
            self.ranges.frombytes(np.stack((first + at, last - first), axis=1).astype(np.int64).tobytes())
        held = memoryview(block.data)
        stays = zip([0, *last.tolist()], [*first.tolist(), len(held)], strict=True)
        if self.padding:
            self.out.writelines(self._padded(held, block.stops[block.rows], stays))
        else:
            self.out.writelines(held[start:end] for start, end in stays)
        last_goes = len(gone) and int(gone[-1]) == len(block.ends) - 1
        if not block.data.endswith(b"\n") and not last_goes:
            self.out.write(self.union.eol)  # the master's last record may lack its line end, and rows follow now

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

    def finish(self, path: Path) -> tuple[frozenset[int], FileIdentity]:
        """Append the file's rows, only the last row of each key; make everything durable.

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
        return dropped, identity_of(os.fstat(self.out.fileno()))

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


def _ranges(starts: Offsets, ends: Offsets) -> tuple[Offsets, Offsets]:
    """The bounds of these records, ascending; adjacent ones are joined into one range."""
    apart = starts[1:] != ends[:-1]
    return np.concatenate((starts[:1], starts[1:][apart])), np.concatenate((ends[:-1][apart], ends[-1:]))
