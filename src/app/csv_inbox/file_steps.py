"""The steps that change the master, each one transaction: merging a file, taking in rows that were appended to it
later, and undoing a merge; and the rehearsal of a merge for a dry run.

Invariants: before the commit only temporary files change, and they are removed if a step fails. Undo never overwrites a
master that changed since the merge. Appended rows return to the inbox exactly once; an archived file that was edited in
any other way is left to its user.
"""

import json
import logging
import os
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import IO, NamedTuple
from uuid import uuid4

from app.core.errors import Rejected, Transient
from app.core.files import keep_mode, sync_file
from app.core.ledger import Tally, ledger_of
from app.core.runs import Report
from app.csv_inbox.config import FileStillChanging, InboxConfig, StuckFile, UnmergeableFile, printable
from app.csv_inbox.csv_tokenizer import CsvDialect, blocks
from app.csv_inbox.discovery import (
    MEBIBYTE,
    PENDING,
    SUFFIX,
    UNIT,
    Candidate,
    FileIdentity,
    InboxPaths,
    InboxRun,
    candidate,
    free_paths,
    identity_at,
    identity_of,
    link_or_copy,
    md5_of,
    open_regular,
    read_some,
    time_stamp,
    translate_os_errors,
)
from app.csv_inbox.incoming import IncomingFile, read_header, read_incoming
from app.csv_inbox.key_index import IndexMismatch
from app.csv_inbox.merge import merge, open_master
from app.csv_inbox.transaction import (
    MERGED,
    UNDONE,
    LoadRecord,
    PendingArchive,
    Transaction,
    check_master,
    commit,
    complete,
    load_id_of,
    renaming,
    revert_file,
    save_load,
    text_of,
)

KEPT_BYTES = 1 << 23
log = logging.getLogger(__name__)


class _Merged(NamedTuple):
    """A merge that lies in temporary files: its record, the new columns, and the old master's identity, if any."""

    incoming: IncomingFile
    load: LoadRecord
    columns: Sequence[str]
    master: FileIdentity | None


def merge_file(inbox: InboxRun, each: Candidate) -> Report:
    """Merge one file. Raises UnmergeableFile, FileStillChanging, Transient, Permanent, OSError."""
    at, began, paths = inbox.clock(), time.monotonic(), inbox.paths
    master = paths.config.merged_file
    load = LoadRecord(load_id_of(paths.loads, at), inbox.context.run_id, each.name, text_of(at), MERGED)
    try:
        merged = _read_and_merge(inbox, paths, each, load, master=master, index=paths.index)
        load = replace(merged.load, seconds=time.monotonic() - began)
        transaction = _prepare(inbox, each, merged, load)
        commit(paths, transaction)
    finally:
        if not paths.journal.exists():  # after a commit the journal needs them
            paths.remove_leftovers()
    complete(paths, transaction)
    new_index = paths.temporary(load.load_id, "index")
    if new_index.exists():  # rename the index only after its master
        new_index.replace(paths.index)
    inbox.tell(load.summary())
    numbers = (load.rows_after, len(merged.columns), load.size_bytes)
    log.info("%s: written, %d rows, %d columns, %d bytes", master.name, *numbers)
    return _report(merged.incoming, load)


@contextmanager
def rehearsal(inbox: InboxRun) -> Iterator[Callable[[Candidate], Report]]:
    """A dry run: yields a function that reports what merging a file, after the earlier ones, would do.

    That function raises as `merge_file` does.
    """
    master, index = inbox.config.merged_file, inbox.paths.index
    with tempfile.TemporaryDirectory(prefix="headwater-csv-inbox-") as name:
        folder = Path(name)
        paths = InboxPaths(inbox.config.model_copy(update={"merged_file": folder / master.name, "undo_keep": 0}))

        def rehearse(each: Candidate) -> Report:
            nonlocal master, index
            load = LoadRecord(uuid4().hex, inbox.context.run_id, each.name, "", "valid")
            with translate_os_errors(str(folder)):
                merged = _read_and_merge(inbox, paths, each, load, master=master, index=index)
            merged.incoming.spool.unlink()
            master, index = paths.config.merged_file, paths.index
            paths.temporary(load.load_id, "master").replace(master)
            index.unlink(missing_ok=True)
            if (new_index := paths.temporary(load.load_id, "index")).exists():
                new_index.replace(index)
            inbox.told.append(merged.load.summary())
            return _report(merged.incoming, merged.load)

        yield rehearse


