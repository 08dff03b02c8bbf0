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
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from app.core.errors import Permanent, Transient
from app.core.files import bounded_name, sync_directory, sync_file, write_durably
from app.csv_inbox.config import FileStillChanging, InboxConfig, StuckFile, UnmergeableFile, printable
from app.csv_inbox.discovery import (
    PENDING,
    RECORD,
    UNKNOWN_FILE,
    Candidate,
    FileIdentity,
    InboxPaths,
    InboxRun,
    free_paths,
    identity_at,
    identity_of,
    link_or_copy,
    md5_of,
    open_regular,
    time_stamp,
    translate_os_errors,
)

VERSION = 1
KEPT_LOADS = 1000
RECENT_LOADS = 50
REVERT = ".undo"
STAMP_CHARACTERS = len("YYYYMMDDTHHMMSS.mmm")
MERGED, REJECTED, UNDONE = "merged", "rejected", "undone"
log = logging.getLogger(__name__)


# The load history: one small record file for each merged or rejected file. A record is written as part of its own
# transaction, under a name that stays the same when the transaction is repeated; only the newest records are kept.


def load_id_of(folder: Path, at: datetime) -> str:
    """A new record name. Names sort by time, and this one sorts last even if the clock was set back.

    Undo relies on this order: the newest merge is undone first.
    """
    with suppress(IndexError, ValueError, OverflowError):  # no record yet, or one under a name that is not ours
        newest = f"{_record_names(folder)[0][:STAMP_CHARACTERS]}000+0000"
        at = max(at, datetime.strptime(newest, "%Y%m%dT%H%M%S.%f%z") + timedelta(milliseconds=1))
    return f"{time_stamp(at)}-{uuid4().hex[:8]}"


def text_of(at: datetime) -> str:
    """A UTC timestamp as the history shows it."""
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass(frozen=True, slots=True)
class LoadRecord:
    """The outcome of one file. `load_id` begins with its UTC timestamp, so names sort by time.

    `revert` is how the merge can be undone: "rows" (removed rows were kept), "whole" (the old master was kept),
    "first" (there was no master), "" (cannot be undone). `size_bytes` and `mtime_ns` are the master's after the merge;
    `mtime_before_ns` is its modification time before.

    The last five fields serve to find rows appended to the file later: `archive_name` is its raw name in the archive;
    `source` the file at the last check (UNKNOWN_FILE if not kept); `source_md5` the MD5 of everything ingested by
    then; `rows_at` the offset of its first row; `unended_bytes` the size of a last record without a line end.
    """

    load_id: str
    run_id: str
    file: str
    at: str
    outcome: str
    rows: int = 0
    inserted: int = 0
    replaced: int = 0
    unchanged: int = 0
    duplicates: int = 0
    columns_added: tuple[str, ...] = ()
    columns_removed: tuple[str, ...] = ()
    rows_before: int = 0
    rows_after: int = 0
    seconds: float = 0.0
    archived_as: str = ""
    error: str = ""
    revert: str = ""
    kept_bytes: int = 0
    ranges: int = 0
    size_bytes: int = 0
    mtime_ns: int = 0
    mtime_before_ns: int = 0
    archive_name: str = ""
    source: FileIdentity = UNKNOWN_FILE
    source_md5: str = ""
    rows_at: int = 0
    unended_bytes: int = 0

    def summary(self) -> str:
        """One line for people."""
        parts = [f"{self.rows} rows: {self.inserted} inserted, {self.replaced} replaced, {self.unchanged} unchanged"]
        if self.duplicates:
            parts.append(f"{self.duplicates} rows whose key comes again later in the file left out")
        columns = (("added", self.columns_added), ("removed", self.columns_removed))
        parts += [f"columns {word}: {printable(', '.join(names)[:500])}" for word, names in columns if names]
        return f"{self.file}: {self.outcome}, {'; '.join(parts)}; {self.rows_after} rows in all"


