"""Files that cannot be merged, set aside with the reason.

Invariant: the reason is on the disk before the file leaves the inbox, and the file itself is moved, never changed: a
crash in between leaves it in the inbox, where the next run comes to the same end under the same names. What lies in
the folder belongs to its user: nothing is ever overwritten or deleted there, but the reason of the very same file.
"""

import json
import logging
import os
import shutil
import stat
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from app.core.files import TEMPORARY_SUFFIX, bounded_name, sync_directory, sync_file, write_durably
from app.csv_inbox.faults import Stuck, Unmergeable, Unsteady
from app.csv_inbox.history import REJECTED, Load, save_load
from app.csv_inbox.inbox import Candidate, unchanged
from app.csv_inbox.places import BAD_ROWS, REASON, REJECTED_BYTES, Places, placed, printable, stamp

log = logging.getLogger(__name__)


def reject(places: Places, candidate: Candidate, cause: Unmergeable, load: Load, at: datetime) -> Path:
    """Move the file to `rejected_dir`, its reason beside it, and record it; where it lies now.

    Raises OSError, Unsteady when it is gone or another file by now, and Stuck for what can only lie where it is.
    """
    name = candidate.path.name
    if not unchanged(candidate):  # what lies there now was not looked at
        raise Unsteady(f"{name} is gone or was changed while it was read", "no action needed; the next run looks again")
    bad_rows = cause.header + b"".join(record + b"\n" for record in cause.records) if cause.records else b""
    with placed(places.config.rejected_dir):
        target = _target(places.config.rejected_dir, candidate, bad_rows, at)
        reason = _beside(target, REASON)
        # A reason without its file is that of a run that was killed here: its record is written again, not once more.
        load_id = _told_before(reason).get("load_id") or load.load_id
        content = _reason(cause, printable(name), at) | {"source": _source(candidate), "load_id": load_id}
        text = json.dumps(content, indent=2, ensure_ascii=False).encode("utf-8", "backslashreplace")
        write_durably(reason, [text, b"\n"])
        if bad_rows:
            write_durably(_beside(target, BAD_ROWS), [bad_rows])
    with placed(places.loads):
        save_load(places.loads, Load(load_id, load.run_id, printable(name), load.at, REJECTED, error=cause.message))
    with placed(places.config.rejected_dir):
        _move(candidate.path, target)
    log.debug("moved %s to %s", printable(name), target)
    return target


def _target(folder: Path, candidate: Candidate, bad_rows: bytes, at: datetime) -> Path:
    """A name under which nothing of another file lies there yet."""
    name, suffix, number = candidate.path.name, "", 0
    while True:
        target = folder / bounded_name(name, suffix, REJECTED_BYTES)
        if not os.path.lexists(target) and _is_free(target, candidate, bad_rows):
            return target
        suffix = f".{stamp(at)}" + (f".{number}" if number else "")
        number += 1


def _is_free(target: Path, candidate: Candidate, bad_rows: bytes) -> bool:
    """True unless the reason there is another file's, or the bad rows there are others or were corrected."""
    reason, rows = _beside(target, REASON), _beside(target, BAD_ROWS)
    if os.path.lexists(reason) and _told_before(reason).get("source") != _source(candidate):
        return False
    return not os.path.lexists(rows) or (rows.is_file() and rows.read_bytes() == bad_rows)


def _beside(target: Path, suffix: str) -> Path:
    return target.with_name(target.name + suffix)


def _source(candidate: Candidate) -> list[int]:
    identity = candidate.identity
    return [identity.inode, identity.size, identity.mtime_ns]


def _told_before(reason: Path) -> dict[str, Any]:
    try:
        told = json.loads(reason.read_bytes())
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def _reason(cause: Unmergeable, name: str, at: datetime) -> dict[str, Any]:
    first = cause.faults[0]
    return {
        "file": name,
        "line": first.line,
        "column": first.column,
        "value": first.value,
        "reason": first.reason,
        "hint": cause.hint,
        "rejected_at": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "faults": [asdict(fault) for fault in cause.faults],
        "more_faults": cause.more,
    }


def _move(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError as error:
        if not os.path.lexists(source):
            raise Unsteady("it was to be set aside and is gone", "no action needed; somebody took it away") from error
        if not _other_device(source, target):
            raise
        _copy(source, target)
        sync_directory(target.parent)
        source.unlink()
    sync_directory(target.parent)
    sync_directory(source.parent)


def _copy(source: Path, target: Path) -> None:
    """The same on another file system: a file, a link as the link that it is, a pipe as a new one. Raises Stuck."""
    mode = source.lstat().st_mode
    if stat.S_ISFIFO(mode):
        os.mkfifo(target, stat.S_IMODE(mode))
    elif stat.S_ISLNK(mode):
        target.symlink_to(source.readlink())
    elif stat.S_ISREG(mode):
        # Under a name that a restart removes, so that a copy that was cut never passes for the file.
        temporary = target.with_name(f".{target.name}{REASON}{TEMPORARY_SUFFIX}")
        shutil.copy2(source, temporary)
        with temporary.open("rb") as file:
            sync_file(file.fileno())
        temporary.rename(target)
    else:
        raise Stuck("it cannot go to another file system", "remove it from the inbox, or set rejected_dir on its disk")


def _other_device(source: Path, target: Path) -> bool:
    return source.lstat().st_dev != target.parent.stat().st_dev