def _report(incoming: IncomingFile, load: LoadRecord) -> Report:
    """The report for one file. A row replaced by a later row of the same file counts as corrected."""
    tally = Tally(
        counted=incoming.counted,
        read=incoming.rows,
        new=load.inserted,
        already_there=load.unchanged,
        corrected=load.replaced + load.duplicates,
    )
    ledger = ledger_of(tally, unit=UNIT).of_partition(load.file)
    return Report(rows=incoming.rows, bytes=incoming.identity.size, ledger=ledger)


def _read_and_merge(
    inbox: InboxRun, paths: InboxPaths, each: Candidate, load: LoadRecord, *, master: Path, index: Path
) -> _Merged:
    """Check, spool and merge one file into temporary files of `paths`; the master and its index need not exist."""
    # glibc returns memory to the kernel once the idle part exceeds twice the largest block ever freed; the kernel then
    # has to clear each page again, a hundred pages per megabyte merged. Freeing one large, untouched block raises that
    # limit, so memory is reused from block to block. The daemon sets its own limits.
    bytearray(KEPT_BYTES)
    with ExitStack() as files:
        old = open_master(files, master, paths.config)
        beat = inbox.beat(old.identity.size if old else 0)
        spool = paths.temporary(load.load_id, "rows")
        incoming = read_incoming(each.path, old.header if old else None, paths.config, spool, beat)
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
            load, columns = merge(paths, old, incoming, load, index=index, beat=beat)
        except IndexMismatch:
            for what in ("master", "removed", "index"):
                paths.temporary(load.load_id, what).unlink(missing_ok=True)
            load, columns = merge(paths, old, incoming, load, index=None, beat=beat)
    return _Merged(incoming, load, columns, old.identity if old else None)


def _prepare(inbox: InboxRun, each: Candidate, merged: _Merged, load: LoadRecord) -> Transaction:
    """Make everything durable under temporary names and link the input into the archive: ready to commit.

    Raises FileStillChanging if the input was replaced, and Transient if a program that does not take the lock replaced
    the master.
    """
    paths, config, at = inbox.paths, inbox.config, inbox.clock()
    metadata = paths.temporary(load.load_id, "metadata", config.metadata_file.parent)
    write_metadata(metadata, merged.columns, load.rows_after, at)
    renamings = [
        renaming(paths.temporary(load.load_id, "master"), config.merged_file),
        renaming(metadata, config.metadata_file),
    ]
    if config.undo_keep:
        removed = paths.temporary(load.load_id, "removed")
        if load.revert == "whole":
            removed.unlink(missing_ok=True)
            link_or_copy(config.merged_file, removed)
        elif load.revert == "first":
            removed.touch()
        renamings.append(renaming(removed, revert_file(paths.loads, load.load_id)))
    with translate_os_errors(str(config.archive_dir)):
        archiving = _archiving(inbox, each, merged.incoming, load.load_id, at)
    found = identity_of(config.merged_file.stat()) if config.merged_file.exists() else None
    if found != merged.master:
        raise Transient(
            f"the master {config.merged_file.name} was replaced while it was read",
            "no action needed; the next run merges into what it is then",
        )
    archive_name = archiving.target.name
    load = replace(load, archived_as=printable(archive_name), archive_name=archive_name)
    return Transaction(renamings, [paths.temporary(load.load_id, "rows")], archiving, load)