def load_of(content: Mapping[str, Any]) -> LoadRecord:
    """A load from its JSON record; unknown keys, from later versions, are ignored."""
    known = {each.name for each in fields(LoadRecord)} & content.keys()
    values: dict[str, Any] = {name: tuple(x) if isinstance(x := content[name], list) else x for name in known}
    return LoadRecord(**values | {"source": FileIdentity(*(values.get("source") or UNKNOWN_FILE))})


def save_load(folder: Path, load: LoadRecord) -> None:
    """Write or replace the record, durably. Raises OSError."""
    content = asdict(load) | ({"source": []} if load.source == UNKNOWN_FILE else {})
    text = json.dumps(content, indent=1)
    write_durably(folder / f"{load.load_id}{RECORD}", [text.encode("ascii")])


def _record_names(folder: Path) -> Sequence[str]:
    """The names of the record files, newest first; none if there is no folder."""
    return sorted((path.name for path in folder.glob(f"[!.]*{RECORD}")), reverse=True)


def loads(folder: Path, limit: int = KEPT_LOADS) -> Sequence[LoadRecord]:
    """Newest first; empty if there is no folder. Unreadable records are skipped."""
    found = []
    for name in _record_names(folder)[:limit]:
        with suppress(OSError, ValueError, TypeError, AttributeError):
            found.append(load_of(json.loads((folder / name).read_bytes())))
    return found


def revert_file(folder: Path, load_id: str) -> Path:
    """The undo file of a merge; it exists as long as the merge can be undone."""
    return folder / f"{load_id}{REVERT}"


def history_row(load: LoadRecord) -> Mapping[str, Any]:
    """A load as one line of a table."""
    columns = [f"+{name}" for name in load.columns_added] if load.rows_before else []
    columns += [f"-{name}" for name in load.columns_removed]
    as_it_is = ("at", "file", "outcome", "rows", "inserted", "replaced", "unchanged")
    return {name: getattr(load, name) for name in as_it_is} | {
        "columns": printable(" ".join(columns)[:200]),
        "total": load.rows_after,
        "seconds": round(load.seconds, 2),
        "run": load.run_id[:12],
        "run_id": load.run_id,
        "error": load.error,
    }


def is_as_left(config: InboxConfig, load: LoadRecord) -> bool:
    """True if the master is as this merge left it, by size and modification time."""
    try:
        there = config.merged_file.stat()
    except FileNotFoundError:
        return False
    return (there.st_size, there.st_mtime_ns) == (load.size_bytes, load.mtime_ns)


def changed_master(paths: InboxPaths) -> str:
    """A warning if the master is missing or is not as the last merge left it, else "".

    Someone may have restored an older copy that lacks later merges.
    """
    last = next((load for load in loads(paths.loads, RECENT_LOADS) if load.outcome == MERGED), None)
    if last is None or is_as_left(paths.config, last):
        return ""
    what = "was changed by something else" if paths.config.merged_file.exists() else "is gone"
    return (
        f"{paths.config.merged_file.name} {what} since {last.file} was merged at {last.at}, when it had "
        f"{last.rows_after} rows; if rows are missing, restore it, or copy their files from the archive into the inbox"
    )


def changed_archive_files(paths: InboxPaths) -> Sequence[tuple[LoadRecord, Candidate]]:
    """The archived files that were written to since they were merged, each with its merge. Raises OSError."""
    changed = []
    for load in loads(paths.loads):
        if load.outcome != MERGED:
            continue
        path, merged = paths.config.archive_dir / load.archive_name, load.source
        found = identity_at(path)
        if found and found != merged and (found.device, found.inode) == (merged.device, merged.inode):
            changed.append((load, Candidate(path, found)))
    return changed


class PendingRename(NamedTuple):
    """A temporary file to be renamed to its final name. `inode` shows whether that was done already."""

    temporary: Path
    target: Path
    inode: int


class PendingArchive(NamedTuple):
    """The input's move from the inbox to the archive. `digest` is the MD5 of the merged content."""

    pending: Path
    target: Path
    source: Path
    identity: FileIdentity
    digest: str


