"""Quarantine for files that cannot be merged, with the reason, and the history of merged and rejected files."""

import itertools
import json
import logging
import os
import shutil
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

from app.core.errors import Rejected
from app.core.files import TEMPORARY_SUFFIX, sync_directory, sync_file, write_durably
from app.core.ledger import KeptFile
from app.csv_inbox.config import FileStillChanging, InboxConfig, StuckFile, UnmergeableFile
from app.csv_inbox.discovery import (
    BAD_ROWS,
    REASON,
    RECORD,
    REJECTED_BYTES,
    Candidate,
    FileIdentity,
    InboxPaths,
    free_paths,
    identity_at,
    name_folder_in_errors,
    numbered_names,
    printable,
    time_stamp,
    unchanged,
)

KEPT_LOADS = 1000
RECENT_LOADS = 50
REVERT = ".undo"
LEAST_CHARACTERS = 4
STAMP_CHARACTERS = len("YYYYMMDDTHHMMSS.mmm")
MERGED, REJECTED, UNDONE = "merged", "rejected", "undone"
log = logging.getLogger(__name__)


# The load history: one small record file for each merged or rejected file. A record is written as part of its own
# transaction, under a name that stays the same when the transaction is repeated; only the newest records are kept.


def load_id_of(folder: Path, at: datetime) -> str:
    """A new record name. Names sort by time, and this one sorts last even if the clock was set back.

    Undo relies on this order: the newest merge is undone first.
    """
    newest = max((name[:STAMP_CHARACTERS] for name in _record_names(folder)), default="")
    with suppress(ValueError, OverflowError):
        at = max(at, datetime.strptime(f"{newest}000+0000", "%Y%m%dT%H%M%S.%f%z") + timedelta(milliseconds=1))
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
    `source` its device, inode, size and modification time at the last check (empty if unknown); `source_md5` the MD5
    of everything ingested by then; `rows_at` the offset of its first row; `unended_bytes` the size of a last record
    without a line end.
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
    source: tuple[int, ...] = ()
    source_md5: str = ""
    rows_at: int = 0
    unended_bytes: int = 0

    def summary(self) -> str:
        """One line for people."""
        if self.outcome == REJECTED:
            return f"{self.file}: rejected: {self.error}"
        parts = [f"{self.rows} rows: {self.inserted} inserted, {self.replaced} replaced, {self.unchanged} unchanged"]
        if self.duplicates:
            parts.append(f"{self.duplicates} rows whose key comes again later in the file left out")
        columns = (("added", self.columns_added), ("removed", self.columns_removed))
        parts += [f"columns {word}: {', '.join(names)[:500]}" for word, names in columns if names]
        return f"{self.file}: {self.outcome}, {'; '.join(parts)}; {self.rows_after} rows in all"


def load_of(content: Mapping[str, Any]) -> LoadRecord:
    """A load from its JSON record; unknown keys, from later versions, are ignored."""
    known = {each.name for each in fields(LoadRecord)}
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in content.items()
    }
    return LoadRecord(**{name: value for name, value in values.items() if name in known})


def save_load(folder: Path, load: LoadRecord) -> None:
    """Write or replace the record, durably. Raises OSError."""
    text = json.dumps(asdict(load), indent=1)
    write_durably(folder / f"{load.load_id}{RECORD}", [text.encode("ascii")])


def loads(folder: Path, limit: int = KEPT_LOADS) -> Sequence[LoadRecord]:
    """Newest first; empty if there is no folder. Unreadable records are skipped."""
    names = _record_names(folder)
    found = []
    for name in sorted(names, reverse=True)[:limit]:
        with suppress(OSError, ValueError, TypeError):
            found.append(load_of(json.loads((folder / name).read_bytes())))
    return found


def _record_names(folder: Path) -> list[str]:
    """The names of the record files; none if there is no folder."""
    try:
        return [path.name for path in folder.iterdir() if path.suffix == RECORD and path.name[0] != "."]
    except FileNotFoundError:
        return []


def revert_file(folder: Path, load_id: str) -> Path:
    """The undo file of a merge; it exists as long as the merge can be undone."""
    return folder / f"{load_id}{REVERT}"


def prune(folder: Path, undo_keep: int) -> None:
    """Remove all but the newest `undo_keep` undo files, and the oldest records. Idempotent."""
    # A merge can be undone for as long as its undo file is there.
    reverts, records = (sorted(folder.glob(f"*{suffix}"), reverse=True) for suffix in (REVERT, RECORD))
    for path in (*reverts[undo_keep:], *records[KEPT_LOADS:]):
        path.unlink(missing_ok=True)