def _archiving(inbox: InboxRun, each: Candidate, incoming: IncomingFile, load_id: str, at: datetime) -> PendingArchive:
    """Link exactly the file that was read into the archive. Raises FileStillChanging."""
    pending = inbox.config.archive_dir / f"{PENDING}{load_id}"
    try:
        link_or_copy(each.path, pending)
    except FileNotFoundError as error:
        if each.path.exists():  # then the archive folder is missing
            raise
        raise FileStillChanging("it is gone") from error
    if identity_at(each.path) != incoming.identity:
        raise FileStillChanging("it was replaced while it was read")
    target = next(free_paths(inbox.config.archive_dir, each.path.name, f".{time_stamp(at)}"))
    return PendingArchive(pending, target, each.path, incoming.identity, incoming.md5)


def write_metadata(temporary: Path, columns: Sequence[str], rows: int, at: datetime) -> None:
    """Write the metadata durably to a temporary file. `last_updated` is UTC without an offset, as documented."""
    content = {
        "last_updated": at.replace(tzinfo=None).isoformat(timespec="microseconds"),
        "row_count": rows,
        "column_count": len(columns),
        "columns": list(columns),
    }
    with translate_os_errors(str(temporary.parent)), temporary.open("x", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        sync_file(file.fileno())


# Rows appended to a file after it was merged, by a writer that paused for longer than `checksum_wait_seconds`. Such a
# writer holds the file open, so its rows end up in the archived file. They become a new file in the inbox, below the
# same header; that file and the record of how far the old one was ingested are one transaction.


def ingest_appended_rows(inbox: InboxRun, load: LoadRecord, grown: Candidate) -> Candidate | None:
    """Put rows appended to a merged file into the inbox as a new file; None if there are none. Raises OSError."""
    merged, found = FileIdentity(*load.source), grown.identity
    try:
        with open_regular(grown.path) as file, translate_os_errors(str(inbox.config.watch_dir)):
            if found.size < merged.size or md5_of(file, merged.size) != load.source_md5:
                told = "was changed after it was merged, and not by rows at its end; copy it into the inbox to merge it"
                inbox.tell(f"{grown.name} {told}", logging.WARNING)
            elif found.size > merged.size:
                return _moved_back(inbox, load, grown, file)
            save_load(inbox.paths.loads, _dealt_with(load, grown, file))
    except (UnmergeableFile, FileStillChanging, StuckFile) as error:
        inbox.tell(f"{grown.name}: rows may have been written to it after it was merged: {error.message}")
    return None


def _dealt_with(load: LoadRecord, grown: Candidate, file: IO[bytes], unended_bytes: int = 0) -> LoadRecord:
    """The record of the merge after the whole file, as found, was processed."""
    found = grown.identity
    return replace(load, source=found, source_md5=md5_of(file, found.size), unended_bytes=unended_bytes)


def _moved_back(inbox: InboxRun, load: LoadRecord, grown: Candidate, file: IO[bytes]) -> Candidate | None:
    paths, found, merged_bytes = inbox.paths, grown.identity, FileIdentity(*load.source).size
    start = merged_bytes
    if load.unended_bytes:  # the last merged row may continue in the appended bytes
        file.seek(start)
        # If a line end comes first, the last row was complete and only lacked its line end.
        if read_some(file, 2).lstrip(b"\r")[:1] != b"\n":
            start -= load.unended_bytes
    temporary = paths.temporary(load.load_id, "tail", inbox.config.watch_dir)
    with temporary.open("xb") as out:
        file.seek(0)
        _copy(file, out, load.rows_at, lambda _: None)
        file.seek(start)
        _copy(file, out, found.size - start, lambda _: None)
        out.flush()
        os.utime(out.fileno(), ns=(found.mtime_ns, found.mtime_ns))
        sync_file(out.fileno())
    target = next(free_paths(inbox.config.watch_dir, grown.path.name, f".late-{start}", end=SUFFIX))
    dealt_with = _dealt_with(load, grown, file, _unended_bytes(inbox.config, temporary, found.size - start))
    transaction = Transaction([renaming(temporary, target)], [], None, dealt_with)
    if not grown.is_unchanged():
        temporary.unlink()
        raise FileStillChanging("it is still being written")
    commit(paths, transaction)
    complete(paths, transaction)
    again = "; its last row was incomplete then" if start < merged_bytes else ""
    told = f"{found.size - merged_bytes} bytes were written to it after it was merged{again}"
    inbox.tell(f"{grown.name}: {told}; ingested as {printable(target.name)}")
    return candidate(target)


def _unended_bytes(config: InboxConfig, path: Path, tail_bytes: int) -> int:
    """The size of a last row without a line end; `tail_bytes` if the file ends inside quotes."""
    with path.open("rb") as file:
        try:
            header = read_header(file.read, CsvDialect(config.csv_delimiter, config.csv_encoding), ())
            file.seek(header.size_bytes)
            unended = 0
            for block in blocks(file.read, header.dialect, 1):
                unended = 0 if block.data.endswith(b"\n") else len(block.data) - int(block.starts[-1])
        except UnmergeableFile:  # cut inside quotes: the file is rejected, and its rows come again with what follows
            return tail_bytes
    return unended


# Undoing merges, newest first: the master is restored byte for byte; archived files stay in the archive.


def undo_merge(paths: InboxPaths, load: LoadRecord, at: datetime, beat: Callable[[int], None]) -> None:
    """Undo the newest merge; `beat` receives the bytes written and may stop it before the commit.

    Raises Rejected if the master was changed since, and OSError.
    """
    config = paths.config
    check_master(config, load)
    removed = revert_file(paths.loads, load.load_id)
    renamings, removals = [], [removed]
    if load.revert == "first":
        removals = [config.merged_file, config.metadata_file, removed]
    else:
        restored = paths.temporary(load.load_id, "restored")
        metadata = paths.temporary(load.load_id, "metadata", config.metadata_file.parent)
        if load.revert == "whole":
            link_or_copy(removed, restored)
        else:
            _splice(config, load, removed, restored, beat)
        with restored.open("rb", buffering=0) as file:
            header = read_header(file.read, CsvDialect(config.csv_delimiter, config.csv_encoding))
        write_metadata(metadata, header.names, load.rows_before, at)
        renamings = [renaming(restored, config.merged_file), renaming(metadata, config.metadata_file)]
    transaction = Transaction(renamings, removals, None, replace(load, outcome=UNDONE, revert=""))
    check_master(config, load)  # again: a program that does not take the lock may have written to it meanwhile
    commit(paths, transaction)
    complete(paths, transaction)


def _splice(config: InboxConfig, load: LoadRecord, kept: Path, restored: Path, beat: Callable[[int], None]) -> None:
    """Write the master's kept bytes with the removed rows back in place; in `kept` the ranges follow the rows."""
    with (
        config.merged_file.open("rb", buffering=0) as master,
        kept.open("rb", buffering=0) as removed,
        restored.open("xb") as out,
    ):
        keep_mode(config.merged_file, out.fileno())
        ranges = array("q")
        rows_bytes = os.fstat(removed.fileno()).st_size - 2 * load.ranges * ranges.itemsize
        if rows_bytes >= 0:
            removed.seek(rows_bytes)
            ranges.frombytes(removed.read())
            removed.seek(0)
            for offset, length in zip(ranges[0::2], ranges[1::2], strict=True):
                _copy(master, out, offset - out.tell(), beat)
                _copy(removed, out, length, beat)
            _copy(master, out, load.kept_bytes - master.tell(), beat)
        if (master.tell(), removed.tell()) != (load.kept_bytes, rows_bytes):
            raise Rejected("what was kept of the master is damaged", "restore the master from a backup instead")
        out.flush()
        # Restore the modification time too: the previous merge recognises its master by size and time.
        os.utime(out.fileno(), ns=(load.mtime_before_ns, load.mtime_before_ns))
        sync_file(out.fileno())


def _copy(source: IO[bytes], out: IO[bytes], size: int, beat: Callable[[int], None]) -> None:
    """Copy the next bytes, fewer where the file ends before. Raises StuckFile on a read error."""
    while size > 0 and (piece := read_some(source, min(size, MEBIBYTE))):
        out.write(piece)
        beat(len(piece))
        size -= len(piece)
