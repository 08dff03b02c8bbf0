"""One merge or undo as one transaction: writing the journal commits it, and recovery completes a committed one.

Order: all new files are on disk under temporary names, and the input is linked into the archive, before an atomic
rename creates the journal. From then on the transaction is committed; the remaining renames can be repeated. Without a
journal nothing has happened, and temporary files are removed. fsync is never retried.

Journal, metadata and history may be lost or restored from a backup at any time; recovery then works from the master,
archive and inbox. Only an input that exists solely under the archive's pending name stops recovery.
"""

import json
import logging
import os
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from app.core.errors import Permanent, Rejected, Transient
from app.core.files import bounded_name, keep_mode, sync_directory, sync_file, write_durably
from app.core.ledger import Tally, ledger_of
from app.core.runs import Report
from app.csv_inbox.config import FileStillChanging, InboxConfig, StuckFile, UnmergeableFile
from app.csv_inbox.csv_tokenizer import CsvDialect, blocks
from app.csv_inbox.discovery import (
    MEBIBYTE,
    UNIT,
    Candidate,
    FileIdentity,
    InboxPaths,
    InboxRun,
    free_paths,
    identity_at,
    identity_of,
    link_or_copy,
    md5_of,
    name_folder_in_errors,
    numbered_names,
    open_regular,
    printable,
    time_stamp,
    unchanged,
)
from app.csv_inbox.incoming import IncomingFile, read_header, read_incoming
from app.csv_inbox.key_index import IndexMismatch
from app.csv_inbox.merge import MergeResult, master_header, merge
from app.csv_inbox.quarantine import (
    MERGED,
    UNDONE,
    LoadRecord,
    check_master,
    load_id_of,
    load_of,
    loads,
    prune,
    revert_file,
    save_load,
    text_of,
)

VERSION = 1
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PendingRename:
    """A temporary file to be renamed to its final name. `inode` shows whether that was done already."""

    temporary: Path
    target: Path
    inode: int


@dataclass(frozen=True, slots=True)
class PendingArchive:
    """The input's move from the inbox to the archive. `digest` is the MD5 of the merged content."""

    pending: Path
    target: Path
    source: Path
    identity: FileIdentity
    digest: str


@dataclass(frozen=True, slots=True)
class Transaction:
    """Everything to do after the commit. If the first renaming is impossible, nothing else is done."""

    renamings: Sequence[PendingRename]
    removals: Sequence[Path]
    archiving: PendingArchive | None
    load: LoadRecord


def renaming(temporary: Path, target: Path) -> PendingRename:
    """The renaming of a finished file."""
    return PendingRename(temporary, target, temporary.stat().st_ino)


def commit(paths: InboxPaths, transaction: Transaction) -> None:
    """Commit the transaction. Raises OSError; then it is not committed."""
    # The names must be on disk before the journal that refers to them.
    archive = {transaction.archiving.pending.parent} if transaction.archiving else set()
    for folder in {each.temporary.parent for each in transaction.renamings} | archive:
        sync_directory(folder)
    write_durably(paths.journal, [json.dumps(_to_json(transaction, paths.folder), indent=1).encode("ascii")])


def complete(paths: InboxPaths, transaction: Transaction) -> bool:
    """Carry out the transaction; skips finished steps, so it can be repeated after any crash.

    Returns False if it was abandoned. Raises Permanent if it can be neither completed nor abandoned.
    """
    # The first renaming replaces the master: if it is impossible, nothing else may be done.
    if _removes_a_later_master(paths, transaction) or not all(map(_rename, transaction.renamings[:1])):
        _give_up(paths, transaction)
        return False
    for each in transaction.renamings[1:]:
        if not _rename(each):
            log.warning("%s is gone: %s stays as it is", each.temporary.name, each.target.name)
    for path in transaction.removals:
        path.unlink(missing_ok=True)
    for folder in {path.parent for path in (*(each.target for each in transaction.renamings), *transaction.removals)}:
        sync_directory(folder)
    if transaction.archiving:
        _archive(transaction.archiving)
    save_load(paths.loads, transaction.load)
    prune(paths.loads, paths.config.undo_keep)
    paths.journal.unlink()
    sync_directory(paths.folder)
    return True


def _rename(each: PendingRename) -> bool:
    """True once the target is the transaction's file; False if that file is gone or was replaced since."""
    if each.temporary.exists():
        each.temporary.replace(each.target)
        log.debug("renamed %s to %s", each.temporary.name, each.target)
        return True
    # Either renamed before a crash, or replaced since: only the inode shows which.
    return each.target.exists() and each.target.stat().st_ino == each.inode