def history_row(load: LoadRecord) -> Mapping[str, Any]:
    """A load as one line of a table."""
    columns = [f"+{name}" for name in load.columns_added] if load.rows_before else []
    columns += [f"-{name}" for name in load.columns_removed]
    as_it_is = ("at", "file", "outcome", "rows", "inserted", "replaced", "unchanged")
    return {name: getattr(load, name) for name in as_it_is} | {
        "columns": " ".join(columns)[:200],
        "total": load.rows_after,
        "seconds": round(load.seconds, 2),
        "run": load.run_id[:12],
        "run_id": load.run_id,
        "error": load.error,
    }


def to_undo(paths: InboxPaths, run_id: str) -> Sequence[LoadRecord]:
    """The merges of a run and all later ones, newest first. `run_id` may be a prefix. Raises Rejected."""
    merged = [load for load in loads(paths.loads) if load.outcome == MERGED]
    wanted = [place for place, load in enumerate(merged) if load.run_id.startswith(run_id)]
    if not wanted or len(run_id) < LEAST_CHARACTERS:
        told = f"no merge of a run {run_id[:40]!r} is in the history"
        raise Rejected(told, "take the run from: python -m app runs csv_inbox")
    if len({merged[place].run_id for place in wanted}) > 1:
        raise Rejected(f"several runs begin with {run_id!r}", "give more of the run's id")
    taken = merged[: wanted[-1] + 1]
    gone = next((load for load in taken if not revert_file(paths.loads, load.load_id).exists()), None)
    if gone is not None:
        kept = paths.config.undo_keep
        hint = f"only the last undo_keep={kept} merges can be taken back; drop corrected rows into the inbox instead"
        raise Rejected(f"the merge of {gone.file} at {gone.at} can no longer be undone", hint)
    return taken


def preview(load: LoadRecord) -> str:
    """Describes what undoing this merge does."""
    return (
        f"{load.file}, merged {load.at}: {load.inserted} inserted rows go, {load.replaced + load.unchanged} rows come "
        f"back as they were; {load.rows_after} rows become {load.rows_before}"
    )


def check_master(config: InboxConfig, load: LoadRecord) -> None:
    """Raises Rejected unless the master is as this merge left it, by size and modification time."""
    if not _is_as_left(config, load):
        raise Rejected(
            f"{config.merged_file.name} was changed by something else since {load.file} was merged",
            "put back the file as the merge left it; undoing would destroy what was done since",
        )


def _is_as_left(config: InboxConfig, load: LoadRecord) -> bool:
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
    if last is None or _is_as_left(paths.config, last):
        return ""
    what = "was changed by something else" if paths.config.merged_file.exists() else "is gone"
    return (
        f"{paths.config.merged_file.name} {what} since {last.file} was merged at {last.at}, when it had "
        f"{last.rows_after} rows; if rows lack, restore it, or copy their files from the archive into the inbox"
    )


@dataclass(frozen=True, slots=True)
class GrownFile:
    """An archived file that has changed since it was merged. `load` is the record of the merge."""

    load: LoadRecord
    path: Path
    found: FileIdentity

    @property
    def merged(self) -> FileIdentity:
        """The file's identity at the last check."""
        return FileIdentity(*self.load.source)

    def is_steady(self) -> bool:
        """True if the file has not changed since it was found."""
        return identity_at(self.path) == self.found


def changed_archive_files(paths: InboxPaths) -> Sequence[GrownFile]:
    """The archived files in the load history that were written to since they were merged. Raises OSError."""
    changed = []
    for load in loads(paths.loads):
        if load.outcome != MERGED or not load.source:
            continue
        path, merged = paths.config.archive_dir / load.archive_name, FileIdentity(*load.source)
        found = identity_at(path)
        if found and found != merged and (found.device, found.inode) == (merged.device, merged.inode):
            changed.append(GrownFile(load, path, found))
    return changed


# Quarantine. The reason is on disk before the file leaves the inbox, and the file is moved, never changed: after a
# crash in between, the next run finishes the move under the same names. The rejected folder belongs to its user:
# nothing in it is overwritten or deleted, except the reason of the very same file.


