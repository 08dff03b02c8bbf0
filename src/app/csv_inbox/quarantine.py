"""Quarantine for files that cannot be merged.

The reason is on disk before the file leaves the inbox, and the file is moved, never changed: after a crash in between,
the next run finishes the move under the same names. The rejected folder belongs to its user: nothing in it is
overwritten or deleted, except the reason of the very same file.
"""

import itertools
import json
import logging
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from app.core.files import NAME_BYTES, TEMPORARY_SUFFIX, bounded_name, sync_directory, write_durably
from app.core.ledger import KeptFile
from app.csv_inbox.config import FileStillChanging, StuckFile, UnmergeableFile, printable
from app.csv_inbox.discovery import (
    BAD_ROWS,
    REASON,
    WRITTEN_BYTES,
    Candidate,
    InboxPaths,
    copy_durably,
    free_paths,
    time_stamp,
    translate_os_errors,
)
from app.csv_inbox.transaction import REJECTED, LoadRecord, load_id_of, loads, save_load, text_of

REJECTED_BYTES = NAME_BYTES - WRITTEN_BYTES - len(BAD_ROWS)
"""The longest name of a rejected file that leaves room for the names of its reason and its bad rows."""
log = logging.getLogger(__name__)


def reject(paths: InboxPaths, candidate: Candidate, cause: UnmergeableFile, run_id: str, at: datetime) -> Path:
    """Move the file to `rejected_dir`, write its reason next to it, and record it; returns its new path.

    Raises OSError, FileStillChanging if the file is gone or was replaced, and StuckFile if it cannot be moved to
    another file system.
    """
    if not candidate.is_unchanged():  # the current content was not checked
        raise FileStillChanging("it is gone or was changed while it was read")
    folder, raw_name = paths.config.rejected_dir, candidate.path.name
    plain = folder / bounded_name(raw_name, limit_bytes=REJECTED_BYTES)
    stamped = free_paths(folder, raw_name, f".{time_stamp(at)}", limit_bytes=REJECTED_BYTES)
    target = next(each for each in itertools.chain((plain,), stamped) if _is_free(each, candidate, cause.bad_rows))
    reason = _beside(target, REASON)
    # A reason without its file is from a run that was killed here: reuse its record instead of adding a second one.
    load_id = _told_before(reason).get("load_id") or load_id_of(paths.loads, at)
    content = {
        "file": candidate.name,
        **{name: getattr(cause.faults[0], name) for name in ("line", "column", "value", "reason")},
        "hint": cause.hint,
        "rejected_at": text_of(at),
        "faults": [asdict(fault) for fault in cause.faults],
        "more_faults": cause.more,
        "source": candidate.identity[1:],
        "load_id": load_id,
    }
    text = json.dumps(content, indent=2, ensure_ascii=False).encode("utf-8", "backslashreplace")
    write_durably(reason, [text, b"\n"])
    if cause.bad_rows:
        write_durably(_beside(target, BAD_ROWS), [cause.bad_rows])
    with translate_os_errors(str(paths.loads)):
        save_load(paths.loads, LoadRecord(load_id, run_id, candidate.name, text_of(at), REJECTED, error=cause.message))
    _move(candidate.path, target)
    log.debug("moved %s to %s", candidate.name, printable(str(target)))
    return target


def _is_free(target: Path, candidate: Candidate, bad_rows: bytes) -> bool:
    """False if there is a file, if the reason there is another file's, or if the bad rows there are not these."""
    reason, rows = _beside(target, REASON), _beside(target, BAD_ROWS)
    if os.path.lexists(target):
        return False
    if os.path.lexists(reason) and _told_before(reason).get("source") != list(candidate.identity[1:]):
        return False
    return not os.path.lexists(rows) or (rows.is_file() and rows.read_bytes() == bad_rows)


def _beside(target: Path, suffix: str) -> Path:
    return target.with_name(target.name + suffix)


def _told_before(reason: Path) -> dict[str, Any]:
    """What a reason file says; empty if there is none, or not one of ours."""
    with suppress(OSError, ValueError, TypeError):
        told: dict[str, Any] = dict(json.loads(reason.read_bytes()))
        return told
    return {}


def rejected_by(paths: InboxPaths, run_id: str) -> Sequence[KeptFile]:
    """The files that a run rejected and that are still there, by name, without links. Raises Transient, Permanent."""
    folder = paths.config.rejected_dir
    with translate_os_errors(str(folder)):
        load_ids = {load.load_id for load in loads(paths.loads) if (load.run_id, load.outcome) == (run_id, REJECTED)}
        reasons = sorted(folder.glob(f"*{REASON}")) if load_ids else []
        of_run = (each for each in reasons if _told_before(each).get("load_id") in load_ids)
        found = (each.with_name(each.name.removesuffix(REASON)) for each in of_run)
        regular = (path for path in found if path.is_file() and not path.is_symlink())
        return [KeptFile(printable(path.name), path.stat().st_size, path=path) for path in regular]


def _move(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError as error:
        if not os.path.lexists(source):
            raise FileStillChanging("it was to be set aside and is gone") from error
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
        copy_durably(source, temporary)
        temporary.rename(target)
    else:
        raise StuckFile(
            "it cannot go to another file system", "remove it from the inbox, or set rejected_dir on its disk"
        )