def _give_up(paths: InboxPaths, transaction: Transaction) -> None:
    """Abandon a transaction whose first file is gone: the journal is outdated, or the master was replaced.

    An input in the archive was merged; one still in the inbox is merged again. Raises Permanent if it is in neither.
    """
    archiving = transaction.archiving
    if archiving and archiving.pending.exists() and not _is_merged(archiving):
        new, old = transaction.renamings[0].temporary.name, transaction.renamings[0].target.name
        raise Permanent(
            f"a committed step cannot be completed: {new} is gone, {old} is another file",
            "put both back as they were, or remove the merge journal beside the master if the master is right as it is",
        )
    log.warning("%s: the journal does not fit what is there; the master stays as it is", transaction.load.file)
    recorded = {load.load_id for load in loads(paths.loads)}
    if archiving and os.path.lexists(archiving.target) and transaction.load.load_id not in recorded:
        save_load(paths.loads, transaction.load)
    paths.journal.unlink()
    sync_directory(paths.folder)


def _removes_a_later_master(paths: InboxPaths, transaction: Transaction) -> bool:
    """True if an undo would delete a master that changed after the merge it undoes."""
    master = paths.config.merged_file
    if master not in transaction.removals or not master.exists():
        return False
    found = master.stat()
    return (found.st_size, found.st_mtime_ns) != (transaction.load.size_bytes, transaction.load.mtime_ns)


def _archive(each: PendingArchive) -> None:
    """Rename the pending link to its archive name, and remove the inbox's name unless it is a different file by now.

    Rows appended since the file was read move with it: they are found in the archive and ingested as a separate file. A
    rewritten file stays in the inbox, to be merged and archived again.
    """
    merged = _is_merged(each)
    if each.pending.exists() and (merged or _inode(each.pending) != _inode(each.source)):
        each.pending.rename(each.target)
        log.debug("archived %s as %s", each.source.name, each.target)
    if os.path.lexists(each.target) and merged:
        each.source.unlink(missing_ok=True)
    each.pending.unlink(missing_ok=True)
    for folder in {each.target.parent, each.source.parent}:
        sync_directory(folder)


def _is_merged(each: PendingArchive) -> bool:
    """True if the inbox's name is still the merged file, possibly with more appended."""
    found, held = identity_at(each.source), each.identity
    if found is None or found == held:
        return found == held
    linked = found.inode == held.inode and found.inode in (_inode(each.pending), _inode(each.target))
    if not linked or found.size <= held.size:
        return False
    try:
        with open_regular(each.source) as file:
            return md5_of(file, held.size) == each.digest
    except (UnmergeableFile, FileStillChanging, StuckFile) as error:
        log.warning("%s stays in the inbox: %s", each.source.name, error.message)
        return False


def _inode(path: Path) -> int:
    found = identity_at(path)
    return found.inode if found else -1


def recover(paths: InboxPaths) -> LoadRecord | None:
    """Complete a committed transaction and remove leftovers; returns the completed load, if any.

    Raises OSError, and Permanent if the journal is damaged or cannot be completed.
    """
    done = None
    try:
        transaction = _from_json(json.loads(paths.journal.read_bytes()), paths.folder)
    except FileNotFoundError:
        transaction = None
    except ValueError as error:
        raise Permanent(
            f"the merge journal {paths.journal.name} is damaged: {error}",
            "compare master and metadata with a backup, then remove the journal; nothing was changed",
        ) from error
    # After a crash past the commit, do the rest now. A crash before it left only temporary files to remove.
    if transaction is not None:
        paths.loads.mkdir(exist_ok=True)
        if complete(paths, transaction):
            done = transaction.load
    paths.remove_leftovers()
    return done


def _to_json(transaction: Transaction, folder: Path) -> Mapping[str, Any]:
    """As JSON; paths are relative to the master's folder, so that the whole tree can be moved before a restart."""

    def near(path: Path) -> str:
        return os.path.relpath(path, folder)

    archiving = transaction.archiving
    return {
        "version": VERSION,
        "renamings": [[near(each.temporary), near(each.target), each.inode] for each in transaction.renamings],
        "removals": [near(path) for path in transaction.removals],
        "archiving": archiving
        and {
            "pending": near(archiving.pending),
            "target": near(archiving.target),
            "source": near(archiving.source),
            "identity": archiving.identity._asdict(),
            "digest": archiving.digest,
        },
        "load": asdict(transaction.load),
    }


def _from_json(content: Mapping[str, Any], folder: Path) -> Transaction:
    archiving = None
    if way := content["archiving"]:
        target = folder / way["target"]
        archiving = PendingArchive(
            folder / way["pending"],
            target.with_name(bounded_name(target.name)),  # earlier versions committed names that are too long
            folder / way["source"],
            FileIdentity(**way["identity"]),
            way["digest"],
        )
    return Transaction(
        [
            PendingRename(folder / temporary, folder / target, inode)
            for temporary, target, inode in content["renamings"]
        ],
        [folder / path for path in content["removals"]],
        archiving,
        load_of(content["load"]),
    )


