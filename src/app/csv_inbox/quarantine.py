"""Files that cannot be merged, set aside with the reason.

Invariant: the reason is on the disk before the file leaves the inbox, and the file itself is moved, never changed: a
crash in between leaves it in the inbox, where the next run comes to the same end under the same names.
"""

import json
import os
import shutil
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from app.core.files import sync_directory, sync_file, write_durably
from app.csv_inbox.faults import Unmergeable
from app.csv_inbox.history import REJECTED, Load, save_load
from app.csv_inbox.inbox import Candidate
from app.csv_inbox.places import BAD_ROWS, REASON, Places, printable, unused


def reject(places: Places, candidate: Candidate, cause: Unmergeable, load: Load, at: datetime) -> Path:
    """Move the file to `rejected_dir`, its reason beside it, and record it; where it lies now. Raises OSError."""
    folder = places.config.rejected_dir
    name = candidate.path.name
    target = folder / name
    if os.path.lexists(target):
        target = unused(folder, name, at)
    reason = target.with_name(target.name + REASON)
    # A reason without its file is that of a run that was killed here: its record is written again, not once more.
    load_id = _told_before(reason) or load.load_id
    content = _reason(cause, printable(name), at) | {"load_id": load_id}
    write_durably(
        reason, [json.dumps(content, indent=2, ensure_ascii=False).encode("utf-8", "backslashreplace"), b"\n"]
    )
    if cause.records:
        rows = [record + b"\n" for record in cause.records]
        write_durably(target.with_name(target.name + BAD_ROWS), [cause.header, *rows])
    told = Load(load_id, load.run_id, printable(name), load.at, REJECTED, error=cause.message)
    save_load(places.loads, told)
    _move(candidate.path, target)
    return target


def _told_before(reason: Path) -> str:
    try:
        told = json.loads(reason.read_bytes())
        return str(told.get("load_id", ""))
    except (OSError, ValueError, AttributeError):
        return ""


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
        if not _other_device(source, target):
            raise
        if not source.is_file() or source.is_symlink():
            raise OSError(error.errno, "only a regular file can go to another file system", str(source)) from error
        shutil.copy2(source, target)
        with target.open("rb") as file:
            sync_file(file.fileno())
        sync_directory(target.parent)
        source.unlink()
    sync_directory(target.parent)
    sync_directory(source.parent)


def _other_device(source: Path, target: Path) -> bool:
    return source.lstat().st_dev != target.parent.stat().st_dev