@dataclass(frozen=True, slots=True)
class Transaction:
    """What the journal says is to be done after the commit; nothing, if the first renaming is impossible."""

    renamings: Sequence[PendingRename]
    removals: Sequence[Path]
    archiving: PendingArchive | None
    load: LoadRecord


def written_metadata(
    paths: InboxPaths, load_id: str, columns: Sequence[str], rows: int, at: datetime
) -> tuple[Path, Path]:
    """Write the metadata durably to a temporary file; returns it and its target.

    `last_updated` is UTC without an offset, as documented.
    """
    target = paths.config.metadata_file
    temporary = paths.temporary(load_id, "metadata", target.parent)
    content = {
        "last_updated": at.replace(tzinfo=None).isoformat(timespec="microseconds"),
        "row_count": rows,
        "column_count": len(columns),
        "columns": list(columns),
    }
    with translate_os_errors(str(target.parent)), temporary.open("x", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        sync_file(file.fileno())
    return temporary, target


def commit_merge(
    inbox: InboxRun, each: Candidate, load: LoadRecord, *, columns: Sequence[str], master: FileIdentity | None
) -> None:
    """Commit and complete a merge whose new master lies in a temporary file. `master` is the old one that was read.

    Raises FileStillChanging if the input was replaced, Transient if a program that does not take the lock replaced the
    master, and OSError.
    """
    paths, config, at = inbox.paths, inbox.config, inbox.clock()
    renamings = [
        (paths.temporary(load.load_id, "master"), config.merged_file),
        written_metadata(paths, load.load_id, columns, load.rows_after, at),
    ]
    if config.undo_keep:
        renamings.append((paths.temporary(load.load_id, "removed"), revert_file(paths.loads, load.load_id)))
    with translate_os_errors(str(config.archive_dir)):
        archiving = _archiving(inbox, each, load, at)
    found = identity_of(config.merged_file.stat()) if config.merged_file.exists() else None
    if found != master:
        raise Transient(
            f"the master {config.merged_file.name} was replaced while it was read",
            "no action needed; the next run merges into what it is then",
        )
    archive_name = archiving.target.name
    load = replace(load, archived_as=printable(archive_name), archive_name=archive_name)
    commit(paths, load, renamings, removals=[paths.temporary(load.load_id, "rows")], archiving=archiving)


def _archiving(inbox: InboxRun, each: Candidate, load: LoadRecord, at: datetime) -> PendingArchive:
    """Link exactly the file that was read into the archive. Raises FileStillChanging."""
    pending = inbox.config.archive_dir / f"{PENDING}{load.load_id}"
    try:
        link_or_copy(each.path, pending)
    except FileNotFoundError as error:
        if each.path.exists():  # then the archive folder is missing
            raise
        raise FileStillChanging("it is gone") from error
    if identity_at(each.path) != load.source:
        raise FileStillChanging("it was replaced while it was read")
    target = next(free_paths(inbox.config.archive_dir, each.path.name, f".{time_stamp(at)}"))
    return PendingArchive(pending, target, each.path, load.source, load.source_md5)


def commit(
    paths: InboxPaths,
    load: LoadRecord,
    renamings: Sequence[tuple[Path, Path]],
    *,
    removals: Sequence[Path] = (),
    archiving: PendingArchive | None = None,
) -> None:
    """Commit a transaction by writing its journal, and complete it as a restart would.

    `renamings` are temporary files and their targets. Raises OSError; it is not committed unless the journal exists.
    """
    # The names must be on disk before the journal that refers to them.
    archive = {archiving.pending.parent} if archiving else set()
    for folder in {temporary.parent for temporary, _ in renamings} | archive:
        sync_directory(folder)
    content = {
        "version": VERSION,
        "renamings": [(temporary, target, temporary.stat().st_ino) for temporary, target in renamings],
        "removals": removals,
        "archiving": archiving and archiving._asdict() | {"identity": archiving.identity._asdict()},
        "load": asdict(load),
    }
    # Paths are relative to the master's folder, so that the whole tree can be moved before a restart.
    text = json.dumps(content, indent=1, default=lambda path: os.path.relpath(path, paths.folder))
    write_durably(paths.journal, [text.encode("ascii")])
    complete(paths)


def complete(paths: InboxPaths) -> LoadRecord | None:
    """Carry out the transaction of the journal; skips finished steps, so it can be repeated after any crash.

    Returns its load, None if it was abandoned. Raises OSError, and Permanent if the journal is damaged or can be
    neither completed nor abandoned.
    """
    transaction = _read_journal(paths)
    master = paths.config.merged_file
    # An undo of the first merge deletes the master; one that changed since is a later one.
    is_later = master in transaction.removals and master.exists() and not is_as_left(paths.config, transaction.load)
    # The first renaming replaces the master: if it is impossible, nothing else may be done.
    if is_later or not all(map(_rename, transaction.renamings[:1])):
        _give_up(paths, transaction)
        return None
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
    # A merge can be undone for as long as its undo file is there.
    reverts = sorted((path.name for path in paths.loads.glob(f"*{REVERT}")), reverse=True)
    for name in (*reverts[paths.config.undo_keep :], *_record_names(paths.loads)[KEPT_LOADS:]):
        (paths.loads / name).unlink(missing_ok=True)
    paths.journal.unlink()
    sync_directory(paths.folder)
    return transaction.load


def _rename(each: PendingRename) -> bool:
    """True once the target is the transaction's file; False if that file is gone or was replaced since."""
    if each.temporary.exists():
        each.temporary.replace(each.target)
        log.debug("renamed %s to %s", each.temporary.name, printable(str(each.target)))
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


def _archive(each: PendingArchive) -> None:
    """Rename the pending link to its archive name, and remove the inbox's name unless it is a different file by now.

    Rows appended since the file was read move with it: they are found in the archive and ingested as a separate file. A
    rewritten file stays in the inbox, to be merged and archived again.
    """
    merged = _is_merged(each)
    if each.pending.exists() and (merged or _inode(each.pending) != _inode(each.source)):
        each.pending.rename(each.target)
        log.debug("archived %s as %s", printable(each.source.name), printable(str(each.target)))
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
        log.warning("%s stays in the inbox: %s", printable(each.source.name), error.message)
        return False


def _inode(path: Path) -> int:
    found = identity_at(path)
    return found.inode if found else -1


def recover(paths: InboxPaths) -> LoadRecord | None:
    """Complete a committed transaction and remove leftovers; returns the completed load, if any.

    Raises OSError, and Permanent if the journal is damaged or cannot be completed.
    """
    done = None
    # After a crash past the commit, do the rest now. A crash before it left only temporary files to remove.
    if paths.journal.exists():
        paths.loads.mkdir(exist_ok=True)
        done = complete(paths)
    for path in paths.leftovers():
        path.unlink(missing_ok=True)
    return done


def _read_journal(paths: InboxPaths) -> Transaction:
    def placed(path: str) -> Path:
        return Path(os.path.normpath(paths.folder / path))

    try:
        content = json.loads(paths.journal.read_bytes())
        archiving = None
        if way := content["archiving"]:
            pending, target, source = (placed(way[name]) for name in ("pending", "target", "source"))
            target = target.with_name(bounded_name(target.name))  # earlier versions committed names that are too long
            archiving = PendingArchive(pending, target, source, FileIdentity(**way["identity"]), way["digest"])
        renamings = [
            PendingRename(placed(temporary), placed(target), inode) for temporary, target, inode in content["renamings"]
        ]
        removals = [placed(path) for path in content["removals"]]
        return Transaction(renamings, removals, archiving, load_of(content["load"]))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise Permanent(
            f"the merge journal {paths.journal.name} is damaged: {error}",
            "compare master and metadata with a backup, then remove the journal; nothing was changed",
        ) from error