# Merging one file as one transaction. Before the commit only temporary files change; they are removed if it fails. A
# dry run merges only into a temporary folder.

KEPT_BYTES = 1 << 23


def merge_file(inbox: InboxRun, candidate: Candidate) -> Report:
    """Merge one file. Raises UnmergeableFile, FileStillChanging, Transient, Permanent, OSError."""
    at, began = inbox.clock(), time.monotonic()
    name, paths, master = printable(candidate.path.name), inbox.paths, inbox.config.merged_file
    load = LoadRecord(load_id_of(paths.loads, at), inbox.context.run_id, name, text_of(at), MERGED)

    def temporary(what: str) -> Path:
        return paths.temporary(load.load_id, what)

    try:
        incoming, merged = _read_and_merge(
            inbox, candidate, load, master=master, index=paths.index, temporary=temporary
        )
        load = replace(merged.load, seconds=time.monotonic() - began)
        transaction = _prepare(inbox, candidate, incoming, merged, load)
        commit(paths, transaction)
    finally:
        if not paths.journal.exists():  # after a commit the journal needs them
            paths.remove_leftovers()
    complete(paths, transaction)
    if temporary("index").exists():  # rename the index only after its master
        temporary("index").replace(paths.index)
    inbox.tell(transaction.load.summary())
    numbers = (load.rows_after, len(merged.columns), load.size_bytes)
    log.info("%s: written, %d rows, %d columns, %d bytes", master.name, *numbers)
    return _report(incoming, load)


@contextmanager
def preview_merge(inbox: InboxRun) -> Iterator[Callable[[Candidate], Report]]:
    """A dry run: yields a function that reports what merging a file, after the earlier ones, would do.

    That function raises as `merge_file` does.
    """
    master, index = inbox.config.merged_file, inbox.paths.index
    with tempfile.TemporaryDirectory(prefix="headwater-csv-inbox-") as name:
        folder = Path(name)

        def rehearse(candidate: Candidate) -> Report:
            nonlocal master, index
            unique = uuid4().hex
            load = LoadRecord("", inbox.context.run_id, printable(candidate.path.name), "", "valid")
            with name_folder_in_errors(folder):
                incoming, merged = _read_and_merge(
                    inbox,
                    candidate,
                    load,
                    master=master,
                    index=index,
                    temporary=lambda what: folder / f"{unique}.{what}",
                )
            incoming.spool.unlink()
            if master.parent == folder:
                master.unlink()
            master, index = folder / f"{unique}.master", folder / f"{unique}.index"
            inbox.told.append(merged.load.summary())
            return _report(incoming, merged.load)

        yield rehearse


def _report(incoming: IncomingFile, load: LoadRecord) -> Report:
    """The report for one file. A row replaced by a later row of the same file counts as corrected."""
    tally = Tally(
        counted=incoming.counted,
        read=incoming.rows,
        new=load.inserted,
        already_there=load.unchanged,
        corrected=load.replaced + incoming.duplicates,
    )
    ledger = ledger_of(tally, unit=UNIT).of_partition(load.file)
    return Report(rows=incoming.rows, bytes=incoming.identity.size, ledger=ledger)


def _read_and_merge(
    inbox: InboxRun,
    candidate: Candidate,
    load: LoadRecord,
    *,
    master: Path,
    index: Path,
    temporary: Callable[[str], Path],
) -> tuple[IncomingFile, MergeResult]:
    """Check, spool and merge one file into temporary files; the master and its index need not exist."""
    # glibc returns memory to the kernel once the idle part exceeds twice the largest block ever freed; the kernel then
    # has to clear each page again, a hundred pages per megabyte merged. Freeing one large, untouched block raises that
    # limit, so memory is reused from block to block. The daemon sets its own limits.
    bytearray(KEPT_BYTES)
    config = inbox.config
    header = master_header(master, config)
    beat = inbox.beat(master if header else None)
    incoming = read_incoming(candidate.path, header, config, temporary("rows"), beat)
    if candidate.md5 not in ("", incoming.md5):
        raise FileStillChanging(
            f"{candidate.path.name} changed under its name", "no action needed; the next run looks again"
        )
    log.debug(
        "%s: MD5 %s, %d rows in %d bytes, %d distinct keys; master %s",
        *(load.file, "unchanged" if candidate.md5 else "read once"),
        *(incoming.counted, incoming.identity.size, incoming.keys.count),
        f"with {len(header.names)} columns" if header else "not there yet",
    )
    load = replace(
        load,
        rows=incoming.rows,
        duplicates=incoming.duplicates,
        source=incoming.identity,
        source_md5=incoming.md5,
        rows_at=incoming.header.size_bytes,
        unended_bytes=incoming.unended_bytes,
    )
    size = incoming.offsets[-1] + (master.stat().st_size if header else 0)
    work = partial(
        merge,
        master if header else None,
        incoming,
        config,
        load,
        out=temporary("master"),
        removed=temporary("removed") if config.undo_keep and not inbox.context.dry_run else None,
        new_index=temporary("index") if size >= config.index_from_mb * MEBIBYTE else None,
        beat=beat,
    )
    try:
        return incoming, work(index=index)
    except IndexMismatch:
        for what in ("master", "removed", "index"):
            temporary(what).unlink(missing_ok=True)
        return incoming, work(index=None)