def reject(paths: InboxPaths, candidate: Candidate, cause: UnmergeableFile, run_id: str, at: datetime) -> Path:
    """Move the file to `rejected_dir`, write its reason next to it, and record it; returns its new path.

    Raises OSError, FileStillChanging if the file is gone or was replaced, and StuckFile if it cannot be moved to
    another file system.
    """
    name = candidate.path.name
    if not unchanged(candidate):  # the current content was not checked
        raise FileStillChanging(
            f"{name} is gone or was changed while it was read", "no action needed; the next run looks again"
        )
    bad_rows = cause.header + b"".join(record + b"\n" for record in cause.records) if cause.records else b""
    with name_folder_in_errors(paths.config.rejected_dir):
        suffixes = itertools.chain(("",), numbered_names(f".{time_stamp(at)}"))
        targets = free_paths(paths.config.rejected_dir, name, suffixes, REJECTED_BYTES)
        target = next(each for each in targets if _is_free(each, candidate, bad_rows))
        reason = _beside(target, REASON)
        # A reason without its file is from a run that was killed here: reuse its record instead of adding a second one.
        load_id = _told_before(reason).get("load_id") or load_id_of(paths.loads, at)
        content = _reason(cause, printable(name), at) | {"source": _source(candidate), "load_id": load_id}
        text = json.dumps(content, indent=2, ensure_ascii=False).encode("utf-8", "backslashreplace")
        write_durably(reason, [text, b"\n"])
        if bad_rows:
            write_durably(_beside(target, BAD_ROWS), [bad_rows])
    with name_folder_in_errors(paths.loads):
        save_load(paths.loads, LoadRecord(load_id, run_id, printable(name), text_of(at), REJECTED, error=cause.message))
    with name_folder_in_errors(paths.config.rejected_dir):
        _move(candidate.path, target)
    log.debug("moved %s to %s", printable(name), target)
    return target


def _is_free(target: Path, candidate: Candidate, bad_rows: bytes) -> bool:
    """False if the reason there belongs to another file, or the bad rows there differ or were corrected."""
    reason, rows = _beside(target, REASON), _beside(target, BAD_ROWS)
    if os.path.lexists(reason) and _told_before(reason).get("source") != _source(candidate):
        return False
    return not os.path.lexists(rows) or (rows.is_file() and rows.read_bytes() == bad_rows)


def _beside(target: Path, suffix: str) -> Path:
    return target.with_name(target.name + suffix)


def _source(candidate: Candidate) -> list[int]:
    return [candidate.identity.inode, candidate.identity.size, candidate.identity.mtime_ns]


def _told_before(reason: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        told = json.loads(reason.read_bytes())
        return told if isinstance(told, dict) else {}
    return {}


def rejected_by(paths: InboxPaths, run_id: str) -> Sequence[KeptFile]:
    """The files that a run rejected and that are still there, by name, without links. Raises OSError."""
    load_ids = {load.load_id for load in loads(paths.loads) if (load.run_id, load.outcome) == (run_id, REJECTED)}
    reasons = sorted(paths.config.rejected_dir.glob(f"*{REASON}")) if load_ids else []
    found = (each.with_name(each.name.removesuffix(REASON)) for each in reasons if _load_id(each) in load_ids)
    regular = (path for path in found if path.is_file() and not path.is_symlink())
    return [KeptFile(printable(path.name), path.stat().st_size, path=path) for path in regular]


def _load_id(reason: Path) -> str:
    return str(_told_before(reason).get("load_id", ""))


def _reason(cause: UnmergeableFile, name: str, at: datetime) -> dict[str, Any]:
    first = cause.faults[0]
    return {
        "file": name,
        "line": first.line,
        "column": first.column,
        "value": first.value,
        "reason": first.reason,
        "hint": cause.hint,
        "rejected_at": text_of(at),
        "faults": [asdict(fault) for fault in cause.faults],
        "more_faults": cause.more,
    }


def _move(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError as error:
        if not os.path.lexists(source):
            raise FileStillChanging(
                "it was to be set aside and is gone", "no action needed; the file was removed"
            ) from error
        # Copy to another file system; on the same one the rename failed for another reason.
        if source.lstat().st_dev == target.parent.stat().st_dev:
            raise
        _copy(source, target)
        sync_directory(target.parent)
        source.unlink()
    sync_directory(target.parent)
    sync_directory(source.parent)


def _copy(source: Path, target: Path) -> None:
    """Copy to another file system: a file, a link (not its target), or a pipe as a new one. Raises StuckFile."""
    mode = source.lstat().st_mode
    if stat.S_ISFIFO(mode):
        os.mkfifo(target, stat.S_IMODE(mode))
    elif stat.S_ISLNK(mode):
        target.symlink_to(source.readlink())
    elif stat.S_ISREG(mode):
        # Under a temporary name that a restart removes, so that a partial copy is never taken for the file.
        temporary = target.with_name(f".{target.name}{REASON}{TEMPORARY_SUFFIX}")
        shutil.copy2(source, temporary)
        with temporary.open("rb") as file:
            sync_file(file.fileno())
        temporary.rename(target)
    else:
        raise StuckFile(
            "it cannot go to another file system", "remove it from the inbox, or set rejected_dir on its disk"
        )