def _prepare(
    inbox: InboxRun, candidate: Candidate, incoming: IncomingFile, merged: MergeResult, load: LoadRecord
) -> Transaction:
    """Make everything durable under temporary names and link the input into the archive: ready to commit.

    Raises FileStillChanging if the input was replaced, and Transient if a program that does not take the lock replaced
    the master.
    """
    paths, config, at = inbox.paths, inbox.config, inbox.clock()
    metadata = paths.temporary(load.load_id, "metadata", config.metadata_file.parent)
    with name_folder_in_errors(config.metadata_file.parent):
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
    with name_folder_in_errors(config.archive_dir):
        archiving = _archiving(inbox, candidate, incoming, load.load_id, at)
    found = identity_of(config.merged_file.stat()) if config.merged_file.exists() else None
    if found != (identity_of(merged.before) if merged.before else None):
        raise Transient(
            f"the master {config.merged_file.name} was replaced while it was read",
            "no action needed; the next run merges into what it is then",
        )
    archive_name = archiving.target.name
    load = replace(load, archived_as=printable(archive_name), archive_name=archive_name)
    return Transaction(renamings, [paths.temporary(load.load_id, "rows")], archiving, load)


def _archiving(
    inbox: InboxRun, candidate: Candidate, incoming: IncomingFile, load_id: str, at: datetime
) -> PendingArchive:
    """Link exactly the file that was read into the archive. Raises FileStillChanging."""
    pending, name = inbox.paths.pending(load_id), candidate.path.name
    try:
        link_or_copy(candidate.path, pending)
    except FileNotFoundError as error:
        if candidate.path.exists():  # then the archive folder is missing
            raise
        raise FileStillChanging(f"{name} is gone", "no action needed; the file was removed") from error
    if not unchanged(replace(candidate, identity=incoming.identity)):
        raise FileStillChanging(f"{name} was replaced while it was read", "no action needed; the next run merges it")
    target = next(free_paths(inbox.config.archive_dir, name, numbered_names(f".{time_stamp(at)}")))
    return PendingArchive(pending, target, candidate.path, incoming.identity, incoming.md5)


def write_metadata(temporary: Path, columns: Sequence[str], rows: int, at: datetime) -> None:
    """Write the metadata durably to a temporary file. `last_updated` is UTC without an offset, as documented."""
    content = {
        "last_updated": at.replace(tzinfo=None).isoformat(timespec="microseconds"),
        "row_count": rows,
        "column_count": len(columns),
        "columns": list(columns),
    }
    with temporary.open("x", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        sync_file(file.fileno())


# Undoing merges, newest first, each as one committed transaction: the master is restored byte for byte.
#
# Invariant: a master that changed since the last merge is never overwritten; archived files stay in the archive.


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
        dialect = CsvDialect(config.csv_delimiter, config.csv_encoding)
        with restored.open("rb", buffering=0) as file:
            header = read_header(file.read, dialect)
            file.seek(header.size_bytes)
            rows = sum(len(block.rows) for block in blocks(file.read, dialect, 1))
        write_metadata(metadata, header.names, rows, at)
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
        size = 2 * load.ranges * ranges.itemsize
        removed.seek(-size, os.SEEK_END)
        ranges.frombytes(removed.read(size))
        removed.seek(0)
        at = 0
        for offset, length in zip(ranges[0::2], ranges[1::2], strict=True):
            _copy(master, out, offset - at, beat)
            _copy(removed, out, length, beat)
            at = offset + length
        _copy(master, out, load.kept_bytes - master.tell(), beat)
        out.flush()
        # Restore the modification time too: the previous merge recognises its master by size and time.
        os.utime(out.fileno(), ns=(load.mtime_before_ns, load.mtime_before_ns))
        sync_file(out.fileno())


def _copy(source: IO[bytes], out: IO[bytes], size: int, beat: Callable[[int], None]) -> None:
    while size > 0:
        piece = source.read(min(size, MEBIBYTE))
        if not piece:
            raise Rejected("what was kept of the master is incomplete", "restore the master from a backup instead")
        out.write(piece)
        beat(len(piece))
        size -= len(piece)
